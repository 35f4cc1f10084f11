"""The runner and the Snakefile, on toy notebooks in a project of their own ($SRMCMC_HOME)."""

import argparse
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from srmcmc_lib import gallery, paths, profiles, runner

ROOT = paths.PACKAGE.parent
PARAMETERS = "steps = 3\nrate = 0.1  # a rate, e.g. rate = 0.2\nname = 'a'\nlive = False\nsizes = (1, 2)\nseed = None"
DRAW = """
import sys
from srmcmc_lib import paths
folder = paths.figures() / "00_toy"
folder.mkdir(exist_ok=True)
(folder / "figure.png").write_bytes(b"new")
print(sys.executable, steps, rate)
"""


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project in a folder with a space: notebook 00_toy, and a profile cpu that sets nothing."""
    home = tmp_path / "a project"
    for folder in ("notebooks", "profiles"):
        (home / folder).mkdir(parents=True)
    (home / "profiles/cpu.yaml").write_text("00_toy: {}\n")
    monkeypatch.setenv("SRMCMC_HOME", str(home))
    monkeypatch.delenv("SRMCMC_FIGURES", raising=False)
    toy(home, DRAW)
    return home


def toy(home: Path, *cells: str, name: str = "00_toy", parameters: str = PARAMETERS) -> Path:
    notebook = home / f"notebooks/{name}.ipynb"
    parameters = new_code_cell(parameters, id="p", metadata={"tags": ["parameters"]})
    others = [new_code_cell(source, id=f"c{i}") for i, source in enumerate(cells)]
    # a kernelspec that nobody has: the runner's kernel is its own interpreter
    metadata = {"kernelspec": {"name": "elsewhere", "display_name": "", "language": "python"}, "widgets": {"a": 1}}
    nbformat.write(new_notebook(cells=[parameters, *others], metadata=metadata), notebook)
    return notebook


def profile(home: Path, text: str, name: str = "cpu") -> Path:
    path = home / f"profiles/{name}.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("{step: 3}", ["step ", "'steps'", "cpu.yaml", "00_toy"]),
        ("{completely_different: 3}", ["completely_different", "steps, rate", "cpu.yaml"]),
        ("{steps: 2.5}", ["steps=2.5 is a float", "3 is a int", "cpu.yaml"]),
        ("{steps: true}", ["steps=True is a bool"]),
        ("{rate: fast}", ["rate='fast' is a str"]),
        ("{rate: null}", ["rate=None"]),
        ("{name: 7}", ["name=7"]),
        ("{live: 1}", ["live=1"]),
        ("{live: 'no'}", ["live='no'"]),
        ("{sizes: [1, x]}", ["sizes=[1, 'x']"]),
        ("{seed: 2026-01-01}", ["seed=datetime.date"]),
        ("[steps]", ["must map each notebook"]),
        ("{steps: 1, steps: 2}", ["'steps' is given twice"]),
        ("{steps: 1", ["can't be read"]),
        ("{}\n00_toy@b: {stepz: 1}", ["00_toy@b: stepz", "'steps'"]),
        ("{}\n00_toi@b: {}", ["no notebook", "00_toi.ipynb"]),
        ("{}\n'00_toy@a/b': {}", ["00_toy@a/b", "letters, digits"]),
        ("{}\n00_toy@: {}", ["00_toy@", "letters, digits"]),
        ("{}\nresources: {gpus: 1}", ["resources: gpus", "did you mean 'gpu'"]),
        ("{}\nresources: {mem_mb: 8GB}", ["mem_mb must be an integer of at least 1, got '8GB'"]),
        ("{}\nresources: {gpu: -1}", ["resources: gpu must be an integer of at least 0, got -1"]),
    ],
)
def test_a_parameter_that_does_not_fit_stops_before_anything_runs(project, given, words, capsys, monkeypatch):
    monkeypatch.setattr(runner, "_execute", lambda *_: pytest.fail("the notebook was run"))
    file = profile(project, f"00_toy: {given}\n")
    alone = "resources" in given or "@" in given  # what concerns other entries is seen by --check only
    for arguments in [["--check"], [str(project / "notebooks/00_toy.ipynb")]][: 1 if alone else 2]:
        assert runner.main([*arguments, "--profile", str(file)]) == 2
        said = capsys.readouterr().err
        assert all(word in said for word in words), said
    assert not paths.figures().exists()


@pytest.mark.parametrize("given", ["steps=4.0", "speed=1"])
def test_a_set_that_does_not_fit_stops_too(project, given, capsys):
    assert runner.main([str(project / "notebooks/00_toy.ipynb"), "--set", given]) == 2
    assert f"--set: 00_toy: {given.split('=')[0]}" in capsys.readouterr().err


def test_values_that_fit(project):
    file = profile(project, "00_toy: {steps: 5, rate: 1e-4, sizes: [3], seed: 1}\n")
    found = profiles.parameters(project / "notebooks/00_toy.ipynb", file, {"rate": 2})
    assert found == {"steps": 5, "rate": 2, "name": "a", "live": False, "sizes": [3], "seed": 1}
    assert profiles.parameters(project / "notebooks/00_toy.ipynb", file)["rate"] == 1e-4  # YAML 1.1 reads a string


def test_one_notebook_in_several_variants(project):
    file = profile(project, "resources: {gpu: 2}\n00_toy@a: {steps: 4}\n00_toy@b: {steps: 5}\n", "other")
    notebook = project / "notebooks/00_toy.ipynb"
    assert profiles.check(file, project / "notebooks").keys() == {"00_toy@a", "00_toy@b"}
    assert [profiles.parameters(notebook, file, variant=v)["steps"] for v in "ab"] == [4, 5]
    assert profiles.planned(notebook, file, variant="b")["variant"] == "b"
    assert runner.target(notebook, file, variant="b") == project / "figures/other/00_toy@b"
    with pytest.raises(profiles.ProfileError, match="has no entry '00_toy'; did you mean '00_toy@"):
        profiles.parameters(notebook, file)
    assert profiles.resources(file) == profiles.RESOURCES | {"gpu": 2}
    assert profiles.resources(project / "profiles/cpu.yaml") == profiles.RESOURCES


def test_a_variant_is_run_into_its_own_folder_and_stands_on_the_page(project, capsys):
    file = profile(project, "00_toy@a: {steps: 4}\n00_toy@b: {steps: 5}\n", "other")
    assert runner.main([str(project / "notebooks/00_toy.ipynb"), "--profile", str(file), "--variant", "b"]) == 0
    folder = project / "figures/other/00_toy@b"
    assert {p.name for p in folder.parent.iterdir()} == {"00_toy@b"}
    assert {p.name for p in folder.iterdir()} == {"figure.png", "00_toy.ipynb", "00_toy.html", "manifest.json"}
    assert json.loads((folder / "manifest.json").read_text())["parameters"]["steps"] == 5
    page = gallery.write(file)
    assert page == project / "figures/other/index.html"
    made, missing = page.read_text().split("<h2>00_toy@b</h2>")[1], page.read_text().split("<h2>00_toy@b</h2>")[0]
    assert "<h2>00_toy@a</h2><p>Not made yet.</p>" in missing and "steps = 5" in made
    links = re.findall(r'(?:src|href)="([^"]+)"', made)
    assert links == ["00_toy@b/00_toy.html", "00_toy@b/figure.png"]
    assert all((page.parent / link).is_file() for link in links)


def test_check_names_every_problem_of_a_profile(project):
    file = profile(project, "00_toi: {}\n00_toy: {stepz: 1}\n")
    with pytest.raises(profiles.ProfileError) as error:
        profiles.check(file, project / "notebooks")
    for word in ("no notebook", "00_toi.ipynb", "did you mean '00_toy'", "stepz", "did you mean 'steps'", "cpu.yaml"):
        assert word in str(error.value)


def test_missing_files(project, capsys):
    assert runner.main(["--check", "--profile", str(project / "profiles/gpu.yaml")]) == 2
    assert "there is no profile" in (said := capsys.readouterr().err) and "has: cpu" in said
    assert runner.main([str(project / "notebooks/00_toi.ipynb")]) == 2
    assert "there is no notebook" in (said := capsys.readouterr().err) and "00_toy" in said
    (project / "notebooks/00_toy.ipynb").rename(project / "notebooks/01_other.ipynb")
    assert runner.main([str(project / "notebooks/01_other.ipynb")]) == 2
    assert "has no entry '01_other'" in capsys.readouterr().err


def test_a_parameters_cell_with_an_expression_is_refused(project):
    notebook = toy(project)
    notebook.write_text(notebook.read_text().replace("steps = 3", "steps = 3 * 7"))
    with pytest.raises(profiles.ProfileError, match=r"`name = literal` only, not `steps = 3 \* 7`"):
        profiles.defaults(notebook)


def test_a_parameter_may_carry_its_type(project):
    notebook = toy(project)
    plain = profiles.defaults(notebook)
    notebook.write_text(notebook.read_text().replace("steps = 3", "steps: int = 3"))
    assert "steps: int = 3" in notebook.read_text() and profiles.defaults(notebook) == plain
    for wrong in ("steps: int", "steps += 3"):
        notebook.write_text(notebook.read_text().replace("steps: int = 3", wrong))
        with pytest.raises(profiles.ProfileError, match="only, not `steps"):
            profiles.defaults(notebook)
        notebook.write_text(notebook.read_text().replace(wrong, "steps: int = 3"))


def test_set_reads_numbers_and_an_empty_string():
    assert runner._assignment("rate=1e-4") == ("rate", 1e-4)
    assert runner._assignment("checkpoint=") == ("checkpoint", "")
    with pytest.raises(argparse.ArgumentTypeError, match="the value can't be read"):
        runner._assignment("seed=[")


def test_only_the_default_profile_as_it_is_writes_where_the_committed_figures_are(project):
    cpu, other, notebook = Path("profiles/cpu.yaml"), Path("profiles/paper.yaml"), Path("notebooks/00_toy.ipynb")
    figures = project / "figures"
    assert runner.target(notebook, cpu) == figures / "00_toy"
    assert runner.target(notebook, other) == figures / "paper" / "00_toy"
    assert runner.target(notebook, cpu, {"steps": 7}) == figures / "custom" / "00_toy"


def test_success_replaces_the_folder_and_failure_keeps_it(project, capsys):
    notebook, folder = project / "notebooks/00_toy.ipynb", project / "figures/00_toy"
    folder.mkdir(parents=True)
    (folder / "old.png").write_bytes(b"old")
    (project / "profiles/cpu.yaml").write_text("00_toy: {steps: 7}\n")
    assert runner.main([str(notebook)]) == 0, capsys.readouterr().err
    made = {"figure.png", "00_toy.ipynb", "00_toy.html", "manifest.json"}
    assert {p.name for p in folder.iterdir()} == made and {p.name for p in folder.parent.iterdir()} == {"00_toy"}

    executed = nbformat.read(folder / "00_toy.ipynb", 4)
    assert f"{sys.executable} 7 0.1" in executed.cells[-1].outputs[0].text
    assert "widgets" not in executed.metadata and "papermill" not in executed.metadata
    assert "7 0.1" in (folder / "00_toy.html").read_text()
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["parameters"] == {
        "steps": 7,
        "rate": 0.1,
        "name": "a",
        "live": False,
        "sizes": [1, 2],
        "seed": None,
    }
    assert {"notebook", "profile", "seed", "seconds", "device", "python", "versions", "git"} <= set(manifest)

    (project / "profiles/cpu.yaml").write_text("00_toy: {}\n")
    toy(project, DRAW, "x = 1", "y = 1\nif y:\n    x / 0  # here\nx = 2")
    assert runner.main([str(notebook)]) == 1
    said = capsys.readouterr().err
    for words in ("00_toy.ipynb failed in cell In [4] (x / 0  # here): ZeroDivisionError", "last good figures stay"):
        assert words in said
    assert {p.name for p in folder.iterdir()} == made
    assert {p.name for p in folder.parent.iterdir()} == {"00_toy", "00_toy.failed.ipynb"}
    assert "ZeroDivisionError" in (folder.parent / "00_toy.failed.ipynb").read_text()


def test_a_cell_that_takes_too_long_is_named(project, capsys):
    notebook = toy(project, "import time", "time.sleep(60)")
    other = profile(project, "00_toy: {}\n", "other")
    assert runner.main([str(notebook), "--profile", str(other), "--cell-timeout", "1"]) == 1
    said = capsys.readouterr().err
    assert "(time.sleep(60)): CellTimeoutError" in said and "no earlier figures" in said
    assert [p.name for p in (project / "figures/other").iterdir()] == ["00_toy.failed.ipynb"]


def test_the_graph_redoes_what_changed(project):
    """Snakemake's plan: what was never made, what has other cells by now, what lost its figures; not what is done."""
    shutil.copy(ROOT / "Snakefile", project)
    names = ("00_done", "01_new", "02_edited", "03_lost")
    models = "04_model@loads: {checkpoint: m.safetensors}\n04_model@trains: {save_as: m.safetensors}\n"
    file = profile(project, "".join(f"{name}: {{steps: 4}}\n" for name in names) + models)
    toy(project, name="04_model", parameters="checkpoint = ''\nsave_as = ''")
    for name in names:
        shutil.copy(project / "notebooks/00_toy.ipynb", notebook := project / f"notebooks/{name}.ipynb")
        stamp, manifest = project / f".cache/stamps/cpu/{name}.done", project / f"figures/{name}/manifest.json"
        if name != "01_new":
            for path, text in ((stamp, ""), (manifest, json.dumps(profiles.planned(notebook, file)))):
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text)
    (project / "figures/03_lost/manifest.json").unlink()
    shutil.copy(toy(project, DRAW, "pass"), project / "notebooks/02_edited.ipynb")

    words = [sys.executable, "-m", "snakemake", "--dry-run", "--printshellcmds", "--cores", "1"]
    done = subprocess.run(words, cwd=project, capture_output=True, text=True)
    said = done.stdout + done.stderr
    found = re.findall(r"runner notebooks/(\w+)\.ipynb --profile profiles/cpu\.yaml(?: --variant (\w+))?", said)
    jobs = {("01_new", ""), ("02_edited", ""), ("03_lost", ""), ("04_model", "loads"), ("04_model", "trains")}
    assert len(found) == len(jobs) and set(found) == jobs, said
    # what loads a model comes after what trains it
    (waits,) = [job for job in said.split("rule notebook:") if "output: .cache/stamps/cpu/04_model@loads.done" in job]
    assert "input: .cache/stamps/cpu/04_model@trains.done" in waits


def test_every_profile_fits_and_the_default_runs_every_notebook():
    for file in sorted((ROOT / "profiles").glob("*.yaml")):
        profiles.check(file, ROOT / "notebooks")
    listed = profiles.read_profile(ROOT / f"profiles/{runner.DEFAULT_PROFILE}.yaml")
    assert sorted({profiles.split(e)[0] for e in listed}) == sorted(
        p.stem for p in (ROOT / "notebooks").glob("*.ipynb")
    )
