"""README and docs: their Python runs, their links lead somewhere, and what their commands name exists."""

import pkgutil
import re
import runpy
import sys
from pathlib import Path

import pytest

from srmcmc_lib.noise import PRIORS

ROOT = Path(__file__).resolve().parent.parent
PAGES = {p.stem: p for p in (ROOT / "README.md", *ROOT.glob("docs/*.md"))}
TINY = {"2_000": "2", "width=32": "width=2", "steps=100": "steps=3", "(64,": "(8,", "iterations=20": "iterations=2",
        "TrainConfig(": "TrainConfig(batch_size=2, ", '"fashion_mnist")  ': '"fashion_mnist_fast")'}  # fmt: skip


def blocks(page: str, language: str) -> str:
    return "\n".join(re.findall(rf"^```{language}\n(.*?)^```", PAGES[page].read_text(), re.S | re.M))


def commands() -> list[str]:
    lines = "\n".join(blocks(page, "") for page in PAGES).replace("\\\n", " ").splitlines()
    said = [c for page in PAGES.values() for c in re.findall(r"`((?:python|make) [^`]+)`", page.read_text())]
    return [line.partition(" # ")[0].strip() for line in lines + said]


@pytest.mark.parametrize("page", ["README", "your-own"])
def test_python_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "docs", type(sys)("docs"))  # dataclasses look for their module
    monkeypatch.setitem(PRIORS, "Grey", None)  # a page enters it; it goes again after the test
    code, space = blocks(page, "python"), {"__name__": "docs"}
    for old, tiny in TINY.items():
        code = code.replace(old, tiny)
    exec(code, space)
    assert space["model"].kernel.steps == 3 and list(tmp_path.glob("*.safetensors"))


@pytest.mark.parametrize("page", PAGES)
def test_links_paths_and_names_lead_somewhere(page):
    text = PAGES[page].read_text()
    for target in re.findall(r"\]\((?!https)([^)#\s]+)", text):
        assert (PAGES[page].parent / target).exists(), target
    for path in re.findall(r"((?:srmcmc_lib|workflow|benchmarks|notebooks)/[\w./-]*[\w/])", text):
        assert (ROOT / path).exists() or path == "notebooks/07_name.ipynb", path
    for name in re.findall(r"\bsrmcmc_lib(?:\.[a-zA-Z_]\w+)+", text):
        pkgutil.resolve_name(name)


def test_commands_exist():
    for command in commands():
        if script := re.search(r"(?:workflow|benchmarks)/\S+\.py", command):
            source, options = (ROOT / script[0]).read_text(), re.findall(r"--[\w-]+", command[script.end() :])
            assert all(f'"{option}"' in source for option in options), command
            names = re.findall(r"_model\.py ([a-z]\w+)(?= |$)", command)
            assert all((ROOT / f"workflow/recipes/{name}.yaml").exists() for name in names), command
            for name in re.findall(r"--set (\w+)=", command):
                notebook = re.search(r"notebooks/\w+\.ipynb", command)[0]
                assert f'"{name} = ' in (ROOT / notebook).read_text(), f"{notebook} has no parameter {name}"
        elif make := re.match(r"make (\w+)(?: PROFILE=(\w+))?", command):
            assert re.search(rf"^{make[1]}:", (ROOT / "Makefile").read_text(), re.M), command
            assert not make[2] or (ROOT / f"workflow/parameters/{make[2]}.yaml").exists(), command


def test_the_table_of_results_is_what_its_command_prints():
    printed = runpy.run_path(str(ROOT / "workflow/scripts/measure_model.py"))["table"]()
    assert printed in PAGES["README"].read_text() and printed in PAGES["models"].read_text()
