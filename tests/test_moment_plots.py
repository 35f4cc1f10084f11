"""Figures are compared by what they draw, as in test_plots.py."""

import numpy as np
import torch

from srmcmc_lib import moment_plots


def test_laws_are_densities_beside_their_moments():
    p, q = np.array([0.25, 0.5, 0.25]), np.array([0.5, 0.5, 0.0])
    h = np.array([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    left, right = moment_plots.laws(np.array([0.0, 0.5, 1.0]), {"p": ("k-", p), "q": ("r--", q)}, h).axes
    assert [line.get_ydata().tolist() for line in left.lines] == [[0.5, 1.0, 0.5], [1.0, 1.0, 0.0]]
    assert [bar.get_height() for bar in right.patches] == [0.25, 0.5]
    (dots,) = right.lines
    assert dots.get_ydata().tolist() == [0.5, 0.5] and dots.get_markerfacecolor() == "none"


def test_omega_theta_names_the_five_laws_where_they_are():
    path, onward = np.array([[-1.0, 0.0], [-0.5, 0.4], [0.0, 0.5]]), np.array([[0.0, 0.5], [0.8, 0.0]])
    others = {k: np.array([[0.0, 1 / k], [2 / k, 0.0]]) for k in (2, 4)}
    (axes,) = moment_plots.omega_theta(2, path, onward, np.array([0.0, 0.45]), others).axes
    at = {text.get_text(): tuple(text.xy) for text in axes.texts if text.get_text()}
    assert at["$p_0$"] == (-1.0, 0.0) and at["data"] == (0.0, 0.45) and at["MLE"] == (0.0, 0.0)
    assert at[r"$q_{\theta}$ after K = 2 steps (MME)"] == (0.0, 0.5)
    assert at[r"$p_{\theta}$: the chain run on"] == (0.8, 0.0)
    assert "K = 4" in at and "K = 2" not in at  # K itself is the large dot
    assert axes.get_aspect() == 1  # distances in the drawing mean something


def test_divergences_mark_the_unmatched():
    figure = moment_plots.divergences({"a": {20: (0.1, 0.2), 50: (0.05, 0.1)}, "b": {5: (0.3, 0.4)}}, unmatched=[5])
    for axes, values in zip(figure.axes, ([0.1, 0.05], [0.2, 0.1]), strict=True):
        assert axes.lines[0].get_ydata().tolist() == values and axes.lines[1].get_xdata().tolist() == [5]
        assert [text.get_text() for text in axes.texts] == ["no θ at K = 5"]


def test_learning_paths_draw_θ_and_its_distance():
    walk = np.array([[0.0, 0.0], [3.0, 3.0]])
    left, right = moment_plots.learning_paths(np.array([3.0, 4.0]), np.array([1.0, 2.0]), {"a": walk}).axes
    assert [line.get_xydata().tolist() for line in left.lines] == [walk.tolist(), [[3.0, 4.0]], [[1.0, 2.0]]]
    assert right.lines[0].get_ydata().tolist() == [5.0, 1.0]


def test_planes_share_one_scale_and_put_the_first_axis_across():
    law = np.zeros(9)
    law[2] = 1.0  # x = (-3, 3): the first axis of plane_world is x_1
    left, right, _ = moment_plots.planes({"a": law, "b": np.full(9, 1 / 9)}).axes  # the third is the colour bar's
    assert left.images[0].get_array()[2, 0] == 1.0 and left.images[0].origin == "lower"
    assert left.images[0].get_clim() == right.images[0].get_clim() == (0, 1)


def test_learning_is_dashed_where_k_changes_and_dotted_where_only_the_batch_does():
    relative = np.array([1.0, 0.5, 0.4, 0.3, 0.2, 0.1])
    curve = {"steps": [20, 20, 50, 50, 50, 50], "batch": [8, 8, 16, 16, 24, 24], "relative": relative}
    (axes,) = moment_plots.moment_learning({"a": curve}, smooth=2).axes
    raw, *means = [line for line in axes.lines if line.get_linestyle() == "-"]
    assert raw.get_xydata().tolist() == [[i + 1, r] for i, r in enumerate(relative)]
    assert [mean.get_xdata().tolist() for mean in means] == [[2], [4], [6]]
    np.testing.assert_allclose([mean.get_ydata()[0] for mean in means], [0.75, 0.35, 0.15])
    marks = {line.get_linestyle(): line.get_xdata() for line in axes.lines if line.get_linestyle() != "-"}
    assert marks == {"--": [2.5, 2.5], ":": [4.5, 4.5]}
    assert {text.get_text(): text.xy[0] for text in axes.texts} == {"K=50": 2.5, "m=24": 4.5}


def test_drift_draws_each_part_where_it_was_measured():
    parts = [([0, 5, 10], [1.0, 0.5, 0.1], [0.1, 0.1, 0.1]), ([20, 40], [0.6, 2.0], [0.3, 0.3])]
    x = torch.linspace(-1, 1, 2 * 16).view(2, 1, 4, 4)
    figure = moment_plots.moment_drift({"a": (10, parts)}, {"a": {"0 steps": x, "10 steps": -x}})
    top, *grids = (axes for sub in figure.subfigs for axes in sub.axes)
    found = [line.get_xydata().T.tolist() for line in top.lines]
    drawn = [[steps, y] for steps, error, chance in parts for y in (error, chance)]
    assert found == [*drawn, [[10, 10], [0, 1]]]  # the last is K
    assert top.get_xscale() == "symlog"  # else the chain's start would be missing
    assert [axes.get_title() for axes in grids] == ["0 steps", "10 steps"]
