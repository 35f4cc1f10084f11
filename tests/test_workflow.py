"""What `make` runs: notebooks with their parameters, the graph of jobs, recipes, cards."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import parameters
import pytest
import run_notebook
import torch
import train_model
import yaml
from measure_model import measure
from nbformat.v4 import new_code_cell, new_notebook
from parameters import Mistake
from tiny_sets import write_celeba, write_cifar10
from train_classifier import train_classifier

from srmcmc_lib import EnergyNet, Langevin, ShortRun, observed, paths
from srmcmc_lib.data import labels, to_float
from srmcmc_lib.features import responses
from srmcmc_lib.progress import learning_curves

ROOT = Path(__file__).resolve().parent.parent
FILES = ROOT / "workflow/parameters"
PARAMETERS = "# a comment with a = b\nsteps: int = 3\nrate = 0.1\nname = 'a'\nlive = False\nsizes = (1, 2)\nseed = None"
FILE = "workflow/parameters/cpu.yaml"
DRAW = """
import os, sys
folder = os.path.join(os.environ["SRMCMC_FIGURES"], "00_toy")
open(os.path.join(folder, "figure.png"), "w").write(f"{steps} {rate}")
print(sys.executable)"""


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A project in a folder with a space: this workflow, with two runs of one toy notebook."""
    home = tmp_path / "a project"
    monkeypatch.setattr(run_notebook, "FIGURES", home / "figures")
    for name in ("SRMCMC_FIGURES", "PYTHONPATH", "JUPYTER_PREFER_ENV_PATH"):  # which a run sets
        monkeypatch.setenv(name, str(ROOT))
    shutil.copytree(ROOT / "workflow", home / "workflow", ignore=shutil.ignore_patterns("__pycache__", "*.yaml"))
    (home / "notebooks").mkdir()
    (home / FILE).write_text("00_toy@a: {rate: 1}\n00_toy@b: {steps: 4}\n")
    toy(home, DRAW)
    return home


def toy(home: Path, *cells: str, parameters: str = PARAMETERS) -> Path:
    first = new_code_cell(parameters, id="p", metadata={"tags": ["parameters"]})
    cells = [first, *(new_code_cell(source, id=f"c{i}") for i, source in enumerate(cells))]
    kernel = {"name": "elsewhere", "display_name": "", "language": "python"}  # nobody has it
    nbformat.write(new_notebook(cells=cells, metadata={"kernelspec": kernel}), home / "notebooks/00_toy.ipynb")
    return home / "notebooks/00_toy.ipynb"


def call(home: Path, *words: object, rc: int = 0) -> str:
    env = {k: v for k, v in os.environ.items() if k != "SRMCMC_FIGURES"} | {"SRMCMC_HOME": str(home)}
    done = subprocess.run([sys.executable, *map(str, words)], cwd=home, env=env, capture_output=True, text=True)
    assert done.returncode == rc, done.stdout + done.stderr
    return done.stdout + done.stderr


def snakemake(home: Path, *words: str, rc: int = 0) -> str:
    return call(home, "-m", "snakemake", "--cores", "1", "--printshellcmds", "--keep-going", *words, rc=rc)


WRONG = {
    "00_toy: {step: 3}": r"00_toy: step is not a parameter of .*steps, rate",
    "00_toy: {steps: 2.5}": "steps=2.5 is not int",
    "00_toy: {rate: 1e-4}": "rate='1e-4' is not float like 0.1 is; write numbers as in 1.0e-4",
    "00_toy: {steps: 1, steps: 2}": "given twice, from line 1 on",
    "00_toi: {}": "00_toi.ipynb is not a notebook: FileNotFoundError",
}


@pytest.mark.parametrize("given", WRONG)
def test_parameters_that_do_not_fit_stop_before_anything_runs(home, given):
    (home / FILE).write_text(given)
    with pytest.raises(Mistake, match=WRONG[given]):
        parameters.check(home / FILE, home / "notebooks")


@pytest.mark.parametrize("text", ["steps = 3 * 7", "steps = 3  # steps = 4"])
def test_a_parameters_cell_that_papermill_misreads_is_refused(home, text):
    with pytest.raises(Mistake, match="the parameters cell holds `name = literal` only"):
        parameters.defaults(toy(home, parameters=text))


