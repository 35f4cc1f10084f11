"""Sliders call the plot function they were given, and what it draws reaches the page."""

import nbformat
import pytest
from nbclient import NotebookClient

from srmcmc_lib import widgets


def test_the_slider_draws_what_is_chosen():
    drawn = []
    box = widgets.slider(drawn.append, [13, 20, 50], 20)
    (handle,) = box.kwargs_widgets
    assert handle.options == (13, 20, 50) and handle.value == 20 and handle.description == "K"
    assert set(drawn) == {20}
    handle.value = 50
    assert drawn[-1] == 50


def test_a_value_off_the_scale_is_refused():
    with pytest.raises(Exception, match="Invalid selection"):
        widgets.slider(print, [13, 20], 21)


def test_sliders_and_the_seed_button_redraw_with_what_is_chosen():
    drawn = []
    box = widgets.explore(lambda **chosen: drawn.append(chosen), 3, ρ=([1.0, 0.5, 0.0], 0.5), k=([0, 10], 10))
    assert drawn[-1] == {"seed": 3, "ρ": 0.5, "k": 10}
    head, sliders = box.children
    button, shown = head.children
    ρ, k = sliders.kwargs_widgets
    ρ.value = 0.0
    assert drawn[-1] == {"seed": 3, "ρ": 0.0, "k": 10}
    button.click()
    assert drawn[-1] == {"seed": 4, "ρ": 0.0, "k": 10} and shown.value == "seed 4"
    k.value = 0
    assert drawn[-1] == {"seed": 4, "ρ": 0.0, "k": 0}


def test_in_a_kernel_a_redraw_shows_the_figure():
    cells = [
        "from srmcmc_lib import plots, widgets; import torch\n"
        "draw = lambda seed, k: plots.image_grid(torch.zeros(2, 1, 4, 4), title=f'{seed} {k}')\n"
        "box = widgets.explore(draw, 0, k=([0, 1], 0)); box",
        "lone = widgets.slider(lambda k: draw(0, k), [0, 1], 0); lone",
        "box.children[1].children[0].value = 1; lone.children[0].value = 1",
        "print([[o['data'].keys() & {'image/png'} for o in b.out.outputs] for b in (box.children[1], lone)])",
    ]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in cells])
    NotebookClient(notebook, kernel_name="python3", timeout=120).execute()
    assert notebook.cells[-1].outputs[0]["text"].strip() == "[[{'image/png'}], [{'image/png'}]]"
