"""The K-step Langevin chain of eq. (4): its constants, one step, and the chain as a generator."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from numbers import Integral

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Langevin:
    """Constants of the kernel, checked when made: x ← x + s·f'(x) + ε·U, U ~ N(0, I), repeated K = `steps` times.

    Two conventions describe the same update. Both are tempered: run for ever with small steps, the chain would have
    the distribution exp(f/T), where that can be normalised.

    | | drift coefficient | noise std | temperature T |
    |---|---|---|---|
    | authors' code (ours) | s = `step_size` | ε = `noise` | ε² / (2 s) |
    | eq. (4) for f/T | Δτ / (2 T) | √Δτ | T |

    The authors' s = 1, ε = 0.01 is therefore eq. (4) with Δτ = 10⁻⁴ and T = 5·10⁻⁵: Δτ is small, and f/T is as much
    steeper than f, so that the drift Δτ/2 · f'/T is f' itself.

    A kernel of your own is a dataclass with `steps`, `step_size` and `step`.
    """

    steps: int = 100  # K ≥ 1, the same in training and in evaluation (paper: 100)
    step_size: float = 1.0  # s > 0, the drift coefficient (authors' code: 1)
    noise: float = 0.01  # ε ≥ 0, the noise's standard deviation per step (theirs: 0.01); 0 is plain gradient ascent

    def __post_init__(self):
        K, s, ε = integer("steps (K)", self.steps), float(self.step_size), float(self.noise)  # NumPy's numbers as well
        vars(self).update(steps=K, step_size=s, noise=ε)  # the dataclass is frozen
        if not 0 < s < float("inf") or not 0 <= ε < float("inf"):
            raise ValueError(f"step_size must be positive, noise at least 0, both finite; got {s} and {ε}")

    def step(self, x: Tensor, gradient: Tensor, u: Tensor | float) -> Tensor:
        """Eq. (4), one step from x with f'(x) and u ~ N(0, I), all [B, …]; u = 0 is the noise-free step."""
        return x + self.step_size * gradient + self.noise * u

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
        """The kernel that eq. (4) writes as x + Δτ/2 · f'/T + √Δτ·U, Δτ and T > 0; T = 1 samples toward exp f."""
        if not delta_tau > 0 or not temperature > 0:
            raise ValueError(f"delta_tau and temperature must be positive, got {delta_tau!r} and {temperature!r}")
        return cls(steps, step_size=delta_tau / (2 * temperature), noise=delta_tau**0.5)


def gradient(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """f'(x) = ∂f/∂x of each image, [B, …] → [B, …]: f.gradient(x) where f has one, else automatic differentiation."""
    if getattr(f, "gradient", None):
        return f.gradient(x)
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        y = value(f, x)
        if not isinstance(y, Tensor) or y.shape != x.shape[:1] or not y.requires_grad:
            got = f"{list(y.shape)}, requires_grad={y.requires_grad}" if isinstance(y, Tensor) else repr(y)
            raise ValueError(f"f must map {len(x)} images to one differentiable number each, [{len(x)}]; got {got}")
        (slope,) = torch.autograd.grad(y.sum(), x, allow_unused=True)  # images are independent of each other
    if slope is None:
        raise ValueError("f(x) does not depend on x: f must be a differentiable function of the images")
    return slope


def value(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """f(x), x in the type of f's parameters: the chain's state is float32 where f is a bfloat16 copy."""
    return f(x.to(next(f.parameters(), x).dtype) if isinstance(f, nn.Module) else x)


def chain(f, z: Tensor, kernel: Langevin, U: Iterable[Tensor] | None = None) -> Iterator[tuple[Tensor, Tensor]]:
    """Eq. (4), K steps of f, [B, …] → [B], from x_0 = z ~ p_0, [B, …]: yields K pairs (x_k, f'(x_{k-1})), k = 1 … K.

    U holds K tensors of N(0, I), each broadcastable to z; None runs the noise-free chain (u = 0).
    """
    x, U = z.detach(), iter(U) if U is not None else None
    for k in range(kernel.steps):
        slope = gradient(f, x)
        u = next(U, None) if U is not None else 0.0
        if u is None:
            raise ValueError(f"u ended after {k} of K = {kernel.steps} steps")
        x = kernel.step(x, slope, u)
        yield x, slope


def integer(name: str, value: int, low: int = 1, high: int | None = None) -> int:
    """value as Python's int; ValueError where it is no integer (NumPy's are, a bool is not) or not in low … high."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < low or (high is not None and value > high):
        bounds = f"of at least {low}" if high is None else f"in {low} … {high}"
        raise ValueError(f"{name} must be an integer {bounds}, got {value!r}")
    return int(value)
