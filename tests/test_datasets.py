"""The paper's data sets, from tiny ones in their true formats; checksums stay on, with the tiny files' own sums."""

import io
import json
import shutil
import sys
import tracemalloc

import numpy as np
import pytest
import torch
import torchvision.datasets
from PIL import Image
from tiny_sets import checksums, write_celeba, write_cifar10, write_lsun

from srmcmc_lib import cache, datasets, observed

NAMES = list(datasets.FOLDERS)


@pytest.fixture
def data(tmp_path, monkeypatch):
    """The folder of data sets, empty; the cache is beside it."""
    monkeypatch.setenv("SRMCMC_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("SRMCMC_DATA", str(tmp_path / "data"))
    return tmp_path / "data"


@pytest.fixture(scope="session")
def published(tmp_path_factory):
    """All three data sets, 20 training and 4 test images each, written once; and what was written."""
    root = tmp_path_factory.mktemp("published")
    return root, {"cifar10": write_cifar10(root), "celeba": write_celeba(root), "lsun_bedroom": write_lsun(root)}


@pytest.fixture
def written(data, published, monkeypatch):
    """A copy of the three data sets in its place; torchvision's tables get their checksums."""
    shutil.copytree(published[0], data)
    for name, table in checksums(data).items():
        for attribute, value in table.items():
            monkeypatch.setattr(getattr(torchvision.datasets, name), attribute, value)
    return published[1]


@pytest.fixture
def tiny(data, written):
    return data


def folder(data, name, split="train"):
    return data / datasets.FOLDERS[name][0].format(split=split)


def prepared(data) -> list[str]:
    home = data.parent / "home"
    return sorted(p.suffix for p in home.rglob("*") if p.is_file())


# ------------------------------------------------------------------------------------------------ which, and how


def test_the_draw_is_pinned():
    """Another order in a later torch would silently be another data set."""
    assert datasets.drawn(50_000, 4) == [36044, 49165, 37807, 11341]
    assert sorted(datasets.drawn(1000, None)) == list(range(1000))


def test_cifar10_is_the_pickled_bytes_in_drawn_order(written):
    for split, n in (("train", 20), ("test", 4)):
        order = torch.randperm(n, generator=torch.Generator().manual_seed(0))
        x = observed("cifar10", 32, split=split)
        assert x.dtype == torch.uint8 and x.shape == (n, 3, 32, 32)
        assert np.array_equal(x.numpy(), written["cifar10"][split][order])


def ramp(start: float, stop: float, n: int, extent: int) -> torch.Tensor:
    """What a ramp 0 … 255 over `extent` pixels becomes where start … stop is resized to n pixels."""
    centres = start + (torch.arange(n) + 0.5) * (stop - start) / n - 0.5
    return centres * 255 / (extent - 1)


@pytest.mark.parametrize("size", [32, 64, 128])
def test_celeba_is_cropped_to_the_central_140_and_resized(tiny, size):
    x = observed("celeba", size).float()
    assert x.shape == (20, 3, size, size)
    inner = slice(2, -2)  # at the border the filter has neighbours on one side only
    for rows, expected in ((x[:, 0].mean(1), ramp(19, 159, size, 178)), (x[:, 1].mean(2), ramp(39, 179, size, 218))):
        torch.testing.assert_close(rows[:, inner], expected[inner].expand(20, -1), rtol=0, atol=1.5)


@pytest.mark.parametrize("size", [32, 64, 128])
def test_lsun_is_cropped_to_the_central_square(tiny, size):
    x = observed("lsun_bedroom", size).float()
    assert x.shape == (20, 3, size, size)
    width = 341 * size // 256  # torchvision resizes the longer side to whole pixels, and cuts at whole pixels
    start = round((width - size) / 2) * 341 / width
    across, down = ramp(start, start + size * 341 / width, size, 341), ramp(0, 256, size, 256)
    inner = slice(2, -2)
    torch.testing.assert_close(x[:, 0].mean(1)[:, inner], across[inner].expand(20, -1), rtol=0, atol=2.5)
    torch.testing.assert_close(x[:, 1].mean(2)[:, inner], down[inner].expand(20, -1), rtol=0, atol=1.5)


def test_images_come_from_their_split_in_drawn_order(written):
    """CelebA's and LSUN's blue channel tells which image it is."""

    def numbers(name, split):
        return (observed(name, 32, split=split)[:, 2].float().mean((1, 2)) / 5).round().int().tolist()

    train, test = datasets.drawn(20, None), datasets.drawn(4, None)
    assert numbers("celeba", "train") == train
    assert numbers("celeba", "test") == [22 + i for i in test]  # after 20 training and 2 validation images
    in_key_order = written["lsun_bedroom"]
    assert numbers("lsun_bedroom", "train") == [in_key_order["train"][i] for i in train]
    assert numbers("lsun_bedroom", "test") == [in_key_order["val"][i] for i in test]


@pytest.mark.parametrize("name", NAMES)
def test_limit_takes_the_first_of_the_draw_or_all_there_are(tiny, name):
    everything = observed(name, 32, limit=None)
    assert len(everything) == 20 and torch.equal(observed(name, 32), everything)
    assert torch.equal(observed(name, 32, limit=7), everything[:7])


def test_a_grey_photograph_has_three_channels_too(tiny):
    for file in (tiny / "celeba" / "img_align_celeba").iterdir():
        Image.open(file).convert("L").save(file)
    x = observed("celeba", 32)
    assert x.shape == (20, 3, 32, 32) and torch.equal(x[:, 0], x[:, 2])


def test_of_lsun_only_what_was_drawn_is_read_and_nothing_is_left_elsewhere(tiny, monkeypatch, tmp_path):
    read, BytesIO = [], io.BytesIO
    monkeypatch.setattr(datasets.io, "BytesIO", lambda value: read.append(value) or BytesIO(value))
    (tmp_path / "working").mkdir()
    monkeypatch.chdir(tmp_path / "working")
    observed("lsun_bedroom", 32, limit=3)
    assert len(read) == 3
    assert list((tmp_path / "working").iterdir()) == []
    assert {p.name for p in folder(tiny, "lsun_bedroom").iterdir()} == {"data.mdb", "lock.mdb"}


# ------------------------------------------------------------------------------------- what is missing or damaged


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("cifar10", ["170 MB", "https://www.cs.toronto.edu/~kriz/cifar.html", "tar -xzf", "no network here"]),
        ("celeba", ["1.4 GB", "https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html", "list_eval_partition", "gdown"]),
        ("lsun_bedroom", ["43 GB", "https://github.com/fyu/lsun", "download.py -c bedroom", "unzip"]),
    ],
)
def test_missing_data_says_where_from_where_to_and_how_large(data, monkeypatch, name, words):
    def no_network(*_, **__):
        raise OSError("no network here")

    monkeypatch.setattr("torchvision.datasets.CIFAR10", no_network)
    with pytest.raises(FileNotFoundError) as error:
        observed(name, 32)
    for word in [*words, str(folder(data, name)), str(data)]:
        assert word in str(error.value)
    assert prepared(data) == []


