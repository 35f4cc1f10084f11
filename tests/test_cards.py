"""Cards: what is measured, what is refused, and that README and cards agree."""

import json
import subprocess
import sys

import pytest
import torch

from srmcmc_lib import EnergyNet, Langevin, ShortRun, cards, paths
from srmcmc_lib.metrics import NAMES
from srmcmc_lib.recipes import learning_curves


@pytest.fixture(scope="module")
def weak(tmp_path_factory):
    """An untrained model: its samples are noise, and every number must say so."""
    torch.manual_seed(0)
    model = ShortRun(EnergyNet(1, 32, width=2), Langevin(2), dataset="fashion_mnist_mini")
    return model.save(tmp_path_factory.mktemp("cards") / "weak.safetensors")


@pytest.fixture(scope="module")
def measured(weak):
    return cards.measure(weak, samples=120, seed=3)


def test_an_untrained_model_measures_as_noise(measured):
    rows = {name: row["classifier_frechet"] for name, row in measured["rows"].items()}
    assert list(rows) == ["samples", "test images", "test images + N(0, 0.1²)", "test images, blurred 5×5", "p_0 noise"]
    assert 0.5 * rows["p_0 noise"] < rows["samples"] < 1.5 * rows["p_0 noise"]
    assert rows["test images"] < 0.05 * rows["samples"]
    assert measured["memorisation"]["samples"] > 2 * measured["memorisation"]["held_out"]
    assert sum(measured["classes"].values()) == pytest.approx(1) and measured["entropy"] < 1.5


def test_counts_reference_and_seed_are_part_of_the_numbers(measured):
    assert measured["samples"] == measured["rows"]["samples"]["images"] == 120 and measured["seed"] == 3
    assert measured["reference"] == "the 8,000 training images"
    assert measured["to_test"]["reference"] == 2_000  # the mini set's held-out images, never the ones it learned from
    text = cards.report(measured, "classifier")
    assert "120 samples, seed 3" in text and "8,000" in text and "classifier_frechet" in text
    json.dumps(measured)


@pytest.mark.parametrize("samples", [99, 0, True, 1e3])
def test_too_few_samples_are_refused_before_any_work(weak, samples):
    with pytest.raises(ValueError, match="samples must be an integer of at least 100"):
        cards.measure(weak, samples)


def test_a_model_of_other_images_is_refused(tmp_path):
    torch.manual_seed(0)
    path = ShortRun(EnergyNet(3, 16, width=2), Langevin(2), dataset="cifar10").save(tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="cifar10"):
        cards.measure(path)


@pytest.mark.parametrize("module", ["cards", "moments"])
def test_a_missing_card_is_missed_before_the_measuring(weak, module):
    command = [sys.executable, "-m", f"srmcmc_lib.{module}", weak, "--write"]
    said = subprocess.run(command, capture_output=True, text=True, cwd=paths.PACKAGE.parent)
    assert said.returncode and f"no card {weak.with_suffix('.json')} to write on" in said.stderr


def test_the_table_in_the_readme_is_the_cards_own():
    readme = (paths.PACKAGE.parent / "README.md").read_text(encoding="utf-8")
    assert cards.table() in readme, "run `python -m srmcmc_lib.cards --table` and put it in README.md"


def test_every_shipped_model_has_a_card_that_was_measured():
    weights = [p for p in paths.PRETRAINED.glob("fashion_mnist*.safetensors") if "classifier" not in p.stem]
    assert len(weights) >= 2
    for path in weights:
        card = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        row = card["measured"]["classifier"]
        assert row["samples"] >= 10_000 and path.stem in row["command"]
        assert set(NAMES["classifier"]) < row["rows"]["samples"].keys()
        assert card["hours"] > 0 and f"`{path.stem}`" in cards.table()
        stages = card["recipe"]["stages"]
        assert [len(records) for _, records in learning_curves(path.stem)] == [stage["updates"] for stage in stages]
