"""Images prepared once, in parallel, into a memory-mapped uint8 file that is either complete or not there."""

import json
import struct
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError
from tqdm.auto import tqdm

from . import paths

HEADER = 128  # bytes of an .npy header of four axes; numpy leaves room in it for the first axis to grow
BLOCK = 2**24  # bytes of pixels in memory at once
UNREADABLE = (OSError, UnidentifiedImageError, Image.DecompressionBombError, ValueError, SyntaxError,
              TypeError, EOFError, struct.error)  # fmt: skip


def load(key: str) -> tuple[np.ndarray, list[str]] | None:
    """What `prepare` stored under key, or None. The array is mapped copy-on-write: the file itself never changes."""
    images, notes = _files(key)
    if not (images.exists() and notes.exists()):
        return None
    return np.load(images, mmap_mode="c"), json.loads(notes.read_text(encoding="utf-8"))["unreadable"]


def prepare(
    key: str,
    size: int,
    items: Sequence,
    read: Callable[[object], Image.Image],
    channels: tuple[int, ...] = (1, 3),
    remedy: str | None = None,
) -> tuple[np.ndarray, list[str]]:
    """Reads all items in threads (Pillow decodes without Python's lock) and stores them under key.

    Written aside and renamed: an interrupted call leaves nothing that looks finished, and of two processes that
    prepare the same key the later one replaces a file by its equal. Memory is bounded by BLOCK, whatever len(items).

    Args:
        key: a file name that changes with everything that decides the images.
        size: H = W.
        items: what to read, in order; str(item) names it in a message.
        read: item → image of size × size, mode "L" or "RGB"; called from several threads.
        channels: (1, 3) stores one channel while all images are grey, and starts again when one is not; (3,) always
            stores three.
        remedy: what to do about unreadable images; None leaves them out.

    Returns:
        uint8 [n, C, size, size], memory-mapped, and the names of the items that could not be read.

    Raises:
        ValueError: no item could be read, or one could not and there is a remedy.
    """
    images, notes = _files(key)
    images.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=images.parent, prefix=f".{key}.") as aside:
        for c in channels:
            unreadable = _write(Path(aside) / images.name, size, c, items, read)
            if unreadable is not None:
                break
        if len(unreadable) == len(items) or (unreadable and remedy):
            some = ", ".join(unreadable[:5]) + (" …" if len(unreadable) > 5 else "")
            raise ValueError(f"{len(unreadable)} of {len(items)} images could not be read: {some}{remedy or ''}")
        (Path(aside) / notes.name).write_text(json.dumps({"unreadable": unreadable}), encoding="utf-8")
        (Path(aside) / notes.name).replace(notes)
        (Path(aside) / images.name).replace(images)  # last: this file is the sign that all is there
    return load(key)


def _write(file: Path, size: int, channels: int, items: Sequence, read: Callable) -> list[str] | None:
    """Writes the .npy file; returns the unreadable items, or None where an image has more channels than are stored."""

    def pixels(item) -> np.ndarray | None:
        try:
            array = np.asarray(read(item))
        except UNREADABLE:
            return None
        return array[None] if array.ndim == 2 else array.transpose(2, 0, 1)

    step, unreadable = max(1, BLOCK // (3 * size**2)), []
    # written, not mapped: a full disk is then an error that names itself instead of the end of the process
    with file.open("wb") as f, ThreadPoolExecutor() as pool, tqdm(total=len(items), desc=file.stem, delay=1) as bar:
        f.seek(HEADER)
        for start in range(0, len(items), step):
            block = items[start : start + step]
            for item, array in zip(block, pool.map(pixels, block), strict=True):
                if array is None:
                    unreadable.append(str(item))
                elif len(array) > channels:
                    return None
                else:
                    f.write(np.broadcast_to(array, (channels, size, size)).tobytes())
                bar.update()
        n = len(items) - len(unreadable)
        f.seek(0)
        header = {"descr": "|u1", "fortran_order": False, "shape": (n, channels, size, size)}
        np.lib.format.write_array_header_1_0(f, header)
        if f.tell() != HEADER:
            raise RuntimeError(f"numpy wrote a header of {f.tell()} bytes where {HEADER} were reserved")
    return unreadable


def _files(key: str) -> tuple[Path, Path]:
    return paths.cache() / f"{key}.npy", paths.cache() / f"{key}.json"
