"""Folders of any images; the paper's data sets, tiny but in their true formats; the prepared files."""

import os
import tracemalloc
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_sets import accept, write_celeba, write_cifar10, write_lsun

from srmcmc_lib import images, observed

RED, GREEN, BLUE = (200, 0, 0), (0, 200, 0), (0, 0, 200)


@pytest.fixture(autouse=True)
def data(tmp_path, monkeypatch) -> Path:
    """The folder of data sets, not yet there; the cache is beside it."""
    monkeypatch.setenv("SRMCMC_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("SRMCMC_DATA", str(tmp_path / "data"))
    return tmp_path / "data"


def prepared(data: Path) -> list[Path]:
    return sorted(p for p in (data.parent / "home").rglob("*") if p.is_file())


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "pictures").mkdir()
    return tmp_path / "pictures"


def put(folder: Path, name: str, image, size=(16, 16), **save) -> Path:
    """Saves an image: an array, or a colour to fill size = (width, height) with."""
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    array = isinstance(image, np.ndarray)
    (Image.fromarray(image) if array else Image.new("RGBA"[: len(image)], size, image)).save(file, **save)
    return file


def look(folder: Path, size=8, **options) -> torch.Tensor:
    return observed(f"folder:{folder}", size, **options)


def colours(x: torch.Tensor) -> list[tuple[int, ...]]:
    return [tuple(image[:, 3, 3].tolist()) for image in x]


def test_images_come_in_path_order_from_the_whole_tree_and_its_links(folder, tmp_path):
    for name, colour in [("b/deep/2.PNG", GREEN), ("a.bmp", RED), ("c.webp", BLUE)]:
        put(folder, name, colour, lossless=True)
    put(tmp_path, "elsewhere/1.png", BLUE)
    for link, target in (("a_link", tmp_path / "elsewhere"), ("b/again", tmp_path / "elsewhere"), ("b/up", folder)):
        (folder / link).symlink_to(target)
    for hidden in (".DS_Store", "Thumbs.db", ".git/config"):
        (folder / hidden).parent.mkdir(exist_ok=True)
        (folder / hidden).write_text("no image")
    x = look(folder)
    assert x.shape == (4, 3, 8, 8) and x.dtype == torch.uint8 and colours(x) == [RED, BLUE, GREEN, BLUE]


def test_grey_images_give_one_channel_and_a_coloured_one_makes_it_three(folder):
    put(folder, "1.png", np.full((9, 9), 77, np.uint8))
    put(folder, "2.png", np.full((9, 9), 0x4D12, np.uint16))  # 16 bits: scaled, not clipped
    put(folder, "3.tif", np.full((9, 9), 0x4DFF, ">u2"))
    put(folder, "4.png", np.full((9, 9, 2), (77, 255), np.uint8))  # with alpha
    assert look(folder).shape == (4, 1, 8, 8) and (look(folder) == 77).all()
    put(folder, "5.png", RED)
    assert look(folder).shape == (5, 3, 8, 8) and colours(look(folder)) == [(77, 77, 77)] * 4 + [RED]


def test_transparency_is_laid_on_white(folder):
    for i, image in enumerate([(*RED, 255), (*RED, 0), (0, 0, 0, 51), np.full((9, 9, 2), (7, 0), np.uint8)]):
        put(folder, f"{i}.png", image)
    assert colours(look(folder)) == [RED, (255,) * 3, (204,) * 3, (255,) * 3]


def test_images_are_turned_by_their_exif_cropped_at_the_centre_and_resized(folder):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn clockwise to view: what is bright above shall be bright on the right
    for i, dtype in enumerate((np.uint8, np.uint16)):
        image = np.zeros((16, 40), dtype)
        image[:8, 12:28] = np.iinfo(dtype).max
        put(folder, f"{i}.png", image, exif=exif)
    x = look(folder, 16)
    assert (x[..., 8:] == 255).all() and (x[..., :8] == 0).all()
    put(folder, "2.png", (255, 255, 255), (3, 1))
    assert (look(folder, 12)[2] == 255).all()


def spoil(folder: Path) -> list[Path]:
    """What cannot be read: cut short, empty, text, an unknown scale of grey, a link to nowhere."""
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    files = [put(folder, "cut.png", noise), put(folder, "float.tif", np.full((8, 8), 0.5, np.float32))]
    files += [folder / name for name in ("empty.png", "text.csv", "nowhere.png")]
    files[0].write_bytes(files[0].read_bytes()[:500])
    files[2].touch()
    files[3].write_text("hello")
    files[4].symlink_to(folder / "not_here")
    return files


