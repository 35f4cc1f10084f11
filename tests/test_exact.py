"""The grid world, against what must hold exactly and against independent computations of the same thing."""

from dataclasses import replace
from itertools import islice

import numpy as np
import pytest

from srmcmc_lib.exact import (
    NoMatch,
    bumps_world,
    kl,
    learn,
    line_world,
    plane_world,
    solve_mle,
    solve_mme,
    total_variation,
)

θ = np.array([1.0, 2.0, -0.5])  # an arbitrary one


@pytest.fixture(scope="module")
def line():
    return line_world()


@pytest.fixture(scope="module")
def mle(line):
    return solve_mle(line)


@pytest.fixture(scope="module")
def mme_20(line):
    return solve_mme(line, 20)


@pytest.mark.parametrize("adjusted", [True, False])
@pytest.mark.parametrize("world", [line_world(61), plane_world(16, delta_tau=0.1)], ids=["line", "plane"])
def test_kernel_is_a_stochastic_matrix(world, adjusted):
    M = replace(world, adjusted=adjusted).kernel(np.linspace(-1, 2, world.h.shape[1])).toarray()
    assert M.min() >= 0
    np.testing.assert_allclose(M.sum(axis=1), 1, rtol=0, atol=1e-14)


def test_proposal_is_equation_4(line):
    """Entry by entry, with no cut-off and f' from finite differences of log p_θ on a far finer step."""
    world = replace(line, adjusted=False, reach=100.0)
    x, centres = line.x[:, 0], np.array([-1.7, 0.0, 1.7])
    e = 1e-5
    f = [np.exp(-((x[:, None] + s - centres) ** 2) / (2 * 0.7**2)) @ θ for s in (-e, e)]
    Q = np.exp(-((x - (x + 0.02 / 2 * (f[1] - f[0]) / (2 * e))[:, None]) ** 2) / (2 * 0.02))
    Q /= Q.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(world.kernel(θ).toarray(), Q, rtol=0, atol=1e-10)
    np.testing.assert_allclose(replace(line, adjusted=False).kernel(θ).toarray(), Q, rtol=0, atol=1e-10)


@pytest.mark.parametrize("world", [line_world(), plane_world(16, delta_tau=0.1)], ids=["line", "plane"])
def test_detailed_balance(world):
    θ = np.linspace(-1, 2, world.h.shape[1])
    p, M = world.p(θ), world.kernel(θ).toarray()
    flow = p[:, None] * M
    np.testing.assert_allclose(flow, flow.T, rtol=0, atol=1e-17)
    np.testing.assert_allclose(p @ M, p, rtol=0, atol=1e-16)


def test_laws_are_matrix_powers_and_reach_p(line):
    M = line.kernel(θ).toarray()
    np.testing.assert_allclose(line.q(θ, 30), line.p_0 @ np.linalg.matrix_power(M, 30), rtol=0, atol=1e-15)
    path = list(islice(line.laws(θ), 4001))  # without `steps` it never ends
    np.testing.assert_array_equal(path[0], line.p_0)
    np.testing.assert_array_equal(path[30], line.q(θ, 30))
    distance = [kl(q, line.p(θ)) for q in path]
    assert np.diff(distance).max() < 1e-14 and distance[-1] < 1e-9  # KL to the stationary law never rises


def stationary(world, θ) -> np.ndarray:
    """The law π with π M_θ = π."""
    A = world.kernel(θ).T.toarray() - np.eye(len(world.x))
    A[-1] = 1  # one equation is redundant: the total probability takes its place
    return np.linalg.solve(A, np.eye(len(A))[-1])


def test_unadjusted_bias_is_of_order_delta_tau(line, mle):
    """At θ_MLE, whose law keeps away from the ends of the grid: cutting the proposal off there costs order √Δτ."""
    θ, bias = mle.theta, []
    for delta_tau in (0.08, 0.04, 0.02, 0.01):
        world = replace(line, delta_tau=delta_tau, adjusted=False)
        bias.append(total_variation(stationary(world, θ), world.p(θ)))
        adjusted = replace(world, adjusted=True)
        assert total_variation(stationary(adjusted, θ), world.p(θ)) < 1e-11
    ratios = np.array(bias[:-1]) / bias[1:]
    assert bias[0] > 0.01 and ((ratios > 1.7) & (ratios < 2.3)).all(), bias


