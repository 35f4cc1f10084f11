"""Sliders around functions that draw a figure. The only module that imports ipywidgets.

They need a live kernel and leave nothing in a notebook that is run headlessly: draw and save the figure itself first.
"""

from collections.abc import Callable, Sequence

from ipywidgets import Button, HBox, Label, SelectionSlider, VBox, interactive

SHOW = {"auto_display": True}  # without it, interactive draws the figure but does not show it


def slider(draw: Callable[[int], object], values: Sequence[int], value: int, label: str = "K") -> interactive:
    """A slider over `values` that starts at `value`, above the figure draw(value)."""
    handle = SelectionSlider(options=list(values), value=value, description=label, continuous_update=False)
    return interactive(lambda chosen: draw(chosen), SHOW, chosen=handle)  # draw's argument may have any name


def explore(draw: Callable[..., object], seed: int, **scales: tuple[Sequence, object]) -> VBox:
    """Several sliders and a "new seed" button around the figure draw(seed=…, name=value, …).

    `scales` holds, for each further argument of draw, the values to choose from and the first one. The button adds 1 to
    the seed. A drag redraws at once: compute what is slow once for each seed (functools.cache), and look it up in draw.
    """
    handles = {k: SelectionSlider(options=list(v), value=first, description=k) for k, (v, first) in scales.items()}
    box = interactive(lambda **chosen: draw(seed=seed, **chosen), SHOW, **handles)
    button, shown = Button(description="new seed"), Label(f"seed {seed}")

    def press(_) -> None:
        nonlocal seed
        seed += 1
        shown.value = f"seed {seed} …"  # while it is being computed
        box.update()
        shown.value = f"seed {seed}"

    button.on_click(press)
    return VBox([HBox([button, shown]), box])
