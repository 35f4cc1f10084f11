"""Mixing two initial states: what stands between z_1 and z_2 when M_θ interpolates (figures 3 and 7)."""

from collections.abc import Sequence

import torch
from torch import Tensor


def variance(ρ: Tensor, z1: Tensor, z2: Tensor) -> Tensor:
    """z_ρ = ρ z_1 + √(1 − ρ²) z_2, the paper's rule: the weights' squares sum to 1, so independent z keep Var z.

    It keeps the whole law only of a Gaussian p_0. A mixture of two uniforms is no uniform: |z_ρ| reaches √2.
    """
    return ρ * z1 + (1 - ρ**2).sqrt() * z2


def linear(ρ: Tensor, z1: Tensor, z2: Tensor) -> Tensor:
    """ρ z_1 + (1 − ρ) z_2: its variance falls to Var z / 2 half-way, where the chain starts from too weak a noise."""
    return ρ * z1 + (1 - ρ) * z2


def spherical(ρ: Tensor, z1: Tensor, z2: Tensor) -> Tensor:
    """[sin(ρΩ) z_1 + sin((1 − ρ)Ω) z_2] / sin Ω, Ω the angle between the images z_1 and z_2; keeps a shared norm.

    ρ is the share of the angle that is left. Parallel and opposite images, which have no one arc between
    them, are mixed linearly.
    """
    norms = [z.flatten(1).norm(dim=1) for z in (z1, z2)]
    cosine = (z1 * z2).flatten(1).sum(1) / (norms[0] * norms[1]).clamp_min(torch.finfo(z1.dtype).tiny)
    Ω = cosine.clamp(-1, 1).arccos().view(-1, *[1] * (z1.ndim - 1))
    weights = (ρ * Ω).sin() / Ω.sin(), ((1 - ρ) * Ω).sin() / Ω.sin()
    return torch.where(Ω.sin() > 1e-3, weights[0] * z1 + weights[1] * z2, linear(ρ, z1, z2))


MIXINGS = {"variance": variance, "linear": linear, "spherical": spherical}


def mix(z1: Tensor, z2: Tensor, rhos: Sequence[float] | Tensor, mixing: str = "variance") -> Tensor:
    """The initial states between z_1 (ρ = 1) and z_2 (ρ = 0), [B, C, H, W] twice → [B, R, C, H, W].

    Args:
        z1, z2: the two ends of each row, of one shape.
        rhos: R ≥ 1 numbers in 0 … 1, in any order; from 1 to 0 they lead from z_1 to z_2.
        mixing: "variance" (the paper's), "linear" or "spherical".

    Raises:
        ValueError: an unknown mixing, ρ out of range, unequal shapes.
    """
    if mixing not in MIXINGS:
        raise ValueError(f"mixing={mixing!r} is unknown; choose one of {', '.join(MIXINGS)}")
    if z1.shape != z2.shape:
        raise ValueError(f"z1 and z2 must have the same shape, got {list(z1.shape)} and {list(z2.shape)}")
    rhos = torch.as_tensor(rhos, dtype=z1.dtype, device=z1.device)
    if rhos.ndim != 1 or not len(rhos) or not ((rhos >= 0) & (rhos <= 1)).all():
        raise ValueError(f"rhos must be one or more numbers in 0 … 1, got {rhos.tolist()!r}")
    return torch.stack([MIXINGS[mixing](ρ, z1, z2) for ρ in rhos], dim=1)