def test_what_torchvision_downloads_of_cifar10_is_used(data, monkeypatch):
    class Owner(torchvision.datasets.CIFAR10):
        def download(self):
            write_cifar10(data)
            for attribute, value in checksums(data)["CIFAR10"].items():
                setattr(Owner, attribute, value)

    monkeypatch.setattr("torchvision.datasets.CIFAR10", Owner)
    assert observed("cifar10", 32).shape == (20, 3, 32, 32)


@pytest.mark.parametrize(
    ("name", "file"),
    [("cifar10", "data_batch_3"), ("cifar10", "batches.meta"), ("celeba", "list_eval_partition.txt"),
     ("celeba", "list_attr_celeba.txt")],
)  # fmt: skip
def test_a_wrong_checksum_is_refused(tiny, name, file):
    path = folder(tiny, name) / file
    path.write_bytes(path.read_bytes().replace(b"1", b"2", 1))
    with pytest.raises(ValueError, match=f"{folder(tiny, name)} is damaged or incomplete .*https://"):
        observed(name, 32)
    assert prepared(tiny) == []


def test_checksums_are_those_of_the_owners():
    """Unless a test replaces them: the tiny data are damaged CIFAR-10 to everyone else."""
    assert torchvision.datasets.CIFAR10.train_list[0][1] == "c99cafc152244af753f735de768cd75f"


