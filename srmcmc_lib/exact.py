"""MLE, short-run MME and Algorithm 1 in a grid world: solved to machine precision, and learned.

The world and its constants are in grid.py.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from scipy.optimize import root
from scipy.special import rel_entr

from .grid import GridWorld, bumps_world, check_integer, check_law, line_world, plane_world

__all__ = [
    "GridWorld", "Learning", "Match", "NoMatch", "bumps_world", "kl", "learn", "line_world", "plane_world", "solve_mle",
    "solve_mme", "total_variation",
]  # fmt: skip


class Match(NamedTuple):
    """A θ and its law: p_θ for the MLE (steps None), q_θ for the MME, and ‖E_law[h] − E_data[h]‖."""

    theta: np.ndarray
    law: np.ndarray
    residual: float
    steps: int | None = None


class NoMatch(ArithmeticError):
    """No θ was found whose short-run chain has the data's moments; `best` is the nearest Match."""

    def __init__(self, best: Match):
        self.best = best
        chain = "" if best.steps is None else f" at K = {best.steps}"
        super().__init__(f"no θ matches these moments{chain}: the smallest residual found is {best.residual:.3g}")


TOLERANCE = 1e-10  # a moment error above this is no match


def solve_mle(world: GridWorld) -> Match:
    """The MLE, E_{p_θ}[h] = E_data[h], to machine precision; its Jacobian is the covariance of h under p_θ.

    Raises:
        NoMatch: the moments are out of p_θ's reach.
    """

    def law_and_jacobian(θ):
        p = world.p(θ)
        return p, (world.h * p[:, None]).T @ (world.h - p @ world.h)

    return _solve(world, world.p, law_and_jacobian, [np.zeros(world.h.shape[1])], None)


def solve_mme(world: GridWorld, steps: int, start=None) -> Match:
    """The short-run MME, E_{q_θ}[h] = E_data[h] with q_θ = p_0 M_θ^K, to machine precision.

    Levenberg and Marquardt's method with the exact Jacobian E[h ∂q/∂θ]. The equations aren't convex: neither is the
    solution known to be the only one, nor is a failure a proof.

    Args:
        world: the grid world.
        steps: K ≥ 1.
        start: θ to start from, e.g. the solution for a neighbouring K; tried before θ_MLE, 2 θ_MLE and 4 θ_MLE
            (short chains need steeper energies).

    Raises:
        NoMatch: no start led to a θ with these moments.
    """

    def law_and_jacobian(θ):
        q, dq = world.q_and_tangent(θ, steps)
        return q, world.h.T @ dq

    check_integer("steps (K)", steps)
    θ_mle = solve_mle(world).theta
    given = [] if start is None else [world._θ(start)]
    starts = [*given, θ_mle, 2 * θ_mle, 4 * θ_mle]
    return _solve(world, lambda θ: world.q(θ, steps), law_and_jacobian, starts, steps)


def _solve(world: GridWorld, law, law_and_jacobian, starts, steps) -> Match:
    """The best of Levenberg and Marquardt's runs from `starts`, the first below TOLERANCE if there is one."""

    def error_and_jacobian(θ):
        q, jacobian = law_and_jacobian(θ)
        return q @ world.h - world.data_moments, jacobian

    best, options = None, {"xtol": 1e-10, "ftol": 1e-13, "maxiter": 100}
    for start in starts:
        found = root(error_and_jacobian, start, jac=True, method="lm", options=options)
        residual = float(np.linalg.norm(found.fun))
        if best is None or residual < best.residual:
            best = Match(found.x, law(found.x), residual, steps)
        if residual <= TOLERANCE:
            return best
    raise NoMatch(best)


def kl(p, q) -> float:
    """KL(p‖q) = Σ p log(p/q) in nats; infinite where q = 0 < p."""
    p, q = check_law(p, None, "p"), check_law(q, len(p), "q")
    return float(rel_entr(p, q).sum())


def total_variation(p, q) -> float:
    """½ Σ |p − q|, from 0 to 1."""
    p, q = check_law(p, None, "p"), check_law(q, len(p), "q")
    return float(np.abs(p - q).sum() / 2)


class Learning(NamedTuple):
    """θ after `step` updates, the weighted average of all θ so far, and the Δ(θ) of the last update (None at 0)."""

    step: int
    theta: np.ndarray
    mean: np.ndarray
    delta: np.ndarray | None


def learn(
    world: GridWorld, steps: int, updates: int, rate: float, decay: float = np.inf, batch: int | None = None,
    seed: int = 0,
) -> Iterator[Learning]:  # fmt: skip
    """Algorithm 1 with plain steps, θ ← θ + η_t Δ(θ), η_t = rate / (1 + t/decay)^⅔: yields `updates` + 1 records.

    Δ(θ) is eq. (6). The average weighs θ_t by about t³, so that it forgets the start (Shamir and Zhang 2013).

    Args:
        world: the grid world.
        steps: K ≥ 1.
        updates: how many.
        rate: η_0 > 0.
        decay: the update at which η starts to fall; infinite keeps it constant.
        batch: m observed examples, and m chains of M_θ from p_0; None takes both expectations exactly.
        seed: of the examples and the chains.
    """
    check_integer("steps (K)", steps)
    check_integer("updates", updates, 0)
    if batch is not None:
        check_integer("batch", batch)
    if not 0 < rate < float("inf") or not decay > 0:
        raise ValueError("rate and decay must be positive")
    rng = np.random.default_rng(seed)
    θ = mean = np.zeros(world.h.shape[1])
    yield Learning(0, θ, mean, None)
    for t in range(updates):
        if batch is None:
            Δ = world.data_moments - world.q(θ, steps) @ world.h
        else:
            *_, x_minus = world.chains(θ, steps, batch, rng)
            x_plus = rng.choice(len(world.x), batch, p=world.p_data)
            Δ = world.h[x_plus].mean(0) - world.h[x_minus].mean(0)
        θ = θ + rate / (1 + t / decay) ** (2 / 3) * Δ
        mean = mean + 4 / (t + 4) * (θ - mean)
        yield Learning(t + 1, θ, mean, Δ)
