"""The grid world and its solvers, against what must hold exactly and against independent computations."""

from dataclasses import replace

import numpy as np
import pytest

from srmcmc_lib.exact import NoMatch, kl, solve_mle, solve_mme, total_variation
from srmcmc_lib.grid import line_world, plane_world

θ = np.array([1.0, 2.0, -0.5])  # an arbitrary one
WORLDS = pytest.mark.parametrize("world", [line_world(), plane_world(16, delta_tau=0.1)], ids=["line", "plane"])
BOTH = pytest.mark.parametrize("adjusted", [True, False])


once = pytest.fixture(scope="module")
line, mle, mme_20 = once(line_world), once(lambda line: solve_mle(line)), once(lambda line: solve_mme(line, 20))


def test_proposal_is_equation_4(line):
    """Entry by entry, with no cut-off, and f' from finite differences of f."""
    x, centres, e = line.x[:, 0], np.array([-1.7, 0.0, 1.7]), 1e-5
    f = [np.exp(-((x[:, None] + s - centres) ** 2) / (2 * 0.7**2)) @ θ for s in (-e, e)]
    Q = np.exp(-((x - (x + 0.02 / 2 * (f[1] - f[0]) / (2 * e))[:, None]) ** 2) / (2 * 0.02))
    Q /= Q.sum(axis=1, keepdims=True)
    for reach in (8.0, 100.0):
        P = replace(line, adjusted=False, reach=reach).kernel(θ).toarray()
        np.testing.assert_allclose(P, Q, rtol=0, atol=1e-10)


@WORLDS
def test_rows_sum_to_1_and_detailed_balance(world):
    θ = np.linspace(-1, 2, world.h.shape[1])
    p, P, Q = world.p(θ), world.kernel(θ).toarray(), replace(world, adjusted=False).kernel(θ).toarray()
    assert min(P.min(), Q.min()) >= 0
    np.testing.assert_allclose(np.r_[P, Q].sum(axis=1), 1, rtol=0, atol=1e-13)
    flow = p[:, None] * P
    np.testing.assert_allclose(flow, flow.T, rtol=0, atol=1e-16)
    np.testing.assert_allclose(p @ P, p, rtol=0, atol=1e-15)


def test_distributions_are_matrix_powers_and_approach_gibbs(line):
    P = line.kernel(θ).toarray()
    np.testing.assert_allclose(line.q(θ, 30), line.p_0 @ np.linalg.matrix_power(P, 30), rtol=0, atol=1e-14)
    path = list(line.evolve(θ, 4000))
    assert len(path) == 4001 and path[0] is line.p_0
    np.testing.assert_allclose(path[30], line.q(θ, 30), rtol=0, atol=1e-15)
    divergence = [kl(q, line.p(θ)) for q in path]
    assert np.diff(divergence).max() < 1e-13 and divergence[-1] < 1e-9  # KL to the stationary p_θ never rises


def stationary(world, θ) -> np.ndarray:
    """π with π P_θ = π."""
    A = world.kernel(θ).T.toarray() - np.eye(len(world.x))
    A[-1] = 1  # one equation is redundant: probabilities sum to 1 instead
    return np.linalg.solve(A, np.eye(len(A))[-1])


def test_unadjusted_bias_is_of_order_delta_tau(line, mle):
    """At θ_MLE, where p_θ is small at the ends of the grid: cutting the proposal off there costs order √Δτ."""
    bias = []
    for delta_tau in (0.08, 0.04, 0.02, 0.01):
        world = replace(line, delta_tau=delta_tau)
        assert total_variation(stationary(world, mle.theta), mle.distribution) < 1e-10
        bias.append(total_variation(stationary(replace(world, adjusted=False), mle.theta), mle.distribution))
    ratios = np.array(bias[:-1]) / bias[1:]
    assert bias[0] > 0.01 and ((ratios > 1.7) & (ratios < 2.3)).all(), bias


@BOTH
@WORLDS
def test_tangent_is_the_derivative(world, adjusted):
    world, e = replace(world, adjusted=adjusted), 1e-6
    θ = np.linspace(-1, 2, world.h.shape[1])
    q, dq = world.q_and_tangent(θ, 25)
    np.testing.assert_allclose(q, world.q(θ, 25), rtol=0, atol=1e-14)
    differences = [(world.q(θ + v, 25) - world.q(θ - v, 25)) / (2 * e) for v in e * np.eye(len(θ))]
    np.testing.assert_allclose(np.transpose(differences), dq, rtol=0, atol=2e-7 * abs(dq).max())


