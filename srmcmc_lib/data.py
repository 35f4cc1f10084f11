"""Observed examples by name, as one uint8 tensor [n, C, H, W]."""

import gzip
import lzma

import torch
import torch.nn.functional as F
from torch import Tensor

from . import paths
from .images import SETS, folder, named
from .langevin import integer

NAMES = ("fashion_mnist", "fashion_mnist_mini", *SETS, "folder:PATH")
CLASSES = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
MINI_TRAIN = 8_000  # of the 10,000 test images; the other 2,000 are the mini set's test split
EMBEDDED_TRAIN = 40_000  # training images in the package: as many as the paper takes of each data set


def observed(name: str, image_size: int = 32, limit: int | None = 40_000, split: str = "train") -> Tensor:
    """Observed examples x_i ~ p_data, uint8 [n, C, image_size, image_size]; C = 1 where all are stored as grey, else 3.

    Args:
        name: "fashion_mnist", "fashion_mnist_mini" (its 10,000 test images: 8,000 to train on, 2,000 to test), the
            paper's "cifar10", "celeba" or "lsun_bedroom", or "folder:PATH"; docs/data.md says where they come from.
        image_size: H = W in pixels, 4 … 1024. Fashion-MNIST's 28×28 is padded with black to 32 and left alone at 28.
            CelebA's 178×218 is cropped to the central 140×140, LSUN and folders to the central square. Resized by
            torchvision's default, bilinear with antialiasing; folders by Lanczos' filter.
        limit: how many images at most; None for all. Of Fashion-MNIST the first, of a folder the first by path; of the
            paper's sets the first in the order torch.randperm(N), seed 0, over torchvision's N images of the split.
        split: "train" or "test"; "test" is CelebA's test partition and LSUN's val (300 images).

    A folder is read with all below it, linked folders too, without hidden files and Thumbs.db. `PATH/train` and
    `PATH/test` are its splits where they exist; without `PATH/train`, all of PATH but `PATH/test` is "train". One
    warning names the files that Pillow cannot read. Transparent images are laid on white. ValueError for a bad
    argument, a damaged file or no readable image; FileNotFoundError, with what to do, where the data set is missing.
    """
    size, limit = integer("image_size", image_size, 4, 1024), _limit(split, limit)
    if name.startswith("folder:"):
        return folder(name.removeprefix("folder:"), size, limit, split)
    if name in SETS:
        return named(name, size, limit, split)
    if name not in NAMES:
        raise ValueError(f"data set {name!r} is unknown; choose one of {', '.join(NAMES)}")
    x = _fashion(name, split, limit, "images-idx3", 16, (1, 28, 28))
    if size == 28:
        return x
    x = F.pad(x, (2, 2, 2, 2))
    return x if size == 32 else F.interpolate(x.float(), size, mode="bilinear", antialias=True).round().byte()


def labels(name: str, split: str = "train", limit: int | None = 40_000) -> Tensor:
    """The classes (0 … 9, see CLASSES) of "fashion_mnist" or "fashion_mnist_mini", int64 [n], in observed's order."""
    if name not in ("fashion_mnist", "fashion_mnist_mini"):
        raise ValueError(f"{name!r} is not a Fashion-MNIST set; only those have labels here")
    return _fashion(name, split, _limit(split, limit), "labels-idx1", 8, ()).long()


def to_float(images: Tensor, device: torch.device | str | None = None) -> Tensor:
    """uint8 0 … 255 → float32 in [-1, 1], the range the model works in; the shape is kept."""
    return images.to(device, torch.float32) / 127.5 - 1


def to_uint8(x: Tensor) -> Tensor:
    """float [-1, 1] → uint8 0 … 255, rounded; what lies outside the range (the chain is not clamped) is clipped."""
    return ((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def check_images(images: Tensor, shape: tuple[int, int, int]) -> None:
    """ValueError unless images is a uint8 tensor [n ≥ 1, *shape]."""
    if images.dtype != torch.uint8 or len(shape) != 3 or not len(images) or images.shape[1:] != torch.Size(shape):
        hint = "; data.to_uint8 converts floats in [-1, 1]" if "float" in str(images.dtype) else ""
        got = f"{type(images).__name__} of {images.dtype} {[*images.shape]}{hint}"
        raise ValueError(f"images must be a uint8 tensor [n, {', '.join(map(str, shape))}], got a {got}")


def _limit(split: str, limit: int | None) -> int | None:
    if split not in ("train", "test"):
        raise ValueError(f"split={split!r} is unknown; choose 'train' or 'test'")
    return None if limit is None else integer("limit", limit)


def _fashion(name: str, split: str, limit: int | None, idx: str, header: int, shape: tuple[int, ...]) -> Tensor:
    """The first `limit` images or labels of a split, uint8 [n, *shape], from the idx file's bytes after its header."""
    mini = name == "fashion_mnist_mini"
    if mini or split == "test":
        raw = gzip.decompress((paths.EMBEDDED / f"t10k-{idx}-ubyte.gz").read_bytes())
    elif limit is not None and limit <= EMBEDDED_TRAIN:
        raw = lzma.decompress((paths.EMBEDDED / f"train40k-{idx}-ubyte.xz").read_bytes())
    else:
        whole = _whole_fashion()
        return whole.data[:limit, None] if shape else whole.targets[:limit]
    x = torch.frombuffer(bytearray(raw), dtype=torch.uint8, offset=header).view(-1, *shape)
    if mini:
        x = x[:MINI_TRAIN] if split == "train" else x[MINI_TRAIN:]
    return x[:limit]


def _whole_fashion():
    from torchvision.datasets import FashionMNIST  # slow to import, so not above

    raw = paths.data() / "FashionMNIST" / "raw"
    try:
        return FashionMNIST(paths.data(), download=True)  # of what it unpacks it checks the MD5 sums
    except Exception as error:
        raise (ValueError if any(raw.glob("*ubyte*")) else FileNotFoundError)(
            f"Fashion-MNIST's 60,000 training images are not in {raw} or damaged, and downloading failed ({error}). "
            "Put the four .gz files of https://github.com/zalandoresearch/fashion-mnist (30 MB) there (Debian: apt-get "
            "install dataset-fashion-mnist, copy /usr/share/datasets/fashion-mnist/*), or take limit=40_000."
        ) from error
