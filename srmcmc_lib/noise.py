"""Where randomness comes from: the prior p_0, random streams for images and updates, and how two z mix."""

from collections.abc import Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass

import numpy as np
import torch
from torch import Generator, Tensor

from .langevin import integer

Noise = int | Generator | Tensor | Iterable[Tensor] | None
FOR_Z, FOR_U = 0, 1  # an image has two streams: for its initial state, and for its chain's noise


@dataclass(frozen=True)
class Uniform:
    """p_0 = U(low, high) for each pixel, the paper's prior at (-1, 1)."""

    low: float = -1.0
    high: float = 1.0

    def __post_init__(self):
        if not self.low < self.high:
            raise ValueError(f"Uniform needs low < high, got {self.low!r} and {self.high!r}")

    def draw(self, shape: tuple, generator: Generator) -> Tensor:
        return self.low + (self.high - self.low) * torch.rand(shape, generator=generator, device=generator.device)


@dataclass(frozen=True)
class Gaussian:
    """p_0 = N(0, std²) for each pixel."""

    std: float = 1.0

    def __post_init__(self):
        if not self.std > 0:
            raise ValueError(f"Gaussian needs std > 0, got {self.std!r}")

    def draw(self, shape: tuple, generator: Generator) -> Tensor:
        return self.std * torch.randn(shape, generator=generator, device=generator.device)


PRIORS = {"Uniform": Uniform, "Gaussian": Gaussian}


def as_seed(seed: int | Generator) -> int:
    """The seed itself, checked, or one drawn from a torch.Generator (which moves on)."""
    if isinstance(seed, Generator):
        return int(torch.randint(2**32, (), generator=seed, device=seed.device))
    return integer("a seed (or a torch.Generator)", seed, 0, 2**32 - 1)  # torch keeps 32 bits


def streams(seed: int | Generator, purpose: int, start: int, n: int) -> list[Generator]:
    """One CPU generator an image, on whatever device the model is: images start … start + n − 1, FOR_Z or FOR_U."""
    base = torch.randint(2**32, (2,), generator=Generator().manual_seed(as_seed(seed)))[purpose].item()
    return [Generator().manual_seed((base + i) % 2**32) for i in range(start, start + n)]


def chain_noise(u: Noise, K: int, shape: tuple, n: int, start: int, device: torch.device) -> Iterator[Tensor] | None:
    """u as K float tensors of N(0, I) on the device, drawn or as given; None for the noise-free chain.

    From a seed or torch.Generator, images start … start + n − 1 of shape (C, H, W) take their own streams. ValueError
    where K given tensors have another length (at once), another shape, NaN or infinity (when they are used).
    """
    if u is None:
        return None
    if not isinstance(u, Iterable):
        each = streams(u, FOR_U, start, n)
        return (torch.stack([torch.randn(shape, generator=g) for g in each]).to(device) for _ in range(K))
    if isinstance(u, Sized) and len(u) != K:
        raise ValueError(f"u must hold K = {K} tensors, got {len(u)}")
    return _checked(u, [(1, *shape), (n, *shape)], device)


def _checked(u: Iterable[Tensor], shapes: list[tuple], device: torch.device) -> Iterator[Tensor]:
    for k, u_k in enumerate(map(torch.as_tensor, u)):
        if tuple(u_k.shape) not in shapes or not u_k.isfinite().all():
            what = f"the shape {tuple(u_k.shape)}" if tuple(u_k.shape) not in shapes else "a NaN or infinity"
            raise ValueError(f"u at step {k} has {what}; it must be finite, of shape {shapes[0]} or {shapes[1]}")
        yield u_k.to(device, torch.float32)


def fresh(seed: int, t: int, device: torch.device) -> list[Generator]:
    """Four generators for update t of a training run, made anew from (seed, t): for which x⁺, their noise, z and u.

    So a resumed run needs no generator's state. The first is on the CPU, where the images are, the others on the
    device: drawing K·m noise images an update on the CPU would take longer than the chain on a GPU.
    """
    seeds = np.random.SeedSequence(seed, spawn_key=(t,)).generate_state(4)
    return [Generator(d).manual_seed(int(s)) for d, s in zip(("cpu", *[device] * 3), seeds, strict=True)]


def variance(ρ: Tensor, z1: Tensor, z2: Tensor) -> Tensor:
    """z_ρ = ρ z_1 + √(1 − ρ²) z_2, the paper's rule; independent z keep Var z, but uniform ones do not stay uniform."""
    return ρ * z1 + (1 - ρ**2).sqrt() * z2


def linear(ρ: Tensor, z1: Tensor, z2: Tensor) -> Tensor:
    """ρ z_1 + (1 − ρ) z_2: half-way its variance is Var z / 2, too weak a noise for the chain to start from."""
    return ρ * z1 + (1 - ρ) * z2


def spherical(ρ: Tensor, z1: Tensor, z2: Tensor) -> Tensor:
    """[sin(ρΩ) z_1 + sin((1 − ρ)Ω) z_2] / sin Ω, Ω the angle between z_1 and z_2; linear where that is 0 or π."""
    norms = [z.flatten(1).norm(dim=1) for z in (z1, z2)]
    cosine = (z1 * z2).flatten(1).sum(1) / (norms[0] * norms[1]).clamp_min(torch.finfo(z1.dtype).tiny)
    Ω = cosine.clamp(-1, 1).arccos().view(-1, *[1] * (z1.ndim - 1))
    weights = (ρ * Ω).sin() / Ω.sin(), ((1 - ρ) * Ω).sin() / Ω.sin()
    return torch.where(Ω.sin() > 1e-3, weights[0] * z1 + weights[1] * z2, linear(ρ, z1, z2))


MIXINGS = {"variance": variance, "linear": linear, "spherical": spherical}


def mix(z1: Tensor, z2: Tensor, rhos: Sequence[float] | Tensor, mixing: str = "variance") -> Tensor:
    """The initial states between z_1 (ρ = 1) and z_2 (ρ = 0), figures 3 and 7: [B, C, H, W] twice → [B, R, C, H, W].

    rhos holds R ≥ 1 numbers in 0 … 1, in any order; mixing is "variance" (the paper's), "linear" or "spherical".
    """
    if mixing not in MIXINGS:
        raise ValueError(f"mixing={mixing!r} is unknown; choose one of {', '.join(MIXINGS)}")
    if z1.shape != z2.shape:
        raise ValueError(f"z1 and z2 must have the same shape, got {list(z1.shape)} and {list(z2.shape)}")
    rhos = torch.as_tensor(rhos, dtype=z1.dtype, device=z1.device)
    if rhos.ndim != 1 or not len(rhos) or not ((rhos >= 0) & (rhos <= 1)).all():
        raise ValueError(f"rhos must be one or more numbers in 0 … 1, got {rhos.tolist()!r}")
    return torch.stack([MIXINGS[mixing](ρ, z1, z2) for ρ in rhos], dim=1)
