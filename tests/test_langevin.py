"""The K-step chain: closed-form moments, the Gibbs limit, both step-size conventions, nothing left behind."""

import dataclasses
from itertools import pairwise

import pytest
import torch
from torch import nn

from srmcmc_lib import EnergyNet, Langevin, ShortRun, Uniform
from srmcmc_lib.langevin import frozen, gradient, langevin_chain

SIGMAS = 5  # Monte-Carlo errors allowed; each expectation below states its own standard error


class Quadratic(nn.Module):
    """f(x) = −½ (x − b)ᵀ A (x − b) on 1×2×2 images: every step is linear, so all moments are known."""

    channels, image_size = 1, 2
    b = torch.tensor([0.3, -0.2, 1.0, 0.0])

    def __init__(self, A: torch.Tensor):
        super().__init__()
        self.A = nn.Parameter(A)

    def forward(self, x):
        r = x.flatten(1) - self.b.to(x)
        return -0.5 * (r @ self.A.to(x) * r).sum(1)

    def moments(self, kernel: Langevin, mean0: torch.Tensor, cov0: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and covariance after K steps of x ← b + R (x − b) + ε u, where R = I − s A."""
        A, b = self.A.detach().double(), self.b.double()
        R = torch.eye(4, dtype=torch.float64) - kernel.step_size * A
        mean, cov = mean0.double(), cov0.double()
        for _ in range(kernel.steps):
            mean, cov = b + R @ (mean - b), R @ cov @ R.T + kernel.noise**2 * torch.eye(4)
        return mean, cov


ISOTROPIC = 0.8 * torch.eye(4)
CORRELATED = torch.tensor([[1.0, 0.4, 0.0, 0.2], [0.4, 0.9, 0.3, 0.0], [0.0, 0.3, 0.7, 0.1], [0.2, 0.0, 0.1, 0.5]])


def assert_moments(x: torch.Tensor, mean: torch.Tensor, cov: torch.Tensor) -> None:
    """Sample moments within SIGMAS standard errors; Gaussian tails bound those of the lighter uniform start."""
    x, n, v = x.double(), len(x), cov.diagonal()
    assert ((x.mean(0) - mean).abs() <= SIGMAS * (v / n).sqrt()).all()
    error = ((v[:, None] * v + cov**2) / n).sqrt()  # Wishart: Var ĉ_ij = (c_ii c_jj + c_ij²) / n
    assert ((x.T.cov() - cov).abs() <= SIGMAS * error).all()


def closed_form_isotropic(a, b, kernel, mean0, var0):
    """r = 1 − s a:  mean b + r^K (m − b),  variance r^2K v + ε² (1 − r^2K) / (1 − r²)."""
    r, K = 1 - kernel.step_size * a, kernel.steps
    return b + r**K * (mean0 - b), r ** (2 * K) * var0 + kernel.noise**2 * (1 - r ** (2 * K)) / (1 - r**2)


@pytest.mark.parametrize("prior", ["gaussian", "uniform"])
@pytest.mark.parametrize("A", [ISOTROPIC, CORRELATED], ids=["isotropic", "correlated"])
@pytest.mark.parametrize("kernel", [Langevin(1, 0.5, 0.3), Langevin(7, 0.3, 0.4), Langevin(60, 0.1, 0.2)], ids=str)
def test_chain_on_a_quadratic_has_the_closed_form_moments(kernel, A, prior):
    n, f, g = 20_000, Quadratic(A), torch.Generator().manual_seed(1)
    if prior == "gaussian":
        mean0, var0 = torch.tensor([1.0, 0.0, -2.0, 0.5]), 0.49
        z = mean0 + 0.7 * torch.randn(n, 4, generator=g)
    else:
        mean0, var0 = torch.full((4,), 0.5), 3.0**2 / 12  # U(−1, 2)
        z = Uniform(-1.0, 2.0).draw((n, 4), g)
    U = (torch.randn(z.shape, generator=g) for _ in range(kernel.steps))
    *_, last = langevin_chain(f, z, kernel, U)
    mean, cov = f.moments(kernel, mean0, var0 * torch.eye(4))
    assert_moments(last.x, mean, cov)
    if A is ISOTROPIC:  # the recursion itself against the geometric series
        m, v = closed_form_isotropic(0.8, f.b.double(), kernel, mean0.double(), var0)
        torch.testing.assert_close((mean, cov), (m, v * torch.eye(4, dtype=torch.float64)), rtol=1e-6, atol=1e-6)


def test_samples_of_the_model_have_the_closed_form_moments():
    """The same through ShortRun.sample: the random streams of 8,000 images are independent of each other and of z."""
    f, kernel = Quadratic(CORRELATED), Langevin(10, 0.3, 0.4)
    x = ShortRun(f, kernel).sample(8_000, seed=3, batch_size=4_000).flatten(1)
    assert_moments(x, *f.moments(kernel, torch.zeros(4), torch.eye(4) / 3))


def test_without_noise_the_chain_is_gradient_ascent():
    f, kernel, z = Quadratic(CORRELATED.double()), Langevin(5, 0.3, 0.4), torch.randn(3, 4, dtype=torch.float64)
    x = z
    for state in list(langevin_chain(f, z, kernel))[1:]:
        x = x - 0.3 * (x - f.b.double()) @ CORRELATED.double()
        torch.testing.assert_close(state.x, x)
    zero_noise = dataclasses.replace(kernel, noise=0.0)
    *_, last = langevin_chain(f, z, zero_noise, torch.randn(5, 3, 4, dtype=torch.float64))
    assert torch.equal(last.x, state.x)


def double_well(x):
    """Wells of unequal depth at about ±1, one unit of f deep; x is [B, 1]."""
    return (-((x**2 - 1) ** 2) + 0.2 * x)[:, 0]


def bin_probabilities(temperature: float, edges: torch.Tensor) -> torch.Tensor:
    """∫ exp(f/T) over each bin by the midpoint rule on a fine grid; the outer bins take the tails."""
    grid = torch.arange(-4, 4, 1e-4, dtype=torch.float64) + 5e-5
    density = (double_well(grid[:, None]) / temperature).exp()
    mass = torch.zeros(len(edges) + 1, dtype=torch.float64).index_add_(0, torch.bucketize(grid, edges), density)
    return mass / mass.sum()


def test_long_chain_reaches_the_gibbs_law_of_a_double_well():
    """20,000 chains from U(−2, 2), total time K Δτ = 15 (five relaxation times), against exp f in 16 bins.

    Δτ = 0.005 biases the density by O(f'' Δτ / 4) ≈ 1 %, which adds N Σ p δ² ≈ 2 to a χ² of 15 ± 5.5: below the
    Monte-Carlo error. The same statistic finds a temperature wrong by a fifth.
    """
    n, g = 20_000, torch.Generator().manual_seed(0)
    kernel = Langevin.from_delta_tau(steps=3_000, delta_tau=0.005, temperature=1.0)
    z = 4 * torch.rand(n, 1, generator=g) - 2
    for state in langevin_chain(double_well, z, kernel, (torch.randn(n, 1, generator=g) for _ in range(3_000))):
        pass
    edges = torch.linspace(-1.6, 1.6, 15, dtype=torch.float64)
    counts = torch.bincount(torch.bucketize(state.x[:, 0].double(), edges), minlength=16)

    def chi2(temperature):
        expected = n * bin_probabilities(temperature, edges)
        return ((counts - expected) ** 2 / expected).sum().item()

    quantile_999 = 37.7  # of χ² with 15 degrees of freedom
    assert chi2(1.0) < quantile_999
    assert chi2(0.8) > 3 * quantile_999
    assert chi2(1.25) > 3 * quantile_999


def test_the_authors_constants_are_a_small_temperature():
    kernel = Langevin(steps=100, step_size=1.0, noise=0.01)
    assert kernel == Langevin()  # the defaults
    assert kernel.temperature == pytest.approx(5e-5, rel=1e-12)
    assert kernel.delta_tau == pytest.approx(1e-4, rel=1e-12)
    back = Langevin.from_delta_tau(100, 1e-4, 5e-5)
    assert dataclasses.astuple(back) == pytest.approx((100, 1.0, 0.01), rel=1e-12)


@pytest.mark.parametrize("delta_tau", [1e-4, 0.02, 1.5])
@pytest.mark.parametrize("temperature", [5e-5, 1.0, 7.0])
def test_both_conventions_describe_one_update(delta_tau, temperature):
    """s f' + ε u = Δτ/2 · f'/T + √Δτ u, and the way back gives Δτ and T again."""
    kernel = Langevin.from_delta_tau(9, delta_tau, temperature)
    assert (kernel.steps, kernel.delta_tau, kernel.temperature) == pytest.approx((9, delta_tau, temperature))
    f, x, u = Quadratic(CORRELATED.double()), torch.randn(2, 4).double(), torch.randn(1, 2, 4).double()
    _, first = langevin_chain(f, x, dataclasses.replace(kernel, steps=1), u)
    force = -(x - f.b.double()) @ CORRELATED.double()
    torch.testing.assert_close(first.x, x + delta_tau / 2 * force / temperature + delta_tau**0.5 * u[0])
    torch.testing.assert_close(first.gradient, force)


def test_constants_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Langevin().steps = 5


@pytest.mark.parametrize("steps", [0, -1, 2.0, True, "3", None])
def test_bad_number_of_steps_is_refused(steps):
    with pytest.raises(ValueError, match=r"steps \(K\) must be an integer of at least 1"):
        Langevin(steps)


@pytest.mark.parametrize("bad", [0.0, -1.0, float("inf"), float("nan")])
def test_bad_step_sizes_and_temperatures_are_refused(bad):
    with pytest.raises(ValueError, match="step_size must be positive and finite"):
        Langevin(step_size=bad)
    with pytest.raises(ValueError):
        Langevin.from_delta_tau(10, bad)
    with pytest.raises(ValueError):
        Langevin.from_delta_tau(10, 0.1, bad)
    if bad:  # no noise is allowed: gradient ascent
        with pytest.raises(ValueError, match="noise must be at least 0 and finite"):
            Langevin(noise=bad)


def test_chain_yields_the_start_and_each_step_and_leaves_the_start_unchanged():
    f, z = EnergyNet(1, 8, width=2), torch.randn(2, 1, 8, 8)
    before = z.clone()
    states = list(langevin_chain(f, z, Langevin(4)))
    assert len(states) == 5
    assert torch.equal(states[0].x, before) and states[0].gradient is None
    assert torch.equal(z, before) and not z.requires_grad
    for a, b in pairwise(states):
        torch.testing.assert_close(b.gradient, gradient(f, a.x))
        torch.testing.assert_close(b.x, a.x + b.gradient)


@pytest.mark.parametrize("outer", [torch.enable_grad, torch.no_grad])
def test_no_graph_survives(outer):
    f, z = EnergyNet(1, 8, width=2), torch.randn(2, 1, 8, 8, requires_grad=True)
    with outer():
        for state in langevin_chain(f, 2 * z, Langevin(3), torch.randn(3, 2, 1, 8, 8)):
            for tensor in state:
                assert tensor is None or (tensor.grad_fn is None and not tensor.requires_grad)
    assert z.grad is None
    assert all(p.grad is None for p in f.parameters())


def flags(f):
    return [p.requires_grad for p in f.parameters()]


def test_parameters_are_frozen_only_while_a_step_is_computed():
    f = EnergyNet(1, 8, width=2)
    first = next(f.parameters()).requires_grad_(False)  # frozen by the user: to stay so
    as_found, seen = [False] + [True] * (len(flags(f)) - 1), []
    f.register_forward_pre_hook(lambda *_: seen.append(flags(f)))
    chain = langevin_chain(f, torch.randn(2, 1, 8, 8), Langevin(3))
    for k, _ in enumerate(chain):
        assert flags(f) == as_found, f"at yield {k}"
        if k == 2:
            break  # a consumer may stop early …
    chain.close()
    assert flags(f) == as_found
    assert seen == [[False] * len(as_found)] * 2
    f(torch.randn(2, 1, 8, 8)).sum().backward()  # … and train at once
    assert first.grad is None and all(p.grad is not None for p in list(f.parameters())[1:])


def test_parameters_are_restored_after_an_exception():
    f = EnergyNet(1, 8, width=2)
    list(f.parameters())[2].requires_grad_(False)
    as_found = flags(f)
    with pytest.raises(RuntimeError, match="boom"), frozen(f):
        assert not any(flags(f))
        raise RuntimeError("boom")
    assert flags(f) == as_found
    with pytest.raises(ValueError, match="images of shape"):  # raised by f, inside the chain
        list(langevin_chain(f, torch.randn(2, 3, 8, 8), Langevin(3)))
    assert flags(f) == as_found


@pytest.mark.parametrize(
    "f",
    [lambda x: x.sum(), lambda x: x.flatten(1).sum(1, keepdim=True), lambda x: x],
    ids=["scalar", "column", "image"],
)
def test_an_f_that_is_not_one_number_an_image_is_refused(f):
    with pytest.raises(ValueError, match="f must map"):
        list(langevin_chain(f, torch.randn(4, 1, 3, 3), Langevin(1)))


def test_noise_that_ends_before_the_chain_is_refused():
    with pytest.raises(ValueError, match="u ended after 2 of K = 3 steps"):
        list(langevin_chain(double_well, torch.zeros(4, 1), Langevin(3), [torch.zeros(4, 1)] * 2))
