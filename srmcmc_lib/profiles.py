"""Parameter sets for the notebooks, profiles/*.yaml: read, and checked against the notebooks before anything runs."""

import ast
import difflib
import hashlib
import json
import re
from pathlib import Path

import nbformat
import yaml

from .checks import integer


class ProfileError(ValueError):
    """A profile or a --set that doesn't fit the notebooks; raised before anything runs."""


class Loader(yaml.SafeLoader):
    """YAML, but 1e-4 is a number (YAML 1.1 wants 1.0e-4 and reads a string) and a key given twice is an error."""

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in {k for k in keys if keys.count(k) > 1}:
            raise yaml.YAMLError(f"{key!r} is given twice (near line {node.start_mark.line + 1})")
        return super().construct_mapping(node, deep)


RESOURCES = {"gpu": 0, "cpus": 2, "mem_mb": 8000, "runtime": 60}  # of one job, for a cluster; runtime in minutes
_VARIANT = re.compile(r"[A-Za-z0-9][\w.-]*$", re.ASCII)
_EXPONENT = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$")
Loader.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, list("-+0123456789"))


def split(entry: str) -> tuple[str, str]:
    """The notebook's name and the variant ("" without one) of an entry NOTEBOOK or NOTEBOOK@VARIANT."""
    notebook, _, variant = entry.partition("@")
    return notebook, variant


def join(notebook: Path, variant: str = "") -> str:
    """The entry of a notebook's variant; also the name of its folder of figures."""
    return f"{notebook.stem}@{variant}" if variant else notebook.stem


def read_profile(profile: Path) -> dict[str, dict]:
    """Entry → the parameters that differ from the notebook's defaults.

    An entry is a notebook's name, or NOTEBOOK@VARIANT, so that a profile can run one notebook several times.
    """
    return {entry: values for entry, values in _read(profile).items() if entry != "resources"}


def resources(profile: Path) -> dict[str, int]:
    """What one job of this profile asks a cluster for (RESOURCES, then the profile's `resources`); runs on this
    machine ignore all but runtime, the limit of one cell too."""
    given = _read(profile).get("resources", {})
    for name, value in given.items():
        if name not in RESOURCES:
            raise ProfileError(f"{profile}: resources: {name} is unknown{_nearest(str(name), RESOURCES)}")
        try:
            integer(name, value, int(name != "gpu"))
        except ValueError as error:
            raise ProfileError(f"{profile}: resources: {error}") from None
    return RESOURCES | given


def _read(profile: Path) -> dict[str, dict]:
    if not profile.is_file():
        there = ", ".join(sorted(p.stem for p in profile.parent.glob("*.yaml"))) or "none"
        raise ProfileError(f"there is no profile {profile}; {profile.parent}/ has: {there}")
    try:
        content = yaml.load(profile.read_text(encoding="utf-8"), Loader)  # a SafeLoader
    except yaml.YAMLError as error:
        raise ProfileError(f"{profile} can't be read: {error}") from error
    if not isinstance(content, dict) or not all(isinstance(v, dict) for v in content.values()):
        raise ProfileError(f"{profile} must map each notebook to its parameters, as in '00_quickstart: {{}}'")
    for entry in content:
        if "@" in str(entry) and not _VARIANT.match(split(str(entry))[1]):
            raise ProfileError(f"{profile}: {entry}: what follows the @ must be letters, digits and . _ - only")
    return content


def defaults(notebook: Path) -> dict:
    """The names and defaults of a notebook's cell tagged `parameters`."""
    cells = [c for c in nbformat.read(notebook, 4).cells if "parameters" in c.metadata.get("tags", [])]
    found = {}
    for statement in ast.parse(cells[0].source).body if cells else []:
        try:
            (name,) = [statement.target] if isinstance(statement, ast.AnnAssign) else statement.targets
            found[name.id] = ast.literal_eval(statement.value)
        except (AttributeError, ValueError):  # no assignment, none to a name, none of a literal
            line = ast.unparse(statement).splitlines()[0]
            raise ProfileError(f"{notebook}: the parameters cell holds `name = literal` only, not `{line}`") from None
    return found


def parameters(notebook: Path, profile: Path, overrides: dict | None = None, variant: str = "") -> dict:
    """All parameters as the notebook will see them: its defaults, then the profile's, then `overrides`."""
    if not notebook.is_file():
        there = sorted(p.stem for p in notebook.parent.glob("*.ipynb"))
        raise ProfileError(f"there is no notebook {notebook}{_nearest(notebook.stem, there)}")
    entries, entry = read_profile(profile), join(notebook, variant)
    if entry not in entries:
        raise ProfileError(f"{profile} has no entry {entry!r}{_nearest(entry, entries)}")
    known = defaults(notebook)
    for source, given in ((str(profile), entries[entry]), ("--set", overrides or {})):
        for name, value in given.items():
            where = f"{source}: {entry}: {name}"
            if name not in known:
                raise ProfileError(f"{where} is no parameter of {notebook}{_nearest(str(name), known)}")
            if not _fits(value, known[name]):
                raise ProfileError(f"{where}={value!r} is a {type(value).__name__}, but the default "
                                   f"{known[name]!r} is a {type(known[name]).__name__}")  # fmt: skip
    return known | entries[entry] | (overrides or {})


def check(profile: Path, notebooks: Path) -> dict[str, dict]:
    """Validates a whole profile: all parameters by entry, or ProfileError with every problem in it."""
    found, problems = {}, []
    resources(profile)
    for entry in read_profile(profile):
        name, variant = split(entry)
        try:
            found[entry] = parameters(notebooks / f"{name}.ipynb", profile, variant=variant)
        except ProfileError as error:
            problems.append(f"{profile}: {error}" if str(profile) not in str(error) else str(error))
    if problems:
        raise ProfileError("\n".join(problems))
    return found


def planned(notebook: Path, profile: Path, overrides: dict | None = None, variant: str = "") -> dict:
    """What decides a run: all parameters, and a hash of the cells (outputs left out). The manifest repeats it."""
    values = parameters(notebook, profile, overrides, variant)
    cells = [(c.cell_type, c.source) for c in nbformat.read(notebook, 4).cells]
    plan = {
        "notebook": notebook.stem,
        "profile": profile.stem,
        "parameters": values,
        "cells_sha256": hashlib.sha256(json.dumps(cells).encode()).hexdigest(),
    }
    plan |= {"variant": variant} if variant else {}
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