def test_celeba_without_its_images_is_missing(tiny):
    (tiny / "celeba" / "img_align_celeba").rename(tiny / "celeba" / "elsewhere")
    with pytest.raises(FileNotFoundError, match="celeba is not in"):
        observed("celeba", 32)


@pytest.mark.parametrize("damage", ["cut", "absent"])
def test_damaged_photographs_are_all_named_and_nothing_is_cached(tiny, damage):
    files = [tiny / "celeba" / "img_align_celeba" / f"{i:06d}.jpg" for i in (3, 17)]
    good = [file.read_bytes() for file in files]
    for file in files:
        file.write_bytes(file.read_bytes()[:1000]) if damage == "cut" else file.unlink()
    with pytest.raises(ValueError, match=r"2 of 20 images .* be read: .*celeba is incomplete: Get img_") as error:
        observed("celeba", 32)
    assert all(file.name in str(error.value) for file in files) and prepared(tiny) == []
    for file, content in zip(files, good, strict=True):
        file.write_bytes(content)
    assert observed("celeba", 32).shape == (20, 3, 32, 32)


def test_a_damaged_value_in_lsun_is_named(tiny):
    import lmdb

    with lmdb.open(str(folder(tiny, "lsun_bedroom")), map_size=2**24) as env, env.begin(write=True) as txn:
        key = next(txn.cursor().iternext(values=False))
        txn.put(key, txn.get(key)[:500])
    with pytest.raises(ValueError, match=f"1 of 20 images could not be read: {key.decode()}"):
        observed("lsun_bedroom", 32)


