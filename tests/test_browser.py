"""In a real browser, sliders and players of JupyterLab, Voilà and the book move the picture. Times and shots are kept.

Skipped without Playwright (pip install .[browser,app]) or a browser (Debian: apt-get install chromium).
"""

import importlib.util
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

playwright = pytest.importorskip("playwright.sync_api", reason="needs Playwright: pip install .[browser]")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="needs a browser (Debian: apt-get install chromium)")
ROOT = Path(__file__).resolve().parent.parent
SHOTS = ROOT / ".cache/screenshots"
NOTEBOOKS = sorted(p.name for p in ROOT.glob("notebooks/*.ipynb"))
SETTINGS = {  # all cells in the page, not only those in view; no news
    "notebook-extension/tracker": {"windowingMode": "none"},
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
}
CHANGES = """selector => { window.changes = 0;  // counts how often the picture changes from now on
    new MutationObserver(() => window.changes++).observe(document.querySelector(selector), {attributes: true}) }"""
SAYS = "text => [...document.querySelectorAll('.widget-label')].some(label => label.innerText.includes(text))"
APP = ("voila", "notebooks/explore.ipynb", *re.findall(r"--TagRemove\S+", (ROOT / "Makefile").read_text()))
PICTURE, CAPTION = ".jupyter-widget-tab img", ".jupyter-widget-tab .widget-label:has-text('middle row')"


@pytest.fixture(scope="module")
def page():
    SHOTS.mkdir(parents=True, exist_ok=True)
    with playwright.sync_playwright() as tools:
        browser = tools.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 1000})
        page.set_default_timeout(120_000)
        yield page
        browser.close()


@pytest.fixture(scope="module")
def serve(tmp_path_factory):
    """Starts a server on copies of the notebooks, which JupyterLab would otherwise save; returns its address."""
    home, servers = tmp_path_factory.mktemp("served"), []
    shutil.copytree(ROOT / "notebooks", home / "notebooks")
    for name, values in SETTINGS.items():
        file = home / f"settings/@jupyterlab/{name}.jupyterlab-settings"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(values))

    def start(*command):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        folders = {f"JUPYTER_{kind}_DIR": str(home / kind) for kind in ("CONFIG", "DATA", "RUNTIME")}
        env = os.environ | folders | {"PYTHONPATH": str(ROOT), "JUPYTER_PREFER_ENV_PATH": "1"}
        command = [sys.executable, "-m", *command, f"--port={port}", "--no-browser"]
        with open(home / f"{port}.log", "w") as log:
            servers.append(subprocess.Popen(command, cwd=home, env=env, stdout=log, stderr=log))
        for _ in range(600):
            assert servers[-1].poll() is None, (home / f"{port}.log").read_text()
            with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=5):
                break
            time.sleep(0.2)
        return f"http://127.0.0.1:{port}"

    yield start
    for server in servers:
        server.terminate()
        server.wait(30)


LAB = ("jupyterlab", "--allow-root", "--IdentityProvider.token=", "--LabApp.user_settings_dir=settings")
lab = pytest.fixture(scope="module")(lambda serve: serve(*LAB))


