"""Sliders around functions that draw a figure. The only module that imports ipywidgets."""

from collections.abc import Callable, Sequence

from ipywidgets import Button, HBox, Label, SelectionSlider, VBox, interactive
from matplotlib.figure import Figure

SHOW = {"auto_display": True}  # without it, interactive draws the figure and shows nothing


def slider(draw: Callable[[int], Figure], values: Sequence[int], value: int, label: str = "K") -> interactive:
    """A slider over `values` that starts at `value`, above the figure draw(value).

    It needs a live kernel and leaves nothing in a notebook that is run headlessly: draw the figure itself before it.
    """
    handle = SelectionSlider(options=list(values), value=value, description=label, continuous_update=False)
    return interactive(lambda chosen: draw(chosen), SHOW, chosen=handle)


def explore(draw: Callable[..., Figure], seed: int, **scales: tuple[Sequence, object]) -> VBox:
    """Several sliders and a "new seed" button around the figure draw(seed=…, name=value, …).

    A drag redraws at once, so whatever is slow should be computed once a seed (functools.cache) and only be looked up
    by the sliders. As with `slider`, nothing is left in a notebook that is run headlessly.

    Args:
        draw: makes the figure.
        seed: the first; every press adds 1.
        scales: by draw's argument name, the values to choose from and the one to start at.
    """
    handles = {
        name: SelectionSlider(options=list(values), value=value, description=name)
        for name, (values, value) in scales.items()
    }
    box = interactive(lambda **chosen: draw(seed=seed, **chosen), SHOW, **handles)
    button, shown = Button(description="new seed"), Label(f"seed {seed}")

    def press(_) -> None:
        nonlocal seed
        seed += 1
        shown.value = f"seed {seed} …"
        box.update()
        shown.value = f"seed {seed}"

    button.on_click(press)
    return VBox([HBox([button, shown]), box])