@pytest.mark.parametrize("adjusted", [True, False])
@pytest.mark.parametrize("world", [line_world(), plane_world(16, delta_tau=0.1)], ids=["line", "plane"])
def test_tangent_is_the_derivative(world, adjusted):
    world, d = replace(world, adjusted=adjusted), world.h.shape[1]
    θ, e = np.linspace(-1, 2, d), 1e-6
    q, dq = world.q_and_tangent(θ, 25)
    np.testing.assert_allclose(q, world.q(θ, 25), rtol=0, atol=1e-15)
    for b, v in enumerate(e * np.eye(d)):
        np.testing.assert_allclose(
            (world.q(θ + v, 25) - world.q(θ - v, 25)) / (2 * e), dq[:, b], rtol=0, atol=2e-7 * abs(dq).max()
        )


def test_mle_matches_the_moments_and_is_the_maximum(line, mle):
    np.testing.assert_allclose(mle.law @ line.h, line.data_moments, rtol=0, atol=1e-10)
    np.testing.assert_array_equal(mle.law, line.p(mle.theta))
    here = line.p_data @ np.log(mle.law)
    for v in np.vstack([np.eye(3), -np.eye(3)]):
        assert line.p_data @ np.log(line.p(mle.theta + 0.01 * v)) < here


def test_mme_matches_the_moments_and_approaches_the_mle(line, mle):
    """Our numbers, close to those in fact 2 of paper.md: 0.177, 0.052, 0.016, 0.0010, 0.0000.

    That world's constants weren't recorded; those of line_world were sought to give nearly the same.
    """
    ours = {20: 0.1782, 50: 0.0528, 100: 0.0140, 300: 0.0010, 1000: 0.0000}
    divergence = {}
    for K in ours:
        mme = solve_mme(line, K)
        np.testing.assert_array_equal(mme.law, line.q(mme.theta, K))
        np.testing.assert_allclose(line.q(mme.theta, K) @ line.h, line.data_moments, rtol=0, atol=1e-10)
        assert mme.steps == K and mme.residual <= 1e-10
        divergence[K] = kl(mme.law, mle.law)
    assert divergence == pytest.approx(ours, abs=1e-4)
    assert (np.diff(list(divergence.values())) < 0).all()


@pytest.mark.parametrize("K, residual", [(5, 0.0643), (10, 0.0089)])
def test_short_chains_match_nothing(line, K, residual):
    """Fact 2 of paper.md, in its own world: 0.067 and 0.022."""
    with pytest.raises(NoMatch, match=f"no θ matches these moments at K = {K}: the smallest residual found is") as info:
        solve_mme(line, K)
    best = info.value.best
    assert best.residual == pytest.approx(residual, abs=2e-4) and best.steps == K
    assert np.linalg.norm(best.law @ line.h - line.data_moments) == pytest.approx(best.residual, abs=1e-12)


@pytest.mark.parametrize("adjusted", [True, False])
def test_sampled_chains_have_the_exact_law(line, adjusted):
    world, m = replace(line, adjusted=adjusted), 40_000
    *_, x = world.chains(θ, 10, m, np.random.default_rng(0))
    bins = np.arange(len(line.x)) // 10
    expected = np.bincount(bins, world.q(θ, 10))
    z = (np.bincount(bins[x]) / m - expected) / np.sqrt(expected * (1 - expected) / m)
    assert abs(z).max() < 4.5 and abs((z**2).mean() - 1) < 1


def test_pythagoras(line, mle, mme_20):
    """KL(q‖p_θ) = KL(q‖p_MLE) + KL(p_MLE‖p_θ) for every q in Ω: the data, the MME, and mixtures of the two."""
    for q in (line.p_data, mme_20.law, 0.3 * line.p_data + 0.7 * mme_20.law):
        for other in (θ, np.zeros(3), mme_20.theta):
            assert kl(q, line.p(other)) == pytest.approx(kl(q, mle.law) + kl(mle.law, line.p(other)), abs=1e-13)
    outside = line.q(mle.theta, 20)
    assert abs(kl(outside, line.p(θ)) - kl(outside, mle.law) - kl(mle.law, line.p(θ))) > 1e-3


