"""One file holds the whole model; damaged files and NaN are named; nothing is ever unpickled."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_training import Linear, tiny
from torch import nn

from srmcmc_lib import EnergyNet, Gaussian, Langevin, ShortRun, checkpoint
from srmcmc_lib.noise import PRIORS

GOLDEN = load_file(Path(__file__).parent / "golden.safetensors")


@pytest.fixture
def path(tmp_path):
    """A model in which nothing is at its default, made with NumPy's numbers."""
    f, kernel = EnergyNet(3, np.int64(12), width=3, activation="silu"), Langevin(7, 0.5, 0.02)
    model = ShortRun(f, kernel, Gaussian(np.float64(0.7)), "folder:/my", {"d": np.float32(-0.125), "note": "größer"})
    return model.save(tmp_path / "new" / "my.safetensors")


def test_a_checkpoint_holds_everything(path):
    model = ShortRun.load(str(path))
    assert (model.kernel, model.prior, model.dataset) == (Langevin(7, 0.5, 0.02), Gaussian(0.7), "folder:/my")
    assert model.f.activation == "silu" and model.training == {"d": -0.125, "note": "größer"}
    again = ShortRun.load(model.to(torch.bfloat16).save(path))  # half the size
    assert again.config == model.config and torch.equal(again.sample(2, 0), model.to(torch.float32).sample(2, 0))
    with pytest.raises(FileNotFoundError, match=r"no checkpoint 'shoes'.*'fashion_mnist', .*'moments_trouser'\]"):
        ShortRun.load("shoes")


def test_a_kernel_and_a_prior_of_ones_own_must_be_given_again(path, monkeypatch):
    class Clipped(Langevin):
        def step(self, x, gradient, u):
            return super().step(x, gradient, u).clamp(-1, 1)

    monkeypatch.setitem(PRIORS, "Grey", type("Grey", (Gaussian,), {}))
    file = replace(ShortRun.load(path), kernel=Clipped(7, 0.5, 0.02), prior=PRIORS["Grey"](0.1)).save(path)
    with pytest.raises(ValueError, match="Clipped: build one and pass it as kernel="):
        ShortRun.load(file)
    assert ShortRun.load(file, kernel=Clipped(7, 0.5, 0.02)).sample(2, seed=0).abs().max() <= 1
    monkeypatch.delitem(PRIORS, "Grey")
    with pytest.raises(ValueError, match=r"has a prior Grey: enter its class in noise\.PRIORS"):
        ShortRun.load(file, kernel=Clipped(7, 0.5, 0.02))


def rewritten(path, bias):  # right names, another content
    meta, tensors = checkpoint.read(path)
    checkpoint.write(path, meta, tensors | {"f.layers.0.bias": torch.tensor(bias)})


DAMAGE = {
    "truncated": lambda p: p.write_bytes(p.read_bytes()[:-10]),
    "a pickle": lambda p: p.write_bytes(b"cos\n_exit\n(I1\ntR."),  # would end this process
    "foreign": lambda p: save_file({"w": torch.zeros(2)}, p, {"format": "pt"}),
    "another shape": lambda p: rewritten(p, [0.0] * 4),
    "NaN": lambda p: rewritten(p, [0.0, 0.0, float("nan")]),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_damaged_files_are_refused_by_name(path, damage):
    damage(path)
    with pytest.raises(ValueError, match=rf"^{path} (is damaged|holds NaN or infinite weights)"):
        ShortRun.load(path)


def test_a_network_of_ones_own_is_filled_by_load(path):
    (model := ShortRun(Linear(), Langevin(3))).save(path)
    assert torch.equal(ShortRun.load(path, f=Linear()).sample(2, 0), model.sample(2, 0))
    (other := Linear()).add_module("more", nn.Linear(1, 1))
    for f, message in ((None, "of a Linear: build"), (other, "not of this f"), (EnergyNet(1, 8), "but yours is")):
        with pytest.raises(ValueError, match=f"^{path} .*{message}"):
            ShortRun.load(path, f=f)
    with pytest.raises(ValueError, match=r"kernel .*'steps': 3.*but yours is .*'steps': 4"):
        ShortRun.load(path, f=Linear(), kernel=Langevin(4))
    model.f.again = model.f.w  # two layers share their weights
    assert ShortRun.load(model.save(path), f=model.f).sample(2, 0).isfinite().all()


@pytest.mark.parametrize("activation", ["leaky_relu", "silu"])
def test_old_weights_give_the_images_that_they_gave(activation):
    """Within rounding: samples, a row between two z, and 12 iterations of reconstruction, of the first version."""
    model = tiny(5, 4, activation=activation)
    model.f.load_state_dict({k: GOLDEN[f"{activation}.f.{k}"] for k in model.f.state_dict()})
    z, rec = model.draw_z(3, 1), model.reconstruct(GOLDEN[f"{activation}.sample"], iterations=12, seed=4)
    found = {"sample": model.sample(3, seed=7), "interpolate": model.interpolate(z[:1], z[1:2], [1.0, 0.5, 0.0], u=2)}
    for name, value in (found | {"rec.z": rec.z, "rec.x": rec.x, "rec.errors": rec.errors}).items():
        torch.testing.assert_close(value, GOLDEN[f"{activation}.{name}"], rtol=1e-4, atol=1e-5)