def test_every_file_of_parameters_fits_and_the_papers_numbers_are_there():
    found = {p.stem: parameters.check(p, ROOT / "notebooks") for p in FILES.glob("*.yaml")}
    assert list(found["cpu"]) == sorted(p.stem for p in (ROOT / "notebooks").glob("[0-9]*.ipynb"))
    listed = {entry.partition("@")[0] for name in ("full", "influence") for entry in found[name]}
    assert listed == {p.stem for p in (ROOT / "notebooks/appendix").glob("*.ipynb")}
    sizes = {"width", "steps", "batch_size", "updates", "precision", "save_as", "metric_space", "metric_samples"}
    assert list(found["paper"]) == list(found["paper-smoke"])
    for entry, paper in found["paper"].items():
        assert paper["steps"] == 100 and paper["sigma"] == 0.03 and paper["updates"] >= 200_000
        assert paper["width"] == {"cifar10": 128, "celeba": 64, "lsun_bedroom": 64}[paper["dataset"]]
        assert {k for k, v in paper.items() if v != found["paper-smoke"][entry][k]} <= sizes


def test_success_replaces_the_folder_and_failure_keeps_it(home):
    notebook, file, folder = toy(home, DRAW), home / FILE, home / "figures/custom/00_toy@a"
    folder.mkdir(parents=True)
    (folder / "old.png").write_bytes(b"old")
    assert run_notebook.run(notebook, file, {"steps": 7, "name": ""}, "a", 60) == folder
    made = {"figure.png", "00_toy.ipynb", "00_toy.html", "manifest.json", ".done"}
    assert {p.name for p in folder.iterdir()} == made and len(list(folder.parent.iterdir())) == 1
    assert (folder / "figure.png").read_text() == "7 1" and sys.executable in (folder / "00_toy.html").read_text()
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["parameters"] == {"steps": 7, "rate": 1, "name": "", "live": False, "sizes": [1, 2], "seed": None}

    toy(home, DRAW, "if steps:\n    1 / 0  # here\nx = 2")
    with pytest.raises(Mistake, match=r'(?s)00_toy@a.failed.ipynb.*"In \[4\]".*1 / 0  # here.*ZeroDivisionError: .*o$'):
        run_notebook.run(notebook, file, {"steps": 1}, "a", 60)
    assert {p.name for p in folder.iterdir()} == made and (folder / "figure.png").read_text() == "7 1"


def test_in_place_refreshes_the_outputs_and_nothing_else(home, monkeypatch):
    notebook = toy(home, "import ipywidgets\nipywidgets.IntSlider()", "steps + 1", "display()")
    monkeypatch.setattr(sys, "argv", ["run_notebook.py", "--in-place", str(notebook)])
    run_notebook.main()
    cells = nbformat.read(notebook, 4).cells
    assert cells[1].outputs == [] and cells[2].outputs[0].data == {"text/plain": "4"}
    assert not any("papermill" in cell.metadata for cell in cells) and not (home / "figures").exists()


def test_the_graph_runs_again_what_changed_and_keeps_figures_of_what_fails(home):
    stamp, figure, file = "figures/00_toy@b/.done", home / "figures/00_toy@b/figure.png", home / FILE
    assert "rule notebook" in snakemake(home, stamp) and figure.read_text() == "4 0.1"
    file.write_text(file.read_text().replace("rate: 1", "rate: 2"))  # of the other entry
    assert "Nothing to be done" in snakemake(home, "--dry-run", stamp)
    file.write_text(file.read_text().replace("steps: 4", "steps: 5"))
    toy(home, "1 / 0")
    assert "--variant=b" in snakemake(home, stamp, rc=1)
    assert figure.read_text() == "4 0.1" and not (home / stamp).exists()


def test_what_loads_a_model_waits_for_what_trains_it_and_a_cluster_gets_what_it_was_asked_for(home):
    toy(home, parameters="checkpoint = ''\nsave_as = ''")
    entries = "00_toy@loads: {checkpoint: m}\n00_toy@trains: {save_as: m}\nresources: {gpu: 1, cpus: 3, runtime: 7}\n"
    (home / "workflow/parameters/paper.yaml").write_text(entries)
    said = snakemake(home, "--dry-run", "--mode=remote", "--cores=64", "--config", "profile=paper")
    (waits,) = [job for job in said.split("rule notebook:") if "output: figures/paper/00_toy@loads/.done" in job]
    assert "input: figures/paper/00_toy@trains/.done" in waits
    assert all(words in said for words in ("threads: 3", "gpu=1", "runtime=7")), said


