"""How good are the samples: distances to the training images (memorisation)."""

import torch
from torch import Tensor


def nearest_images(x: Tensor, images: Tensor, k: int = 1, batch_size: int = 256) -> tuple[Tensor, Tensor]:
    """The k nearest of `images` to each of `x`, by root mean squared difference per pixel.

    Args:
        x: float [n, C, H, W] in [-1, 1].
        images: float [N ≥ k, C, H, W] in [-1, 1].
        k: neighbours, nearest first.
        batch_size: rows of x at once; bounds memory at batch_size · N floats.

    Returns:
        (distances [n, k] in 0 … 2, indices into images [n, k]).
    """
    if not 1 <= k <= len(images):
        raise ValueError(f"k must lie in 1 … {len(images)} (the number of images), got {k!r}")
    if x.shape[1:] != images.shape[1:]:
        raise ValueError(f"x and images must agree in [C, H, W], got {list(x.shape[1:])} and {list(images.shape[1:])}")
    flat, parts = images.flatten(1), []
    for rows in x.flatten(1).split(batch_size):
        parts.append(torch.cdist(rows, flat).topk(k, largest=False))
    distances, indices = (torch.cat(p) for p in zip(*parts, strict=True))
    return distances / flat.shape[1] ** 0.5, indices
