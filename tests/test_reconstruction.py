"""Reconstruction: its gradients against plain automatic differentiation, and that each image is its own problem."""

import weakref

import pytest
import torch
from torch import nn

from srmcmc_lib import EnergyNet, Langevin, ShortRun, reconstruction
from srmcmc_lib.descent import OPTIMIZERS, adam, lbfgs
from srmcmc_lib.langevin import langevin_chain
from srmcmc_lib.reconstruction import chain_gradient, jacobian_product, residual_gradient, reverse_step

SHAPE = (1, 8, 8)


def tiny(activation="leaky_relu", K=6, noise=0.01, gain=1.0, dtype=torch.float32) -> ShortRun:
    torch.manual_seed(7)
    f = EnergyNet(1, 8, width=2, activation=activation).to(dtype)
    with torch.no_grad():
        for layer in f.layers:
            if isinstance(layer, nn.Conv2d):
                layer.weight.mul_(gain)
    return ShortRun(f, Langevin(K, noise=noise))


def targets(n=3, dtype=torch.float32):
    return torch.rand(n, *SHAPE, generator=torch.Generator().manual_seed(3), dtype=dtype) * 2 - 1


def plain_autograd(model, x, z, U):
    """L'(z) by torch's own graph through all K steps: no code shared with the library."""
    ε, s = model.kernel.noise, model.kernel.step_size
    z = z.clone().requires_grad_()
    state = z
    for k in range(model.kernel.steps):
        df_dx = torch.autograd.grad(model.f(state).sum(), state, create_graph=True)[0]
        state = state + s * df_dx + (ε * U[k] if U is not None else 0.0)
    return torch.autograd.grad((x - state).square().sum(), z)[0]


def problem(model, noisy):
    x = targets(dtype=torch.float64)
    z = model.draw_z(3, seed=1).double()
    U = [torch.randn(3, *SHAPE, dtype=torch.float64) for _ in range(model.kernel.steps)] if noisy else None
    return x, z, U


# ---------------------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("noisy", [False, True])
def test_closed_form_equals_autograd_through_the_chain_to_the_last_bit(noisy):
    model = tiny(gain=1.5, dtype=torch.float64)
    x, z, U = problem(model, noisy)
    M, closed = residual_gradient(model.f, model.kernel, x, z, U)
    assert (M - z).abs().max() > 0.05  # the chain does move
    assert torch.equal(closed, plain_autograd(model, x, z, U))
    assert torch.equal(closed, chain_gradient(model.f, model.kernel, x, z, U)[1])


@pytest.mark.parametrize("K", [1, 2, 3, 9, 10])
@pytest.mark.parametrize("noisy", [False, True])
def test_checkpointed_gradient_equals_plain_autograd_for_a_smooth_f(K, noisy):
    model = tiny("silu", K, gain=2.0, dtype=torch.float64)
    x, z, U = problem(model, noisy)
    M, dL_dz = chain_gradient(model.f, model.kernel, x, z, U)
    torch.testing.assert_close(M, residual_gradient(model.f, model.kernel, x, z, U)[0], rtol=0, atol=0)
    torch.testing.assert_close(dL_dz, plain_autograd(model, x, z, U), rtol=1e-12, atol=1e-12)
    assert (dL_dz - 2 * (M - x)).abs().max() > 1e-3  # the Jacobian is not I: the test would see its absence


def test_chain_gradient_equals_finite_differences():
    model = tiny("softplus", 4, gain=2.0, dtype=torch.float64)
    x, z, _ = problem(model, False)
    v = torch.randn_like(z)

    def L(h):
        *_, state = langevin_chain(model.f, z + h * v, model.kernel)
        return (x - state.x).square().sum()

    slope = (chain_gradient(model.f, model.kernel, x, z, None)[1] * v).sum()
    torch.testing.assert_close(slope, (L(1e-5) - L(-1e-5)) / 2e-5, rtol=1e-7, atol=0)