def test_mle_matches_the_moments_and_is_the_maximum(line, mle):
    np.testing.assert_allclose(line.p(mle.theta) @ line.h, line.data_moments, rtol=0, atol=1e-10)
    likelihood = [line.p_data @ np.log(line.p(mle.theta + v)) for v in 0.01 * np.vstack([np.eye(3), -np.eye(3)])]
    assert max(likelihood) < line.p_data @ np.log(mle.distribution)


def test_mme_matches_the_moments_and_approaches_the_mle(line, mle):
    """Fact 2 of paper.md has 0.177, 0.052, 0.016, 0.0010, 0.0000; its world's constants were not recorded."""
    ours = {20: 0.1782, 50: 0.0528, 100: 0.0140, 300: 0.0010, 1000: 0.0000}
    divergence = {}
    for K in ours:
        mme = solve_mme(line, np.int64(K))
        np.testing.assert_allclose(mme.distribution, line.q(mme.theta, K), rtol=0, atol=1e-13)
        np.testing.assert_allclose(line.q(mme.theta, K) @ line.h, line.data_moments, rtol=0, atol=1e-10)
        assert mme.steps == K and mme.residual <= 1e-10
        divergence[K] = kl(mme.distribution, mle.distribution)
    assert divergence == pytest.approx(ours, abs=1e-4)
    assert (np.diff(list(divergence.values())) < 0).all()


@pytest.mark.parametrize("K, residual", [(5, 0.0643), (10, 0.0089)])
def test_short_chains_match_nothing(line, K, residual):
    with pytest.raises(NoMatch, match=f"no θ matches these moments at K = {K}: the smallest residual found is") as info:
        solve_mme(line, K)
    best = info.value.best
    assert best.residual == pytest.approx(residual, abs=2e-4) and best.steps == K
    assert np.linalg.norm(best.distribution @ line.h - line.data_moments) == pytest.approx(best.residual, abs=1e-12)


@BOTH
def test_samples_have_the_exact_distribution(line, adjusted):
    world, m = replace(line, adjusted=adjusted), 40_000
    x = world.sample(θ, 10, m, np.random.default_rng(0))
    bins = np.arange(len(line.x)) // 10
    expected = np.bincount(bins, world.q(θ, 10))
    z = (np.bincount(bins[x]) / m - expected) / np.sqrt(expected * (1 - expected) / m)
    assert abs(z).max() < 4.5 and abs((z**2).mean() - 1) < 1


def test_pythagoras(line, mle, mme_20):
    """KL(q‖p_θ) = KL(q‖p_MLE) + KL(p_MLE‖p_θ) for every q in Ω: the data, the MME, and a mixture of the two."""
    p = mle.distribution
    for q in (line.p_data, mme_20.distribution, 0.3 * line.p_data + 0.7 * mme_20.distribution):
        for other in (line.p(θ), line.p_0, line.p(mme_20.theta)):
            assert kl(q, other) == pytest.approx(kl(q, p) + kl(p, other), abs=1e-12)
    outside = line.q(mle.theta, 20)
    assert abs(kl(outside, line.p(θ)) - kl(outside, p) - kl(p, line.p(θ))) > 1e-3


def test_kl_and_total_variation():
    assert kl([0.5, 0.5, 0.0], [0.25, 0.5, 0.25]) == pytest.approx(0.5 * np.log(2))
    assert kl([0.5, 0.5], [1.0, 0.0]) == np.inf
    assert kl([0.5, 0.5, 0.0], [0.5, 0.5 + 1e-16, -1e-16]) == pytest.approx(0, abs=1e-12)  # rounding
    assert total_variation([0.5, 0.5, 0.0], [0.25, 0.5, 0.25]) == pytest.approx(0.25)


def test_bad_inputs(line):
    for bad, message in (
        (dict(delta_tau=0.0), "delta_tau and reach must be positive"),
        (dict(p_0=line.p_0[:-1]), "p_0 must be a vector of 241"),
        (dict(p_data=2 * line.p_data), "p_data must be .* that sum to 1"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(line, **bad)
