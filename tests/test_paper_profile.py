"""The Snakefile: the paper's profile, its numbers and graph, the same graph run on a handful of images; checkpoints."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_sets import checksums, write_celeba, write_cifar10, write_lsun

from srmcmc_lib import EnergyNet, Langevin, ShortRun, TrainConfig, paths, profiles

ROOT = paths.PACKAGE.parent
PAPER, SMOKE = (ROOT / "profiles" / f"{name}.yaml" for name in ("paper", "paper-smoke"))
SIZES = {
    "width",
    "steps",
    "batch_size",
    "updates",
    "precision",
    "save_as",
    "metric_space",
    "metric_samples",
}  # in which the two profiles differ


@pytest.fixture
def project(tmp_path):
    """A copy of this checkout: nothing of the user's is touched, and nothing changes while the graph runs."""
    shutil.copy(ROOT / "Snakefile", tmp_path)
    for name in ("srmcmc_lib", "profiles", "notebooks"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def snakemake(project: Path, *words: str) -> str:
    env = {k: v for k, v in os.environ.items() if k not in ("SRMCMC_DATA", "SRMCMC_FIGURES")}
    env |= {"SRMCMC_HOME": str(project), "IPYTHONDIR": str(project / "ipython")}
    command = [sys.executable, "-m", "snakemake", "--cores", "1", "--printshellcmds", *words]
    done = subprocess.run(command, cwd=project, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_the_numbers_that_the_paper_gives():
    found = profiles.check(PAPER, ROOT / "notebooks")
    said = {
        k: (v["dataset"], v["image_size"], v["width"], v["steps"], v["sigma"])
        for k, v in found.items()
        if k[:2] == "01"
    }
    assert said == {
        "01_synthesis@cifar10": ("cifar10", 32, 128, 100, 0.03),
        "01_synthesis@celeba": ("celeba", 64, 64, 100, 0.03),
        "01_synthesis@lsun_bedroom": ("lsun_bedroom", 64, 64, 100, 0.03),
    }
    for values in found.values():
        assert values["updates"] >= 200_000 and values["rate_final"] < values["rate"]
        EnergyNet(3, values["image_size"], 2), Langevin(values["steps"])
        settings = {k: values[k] for k in ("updates", "rate", "rate_final", "sigma", "precision")}
        TrainConfig(**settings, **values["options"])


def test_the_smoke_run_differs_from_the_paper_in_sizes_only():
    paper, smoke = profiles.read_profile(PAPER), profiles.read_profile(SMOKE)
    assert list(paper) == list(smoke)
    for entry, values in paper.items():
        assert list(values) == list(smoke[entry]), entry
        assert {k for k, v in values.items() if v != smoke[entry][k]} <= SIZES, entry
        assert smoke[entry]["updates"] == 2


def test_a_dry_run_of_the_papers_whole_graph(project):
    said = snakemake(project, "--dry-run", "--config", "profile=paper")
    jobs = re.findall(
        r"runner notebooks/(\S+)\.ipynb --profile profiles/paper.yaml --variant (\S+) --cell-tim\S+ (\d+)", said
    )
    minutes = profiles.resources(PAPER)["runtime"]
    assert sorted(jobs) == sorted((*profiles.split(e), str(60 * minutes)) for e in profiles.read_profile(PAPER))
    assert said.count("gpu=1, gpu_manufacturer=nvidia") == len(jobs)
    assert not (project / "figures").exists() and not (project / "checkpoints").exists()


def test_a_job_on_a_clusters_node_uses_the_cpus_it_asked_for_and_not_all_of_the_node(project):
    """As a cluster's executor starts it there; srun would refuse to start on more CPUs than were given."""
    said = snakemake(project, "--dry-run", "--mode", "remote", "--cores", "64", "--config", "profile=paper")
    assert set(re.findall(r"threads: (\d+)", said)) == {str(profiles.resources(PAPER)["cpus"])}


def test_the_papers_graph_end_to_end_with_two_updates(project):
    """27 s of processor time an entry, measured on a crowded machine.

    The notebooks' kernels get the checksums of the tiny data from an IPython startup file.
    """
    for write in (write_cifar10, write_celeba, write_lsun):
        write(project / "data")
    startup = project / "ipython" / "profile_default" / "startup"
    startup.mkdir(parents=True)
    (startup / "checksums.py").write_text(
        f"from torchvision import datasets\nfor name, table in {checksums(project / 'data')!r}.items():\n"
        "    for attribute, value in table.items():\n        setattr(getattr(datasets, name), attribute, value)\n"
    )
    snakemake(project, "--config", "profile=paper-smoke")
    page = (project / "figures" / "paper-smoke" / "index.html").read_text()
    for entry, values in profiles.read_profile(SMOKE).items():
        folder = project / "figures" / "paper-smoke" / entry
        made = json.loads((folder / "manifest.json").read_text())
        assert values.items() <= made["parameters"].items() and made["variant"] == profiles.split(entry)[1]
        assert {"samples.png", "samples.pdf", "transition.png", "01_synthesis.html"} <= {
            p.name for p in folder.iterdir()
        }
        for file in folder.glob("*.png"):
            assert f'src="{entry}/{file.name}"' in page
        model = ShortRun.load(project / "notebooks" / values["save_as"])
        assert (model.dataset, model.shape) == (values["dataset"], (3, values["image_size"], values["image_size"]))
        assert model.kernel.steps == 3
    assert "Job stats" not in snakemake(project, "--dry-run", "--config", "profile=paper-smoke"), "all is up to date"


TINY = """\
dataset: fashion_mnist_mini
limit: 20
network: {channels: 1, image_size: 8, width: 2}
seed: 3
stages:
  - {steps: 2, updates: 3, batch_size: 4}
"""


def test_make_checkpoints_learns_every_recipe_and_a_tiny_one_really(project):
    shipped = {p.stem for p in (project / "srmcmc_lib" / "pretrained").glob("*.yaml")}
    (project / "srmcmc_lib" / "pretrained" / "tiny.yaml").write_text(TINY)
    said = snakemake(project, "--dry-run", "checkpoints")
    assert set(re.findall(r"-m srmcmc_lib\.recipes (\S+) --out checkpoints/retrained", said)) == {*shipped, "tiny"}
    assert "-m srmcmc_lib.classifier --out checkpoints/retrained" in said

    target = "checkpoints/retrained/tiny.safetensors"
    snakemake(project, target)
    model = ShortRun.load(project / target)
    assert model.kernel.steps == 2 and model.training["images"] == 20
    curve = (project / "checkpoints" / "retrained" / "tiny-stage1.csv").read_text()
    assert len(curve.splitlines()) == 1 + 3 and (project / "checkpoints" / "tiny" / "stage1.safetensors").exists()
    assert not (project / "srmcmc_lib" / "pretrained" / "tiny.safetensors").exists(), "shipped models are left alone"
