"""CIFAR-10, CelebA and LSUN bedroom with a handful of images, in the formats in which their owners publish them."""

import hashlib
import io
import pickle
from pathlib import Path

import lmdb
import numpy as np
from PIL import Image

ATTRIBUTES = [f"Attribute_{i}" for i in range(40)]


def md5(file: Path) -> str:
    return hashlib.md5(file.read_bytes()).hexdigest()


def write_cifar10(data: Path, train: int = 20, test: int = 4, seed: int = 0) -> dict[str, np.ndarray]:
    """Five training batches and one of test images: pickled dicts with rows of 3,072 bytes, red, green, blue."""
    folder = data / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    rng, written = np.random.default_rng(seed), {"train": [], "test": []}
    for name in [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]:
        split, n = ("test", test) if name == "test_batch" else ("train", train // 5)
        rows = rng.integers(0, 256, (n, 3072), dtype=np.uint8)
        batch = {"batch_label": name, "labels": [i % 10 for i in range(n)], "data": rows,
                 "filenames": [f"{name}_{i}.png" for i in range(n)]}  # fmt: skip
        (folder / name).write_bytes(pickle.dumps(batch, protocol=2))
        written[split].append(rows.reshape(n, 3, 32, 32))
    meta = {"num_cases_per_batch": train // 5, "label_names": [str(i) for i in range(10)], "num_vis": 3072}
    (folder / "batches.meta").write_bytes(pickle.dumps(meta, protocol=2))
    return {split: np.concatenate(parts) for split, parts in written.items()}


def ramps(width: int, height: int, step: int) -> np.ndarray:
    """Red grows with x, green with y (wherever an image is cut, its place can be read off); blue is `step`."""
    red, green = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return np.stack([red, green, np.full_like(red, step)], axis=-1).round().astype(np.uint8)


def write_celeba(data: Path, train: int = 20, test: int = 4) -> list[str]:
    """Aligned JPEGs of 178×218 and the five lists; two more images are of the "valid" partition."""
    folder = data / "celeba"
    (folder / "img_align_celeba").mkdir(parents=True)
    partition = [0] * train + [1] * 2 + [2] * test
    names = [f"{i:06d}.jpg" for i in range(1, len(partition) + 1)]
    for i, name in enumerate(names):
        image = Image.fromarray(ramps(178, 218, 5 * i))
        image.save(folder / "img_align_celeba" / name, quality=95, subsampling=0)

    def table(file: str, header: list[str] | None, row) -> None:
        top = [str(len(names)), " ".join(header)] if header else []
        lines = top + [f"{name}  {' '.join(map(str, row(i)))}" for i, name in enumerate(names)]
        (folder / file).write_text("\n".join(lines) + "\n")

    table("list_eval_partition.txt", None, lambda i: [partition[i]])
    table("identity_CelebA.txt", None, lambda i: [i + 1])
    table("list_attr_celeba.txt", ATTRIBUTES, lambda i: [(-1) ** (i + j) for j in range(40)])
    table("list_bbox_celeba.txt", ["image_id", "x_1", "y_1", "width", "height"], lambda i: [1, 2, 3, 4])
    table("list_landmarks_align_celeba.txt", [f"p_{j}" for j in range(10)], lambda i: range(10))
    return names


def write_lsun(data: Path, train: int = 20, val: int = 4) -> dict[str, list[int]]:
    """An LMDB database a split: SHA-1 in hexadecimal → a WebP of 256 pixels at its shorter side, here 341×256.

    Returns by split which image comes first, second, … in the order of the keys.
    """
    written = {}
    for split, n in (("train", train), ("val", val)):
        folder = data / "lsun" / f"bedroom_{split}_lmdb"
        folder.mkdir(parents=True)
        with lmdb.open(str(folder), map_size=2**24) as env, env.begin(write=True) as txn:
            for i in range(n):
                webp = io.BytesIO()
                Image.fromarray(ramps(341, 256, 5 * i)).save(webp, "webp", quality=100, method=0)
                txn.put(hashlib.sha1(f"{split} {i}".encode()).hexdigest().encode(), webp.getvalue())
        written[split] = sorted(range(n), key=lambda i, split=split: hashlib.sha1(f"{split} {i}".encode()).hexdigest())
    return written


def checksums(data: Path) -> dict[str, dict]:
    """torchvision's tables of MD5 sums, class → attribute → value, with the sums of the tiny files in their place."""
    from torchvision.datasets import CIFAR10, CelebA

    cifar10, celeba, tables = data / "cifar-10-batches-py", data / "celeba", {}
    if cifar10.exists():
        tables["CIFAR10"] = {
            "train_list": [[name, md5(cifar10 / name)] for name, _ in CIFAR10.train_list],
            "test_list": [[name, md5(cifar10 / name)] for name, _ in CIFAR10.test_list],
            "meta": CIFAR10.meta | {"md5": md5(cifar10 / "batches.meta")},
        }
    if celeba.exists():
        sums = [(d, s if name.endswith(".zip") else md5(celeba / name), name) for d, s, name in CelebA.file_list]
        tables["CelebA"] = {"file_list": sums}
    return tables
