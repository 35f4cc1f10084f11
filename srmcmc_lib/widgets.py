"""Sliders around functions that draw a figure, and slow work that a slider can interrupt. Alone imports ipywidgets.

They need a live kernel and leave nothing in a notebook that is run headlessly: draw and save the figure itself first.
"""

import asyncio
from collections.abc import Callable, Iterator, Sequence
from time import perf_counter

from ipywidgets import Button, FloatProgress, HBox, Label, Layout, SelectionSlider, VBox, interactive

SHOW = {"auto_display": True}  # without it, interactive draws the figure but does not show it
SLICE, PAUSE = 0.1, 0.005  # seconds of work, then of listening to the sliders


class Latest:
    """Slow work in slices on the kernel's event loop, without threads: the last `start` wins, a button stops it.

    Work is a generator that yields the part done (0 … 1) every few milliseconds. `show` draws what there is, after each
    slice and at the end. `box` holds a bar and the button, both seen from half a second of work on, and errors.
    """

    def __init__(self, show: Callable[[], object]):
        self.show, self.task, self.error, self.layout = show, None, Label(), Layout(visibility="hidden")
        self.bar = FloatProgress(max=1.0, layout=self.layout)
        self.button = Button(description="stop", layout=self.layout)
        self.button.on_click(lambda _: self.task.cancel())
        self.box = HBox([self.bar, self.button, self.error])

    def start(self, work: Iterator[float]) -> None:
        if self.task:
            self.task.cancel()
        self.task = asyncio.ensure_future(self._run(work))

    async def _run(self, work: Iterator[float]) -> None:
        begun = since = perf_counter()
        self.error.value = ""
        try:
            for done in work:
                if (now := perf_counter()) - since > SLICE:
                    self.bar.value = done
                    self.layout.visibility = "visible" if now - begun > 0.5 else "hidden"
                    self.show()
                    await asyncio.sleep(PAUSE)  # a new start cancels here
                    since = perf_counter()
            self.show()
        except Exception as error:
            self.error.value = f"{type(error).__name__}: {error}"
        finally:
            if self.task is asyncio.current_task():
                self.layout.visibility = "hidden"


def slider(draw: Callable[[int], object], values: Sequence[int], value: int, label: str = "K") -> interactive:
    """A slider over `values` that starts at `value`, above the figure draw(value)."""
    handle = SelectionSlider(options=list(values), value=value, description=label, continuous_update=False)
    return interactive(lambda chosen: draw(chosen), SHOW, chosen=handle)  # draw's argument may have any name


def explore(draw: Callable[..., object], seed: int, **scales: tuple[Sequence, object]) -> VBox:
    """Several sliders and a "new seed" button around the figure draw(seed=…, name=value, …).

    A drag redraws the figure at once, so compute whatever is slow once for each seed (functools.cache), and only look
    it up in draw.

    Each press of the button adds 1 to the seed. `scales` holds, for each further argument of draw, the values to choose
    from and the first value.
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
