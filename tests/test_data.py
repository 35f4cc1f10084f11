"""Fashion-MNIST against the raw idx bytes, the ranges of pixels, clear errors."""

import gzip
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch

from srmcmc_lib import data, observed, paths
from srmcmc_lib.data import check_images, labels, to_float, to_uint8


def test_the_packaged_images_and_labels_are_the_published_bytes():
    pixels, classes = (
        gzip.decompress((paths.EMBEDDED / f"t10k-{kind}-ubyte.gz").read_bytes())[header:]
        for kind, header in (("images-idx3", 16), ("labels-idx1", 8))
    )
    for name, split, a, b in (("_mini", "train", 0, 8_000), ("_mini", "test", 8_000, 10_000), ("", "test", 0, 10_000)):
        x, y = observed(f"fashion_mnist{name}", 28, split=split), labels(f"fashion_mnist{name}", split)
        assert x.dtype == torch.uint8 and x.shape == (b - a, 1, 28, 28) and y.dtype == torch.int64
        assert x.numpy().tobytes() == pixels[a * 784 : b * 784] and bytes(y.tolist()) == classes[a:b]
    x, y = observed("fashion_mnist", 28), labels("fashion_mnist")
    assert x.shape == (40_000, 1, 28, 28) and y.shape == (40_000,) and torch.bincount(y).min() > 3_900
    assert [data.CLASSES[i] for i in y[:2]] == ["ankle boot", "T-shirt"] and 65 < x.float().mean() < 80


def test_32_pads_28_with_black_and_other_sizes_keep_the_brightness():
    x = {size: observed("fashion_mnist_mini", size, limit=np.int64(50)) for size in (16, 28, 32, 64)}
    assert x[32].shape == (50, 1, 32, 32) and torch.equal(x[32][..., 2:-2, 2:-2], x[28])
    assert x[32].sum() == x[28].sum()  # the border is 0
    for size in (16, 64):
        assert x[size].shape == (50, 1, size, size)
        torch.testing.assert_close(*(x[s].float().mean((1, 2, 3)) for s in (size, 32)), rtol=0, atol=1.0)


@pytest.fixture
def raw(tmp_path, monkeypatch) -> Path:
    """torchvision's folder with the four idx files; those of training hold the test images' bytes backwards."""
    monkeypatch.setenv("SRMCMC_DATA", str(tmp_path))
    folder = tmp_path / "FashionMNIST" / "raw"
    folder.mkdir(parents=True)
    for kind, header in (("images-idx3-ubyte", 16), ("labels-idx1-ubyte", 8)):
        content = gzip.decompress((paths.EMBEDDED / f"t10k-{kind}.gz").read_bytes())
        (folder / f"t10k-{kind}").write_bytes(content)
        (folder / f"train-{kind}").write_bytes(content[:header] + content[: header - 1 : -1])
    return folder


def test_the_original_files_are_read(raw):
    x, y = observed("fashion_mnist", 28, limit=None), labels("fashion_mnist", limit=50_000)
    assert x.shape == (10_000, 1, 28, 28) and y.dtype == torch.int64
    assert torch.equal(x.flatten().flip(0), observed("fashion_mnist", 28, split="test").flatten())
    assert torch.equal(y.flip(0), labels("fashion_mnist", split="test"))


@pytest.mark.parametrize("files", ["missing", "damaged"])
def test_missing_and_damaged_files_name_every_remedy(raw, monkeypatch, files):
    monkeypatch.setattr("torchvision.datasets.utils.download_url", Mock(side_effect=RuntimeError("no network")))
    for file in raw.iterdir():
        file.write_bytes(file.read_bytes()[:100]) if files == "damaged" else file.unlink()
    error = FileNotFoundError if files == "missing" else ValueError
    with pytest.raises(error, match=r"apt-get install.*limit=40_000") as caught:
        observed("fashion_mnist", limit=None)
    assert str(raw) in str(caught.value) and "github.com/zalandoresearch/fashion-mnist" in str(caught.value)


def test_all_256_values_survive_the_round_trip_and_others_are_clipped():
    values = torch.arange(256, dtype=torch.uint8)
    torch.testing.assert_close(to_float(values), torch.linspace(-1, 1, 256))
    assert torch.equal(to_uint8(to_float(values)), values)
    x = torch.tensor([-7.0, -1.0, -1 + 0.4 / 127.5, -1 + 0.6 / 127.5, 1.0, 1.004, 9.0])
    assert to_uint8(x).tolist() == [0, 0, 0, 1, 255, 255, 255]


def test_bad_arguments_are_refused():
    for message, bad in {
        "data set 'mnist' is unknown; choose one of fashion_mnist, fashion_mnist_mini": dict(name="mnist"),
        "split='validation' is unknown": dict(split="validation"),
        "limit must be an integer of at least 1": dict(limit=0),
    }.items():
        with pytest.raises(ValueError, match=message):
            observed(**(dict(name="fashion_mnist_mini") | bad))
    with pytest.raises(ValueError, match="not a Fashion-MNIST set"):
        labels("cifar10")
    check_images(torch.zeros(2, 1, 8, 8, dtype=torch.uint8), (1, 8, 8))
    for bad in (torch.zeros(2, 1, 8, 8), *(torch.zeros(s).byte() for s in ((0, 1, 8, 8), (1, 8, 8), (2, 3, 8, 8)))):
        with pytest.raises(ValueError, match=r"uint8 tensor \[n, 1, 8, 8\]" + ".*to_uint8" * bad.is_floating_point()):
            check_images(bad, (1, 8, 8))