def test_kl_and_total_variation():
    assert kl([0.5, 0.5, 0.0], [0.25, 0.5, 0.25]) == pytest.approx(0.5 * np.log(2))
    assert kl([0.5, 0.5], [1.0, 0.0]) == np.inf
    assert kl([0.5, 0.5, 0.0], [0.5, 0.5 + 1e-16, -1e-16]) == pytest.approx(0, abs=1e-12)  # rounding
    assert total_variation([0.5, 0.5, 0.0], [0.25, 0.5, 0.25]) == pytest.approx(0.25)


def test_expected_learning_converges_to_the_mme(line, mme_20):
    *_, last = learn(line, 20, updates=250, rate=40.0)
    np.testing.assert_allclose(last.theta, mme_20.theta, rtol=0, atol=1e-6)
    assert last.step == 250 and abs(last.delta).max() < 1e-8


def test_stochastic_learning_lands_within_its_monte_carlo_error(line, mme_20):
    """The averaged θ has covariance J⁻¹ S J⁻ᵀ / (effective updates · m), S the variance of one term of eq. (6)."""
    m, updates = 1000, 200
    records = list(learn(line, 20, updates, rate=60.0, decay=50, batch=m, seed=1))
    assert [r.step for r in records] == list(range(updates + 1)) and records[0].delta is None
    covariance = sum(
        (line.h * p[:, None]).T @ line.h - np.outer(p @ line.h, p @ line.h) for p in (mme_20.law, line.p_data)
    )
    _, dq = line.q_and_tangent(mme_20.theta, 20)
    J = np.linalg.inv(line.h.T @ dq)
    effective = updates * 7 / 16  # Σw² of weights w_t ∝ t³
    covariance = J @ covariance @ J.T / (effective * m)
    error = records[-1].mean - mme_20.theta
    assert error @ np.linalg.solve(covariance, error) < 16.3  # χ²_3 exceeds this once in 1,000
    np.testing.assert_array_equal(records[-1].theta, list(learn(line, 20, updates, 60.0, 50, m, seed=1))[-1].theta)


def test_plane():
    world = plane_world(24, delta_tau=0.06)
    mle, mme = solve_mle(world), solve_mme(world, 100)
    for match, q in ((mle, world.p(mle.theta)), (mme, world.q(mme.theta, 100))):
        np.testing.assert_allclose(q @ world.h, world.data_moments, rtol=0, atol=1e-10)
    assert 1e-6 < kl(mme.law, mle.law) < kl(solve_mme(world, 50).law, mle.law)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda w: w.p([1.0, 2.0]), "θ must be 3 finite numbers"),
        (lambda w: w.kernel([1.0, 2.0, np.nan]), "θ must be 3 finite numbers"),
        (lambda w: w.q(θ, 0), "K.*at least 1"),
        (lambda w: w.q_and_tangent(θ, 2.5), "K.*at least 1"),
        (lambda w: solve_mme(w, True), "K.*at least 1"),
        (lambda w: solve_mme(w, 20, start=[0.0]), "θ must be 3"),
        (lambda w: replace(w, delta_tau=0.0), "delta_tau must be positive"),
        (lambda w: replace(w, reach=float("inf")), "reach must be positive and finite"),
        (lambda w: replace(w, p_0=w.p_0[:-1]), "p_0 must be a vector of 241"),
        (lambda w: replace(w, p_data=2 * w.p_data), "p_data must be probabilities"),
        (lambda w: replace(w, dh=w.dh[..., 0]), r"\[n, d, D\]"),
        (lambda w: kl(w.p_0, w.p_0[:-1]), "q must be a vector of 241"),
        (lambda w: total_variation(-w.p_0, w.p_0), "p must be probabilities"),
        (lambda w: next(learn(w, 20, 10, rate=0.0)), "rate and decay"),
        (lambda w: next(learn(w, 0, 10, rate=1.0)), "K.*at least 1"),
        (lambda w: next(learn(w, 20, 2.5, rate=1.0)), "updates must be an integer of at least 0"),
        (lambda w: next(learn(w, 20, 10, rate=1.0, batch=0)), "batch must be an integer of at least 1"),
        (lambda w: bumps_world(9, [0.0], 1.0, [[0.0]], [1.0], [1.0]), "centres, means, stds and weights"),
        (lambda w: bumps_world(1, [[0.0]], 1.0, [[0.0]], [1.0], [1.0]), "side must be at least 2"),
    ],
)
def test_bad_inputs(line, call, message):
    with pytest.raises(ValueError, match=message):
        call(line)
