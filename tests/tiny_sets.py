"""CIFAR-10, CelebA and LSUN bedroom with a handful of images, in the formats in which their owners publish them."""

import hashlib
import io
import pickle
from pathlib import Path

import lmdb
import numpy as np
from PIL import Image


def write_cifar10(data: Path) -> dict[str, np.ndarray]:
    """Five training batches and one of test images, 4 each: pickled rows of 3,072 bytes, red, green, blue."""
    folder = data / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    rows = np.random.default_rng(0).integers(0, 256, (6, 4, 3072), dtype=np.uint8)
    for name, batch in zip([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"], rows, strict=True):
        (folder / name).write_bytes(pickle.dumps({"labels": [*range(4)], "data": batch}, protocol=2))
    meta = {"num_cases_per_batch": 4, "label_names": [str(i) for i in range(10)], "num_vis": 3072}
    (folder / "batches.meta").write_bytes(pickle.dumps(meta, protocol=2))
    images = rows.reshape(24, 3, 32, 32)
    return {"train": images[:20], "test": images[20:]}


def ramps(width: int, height: int, step: int) -> Image.Image:
    """Red grows with x, green with y (wherever an image is cut, its place can be read off); blue is `step`."""
    red, green = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([red, green, np.full_like(red, step)], axis=-1).round().astype(np.uint8))


def write_celeba(data: Path) -> None:
    """Aligned JPEGs of 178×218 and the five lists: 20 images to train on, 2 to validate, 4 to test."""
    folder = data / "celeba"
    (folder / "img_align_celeba").mkdir(parents=True)
    names = [f"{i:06d}.jpg" for i in range(1, 27)]
    for i, name in enumerate(names):
        ramps(178, 218, 5 * i).save(folder / "img_align_celeba" / name, quality=95, subsampling=0)

    def table(file: str, columns: int, row) -> None:
        top = [str(len(names)), " ".join(f"column_{j}" for j in range(columns))] if columns else []
        lines = top + [f"{name}  {' '.join(map(str, row(i)))}" for i, name in enumerate(names)]
        (folder / f"{file}.txt").write_text("\n".join(lines) + "\n")

    table("list_eval_partition", 0, lambda i: [(i >= 20) + (i >= 22)])
    table("identity_CelebA", 0, lambda i: [i + 1])
    table("list_attr_celeba", 40, lambda i: [(-1) ** (i + j) for j in range(40)])
    table("list_bbox_celeba", 5, lambda i: [1, 2, 3, 4])
    table("list_landmarks_align_celeba", 10, lambda i: range(10))


def write_lsun(data: Path) -> dict[str, list[int]]:
    """An LMDB database a split: SHA-1 in hexadecimal → a WebP of 341×256. Returns the images in the keys' order."""
    written = {}
    for split, n in (("train", 20), ("val", 4)):
        folder = data / "lsun" / f"bedroom_{split}_lmdb"
        folder.mkdir(parents=True)
        keys = [hashlib.sha1(f"{split} {i}".encode()).hexdigest() for i in range(n)]
        with lmdb.open(str(folder), map_size=2**24) as env, env.begin(write=True) as txn:
            for i, key in enumerate(keys):
                webp = io.BytesIO()
                ramps(341, 256, 5 * i).save(webp, "webp", quality=100, method=0)
                txn.put(key.encode(), webp.getvalue())
        written[split] = sorted(range(n), key=keys.__getitem__)
    return written


def accept(data: Path, monkeypatch) -> None:
    """The MD5 sums of the tiny files in torchvision's tables."""
    from torchvision.datasets import CIFAR10, CelebA

    md5 = {file.name: hashlib.md5(file.read_bytes()).hexdigest() for file in data.rglob("*") if file.is_file()}
    for key in ("train_list", "test_list"):
        monkeypatch.setattr(CIFAR10, key, [[name, md5[name]] for name, _ in getattr(CIFAR10, key)])
    monkeypatch.setattr(CIFAR10, "meta", CIFAR10.meta | {"md5": md5["batches.meta"]})
    monkeypatch.setattr(CelebA, "file_list", [(d, md5.get(name, s), name) for d, s, name in CelebA.file_list])
