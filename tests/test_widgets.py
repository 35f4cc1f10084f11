"""Sliders call the plot function they were given, and what it draws reaches the page; slow work can be interrupted."""

import asyncio
import json
import time
from pathlib import Path

import nbformat
import torch
from nbclient import NotebookClient

from srmcmc_lib import EnergyNet, Langevin, ShortRun, plots, widgets

EXPLORE = json.loads((Path(__file__).resolve().parent.parent / "notebooks/explore.ipynb").read_text())


def test_sliders_and_the_seed_button_redraw_with_what_is_chosen():
    drawn = []
    (handle,) = widgets.slider(drawn.append, [13, 20, 50], 20).kwargs_widgets
    handle.value = 50
    assert handle.options == (13, 20, 50) and handle.description == "K" and drawn[0] == 20 and drawn[-1] == 50
    box = widgets.explore(lambda **chosen: drawn.append(chosen), 3, ρ=([1.0, 0.5, 0.0], 0.5), k=([0, 10], 10))
    assert drawn[-1] == {"seed": 3, "ρ": 0.5, "k": 10}
    (button, shown), (ρ, k) = box.children[0].children, box.children[1].kwargs_widgets
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


def latest_class() -> type:
    space = {}
    for cell in EXPLORE["cells"]:
        if cell["id"] in ("imports", "latest"):
            exec("".join(cell["source"]), space)
    return space["Latest"]


def slow(log: list, name: str, pieces: int = 40):
    for i in range(pieces):
        time.sleep(0.01)
        log.append((name, i))
        yield i / pieces


def test_the_last_work_wins_and_begins_soon():
    log, shown = [], []

    async def drag():
        latest = latest_class()(lambda: shown.append(log[-1]))
        latest.start(slow(log, "first"))
        await asyncio.sleep(0.15)
        latest.start(slow(log, "second"))
        await asyncio.sleep(0.15)
        latest.start(slow(log, "last"))
        await latest.task
        return latest

    latest = asyncio.run(drag())
    names = [name for name, _ in log]
    assert names == sorted(names, key=["first", "second", "last"].index), "stale work goes on after newer work"
    assert 0 < names.count("first") < 40 and 0 < names.count("second") < 40 and names.count("last") == 40
    assert shown[-1] == ("last", 39) and {"first", "second"} < {name for name, _ in shown}
    assert latest.bar.layout.visibility == "hidden"


def test_the_button_stops_long_work_and_errors_are_told():
    async def press():
        latest, log = latest_class()(lambda: None), []
        latest.start(slow(log, "long", 10_000))
        while latest.bar.layout.visibility == "hidden":
            await asyncio.sleep(0.01)
        assert len(log) > 5 and 0 < latest.bar.value < 10
        latest.button.click()
        await asyncio.wait([latest.task])
        assert latest.task.cancelled() and latest.bar.layout.visibility == "hidden"
        latest.start(1 / 0 for _ in range(1))
        await latest.task
        return latest.error.value

    assert asyncio.run(press()) == "ZeroDivisionError: division by zero"


def test_a_player_holds_all_frames_and_needs_no_network():
    html = plots.player(plots.image_grid(torch.full((2, 1, 8, 8), level), 2) for level in (-1.0, 0.0, 1.0)).data
    assert html.count("data:image/jpeg;base64,") == 3 and "http" not in html and "fa-" not in html
    assert 'title="Play"' in html and len(html) < 50_000


def test_the_explorer_agrees_with_the_library_and_takes_other_models(tmp_path):
    """Its chain is trajectory's, also at the two ends; its reconstruction is reconstruct's; a late k is looked up."""
    colour = ShortRun(EnergyNet(3, 16, 2), Langevin(3)).save(tmp_path / "colour.safetensors")
    cells = [c for c in EXPLORE["cells"] if c["cell_type"] == "code"]
    space = {}

    async def use():
        for cell in cells:
            exec("".join(cell["source"]), space)
            if "parameters" in cell["metadata"].get("tags", []):
                space.update(images=2, iterations=3)
            if cell["id"] == "imports":
                space["plots"] = type("Plots", (), vars(plots) | {"player": staticmethod(lambda frames: None)})
        now, latest = space["now"], space["latest"]
        await latest.task
        space["noise"].value = True
        space["ρ"].value = 0.5
        await latest.task
        space["k"].value = 31
        assert latest.task.done() and "k = 31" in space["caption"].value
        space["tabs"].selected_index = 1
        await latest.task
        assert not latest.error.value
        found = now.model, now.walks, now.fit
        space["file"].value = str(tmp_path / "none.safetensors")
        assert "no checkpoint" in latest.error.value and now.model is found[0]
        space["file"].value = str(colour)
        await latest.task
        assert "data set '' is unknown" in latest.error.value  # it names no test images
        space["source"].value = "drawing"
        await latest.task
        assert now.fit.x.shape == (1, 3, 16, 16) and len(now.fit.M) == 4 and not latest.error.value
        space["tabs"].selected_index = 0
        await latest.task
        assert space["k"].value == 3 and len(now.walks[1].states) == 31 and not latest.error.value
        space["which"].value = "moments_shallow"
        assert not space["file"].value and now.model.kernel.steps == space["k"].value > 3
        latest.task.cancel()
        return found

    model, (first, middle, last), fit = asyncio.run(use())
    z1, z2 = model.draw_z(2, 1), model.draw_z(2, 2)
    for walk, z in ((first, z1), (middle, 0.5 * z1 + 0.75**0.5 * z2), (last, z2)):
        *_, x = model.with_steps(40).trajectory(z, 1)
        assert len(walk.states) == 301 and (walk.states[40].int() - plots.to_uint8(x).int()).abs().max() <= 1
    torch.testing.assert_close(torch.tensor(fit.errors), model.reconstruct(fit.x, 3, seed=1).errors[:, 0])
