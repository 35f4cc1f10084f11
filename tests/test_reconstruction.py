"""Reconstruction: what carries the error back, against plain automatic differentiation; each image its own problem."""

import math

import numpy as np
import pytest
import torch
from torch.autograd.functional import jvp, vjp

from srmcmc_lib import EnergyNet, Langevin, ShortRun
from srmcmc_lib.langevin import chain
from srmcmc_lib.reconstruction import CARRIES, adjoint, inverted, jacobian_product, residual

SHAPE, K = (1, 8, 8), 6
X = torch.rand(3, *SHAPE, generator=torch.Generator().manual_seed(3)) * 2 - 1


def tiny(activation, dtype=torch.float32) -> ShortRun:
    torch.manual_seed(7)
    f = EnergyNet(1, 8, width=2, activation=activation).to(dtype)
    for p in f.parameters():
        p.data.mul_(2 if p.ndim == 4 else 1)  # so that the chain moves
    return ShortRun(f, Langevin(K))


@pytest.mark.parametrize("activation", ["leaky_relu", "silu"])
def test_errors_are_carried_back_as_automatic_differentiation_does(activation):
    """In float64, with noise, against torch's own graph through all K steps."""
    model, (z, e, *U) = tiny(activation, torch.float64), torch.randn(K + 2, 3, *SHAPE, dtype=torch.float64)

    def M(x):
        for u in U:
            x = x + torch.autograd.grad(model.f(x).sum(), x, create_graph=True)[0] + 0.01 * u
        return x

    path, x = [], z
    for following, slope in chain(model.f, z, model.kernel, U):
        path.append((x, slope))
        x = following
    to, close = (model.f, model.kernel), dict(rtol=1e-10, atol=1e-10)
    exact, (M_z, Je) = vjp(M, z, e)[1], jvp(M, z, e)
    torch.testing.assert_close(adjoint(*to, path, e), exact, **close)
    torch.testing.assert_close(jacobian_product(*to, z, e, U), (M_z, Je), **close)
    if activation == "leaky_relu":
        torch.testing.assert_close(residual(*to, path, e), exact, **close)
    else:
        assert (residual(*to, path, e) - exact).norm() > 0.05 * e.norm()
        undone = inverted(*to, path, 1e-6 * Je)  # a small change of M(z) is carried back to the change of z
        assert (undone - 1e-6 * e).norm() < 1e-6 * (Je - e).norm() / 50


def test_a_smooth_chain_is_inverted_to_the_rounding_of_float32():
    model = tiny("silu")
    rec = model.reconstruct(X, 10, u=3)
    assert (rec.error < 1e-12).all() and (rec.errors[0] > 0.1).all()
    assert (model.reconstruct(X, 40, u=3, gradient="residual").error > 100 * rec.error).all()  # as many runs


def test_errors_are_those_of_the_papers_iteration():
    """With steps of one size, and with the defaults: η falls from 0.1 along half a cosine."""
    model, keep = tiny("leaky_relu"), np.array([0, 3])
    for options in (dict(eta=0.2, schedule="constant"), {}):
        rec, z = model.reconstruct(X, np.int64(4), seed=5, keep=keep, **options), model.draw_z(3, 5)
        for t in range(5):
            M, η = model(z), options.get("eta", 0.1 * (1 + math.cos(math.pi * t / 4)) / 2)
            torch.testing.assert_close(rec.errors[t], (M - X).square().mean(dim=(1, 2, 3)))
            if t in keep:
                torch.testing.assert_close(rec.states[t // 3], M)
            z = z - η * 2 * (M - X)


@pytest.mark.parametrize("gradient", CARRIES)
def test_the_error_falls_z_gives_x_and_each_image_is_its_own_problem(gradient):
    model, options = tiny("silu"), dict(iterations=20, gradient=gradient, u=torch.randn(K, 1, *SHAPE))
    rec = model.reconstruct(X.double().numpy(), **options)  # NumPy's arrays will do
    assert (rec.error < rec.errors[0] / 20).all() and not rec.z.requires_grad
    torch.testing.assert_close(model(rec.z, options["u"]), rec.x)
    torch.testing.assert_close((rec.x - X).square().mean(dim=(1, 2, 3)), rec.error)
    torch.testing.assert_close(model.reconstruct(X[:1], **options).x, rec.x[:1], rtol=1e-3, atol=1e-3)
    other = tiny("silu", torch.float64)  # f of another type than the chain, as a bfloat16 copy is
    torch.testing.assert_close(other.reconstruct(X, **options).x, rec.x, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("activation", ["leaky_relu", "silu"])
def test_masked_pixels_are_free(activation):
    model, mask = tiny(activation), torch.arange(64).view(8, 8) < 32
    a, b = (model.reconstruct(x, 30, mask=mask) for x in (X, torch.where(mask, X, -X)))
    torch.testing.assert_close(a.z, b.z)
    torch.testing.assert_close(a.error, (a.x - X).square()[..., :4, :].mean(dim=(1, 2, 3)))
    assert (a.error < a.errors[0] / 20).all()
    assert torch.equal(a.z[..., 4:, :], model.draw_z(3, 0)[..., 4:, :])  # "auto" is the residual: z keeps its draw


def test_an_image_that_diverges_leaves_the_others_alone():
    model, far = tiny("leaky_relu"), X.clone()
    far[1] = 1e15
    torch.testing.assert_close(model.reconstruct(far, 5).x[[0, 2]], model.reconstruct(X, 5).x[[0, 2]])
