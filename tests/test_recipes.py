"""Recipes: trained in stages, resumable, and the shipped model is what its recipe says."""

import json

import pytest
import torch
import yaml

from srmcmc_lib import EnergyNet, Langevin, ShortRun, TrainConfig, observed, paths, recipes
from srmcmc_lib.data import to_float

RECIPES = sorted(p.stem for p in paths.PRETRAINED.glob("*.yaml"))
SHIPPED = [name for name in RECIPES if "stages" in recipes.read_recipe(name)]  # not those of moments: test_moments
TINY = {
    "dataset": "fashion_mnist_mini",
    "limit": 100,
    "network": {"channels": 1, "image_size": 8, "width": 2},
    "seed": 3,
    "stages": [{"steps": 2, "updates": 3, "batch_size": 4, "average": 0.5, "progress": False},
               {"steps": 4, "updates": 2, "batch_size": 4, "progress": False}],
}  # fmt: skip


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A recipe "tiny" in a pretrained folder of its own; returns a function that writes it."""
    monkeypatch.setattr(paths, "PRETRAINED", tmp_path)

    def write(**changes):
        (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(TINY | changes))

    write()
    return write


def weights(path) -> torch.Tensor:
    return torch.cat([p.flatten() for p in ShortRun.load(path).f.parameters()])


def test_a_recipe_run_again_gives_the_same_weights_also_after_its_first_stage_was_done_before(tiny, tmp_path):
    first = recipes.run("tiny", tmp_path / "a", tmp_path / "out_a")
    (tmp_path / "b").mkdir()
    for kind in ("safetensors", "csv"):  # as after an interruption between the stages
        (tmp_path / "b" / f"stage1.{kind}").write_bytes((tmp_path / "a" / f"stage1.{kind}").read_bytes())
    second = recipes.run("tiny", tmp_path / "b", tmp_path / "out_b")
    assert torch.equal(weights(first), weights(second))
    assert ShortRun.load(first).kernel.steps == 4
    card = json.loads((tmp_path / "out_a" / "tiny.json").read_text())
    assert card["images"] == 100 and card["recipe"] == TINY
    curves = recipes.learning_curves(first)
    assert [(steps, len(records)) for steps, records in curves] == [(2, 3), (4, 2)]


def test_the_checkpoint_nearest_to_the_training_images_is_shipped(tiny, tmp_path, monkeypatch):
    """Distances are given here, least for the later candidate; what is shipped must be that one's weights."""
    stages = [{"steps": 2, "updates": 5, "batch_size": 4, "checkpoint_every": 2, "progress": False}]
    tiny(stages=stages, select={"first": 3, "samples": 6, "seed": 1})
    distances = iter([3.0, 1.0])  # of updates 4 and 5 (the end)
    monkeypatch.setattr(recipes, "embed", lambda images: images)
    monkeypatch.setattr(recipes, "scores", lambda images, reference: {"classifier_frechet": next(distances)})
    path = recipes.run("tiny", tmp_path / "a", tmp_path / "out")
    work = tmp_path / "a"
    assert sorted(p.stem for p in work.glob("candidate-*")) == ["candidate-4", "candidate-5"]
    assert torch.equal(weights(path), weights(work / "candidate-5.safetensors"))
    assert not torch.equal(weights(path), weights(work / "candidate-4.safetensors"))
    card = json.loads((tmp_path / "out" / "tiny.json").read_text())
    assert card["selection"] == {"classifier_frechet": {"candidate-4": 3.0, "candidate-5": 1.0}}


def test_a_stage_prolonged_under_finished_later_stages_is_refused(tiny, tmp_path):
    recipes.run("tiny", tmp_path / "a", tmp_path / "out")
    tiny(stages=[TINY["stages"][0] | {"updates": 4}, TINY["stages"][1]])
    with pytest.raises(ValueError, match=r"stage2\.safetensors comes from an earlier stage 1: delete it"):
        recipes.run("tiny", tmp_path / "a", tmp_path / "out")


def test_a_rule_of_selection_without_its_numbers_is_refused(tiny):
    tiny(select={"samples": 6})
    with pytest.raises(ValueError, match="select needs first, samples and seed"):
        recipes.read_recipe("tiny")


@pytest.mark.parametrize(
    ("changes", "named"),
    [({"stagse": []}, "stagse"), ({"stages": [{"steps": 2, "updates": 1, "rte": 1e-3}]}, "rte")],
)
def test_a_mistyped_recipe_is_refused_by_name(tiny, changes, named):
    tiny(**changes)
    with pytest.raises(ValueError, match=named):
        recipes.read_recipe("tiny")