def test_the_papers_notebook_end_to_end_with_two_updates(home, monkeypatch):
    """CelebA at 64×64; the kernel gets the checksums of the tiny images from an IPython startup file."""
    write_cifar10(home / "data"), write_celeba(home / "data")
    (startup := home / "ipython/profile_default/startup").mkdir(parents=True)
    (startup / "checksums.py").write_text(
        f"import pathlib, sys, types\nsys.path.append({str(ROOT / 'tests')!r})\nimport tiny_sets\n"
        f"tiny_sets.accept(pathlib.Path({str(home / 'data')!r}), types.SimpleNamespace(setattr=setattr))\n"
    )
    notebook = shutil.copy(ROOT / "notebooks/01_synthesis.ipynb", home / "notebooks")
    monkeypatch.setenv("SRMCMC_HOME", str(home))
    monkeypatch.setenv("IPYTHONDIR", str(home / "ipython"))
    run_notebook.run(Path(notebook), FILES / "paper-smoke.yaml", {}, "celeba", 600)
    assert (home / "figures/paper-smoke/01_synthesis@celeba/samples.png").exists()
    model = ShortRun.load(home / "checkpoints/paper-smoke/celeba.safetensors")
    assert (model.dataset, model.shape, model.kernel.steps) == ("celeba", (3, 64, 64), 3)


TINY = {
    "dataset": "fashion_mnist_mini", "limit": 50, "network": {"channels": 1, "image_size": 8, "width": 2}, "seed": 3,
    "stages": [{"steps": 2, "updates": 3, "batch_size": 4, "average": 0.5, "precision": "float32", "progress": False},
               {"steps": 4, "updates": 2, "batch_size": 4, "precision": "float32", "progress": False}],
}  # fmt: skip


def trained(folder: Path, name: str, **changes) -> Path:
    (folder / "tiny.yaml").write_text(yaml.safe_dump({k: v for k, v in (TINY | changes).items() if v is not None}))
    return train_model.run(folder / "tiny.yaml", folder / name, folder / f"{name}.out")


def weights(path: Path) -> torch.Tensor:
    return torch.cat([p.flatten() for p in ShortRun.load(path).f.parameters()])


def test_a_recipe_repeats_and_goes_on_where_it_stopped(tmp_path):
    first = trained(tmp_path, "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b", ignore=shutil.ignore_patterns("stage2*"))
    assert torch.equal(weights(first), weights(trained(tmp_path, "b")))
    assert not torch.equal(weights(first), weights(trained(tmp_path, "c", stages=[TINY["stages"][0] | {"seed": 9}])))
    assert [(K, len(records)) for K, records in learning_curves(first)] == [(2, 3), (4, 2)]
    card = json.loads(first.with_suffix(".json").read_text())
    assert card == ShortRun.load(first).training and card["recipe"] == TINY and card["precision"] == "float32"
    for _ in range(2):
        with pytest.raises(Mistake, match=r"/a/stage2\.\* began from another model: delete"):
            trained(tmp_path, "a", stages=[TINY["stages"][0] | {"updates": 4}, TINY["stages"][1]])


def test_the_checkpoint_nearest_to_the_training_images_is_kept(tmp_path, monkeypatch):
    distances = iter([3.0, 1.0, 2.0])  # of updates 4, 6 and 7
    monkeypatch.setattr(train_model, "embed", lambda images, device=None: images)
    monkeypatch.setattr(train_model, "scores", lambda images, reference: {"classifier_frechet": next(distances)})
    stages = [TINY["stages"][0] | {"updates": 7, "checkpoint_every": 2}]
    (tmp_path / "a").mkdir()
    (tmp_path / "a/candidate-5.safetensors").touch()  # of another run
    path = trained(tmp_path, "a", stages=stages, select={"first": 3, "samples": 6, "seed": 1})
    assert torch.equal(weights(path), weights(tmp_path / "a/candidate-6.safetensors"))
    found = ShortRun.load(path).training["selection"]["classifier_frechet"]
    assert found == {"candidate-4": 3.0, "candidate-6": 1.0, "candidate-7": 2.0}
    distances = iter([1.0, *[2.0] * 4])  # of update 0, the model to start from, and of 2, 4, 6 and 7
    rule = {"first": 0, "samples": 6, "seed": 1}
    again = trained(tmp_path, "b", stages=stages, select=rule, start=str(path))
    assert torch.equal(weights(again), weights(path))
    assert [*ShortRun.load(again).training["selection"]["classifier_frechet"].values()] == [1.0, 2.0, 2.0, 2.0, 2.0]
    with pytest.raises(Mistake, match="began from another model"):
        trained(tmp_path, "b", stages=stages, select=rule, start=str(tmp_path / "a/candidate-4.safetensors"))


FAULTS = {
    r"as in 1\.0e-4": {"stages": [*TINY["stages"], {"steps": 2, "updates": 1, "rate": "1e-4"}]},
    "updates": {"stages": [{"steps": 2}]},
    "renew must": {"stages": None, "moments": [{"steps": 2, "updates": 1, "batch_size": 2, "renew": 0}]},
    "stagse": {"stagse": []},
    "argument: 'image_size'": {"network": {"channels": 1}},
    "select: first": {"select": {"first": 3, "samples": 6, "seed": 1}},
}


