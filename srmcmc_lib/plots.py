"""One function a figure: arrays in, matplotlib Figure out. The only module that imports matplotlib."""

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from torch import Tensor
from torchvision.utils import make_grid

from . import paths
from .data import to_uint8


def _subplots(*args, **kwargs):
    """plt.subplots, but forgotten by pyplot: else a notebook shows a figure once as a value and once more by itself."""
    figure, axes = plt.subplots(*args, **kwargs)
    plt.close(figure)
    return figure, axes


def _show(ax, images: Tensor, columns: int, padding: int = 1) -> None:
    """Draws images [n, C, H, W] in [-1, 1] (floats, clipped as to_uint8 does) as a grid on ax."""
    grid = make_grid(to_uint8(images.detach().cpu()), columns, padding=padding, pad_value=255)
    ax.imshow(grid.permute(1, 2, 0).numpy(), interpolation="nearest")
    ax.set_axis_off()


def image_grid(images: Tensor, columns: int = 8, title: str = "") -> Figure:
    """A grid of images, float [n, C, H, W] in [-1, 1] (figures 2 and 6 at n = 64)."""
    rows = -(-len(images) // columns)
    figure, ax = _subplots(figsize=(0.62 * columns, 0.62 * rows + (0.3 if title else 0)), layout="constrained")
    _show(ax, images, columns)
    ax.set_title(title, fontsize=10)
    return figure


def side_by_side(grids: dict[str, Tensor], columns: int = 8) -> Figure:
    """Several grids next to each other, by title; each float [n, C, H, W] in [-1, 1]."""
    rows = max(-(-len(images) // columns) for images in grids.values())
    size = (0.5 * columns * len(grids), 0.5 * rows + 0.35)
    figure, axes = _subplots(1, len(grids), figsize=size, layout="constrained", squeeze=False)
    for ax, (title, images) in zip(axes[0], grids.items(), strict=True):
        _show(ax, images, columns)
        ax.set_title(title, fontsize=10)
    return figure


def strips(rows: Sequence[Tensor], labels: Sequence[str], title: str = "", split: int | None = None) -> Figure:
    """Rows of images under shared column labels: figure 1 (transition), 3 (interpolation), 4 (reconstruction).

    Args:
        rows: each float [columns, C, H, W] in [-1, 1].
        labels: one a column.
        title: above the figure.
        split: draw a gap before this column, e.g. before the observed images.
    """
    n = len(labels)
    widths = np.insert(np.ones(n), split, 0.25) if split is not None else np.ones(n)
    figure, axes = _subplots(
        len(rows), len(widths), figsize=(0.75 * widths.sum(), 0.75 * len(rows) + 0.42), squeeze=False,
        gridspec_kw={"width_ratios": widths, "wspace": 0.04, "hspace": 0.04},
    )  # fmt: skip
    top = 1 - (0.42 if title else 0.2) / figure.get_figheight()
    figure.subplots_adjust(left=0.01, right=0.99, bottom=0.01, top=top)
    for ax in axes.flat:
        ax.set_axis_off()
    columns = [i for i in range(len(widths)) if i != split]
    for row, images in zip(axes, rows, strict=True):
        for column, image in zip(columns, images, strict=True):
            _show(row[column], image[None], 1, padding=0)
    for column, label in zip(columns, labels, strict=True):
        axes[0, column].set_title(label, fontsize=8)
    figure.suptitle(title, fontsize=10)
    return figure


def training_curves(records: Sequence, steps: int, smooth: int = 25) -> Figure:
    """d and ‖∂f/∂x‖ against the update, each with its running mean.

    Args:
        records: of `train`, or anything with step, d and grad_norm.
        steps: K, for the right axis K·‖∂f/∂x‖, which hardly depends on K (Table 2).
        smooth: updates in the running mean.
    """
    step = np.array([r.step for r in records])
    figure, (left, right) = _subplots(1, 2, figsize=(9, 2.8), layout="constrained")
    window = min(smooth, len(step))
    for ax, values in ((left, [r.d for r in records]), (right, [r.grad_norm for r in records])):
        ax.plot(step, values, color="0.75", lw=0.8)
        mean = np.convolve(values, np.ones(window) / window, "valid")
        ax.plot(step[window - 1 :], mean, color="C0", lw=1.6, label=f"mean of {window}")
        ax.set_xlabel("update")
    left.axhline(0, color="k", lw=0.6)
    left.set_ylabel(r"d = mean f($x^+$) − mean f($x^-$)")
    left.legend(frameon=False, fontsize=8)
    right.set_ylabel(r"$\|\partial f/\partial x\|_2$")
    right.set_ylim(bottom=0)
    twin = right.secondary_yaxis("right", functions=(lambda g: g * steps, lambda g: g / steps))
    twin.set_ylabel(rf"$K \cdot \|\partial f/\partial x\|_2$, K = {steps}")
    return figure


def nearest(samples: Tensor, neighbours: Tensor, distances: Tensor) -> Figure:
    """Samples [n, C, H, W] in the first row, the nearest training images of each [n, k, C, H, W] below it.

    `distances` [n, k] is printed above each neighbour: the root mean squared difference per pixel, range 0 … 2.
    """
    n, k = distances.shape
    figure, axes = _subplots(k + 1, n, figsize=(0.8 * n, 0.98 * (k + 1)), layout="constrained", squeeze=False)
    for j in range(n):
        for i, image in enumerate([samples[j], *neighbours[j]]):
            _show(axes[i, j], image[None], 1, padding=0)
            if i:
                axes[i, j].set_title(f"{distances[j, i - 1]:.2f}", fontsize=7, pad=2)
    axes[0, 0].set_title("samples", fontsize=8, loc="left")
    return figure


def distance_histogram(distances: dict[str, Tensor]) -> Figure:
    """Distances to the nearest training image, by group: samples, held-out images, … (is it memorising?)."""
    figure, ax = _subplots(figsize=(5, 2.6), layout="constrained")
    bins = np.linspace(0, float(max(values.max() for values in distances.values())), 40)
    for name, values in distances.items():
        ax.hist(values.cpu().numpy(), bins, alpha=0.6, density=True, label=name)
    ax.set_xlabel("root mean squared difference to the nearest training image")
    ax.set_ylabel("density")
    ax.legend(frameon=False, fontsize=8)
    return figure


def class_histogram(shares: dict[str, Tensor], names: Sequence[str]) -> Figure:
    """The share of each class [classes] by group, as bars side by side; 3 % is dotted."""
    figure, ax = _subplots(figsize=(7, 2.4), layout="constrained")
    width = 0.8 / len(shares)
    for i, (group, share) in enumerate(shares.items()):
        ax.bar(np.arange(len(names)) + (i - (len(shares) - 1) / 2) * width, share.cpu().numpy(), width, label=group)
    ax.axhline(0.03, color="grey", linestyle=":", linewidth=1)
    ax.set_xticks(range(len(names)), names, rotation=30, ha="right", fontsize=8)
    ax.set_ylabel("share")
    ax.legend(frameon=False, fontsize=8)
    return figure


def laws(x: np.ndarray, laws: dict[str, tuple[str, np.ndarray]], h: np.ndarray) -> Figure:
    """Laws on the line as densities, and their moments E[h] to the right.

    Args:
        x: equidistant points, [n].
        laws: by label, each a matplotlib format such as "r--" and n probabilities; the moments of the first are bars.
        h: the features, [n, d].
    """
    figure, (left, right) = _subplots(1, 2, figsize=(9, 3.2), layout="constrained", width_ratios=[3, 1.3])
    a = np.arange(h.shape[1])
    for label, (style, law) in laws.items():
        (line,) = left.plot(x, law / (x[1] - x[0]), style, label=label)
        hollow = {"mfc": "none"} if line.get_linestyle() != "-" else {}
        if right.patches:
            right.plot(a, law @ h, "o", color=line.get_color(), ms=8, mew=1.5, clip_on=False, **hollow)
        else:
            right.bar(a, law @ h, 0.5, color=line.get_color(), alpha=0.3)
    left.set(xlabel="x", ylabel="density", ylim=(0, None))
    left.legend(frameon=False, fontsize=9)
    right.set_xticks(a, [f"$h_{i + 1}$" for i in a])
    right.set(title="moments E[h]", ylim=(0, None))
    return figure


def omega_theta(steps: int, path: np.ndarray, onward: np.ndarray, data: np.ndarray, others: dict) -> Figure:
    """The poster's figure 1 in the plane where √KL(q‖p_MLE) is the distance from the origin: Θ lies, Ω stands.

    Args:
        steps: K.
        path: positions of the laws of the chain, from p_0 to q_θ, [K + 1, 2].
        onward: from q_θ to p_θ, [k, 2].
        data: the data's position, [2].
        others: for other K the positions of q_θ (small dots on Ω) and p_θ (on Θ), [2, 2].
    """
    figure, ax = _subplots(figsize=(9, 3.8), layout="constrained")
    ax.axhline(0, color="C0", lw=2.5, zorder=1)
    ax.axvline(0, color="k", lw=2.5, zorder=1)
    for k, (q, p) in others.items():
        ax.plot(*q, "o", color="C3", ms=5, mec="w", mew=0.6)
        ax.plot(*p, "o", color="C3", ms=5, mfc="w", mew=0.9)
        if k != steps:
            ax.annotate(f"K = {k}", q, (-8, 0), "data", "offset points", ha="right", va="center", fontsize=7)
    ax.plot(*path.T, ".-", color="C3", ms=4, lw=1.2)
    ax.plot(*onward.T, ":", color="C3", lw=1.6)
    notes = [
        (path[0], "C0", "w", (0, -20), "$p_0$"),
        (data, "k", "k", (-30, 8), "data"),
        (path[-1], "C3", "C3", (14, 8), rf"$q_{{\theta}}$ after K = {steps} steps (MME)"),
        (onward[-1], "C3", "w", (0, -20), r"$p_{\theta}$: the chain run on"),
        (np.zeros(2), "C2", "C2", (-30, -20), "MLE"),
    ]
    for at, edge, face, offset, text in notes:
        ax.plot(*at, "o", ms=10, mec=edge, mfc=face, mew=2, zorder=3)
        ha = "left" if offset[0] > 0 else "center"
        ax.annotate(text, at, offset, "data", "offset points", ha=ha, fontsize=10, color=edge)
    ax.margins(0.09, 0.2)
    ax.annotate(r"Θ: all $p_{\theta}$", path[0] / 2, (0, -16), "data", "offset points", color="C0", fontsize=11)
    top = ax.get_xaxis_transform()
    ax.annotate("Ω: all laws with the data's moments", (0, 1.02), xycoords=top, ha="center", fontsize=11)
    ax.set(xlabel="± √KL(projection on Θ ‖ MLE): how far the moments are off", ylabel="√KL(q ‖ projection on Θ)")
    ax.set_aspect("equal")
    return figure


def divergences(curves: dict[str, dict[int, tuple[float, float]]], unmatched: Sequence[int] = ()) -> Figure:
    """KL and total variation against K: by label, {K: (KL, TV)}; a bar marks each K in `unmatched`."""
    figure, axes = _subplots(1, 2, figsize=(9, 3), layout="constrained", sharex=True)
    for i, (ax, name) in enumerate(zip(axes, ["KL(q ‖ MLE), nats", "total variation"], strict=True)):
        for style, (label, curve) in zip(["C3o-", "C7s--"], curves.items(), strict=False):
            ax.loglog(list(curve), [values[i] for values in curve.values()], style, ms=4, label=label)
        for k in unmatched:
            ax.axvline(k, color="C3", alpha=0.25, lw=6)
            ax.text(
                k, 0.03, f"no θ at K = {k}", rotation=90, ha="center", transform=ax.get_xaxis_transform(), fontsize=7
            )
        ax.set(xlabel="K", title=name)
    axes[0].legend(frameon=False, fontsize=8)
    return figure


def learning_paths(target: np.ndarray, paths: dict[str, np.ndarray]) -> Figure:
    """θ_t of several learnings, [updates + 1, d] by label: θ_1 against θ_2, and the distance to `target` in time."""
    figure, (left, right) = _subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    for color, (label, θ) in zip(["C0", "0.65", "C1"], paths.items(), strict=False):
        left.plot(θ[:, 0], θ[:, 1], "-", color=color, lw=1.5, label=label)
        right.semilogy(np.linalg.norm(θ - target, axis=1), color=color, lw=1.5)
    left.plot(*target[:2], "*", color="C3", ms=14, mec="w", label=r"$\theta_{MME}$, solved")
    left.set(xlabel=r"$\theta_1$", ylabel=r"$\theta_2$")
    left.legend(frameon=False, fontsize=8)
    right.set(xlabel="update t", ylabel=r"$\|\theta_t - \theta_{MME}\|$")
    return figure


def planes(laws: dict[str, np.ndarray]) -> Figure:
    """Laws on the square grid of exact.plane_world, n probabilities each by title, on one square-root colour scale."""
    figure, axes = _subplots(1, len(laws), figsize=(2.3 * len(laws), 2.5), layout="constrained")
    top = max(law.max() for law in laws.values())
    for ax, (title, law) in zip(axes, laws.items(), strict=True):
        side = round(len(law) ** 0.5)
        norm = PowerNorm(0.5, 0, top)
        ax.imshow(law.reshape(side, side).T, norm=norm, origin="lower", extent=(-3, 3, -3, 3), cmap="magma")
        ax.set_title(title, fontsize=10)
        ax.set_xticks([-3, 0, 3])
        ax.set_yticks([-3, 0, 3] if ax is axes[0] else [])
    return figure


def bands(curves: dict[str, tuple[np.ndarray, np.ndarray]], xlabel: str, ylabel: str, log: bool = True) -> Figure:
    """Medians over images with the middle 80 % shaded and the worst one dotted, by label.

    Args:
        curves: (x, values): where, [n], and one column an image, [n, B]; arrays or tensors.
        xlabel, ylabel: of the axes.
        log: a logarithmic y axis.
    """
    figure, ax = _subplots(figsize=(6.5, 3.4), layout="constrained")
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
    figure, (left, right) = _subplots(1, 2, figsize=(9, 3), layout="constrained")
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


def moment_learning(curves: dict[str, np.ndarray], smooth: int = 5) -> Figure:
    """The relative moment error of each update's batch, by label, with running means; dashed where K changes.

    Args:
        curves: anything with "steps" (K) and "relative", [updates] each.
        smooth: updates in the running mean, which starts anew with each K.
    """
    figure, ax = _subplots(figsize=(6.5, 3), layout="constrained")
    for i, (label, curve) in enumerate(curves.items()):
        K, relative = np.asarray(curve["steps"]), np.asarray(curve["relative"])
        ax.semilogy(np.arange(1, len(K) + 1), relative, color=f"C{i}", lw=0.6, alpha=0.5)
        for part in np.split(np.arange(len(K)), np.flatnonzero(np.diff(K)) + 1):
            window = min(smooth, len(part))
            mean = np.convolve(relative[part], np.ones(window) / window, "valid")
            ax.semilogy(part[window - 1 :] + 1, mean, color=f"C{i}", lw=1.6, label=label if part[0] == 0 else None)
            if part[0]:
                ax.axvline(part[0] + 0.5, color=f"C{i}", lw=0.8, ls="--")
    ax.set(xlabel="update", ylabel="relative moment error of a batch")
    ax.legend(frameon=False, fontsize=8)
    return figure


def moment_scatter(matches: dict[str, Sequence]) -> Figure:
    """Every moment: E_q[h_i] against E_data[h_i], before learning (hollow) and after, with ± 4 standard errors.

    Args:
        matches: by title, anything with data, start, reached and error, [d] each.
    """
    figure, axes = _subplots(
        2, len(matches), figsize=(4.4 * len(matches), 6), layout="constrained", squeeze=False, height_ratios=[3, 1.6]
    )
    for (top, bottom), (title, m) in zip(axes.T, matches.items(), strict=True):
        data, start, reached, error = (np.asarray(v) for v in (m.data, m.start, m.reached, m.error))
        ends = np.array([data.min(), data.max()])
        top.plot(ends, ends, color="k", lw=0.8, label="equal")
        top.plot(data, start, "o", color="C0", mfc="none", ms=4, mew=0.8, label="before: $p_0$")
        top.errorbar(data, reached, 4 * error, fmt="o", color="C3", ms=3, elinewidth=1, label=r"after: $q_\theta$")
        top.set(title=title, ylabel=r"$E_{q}[h_i]$", xlabel=r"$E_{data}[h_i]$")
        top.legend(frameon=False, fontsize=8)
        bottom.errorbar(data, reached - data, 4 * error, fmt="o", color="C3", ms=3, elinewidth=1)
        bottom.axhline(0, color="k", lw=0.6)
        bottom.set(xlabel=r"$E_{data}[h_i]$", ylabel="after: difference\n± 4 std. errors")
    return figure


def moment_drift(drifts: dict[str, tuple], images: dict[str, dict[str, Tensor]], columns: int = 4) -> Figure:
    """The relative moment error along the chain, and the images it leads through: the chain is not to be run on.

    Args:
        drifts: by label, (K, steps [n], relative errors [n], of these the part due to chance [n]).
        images: by the same labels, by title, a few images float [m, C, H, W] in [-1, 1].
        columns: images a row of each grid.
    """
    figure = plt.figure(figsize=(9, 3.1 + 1.9 * len(images)), layout="constrained")
    plt.close(figure)
    top, *rows = figure.subfigures(1 + len(images), 1, height_ratios=[3.1] + [1.9] * len(images))
    ax = top.subplots()
    for i, (label, (K, steps, relative, chance)) in enumerate(drifts.items()):
        at = np.asarray(steps) + 1  # the chain's start on a logarithmic axis
        ax.loglog(at, relative, "o-", color=f"C{i}", ms=3.5, lw=1.4, label=f"{label}, K = {K}")
        ax.loglog(at, chance, ":", color=f"C{i}", lw=1)
        ax.axvline(K + 1, color=f"C{i}", lw=0.8, ls="--")
    ax.set(xlabel="steps of the chain + 1", ylabel="relative moment error")
    ax.legend(frameon=False, fontsize=8)
    for row, (label, grids) in zip(rows, images.items(), strict=True):
        row.suptitle(label, fontsize=10)
        for axis, (title, x) in zip(np.atleast_1d(row.subplots(1, len(grids))), grids.items(), strict=True):
            _show(axis, x, columns)
            axis.set_title(title, fontsize=8)
    return figure


def save(figure: Figure, notebook: str, name: str) -> Figure:
    """Writes figures/<notebook>/<name>.png and .pdf (no dates, so bytes repeat); returns the figure, to be shown."""
    folder = paths.figures() / notebook
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / f"{name}.pdf", metadata={"CreationDate": None})
    figure.savefig(folder / f"{name}.png", dpi=160)
    return figure
