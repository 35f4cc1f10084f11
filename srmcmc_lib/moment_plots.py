"""The figures of moment matching, in the grid world and on images: arrays in, matplotlib Figure out, as in plots.py."""

from collections.abc import Sequence

import numpy as np
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from torch import Tensor

from .plots import draw_grid, subplots


def laws(x: np.ndarray, laws: dict[str, tuple[str, np.ndarray]], h: np.ndarray) -> Figure:
    """Laws on the line as densities over the features h (shaded, not to scale), and their moments E[h] to the right.

    Args:
        x: equidistant points, [n].
        laws: by label, each a matplotlib format such as "r--" and n probabilities; the moments of the first are bars.
        h: the features, [n, d].
    """
    figure, (left, right) = subplots(1, 2, figsize=(9, 3.2), layout="constrained", width_ratios=[3, 1.3])
    a = np.arange(h.shape[1])
    for label, (style, law) in laws.items():
        (line,) = left.plot(x, law / (x[1] - x[0]), style, label=label)
        hollow = {"mfc": "none"} if line.get_linestyle() != "-" else {}
        if right.patches:
            right.plot(a, law @ h, "o", color=line.get_color(), ms=8, mew=1.5, clip_on=False, **hollow)
        else:
            right.bar(a, law @ h, 0.5, color=line.get_color(), alpha=0.3)
    left.set(xlabel="x", ylabel="density", ylim=(0, None))
    for i, bump in enumerate(h.T, start=1):
        height = 0.15 * left.get_ylim()[1] * bump / bump.max()
        left.fill_between(x, height, color="0.5", alpha=0.2, lw=0)
        left.annotate(f"$h_{i}$", (x[bump.argmax()], height.max()), ha="center", fontsize=8, color="0.35")
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
    figure, ax = subplots(figsize=(9, 3.8), layout="constrained")
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
    figure, axes = subplots(1, 2, figsize=(9, 3), layout="constrained", sharex=True)
    for i, (ax, name) in enumerate(zip(axes, ["KL(q ‖ MLE), nats", "total variation"], strict=True)):
        for style, (label, curve) in zip(["C3o-", "C7s--"], curves.items(), strict=False):
            ax.loglog(list(curve), [values[i] for values in curve.values()], style, ms=4, label=label)
        for k in unmatched:
            ax.axvline(k, color="C3", alpha=0.25, lw=6)
            top = ax.get_xaxis_transform()
            ax.text(k, 0.03, f"no θ at K = {k}", rotation=90, ha="center", transform=top, fontsize=7)
        ax.set(xlabel="K", title=name)
    axes[0].legend(frameon=False, fontsize=8)
    return figure


def learning_paths(target: np.ndarray, mle: np.ndarray, paths: dict[str, np.ndarray]) -> Figure:
    """θ_t of several learnings, [updates + 1, d] by label: θ_1 against θ_2, and the distance to `target` in time.

    `target` and `mle`, [d], are the solved θ_MME and θ_MLE.
    """
    figure, (left, right) = subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    for color, (label, θ) in zip(["C0", "0.65", "C1"], paths.items(), strict=False):
        left.plot(θ[:, 0], θ[:, 1], "-", color=color, lw=1.5, label=label)
        right.semilogy(np.linalg.norm(θ - target, axis=1), color=color, lw=1.5)
    left.plot(*target[:2], "*", color="C3", ms=14, mec="w", label=r"$\theta_{MME}$, solved")
    left.plot(*mle[:2], "D", color="C2", ms=7, mec="w", label=r"$\theta_{MLE}$, solved")
    left.set(xlabel=r"$\theta_1$", ylabel=r"$\theta_2$")
    left.legend(frameon=False, fontsize=8)
    right.set(xlabel="update t", ylabel=r"$\|\theta_t - \theta_{MME}\|$")
    return figure