@pytest.mark.parametrize("message", FAULTS)
def test_a_recipe_with_a_fault_is_refused_before_training(tmp_path, message):
    with pytest.raises(Mistake, match=message):
        trained(tmp_path, "a", **FAULTS[message])
    assert not (tmp_path / "a").exists()


def test_a_recipe_of_moments_gives_a_model_that_is_measured(tmp_path):
    changes = {"stages": None, "network": {"layer": 1, "image_size": 32}}
    changes["moments"] = [{"steps": K, "updates": 2, "batch_size": 4} for K in (2, 3)]
    path = trained(tmp_path, "m", **changes)
    assert re.findall(r"^(\d,\d),", path.with_suffix(".csv").read_text(), re.M) == ["1,2", "2,2", "3,3", "4,3"]
    assert ShortRun.load(path).kernel.steps == 3 and measure(path, samples=100)["relative"] > 0
    path = trained(tmp_path, "one", **changes, label=1)
    assert ShortRun.load(path).training["images"] == (labels("fashion_mnist_mini", limit=50) == 1).sum()


@pytest.mark.parametrize("name", ["fashion_mnist", "fashion_mnist_fast", "fashion_mnist_smooth"])
def test_a_shipped_model_is_what_its_recipe_and_card_say_and_makes_images(name):
    model = ShortRun.load(name)
    recipe = yaml.safe_load((ROOT / f"workflow/recipes/{name}.yaml").read_text())
    card = json.loads((paths.PRETRAINED / f"{name}.json").read_text(encoding="utf-8"))
    assert card["commit"].startswith(str(recipe.pop("commit"))) and recipe == card["recipe"] == model.training["recipe"]
    assert model.f.config.items() >= recipe["network"].items() and model.kernel.steps == recipe["stages"][-1]["steps"]
    assert [len(records) for _, records in learning_curves(name)] == [stage["updates"] for stage in recipe["stages"]]
    measured = card["measured"]["classifier"]
    assert measured["samples"] >= 10_000 and f"measure_model.py {name} --samples" in measured["command"]
    data, z = to_float(observed(model.dataset, limit=2_000)), model.draw_z(48, seed=5)

    def looks_like_data(x: torch.Tensor) -> bool:
        """Smooth as photographs are, right on average, and as varied as the data."""
        pairs = [(x[..., :-1], x[..., 1:]), (x[..., :-1, :], x[..., 1:, :]), (x.mean(0), data.mean(0))]
        right, down, mean = (torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1] for a, b in pairs)
        return bool((right + down) / 2 > 0.75 and mean > 0.95 and 0.8 < x.std(0).mean() / data.std(0).mean() < 1.25)

    assert looks_like_data(model(z, u=5)) and not looks_like_data(z)
    assert not looks_like_data(model.with_steps(model.kernel.steps // 2)(z, u=5))


def test_an_untrained_model_measures_as_noise(tmp_path):
    weak = ShortRun(EnergyNet(1, 32, 2), Langevin(2), dataset="fashion_mnist_mini", training={"images": 500})
    path = weak.save(tmp_path / "weak.safetensors")
    measured = measure(path, samples=120, seed=3)
    rows = {name: row["classifier_frechet"] for name, row in measured["rows"].items()}
    assert 0.5 * rows["p_0 noise"] < rows["samples"] < 1.5 * rows["p_0 noise"]
    assert rows["test images"] < 0.05 * rows["samples"] and measured["to_test"]["reference"] == 2_000
    assert measured["memorisation"]["samples"] > 2 * measured["memorisation"]["held_out"]
    assert sum(measured["classes"].values()) == pytest.approx(1) and json.dumps(measured)
    slopes = [weak.f.gradient(x).flatten(1).norm(dim=1) for x in weak.trajectory(weak.draw_z(128, 3), 3)]
    assert measured["force"] == pytest.approx(torch.stack(slopes[:2]).mean(1).sum().item())
    with pytest.raises(ValueError, match="samples must be an integer of at least 100"):
        measure(path, samples=99)
    assert "weak.json" in call(ROOT, ROOT / "workflow/scripts/measure_model.py", path, "--write", rc=1)


def test_a_classifier_learns():
    images, targets = observed("fashion_mnist_mini", limit=768), labels("fashion_mnist_mini", limit=768)
    model = train_classifier(images, targets, epochs=3, batch_size=64)
    held_out = to_float(observed("fashion_mnist_mini", split="test", limit=300))
    right = responses(model, held_out).argmax(1) == labels("fashion_mnist_mini", "test", limit=300)
    assert right.float().mean() > 0.5  # chance: 0.1
