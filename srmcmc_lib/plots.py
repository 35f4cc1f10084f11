"""One function a figure: arrays in, matplotlib Figure out. The only module that imports pyplot."""

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from torch import Tensor
from torchvision.utils import make_grid

from . import paths
from .data import to_uint8


def subplots(*args, **kwargs) -> tuple:
    """plt.subplots, but forgotten by pyplot: else a notebook shows a figure once as a value and once more by itself."""
    figure, axes = plt.subplots(*args, **kwargs)
    plt.close(figure)
    return figure, axes


def draw_grid(ax, images: Tensor, columns: int, padding: int = 1) -> None:
    """Draws images [n, C, H, W] in [-1, 1] (floats, clipped as to_uint8 does) as a grid on ax."""
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


def strips(
    rows: Sequence[Tensor] | dict[str, Tensor], labels: Sequence[str], title: str = "", split: int | None = None
) -> Figure:
    """Rows of images under shared column labels: figure 1 (transition), 3 (interpolation), 4 (reconstruction).

    Args:
        rows: each float [columns, C, H, W] in [-1, 1]; a dict's keys name them at the left.
        labels: one a column.
        title: above the figure.
        split: draw a gap before this column, e.g. before the observed images.
    """
    names, rows = (list(rows), list(rows.values())) if isinstance(rows, dict) else ([], rows)
    n, margin = len(labels), 0.1 + 0.075 * max(map(len, names), default=0)  # inches, for the names
    widths = np.insert(np.ones(n), split, 0.25) if split is not None else np.ones(n)
    figure, axes = subplots(
        len(rows), len(widths), figsize=(0.75 * widths.sum() + margin, 0.75 * len(rows) + 0.42), squeeze=False,
        gridspec_kw={"width_ratios": widths, "wspace": 0.04, "hspace": 0.04},
    )  # fmt: skip
    top = 1 - (0.42 if title else 0.2) / figure.get_figheight()
    left = margin / figure.get_figwidth()
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
    """d and K·‖∂f/∂x‖ against the update, each with its running mean; stages of one learning one after the other.

    Args:
        stages: (K, records) of each, the records those of `train`, or anything with step, d and grad_norm.
        smooth: updates in the running mean, which starts anew with each stage.
    """
    figure, (left, right) = subplots(1, 2, figsize=(9, 2.8), layout="constrained")
    before = 0
    for K, records in stages:
        step = before + np.array([r.step for r in records])
        window = min(smooth, len(step))
        for ax, values in ((left, [r.d for r in records]), (right, [K * r.grad_norm for r in records])):
            ax.plot(step, values, color="0.75", lw=0.8)
            mean = np.convolve(values, np.ones(window) / window, "valid")
            ax.plot(step[window - 1 :], mean, color="C0", lw=1.6, label="" if before else f"mean of {window}")
            if before:
                ax.axvline(before, color="k", lw=0.6, ls=":")
            top = ax.get_xaxis_transform()
            ax.annotate(f"K = {K}", (step.mean(), 1.02), xycoords=top, ha="center", fontsize=7)
        before = step[-1]
    left.axhline(0, color="k", lw=0.6)
    left.set(xlabel="update", ylabel=r"d = mean f($x^+$) − mean f($x^-$)")
    left.legend(frameon=False, fontsize=8)
    right.set(xlabel="update", ylabel=r"$K \cdot \|\partial f/\partial x\|_2$")
    right.set_ylim(bottom=0)
    return figure


def nearest(samples: Tensor, neighbours: Tensor, distances: Tensor) -> Figure:
    """Samples [n, C, H, W] in the first row, the nearest training images of each [n, k, C, H, W] below it.

    `distances` [n, k] is printed above each neighbour: the root mean squared difference per pixel, range 0 … 2.
    """
    n, k = distances.shape
    figure, axes = subplots(k + 1, n, figsize=(0.8 * n, 0.98 * (k + 1)), layout="constrained", squeeze=False)
    for j in range(n):
        for i, image in enumerate([samples[j], *neighbours[j]]):
            draw_grid(axes[i, j], image[None], 1, padding=0)
            if i:
                axes[i, j].set_title(f"{distances[j, i - 1]:.2f}", fontsize=7, pad=2)
    axes[0, 0].set_title("samples", fontsize=8, loc="left")
    return figure


