"""Sliders around the functions of plots.py. The only module that imports ipywidgets."""

from collections.abc import Callable, Sequence

from ipywidgets import SelectionSlider, interactive
from matplotlib.figure import Figure


def slider(draw: Callable[[int], Figure], values: Sequence[int], value: int, label: str = "K") -> interactive:
    """A slider over `values` that starts at `value`, above the figure draw(value).

    It needs a live kernel and leaves nothing in a notebook that is run headlessly: draw the figure itself before it.
    """
    handle = SelectionSlider(options=list(values), value=value, description=label, continuous_update=False)
    return interactive(lambda chosen: draw(chosen), chosen=handle)