@pytest.mark.parametrize("text", ["", "stages: 3", "stages: []", "- 1", "stages: [1]", "a: [b"])
def test_a_file_that_is_no_recipe_is_refused_by_name(tmp_path, text):
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=r"mine\.yaml"):
        recipes.read_recipe(str(file))


def test_a_stage_may_have_a_seed_of_its_own(tiny, tmp_path):
    path = recipes.run("tiny", tmp_path / "a", tmp_path / "out")
    tiny(stages=[TINY["stages"][0], TINY["stages"][1] | {"seed": 9}])
    other = recipes.run("tiny", tmp_path / "b", tmp_path / "out2")
    first = [tmp_path / work / "stage1.safetensors" for work in "ab"]
    assert torch.equal(*map(weights, first)) and not torch.equal(weights(path), weights(other))
    assert "options" not in ShortRun.load(other).training
    parts = recipes.run("tiny", tmp_path / "c", tmp_path / "out3", sub_batch=2)
    assert ShortRun.load(parts).training["options"] == {"sub_batch": 2}


def test_a_setting_out_of_range_in_a_late_stage_stops_the_run_before_the_first(tiny, tmp_path):
    tiny(stages=[TINY["stages"][0], TINY["stages"][1] | {"path": 2.4}])
    with pytest.raises(ValueError, match=r"path must be None, or above 1 and below alarm=1\.6"):
        recipes.run("tiny", tmp_path / "work", tmp_path / "out")
    assert not (tmp_path / "work").exists()


def test_an_unknown_recipe_names_the_known_ones(tiny):
    with pytest.raises(FileNotFoundError, match="tiny"):
        recipes.read_recipe("tinny")


def test_something_is_shipped():
    assert "fashion_mnist_mini" in SHIPPED


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_model_is_what_its_recipe_says(name):
    model, recipe = ShortRun.load(name), recipes.read_recipe(name)
    assert model.training["recipe"] == recipe
    assert model.f.config.items() >= recipe["network"].items()
    assert (model.kernel.steps, model.dataset) == (recipe["stages"][-1]["steps"], recipe["dataset"])
    card = json.loads((paths.PRETRAINED / f"{name}.json").read_text(encoding="utf-8"))
    assert {k: v for k, v in card.items() if k != "measured"} == model.training
    curves = recipes.learning_curves(name)
    assert [records[-1].step for _, records in curves] == [stage["updates"] for stage in recipe["stages"]]


def smoothness(x: torch.Tensor) -> float:
    """Correlation of horizontally and vertically neighbouring pixels: 0.88 on Fashion-MNIST, 0 on noise."""
    pairs = [(x[..., :-1], x[..., 1:]), (x[..., :-1, :], x[..., 1:, :])]
    return sum(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1].item() for a, b in pairs) / 2


def likeness(x: torch.Tensor, data: torch.Tensor) -> float:
    """Correlation of the mean images."""
    return torch.corrcoef(torch.stack([x.mean(0).flatten(), data.mean(0).flatten()]))[0, 1].item()


def looks_like(x: torch.Tensor, data: torch.Tensor) -> bool:
    """Smooth as photographs are, right on average, and as varied as the data, neither one mode nor noise."""
    diversity = (x.std(0).mean() / data.std(0).mean()).item()
    return smoothness(x) > 0.75 and likeness(x, data) > 0.95 and 0.8 < diversity < 1.25


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_model_samples_images_not_noise_and_needs_all_of_its_steps(name):
    model = ShortRun.load(name)
    data = to_float(observed(model.dataset, model.f.image_size, limit=2000))
    z = model.draw_z(48, seed=5)
    assert looks_like(model(z, u=5), data)
    assert not looks_like(z, data)
    assert not looks_like(model.with_steps(model.kernel.steps // 2)(z, u=5), data)
    assert not looks_like(data[:1].expand(48, -1, -1, -1), data), "one image 48 times must not pass"


def test_the_readmes_recipe_is_one(tmp_path):
    readme = (paths.PACKAGE.parent / "README.md").read_text(encoding="utf-8")
    (tmp_path / "cifar10.yaml").write_text(readme.split("```yaml\n")[1].split("```")[0], encoding="utf-8")
    recipe = recipes.read_recipe(str(tmp_path / "cifar10.yaml"))
    (stage,) = recipe["stages"]
    Langevin(stage.pop("steps")), EnergyNet(**recipe["network"]), TrainConfig(**stage)
    with pytest.raises(FileNotFoundError, match=r"or give the path of a \.yaml file"):
        recipes.read_recipe(str(tmp_path / "cifar11.yaml"))
