"""Where the model's randomness comes from: the prior p_0, and one stream of random numbers for every image."""

from collections.abc import Iterable, Iterator, Sized
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

Noise = int | Generator | Tensor | Iterable[Tensor] | None
FOR_Z, FOR_U = 0, 1  # the two purposes for which an image needs a stream: its initial state, its chain's noise


@dataclass(frozen=True)
class Uniform:
    """p_0 = U(low, high) for each pixel, the paper's prior at (-1, 1)."""

    low: float = -1.0
    high: float = 1.0

    def __post_init__(self):
        if not self.low < self.high:
            raise ValueError(f"Uniform needs low < high, got {self.low!r} and {self.high!r}")

    def draw(self, shape: tuple, generator: Generator) -> Tensor:
        z = torch.rand(shape, generator=generator, device=generator.device)
        return z * (self.high - self.low) + self.low


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
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**32:  # all that torch keeps
        raise ValueError(f"a seed is an integer in 0 … 2³² − 1 or a torch.Generator, got {seed!r}")
    return seed


def streams(seed: int | Generator, purpose: int, start: int, n: int) -> list[Generator]:
    """One CPU generator an image, whatever the device; images start … start + n − 1, purpose FOR_Z or FOR_U.

    torch seeds its generators with 32 bits, so consecutive ones from a random base never collide within one call.
    """
    base = torch.randint(2**32, (2,), generator=Generator().manual_seed(as_seed(seed)))[purpose].item()
    return [Generator().manual_seed((base + i) % 2**32) for i in range(start, start + n)]


def chain_noise(
    u: Noise, K: int, shape: tuple[int, int, int], n: int, start: int, device: torch.device
) -> Iterator[Tensor] | None:
    """u as K tensors of N(0, I) on the device, drawn or as given; None for the noise-free chain.

    Args:
        u: None, a seed or torch.Generator (images start … start + n − 1 take their own streams), or K tensors.
        K: the chain's steps.
        shape: (C, H, W) of one image.
        n, start: which images.

    Raises:
        ValueError: u of another kind or length, at once; a wrong shape, NaN or infinity, when that step is reached.
    """
    shapes = [(b, *shape) for b in (1, n)]
    if u is None:
        return None
    if isinstance(u, int | Generator):
        each = streams(u, FOR_U, start, n)
        return (torch.stack([torch.randn(shape, generator=g) for g in each]).to(device) for _ in range(K))
    if not isinstance(u, Iterable):
        raise ValueError(f"u must be None, a seed, a torch.Generator or K tensors, got {type(u).__name__}")
    if (isinstance(u, Sized) and len(u) != K) or (isinstance(u, Tensor) and tuple(u.shape[1:]) not in shapes):
        got = tuple(u.shape) if isinstance(u, Tensor) else len(u)
        raise ValueError(f"u must hold K = {K} tensors of shape {shapes[0]} or {shapes[1]}, got {got}")

    def given() -> Iterator[Tensor]:
        for k, u_k in enumerate(u):
            if tuple(u_k.shape) not in shapes or not u_k.isfinite().all():
                what = "a NaN or infinity" if tuple(u_k.shape) in shapes else f"the shape {tuple(u_k.shape)}"
                raise ValueError(f"u at step {k} has {what}; K = {K} finite tensors {shapes[0]} or {shapes[1]} fit")
            yield u_k.to(device)

    return given()