def test_every_file_is_read_or_named_in_one_warning(folder, monkeypatch):
    put(folder, "good.png", RED)
    put(folder, "locked/1.png", RED)
    named, scandir = [*spoil(folder), folder / "locked"], os.scandir

    def locked(path):  # not chmod: root may read everything
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", locked)
    for _ in range(2):  # prepared, and from the cache
        with pytest.warns(UserWarning, match="6 of 7 files could not be read") as seen:
            assert colours(observed(f"folder:{folder}", 8)) == [RED]
        assert len(seen) == 1 and seen[0].filename == __file__  # it points at the caller
        assert all(str(file) in str(seen[0].message) for file in named)


def test_no_readable_image_is_an_error_and_leaves_nothing(folder, data):
    for path in (folder, folder / "nowhere"):
        with pytest.raises(FileNotFoundError, match=rf"{path}\) is no folder or holds no files"):
            look(path)
    spoil(folder)
    with pytest.raises(ValueError, match=r"5 of 5 images could not be read: .*cut\.png"):
        look(folder)
    assert prepared(data) == []


def test_splits_and_limit_of_a_folder(folder):
    for i, (name, colour) in enumerate([("train/1.png", RED), ("train/2.png", GREEN), ("test/3.png", BLUE)]):
        put(folder, name, colour, (9 + i, 9))
    assert colours(look(folder)) == [RED, GREEN] and colours(look(folder, split="test")) == [BLUE]
    (folder / "train" / "0.txt").touch()
    with pytest.warns(UserWarning, match="1 of 3 files"):
        assert colours(look(folder, limit=1)) == [RED]  # images count, not files
    (folder / "train" / "0.txt").unlink()
    put(folder, "loose/4.png", BLUE)
    assert len(look(folder)) == 2, "what lies beside train/ is not part of it"
    (folder / "train").rename(folder / "loose" / "train")
    (folder / "loose" / "more").symlink_to(folder / "test")
    assert len(look(folder)) == 3, "loose images are for training, those of test/ never, not even through a link"
    with pytest.raises(FileNotFoundError, match=f"has no test split; put held-out images in {folder}/loose/test"):
        look(folder / "loose", split="test")


@pytest.fixture
def written(data, monkeypatch):
    """All three data sets in their place, 20 training and 4 test images each; returns what was written."""
    written = {"cifar10": write_cifar10(data), "celeba": write_celeba(data), "lsun_bedroom": write_lsun(data)}
    accept(data, monkeypatch)
    return written


def test_images_come_from_their_split_in_drawn_order(written):
    """CIFAR-10 is the pickled bytes; CelebA's and LSUN's blue channel tells which image it is."""
    order = {n: torch.randperm(n, generator=torch.Generator().manual_seed(0)).tolist() for n in (20, 4, 50_000)}
    assert order[50_000][:4] == [36044, 49165, 37807, 11341]  # another order would silently be another data set
    for split, val, n, first in (("train", "train", 20, 0), ("test", "val", 4, 22)):  # CelebA has 2 images to validate
        assert np.array_equal(observed("cifar10", 32, split=split).numpy(), written["cifar10"][split][order[n]])
        blue = {k: observed(k, 32, split=split)[:, 2].float().mean((1, 2)) / 5 for k in ("celeba", "lsun_bedroom")}
        assert blue["celeba"].round().tolist() == [first + i for i in order[n]]
        assert blue["lsun_bedroom"].round().tolist() == [written["lsun_bedroom"][val][i] for i in order[n]]


def ramp(start: float, stop: float, extent: int) -> torch.Tensor:
    """What a ramp 0 … 255 over `extent` pixels becomes where start … stop is resized to 64 pixels, borders left out."""
    return ((start + (torch.arange(64) + 0.5) * (stop - start) / 64 - 0.5) * 255 / (extent - 1))[2:-2].expand(20, -1)


def test_celeba_is_cropped_to_140_and_lsun_to_the_central_square(written):
    width = 341 * 64 // 256  # of LSUN: torchvision resizes the longer side to whole pixels, and cuts at whole pixels
    start, stop = (i * 341 / width for i in (round((width - 64) / 2), round((width - 64) / 2) + 64))
    lsun = ("lsun_bedroom", ramp(start, stop, 341), ramp(0, 256, 256))
    for name, across, down in (("celeba", ramp(19, 159, 178), ramp(39, 179, 218)), lsun):
        x = observed(name, 64).float()
        torch.testing.assert_close(x[:, 0].mean(1)[:, 2:-2], across, rtol=0, atol=2.5)
        torch.testing.assert_close(x[:, 1].mean(2)[:, 2:-2], down, rtol=0, atol=1.5)


