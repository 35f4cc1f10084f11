"""The grid world: f_θ(x) = <θ, h(x)> on n points, where p_θ, the chain and q_θ are computed exactly.

A law is a vector of n probabilities and the chain an n×n stochastic matrix; only `chains` samples.
"""

from collections import namedtuple
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy.sparse import csr_array, vstack
from scipy.spatial import cKDTree

from .checks import integer

# The nnz pairs (i, j) within reach, in row order: where rows start, where (j, i) and (i, i) stand, x_j − x_i.
# The pattern is symmetric: a transposed matrix shares it, its data permuted by `flip`.
_Pairs = namedtuple("_Pairs", "i j start flip diagonal step")


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
            check_law(getattr(self, name), len(self.x), name)
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
        *_, q = self.laws(θ, check_integer("steps (K)", steps))
        return q

    def chains(self, θ, steps: int, m: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
        """m sampled chains of M_θ from p_0: yields K + 1 states, each [m] row numbers of x."""
        M = self.kernel(θ)
        rising = np.concatenate([[0.0], np.cumsum(M.data)])  # inverts every row's distribution function in one search
        state = rng.choice(len(self.x), m, p=self.p_0)
        yield state
        for _ in range(check_integer("steps (K)", steps)):
            first, last = M.indptr[state], M.indptr[state + 1] - 1
            at = np.searchsorted(rising, rising[first] + rng.random(m), side="right") - 1
            state = M.indices[np.clip(at, first, last)]
            yield state

    def q_and_tangent(self, θ, steps: int) -> tuple[np.ndarray, np.ndarray]:
        """q_θ [n] and ∂q_θ/∂θ [n, d], by the tangent recursion ∂(qM) = (∂q) M + q ∂M through all K steps.

        Exact wherever no acceptance ratio is 1: there Metropolis' rule has a kink and one side's derivative is taken.
        """
        θ, steps = self._θ(θ), check_integer("steps (K)", steps)
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
    def _pairs(self) -> _Pairs:
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


def check_integer(name: str, value: int, low: int = 1) -> int:
    """checks.integer, which numpy's integers pass too."""
    return integer(name, int(value) if isinstance(value, np.integer) else value, low)


def check_law(p, n: int | None, name: str) -> np.ndarray:
    """p as an array, rounding below 0 clipped; ValueError where it is no law on n points (None: on any number)."""
    p = np.asarray(p, dtype=float)
    if p.ndim != 1 or (n is not None and len(p) != n):
        raise ValueError(f"{name} must be a vector{'' if n is None else f' of {n}'} probabilities, got {p.shape}")
    if not (p >= -1e-12).all() or not abs(p.sum() - 1) < 1e-9:
        raise ValueError(f"{name} must be probabilities that sum to 1")
    return p.clip(0)
