"""The notebooks' rules, and notebook 02 with a model other than the shipped ones."""

import ast
import json
import re
from pathlib import Path

import matplotlib
import pytest

from srmcmc_lib import EnergyNet, Langevin, ShortRun

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


def test_notebook_02_runs_with_a_model_of_ones_own(tmp_path, monkeypatch):
    """Of small colour images, in place of ShortRun.load(checkpoint); with the parameters of a tiny run."""
    monkeypatch.setenv("SRMCMC_FIGURES", str(tmp_path))
    model = ShortRun(EnergyNet(3, 16, 2), Langevin(3), dataset="folder:/my")
    activations = {"fast": "leaky_relu", "smooth": "silu"}
    small = {name: ShortRun(EnergyNet(1, 32, 2, φ), Langevin(3)) for name, φ in activations.items()}
    space = {"MODELS": {"checkpoint": model} | small, "display": print}
    for cell in code("02_interpolation"):
        exec(re.sub(r"ShortRun\.load\((\w+)\)", r'MODELS["\1"]', cell["source"]), space)
        if "parameters" in cell["metadata"].get("tags", []):
            space |= {"rows": 2, "many": 8, "points": 5, "pairs": 1, "iterations": 1, "trial": 2}
    assert space["model"] is model
    assert len(list(tmp_path.glob("*/*.png"))) == len(list((ROOT / "figures/02_interpolation").glob("*.png")))
