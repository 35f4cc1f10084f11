"""The grid world: f_θ(x) = <θ, h(x)> on n points, where p_θ, the chain and q_θ are computed exactly.

A distribution is a vector of n probabilities, one Langevin step an n×n stochastic matrix. Only `sample` draws.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy.sparse import csr_array, vstack
from scipy.spatial import cKDTree
from scipy.special import softmax

from .langevin import integer


@dataclass(frozen=True, eq=False)
class GridWorld:
    """n points in D dimensions, d features, and the Langevin step of eq. (4) restricted to the points.

    From x_i, x_j is proposed with Q_ij ∝ exp(−|x_j − x_i − Δτ/2 f'(x_i)|² / 2Δτ), j over the points within `reach`·√Δτ
    of x_i. This set does not depend on θ, so Q is smooth in θ; and j is in the set of i if i is in that of j, so a
    Metropolis-Hastings test with this same Q makes p_θ exactly stationary, on the grid and with the cut-off.
    """

    x: np.ndarray  # the points [n, D]
    h: np.ndarray  # the features h(x) [n, d]
    dh: np.ndarray  # their gradients ∂h/∂x [n, d, D]
    p_data: np.ndarray  # the data distribution [n]
    p_0: np.ndarray  # the initial one [n]
    delta_tau: float = 0.02  # Δτ; the proposal's width √Δτ should be at least the grid's spacing
    reach: float = 8.0  # the cut-off in standard deviations √Δτ: 8 keeps all digits, 5 keeps five
    adjusted: bool = True  # with the Metropolis-Hastings test; False is eq. (4) as the paper runs it

    def __post_init__(self):
        if np.shape(self.dh) != (*np.shape(self.h), np.shape(self.x)[-1]):
            raise ValueError("x, h and dh must be [n, D], [n, d] and [n, d, D]")
        for name in ("p_data", "p_0"):
            probabilities(name, getattr(self, name), len(self.x))
        if not 0 < self.delta_tau < np.inf or not 0 < self.reach < np.inf:
            raise ValueError("delta_tau and reach must be positive and finite")

    @cached_property
    def data_moments(self) -> np.ndarray:
        """E_data[h], [d]."""
        return self.p_data @ self.h

    def p(self, θ) -> np.ndarray:
        """Eq. (1): p_θ = exp f_θ / Z(θ), [n]."""
        return softmax(self.h @ self._θ(θ))

    def kernel(self, θ) -> csr_array:
        """One step of the chain as a stochastic matrix P_θ, [n, n]: P[i, j] is the probability of x_i → x_j."""
        return self._matrix(self._transition(θ)[0])

    def evolve(self, θ, steps: int) -> Iterator[np.ndarray]:
        """The chain's K + 1 distributions p_0, p_0 P_θ, p_0 P_θ², …, p_0 P_θ^K, [n] each."""
        P_T, q = self.kernel(θ).T.tocsr(), self.p_0
        yield q
        for _ in range(integer("steps (K)", steps)):
            q = P_T @ q
            yield q

    def q(self, θ, steps: int) -> np.ndarray:
        """Eq. (5): the short-run model q_θ = p_0 P_θ^K, [n]."""
        *_, q = self.evolve(θ, steps)
        return q

    def sample(self, θ, steps: int, m: int, rng: np.random.Generator) -> np.ndarray:
        """m samples of q_θ, the last states of m chains from p_0: row numbers of x, [m]."""
        P = self.kernel(θ)
        rising = np.concatenate([[0.0], np.cumsum(P.data)])  # inverts the cumulative distributions of all rows at once
        state = rng.choice(len(self.x), m, p=self.p_0)
        for _ in range(integer("steps (K)", steps)):
            at = np.searchsorted(rising, rising[P.indptr[state]] + rng.random(m), side="right") - 1
            state = P.indices[np.clip(at, P.indptr[state], P.indptr[state + 1] - 1)]
        return state

    def q_and_tangent(self, θ, steps: int) -> tuple[np.ndarray, np.ndarray]:
        """q_θ [n] and ∂q_θ/∂θ [n, d], by ∂(qP) = (∂q) P + q ∂P through all K steps."""
        (n, d), (P, dP) = self.h.shape, self._transition(θ)
        P_T, dP_T = self._matrix(P).T.tocsr(), vstack([self._matrix(dP_b).T for dP_b in dP], format="csr")
        state = np.column_stack([self.p_0, np.zeros((n, d))])  # q and its d derivatives, side by side
        for _ in range(integer("steps (K)", steps)):
            forcing = (dP_T @ state[:, 0]).reshape(d, n).T
            state = P_T @ state
            state[:, 1:] += forcing
        return state[:, 0], state[:, 1:]

    @cached_property
    def _pairs(self) -> tuple[np.ndarray, ...]:
        """The nnz pairs within reach, sorted: i, j, where each row starts, (j, i) and (i, i) stand, and x_j − x_i."""
        n = len(self.x)
        near = cKDTree(self.x).query_pairs(self.reach * self.delta_tau**0.5, output_type="ndarray")
        pairs = np.concatenate([near, near[:, ::-1], np.arange(n)[:, None].repeat(2, axis=1)])
        i, j = pairs[np.lexsort((pairs[:, 1], pairs[:, 0]))].T.astype(np.int32)
        start = np.searchsorted(i, np.arange(n + 1)).astype(np.int32)
        return i, j, start, np.lexsort((i, j)), np.flatnonzero(i == j), self.x[j] - self.x[i]

    def _transition(self, θ) -> tuple[np.ndarray, np.ndarray]:
        """P_θ [nnz] and ∂P_θ/∂θ [d, nnz] on the pairs."""
        θ, (i, j, start, flip, diagonal, step) = self._θ(θ), self._pairs
        rows = start[:-1]
        drift = np.einsum("ndc,d->nc", self.dh, θ) / 2
        # −|step − Δτ drift|² / 2Δτ, without the term that is constant in a row
        log_Q = np.einsum("kc,kc->k", step, drift[i] - step / (2 * self.delta_tau))
        log_Q -= np.maximum.reduceat(log_Q, rows)[i]
        log_Q -= np.log(np.add.reduceat(np.exp(log_Q), rows))[i]
        P = np.exp(log_Q)
        mean = np.add.reduceat(P[:, None] * step, rows)
        dlog = np.einsum("kdc,kc->dk", self.dh[i], step - mean[i]) / 2  # ∂ log Q_ij / ∂θ
        if self.adjusted:
            f = self.h @ θ
            log_ratio = f[j] - f[i] + log_Q[flip] - log_Q
            P *= np.exp(np.minimum(log_ratio, 0))  # at 0 it has a kink, where the next line is a one-sided derivative
            dlog = np.where(log_ratio >= 0, dlog, (self.h[j] - self.h[i]).T + dlog[:, flip])
            P[diagonal] += 1 - np.add.reduceat(P, rows)  # a rejected move stays where it was
        dP = dlog * P
        dP[:, diagonal] = 0
        dP[:, diagonal] = -np.add.reduceat(dP, rows, axis=1)  # a row of P sums to 1, one of ∂P to 0
        return P, dP

    def _matrix(self, data) -> csr_array:
        return csr_array((data, *self._pairs[1:3]), shape=(len(self.x), len(self.x)))

    def _θ(self, θ) -> np.ndarray:
        θ = np.asarray(θ, dtype=float)
        if θ.shape != self.h.shape[1:] or not np.isfinite(θ).all():
            raise ValueError(f"θ must be {self.h.shape[1]} finite numbers, one for each feature; got {θ!r}")
        return θ


def probabilities(name: str, p, n: int | None = None) -> np.ndarray:
    """p as an array, rounding errors below 0 clipped; ValueError where it is no distribution on n points."""
    p = np.asarray(p, dtype=float)
    if p.ndim != 1 or len(p) != (n or len(p)) or not (p >= -1e-12).all() or not abs(p.sum() - 1) < 1e-9:
        raise ValueError(f"{name} must be a vector of {n or 'n'} probabilities that sum to 1, got shape {p.shape}")
    return p.clip(0)


def bumps_world(side: int, centres, width: float, means, stds, weights, **constants) -> GridWorld:
    """On side^D points of [-3, 3]^D: h_a(x) = exp(−|x − c_a|² / 2 width²) with centres c [d, D], p_0 uniform, p_data a
    Gaussian mixture of `means` [m, D], `stds` and `weights` [m]. `constants` go to GridWorld."""
    centres, means, stds = (np.asarray(a, dtype=float) for a in (centres, means, stds))
    D = centres.shape[1]
    x = np.stack(np.meshgrid(*[np.linspace(-3, 3, side)] * D, indexing="ij"), axis=-1).reshape(-1, D)
    from_centre = x[:, None] - centres
    h = np.exp(-(from_centre**2).sum(-1) / (2 * width**2))
    p_data = np.exp(-((x[:, None] - means) ** 2).sum(-1) / (2 * stds**2)) @ (weights / stds**D)
    p_0 = np.full(len(x), 1 / len(x))
    return GridWorld(x, h, -from_centre / width**2 * h[..., None], p_data / p_data.sum(), p_0, **constants)


def line_world(side: int = 241, **constants) -> GridWorld:
    """The 1-D world: 241 points, three bumps, a mixture of three. The numbers are our choice."""
    means, stds, weights = [[-1.5], [0.5], [1.5]], [0.4, 0.1, 0.4], [0.6, 0.15, 0.25]
    return bumps_world(side, [[-1.7], [0.0], [1.7]], 0.7, means, stds, weights, **constants)


def plane_world(side: int = 64, **constants) -> GridWorld:
    """The 2-D world: 64×64 points, five bumps in a cross, a mixture of three; the proposal is cut off at 5 √Δτ."""
    centres = [[0.0, 0.0], [1.5, 0.0], [-1.5, 0.0], [0.0, 1.5], [0.0, -1.5]]
    means, stds, weights = [[-1.4, -0.3], [1.2, -0.8], [0.3, 1.4]], [0.5, 0.4, 0.5], [0.4, 0.3, 0.3]
    return bumps_world(side, centres, 0.8, means, stds, weights, **{"reach": 5.0, **constants})
