"""The K-step chain: closed-form moments, the Gibbs limit, both step-size conventions, a kernel of one's own."""

from dataclasses import asdict, astuple, dataclass, replace

import numpy as np
import pytest
import torch
from torch import nn

from srmcmc_lib import Langevin, ShortRun
from srmcmc_lib.langevin import chain

CORRELATED = torch.tensor([[1.0, 0.4, 0.0, 0.2], [0.4, 0.9, 0.3, 0.0], [0.0, 0.3, 0.7, 0.1], [0.2, 0.0, 0.1, 0.5]])


@dataclass(frozen=True)
class Preconditioned:
    """A kernel of one's own, no Langevin: x + s D f' + ε √D U, D diagonal."""

    steps: int
    step_size: float
    noise: float
    D = torch.tensor([0.5, 1.0, 1.5, 2.0])

    def step(self, x, gradient, u):
        D = self.D.view_as(x[0])
        return x + self.step_size * D * gradient + self.noise * D.sqrt() * u


class Quadratic(nn.Module):
    """f(x) = −½ (x − b)ᵀ A (x − b) on 1×2×2 images: every step is linear, so all moments are known."""

    channels, image_size, b = 1, 2, torch.tensor([0.3, -0.2, 1.0, 0.0])

    def __init__(self):
        super().__init__()
        self.A = nn.Parameter(CORRELATED)

    def forward(self, x):
        return -0.5 * ((x.flatten(1) - self.b) @ self.A * (x.flatten(1) - self.b)).sum(1)


def assert_moments(x, kernel, mean, variance):
    """Mean and covariance after K steps of x ← b + (I − s D A)(x − b) + ε √D u, within five standard errors."""
    D, b = getattr(kernel, "D", torch.ones(4)).diag(), Quadratic.b
    mean, cov = torch.tensor(mean), variance * torch.eye(4)
    R = torch.eye(4) - kernel.step_size * D @ CORRELATED
    for _ in range(kernel.steps):
        mean, cov = b + R @ (mean - b), R @ cov @ R.T + kernel.noise**2 * D
    x, n, v = x.flatten(1), len(x), cov.diagonal()
    assert ((x.mean(0) - mean).abs() <= 5 * (v / n).sqrt()).all()
    assert ((x.T.cov() - cov).abs() <= 5 * ((v[:, None] * v + cov**2) / n).sqrt()).all()  # Wishart's variance


@pytest.mark.parametrize("kernel", [Langevin(1, 0.5, 0.3), Langevin(60, 0.1, 0.2), Preconditioned(10, 0.3, 0.4)])
def test_the_chain_on_a_quadratic_has_the_closed_form_moments(kernel):
    """Then through ShortRun.sample: the random streams of images are independent of each other and of z."""
    f, z, g = Quadratic(), 0.5 + 3 * (torch.rand(20_000, 4, requires_grad=True) - 0.5), torch.Generator().manual_seed(1)
    pairs = list(chain(f, z, kernel, (torch.randn(z.shape, generator=g) for _ in range(kernel.steps))))
    assert_moments(pairs[-1][0], kernel, mean=0.5, variance=3**2 / 12)
    torch.testing.assert_close(pairs[0][1], (f.b - z.detach()) @ CORRELATED)  # f'(z), by automatic differentiation
    assert len(pairs) == kernel.steps and not any(t.requires_grad for pair in pairs for t in pair) and f.A.grad is None
    model = ShortRun(f, kernel)
    assert_moments(model.sample(4_000, 3, batch_size=2_000), kernel, mean=0.0, variance=1 / 3)
    assert model.with_steps(2).kernel == replace(kernel, steps=2)
    assert asdict(kernel).items() <= model.config["kernel"].items()


def double_well(x):
    """Wells of unequal depth at about ±1, one unit of f deep; x is [B, 1]."""
    return (-((x**2 - 1) ** 2) + 0.2 * x)[:, 0]


def test_a_long_chain_reaches_the_gibbs_distribution_of_a_double_well():
    """20,000 chains from U(−2, 2), total time K Δτ = 15 (five relaxation times), against exp f in 16 bins.

    Δτ = 0.005 biases the density by O(f'' Δτ / 4) ≈ 1 %, which adds N Σ p δ² ≈ 2 to a χ² of 15 ± 5.5.
    """
    n, g, kernel = 20_000, torch.Generator().manual_seed(0), Langevin.from_delta_tau(3_000, delta_tau=0.005)
    U = (torch.randn(n, 1, generator=g) for _ in range(3_000))
    for x, _ in chain(double_well, 4 * torch.rand(n, 1, generator=g) - 2, kernel, U):
        pass
    edges = torch.linspace(-1.6, 1.6, 15, dtype=torch.float64)
    counts = torch.bincount(torch.bucketize(x[:, 0].double(), edges), minlength=16)

    def chi2(temperature):
        grid = torch.arange(-4, 4, 1e-4, dtype=torch.float64) + 5e-5
        density = (double_well(grid[:, None]) / temperature).exp()
        mass = torch.zeros(16, dtype=torch.float64).index_add_(0, torch.bucketize(grid, edges), density)
        return ((counts - n * mass / mass.sum()) ** 2 / (n * mass / mass.sum())).sum().item()

    assert chi2(1.0) < 37.7  # the quantile 0.999 of χ² with 15 degrees of freedom
    assert min(chi2(0.8), chi2(1.25)) > 3 * 37.7  # a temperature wrong by a fifth is found


def test_both_conventions_describe_one_update():
    """s f' + ε u = Δτ/2 · f'/T + √Δτ u; the authors' constants, the defaults, are a small temperature."""
    x, g, u = torch.randn(3, 2, 4).double()
    for Δτ, T in ((1e-4, 5e-5), (0.02, 1.0), (1.5, 7.0)):
        kernel = Langevin.from_delta_tau(100, Δτ, T)
        assert (kernel.steps, kernel.delta_tau, kernel.temperature) == pytest.approx((100, Δτ, T))
        torch.testing.assert_close(kernel.step(x, g, u), x + Δτ / 2 * g / T + Δτ**0.5 * u)
    assert astuple(Langevin.from_delta_tau(100, 1e-4, 5e-5)) == pytest.approx(astuple(Langevin())) == (100, 1.0, 0.01)
    constants = astuple(Langevin(np.int64(3), np.float32(0.5), np.float64(0.1)))
    assert constants == (3, 0.5, 0.1) and [type(c) for c in constants] == [int, float, float]  # JSON can hold them