@pytest.mark.parametrize("noisy", [False, True])
def test_jacobian_product_equals_torchs_own_and_is_the_adjoint_of_the_chain_gradient(noisy):
    model = tiny("silu", 5, gain=2.0, dtype=torch.float64)
    _, z, U = problem(model, noisy)
    v, w = torch.randn_like(z), torch.randn_like(z)

    def M(z):
        for k in range(5):
            df_dx = torch.autograd.grad(model.f(z).sum(), z, create_graph=True)[0]
            z = z + df_dx + (model.kernel.noise * U[k] if U is not None else 0.0)
        return z

    M_z, Jv = jacobian_product(model.f, model.kernel, z, v, U)
    expected = torch.autograd.functional.jvp(M, z, v)
    torch.testing.assert_close((M_z, Jv), expected, rtol=1e-12, atol=1e-12)
    _, Jᵀw = chain_gradient(model.f, model.kernel, M_z - w / 2, z, U)
    torch.testing.assert_close((w * Jv).sum((1, 2, 3)), (Jᵀw * v).sum((1, 2, 3)), rtol=1e-11, atol=0)


def test_the_jacobian_of_a_piecewise_linear_chain_is_the_identity():
    model = tiny(gain=1.5)
    z, v = model.draw_z(3, 1), torch.randn(3, *SHAPE)
    assert torch.equal(jacobian_product(model.f, model.kernel, z, v)[1], v)


