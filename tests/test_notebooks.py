"""The notebooks' rules, and notebooks 02 and 03 with models other than the shipped ConvNets."""

import ast
import json
import re
from pathlib import Path

import matplotlib
import pytest
import torch
from torch import nn

from srmcmc_lib import EnergyNet, Langevin, LinearEnergy, ShortRun

matplotlib.use("agg")
ROOT = Path(__file__).resolve().parent.parent


def code(name: str) -> list[dict]:
    cells = json.loads((ROOT / "notebooks" / f"{name}.ipynb").read_text())["cells"]
    return [c | {"source": "".join(c["source"])} for c in cells if c["cell_type"] == "code"]


@pytest.mark.parametrize("path", sorted(ROOT.glob("notebooks/*.ipynb")), ids=lambda path: path.stem)
def test_cells_are_short_and_parameters_plain(path):
    cells = code(path.stem)
    assert max(len(cell["source"].splitlines()) for cell in cells) <= 25
    (parameters,) = (cell for cell in cells if "parameters" in cell["metadata"].get("tags", []))
    for line in parameters["source"].splitlines():  # papermill's parser misreads a second "=", even in a comment
        assert line.count("=") <= 1
        if not line.startswith("#"):
            ast.literal_eval(line.partition("=")[2].strip())


class Quadratic(nn.Module):
    """A network of one's own, by the model contract alone: f(x) = −c‖x − m‖²."""

    image_size, piecewise_linear = 32, False

    def __init__(self, channels: int):
        super().__init__()
        self.channels, self.m = channels, nn.Parameter(torch.zeros(channels, 1, 1))
        self.c = nn.Linear(1, 1, bias=False)  # what energy.rescale scales

    def forward(self, x):
        return self.c((x - self.m).square().flatten(1).sum(1, keepdim=True))[:, 0]


def own(channels: int) -> ShortRun:
    f = Quadratic(channels)
    nn.init.constant_(f.c.weight, -0.05)
    return ShortRun(f, Langevin(3), dataset="fashion_mnist")


def linear() -> ShortRun:
    f = LinearEnergy(layer=2)
    nn.init.normal_(f.inner.weight, std=0.1)
    return ShortRun(f, Langevin(3), dataset="fashion_mnist")


TINY = {
    "02_interpolation": {"rows": 2, "many": 8, "points": 5, "pairs": 1, "iterations": 1},
    "03_reconstruction": {"images": 2, "iterations": 2, "inversions": 1, "group": 2, "trial": 4, "long": 2},
}


@pytest.mark.parametrize(
    ("name", "kind"), [("02_interpolation", "features"), ("02_interpolation", "own"), ("03_reconstruction", "own")]
)
def test_a_notebook_runs_with_another_model(name, kind, tmp_path, monkeypatch):
    """As a reader would do it, in place of ShortRun.load(checkpoint); with the parameters of a tiny run."""
    monkeypatch.setenv("SRMCMC_FIGURES", str(tmp_path))
    model = linear() if kind == "features" else own(channels=3 if name == "02_interpolation" else 1)
    activations = {"fast": "leaky_relu", "smooth": "silu"}
    small = {key: ShortRun(EnergyNet(1, 32, 2, φ), Langevin(3)) for key, φ in activations.items()}
    space = {"MODELS": {"checkpoint": model} | small}
    for cell in code(name):
        exec(re.sub(r"ShortRun\.load\((\w+)\)", r'MODELS["\1"]', cell["source"]), space)
        if "parameters" in cell["metadata"].get("tags", []):
            space |= TINY[name]
    assert space["model"] is model
    assert len(list(tmp_path.glob("*/*.png"))) == len(list((ROOT / "figures" / name).glob("*.png")))
