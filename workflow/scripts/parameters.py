"""Parameters of notebooks, workflow/parameters/*.yaml: read, and compared with the notebooks before anything runs."""

import ast
import re
from pathlib import Path

import nbformat
import papermill
import yaml

RESOURCES = {"gpu": 0, "cpus": 2, "mem_mb": 8000, "runtime": 60}  # of a cluster's job; runtime in minutes


class Mistake(SystemExit):
    """Ends a script with a message, without a traceback."""


def read_yaml(file: Path) -> dict:
    try:
        text = file.read_text(encoding="utf-8")
        content, root = yaml.safe_load(text), yaml.compose(text)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        there = ", ".join(sorted(p.stem for p in file.parent.glob("*.yaml")))
        raise Mistake(f"{file} cannot be read as YAML in UTF-8 ({error}); {file.parent}/ has: {there}") from None
    if not isinstance(content, dict):
        raise Mistake(f"{file} must map names to values, like the other files in workflow/")
    for node in [root, *(n for _, v in root.value for n in (v.value if isinstance(v, yaml.SequenceNode) else [v]))]:
        if isinstance(node, yaml.MappingNode) and len({key.value for key, _ in node.value}) < len(node.value):
            raise Mistake(f"{file}: a name is given twice, from line {node.start_mark.line + 1} on")
    return content


def read(file: Path) -> tuple[dict[str, dict], dict[str, int]]:
    """The parameters of each entry, NOTEBOOK or NOTEBOOK@VARIANT, and what a job asks of a cluster (`resources`)."""
    content = read_yaml(file)
    for entry, values in content.items():
        if not isinstance(values, dict) or not re.fullmatch(r"[^@/]+(@[A-Za-z0-9][\w.-]*)?", str(entry), re.ASCII):
            raise Mistake(f"{file}: {entry} must be NOTEBOOK: {{name: value}} or NOTEBOOK@VARIANT (A-Z, digits . - _)")
    resources = content.pop("resources", {})
    for name, value in resources.items():
        if name not in RESOURCES or type(value) is not int or value < (name != "gpu"):
            raise Mistake(f"{file}: resources: {name}: {value!r}; they are integers, by default {RESOURCES}")
    return content, RESOURCES | resources


def defaults(notebook: Path) -> dict:
    """The names and defaults in the notebook's cell tagged `parameters`."""
    try:
        cells = [c.source for c in nbformat.read(notebook, 4).cells if "parameters" in c.metadata.get("tags", [])]
        found = papermill.inspect_notebook(notebook)
    except Exception as error:  # it is missing, empty, cut off, no JSON, or JSON of something else
        raise Mistake(f"{notebook} is not a notebook: {type(error).__name__}, {str(error)[:99]!r}") from None
    try:
        if re.search(r"^[^#\n]*=.*=", "\n".join(cells), re.MULTILINE):  # papermill leaves such a parameter out
            raise SyntaxError("a second '=' on a line")
        return {name: ast.literal_eval(parameter["default"]) for name, parameter in found.items()}
    except (ValueError, SyntaxError) as error:
        raise Mistake(f"{notebook}: the parameters cell holds `name = literal` only: {error}") from None


def merged(notebook: Path, source: str, values: dict) -> dict:
    """The notebook's defaults, with `values` in their place; Mistake for an unknown name or a wrong type."""
    known = defaults(notebook)
    for name, value in values.items():
        if name not in known:
            raise Mistake(f"{source}: {name} is not a parameter of {notebook}; there are: {', '.join(known)}")
        if not fits(value, default := known[name]):
            hint = "; write numbers as in 1.0e-4" if isinstance(value, str) else ""
            raise Mistake(f"{source}: {name}={value!r} is not {type(default).__name__} like {default!r} is{hint}")
    return known | values


def fits(value, default) -> bool:
    if isinstance(default, list | tuple):
        return isinstance(value, list) and all(any(fits(v, d) for d in default) for v in value if default)
    return default is None or type(value) is type(default) or (type(value), type(default)) == (int, float)


def notebook(entry: str, folder: Path) -> Path:
    """The notebook of an entry, in the folder or in its appendix."""
    name = f"{entry.partition('@')[0]}.ipynb"
    return appendix if (appendix := folder / "appendix" / name).exists() else folder / name


def check(file: Path, folder: Path) -> dict[str, dict]:
    """All parameters of all entries."""
    return {e: merged(notebook(e, folder), f"{file}: {e}", values) for e, values in read(file)[0].items()}