def use_the_explorer(page, name: str) -> None:
    """Moves ρ and k, step by step and dragging; then reconstructs a test image, a picture and a drawing."""
    handles, picture = page.locator(".jupyter-widget-tab .noUi-handle"), page.locator(PICTURE).first
    page.locator(CAPTION, has_text="k = 30 steps").wait_for()
    page.locator(PICTURE).nth(1).wait_for()
    page.wait_for_timeout(1500)  # then the bar is there as long as the first chains run on
    page.locator(".jupyter-widgets.widget-hprogress").wait_for(state="hidden")
    seconds = {}  # until the new image is there; kept beside the screenshots, for a busy machine is no fault
    for i, shown in enumerate(("ρ = 0.69, k = 30 ", "ρ = 0.69, k = 29 ")):
        before = picture.screenshot()
        handles.nth(i).focus()
        pressed = time.perf_counter()
        page.keyboard.press("ArrowLeft")
        page.wait_for_function(SAYS, arg=shown)
        seconds[shown] = time.perf_counter() - pressed
        page.wait_for_timeout(300)
        assert picture.screenshot() != before
    box = page.locator(".jupyter-widget-tab .noUi-base").nth(0).bounding_box()
    page.evaluate(CHANGES, PICTURE)
    page.mouse.move(box["x"] + 0.69 * box["width"], box["y"] + box["height"] / 2)
    page.mouse.down()
    for i in range(20):
        page.mouse.move(box["x"] + (0.69 - 0.02 * i) * box["width"], box["y"] + box["height"] / 2)
        page.wait_for_timeout(50)
    assert page.evaluate("window.changes") > 2  # the picture follows while the mouse is down
    page.mouse.up()
    value = page.locator(".jupyter-widget-tab .widget-readout").nth(0).inner_text()
    page.locator(CAPTION, has_text=f"ρ = {value}, k = 29 ").wait_for()
    page.wait_for_timeout(300)
    assert f"ρ = {value}, k = 29 " in page.locator(CAPTION).inner_text() and 0.2 < float(value) < 0.4  # the last one
    page.screenshot(path=SHOTS / f"{name}-chain.png")
    (SHOTS / f"{name}-seconds.json").write_text(json.dumps(seconds, ensure_ascii=False))
    page.get_by_role("tab", name="Reconstruct").click()
    page.locator(".widget-label", has_text=re.compile("mean squared error")).wait_for()
    page.wait_for_timeout(2000)
    page.screenshot(path=SHOTS / f"{name}-reconstruct.png")
    shown = page.locator(".jupyter-widget-tab img:visible").first
    changed = "([image, before]) => image.src != before"
    before = shown.get_attribute("src")
    page.get_by_role("button", name="picture", exact=True).click()
    with page.expect_file_chooser() as chooser:
        page.locator(".jupyter-widget-tab .widget-upload").click()
    chooser.value.set_files(SHOTS / f"{name}-chain.png")
    page.wait_for_function(changed, arg=[shown.element_handle(), before])
    if importlib.util.find_spec("ipycanvas"):
        page.get_by_role("button", name="drawing", exact=True).click()
        page.wait_for_timeout(1000)
        page.locator(".jupyter-widgets.widget-hprogress").wait_for(state="hidden")  # of the empty drawing
        box = page.locator(".jupyter-widget-tab canvas").bounding_box()
        page.mouse.move(box["x"] + 40, box["y"] + 60)
        page.mouse.down()
        page.mouse.move(box["x"] + 180, box["y"] + 180, steps=16)
        before = shown.get_attribute("src")
        page.mouse.up()
        page.wait_for_function(changed, arg=[shown.element_handle(), before])
        page.wait_for_timeout(4000)
        page.screenshot(path=SHOTS / f"{name}-drawing.png")


def open_notebook(page, lab, notebook: str) -> None:
    page.goto(f"{lab}/lab/tree/notebooks/{notebook}?reset")
    page.locator(".jp-Notebook .jp-RenderedMarkdown h1").first.wait_for()


def run_cells(page, which: str) -> None:
    page.locator(".jp-Notebook-ExecutionIndicator[data-status=idle]").wait_for()
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name=which, exact=True).click()


def play(page, name: str) -> None:
    player = page.locator(".animation").first
    player.scroll_into_view_if_needed()
    first = player.locator("img").get_attribute("src")
    player.get_by_title("Next frame").click()
    assert player.locator("img").get_attribute("src") != first
    page.screenshot(path=SHOTS / f"{name}-player.png")


@pytest.mark.parametrize("notebook", NOTEBOOKS)
def test_jupyterlab_opens_the_notebook(page, lab, notebook):
    open_notebook(page, lab, notebook)
    assert not page.locator(".jp-Dialog").count()
    page.screenshot(path=SHOTS / f"{notebook.removesuffix('.ipynb')}.png")


def test_explore_in_jupyterlab(page, lab):
    open_notebook(page, lab, "explore.ipynb")
    run_cells(page, "Run All Cells")
    page.locator(PICTURE).nth(1).scroll_into_view_if_needed()
    use_the_explorer(page, "lab")
    play(page, "lab")


def test_sliders_of_02_in_jupyterlab(page, lab):
    open_notebook(page, lab, "02_interpolation.ipynb")
    page.locator(".jp-CodeCell .cm-content", has_text="widgets.explore(draw").click()
    run_cells(page, "Run All Above Selected Cell")
    page.keyboard.press("Control+Enter")
    page.locator(".widget-output img").wait_for()
    changed = "before => ![undefined, before].includes(document.querySelector('.widget-output img')?.src)"
    for i in range(2):  # ρ, k
        before = page.locator(".widget-output img").get_attribute("src")
        page.locator(".noUi-handle").nth(i).focus()
        page.keyboard.press("ArrowLeft")
        page.wait_for_function(changed, arg=before)
    page.screenshot(path=SHOTS / "lab-02.png")


@pytest.mark.skipif(not importlib.util.find_spec("myst_nb"), reason="needs the book's tools: pip install .[book]")
def test_the_book(page):
    subprocess.run(["make", "book"], cwd=ROOT, env=os.environ | {"VIRTUAL_ENV": sys.prefix}, check=True)
    page.goto((ROOT / "build/book/notebooks/02_interpolation.html").as_uri())
    play(page, "book")


@pytest.mark.skipif(not importlib.util.find_spec("voila"), reason="needs Voilà: pip install .[app]")
def test_explore_in_voila(page, serve):
    page.goto(serve(*APP))
    page.locator(PICTURE).first.wait_for()
    assert not page.locator("text=ShortRun.load").count()  # no code
    use_the_explorer(page, "voila")
