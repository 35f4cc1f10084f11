"""Observed examples by name, as one uint8 tensor [n, C, H, W], prepared once and cached."""

import gzip
import lzma
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from . import datasets, paths
from .checks import integer

NAMES = ("fashion_mnist", "fashion_mnist_mini", *datasets.FOLDERS, "folder:PATH")
CLASSES = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
MINI_TRAIN = 8_000  # of the 10,000 test images, all embedded; the last 2,000 are the mini set's test split
EMBEDDED_TRAIN = 40_000  # the first training images, embedded as well: as many as the paper takes of each data set
DEBIAN = Path("/usr/share/datasets/fashion-mnist")  # where dataset-fashion-mnist puts the idx files


def observed(name: str, image_size: int = 32, limit: int | None = 40_000, split: str = "train") -> Tensor:
    """The observed examples x_i ~ p_data of a named data set.

    Args:
        name: "fashion_mnist" (embedded: the first 40,000 training images and the 10,000 test images; the other 20,000
            from the original idx files in `data/`, from Debian's dataset-fashion-mnist, or downloaded by
            torchvision), "fashion_mnist_mini" (the 10,000 test images again, the first 8,000 as "train" and the
            others as "test"), "cifar10", "celeba" or "lsun_bedroom" (the paper's, from `data/`; a message says where
            to get them), or "folder:PATH" (any tree of images; `PATH/train` and `PATH/test` are its splits where they
            exist; without `PATH/train`, all of PATH but `PATH/test` is "train").
        image_size: H = W in pixels, 4 … 1024. Fashion-MNIST's 28×28 is padded with black to 32 (never stretched) and
            left alone at 28. CIFAR-10 is left alone at 32. CelebA's aligned 178×218 is cropped to the central
            140×140, LSUN to the central square. Resized by torchvision's default, bilinear with antialiasing; folders
            are centre-cropped to a square and resized by Lanczos' filter.
        limit: how many images (the paper: 40,000 of each data set), or all where there are fewer; None for all. Of
            Fashion-MNIST the first, in a folder those of the first files by path; of cifar10, celeba and lsun_bedroom
            the first in the order torch.randperm(N), seed 0, over the N images of the split as torchvision orders
            them (which of its images the paper took is unknown).
        split: "train" or "test"; "test" is CelebA's test partition and LSUN's val (300 images), the only one with
            bedrooms alone.

    Returns:
        uint8 [n, C, image_size, image_size]; C = 1 where all images are grey, otherwise 3.

    Raises:
        ValueError: an unknown name or split, a size or limit out of range, a damaged file, no readable image.
        FileNotFoundError: the data set is not here; the message says how to get it.
        ImportError: lsun_bedroom without the package lmdb.
    """
    integer("image_size", image_size, 4, 1024)
    _check_part(split, limit)
    if name.startswith("folder:"):
        return datasets.folder(name.removeprefix("folder:"), image_size, limit, split)
    if name in datasets.FOLDERS:
        return datasets.paper(name, image_size, limit, split)
    if name in NAMES:
        return _fit(torch.from_numpy(_fashion(name, split, "images", limit)), image_size)
    raise ValueError(f"data set {name!r} is unknown; choose one of {', '.join(NAMES)}")


def labels(name: str, split: str = "train", limit: int | None = 40_000) -> Tensor:
    """The classes (0 … 9, see CLASSES) of "fashion_mnist" or "fashion_mnist_mini", int64 [n], in observed's order.

    Raises ValueError as `observed` does, and for a set without labels.
    """
    _check_part(split, limit)
    return torch.from_numpy(_fashion(name, split, "labels", limit)).long()


def _check_part(split: str, limit: int | None) -> None:
    if limit is not None:
        integer("limit", limit)
    if split not in ("train", "test"):
        raise ValueError(f"split={split!r} is unknown; choose 'train' or 'test'")


def to_float(images: Tensor, device: torch.device | str | None = None) -> Tensor:
    """uint8 0 … 255 → float32 in [-1, 1], the range the model works in; the shape is kept."""
    return images.to(device, torch.float32) / 127.5 - 1


