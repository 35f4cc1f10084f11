"""Parameter sets for the notebooks, profiles/*.yaml: read, and checked against the notebooks before anything runs."""

import ast
import difflib
import hashlib
import json
import re
from pathlib import Path

import nbformat
import yaml


class ProfileError(ValueError):
    """A profile or a --set that doesn't fit the notebooks; raised before anything runs."""


class Loader(yaml.SafeLoader):
    """YAML, but 1e-4 is a number (YAML 1.1 wants 1.0e-4 and reads a string) and a key given twice is an error."""

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in {k for k in keys if keys.count(k) > 1}:
            raise yaml.YAMLError(f"{key!r} is given twice (near line {node.start_mark.line + 1})")
        return super().construct_mapping(node, deep)


_EXPONENT = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$")
Loader.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, list("-+0123456789"))


def read_profile(profile: Path) -> dict[str, dict]:
    """Notebook name → the parameters that differ from the notebook's defaults."""
    if not profile.is_file():
        there = ", ".join(sorted(p.stem for p in profile.parent.glob("*.yaml"))) or "none"
        raise ProfileError(f"there is no profile {profile}; {profile.parent}/ has: {there}")
    try:
        content = yaml.load(profile.read_text(encoding="utf-8"), Loader)  # a SafeLoader
    except yaml.YAMLError as error:
        raise ProfileError(f"{profile} can't be read: {error}") from error
    if not isinstance(content, dict) or not all(isinstance(v, dict) for v in content.values()):
        raise ProfileError(f"{profile} must map each notebook to its parameters, as in '00_quickstart: {{}}'")
    return content


def defaults(notebook: Path) -> dict:
    """The names and defaults of a notebook's cell tagged `parameters`."""
    cells = [c for c in nbformat.read(notebook, 4).cells if "parameters" in c.metadata.get("tags", [])]
    found = {}
    for statement in ast.parse(cells[0].source).body if cells else []:
        try:
            match statement:
                case (
                    ast.Assign(targets=[ast.Name(id=name)], value=value)
                    | ast.AnnAssign(target=ast.Name(id=name), value=ast.expr() as value)
                ):
                    found[name] = ast.literal_eval(value)
                case _:
                    raise ValueError
        except ValueError:
            line = ast.unparse(statement).splitlines()[0]
            raise ProfileError(f"{notebook}: the parameters cell holds `name = literal` only, not `{line}`") from None
    return found


def parameters(notebook: Path, profile: Path, overrides: dict | None = None) -> dict:
    """All parameters as the notebook will see them: its defaults, then the profile's, then `overrides`."""
    if not notebook.is_file():
        raise ProfileError(f"there is no notebook {notebook}{_nearest(notebook.stem, _names(notebook.parent))}")
    entries = read_profile(profile)
    if notebook.stem not in entries:
        raise ProfileError(f"{profile} has no entry {notebook.stem!r}{_nearest(notebook.stem, entries)}")
    known = defaults(notebook)
    for source, given in ((str(profile), entries[notebook.stem]), ("--set", overrides or {})):
        for name, value in given.items():
            where = f"{source}: {notebook.stem}: {name}"
            if name not in known:
                raise ProfileError(f"{where} is no parameter of {notebook}{_nearest(str(name), known)}")
            if not _fits(value, known[name]):
                raise ProfileError(f"{where}={value!r} is a {type(value).__name__}, but the default "
                                   f"{known[name]!r} is a {type(known[name]).__name__}")  # fmt: skip
    return known | entries[notebook.stem] | (overrides or {})


def check(profile: Path, notebooks: Path) -> dict[str, dict]:
    """Validates a whole profile: all parameters by notebook, or ProfileError with every problem in it."""
    found, problems = {}, []
    for name in read_profile(profile):
        try:
            found[name] = parameters(notebooks / f"{name}.ipynb", profile)
        except ProfileError as error:
            problems.append(f"{profile}: {error}" if str(profile) not in str(error) else str(error))
    if problems:
        raise ProfileError("\n".join(problems))
    return found


def planned(notebook: Path, profile: Path, overrides: dict | None = None) -> dict:
    """What decides a run: all parameters, and a hash of the cells (outputs left out). The manifest repeats it."""
    values = parameters(notebook, profile, overrides)
    cells = [(c.cell_type, c.source) for c in nbformat.read(notebook, 4).cells]
    plan = {
        "notebook": notebook.stem,
        "profile": profile.stem,
        "parameters": values,
        "cells_sha256": hashlib.sha256(json.dumps(cells).encode()).hexdigest(),
    }
    return json.loads(json.dumps(plan))  # tuples become lists, as in the manifest


def _fits(value, default) -> bool:
    if default is None:
        return value is None or isinstance(value, bool | int | float | str | list | dict)  # no dates
    if isinstance(default, bool) or isinstance(value, bool):
        return isinstance(default, bool) and isinstance(value, bool)
    if isinstance(default, float):
        return isinstance(value, int | float)
    if isinstance(default, list | tuple):
        return isinstance(value, list | tuple) and all(any(_fits(v, d) for d in default) for v in value if default)
    return isinstance(value, type(default))


def _nearest(name: str, names) -> str:
    close = difflib.get_close_matches(name, list(names), 1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; there are: {', '.join(map(str, names)) or 'none'}"


def _names(notebooks: Path) -> list[str]:
    return sorted(p.stem for p in notebooks.glob("*.ipynb"))
