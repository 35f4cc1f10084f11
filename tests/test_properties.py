"""Properties that hold for any shape, K, type, seed and batch size (hypothesis, the same examples every time)."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from srmcmc_lib import EnergyNet, Gaussian, Langevin, ShortRun, Uniform
from srmcmc_lib.energy import ACTIVATIONS
from srmcmc_lib.noise import MIXINGS

FEW = settings(derandomize=True, max_examples=20, deadline=None, database=None)
SEEDS, SMALL, CLOSE = st.integers(0, 2**32 - 1), st.integers(1, 5), dict(rtol=1e-4, atol=1e-4)
NETWORKS = st.builds(EnergyNet, SMALL, st.integers(5, 20), SMALL, st.sampled_from([*ACTIVATIONS]))
KERNELS = st.builds(Langevin, SMALL, st.floats(0.01, 2), st.floats(0, 0.5))
MODELS = st.builds(ShortRun, NETWORKS, KERNELS, st.sampled_from([Uniform(), Uniform(0, 2), Gaussian(0.5)]))


@FEW
@given(MODELS, SEEDS, SMALL, SMALL, st.sampled_from(["float16", "float32", "float64"]))
def test_samples_are_the_model_at_the_seeds_z_and_u_whatever_the_batch(model, seed, n, batch_size, dtype):
    x, z = model.sample(n, seed, batch_size), model.draw_z(n, seed)
    assert x.shape == (n, *model.shape) and x.dtype == torch.float32
    assert torch.equal(model.draw_z(1, seed, start=n - 1), z[-1:])
    torch.testing.assert_close([model(z, u=seed), model.sample(n + 2, seed)[:n]], [x, x], **CLOSE)
    path = list(model.trajectory(z.numpy().astype(dtype), u=np.int64(seed)))
    assert len(path) == model.kernel.steps + 1
    torch.testing.assert_close(path[-1], x, rtol=0.02, atol=0.02)  # float16 rounds z


@FEW
@given(MODELS, SEEDS, st.sampled_from([torch.bfloat16, torch.float32, torch.float64]))
def test_what_is_saved_is_loaded(tmp_path_factory, model, seed, dtype):
    again = ShortRun.load(model.to(dtype).save(tmp_path_factory.mktemp("saved") / "m.safetensors"))
    assert again.config == model.config
    assert torch.equal(again.sample(2, seed), model.to(torch.float32).sample(2, seed))


@FEW
@given(MODELS, SEEDS, SMALL, st.lists(st.floats(0, 1), max_size=3), st.sampled_from([*MIXINGS]), st.booleans())
def test_rows_lead_from_one_image_to_the_other_each_alone(model, seed, rows, between, mixing, noisy):
    z1, z2 = model.draw_z(2 * rows, seed).split(rows)
    u, rhos = (seed if noisy else None), [1.0, *between, 0.0]
    x = model.interpolate(z1, z2, rhos, u, mixing)
    assert x.shape == (rows, len(rhos), *model.shape) and x.isfinite().all()
    torch.testing.assert_close((x[:, 0], x[:, -1]), (model(z1, u), model(z2, u)), **CLOSE)
    torch.testing.assert_close(model.interpolate(z1[:1], z2[:1], rhos, u, mixing), x[:1], **CLOSE)