def distance_histogram(distances: dict[str, Tensor]) -> Figure:
    """Distances to the nearest training image, by group: samples, held-out images, … (is it memorising?)."""
    figure, ax = subplots(figsize=(5, 2.6), layout="constrained")
    bins = np.linspace(0, float(max(values.max() for values in distances.values())), 40)
    for name, values in distances.items():
        ax.hist(values.cpu().numpy(), bins, alpha=0.6, density=True, label=name)
    ax.set_xlabel("root mean squared difference to the nearest training image")
    ax.set_ylabel("density")
    ax.legend(frameon=False, fontsize=8)
    return figure


def class_histogram(shares: dict[str, Tensor], names: Sequence[str]) -> Figure:
    """The share of each class [classes] by group, as bars side by side; 3 % is dotted."""
    figure, ax = subplots(figsize=(7, 2.4), layout="constrained")
    width = 0.8 / len(shares)
    for i, (group, share) in enumerate(shares.items()):
        ax.bar(np.arange(len(names)) + (i - (len(shares) - 1) / 2) * width, share.cpu().numpy(), width, label=group)
    ax.axhline(0.03, color="grey", linestyle=":", linewidth=1)
    ax.set_xticks(range(len(names)), names, rotation=30, ha="right", fontsize=8)
    ax.set_ylabel("share")
    ax.legend(frameon=False, fontsize=8)
    return figure


def bands(curves: dict[str, tuple[np.ndarray, np.ndarray]], xlabel: str, ylabel: str, log: bool = True) -> Figure:
    """Medians over images with the middle 80 % shaded and the worst one dotted, by label.

    Args:
        curves: (x, values): where, [n], and one column an image, [n, B]; arrays or tensors.
        xlabel, ylabel: of the axes.
        log: a logarithmic y axis.
    """
    figure, ax = subplots(figsize=(6.5, 3.4), layout="constrained")
    for i, (label, (x, values)) in enumerate(curves.items()):
        values = np.asarray(values)
        low, middle, high = np.quantile(values, [0.1, 0.5, 0.9], axis=1)
        ax.plot(x, middle, color=f"C{i}", lw=1.6, label=label)
        ax.fill_between(x, low, high, color=f"C{i}", alpha=0.18, lw=0)
        ax.plot(x, np.max(values, axis=1), ":", color=f"C{i}", lw=1)
    ax.set(xlabel=xlabel, ylabel=ylabel, **({"yscale": "log"} if log else {"ylim": (0, None)}))
    ax.legend(frameon=False, fontsize=8)
    return figure


def mixings(pixels: dict[str, np.ndarray], rhos: np.ndarray, deviations: dict[str, np.ndarray]) -> Figure:
    """Left the law of one pixel of z_ρ by label, right the standard deviation of z_ρ against ρ [R] by label."""
    figure, (left, right) = subplots(1, 2, figsize=(9, 3), layout="constrained")
    bins = np.linspace(-1.5, 1.5, 61)
    dashes = ["-", "-", "-", "--"]  # the paper's rule and the spherical one lie on each other
    for i, (label, values) in enumerate(pixels.items()):
        left.hist(values, bins, density=True, histtype="step", lw=1.5, color=f"C{i}", ls=dashes[i % 4], label=label)
    for label, values in deviations.items():
        i = list(pixels).index(label)
        right.plot(rhos, values, color=f"C{i}", lw=1.5, ls=dashes[i % 4], label=label)
    left.set(xlabel="a pixel of z", ylabel="density", ylim=(0, None))
    left.legend(frameon=False, fontsize=8)
    right.set(xlabel="ρ", ylabel="standard deviation", ylim=(0, None))
    return figure


def save(figure: Figure, notebook: str, name: str) -> Figure:
    """Writes figures/<notebook>/<name>.png and .pdf (no dates, so bytes repeat); returns the figure, to be shown."""
    folder = paths.figures() / notebook
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / f"{name}.pdf", metadata={"CreationDate": None})
    figure.savefig(folder / f"{name}.png", dpi=160)
    return figure
