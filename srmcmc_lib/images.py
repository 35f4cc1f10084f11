"""Image files, prepared once into one memory-mapped uint8 file: any folder, and the paper's three data sets."""

import hashlib
import io
import json
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from tqdm.auto import tqdm

from . import paths

BLOCK = 2**24  # bytes of pixels in memory at once
SETS = {  # folder below paths.data(), the files that date it, and what to do where it is missing or damaged
    "cifar10": ("cifar-10-batches-py", "*_batch*", "Get cifar-10-python.tar.gz (170 MB) from "
        "https://www.cs.toronto.edu/~kriz/cifar.html and unpack it: tar -xzf cifar-10-python.tar.gz -C {data}"),
    "celeba": ("celeba", "*.txt", "From https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html get identity_CelebA.txt, "
        "list_{{eval_partition,attr_celeba,bbox_celeba,landmarks_align_celeba}}.txt and img_align_celeba.zip "
        "(1.4 GB; unzip it there), or pip install gdown and run torchvision.datasets.CelebA('{data}', download=True)"),
    "lsun_bedroom": ("lsun/bedroom_{split}_lmdb", "data.mdb", "With download.py from https://github.com/fyu/lsun: "
        "python download.py -c bedroom -o {data}/lsun (43 GB for training, 4 MB for val), and unzip both files there"),
}  # fmt: skip


def folder(path: str, size: int, limit: int | None, split: str) -> torch.Tensor:
    """The images of a folder's split, uint8 [n, C, size, size]; see data.observed. One warning names unread files."""
    root = Path(path).expanduser().resolve()
    held_out, root = root / "test", root / split if (root / split).is_dir() else root
    if split == "test" and root != held_out:
        raise FileNotFoundError(f"folder:{path} has no test split; put held-out images in {held_out}")
    files = _walk(root, set() if split == "test" else {os.path.realpath(held_out)})  # which are never trained on
    if not root.is_dir() or not files:
        raise FileNotFoundError(f"folder:{path} ({root}) is no folder or holds no files; give the folder of images")
    key = f"{root.name[:40]}-{size}-{limit or 'all'}-{_stamp(files)}"
    Image.init()  # Pillow loads rarer formats when first needed, and threads that need them at once can miss them
    images, unread = load(key) or prepare(key, size, files, lambda file: _read(file, size), limit=limit)
    if unread:
        warnings.warn(f"{len(unread)} of {len(files)} files could not be read as images: {', '.join(unread[:20])} "
                      f"(all: {paths.cache() / key}.json; delete it to try them again)", stacklevel=3)  # fmt: skip
    return torch.from_numpy(images)


def named(name: str, size: int, limit: int | None, split: str) -> torch.Tensor:
    """The drawn images of "cifar10", "celeba" or "lsun_bedroom", uint8 [n, 3, size, size]; see data.observed."""
    place, pattern, remedy = SETS[name]
    root, remedy = paths.data() / place.format(split=split.replace("test", "val")), remedy.format(data=paths.data())
    if name == "cifar10" and not root.exists():
        from torchvision.datasets import CIFAR10

        try:
            CIFAR10(root.parent, download=True)
        except Exception as error:
            remedy = f"Downloading it failed ({error}). {remedy}"
    files = sorted(root.glob(pattern))
    if not files or (name == "celeba" and not (root / "img_align_celeba").is_dir()):
        raise FileNotFoundError(f"{name} is not in {root}. {remedy}")
    key = f"{name}-{split}-{size}-{limit or 'all'}-{_stamp(files)}"
    if found := load(key):
        return torch.from_numpy(found[0])
    try:
        with _opened(name, root, size, limit, split) as (items, read):
            return torch.from_numpy(prepare(key, size, items, read, 3, remedy=f". {name} is incomplete: {remedy}")[0])
    except RuntimeError as error:
        raise ValueError(f"{root} is damaged or incomplete ({error}). {remedy}") from error


def load(key: str) -> tuple[np.ndarray, list[str]] | None:
    """What `prepare` stored: images, mapped copy-on-write, and unread items. None if missing or, warned of, damaged."""
    file, notes = paths.cache() / f"{key}.u8", paths.cache() / f"{key}.json"
    with suppress(OSError, ValueError, KeyError, TypeError, OverflowError):
        stored = json.loads(notes.read_text(encoding="utf-8"))
        images = np.memmap(file, np.uint8, "c", shape=tuple(stored["shape"]))
        if (file.stat().st_size, _sample(images)) == (images.nbytes, stored["sample"]):
            return images, stored["unread"]
    if file.exists() and notes.exists():
        warnings.warn(f"the prepared images in {file} are damaged and are made again", stacklevel=2)


