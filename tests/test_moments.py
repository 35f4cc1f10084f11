"""Moments on images: the measure, the preconditioner, and a training run that reaches given moments."""

import json
from pathlib import Path

import pytest
import torch
import yaml

from srmcmc_lib import Langevin, LinearEnergy, ShortRun, moments, observed, paths
from srmcmc_lib.data import labels, to_uint8
from srmcmc_lib.features import responses

ROOT = Path(__file__).resolve().parents[1]
SHIPPED = sorted(p.stem for p in paths.PRETRAINED.glob("moments_*.json"))
model = pytest.fixture(lambda: ShortRun(LinearEnergy(layer=1), Langevin(steps=3, noise=0.0)))


def test_a_match_tells_error_chance_and_outliers():
    data, start = torch.tensor([1.0, 0.0, 0.0]), torch.tensor([0.0, 0.0, 0.0])
    found = moments.Match(data, start, torch.tensor([1.0, 0.03, -0.05]), torch.full((3,), 0.01))
    assert found.relative == pytest.approx((0.03**2 + 0.05**2) ** 0.5)
    assert found.by_chance == pytest.approx(0.01 * 3**0.5)
    assert found.beyond() == {2: pytest.approx(-5.0)}


def test_standard_errors_are_those_of_the_mean(model):
    x = model.draw_z(50, seed=1)
    found, h = moments.match(model.f.h, x, torch.zeros(32), torch.ones(32)), responses(model.f.h, x)
    torch.testing.assert_close(found.error, h.std(0) / 50**0.5)
    torch.testing.assert_close(found.reached, h.mean(0))


def test_gram_tells_how_a_small_step_moves_the_moments(model):
    """h(x + s ∂h/∂xᵀ θ) − h(x) ≈ s ∂h/∂x ∂h/∂xᵀ θ, averaged over x."""
    h, x, s = model.f.h.double(), model.draw_z(4, seed=0).double().requires_grad_(), 1e-6
    θ = torch.randn(32, generator=torch.Generator().manual_seed(0)).double()
    step = torch.autograd.grad((h(x) @ θ).sum(), x)[0]
    moved = (h(x + s * step) - h(x)).mean(0) / s
    torch.testing.assert_close(moments.gram(h, x.detach(), θ), moved.detach(), rtol=1e-3, atol=1e-5)


def test_training_finds_the_moments_of_a_known_theta():
    """The data are samples of the same family, so some θ matches them."""
    teacher, model = (ShortRun(LinearEnergy(layer=1), Langevin(steps=3)) for _ in range(2))
    with torch.no_grad():
        teacher.f.theta.normal_(0, 3.0, generator=torch.Generator().manual_seed(0))
    x = teacher.sample(64, seed=5)
    data, start = responses(teacher.f.h, x).mean(0), responses(model.f.h, model.draw_z(64, seed=7)).mean(0)
    assert moments.match(model.f.h, model.sample(64, seed=6), data, start).relative > 0.9
    updates = list(moments.learn(model, data, to_uint8(x), updates=12, batch_size=32, rate=0.7, decay=5.0, renew=4))
    assert [update.step for update in updates] == list(range(1, 13))
    torch.testing.assert_close(model.f.theta.detach(), updates[-1].mean)
    assert moments.match(model.f.h, model.sample(64, seed=6), data, start).relative < 0.1


def test_two_moments_are_enough():
    model, images = ShortRun(LinearEnergy(layer=1, cells=[1, 0]), Langevin(3)), observed("fashion_mnist_mini", limit=64)
    *_, last = moments.learn(model, responses(model.f.h, images).mean(0), images, updates=3, batch_size=4)
    assert len(last.delta) == 2 and last.mean.isfinite().all()


def test_a_training_run_that_diverges_says_so(model):
    data = responses(model.f.h, observed("fashion_mnist", limit=50)).mean(0)
    with pytest.raises(FloatingPointError, match=r"training diverged at update .* a rate below 10000"):
        list(moments.learn(model, data, observed("fashion_mnist", limit=8), updates=9, batch_size=4, rate=1e4))


def test_settings_out_of_range_and_a_model_without_targets_are_refused(model):
    for bad, message in (({"damping": 0.0}, "damping must be positive"), ({"renew": 0}, "renew must be an integer")):
        with pytest.raises(ValueError, match=message):
            next(moments.learn(model, torch.zeros(32), None, **({"updates": 1} | bad)))
    with pytest.raises(ValueError, match="no record of 'data'"):
        moments.targets(model)


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_model_matches_after_k_steps_only(name):
    model = ShortRun.load(name)
    card = json.loads((paths.PRETRAINED / f"{name}.json").read_text())
    recipe = yaml.safe_load((ROOT / f"workflow/recipes/{name}.yaml").read_text())
    assert card["recipe"].items() <= recipe.items()  # which may name a commit besides
    said, mine = ({k: v for k, v in d.items() if k not in ("measured", "commit")} for d in (card, model.training))
    assert said == mine
    assert model.f.config.items() >= recipe["network"].items()
    assert model.kernel.steps == recipe["moments"][-1]["steps"]
    data, start = moments.targets(model)
    if "label" in recipe:  # few images: all of them
        chosen = observed(recipe["dataset"])[labels(recipe["dataset"]) == recipe["label"]]
        torch.testing.assert_close(responses(model.f.h, chosen).mean(0), data, rtol=1e-4, atol=1e-5)
    else:
        some = responses(model.f.h, observed(recipe["dataset"], limit=1_000))
        assert ((some.mean(0) - data).abs() < 5 * some.std(0) / 1_000**0.5).all(), "not the data's moments"
    z = model.draw_z(8, seed=3)
    reached, early = (moments.match(model.f.h, m(z, u=3), data, start) for m in (model, model.with_steps(5)))
    assert reached.relative < 0.2 < early.relative
