"""Figures are tested by what they draw, because nbval never compares PNGs."""

import matplotlib.image as mpimg
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from srmcmc_lib import plots
from srmcmc_lib.progress import Record


def drawn(axes) -> np.ndarray:
    (image,) = axes.images
    return image.get_array().data  # uint8 [H, W, 3]


@pytest.fixture
def images() -> torch.Tensor:
    """Six 4×4 grey images; image i is constant at level i."""
    return torch.linspace(-1, 1, 6)[:, None, None, None].expand(6, 1, 4, 4).clone()


def test_grid_shows_every_image_in_reading_order_and_clips(images):
    images[5] = 7.0
    (axes,) = plots.image_grid(images, columns=3).axes
    pixels = drawn(axes)
    assert pixels.shape == (2 * 5 + 1, 3 * 5 + 1, 3)  # 4 pixels and a line of 1 between images
    assert pixels[3::5, 3::5, 0].ravel()[:6].tolist() == [0, 51, 102, 153, 204, 255]


def test_strips_put_rows_down_and_labels_across(images):
    figure = plots.strips([images[:3], images[3:]], ["a", "b", "c"], title="t", split=2)
    shown = [axes for axes in figure.axes if axes.images]
    assert [drawn(axes)[0, 0, 0] for axes in shown] == [0, 51, 102, 153, 204, 255]
    assert [axes.get_title() for axes in shown[:3]] == ["a", "b", "c"]
    a, b, c = (axes.get_position().x0 for axes in shown[:3])
    assert c - b > 1.2 * (b - a)  # the gap


def test_curves_draw_the_records():
    records = [Record(step, d=step % 3 - 1, grad_norm=2.0, rate=1e-4, sigma=0.03, seconds=0.0) for step in range(1, 31)]
    left, right = plots.training_curves([(20, records)], smooth=3).axes
    assert left.lines[0].get_ydata().tolist() == [r.d for r in records]
    np.testing.assert_allclose(left.lines[1].get_ydata(), [0] * 28, atol=1e-12)  # mean of three consecutive d
    np.testing.assert_allclose(right.lines[1].get_ydata(), 40.0)  # K·‖∂f/∂x‖


def test_save_writes_png_and_pdf_with_the_same_bytes_each_time(images, tmp_path, monkeypatch):
    monkeypatch.setenv("SRMCMC_FIGURES", str(tmp_path))
    contents = []
    for _ in range(2):
        shown = plots.save(plots.image_grid(images), "NN_name", "grid")
        contents.append([(tmp_path / "NN_name" / f"grid.{kind}").read_bytes() for kind in ("png", "pdf")])
    assert contents[0] == contents[1]
    assert mpimg.imread(tmp_path / "NN_name" / "grid.png").std() > 0.1
    assert not plt.get_fignums(), "figures that pyplot remembers are shown twice in a notebook"
    assert shown.data == contents[0][0] and len(shown.data) < 10_000
