"""Moments on images: the measure, the preconditioner, and learning that reaches given moments."""

import json
import shutil

import pytest
import torch

from srmcmc_lib import Langevin, LinearEnergy, ShortRun, moments, observed, paths, recipes
from srmcmc_lib.data import to_uint8

SHIPPED = sorted(p.stem for p in paths.PRETRAINED.glob("moments_*.yaml"))


@pytest.fixture
def model():
    return ShortRun(LinearEnergy(layer=1), Langevin(steps=3, noise=0.0))


def test_a_match_tells_error_chance_and_outliers():
    data, start = torch.tensor([1.0, 0.0, 0.0]), torch.tensor([0.0, 0.0, 0.0])
    found = moments.Match(data, start, torch.tensor([1.0, 0.03, -0.05]), torch.full((3,), 0.01), samples=100)
    assert found.relative == pytest.approx((0.03**2 + 0.05**2) ** 0.5)
    assert found.by_chance == pytest.approx(0.01 * 3**0.5)
    assert found.beyond() == {2: pytest.approx(-5.0)}


def test_responses_take_bytes_and_floats_alike(model):
    images = observed("fashion_mnist_mini", limit=7)
    from_bytes = moments.responses(model.f.h, images, batch_size=3)
    assert torch.equal(from_bytes, moments.responses(model.f.h, images / 127.5 - 1, batch_size=3))
    assert from_bytes.shape == (7, 32)


def test_standard_errors_are_those_of_the_mean(model):
    x = model.draw_z(50, seed=1)
    found, h = moments.match(model.f.h, x, torch.zeros(32), torch.ones(32)), moments.responses(model.f.h, x)
    torch.testing.assert_close(found.error, h.std(0) / 50**0.5)
    torch.testing.assert_close(found.reached, h.mean(0))


def test_gram_tells_how_a_small_step_moves_the_moments(model):
    """h(x + s ∂h/∂xᵀ θ) − h(x) ≈ s ∂h/∂x ∂h/∂xᵀ θ, averaged over x."""
    h, x, s = model.f.h.double(), model.draw_z(4, seed=0).double().requires_grad_(), 1e-6
    θ = torch.randn(32, generator=torch.Generator().manual_seed(0)).double()
    step = torch.autograd.grad((h(x) @ θ).sum(), x)[0]
    moved = (h(x + s * step) - h(x)).mean(0) / s
    torch.testing.assert_close(moments.gram(h, x.detach()) @ θ, moved.detach(), rtol=1e-3, atol=1e-5)


def test_learning_finds_the_moments_of_a_known_theta():
    """The data are samples of the same family, so that some θ matches them."""
    teacher, model = (ShortRun(LinearEnergy(layer=1), Langevin(steps=3)) for _ in range(2))
    with torch.no_grad():
        teacher.f.theta.normal_(0, 3.0, generator=torch.Generator().manual_seed(0))
    x = teacher.sample(64, seed=5)
    data, teacher_images = moments.responses(teacher.f.h, x).mean(0), to_uint8(x)
    start = moments.responses(model.f.h, model.draw_z(64, seed=7)).mean(0)
    assert moments.match(model.f.h, model.sample(64, seed=6), data, start).relative > 0.9
    records = list(moments.learn(model, data, teacher_images, updates=12, batch_size=32, rate=0.7, decay=5.0, renew=4))
    assert [r.step for r in records] == list(range(1, 13))
    assert torch.equal(model.f.theta, records[-1].mean)
    assert moments.match(model.f.h, model.sample(64, seed=6), data, start).relative < 0.1
    assert records[-1].length > 0


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"rate": 0.0}, "rate, decay and damping must be positive"),
        ({"damping": 0.0}, "rate, decay and damping must be positive"),
        ({"updates": 0}, "updates must be an integer of at least 1"),
        ({"batch_size": 8.0}, "batch_size must be an integer of at least 1"),
        ({"renew": 0}, "renew must be an integer of at least 1"),
    ],
)
def test_settings_out_of_range_are_refused(model, bad, message):
    with pytest.raises(ValueError, match=message):
        next(moments.learn(model, torch.zeros(32), None, **({"updates": 1} | bad)))


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_model_is_what_its_recipe_says_and_matches_after_k_steps_only(name):
    model, recipe = ShortRun.load(name), recipes.read_recipe(name)
    assert model.training["recipe"] == recipe and model.f.config.items() >= recipe["network"].items()
    assert model.kernel.steps == recipe["moments"][-1]["steps"]
    card = json.loads((paths.PRETRAINED / f"{name}.json").read_text())
    assert {k: v for k, v in card.items() if k != "measured"} == model.training
    data, start = moments.given(model)
    some = moments.responses(model.f.h, observed(recipe["dataset"], limit=1_000))
    assert ((some.mean(0) - data).abs() < 5 * some.std(0) / 1_000**0.5).all(), "not the data's moments"
    z = model.draw_z(16, seed=3)
    reached, early = (moments.match(model.f.h, m(z, u=3), data, start) for m in (model, model.with_steps(5)))
    assert reached.relative < 0.2 < early.relative


def test_a_recipe_of_moments_learns_in_stages_from_nothing(tmp_path, monkeypatch):
    recipe = {
        "dataset": "fashion_mnist_mini", "limit": 50, "seed": 0,
        "network": {"channels": 1, "image_size": 32, "layer": 1},
        "moments": [{"steps": 2, "updates": 3, "batch_size": 8},
                    {"steps": 4, "updates": 2, "batch_size": 8, "seed": 7}],
    }  # fmt: skip
    shutil.copy(paths.PRETRAINED / "fashion_mnist_classifier.safetensors", tmp_path)
    monkeypatch.setattr(paths, "PRETRAINED", tmp_path)
    (tmp_path / "tiny.yaml").write_text(json.dumps(recipe))  # JSON is YAML
    model = ShortRun.load(recipes.run("tiny", tmp_path, tmp_path / "out"))
    assert model.kernel.steps == 4 and model.f.theta.abs().sum() > 0
    log = (tmp_path / "out" / "tiny.csv").read_text().splitlines()
    assert [line.split(",")[:2] for line in log[1:]] == [["1", "2"], ["2", "2"], ["3", "2"], ["4", "4"], ["5", "4"]]
