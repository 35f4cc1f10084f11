"""Figures that two notebooks share: arrays in, matplotlib Figure out. The only module that imports matplotlib."""

import re
from collections.abc import Iterable, Sequence
from tempfile import TemporaryDirectory

import matplotlib.pyplot as plt
import numpy as np
import PIL.Image
from IPython.display import HTML, Image
from matplotlib.animation import HTMLWriter
from matplotlib.figure import Figure
from torch import Tensor
from torchvision.utils import make_grid

from . import paths
from .data import to_uint8


def subplots(*args, **kwargs) -> tuple:
    """plt.subplots, closed in pyplot at once; otherwise a notebook shows each figure twice."""
    figure, axes = plt.subplots(*args, **kwargs)
    plt.close(figure)
    return figure, axes


def draw_grid(ax, images: Tensor, columns: int, padding: int = 1) -> None:
    """Draws a grid of images on ax; float [n, C, H, W], values outside [-1, 1] are clipped."""
    grid = make_grid(to_uint8(images.detach().cpu()), columns, padding=padding, pad_value=255)
    ax.imshow(grid.permute(1, 2, 0).numpy(), interpolation="nearest")
    ax.set_axis_off()


def image_grid(images: Tensor, columns: int = 8, title: str = "") -> Figure:
    """A grid of images, float [n, C, H, W] in [-1, 1] (figures 2 and 6 at n = 64)."""
    rows = -(-len(images) // columns)
    figure, ax = subplots(figsize=(0.62 * columns, 0.62 * rows + (0.3 if title else 0)), layout="constrained")
    draw_grid(ax, images, columns)
    ax.set_title(title, fontsize=10)
    return figure


def side_by_side(grids: dict[str, Tensor], columns: int = 8) -> Figure:
    """Several grids next to each other, by title; each float [n, C, H, W] in [-1, 1]."""
    rows = max(-(-len(images) // columns) for images in grids.values())
    size = (0.5 * columns * len(grids), 0.5 * rows + 0.35)
    figure, axes = subplots(1, len(grids), figsize=size, layout="constrained", squeeze=False)
    for ax, (title, images) in zip(axes[0], grids.items(), strict=True):
        draw_grid(ax, images, columns)
        ax.set_title(title, fontsize=10)
    return figure


def strips(rows: Sequence | dict, labels: Sequence[str], title: str = "", split: int | None = None) -> Figure:
    """Rows of images, each float [columns, C, H, W], under shared column labels: the paper's figures 1, 3 and 4.

    The keys of a dict are printed at the left; there is a gap before column `split`.
    """
    names, rows = (list(rows), list(rows.values())) if isinstance(rows, dict) else ([], rows)
    n, margin = len(labels), 0.1 + 0.075 * max(map(len, names), default=0)  # inches, for the names
    widths = np.insert(np.ones(n), split, 0.25) if split is not None else np.ones(n)
    size, gaps = (0.75 * widths.sum() + margin, 0.75 * len(rows) + 0.42), {"wspace": 0.04, "hspace": 0.04}
    figure, axes = subplots(len(rows), len(widths), figsize=size, width_ratios=widths, squeeze=False, gridspec_kw=gaps)
    left, top = margin / figure.get_figwidth(), 1 - (0.42 if title else 0.2) / figure.get_figheight()
    figure.subplots_adjust(left=left, right=0.99, bottom=0.01, top=top)
    for ax in axes.flat:
        ax.set_axis_off()
    columns = [i for i in range(len(widths)) if i != split]
    for row, images in zip(axes, rows, strict=True):
        for column, image in zip(columns, images, strict=True):
            draw_grid(row[column], image[None], 1, padding=0)
    for column, label in zip(columns, labels, strict=True):
        axes[0, column].set_title(label, fontsize=8)
    for ax, name in zip(axes[:, 0], names, strict=False):
        ax.annotate(name, (0, 0.5), (-4, 0), "axes fraction", "offset points", ha="right", va="center", fontsize=8)
    figure.suptitle(title, fontsize=10)
    return figure


def training_curves(stages: Sequence[tuple[int, Sequence]], smooth: int = 25) -> Figure:
    """d and K·‖∂f/∂x‖ against the update, with running means over `smooth` updates.

    `stages` holds (K, records of `train`) for each stage of a training run, drawn one after the other.
    """
    figure, (left, right) = subplots(1, 2, figsize=(9, 2.8), layout="constrained")
    before, last = 0, None
    for K, records in stages:
        step, window = before + np.array([r.step for r in records]), min(smooth, len(records))
        for ax, values in ((left, [r.d for r in records]), (right, [K * r.grad_norm for r in records])):
            ax.plot(step, values, color="0.75", lw=0.8)
            mean = np.convolve(values, np.ones(window) / window, "valid")
            ax.plot(step[window - 1 :], mean, color="C0", lw=1.6, label="" if before else f"mean of {window}")
            if before:
                ax.axvline(before, color="k", lw=0.6, ls=":")
            ax.locator_params(axis="x", nbins=5)
            name, top = "" if last == K else f"K = {K}", ax.get_xaxis_transform()
            ax.annotate(name, (step.mean(), 1.02), xycoords=top, ha="center", fontsize=8)
        before, last = step[-1], K
    left.axhline(0, color="k", lw=0.6)
    left.set(xlabel="update", ylabel=r"d = mean f($x^+$) − mean f($x^-$)")
    left.legend(frameon=False, fontsize=8)
    right.set(xlabel="update", ylabel=r"$K \cdot \|\partial f/\partial x\|_2$", ylim=(0, None))
    return figure


def player(figures: Iterable[Figure], fps: int = 5, dpi: int = 64) -> HTML:
    """A player that needs no kernel. Its frames are figures of one size, or one figure that is drawn anew each time."""
    writer, signs = HTMLWriter(fps, embed_frames=True, default_mode="once"), iter("−«‹◀‖▶›»+")  # for its buttons
    writer.frame_format = "jpeg"  # noise as PNG takes three times as much
    with TemporaryDirectory() as folder:
        for i, writer.fig in enumerate(figures):
            if i == 0:
                writer.setup(writer.fig, f"{folder}/player.html", dpi)
            writer.grab_frame(pil_kwargs={"quality": 50})
        writer.finish()
        html = re.sub("<link[^>]*>", "", writer.outfile.read_text("utf-8"))  # its icons are a font of another site's
    html = html.replace("<img ", f'<img style="width: {writer.fig.get_figwidth():.1f}in; max-width: 100%" ')
    return HTML(re.sub('<i class="fa.*?</i>', lambda _: next(signs), html))


def save(figure: Figure, notebook: str, name: str) -> Image:
    """Writes figures/NOTEBOOK/NAME.png and .pdf (without dates, so the bytes repeat); returns the PNG to show it."""
    folder = paths.figures() / notebook
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / f"{name}.pdf", metadata={"CreationDate": None})
    figure.savefig(png := folder / f"{name}.png", dpi=110)
    few = PIL.Image.open(png).convert("RGB").quantize(256, PIL.Image.Quantize.MAXCOVERAGE, kmeans=2, dither=0)
    few.save(png, optimize=True)  # 256 colours: half the size in every notebook and in the history
    return Image(png)
