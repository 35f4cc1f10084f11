"""Observed examples: Fashion-MNIST against the raw idx bytes, folders of any images, the cache, clear errors."""

import gzip
import os
import struct
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from srmcmc_lib import data, datasets, observed, paths
from srmcmc_lib.data import labels, to_float, to_uint8

DEBIAN = data.DEBIAN  # the true place; the fixture below hides it


@pytest.fixture(autouse=True)
def own_home(tmp_path, monkeypatch):
    """Data and cache in a fresh folder; Debian's copy and the network out of reach."""
    monkeypatch.setenv("SRMCMC_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("SRMCMC_DATA", str(tmp_path / "data"))
    monkeypatch.setattr(data, "DEBIAN", tmp_path / "no such folder")
    return tmp_path / "home"


def cached(home: Path) -> list[Path]:
    return sorted(p for p in home.rglob("*") if p.is_file())


# ------------------------------------------------------------------------------------------------- fashion_mnist


def raw_bytes(kind: str, header: int) -> bytes:
    """The embedded file's pixels or labels, cut out by hand."""
    (file,) = paths.EMBEDDED.glob(f"t10k-{kind}-idx*.gz")
    return gzip.decompress(file.read_bytes())[header:]


@pytest.mark.parametrize(("split", "first", "n"), [("train", 0, 8_000), ("test", 8_000, 2_000)])
def test_mini_is_the_embedded_file_byte_for_byte(split, first, n):
    raw = raw_bytes("images", 16)
    assert len(raw) == 10_000 * 784
    x = observed("fashion_mnist_mini", 28, split=split)
    assert x.shape == (n, 1, 28, 28) and x.dtype == torch.uint8
    assert x.numpy().tobytes() == raw[first * 784 : (first + n) * 784]
    y = labels("fashion_mnist_mini", split)
    assert y.dtype == torch.int64
    assert bytes(y.tolist()) == raw_bytes("labels", 8)[first : first + n]


def test_mini_has_known_facts():
    """The first test image is an ankle boot; classes are nearly balanced; images are dark with bright clothes."""
    y, x = labels("fashion_mnist_mini"), observed("fashion_mnist_mini")
    assert data.CLASSES[y[0]] == "ankle boot"
    assert len(data.CLASSES) == 10 and torch.bincount(y).min() > 700
    assert (x.min(), x.max()) == (0, 255) and 50 < x.float().mean() < 65


def test_32_pads_28_with_black_and_never_stretches():
    small, padded = observed("fashion_mnist_mini", 28, limit=50), observed("fashion_mnist_mini", 32, limit=50)
    assert padded.shape == (50, 1, 32, 32)
    assert torch.equal(padded[..., 2:-2, 2:-2], small)
    assert padded.sum() == small.sum()  # the border is 0


@pytest.mark.parametrize("size", [16, 64])
def test_other_sizes_keep_each_images_brightness(size):
    paper, x = (observed("fashion_mnist_mini", s, limit=50).float().mean((1, 2, 3)) for s in (32, size))
    torch.testing.assert_close(x, paper, rtol=0, atol=1.0)


@pytest.mark.parametrize("limit", [1, 7, None])
def test_limit_takes_the_first(limit):
    assert torch.equal(observed("fashion_mnist_mini", 28, limit), observed("fashion_mnist_mini", 28)[:limit])


def idx(array: np.ndarray) -> bytes:
    """The on-disk format: two zero bytes, 0x08 for unsigned bytes, the rank, big-endian sizes, the bytes."""
    return b"\0\0\x08" + bytes([array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def write_fashion(folder: Path, zipped: bool) -> dict[str, np.ndarray]:
    folder.mkdir(parents=True)
    rng, written = np.random.default_rng(0), {}
    for split, n in (("train", 7), ("t10k", 5)):
        written[f"{split}-images-idx3-ubyte"] = rng.integers(0, 256, (n, 28, 28), dtype=np.uint8)
        written[f"{split}-labels-idx1-ubyte"] = rng.integers(0, 10, n, dtype=np.uint8)
    for name, array in written.items():
        (folder / (name + ".gz" * zipped)).write_bytes(gzip.compress(idx(array)) if zipped else idx(array))
    return written


@pytest.mark.parametrize("zipped", [False, True], ids=["plain", "gz"])
@pytest.mark.parametrize("place", ["FashionMNIST/raw", "fashion-mnist", "."])
def test_fashion_mnist_is_read_from_the_original_files(tmp_path, place, zipped):
    written = write_fashion(tmp_path / "data" / place, zipped)
    x = observed("fashion_mnist", 28, limit=None)
    assert x.shape == (7, 1, 28, 28)
    assert np.array_equal(x[:, 0].numpy(), written["train-images-idx3-ubyte"])
    assert labels("fashion_mnist", limit=None).tolist() == written["train-labels-idx1-ubyte"].tolist()


def test_the_first_40_000_and_the_test_images_are_embedded():
    x, y = observed("fashion_mnist", 28), labels("fashion_mnist")
    assert x.shape == (40_000, 1, 28, 28) and y.shape == (40_000,)
    assert (
        data.CLASSES[y[0]] == "ankle boot" and data.CLASSES[y[1]] == "T-shirt"
    )  # as the data set's own page shows them
    assert torch.bincount(y).min() > 3_900
    whole = torch.cat([observed("fashion_mnist_mini", 28, split=s) for s in ("train", "test")])
    assert torch.equal(observed("fashion_mnist", 28, split="test"), whole)
    assert not (observed("fashion_mnist", 28, limit=100)[:, None] == whole[:100]).flatten(2).all(2).any()


@pytest.mark.skipif(not DEBIAN.is_dir(), reason="needs Debian's dataset-fashion-mnist, to compare with")
def test_the_embedded_images_are_the_first_of_the_original_file():
    raw = gzip.decompress((DEBIAN / "train-images-idx3-ubyte.gz").read_bytes())
    assert observed("fashion_mnist", 28).numpy().tobytes() == raw[16 : 16 + 40_000 * 784]
    raw = gzip.decompress((DEBIAN / "train-labels-idx1-ubyte.gz").read_bytes())
    assert bytes(labels("fashion_mnist").tolist()) == raw[8 : 8 + 40_000]


def test_debians_copy_is_found(tmp_path, monkeypatch):
    written = write_fashion(tmp_path / "usr", zipped=True)
    monkeypatch.setattr(data, "DEBIAN", tmp_path / "usr")
    assert np.array_equal(observed("fashion_mnist", 28, None)[:, 0].numpy(), written["train-images-idx3-ubyte"])


def test_missing_data_names_every_remedy(tmp_path, monkeypatch):
    def no_network(*_, **__):
        raise RuntimeError("name resolution failed")

    monkeypatch.setattr("torchvision.datasets.FashionMNIST", no_network)
    with pytest.raises(FileNotFoundError) as error:
        observed("fashion_mnist", limit=None)
    remedies = [
        "apt-get install dataset-fashion-mnist",
        "github.com/zalandoresearch/fashion-mnist",
        "limit=40000",
    ]
    for remedy in [*remedies, str(tmp_path / "data" / "fashion-mnist"), "name resolution failed"]:
        assert remedy in str(error.value)


def test_what_torchvision_downloads_is_used(tmp_path, monkeypatch):
    def download(root, download):
        assert download
        write_fashion(Path(root) / "FashionMNIST" / "raw", zipped=False)

    monkeypatch.setattr("torchvision.datasets.FashionMNIST", download)
    assert observed("fashion_mnist", limit=None).shape == (7, 1, 32, 32)


def flipped(raw: bytes) -> bytes:
    middle = len(raw) // 2
    return raw[:middle] + bytes(255 - b for b in raw[middle : middle + 20]) + raw[middle + 20 :]


@pytest.mark.parametrize(
    ("zipped", "damage"),
    [
        *[(True, cut) for cut in (lambda b: b[: len(b) // 2], lambda b: b[:5], lambda b: b"", flipped,
                                  lambda b: b"PK" + b[2:])],
        *[(False, cut) for cut in (lambda b: b[:-1], lambda b: b[:10], lambda b: b[:3], lambda b: b"",
                                   lambda b: b + b"\0", lambda b: b"\0\0\x0d" + b[3:])],
    ],
)  # fmt: skip
def test_damaged_idx_files_are_refused_by_name(tmp_path, zipped, damage):
    write_fashion(tmp_path / "data", zipped)
    (file,) = (tmp_path / "data").glob("train-images*")
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(ValueError, match=f"{file} is damaged .*delete it and fetch it again"):
        observed("fashion_mnist", limit=None)


def test_a_deflate_stream_damaged_inside_is_refused_by_name(tmp_path):
    """Where zlib itself gives up, not only the checksum at the end."""
    write_fashion(tmp_path / "data", zipped=True)
    (file,) = (tmp_path / "data").glob("train-images*")
    raw = file.read_bytes()
    file.write_bytes(raw[:10] + b"\xff" * 8 + raw[18:])  # block type 3 does not exist
    with pytest.raises(ValueError, match=f"{file} is damaged"):
        observed("fashion_mnist", limit=None)


# ------------------------------------------------------------------------------------------------------- folders


RED, GREEN, BLUE = (200, 0, 0), (0, 200, 0), (0, 0, 200)


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "images").mkdir()
    return tmp_path / "images"


def put(folder: Path, name: str, image, size=(16, 16), **save) -> Path:
    """Saves an image: an array, or a colour to fill size = (width, height) with."""
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else Image.new("RGB", size, image)
    image.save(file, **save)
    return file


def look(folder: Path, size=8, **options) -> torch.Tensor:
    return observed(f"folder:{folder}", size, **options)


def test_rgb_images_come_in_path_order_from_the_whole_tree(folder):
    for name, colour in [("b/deep/2.PNG", GREEN), ("a.bmp", RED), ("c.webp", BLUE)]:
        put(folder, name, colour, lossless=True)
    (folder / "notes.txt").write_text("no image")
    x = look(folder)
    assert x.shape == (3, 3, 8, 8) and x.dtype == torch.uint8
    assert [tuple(pixel.tolist()) for pixel in x[:, :, 4, 4]] == [RED, GREEN, BLUE]
    assert (x == x[..., :1, :1]).all()


def test_grey_images_give_one_channel_and_a_coloured_one_makes_it_three(folder):
    put(folder, "1.png", np.full((9, 9), 77, np.uint8))
    grey_alpha = np.full((9, 9, 2), 77, np.uint8)
    put(folder, "2.png", grey_alpha)
    assert look(folder).shape == (2, 1, 8, 8) and (look(folder) == 77).all()
    put(folder, "3.png", RED)
    x = look(folder)
    assert x.shape == (3, 3, 8, 8) and (x[0] == 77).all() and x[2, 0, 0, 0] == 200


def test_16_bit_grey_is_scaled_not_clipped(folder):
    put(folder, "1.png", np.full((8, 8), 0x8012, np.uint16))
    put(folder, "2.tif", np.full((8, 8), 0xFFFF, np.uint16))
    put(folder, "3.tif", np.full((8, 8), 0x4034, ">u2"))
    x = look(folder)
    assert x.shape == (3, 1, 8, 8)
    assert [set(image.flatten().tolist()) for image in x] == [{0x80}, {0xFF}, {0x40}]


def test_grey_of_an_unknown_scale_is_unreadable_not_white(folder):
    put(folder, "1.png", np.full((8, 8), 77, np.uint8))
    put(folder, "2.tif", np.full((8, 8), 0.5, np.float32))
    put(folder, "3.tif", np.full((8, 8), 70_000, np.int32))
    with pytest.warns(UserWarning, match="2 of 3 image files could not be read"):
        x = look(folder)
    assert x.shape == (1, 1, 8, 8) and (x == 77).all()


def test_rgba_and_palette_images_keep_their_colours(folder):
    Image.new("RGBA", (8, 8), (*RED, 255)).save(folder / "1.png")
    Image.new("RGB", (8, 8), GREEN).quantize(4).save(folder / "2.png")
    Image.new("RGB", (8, 8), BLUE).quantize(4).save(folder / "3.gif")
    with Image.open(folder / "2.png") as image:
        assert image.mode == "P"
    assert [tuple(p.tolist()) for p in look(folder)[:, :, 3, 3]] == [RED, GREEN, BLUE]


@pytest.mark.parametrize("shape", [(40, 16), (16, 40)], ids=["tall", "wide"])
def test_oblong_images_are_cropped_at_the_centre_not_squeezed(folder, shape):
    image = np.zeros((*shape, 3), np.uint8)
    middle = tuple(slice((s - 16) // 2, (s + 16) // 2) for s in shape)
    image[middle] = 255
    put(folder, "1.png", image)
    assert (look(folder, 16) == 255).all()


@pytest.mark.parametrize("size", [(1, 1), (3, 7), (31, 33), (200, 150)], ids=str)
def test_odd_sizes_are_resized(folder, size):
    put(folder, "1.png", RED, size)
    x = look(folder, 12)
    assert x.shape == (1, 3, 12, 12)
    assert (x == torch.tensor(RED)[:, None, None]).all()


def test_exif_rotation_is_applied(folder):
    image = np.zeros((16, 16, 3), np.uint8)
    image[:8] = 255  # bright above; orientation 6 says: turn clockwise to view, so bright on the right
    exif = Image.Exif()
    exif[0x0112] = 6
    put(folder, "1.png", image, exif=exif)
    x = look(folder, 16)[0, 0]
    assert (x[:, 8:] == 255).all() and (x[:, :8] == 0).all()


def spoil(folder: Path) -> list[Path]:
    """Unreadable files: cut short, empty, text that calls itself an image."""
    cut, empty, text = (folder / f"{name}.png" for name in ("cut", "empty", "text"))
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    put(folder, "cut.png", noise)
    cut.write_bytes(cut.read_bytes()[:500])
    empty.touch()
    text.write_text("hello")
    return [cut, empty, text]


def test_unreadable_files_are_counted_and_named_and_not_fatal(folder):
    put(folder, "good.png", RED)
    bad = spoil(folder)
    with pytest.warns(UserWarning, match="3 of 4 image files could not be read") as seen:
        x = observed(f"folder:{folder}", 8)
    assert x.shape == (1, 3, 8, 8)
    (warning,) = seen
    assert all(str(file) in str(warning.message) for file in bad)
    assert warning.filename == __file__  # it points at the caller


def test_all_unreadable_is_fatal_and_leaves_nothing_behind(folder, own_home):
    spoil(folder)
    with pytest.raises(ValueError, match=r"3 of 3 images could not be read: .*cut\.png"):
        look(folder)
    assert cached(own_home) == []


def test_splits_and_limit_of_a_folder(folder):
    for i, (name, colour) in enumerate([("train/1.png", RED), ("train/2.png", GREEN), ("test/3.png", BLUE)]):
        put(folder, name, colour, (9 + i, 9))
    train, test = look(folder), look(folder, split="test")
    assert [tuple(p.tolist()) for p in train[:, :, 0, 0]] == [RED, GREEN]
    assert [tuple(p.tolist()) for p in test[:, :, 0, 0]] == [BLUE]
    assert torch.equal(look(folder, limit=1), train[:1])
    put(folder, "loose/4.png", BLUE)
    assert len(look(folder)) == 2, "what lies beside train/ is not part of it"
    (folder / "train").rename(folder / "loose" / "train")
    assert len(look(folder)) == 3, "loose images are for training, those of test/ never"
    (folder / "loose" / "train").rename(folder / "train")
    assert len(look(folder / "train")) == 2  # without the two folders all of it is "train" …
    with pytest.raises(FileNotFoundError, match=f"has no test split; put held-out images in {folder}/train/test"):
        look(folder / "train", split="test")  # … and there is no test


def test_a_folder_that_is_missing_or_holds_no_images_is_refused(folder):
    with pytest.raises(FileNotFoundError, match="names no folder"):
        look(folder / "nowhere")
    (folder / "readme.txt").touch()
    with pytest.raises(ValueError, match="holds no image file"):
        look(folder)


# --------------------------------------------------------------------------------------------------------- cache


def test_the_cache_is_reused_and_refreshed(folder, own_home, monkeypatch):
    put(folder, "1.png", RED)
    first = look(folder)
    assert [p.suffix for p in cached(own_home)] == [".json", ".npy"]

    with monkeypatch.context() as m:
        m.setattr(datasets.cache, "prepare", lambda *_: pytest.fail("read again"))
        assert torch.equal(look(folder), first)

    put(folder, "1.png", GREEN)
    os.utime(folder / "1.png", (time.time() + 5,) * 2)  # whatever the clock's resolution
    assert look(folder)[0, 1, 0, 0] == 200  # a changed file
    put(folder, "2.png", BLUE)
    assert len(look(folder)) == 2  # a new file
    (folder / "1.png").unlink()
    assert look(folder)[:, 2, 0, 0].tolist() == [200]  # a removed file
    assert look(folder, 10).shape == (1, 3, 10, 10)  # another size


def test_two_folders_of_one_name_do_not_share_a_cache(tmp_path):
    for parent, colour in (("x", RED), ("y", GREEN)):
        file = put(tmp_path / parent / "images", "1.bmp", colour)
        os.utime(file, (1e9, 1e9))
    assert not torch.equal(look(tmp_path / "x" / "images"), look(tmp_path / "y" / "images"))


@pytest.mark.parametrize("moment", ["reading", "writing"])
def test_an_interrupted_preparation_leaves_nothing_that_looks_finished(folder, own_home, monkeypatch, moment):
    for i, colour in enumerate((RED, GREEN)):
        put(folder, f"{i}.png", colour)

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as m:
        m.setattr(*((np.lib.format, "write_array_header_1_0") if moment == "writing" else (datasets.ImageOps, "fit")),
                  interrupt)  # fmt: skip
        with pytest.raises(KeyboardInterrupt):
            look(folder)
    assert cached(own_home) == []
    assert look(folder)[:, :, 0, 0].tolist() == [list(RED), list(GREEN)]


# -------------------------------------------------------------------------------------------------------- values


def test_all_256_values_survive_the_round_trip():
    values = torch.arange(256, dtype=torch.uint8)
    x = to_float(values)
    assert x.dtype == torch.float32 and (x[0], x[-1]) == (-1, 1)
    torch.testing.assert_close(x.double(), torch.linspace(-1, 1, 256, dtype=torch.float64))
    assert torch.equal(to_uint8(x), values)


def test_to_uint8_rounds_and_clips():
    x = torch.tensor([-7.0, -1.0, -1 + 0.4 / 127.5, -1 + 0.6 / 127.5, 1.0, 1.004, 9.0])
    assert to_uint8(x).tolist() == [0, 0, 0, 1, 255, 255, 255]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (dict(name="mnist"), "data set 'mnist' is unknown; choose one of fashion_mnist, fashion_mnist_mini"),
        (dict(split="validation"), "split='validation' is unknown"),
        (dict(image_size=3), "image_size must be an integer in 4 … 1024"),
        (dict(image_size=1025), "image_size must be"),
        (dict(image_size=32.0), "image_size must be"),
        (dict(limit=0), "limit must be an integer of at least 1"),
        (dict(limit=True), "limit must be an integer of at least 1"),
        (dict(limit=1.5), "limit must be"),
    ],
    ids=str,
)  # fmt: skip
def test_bad_arguments_are_refused(bad, message):
    with pytest.raises(ValueError, match=message):
        observed(**(dict(name="fashion_mnist_mini") | bad))


def test_only_fashion_mnist_has_labels(folder):
    with pytest.raises(ValueError, match="not a Fashion-MNIST set"):
        labels(f"folder:{folder}")


def test_reading_warns_of_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        observed("fashion_mnist_mini", 32, limit=10)


@pytest.mark.parametrize("wrong", [{"split": "tset"}, {"limit": 0}, {"limit": -1}])
def test_labels_refuse_what_observed_refuses(wrong):
    for function in (labels, observed):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            function("fashion_mnist_mini", **wrong)