@pytest.mark.parametrize(
    "damage", [lambda b: b[: len(b) // 2], lambda b: b[:100], lambda b: b"", lambda b: b"x" * len(b)]
)
def test_a_damaged_database_is_refused(tiny, damage):
    file = folder(tiny, "lsun_bedroom") / "data.mdb"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(ValueError, match=r"bedroom_train_lmdb is damaged or incomplete .*fyu/lsun"):
        observed("lsun_bedroom", 32)


def test_lsun_without_lmdb_says_what_to_install(tiny, monkeypatch):
    monkeypatch.setitem(sys.modules, "lmdb", None)
    with pytest.raises(ImportError, match="pip install lmdb"):
        observed("lsun_bedroom", 32)
    assert len(observed("celeba", 32)) == 20  # nobody else needs it


# --------------------------------------------------------------------------------------------------------- cache


@pytest.mark.parametrize("name", NAMES)
def test_prepared_once_and_mapped(tiny, name, monkeypatch):
    x = observed(name, 32, limit=5)
    monkeypatch.setattr(cache, "prepare", lambda *_, **__: pytest.fail("prepared again"))
    assert torch.equal(observed(name, 32, limit=5), x)
    (file,) = (tiny.parent / "home").rglob("*.npy")
    assert np.array_equal(np.load(file), x.numpy()) and isinstance(np.load(file, mmap_mode="r"), np.memmap)
    before = file.read_bytes()
    x.zero_()  # what a user does to the tensor stays with the user
    assert file.read_bytes() == before


@pytest.mark.parametrize("change", [dict(image_size=16), dict(limit=6), dict(split="test"), "another set"])
def test_another_question_is_not_answered_from_the_cache(tiny, change):
    x = observed("cifar10", 32, limit=3)
    if change == "another set":  # at the same place
        shutil.rmtree(tiny / "cifar-10-batches-py")
        write_cifar10(tiny, seed=1)
        with pytest.raises(ValueError, match="damaged or incomplete"):  # whose checksums are not the table's
            observed("cifar10", 32, limit=3)
    else:
        y = observed(**(dict(name="cifar10", image_size=32, limit=3) | change))
        assert y.shape != x.shape or not torch.equal(x, y)


def test_an_interrupted_preparation_leaves_nothing_and_the_next_one_is_whole(tiny, monkeypatch):
    drawn, opened = [], Image.open

    def interrupt(file):
        drawn.append(file)
        if len(drawn) == 10:
            raise KeyboardInterrupt
        return opened(file)

    with monkeypatch.context() as m:
        m.setattr(datasets.Image, "open", interrupt)
        with pytest.raises(KeyboardInterrupt):
            observed("celeba", 32)
    assert len(drawn) >= 10 and prepared(tiny) == []
    assert observed("celeba", 32)[:, 2].float().mean((1, 2)).div(5).round().tolist() == datasets.drawn(20, None)


def flat(value: int) -> Image.Image:
    return Image.new("RGB", (32, 32), (value, value, value))


def test_two_that_prepare_the_same_at_once_get_the_same(data):
    """The second starts and finishes while the first is half way; then the first finishes too."""
    inner = []

    def read(value):
        if value == 5 and not inner:
            inner.append(cache.load("key"))  # nothing to be seen yet
            inner.append(cache.prepare("key", 32, list(range(9)), flat)[0])
        return flat(value)

    outer, _ = cache.prepare("key", 32, list(range(9)), read)
    assert inner[0] is None
    assert outer[:, 0, 0, 0].tolist() == inner[1][:, 0, 0, 0].tolist() == list(range(9))
    assert prepared(data) == [".json", ".npy"]


def test_memory_is_bounded_whatever_the_number_of_images(data, monkeypatch):
    monkeypatch.setattr(cache, "BLOCK", 40 * 32 * 32 * 3)
    tracemalloc.start()
    images, _ = cache.prepare("key", 32, [i % 256 for i in range(1000)], flat)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert images[:, 1, 3, 3].tolist() == [i % 256 for i in range(1000)]
    assert peak < images.nbytes / 4, f"{peak:,} bytes for {images.nbytes:,} of images"


def test_grey_until_a_coloured_image_comes(data, monkeypatch):
    monkeypatch.setattr(cache, "BLOCK", 2 * 32 * 32 * 3)
    greys = [Image.new("L", (32, 32), i) for i in range(7)]
    assert cache.prepare("grey", 32, greys, lambda i: i)[0].shape == (7, 1, 32, 32)
    images, _ = cache.prepare("colour", 32, [*greys, flat(7)], lambda i: i)
    assert images.shape == (8, 3, 32, 32) and images[:, 2, 0, 0].tolist() == list(range(8))


def test_a_full_disk_is_an_error_and_leaves_nothing(data, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache.np, "broadcast_to", full)
    with pytest.raises(OSError, match="No space left"):
        cache.prepare("key", 32, list(range(9)), flat)
    assert prepared(data) == []


@pytest.mark.parametrize("shape", [(1, 1, 4, 4), (40_000, 3, 64, 64), (3_033_042, 3, 1024, 1024)])
def test_every_header_has_the_room_reserved_for_it(shape):
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": shape})
    assert len(header.getvalue()) == cache.HEADER


def test_notes_without_images_or_images_without_notes_are_not_there(data):
    cache.prepare("key", 32, [1], flat)
    images, notes = cache._files("key")
    assert json.loads(notes.read_text()) == {"unreadable": []}
    notes.unlink()
    assert images.exists() and cache.load("key") is None
