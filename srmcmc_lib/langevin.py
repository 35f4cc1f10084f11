"""The K-step Langevin chain of eq. (4): its constants in one frozen dataclass, and the chain as a generator."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .checks import integer


@dataclass(frozen=True)
class Langevin:
    """Constants of the short-run kernel: x ← x + s·f'(x) + ε·U, U ~ N(0, I), repeated K times.

    Two conventions describe the same update. Both are tempered: the chain that would converge, did it run for ever
    with small steps, would have the law exp(f/T) (where that can be normalised).

    | | drift coefficient | noise std | temperature T |
    |---|---|---|---|
    | authors' code (ours) | s = `step_size` | ε = `noise` | ε² / (2 s) |
    | eq. (4) for f/T | Δτ / (2 T) | √Δτ | T |

    The authors' s = 1, ε = 0.01 is therefore eq. (4) with Δτ = 10⁻⁴ and T = 5·10⁻⁵: Δτ is small and f/T as much
    steeper than f, so that the drift Δτ/2 · f'/T is f' itself.

    Attributes:
        steps: K ≥ 1, the same in training and in evaluation (paper: 100).
        step_size: s > 0, the drift coefficient (authors' code: 1).
        noise: ε ≥ 0, the noise's standard deviation per step (authors' code: 0.01). 0 is plain gradient ascent.

    Raises:
        ValueError: a constant out of range.
    """

    steps: int = 100
    step_size: float = 1.0
    noise: float = 0.01

    def __post_init__(self):
        integer("steps (K)", self.steps)
        if not 0 < self.step_size < float("inf"):
            raise ValueError(f"step_size must be positive and finite, got {self.step_size!r}")
        if not 0 <= self.noise < float("inf"):
            raise ValueError(f"noise must be at least 0 and finite, got {self.noise!r}")

    @property
    def temperature(self) -> float:
        """T = ε² / (2 s): the chain's own limit is exp(f/T)."""
        return self.noise**2 / (2 * self.step_size)

    @property
    def delta_tau(self) -> float:
        """Δτ = ε², the time step of eq. (4) for f/T."""
        return self.noise**2

    @classmethod
    def from_delta_tau(cls, steps: int, delta_tau: float, temperature: float = 1.0) -> "Langevin":
        """The kernel that eq. (4) writes as x + Δτ/2 · f'/T + √Δτ·U.

        Args:
            steps: K ≥ 1.
            delta_tau: Δτ > 0.
            temperature: T > 0; 1 samples toward exp f.
        """
        if not delta_tau > 0 or not temperature > 0:
            raise ValueError(f"delta_tau and temperature must be positive, got {delta_tau!r} and {temperature!r}")
        return cls(steps, step_size=delta_tau / (2 * temperature), noise=delta_tau**0.5)


class ChainState(NamedTuple):
    """One state of the chain: x [B, C, H, W], and the gradient ∂f/∂x of the step that led to it (None at k = 0)."""

    x: Tensor
    gradient: Tensor | None


@contextmanager
def frozen(f: Callable) -> Iterator[None]:
    """Stops f's parameters from collecting gradients inside the block; restores each flag, also after an exception."""
    parameters = [p for p in f.parameters() if p.requires_grad] if isinstance(f, nn.Module) else []
    try:
        for p in parameters:
            p.requires_grad_(False)
        yield
    finally:
        for p in parameters:
            p.requires_grad_(True)


def gradient(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """f'(x) = ∂f/∂x for each image, [B, …] → [B, …]: f.gradient(x) where f has one, else automatic differentiation.

    It keeps no graph and leaves f's parameters as they were.
    """
    if hasattr(f, "gradient"):
        return f.gradient(x)
    with frozen(f), torch.enable_grad():
        x = x.detach().requires_grad_()
        y = f(x.to(next(f.parameters(), x).dtype) if isinstance(f, nn.Module) else x)  # a bfloat16 copy takes bfloat16
        if y.shape != x.shape[:1]:
            raise ValueError(f"f must map [B, …] to one number an image, [{len(x)}]; it returned {list(y.shape)}")
        return torch.autograd.grad(y.sum(), x)[0]  # images are independent, so the sum's gradient is each one's own


def langevin_chain(f, x: Tensor, kernel: Langevin, U: Iterable[Tensor] | None = None) -> Iterator[ChainState]:
    """Implements eq. (4), K steps: yields K + 1 states, the first of them x itself.

    The parameters of f are frozen only while a step is computed, so a consumer may stop early or train in between.

    Args:
        f: the negative energy, [B, …] → [B].
        x: the initial state z ~ p_0, [B, …], not modified.
        kernel: K, s and ε.
        U: K tensors of N(0, I), each broadcastable to x; None runs the noise-free chain (U = 0).
    """
    s, ε = kernel.step_size, kernel.noise
    x = x.detach()
    yield ChainState(x, None)
    U = iter(U) if U is not None else None
    for k in range(kernel.steps):
        df_dx = gradient(f, x)
        u = next(U, None) if U is not None else 0.0
        if u is None:
            raise ValueError(f"u ended after {k} of K = {kernel.steps} steps")
        x = x + s * df_dx + ε * u
        yield ChainState(x, df_dx)
