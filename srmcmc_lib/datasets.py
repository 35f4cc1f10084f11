"""Images from disk: the paper's three data sets, and folders of one's own. `data.observed` is the way in."""

import hashlib
import io
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Generator, Tensor

from . import cache, paths

SEED = 0  # of the order in which a data set's images are drawn
SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}
FOLDERS = {  # below paths.data(): where torchvision and the owners' archives put them, and the files that date them
    "cifar10": ("cifar-10-batches-py", "*_batch*"),
    "celeba": ("celeba", "*.txt"),
    "lsun_bedroom": ("lsun/bedroom_{split}_lmdb", "data.mdb"),
}
OWNERS = {  # what to do about a data set that is missing or damaged; {data} is paths.data()
    "cifar10": "Get cifar-10-python.tar.gz (170 MB) from https://www.cs.toronto.edu/~kriz/cifar.html and unpack it: "
    "tar -xzf cifar-10-python.tar.gz -C {data}",
    "celeba": "Get img_align_celeba.zip (1.4 GB; unzip it there) and five lists (list_eval_partition, identity_CelebA, "
    "list_attr_celeba, list_bbox_celeba and list_landmarks_align_celeba, each .txt, beside the unzipped folder) from "
    "https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html, or let torchvision fetch all: pip install gdown && "
    "python -c \"from torchvision.datasets import CelebA; CelebA('{data}', download=True)\"",
    "lsun_bedroom": "With download.py from https://github.com/fyu/lsun: python download.py -c bedroom -o {data}/lsun "
    "(43 GB for training, 4 MB for val), then in {data}/lsun: unzip bedroom_train_lmdb.zip; unzip bedroom_val_lmdb.zip",
}


def drawn(n: int, limit: int | None) -> list[int]:
    """Which of n images are taken: the first `limit` of torch.randperm(n) with seed SEED, in that order."""
    return torch.randperm(n, generator=Generator().manual_seed(SEED))[:limit].tolist()


def paper(name: str, size: int, limit: int | None, split: str) -> Tensor:
    """The drawn images of "cifar10", "celeba" or "lsun_bedroom", uint8 [n, 3, size, size]; see data.observed."""
    folder, pattern = FOLDERS[name]
    folder = paths.data() / folder.format(split="train" if split == "train" else "val")
    remedy = OWNERS[name].format(data=paths.data())
    if name == "cifar10" and not folder.exists():
        _download_cifar10(folder, remedy)
    files = sorted(folder.glob(pattern))
    if not files or (name == "celeba" and not (folder / "img_align_celeba").is_dir()):
        raise FileNotFoundError(f"{name} is not in {folder}. {remedy}")
    key = f"{name}-{split}-{size}-{limit or 'all'}-{_stamp(folder, files, SEED)}"
    found = cache.load(key)
    if found is None:
        opened = {"cifar10": _cifar10, "celeba": _celeba, "lsun_bedroom": _lsun}[name]
        try:
            with opened(folder, size, limit, split) as (items, read):
                found = cache.prepare(key, size, items, read, channels=(3,), remedy=f". {name} is incomplete: {remedy}")
        except _Damaged as error:
            raise ValueError(f"{folder} is damaged or incomplete ({error}). {remedy}") from error
    return torch.from_numpy(found[0])


