"""The library is flat and small, and a file imports only files above it in the table of its docstring."""

import ast
import re
from pathlib import Path

import srmcmc_lib

ORDER = re.findall(r"^(\w+) {2,}", srmcmc_lib.__doc__, re.MULTILINE)
ONLY = {"matplotlib": "plots", "ipywidgets": "widgets", "workflow": "", "srmcmc_lib": ""}


def test_imports_go_only_upward():
    files = sorted(Path(srmcmc_lib.__file__).parent.rglob("*.py"))
    assert [f.stem for f in files] == sorted(["__init__", *ORDER]) and len(files) <= 20
    for file in files:
        above = [*ORDER, "__init__"][: [*ORDER, "__init__"].index(file.stem)]
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            for name in node.names if isinstance(node, ast.Import | ast.ImportFrom) else ():
                root = (getattr(node, "module", None) or name.name).split(".")[0]
                fits = root in above if getattr(node, "level", 0) else ONLY.get(root, file.stem) == file.stem
                assert fits, f"{file}:{node.lineno} imports {root}"
