"""The MLE and the short-run MME in a grid world, solved to machine precision, and distances of distributions."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from scipy.optimize import root
from scipy.special import rel_entr

from .grid import GridWorld, probabilities
from .langevin import integer

TOLERANCE = 1e-10  # a moment error above this is no solution


class Solution(NamedTuple):
    """θ, its distribution (p_θ for the MLE, q_θ for the MME), ‖E[h] − E_data[h]‖ under it, and K (None for the MLE)."""

    theta: np.ndarray
    distribution: np.ndarray
    residual: float
    steps: int | None = None


class NoMatch(ArithmeticError):
    """No θ was found with the data's moments; `best` is the nearest Solution."""

    def __init__(self, best: Solution):
        self.best = best
        chain = "" if best.steps is None else f" at K = {best.steps}"
        super().__init__(f"no θ matches these moments{chain}: the smallest residual found is {best.residual:.3g}")


def solve_mle(world: GridWorld) -> Solution:
    """The MLE, E_{p_θ}[h] = E_data[h]; the Jacobian is the covariance of h under p_θ. Raises NoMatch."""

    def model(θ):
        p = world.p(θ)
        return p, (world.h * p[:, None]).T @ (world.h - p @ world.h)

    return _solve(world, model, [np.zeros(world.h.shape[1])], None)


def solve_mme(world: GridWorld, steps: int, start=None) -> Solution:
    """The short-run MME, E_{q_θ}[h] = E_data[h] with q_θ = p_0 P_θ^K; the Jacobian is E[h ∂q/∂θ], exact.

    The problem is not convex: there may be other solutions, and a failure (NoMatch) does not prove that there is none.
    Tried are `start`, such as θ of a neighbouring K, then θ_MLE, 2 θ_MLE, 4 θ_MLE (short chains need a steeper energy).
    """

    def model(θ):
        q, dq = world.q_and_tangent(θ, steps)
        return q, world.h.T @ dq

    steps, θ_mle = integer("steps (K)", steps), solve_mle(world).theta
    return _solve(world, model, [*([] if start is None else [start]), θ_mle, 2 * θ_mle, 4 * θ_mle], steps)


def _solve(world: GridWorld, model: Callable, starts: list, steps: int | None) -> Solution:
    """The first run of Levenberg-Marquardt that ends below TOLERANCE; model(θ) gives a distribution and ∂E[h]/∂θ."""

    def error_and_jacobian(θ):
        q, jacobian = model(θ)
        return q @ world.h - world.data_moments, jacobian

    best, options = None, {"xtol": 1e-10, "ftol": 1e-13, "maxiter": 100}
    for start in starts:
        found = root(error_and_jacobian, start, jac=True, method="lm", options=options)
        residual = float(np.linalg.norm(found.fun))
        if best is None or residual < best.residual:
            best = Solution(found.x, model(found.x)[0], residual, steps)
        if residual <= TOLERANCE:
            return best
    raise NoMatch(best)


def kl(p, q) -> float:
    """KL(p‖q) = Σ p log(p/q) in nats; infinite where q = 0 < p."""
    return float(rel_entr(probabilities("p", p), probabilities("q", q, len(p))).sum())


def total_variation(p, q) -> float:
    """½ Σ |p − q|, from 0 to 1."""
    return float(np.abs(probabilities("p", p) - probabilities("q", q, len(p))).sum() / 2)