def folder(path: str, size: int, limit: int | None, split: str) -> Tensor:
    """The images of a folder's split, uint8 [n, C, size, size]; see data.observed. Warns of unreadable files."""
    root = Path(path).expanduser()
    if not root.is_dir():
        raise FileNotFoundError(f"folder:{path} names no folder ({root.absolute()}); give the folder that holds images")
    held_out = root / "test"  # never trained on, also where the training images lie loose beside it
    if (root / split).is_dir():
        root /= split
    elif split == "test":
        raise FileNotFoundError(f"folder:{path} has no test split; put held-out images in {held_out}")
    files = sorted(p for p in root.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
    files = [p for p in files if split == "test" or held_out not in p.parents][:limit]
    if not files:
        raise ValueError(f"folder:{path} holds no image file ({', '.join(sorted(SUFFIXES))})")
    key = f"{root.resolve().name}-{size}-{_stamp(root, files, size)}"
    images, unreadable = cache.load(key) or cache.prepare(key, size, files, lambda file: _read(file, size))
    if unreadable:
        some = ", ".join(unreadable[:5]) + (" …" if len(unreadable) > 5 else "")
        warnings.warn(f"{len(unreadable)} of {len(files)} image files could not be read: {some}", stacklevel=3)
    return torch.from_numpy(images)


class _Damaged(Exception):
    """A checksum, or the structure of a data set's own files, is wrong."""


Opened = Iterator[tuple[list, Callable[[object], Image.Image]]]  # what to read, in the drawn order, and how


@contextmanager
def _cifar10(folder: Path, size: int, limit: int | None, split: str) -> Opened:
    from torchvision.datasets import CIFAR10
    from torchvision.transforms.functional import resize

    try:
        images = CIFAR10(folder.parent, train=split == "train").data  # checks the md5 sums
    except RuntimeError as error:
        raise _Damaged(error) from error
    yield drawn(len(images), limit), lambda i: resize(Image.fromarray(images[i]), [size, size])


@contextmanager
def _celeba(folder: Path, size: int, limit: int | None, split: str) -> Opened:
    from torchvision.datasets import CelebA
    from torchvision.transforms.functional import center_crop, resize

    try:
        names = CelebA(folder.parent, split=split).filename  # checks the md5 sums of the lists
    except RuntimeError as error:
        raise _Damaged(error) from error

    def read(name: str) -> Image.Image:
        with Image.open(folder / "img_align_celeba" / name) as image:
            return resize(center_crop(image.convert("RGB"), [140, 140]), [size, size])

    yield [names[i] for i in drawn(len(names), limit)], read


@contextmanager
def _lsun(folder: Path, size: int, limit: int | None, split: str) -> Opened:
    # not torchvision's LSUN: it lists all three million keys, and leaves them pickled in the working directory
    try:
        import lmdb
    except ImportError as error:
        raise ImportError("lsun_bedroom is an LMDB database, and reading it takes: pip install lmdb") from error
    from torchvision.transforms.functional import center_crop, resize

    try:
        env = lmdb.open(str(folder), readonly=True, lock=False, readahead=False)
    except lmdb.Error as error:
        raise _Damaged(error) from error
    with env, env.begin() as shared:
        needed = (env.info()["last_pgno"] + 1) * env.stat()["psize"]
        if (folder / "data.mdb").stat().st_size < needed:  # reading on would end the process, not raise
            raise _Damaged(f"data.mdb holds less than the {needed:,} bytes that it speaks of")
        keys = dict.fromkeys(drawn(env.stat()["entries"], limit))
        # LMDB cannot jump to its i-th key, so keys are passed by without their images, and only those drawn are kept
        for i, key in zip(range(max(keys, default=-1) + 1), shared.cursor().iternext(values=False), strict=False):
            if i in keys:
                keys[i] = key.decode()

        def read(key: str) -> Image.Image:
            with env.begin() as own, Image.open(io.BytesIO(own.get(key.encode()))) as image:
                return center_crop(resize(image.convert("RGB"), size), [size, size])

        yield list(keys.values()), read


def _download_cifar10(folder: Path, remedy: str) -> None:
    from torchvision.datasets import CIFAR10

    try:
        CIFAR10(folder.parent, download=True)  # 170 MB; torchvision checks the md5 sums
    except Exception as error:
        raise FileNotFoundError(f"cifar10 is not in {folder}, and downloading it failed ({error}). {remedy}") from error


def _read(file: Path, size: int) -> Image.Image:
    """A file of any mode and shape: turned as its EXIF says, cropped at the centre, resized; grey stays grey."""
    with Image.open(file) as image:
        image.load()
        if image.mode in ("I", "F"):  # Pillow's conversion would clip it
            raise ValueError(f"the scale of mode {image.mode} is not known")
        deep = image.mode.startswith("I;16")
        grey = deep or image.mode in ("1", "L", "LA")
        if deep:  # 16-bit grey: Pillow's conversion would clip instead of scaling
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        image = ImageOps.exif_transpose(image).convert("L" if grey else "RGB")
        return ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS)


def _stamp(root: Path, files: list[Path], rule: object) -> str:
    """Changes when a file is changed, added or removed, the folder moves, or the rule is another."""
    stats = [(str(f.relative_to(root)), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    return hashlib.sha256(repr((str(root.resolve()), rule, stats)).encode()).hexdigest()[:16]
