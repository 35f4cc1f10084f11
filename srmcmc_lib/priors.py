"""Where the model's randomness comes from: the prior p_0, and one stream of random numbers for every image."""

from dataclasses import dataclass

import torch
from torch import Generator, Tensor

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
