"""The code gives what it gave before it was rewritten: golden.safetensors holds that code's training run and images."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_training import IMAGES, config, tiny
from torch import Generator

from srmcmc_lib import train, training

GOLDEN = load_file(Path(__file__).parent / "golden.safetensors")
CONFIG = config(updates=40, batch_size=6, rate_final=1e-4, sigma_final=0.03, lower_from=0.5, average=0.9, seed=3)


@pytest.mark.parametrize("activation", ["leaky_relu", "silu"])
def test_a_training_run_equals_the_old_one(monkeypatch, activation):
    """With the old generators, which ran on from update to update, in the place of `fresh`.

    f's own gradient takes sums in another order, and a rounding may carry a unit of a LeakyReLU over its kink.
    """
    generators = [Generator().manual_seed(4 * CONFIG.seed + i) for i in range(4)]
    monkeypatch.setattr(training, "fresh", lambda seed, t, device: generators)
    model, close = tiny(5, 4, activation=activation), dict(rtol=1e-4, atol=1e-5)
    records = [[r.step, r.d, r.grad_norm, r.rate, r.sigma] for r in train(model, IMAGES, CONFIG)]
    torch.testing.assert_close(torch.tensor(records, dtype=torch.float64), GOLDEN[f"{activation}.records"], **close)
    for k, v in model.f.state_dict().items():
        torch.testing.assert_close(v, GOLDEN[f"{activation}.f.{k}"], **close)


@pytest.mark.parametrize("activation", ["leaky_relu", "silu"])
def test_images_equal_the_old_ones(activation):
    """Within rounding: samples, a row between two z, and 12 iterations of reconstruction."""
    model = tiny(5, 4, activation=activation)
    model.f.load_state_dict({k: GOLDEN[f"{activation}.f.{k}"] for k in model.f.state_dict()})
    z, rec = model.draw_z(3, 1), model.reconstruct(GOLDEN[f"{activation}.sample"], iterations=12, seed=4)
    found = {"sample": model.sample(3, seed=7), "interpolate": model.interpolate(z[:1], z[1:2], [1.0, 0.5, 0.0], u=2)}
    for name, value in (found | {"rec.z": rec.z, "rec.x": rec.x, "rec.errors": rec.errors}).items():
        torch.testing.assert_close(value, GOLDEN[f"{activation}.{name}"], rtol=1e-4, atol=1e-5)