def planes(laws: dict[str, np.ndarray]) -> Figure:
    """Laws on the square grid of exact.plane_world, n probabilities each by title, on one square-root colour scale."""
    figure, axes = subplots(1, len(laws), figsize=(2.3 * len(laws) + 0.7, 2.5), layout="constrained")
    top = max(law.max() for law in laws.values())
    for ax, (title, law) in zip(axes, laws.items(), strict=True):
        side = round(len(law) ** 0.5)
        norm = PowerNorm(0.5, 0, top)
        image = ax.imshow(law.reshape(side, side).T, norm=norm, origin="lower", extent=(-3, 3, -3, 3), cmap="magma")
        ax.set_title(title, fontsize=10)
        ax.set_xticks([-3, 0, 3])
        ax.set_yticks([-3, 0, 3] if ax is axes[0] else [])
    figure.colorbar(image, ax=axes, shrink=0.7, label="probability of a point")
    return figure


def moment_learning(curves: dict[str, dict], smooth: int = 5) -> Figure:
    """The relative moment error of each update's batch, by label, with running means.

    Dashed where K changes, dotted where only the size of the batch does; the new value stands above.

    Args:
        curves: anything with "steps" (K), "batch" (chains) and "relative", [updates] each.
        smooth: updates in the running mean, which starts anew at each of these lines.
    """
    figure, ax = subplots(figsize=(6.5, 3), layout="constrained")
    for i, (label, curve) in enumerate(curves.items()):
        K, m, relative = (np.asarray(curve[name]) for name in ("steps", "batch", "relative"))
        ax.semilogy(np.arange(1, len(K) + 1), relative, color=f"C{i}", lw=0.6, alpha=0.5)
        for part in np.split(np.arange(len(K)), np.flatnonzero(np.diff([K, m]).any(0)) + 1):
            window = min(smooth, len(part))
            mean = np.convolve(relative[part], np.ones(window) / window, "valid")
            ax.semilogy(part[window - 1 :] + 1, mean, color=f"C{i}", lw=1.6, label=label if part[0] == 0 else None)
            if part[0]:
                longer = K[part[0]] != K[part[0] - 1]
                ax.axvline(part[0] + 0.5, color=f"C{i}", lw=0.8, ls="--" if longer else ":")
                note = f"K={K[part[0]]:.0f}" if longer else f"m={m[part[0]]:.0f}"
                at, top = (part[0] + 0.5, 1.02 + 0.06 * i), ax.get_xaxis_transform()
                ax.annotate(note, at, xycoords=top, ha="center", fontsize=6, color=f"C{i}")
    ax.set(xlabel="update", ylabel="relative moment error of a batch")
    ax.legend(frameon=False, fontsize=8)
    return figure


def moment_scatter(matches: dict[str, Sequence]) -> Figure:
    """Every moment: E_q[h_i] against E_data[h_i], before learning (hollow) and after, with ± 4 standard errors.

    Args:
        matches: by title, anything with data, start, reached and error, [d] each.
    """
    figure, axes = subplots(
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
        drifts: by label, (K, parts). Parts are measured on different numbers of chains and drawn one by one, the first
            solid, others dashed; each (steps [n], relative errors [n], of these the part due to chance [n], dotted).
        images: by the same labels, by title, a few images float [m, C, H, W] in [-1, 1].
        columns: images a row of each grid.
    """
    figure = Figure(figsize=(9, 3.1 + 1.9 * len(images)), layout="constrained")
    top, *rows = figure.subfigures(1 + len(images), 1, height_ratios=[3.1] + [1.9] * len(images))
    ax = top.subplots()
    for i, (label, (K, parts)) in enumerate(drifts.items()):
        for j, (steps, relative, chance) in enumerate(parts):
            style, name = ("o--", "") if j else ("o-", f"{label}, K = {K}")
            ax.plot(steps, relative, style, color=f"C{i}", ms=3.5, lw=1.4, label=name)
            ax.plot(steps, chance, ":", color=f"C{i}", lw=1)
        ax.axvline(K, color=f"C{i}", lw=0.8)
    ax.set_xscale("symlog", linthresh=1)  # k = 0, the chain's start, is on it
    ax.set(xlabel="steps k of the chain", ylabel="relative moment error", yscale="log", xlim=(0, None))
    ax.legend(frameon=False, fontsize=8)
    for row, (label, grids) in zip(rows, images.items(), strict=True):
        row.suptitle(label, fontsize=10)
        for axis, (title, x) in zip(np.atleast_1d(row.subplots(1, len(grids))), grids.items(), strict=True):
            draw_grid(axis, x, columns)
            axis.set_title(title, fontsize=8)
    return figure