@pytest.mark.parametrize("noisy", [False, True])
def test_the_reversed_chain_undoes_the_jacobian(noisy):
    """A small change of x is carried back to the change of z that made it, but for what three solves leave."""
    model = tiny("silu", 5, gain=2.0, dtype=torch.float64)
    _, z, U = problem(model, noisy)
    v = torch.randn(z.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    M_z, Jv = jacobian_product(model.f, model.kernel, z, v, U)
    h = 1e-6
    M, g = reverse_step(model.f, model.kernel, M_z + h * Jv, z, U)
    assert torch.equal(M, M_z)
    assert (-g / 2 - h * v).norm() < h * (Jv - v).norm() / 50  # Jv is carried back to v, where the residual stays Jv
    assert (Jv - v).norm() > 0.1 * v.norm()


def test_a_smooth_chain_is_inverted_to_the_rounding():
    model = tiny("silu", 8, gain=2.0, dtype=torch.float64)
    x = targets(dtype=torch.float64)
    rec = model.reconstruct(x, 12, u=3)
    assert (rec.error < 1e-20).all() and (rec.errors[0] > 0.1).all()
    torch.testing.assert_close(model(rec.z, 3), x, rtol=0, atol=1e-10)
    plain = model.reconstruct(x, 48, u=3, gradient="residual")  # as many runs of the chain
    assert (plain.error > 1e6 * rec.error).all()


def test_equations_that_are_solved_give_the_preimage_itself_however_large_the_residual(monkeypatch):
    monkeypatch.setattr(reconstruction, "SOLVES", 60)
    model, x = tiny("silu", 8, gain=2.0, dtype=torch.float64), targets(dtype=torch.float64)
    rec = model.reconstruct(x, 1, u=3)
    assert (rec.errors[0] > 0.1).all() and (rec.errors[1] < 1e-25).all()


def test_where_f_is_too_curved_to_reverse_auto_goes_the_residuals_way():
    model, x = tiny("silu", 10, gain=3.5, dtype=torch.float64), targets(dtype=torch.float64)
    reverse, plain, auto = (model.reconstruct(x, 10, u=3, gradient=g) for g in ("reverse", "residual", "auto"))
    assert (reverse.error > 2 * plain.error).any()
    assert torch.equal(auto.error, reverse.error.minimum(plain.error))


def test_reversing_refuses_steps_that_are_never_whole():
    with pytest.raises(ValueError, match="'reverse' gives whole steps to x, which adam would not take: use gd"):
        tiny("silu").reconstruct(targets(), 2, gradient="reverse", optimizer="adam")


def test_the_reversed_chain_is_the_residual_where_the_gradient_does_not_change():
    model, x = ShortRun(Linear(), Langevin(5)), targets()
    z = model.draw_z(3, 1)
    (M, a), (_, b) = (step(model.f, model.kernel, x, z, None) for step in (reverse_step, residual_gradient))
    assert torch.equal(a, b) and (M - z).abs().min() > 0.4


def test_auto_reverses_smooth_chains_alone():
    x, mask = targets(), torch.ones(8, 8)
    for f, options, same in [
        ("silu", {}, "reverse"), ("silu", {"mask": mask}, "residual"), ("silu", {"optimizer": "adam"}, "residual"),
        ("leaky_relu", {}, "residual"),
    ]:  # fmt: skip
        a, b = (tiny(f, gain=1.5).reconstruct(x, 3, gradient=g, **options) for g in ("auto", same))
        assert torch.equal(a.z, b.z)


class Linear(nn.Module):
    """f(x) = <a, x>: its gradient does not even depend on x."""

    channels, image_size = 1, 8

    def __init__(self):
        super().__init__()
        self.a = nn.Parameter(torch.full(SHAPE, 0.1))

    def forward(self, x):
        return (self.a * x).flatten(1).sum(1)


def test_a_linear_f_is_solved_by_one_whole_step():
    model = ShortRun(Linear(), Langevin(5, noise=0.0))
    x = targets()
    for gradient in ("auto", "chain"):
        rec = model.reconstruct(x, 1, eta=0.5, schedule="constant", gradient=gradient)
        torch.testing.assert_close(rec.z, x - 0.5)
        torch.testing.assert_close(rec.x, x)
        assert (rec.errors[1] < 1e-12).all()


@pytest.mark.parametrize("K", [4, 16, 36])
def test_stored_states_grow_as_the_root_of_K_and_not_at_all_for_the_closed_form(K, monkeypatch):
    model = tiny("silu", K)
    alive, peak = set(), 0

    def spied(*args):
        nonlocal peak
        for state in langevin_chain(*args):
            assert not state.x.requires_grad  # a graph would hold every step's feature maps
            alive.add(id(state.x))
            weakref.finalize(state.x, alive.discard, id(state.x))
            peak = max(peak, len(alive))
            yield state

    monkeypatch.setattr("srmcmc_lib.reconstruction.langevin_chain", spied)
    chain_gradient(model.f, model.kernel, targets(), model.draw_z(3, 1), None)
    assert peak <= 2 * K**0.5 + 3  # and not K + 1
    peak = 0
    residual_gradient(model.f, model.kernel, targets(), model.draw_z(3, 1), None)
    assert peak <= 3


# --------------------------------------------------------------------------------------------------- optimizers


def test_adam_is_its_papers_algorithm():
    z = torch.rand(2, *SHAPE, dtype=torch.float64)
    step, gradients = adam(), []
    for t in range(1, 5):
        gradients.append(z**3)
        age = torch.arange(t - 1, -1, -1).view(t, 1, 1, 1, 1)
        m = ((0.1 * 0.9**age) * torch.stack(gradients)).sum(0) / (1 - 0.9**t)  # the recursion, written out
        v = ((0.001 * 0.999**age) * torch.stack(gradients) ** 2).sum(0) / (1 - 0.999**t)
        expected = z - 0.05 * m / (v.sqrt() + 1e-8)
        z = step(z, z**3, 0.05)
        torch.testing.assert_close(z, expected)


@pytest.mark.parametrize("optimizer", ["lbfgs", "anderson"])
def test_quasi_newton_steps_solve_an_ill_conditioned_quadratic(optimizer):
    scale = torch.logspace(-2, 0, 64, dtype=torch.float64).view(SHAPE)  # 40 plain steps leave most of its error
    z, plain, step = *([torch.ones(3, *SHAPE, dtype=torch.float64)] * 2), OPTIMIZERS[optimizer][0]()
    for _ in range(40):
        z, plain = step(z, 2 * scale * z, 0.5), plain - scale * plain
    assert (scale * z**2).sum() < (scale * plain**2).sum() / 20
    assert torch.equal(z[0], z[1])


def test_lbfgs_meets_the_secant_equation():
    """H y = s for the last pair, so that along a line with constant curvature the whole step ends at the minimum."""
    z = torch.randn(2, *SHAPE, dtype=torch.float64)
    step = lbfgs()
    for η in (0.1, 0.5):
        z = step(z, 5 * z, η)
    assert z.abs().max() < 1e-12


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_an_image_that_is_nan_or_done_leaves_the_others_alone(optimizer):
    z = torch.rand(3, *SHAPE)
    bad = z.clone()
    bad[1], bad[2] = float("nan"), 0.0  # the third has the gradient 0
    a, b = OPTIMIZERS[optimizer][0](), OPTIMIZERS[optimizer][0]()
    for _ in range(4):
        z, bad = a(z, z**3, 0.1), b(bad, bad**3, 0.1)
    assert torch.equal(z[0], bad[0]) and bad[2].abs().max() == 0


# ------------------------------------------------------------------------------------------------ the iteration


def test_errors_are_those_of_the_papers_iteration():
    model, x = tiny(), targets()
    rec = model.reconstruct(x, 4, eta=0.1, schedule="constant", seed=5, keep=[0, 3])
    z = model.draw_z(3, 5)
    for t in range(5):
        M = model(z)
        torch.testing.assert_close(rec.errors[t], (M - x).square().mean(dim=(1, 2, 3)))
        if t in (0, 3):
            torch.testing.assert_close(rec.states[[0, 3].index(t)], M)
        z = z - 0.1 * 2 * (M - x)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("activation", ["leaky_relu", "silu"])
def test_the_error_falls_and_z_gives_x(activation, optimizer):
    model, x = tiny(activation, gain=1.5), targets()
    rec = model.reconstruct(x, 30, optimizer=optimizer)
    assert rec.errors.shape == (31, 3) and rec.x.shape == rec.z.shape == x.shape
    assert (rec.error < rec.errors[0] / (5 if optimizer == "adam" else 20)).all()
    torch.testing.assert_close(model(rec.z), rec.x)
    torch.testing.assert_close((rec.x - x).square().mean(dim=(1, 2, 3)), rec.error)


def test_the_true_gradient_lowers_the_error_too():
    rec = tiny("silu", 5).reconstruct(targets(), 20, gradient="chain")
    assert (rec.error < rec.errors[0] / 10).all()


@pytest.mark.parametrize("activation, optimizer", [("silu", "gd"), *(("leaky_relu", name) for name in OPTIMIZERS)])
def test_no_image_depends_on_the_others(activation, optimizer):
    model, x = tiny(activation, gain=1.5), targets()
    other = x.clone()
    other[1:] = 1 - other[1:] ** 2
    a, b = (model.reconstruct(images, 6, optimizer=optimizer, restarts=2, keep=[5], u=4) for images in (x, other))
    for name in ("z", "x"):
        assert torch.equal(getattr(a, name)[0], getattr(b, name)[0])
    for name in ("errors", "states"):
        assert torch.equal(getattr(a, name)[:, 0], getattr(b, name)[:, 0])
    alone = model.reconstruct(x[:1], 6, optimizer=optimizer, restarts=2, u=4)
    torch.testing.assert_close(alone.z, a.z[:1], rtol=1e-3, atol=1e-3)


def test_an_image_that_diverges_leaves_the_others_alone():
    model, x = tiny(), targets()
    far = x.clone()
    far[1] = 1e30  # its squares overflow
    rec = model.reconstruct(x, 5)
    with pytest.raises(FloatingPointError, match="every iteration"):
        model.reconstruct(far, 5)
    far[1] = 1e15
    torch.testing.assert_close(model.reconstruct(far, 5).x[[0, 2]], rec.x[[0, 2]])


def test_each_image_keeps_its_best_restart():
    model, x = tiny(gain=1.5), targets(6)
    one = model.reconstruct(x, 3, restarts=1, keep=[3])
    rec = model.reconstruct(x, 3, restarts=4, keep=[3])
    assert (rec.error <= one.error).all() and len(rec.restart.unique()) > 1
    first = rec.restart == 0
    assert torch.equal(rec.z[first], one.z[first]) and (rec.error[~first] < one.error[~first]).all()
    torch.testing.assert_close((rec.states[0] - x).square().mean(dim=(1, 2, 3)), rec.errors[3])


@pytest.mark.parametrize("gradient", ["auto", "chain", "reverse"])
def test_masked_pixels_are_free(gradient):
    model, x = tiny("silu", gain=1.5), targets()
    mask = torch.zeros(8, 8)
    mask[:4] = 1
    other = torch.where(mask > 0, x, -x)
    a, b = (model.reconstruct(images, 30, gradient=gradient, mask=mask) for images in (x, other))
    assert torch.equal(a.z, b.z)
    seen = (a.x - x).square()[..., :4, :].mean(dim=(1, 2, 3))
    torch.testing.assert_close(a.error, seen)
    assert (a.error < a.errors[0] / 20).all()
    if gradient == "auto":  # with the Jacobian taken as I, z stays a draw of p_0 where nothing is asked of x
        assert torch.equal(a.z[..., 4:, :], model.draw_z(3, 0)[..., 4:, :])


def test_each_image_may_have_its_own_mask():
    model, x = tiny(gain=1.5), targets()
    mask = torch.ones(3, 1, 8, 8)
    mask[1, :, :4] = 0
    rec = model.reconstruct(x, 4, mask=mask, restarts=2)
    for part in ([0, 2], [1]):
        alone = model.reconstruct(x, 4, mask=mask[part[0]], restarts=2)
        torch.testing.assert_close(rec.z[part], alone.z[part], rtol=1e-4, atol=1e-4)


def test_seeds_and_noise():
    model, x = tiny(noise=0.1), targets()
    rec = model.reconstruct(x, 3, seed=1, u=2)
    assert torch.equal(model.reconstruct(x, 3, seed=1, u=2).z, rec.z)
    torch.testing.assert_close(model(rec.z, 2), rec.x)
    assert not torch.equal(model.reconstruct(x, 3, seed=9, u=2).z, rec.z)
    u = torch.randn(6, 1, *SHAPE)
    rec = model.reconstruct(x, 3, u=u, gradient="chain")
    torch.testing.assert_close(model(rec.z, u), rec.x)


def test_the_record_is_frozen_and_the_parameters_stay_trainable():
    model = tiny()
    rec = model.reconstruct(targets(), 1, gradient="chain")
    with pytest.raises(AttributeError):
        rec.z = None
    assert all(p.requires_grad and p.grad is None for p in model.f.parameters())
    assert not any(t.requires_grad for t in (rec.z, rec.x, rec.errors, rec.states))
    assert rec.states.shape == (0, 3, *SHAPE)


@pytest.mark.parametrize(
    "arguments, words",
    [
        (dict(iterations=0), "iterations must be an integer of at least 1"),
        (dict(iterations=2.0), "iterations must be an integer"),
        (dict(restarts=0), "restarts must be an integer of at least 1"),
        (dict(eta=0.0), "eta must be positive and finite"),
        (dict(eta=-0.1), "eta must be positive and finite"),
        (dict(eta=float("nan")), "eta must be positive and finite"),
        (dict(eta=float("inf")), "eta must be positive and finite"),
        (dict(schedule="linear"), "schedule='linear' is unknown; choose one of cosine"),
        (dict(optimizer="sgd"), "optimizer='sgd' is unknown; choose one of gd"),
        (dict(gradient="exact"), "gradient='exact' is unknown; choose one of auto, residual, chain"),
        (dict(keep=[3], iterations=2), "keep must list iterations in 0 … 2"),
        (dict(keep=[-1]), "keep must list iterations"),
        (dict(u=torch.zeros(2, 1, *SHAPE)), "u must hold K = 6 tensors"),
        (dict(seed=-1), "a seed is an integer"),
        (dict(x=targets()[0]), "x must have the shape"),
        (dict(x=targets()[..., :4]), "x must have the shape"),
        (dict(x=targets() * float("nan")), "x contains NaN"),
        (dict(mask=torch.ones(3, 8)), "mask must broadcast to x"),
        (dict(mask=torch.ones(1, 3, 1, 8, 8)), "mask must broadcast to x"),
        (dict(mask=torch.full((8, 8), 0.5)), "mask must hold 1 where a pixel counts and 0"),
        (dict(mask=torch.zeros(8, 8)), "leave each image at least one"),
        (dict(x=targets().byte()), "x must hold floating-point images"),
    ],
)
def test_bad_input_is_named(arguments, words):
    with pytest.raises(ValueError, match=words):
        tiny().reconstruct(**(dict(x=targets()) | arguments))