def prepare(key: str, size: int, items: Sequence, read: Callable[[object], Image.Image], channels: int = 1,
            limit: int | None = None, remedy: str = "") -> tuple[np.ndarray, list[str]]:  # fmt: skip
    """Stores what `read` makes of items, "L" or "RGB", size × size, under a key that changes whenever the result would.

    Returns load(key); ValueError where no image or, with a `remedy`, not every one is readable. channels=1 becomes 3
    when one is coloured; `limit` counts images. Temporary files are renamed at the end: interruptions do no harm.
    """

    def pixels(item) -> np.ndarray | None:
        try:
            return np.atleast_3d(read(item)).transpose(2, 0, 1)
        except Exception:  # on damaged files Pillow raises almost anything
            return None

    paths.cache().mkdir(parents=True, exist_ok=True)
    start, unread, limit = 0, [], limit or len(items)
    with tempfile.TemporaryDirectory(dir=paths.cache(), prefix=f".{key}.") as aside:
        part, notes = Path(aside, f"{key}.u8"), Path(aside, f"{key}.json")
        with part.open("wb") as f, ThreadPoolExecutor() as pool, tqdm(total=len(items), desc=key, delay=1) as bar:
            while (n := start - len(unread)) < limit and start < len(items):
                block = items[start : start + max(1, min(limit - n, BLOCK // (3 * size**2)))]
                for item, array in zip(block, pool.map(pixels, block), strict=True):
                    if array is None:
                        unread.append(str(item))
                    elif len(array) > channels:
                        return prepare(key, size, items, read, 3, limit, remedy)
                    else:
                        f.write(np.broadcast_to(array, (channels, size, size)).tobytes())  # maps crash on full disks
                    bar.update()
                start += len(block)
        if not n or (unread and remedy):
            raise ValueError(f"{len(unread)} of {len(items)} images could not be read: {', '.join(unread[:5])}{remedy}")
        stored = {"shape": [n, channels, size, size], "sample": _sample(np.memmap(part, mode="r")), "unread": unread}
        notes.write_text(json.dumps(stored), encoding="utf-8")
        for written in (notes, part):
            written.replace(paths.cache() / written.name)
    return load(key)


def _sample(images: np.ndarray) -> str:  # of up to 4,096 values spread over the file: cheap, not complete
    return hashlib.sha256(images.reshape(-1)[:: images.size // 4096 + 1].tobytes()).hexdigest()


def _stamp(files: list[Path]) -> str:  # changes when a file is changed, added, removed or moved
    stats = [(str(f), os.path.exists(f) and (s := os.stat(f)) and (s.st_mode, s.st_size, s.st_mtime_ns)) for f in files]
    return hashlib.sha256(repr(stats).encode()).hexdigest()[:16]


def _walk(root: Path, seen: set[str]) -> list[Path]:
    """All files below root, sorted, links followed, unreadable folders as files; none hidden, no folder in `seen`."""
    files = []
    for here, folders, names in os.walk(root, followlinks=True, onerror=lambda e: files.append(Path(e.filename))):
        new = os.path.realpath(here) not in seen
        seen.add(os.path.realpath(here))
        folders[:] = sorted(f for f in folders if new and not f.startswith("."))
        files.extend(Path(here, n) for n in names if new and not n.startswith(".") and n != "Thumbs.db")
    return sorted(files)


def _read(file: Path, size: int) -> Image.Image:
    """Any image: turned as its EXIF says, laid on white, cropped at the centre and resized; grey stays grey."""
    with Image.open(file) as opened:
        image = ImageOps.exif_transpose(opened)
    if image.mode in ("I", "F"):
        raise ValueError(f"the scale of mode {image.mode} is not known")
    if image.mode.startswith("I;16"):  # Pillow's own conversion would clip
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    grey = image.mode in ("1", "L", "LA")
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return ImageOps.fit(image.convert("L" if grey else "RGB"), (size, size), Image.Resampling.LANCZOS)


@contextmanager
def _opened(name: str, root: Path, size: int, limit: int | None, split: str) -> Iterator[tuple[list, Callable]]:
    """Items in the drawn order, item → image; RuntimeError on wrong MD5 sums (CelebA's photographs have none)."""
    from torchvision import datasets  # slow to import, so not above
    from torchvision.transforms.functional import center_crop, resize

    def drawn(x: Sequence) -> list:
        return [x[i] for i in torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[:limit].tolist()]

    def rgb(data: bytes) -> Image.Image:
        return Image.open(io.BytesIO(data)).convert("RGB")

    if name == "cifar10":
        images = datasets.CIFAR10(root.parent, train=split == "train").data
        yield drawn(range(len(images))), lambda i: resize(Image.fromarray(images[i]), [size, size])
    elif name == "celeba":
        photos = [root / "img_align_celeba" / file for file in datasets.CelebA(root.parent, split=split).filename]
        yield drawn(photos), lambda file: resize(center_crop(rgb(file.read_bytes()), [140, 140]), [size, size])
    else:  # torchvision's LSUN lists all three million keys, and leaves them pickled in the working directory
        import lmdb  # pip install lmdb

        with lmdb.open(str(root), readonly=True, lock=False, readahead=False) as env, env.begin() as all_keys:
            if (root / "data.mdb").stat().st_size < (env.info()["last_pgno"] + 1) * env.stat()["psize"]:
                raise RuntimeError("data.mdb is cut short")  # reading on would end the process
            keys = dict.fromkeys(drawn(range(env.stat()["entries"])))  # in this order; LMDB cannot jump to the i-th
            keys |= {i: key.decode() for i, key in enumerate(all_keys.cursor().iternext(values=False)) if i in keys}
            yield [*keys.values()], lambda k: center_crop(resize(rgb(env.begin().get(k.encode())), size), [size, size])