@pytest.mark.parametrize("name", images.SETS)
def test_limit_takes_the_first_of_the_draw_and_all_is_mapped(written, data, name, monkeypatch):
    everything = observed(name, 32, limit=None)
    assert everything.shape == (20, 3, 32, 32) and torch.equal(observed(name, 32, limit=7), everything[:7])
    monkeypatch.setattr(images, "prepare", Mock(side_effect=AssertionError("prepared again")))
    observed(name, 32, limit=7).zero_()  # what a user does to the tensor stays with the user
    assert torch.equal(observed(name, 32, limit=7), everything[:7])


def test_missing_data_says_where_from_and_where_to(data, monkeypatch):
    monkeypatch.setattr("torchvision.datasets.CIFAR10", Mock(side_effect=RuntimeError("no network")))
    for name, (place, _, _) in images.SETS.items():
        place = data / place.format(split="train")
        with pytest.raises(FileNotFoundError, match=rf"{name} is not in {place}\. .*https://.* .*{data}"):
            observed(name, 32)


def test_damaged_data_sets_are_named_can_be_mended_and_are_not_cached(written, data):
    """Wrong checksums; an LSUN cut short, where reading on would end the process; photographs that cannot be read."""
    places = ("cifar-10-batches-py/data_batch_3", "celeba/list_attr_celeba.txt", "lsun/bedroom_train_lmdb/data.mdb")
    for name, file in zip(images.SETS, places, strict=True):
        good = (path := data / file).read_bytes()
        path.write_bytes(good[: len(good) // 2] if path.suffix == ".mdb" else good.replace(b"1", b"2", 1))
        with pytest.raises(ValueError, match=f"{path.parent} is damaged or incomplete .*https://"):
            observed(name, 32)
        path.write_bytes(good)
    files = [data / "celeba" / "img_align_celeba" / f"{i:06d}.jpg" for i in (3, 17)]
    files[0].write_bytes(files[0].read_bytes()[:1000])
    files[1].unlink()
    with pytest.raises(ValueError, match=r"2 of 20 images .* be read: .*celeba is incomplete: From https") as error:
        observed("celeba", 32)
    assert all(file.name in str(error.value) for file in files) and prepared(data) == []
    assert len(observed("lsun_bedroom", 32, limit=3)) == 3


def test_the_cache_is_made_again_when_damaged_reused_and_refreshed(folder, data, monkeypatch, tmp_path):
    put(folder, "1.bmp", RED)
    look(folder)
    for file in prepared(data):
        good = file.read_bytes()
        for bad in (good[: len(good) // 2], bytes(len(good))):
            file.write_bytes(bad)
            with pytest.warns(UserWarning, match=r"pictures.*\.u8 are damaged and are made again"):
                assert colours(look(folder)) == [RED]
            assert colours(look(folder)) == [RED]  # without a warning
    with monkeypatch.context() as m:
        m.setattr(images, "prepare", Mock(side_effect=AssertionError("read again")))
        assert colours(look(folder)) == [RED]
    put(folder, "1.bmp", GREEN)
    os.utime(folder / "1.bmp", (1e9, 1e9))  # whatever the clock's resolution
    assert colours(look(folder)) == [GREEN]  # a changed file
    put(folder, "2.png", BLUE)
    assert colours(look(folder)) == [GREEN, BLUE]  # a new one
    (folder / "1.bmp").unlink()
    assert colours(look(folder)) == [BLUE]  # a removed one
    os.utime(put(tmp_path, "other/pictures/1.bmp", RED), (1e9, 1e9))  # another folder of the same name
    assert colours(look(tmp_path / "other" / "pictures")) == [RED]


@pytest.mark.parametrize(("where", "error"), [
    ((images.ImageOps, "fit"), KeyboardInterrupt("reading")), ((images.json, "dumps"), KeyboardInterrupt("writing")),
    ((np, "broadcast_to"), OSError(28, "No space left on device")),
])  # fmt: skip
def test_an_interruption_or_a_full_disk_leaves_nothing(folder, data, monkeypatch, where, error):
    put(folder, "1.png", RED)
    with monkeypatch.context() as m:
        m.setattr(*where, Mock(side_effect=error))
        with pytest.raises(type(error), match=str(error.args[-1])):
            look(folder)
    assert list((data.parent / "home" / ".cache").iterdir()) == []
    assert colours(look(folder)) == [RED]


def test_memory_is_bounded_and_a_late_colour_is_seen(monkeypatch):
    monkeypatch.setattr(images, "BLOCK", 40 * 32 * 32 * 3)
    arrays = [np.full((32, 32, 3) if i > 99 else (32, 32), i % 256, np.uint8) for i in range(500)]
    tracemalloc.start()
    pixels, _ = images.prepare("key", 32, arrays, Image.fromarray)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert pixels.shape == (500, 3, 32, 32) and pixels[:, 1, 3, 3].tolist() == [i % 256 for i in range(500)]
    assert peak < pixels.nbytes / 2, f"{peak:,} bytes for {pixels.nbytes:,} of images"
