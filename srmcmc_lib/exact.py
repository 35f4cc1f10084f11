"""The grid world: f_θ(x) = <θ, h(x)> on n points, where q_θ, the MLE and the short-run MME are computed exactly.

A law is a vector of n probabilities and the chain an n×n stochastic matrix; only `chains` and `learn` sample.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from scipy.optimize import root
from scipy.sparse import csr_array, vstack
from scipy.spatial import cKDTree
from scipy.special import rel_entr

from .checks import integer


@dataclass(frozen=True, eq=False)
class GridWorld:
    """n points in D dimensions, d features, and the Langevin kernel of eq. (4) restricted to the points.

    From x_i the proposal is eq. (4)'s Gaussian read off at the points and normalised over them,
    Q_ij ∝ exp(−|x_j − x_i − Δτ/2 f'(x_i)|² / 2Δτ). It reaches the points within `reach`·√Δτ of x_i: a fixed set, so
    that Q is smooth in θ and (i, j) is reachable whenever (j, i) is. `adjusted` accepts by Metropolis and Hastings'
    rule, with this very Q: p_θ is then stationary exactly, on the grid and after the truncation.

    Attributes:
        x: the points, [n, D].
        h: the features h(x), [n, d].
        dh: their gradients ∂h/∂x, [n, d, D].
        p_data: the data's law, [n].
        p_0: the initial law, [n].
        delta_tau: Δτ > 0. The proposal's width √Δτ should be at least the grid's spacing, or the grid shows.
        reach: where the proposal is cut off, in standard deviations √Δτ from x_i: 8 changes no digit, 5 the sixth.
        adjusted: Metropolis-adjusted; False is eq. (4) as the paper runs it.

    Raises:
        ValueError: shapes that disagree, laws that aren't laws, constants out of range.
    """

    x: np.ndarray
    h: np.ndarray
    dh: np.ndarray
    p_data: np.ndarray
    p_0: np.ndarray
    delta_tau: float = 0.02
    reach: float = 8.0
    adjusted: bool = True

    def __post_init__(self):
        x, h, dh = shapes = [np.shape(a) for a in (self.x, self.h, self.dh)]
        if len(x) != 2 or len(h) != 2 or x[0] != h[0] or dh != (*h, x[1]):
            raise ValueError(f"x, h and dh must be [n, D], [n, d] and [n, d, D]; got {', '.join(map(str, shapes))}")
        for name in ("p_data", "p_0"):
            _check_law(getattr(self, name), len(self.x), name)
        for name in ("delta_tau", "reach"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be positive and finite, got {getattr(self, name)!r}")

    @cached_property
    def data_moments(self) -> np.ndarray:
        """E_data[h], [d]."""
        return self.p_data @ self.h

    def p(self, θ) -> np.ndarray:
        """Eq. (1): p_θ = exp f_θ / Z(θ), [n]."""
        f = self.h @ self._θ(θ)
        p = np.exp(f - f.max())
        return p / p.sum()

    def kernel(self, θ) -> csr_array:
        """M_θ, one step of the chain, as a stochastic matrix [n, n]: M[i, j] is the probability of x_i → x_j."""
        return self._matrix(self._transition(self._θ(θ))[0])

    def laws(self, θ, steps: int | None = None) -> Iterator[np.ndarray]:
        """Eq. (5): yields p_0, p_0 M_θ, …, p_0 M_θ^K, each [n]; K = `steps`, or without end."""
        M_T, q, k = self.kernel(θ).T.tocsr(), self.p_0, 0
        yield q
        while k != steps:
            q, k = M_T @ q, k + 1
            yield q

    def q(self, θ, steps: int) -> np.ndarray:
        """Eq. (5): the short-run model q_θ = p_0 M_θ^K, [n]."""
        *_, q = self.laws(θ, _check_steps(steps))
        return q

    def chains(self, θ, steps: int, m: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
        """m sampled chains of M_θ from p_0: yields K + 1 states, each [m] row numbers of x."""
        M = self.kernel(θ)
        rising = np.concatenate([[0.0], np.cumsum(M.data)])  # inverts every row's distribution function in one search
        state = rng.choice(len(self.x), m, p=self.p_0)
        yield state
        for _ in range(_check_steps(steps)):
            first, last = M.indptr[state], M.indptr[state + 1] - 1
            at = np.searchsorted(rising, rising[first] + rng.random(m), side="right") - 1
            state = M.indices[np.clip(at, first, last)]
            yield state

    def q_and_tangent(self, θ, steps: int) -> tuple[np.ndarray, np.ndarray]:
        """q_θ [n] and ∂q_θ/∂θ [n, d], by the tangent recursion ∂(qM) = (∂q) M + q ∂M through all K steps.

        Exact wherever no acceptance ratio is 1: there Metropolis' rule has a kink and one side's derivative is taken.
        """
        θ, steps = self._θ(θ), _check_steps(steps)
        n, d = self.h.shape
        M, dM = self._transition(θ, tangent=True)
        M_T = self._matrix(M[self._pairs.flip])
        dM_T = vstack([self._matrix(dM_b[self._pairs.flip]) for dM_b in dM], format="csr")
        state = np.zeros((n, 1 + d))  # q and its d tangents, side by side
        state[:, 0] = self.p_0
        for _ in range(steps):
            forcing = (dM_T @ state[:, 0]).reshape(d, n).T
            state = M_T @ state
            state[:, 1:] += forcing
        return state[:, 0], state[:, 1:]

    @cached_property
    def _pairs(self) -> "_Pairs":
        n = len(self.x)
        near = cKDTree(self.x).query_pairs(self.reach * self.delta_tau**0.5, output_type="ndarray")
        pairs = np.concatenate([near, near[:, ::-1], np.arange(n)[:, None].repeat(2, axis=1)])
        i, j = pairs[np.lexsort((pairs[:, 1], pairs[:, 0]))].T.astype(np.int32)
        start = np.searchsorted(i, np.arange(n + 1)).astype(np.int32)
        return _Pairs(i, j, start, np.lexsort((i, j)), np.flatnonzero(i == j), self.x[j] - self.x[i])

    def _transition(self, θ, tangent: bool = False):
        """M_θ on the reachable pairs, [nnz], and with `tangent` ∂M/∂θ, [d, nnz]."""
        i, j, start, flip, diagonal, step = self._pairs
        rows = start[:-1]
        drift = np.einsum("ndc,d->nc", self.dh, θ) / 2
        # |step − Δτ drift|²/2Δτ without the term that is constant in a row: Q is an exponential family in the drift.
        log_Q = np.einsum("kc,kc->k", step, drift[i] - step / (2 * self.delta_tau))
        log_Q -= np.maximum.reduceat(log_Q, rows)[i]
        log_Q -= np.log(np.add.reduceat(np.exp(log_Q), rows))[i]
        M = np.exp(log_Q)
        if tangent:
            mean = np.add.reduceat(M[:, None] * step, rows)
            dlog = np.einsum("kdc,kc->dk", self.dh[i], step - mean[i]) / 2  # ∂ log Q_ij / ∂θ
        if self.adjusted:
            f = self.h @ θ
            log_ratio = f[j] - f[i] + log_Q[flip] - log_Q
            M *= np.exp(np.minimum(log_ratio, 0))
            if tangent:
                dlog = np.where(log_ratio >= 0, dlog, (self.h[j] - self.h[i]).T + dlog[:, flip])
            M[diagonal] += 1 - np.add.reduceat(M, rows)  # a rejected proposal stays where it was
        if not tangent:
            return M, None
        dM = dlog * M
        if self.adjusted:
            dM[:, diagonal] = 0
            dM[:, diagonal] = -np.add.reduceat(dM, rows, axis=1)
        return M, dM

    def _matrix(self, data) -> csr_array:
        return csr_array((data, self._pairs.j, self._pairs.start), shape=(len(self.x),) * 2)

    def _θ(self, θ) -> np.ndarray:
        θ = np.asarray(θ, dtype=float)
        if θ.shape != self.h.shape[1:] or not np.isfinite(θ).all():
            raise ValueError(f"θ must be {self.h.shape[1]} finite numbers, one a feature; got {θ!r}")
        return θ


class _Pairs(NamedTuple):
    """The nnz pairs (i, j) within reach, in row order: where rows start, where (j, i) and (i, i) stand, x_j − x_i.

    The pattern is symmetric: a transposed matrix shares it, its data permuted by `flip`.
    """

    i: np.ndarray
    j: np.ndarray
    start: np.ndarray
    flip: np.ndarray
    diagonal: np.ndarray
    step: np.ndarray


def bumps_world(side: int, centres, width: float, means, stds, weights, **constants) -> GridWorld:
    """Gaussian bumps as h, a Gaussian mixture as p_data and a uniform p_0, on side^D points of [-3, 3]^D.

    Args:
        side: points along each axis, at least 2.
        centres: of the bumps h_a(x) = exp(−|x − c_a|² / 2 width²), [d, D].
        width: of every bump.
        means, stds, weights: of the mixture's round components, [m, D], [m] and [m]; the weights needn't sum to 1.
        constants: delta_tau, reach and adjusted of GridWorld.
    """
    centres, means = np.asarray(centres, dtype=float), np.asarray(means, dtype=float)
    stds, weights = np.asarray(stds, dtype=float), np.asarray(weights, dtype=float)
    if centres.ndim != 2 or means.shape != (len(weights), centres.shape[1]) or stds.shape != weights.shape:
        raise ValueError("centres, means, stds and weights must be [d, D], [m, D], [m] and [m]")
    if side < 2 or not width > 0 or not (stds > 0).all() or not (weights >= 0).all():
        raise ValueError("side must be at least 2, width and stds positive, weights at least 0")
    D = centres.shape[1]
    x = np.stack(np.meshgrid(*[np.linspace(-3, 3, side)] * D, indexing="ij"), axis=-1).reshape(-1, D)
    from_centre = x[:, None] - centres
    h = np.exp(-(from_centre**2).sum(-1) / (2 * width**2))
    p_data = np.exp(-((x[:, None] - means) ** 2).sum(-1) / (2 * stds**2)) @ (weights / stds**D)
    p_0 = np.full(len(x), 1 / len(x))
    return GridWorld(x, h, -from_centre / width**2 * h[..., None], p_data / p_data.sum(), p_0, **constants)


def line_world(side: int = 241, **constants) -> GridWorld:
    """The 1-D world: 241 points, three bumps, a mixture of three.

    The constants are our choice, among round numbers, for a world in which short chains (K = 5 and 10) match nothing
    and KL(q_MME‖p_MLE) falls from 0.18 at K = 20 to 10⁻⁵ at K = 1,000.
    """
    means, stds, weights = [[-1.5], [0.5], [1.5]], [0.4, 0.1, 0.4], [0.6, 0.15, 0.25]
    return bumps_world(side, [[-1.7], [0.0], [1.7]], 0.7, means, stds, weights, **constants)


def plane_world(side: int = 64, **constants) -> GridWorld:
    """The 2-D world: 64×64 points, five bumps (a cross), a mixture of three; the proposal is cut off at 5 √Δτ."""
    centres = [[0.0, 0.0], [1.5, 0.0], [-1.5, 0.0], [0.0, 1.5], [0.0, -1.5]]
    means, stds, weights = [[-1.4, -0.3], [1.2, -0.8], [0.3, 1.4]], [0.5, 0.4, 0.5], [0.4, 0.3, 0.3]
    return bumps_world(side, centres, 0.8, means, stds, weights, **{"reach": 5.0, **constants})


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

    _check_steps(steps)
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


def stationary(world: GridWorld, θ) -> np.ndarray:
    """The law π with π M_θ = π, [n]: p_θ if the kernel is adjusted, off by the discretisation bias if not. O(n³)."""
    A = world.kernel(θ).T.toarray() - np.eye(len(world.x))
    A[-1] = 1  # one equation is redundant: the total probability takes its place
    return np.linalg.solve(A, np.eye(len(A))[-1])


def kl(p, q) -> float:
    """KL(p‖q) = Σ p log(p/q) in nats; infinite where q = 0 < p."""
    p, q = _check_law(p, None, "p"), _check_law(q, len(p), "q")
    return float(rel_entr(p, q).sum())


def total_variation(p, q) -> float:
    """½ Σ |p − q|, from 0 to 1."""
    p, q = _check_law(p, None, "p"), _check_law(q, len(p), "q")
    return float(np.abs(p - q).sum() / 2)


class Learning(NamedTuple):
    """θ after `step` updates, the weighted average of all θ so far, and the Δ(θ) of the last update (None at 0)."""

    step: int
    theta: np.ndarray
    mean: np.ndarray
    delta: np.ndarray | None


def learn(
    world: GridWorld,
    steps: int,
    updates: int,
    rate: float,
    decay: float = np.inf,
    batch: int | None = None,
    start=None,
    seed: int = 0,
) -> Iterator[Learning]:
    """Algorithm 1 with plain steps, θ ← θ + η_t Δ(θ), η_t = rate / (1 + t/decay)^⅔: yields `updates` + 1 records.

    Δ(θ) is eq. (6). The average weighs θ_t by about t³, so that it forgets the start (Shamir and Zhang 2013).

    Args:
        world: the grid world.
        steps: K ≥ 1.
        updates: how many.
        rate: η_0 > 0.
        decay: the update at which η starts to fall; infinite keeps it constant.
        batch: m observed examples, and m chains of M_θ from p_0; None takes both expectations exactly.
        start: θ_0; zeros if None.
        seed: of the examples and the chains.
    """
    if not 0 < rate < float("inf") or not decay > 0 or updates < 0 or (batch is not None and batch < 1):
        raise ValueError("rate and decay must be positive, updates at least 0, batch at least 1 or None")
    rng = np.random.default_rng(seed)
    θ = world._θ(np.zeros(world.h.shape[1]) if start is None else start)
    mean = θ
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


def _check_steps(steps: int) -> int:
    return integer("steps (K)", int(steps) if isinstance(steps, np.integer) else steps)


def _check_law(p, n: int | None, name: str) -> np.ndarray:
    p = np.asarray(p, dtype=float)
    if p.ndim != 1 or (n is not None and len(p) != n):
        raise ValueError(f"{name} must be a vector{'' if n is None else f' of {n}'} probabilities, got {p.shape}")
    if not (p >= -1e-12).all() or not abs(p.sum() - 1) < 1e-9:
        raise ValueError(f"{name} must be probabilities that sum to 1")
    return p
