"""ShortRun: seeds, the chain as a plain loop, rows of interpolation, NumPy's arrays, and what mistakes are told."""

from itertools import repeat

import numpy as np
import pytest
import torch
from torch import Generator

from srmcmc_lib import EnergyNet, Langevin, ShortRun
from srmcmc_lib.langevin import chain

K, SHAPE = 4, (1, 8, 8)
torch.manual_seed(7)
MODEL = ShortRun(EnergyNet(*np.array([1, 8]), width=np.int64(4)), Langevin(K, noise=0.1))  # NumPy's integers will do


def by_hand(z, U):
    path = [z]
    for _, u in zip(range(K), U, strict=False):
        x = path[-1].clone().requires_grad_()
        path.append(x.detach() + torch.autograd.grad(MODEL.f(x).sum(), x)[0] + 0.1 * u)
    return path


def test_a_seed_fixes_the_samples_and_the_global_seed_does_not():
    first, state = MODEL.sample(4, seed=0), torch.manual_seed(99).get_state()
    assert torch.equal(MODEL.sample(4, seed=0), first) and torch.equal(torch.get_rng_state(), state)
    g = Generator().manual_seed(5)
    assert torch.equal(MODEL.sample(8, g), MODEL.sample(8, Generator().manual_seed(5)))  # and g moves on
    x = torch.cat([MODEL.sample(8, seed) for seed in (*np.arange(3), 2**32 - 1, g, g)]).flatten(1)
    assert (torch.cdist(x, x) + 1e9 * torch.eye(len(x))).min() > 1  # all images differ


def test_samples_are_the_model_at_the_seeds_z_and_u_whatever_the_batch():
    x, z = MODEL.sample(5, seed=3, batch_size=2), MODEL.draw_z(5, seed=3)
    assert x.shape == (5, *SHAPE) and torch.equal(MODEL.draw_z(1, seed=3, start=4), z[-1:])
    torch.testing.assert_close([MODEL(z, u=3), MODEL.sample(7, seed=3)[:5]], [x, x])


@pytest.mark.parametrize("images", [3, 1], ids=["own noise", "shared noise"])
def test_the_chain_is_the_plain_loop_and_another_k_its_continuation(images):
    z, U = torch.rand(3, *SHAPE), torch.randn(K, images, *SHAPE)
    torch.testing.assert_close([*MODEL.trajectory(z, U)], by_hand(z, U))
    x, u = MODEL(z, U), U.double().numpy()
    torch.testing.assert_close([MODEL(z.double(), u), MODEL(z.numpy(), list(u)), MODEL(z, iter(U.double()))], [x] * 3)
    torch.testing.assert_close(MODEL(z), by_hand(z, repeat(0.0))[-1])  # no noise: plain ascent
    torch.testing.assert_close([*MODEL.with_steps(9).trajectory(z)][K], MODEL(z))


def test_noise_is_shared_along_a_row_unless_it_is_fresh():
    z1, z2 = MODEL.draw_z(6, 1).split(3)
    for u in (5, torch.randn(K, 1, *SHAPE), torch.randn(K, 3, *SHAPE)):
        torch.testing.assert_close(MODEL.interpolate(z1, z2, [1, 0], u), torch.stack([MODEL(z1, u), MODEL(z2, u)], 1))
    rows, u = MODEL.interpolate(z1, z1, [1, 0], u=5, fresh=True), torch.randn(K, 6, *SHAPE)
    torch.testing.assert_close(rows.flatten(0, 1), MODEL(z1.repeat_interleave(2, 0), u=5))
    torch.testing.assert_close(MODEL.interpolate(z1, z2, [1, 0], u, fresh=True)[:, 1], MODEL(z2, u[:, 1::2]))


Z = torch.zeros(3, *SHAPE)
MISTAKES = {
    r"channels and width must be at least 1, image_size in 5 … 1024; got 1, 4": lambda: EnergyNet(1, 4),
    r"images of shape \[B, 1, 8, 8\], got \[2, 3, 8, 8\]": lambda: MODEL.f.gradient(torch.zeros(2, 3, 8, 8)),
    r"steps \(K\) must be an integer of at least 1, got 0": lambda: Langevin(0),
    "step_size must be positive, noise at least 0, both finite; got nan": lambda: Langevin(2, float("nan")),
    "f must map 3 images to one differentiable number each, .*; got None": lambda: [*chain(print, Z, Langevin())],
    "does not depend on x": lambda: [*chain(lambda x: torch.ones(3, requires_grad=True), Z, Langevin())],
    "kernel must be like Langevin": lambda: ShortRun(MODEL.f, 20),
    r"prior must be of a class in srmcmc_lib.noise.PRIORS \(Uniform": lambda: ShortRun(MODEL.f, prior=object()),
    r"a seed \(or a torch.Generator\) must be an integer in 0 … .*, got -1": lambda: MODEL.sample(1, -1),
    r"z must have the shape \[B, 1, 8, 8\], got \[3, 1, 4, 8\]": lambda: MODEL(Z[:, :, :4]),
    "z contains NaN or infinity": lambda: MODEL(Z + float("nan")),
    r"z must be floating point, in \[-1, 1\], got torch.uint8; data.to_float": lambda: MODEL(Z.byte()),
    "u ended after 2 of K = 4 steps": lambda: MODEL(Z, iter([Z, Z])),
    "u at step 1 has a NaN": lambda: MODEL(Z, [Z, Z / 0, Z, Z]),
    r"u at step 0 has the shape \(2, 1, 8, 8\)": lambda: MODEL(Z, [Z[:2]] * 4),
    r"rhos must be one or more numbers in 0 … 1, got \[1.1": lambda: MODEL.interpolate(Z, Z, [1.1]),
    "fresh noise needs u": lambda: MODEL.interpolate(Z, Z, [1.0], fresh=True),
    "leave each image at least one": lambda: MODEL.reconstruct(Z, mask=torch.zeros(8, 8)),
    "ran away within K = 9 steps": lambda: ShortRun(MODEL.f, Langevin(9, noise=1e38)).sample(2, 0),
    "ran away within K = 7 steps": lambda: ShortRun(MODEL.f, Langevin(7, 1e9)).sample(2, 0),  # finite, and no images
    "x reaches 99, images lie in": lambda: MODEL.reconstruct(Z + 99),
    "left the finite numbers at every iteration": lambda: ShortRun(MODEL.f, Langevin(9, 1e38)).reconstruct(Z),
}  # fmt: skip


@pytest.mark.parametrize("message", MISTAKES)
def test_mistakes_are_named(message):
    with pytest.raises((ValueError, FloatingPointError), match=message):
        MISTAKES[message]()