def to_uint8(x: Tensor) -> Tensor:
    """float [-1, 1] → uint8 0 … 255, rounded; what lies outside the range (the chain is not clamped) is clipped."""
    return ((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def check_images(images: Tensor, shape: tuple[int, int, int]) -> None:
    """Raises ValueError unless images is a uint8 tensor [n ≥ 1, *shape]."""
    if not isinstance(images, Tensor) or images.dtype != torch.uint8:
        kind = getattr(images, "dtype", type(images).__name__)
        hint = "; for floats in [-1, 1] use srmcmc_lib.data.to_uint8" if kind != torch.uint8 else ""
        if isinstance(images, Tensor) and images.is_floating_point() and not images.isfinite().all():
            hint = "; and these contain NaN or infinity"
        raise ValueError(f"observed images must be a uint8 tensor [n, C, H, W], got {kind}{hint}")
    if images.ndim != 4 or not len(images) or tuple(images.shape[1:]) != tuple(shape):
        raise ValueError(f"the model takes images of shape [n, {', '.join(map(str, shape))}], got {list(images.shape)}")


def _fit(images: Tensor, size: int) -> Tensor:
    """[n, 28, 28] → [n, 1, size, size]: as it is at 28, otherwise padded to 32 and, for other sizes, resized."""
    images = images[:, None]
    if size == 28:
        return images.clone()
    images = F.pad(images, (2, 2, 2, 2))
    if size != 32:
        resized = F.interpolate(images.float(), size=(size, size), mode="bilinear", antialias=True)
        images = resized.round().clamp(0, 255).to(torch.uint8)
    return images


def _fashion(name: str, split: str, kind: str, limit: int | None) -> np.ndarray:
    """The first `limit` images [n, 28, 28] or labels [n] of a split, from the embedded or the original idx files."""
    if name not in ("fashion_mnist", "fashion_mnist_mini"):
        raise ValueError(f"{name!r} is not a Fashion-MNIST set; only those have labels here")
    mini, idx = name == "fashion_mnist_mini", f"{kind}-idx{3 if kind == 'images' else 1}-ubyte"
    if mini or split == "test":
        array = _read_idx(paths.EMBEDDED / f"t10k-{idx}.gz")
    elif limit is not None and limit <= EMBEDDED_TRAIN:
        array = _read_idx(paths.EMBEDDED / f"train40k-{idx}.xz")
    else:
        array = _read_idx(_find_fashion(f"train-{idx}"))
    if mini:
        array = array[:MINI_TRAIN] if split == "train" else array[MINI_TRAIN:]
    return array[:limit]


def _find_fashion(stem: str) -> Path:
    raw = paths.data() / "FashionMNIST" / "raw"  # torchvision's layout
    places = [raw, paths.data() / "fashion-mnist", paths.data(), DEBIAN]
    for place in places:
        for file in (place / stem, place / f"{stem}.gz"):
            if file.exists():
                return file
    try:
        from torchvision.datasets import FashionMNIST

        FashionMNIST(str(paths.data()), download=True)  # torchvision checks the md5 sums
    except Exception as error:
        raise FileNotFoundError(
            f"Fashion-MNIST ({stem}) is in none of {', '.join(map(str, places))} and could not be downloaded ({error})."
            " On Debian: apt-get install dataset-fashion-mnist. Elsewhere put the four idx files of "
            "https://github.com/zalandoresearch/fashion-mnist (30 MB) in the second of these folders, "
            f"or take the embedded images: limit={EMBEDDED_TRAIN}."
        ) from error
    return raw / stem


UNPACK = {".gz": gzip.decompress, ".xz": lzma.decompress}


def _read_idx(file: Path) -> np.ndarray:
    """An idx file of unsigned bytes, compressed or not, as a uint8 array of 1 … 3 dimensions."""
    try:
        raw = UNPACK.get(file.suffix, bytes)(file.read_bytes())
        if raw[:3] != b"\0\0\x08":
            raise ValueError("it does not start as an idx file of unsigned bytes")
        shape = np.frombuffer(raw, ">i4", count=raw[3], offset=4)
        return np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(shape).copy()
    except (OSError, EOFError, ValueError, IndexError, zlib.error, lzma.LZMAError) as error:
        raise ValueError(f"{file} is damaged ({error}); delete it and fetch it again") from error
