"""Runs a notebook headlessly with a profile's parameters; its figures are replaced only if it succeeds.

python -m srmcmc_lib.runner notebooks/01_synthesis.ipynb --profile profiles/cpu.yaml --set seed=1
python -m srmcmc_lib.runner notebooks/01_synthesis.ipynb --profile profiles/paper.yaml --variant cifar10
python -m srmcmc_lib.runner --check --profile profiles/cpu.yaml      # all of a profile, nothing is run
python -m srmcmc_lib.runner --in-place notebooks/*.ipynb             # refresh the committed outputs
"""

import argparse
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import nbformat
import torch
import yaml

from . import paths
from .checkpoint import installed
from .profiles import Loader, ProfileError, check, defaults, join, parameters, planned

DEFAULT_PROFILE = "cpu"  # its figures are committed; those of other profiles go to figures/<profile>/
WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"


class NotebookFailed(RuntimeError):
    """A cell failed; says which one, and where the executed notebook is."""


def target(notebook: Path, profile: Path, overrides: dict | None = None, variant: str = "") -> Path:
    """The folder of a notebook's figures: the committed one only for the default profile without any --set."""
    custom = ["custom"] if overrides else [] if profile.stem == DEFAULT_PROFILE else [profile.stem]
    return paths.figures().joinpath(*custom, join(notebook, variant))


def run(
    notebook: Path, profile: Path, overrides: dict | None = None, cell_timeout: int = 3600, variant: str = ""
) -> Path:
    """Executes one notebook and swaps in its folder of figures, which also gets the executed notebook, its HTML and
    manifest.json.

    Args:
        notebook: its working directory is the folder it lies in, as in JupyterLab and under nbval.
        profile: a YAML file with an entry for this notebook.
        overrides: parameters that go before the profile's.
        cell_timeout: seconds for one cell.
        variant: takes the profile's entry NOTEBOOK@VARIANT.

    Returns:
        The folder.

    Raises:
        ProfileError: before anything runs.
        NotebookFailed: the last good figures stay; the executed notebook is beside them as NN_name.failed.ipynb.
    """
    from nbconvert import HTMLExporter  # here, because `--check` and the Snakefile needn't wait for it

    plan, name = planned(notebook, profile, overrides, variant), notebook.stem
    values, folder = parameters(notebook, profile, overrides, variant), target(notebook, profile, overrides, variant)
    changed = {k: v for k, v in values.items() if v != defaults(notebook)[k]}
    folder.parent.mkdir(parents=True, exist_ok=True)
    failed = folder.parent / f"{folder.name}.failed.ipynb"
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{name}.") as aside:  # same disk: a rename will do
        fresh = Path(aside) / name
        fresh.mkdir()
        git, started = _git(), time.perf_counter()
        try:
            executed = _execute(notebook, fresh / f"{name}.ipynb", changed, Path(aside), cell_timeout)
            strays = sorted(p.name for p in Path(aside).iterdir() if p != fresh)
            if strays:
                raise NotebookFailed(f"{name} saved figures as {strays}; plots.save must be given {name!r}")
        except NotebookFailed as error:
            if (fresh / f"{name}.ipynb").exists():
                shutil.move(fresh / f"{name}.ipynb", failed)
            kept = f"the last good figures stay in {folder}" if folder.exists() else "there are no earlier figures"
            raise NotebookFailed(f"{error}\n  executed so far: {failed}\n  {kept}") from error
        manifest = plan | {
            "seed": plan["parameters"].get("seed"),
            "seconds": round(time.perf_counter() - started, 1),
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU",
            "threads": torch.get_num_threads(),
            "python": platform.python_version(),
            "versions": {package: installed(package) for package in ("srmcmc", "torch", "numpy")},
            "git": git,
        }
        nbformat.write(executed, fresh / f"{name}.ipynb")
        html, _ = HTMLExporter().from_notebook_node(executed)
        (fresh / f"{name}.html").write_text(html, encoding="utf-8")
        manifest = json.dumps(manifest, indent=1, ensure_ascii=False)
        (fresh / "manifest.json").write_text(manifest + "\n", encoding="utf-8")
        if folder.exists():
            folder.rename(Path(aside) / ".last")
        fresh.rename(folder)
    failed.unlink(missing_ok=True)
    return folder


def refresh(notebook: Path, cell_timeout: int = 3600) -> None:
    """Executes a notebook with its defaults and writes its outputs back; its figures are thrown away."""
    with tempfile.TemporaryDirectory() as aside:
        nbformat.write(_execute(notebook, Path(aside) / notebook.name, {}, Path(aside), cell_timeout), notebook)


def _execute(notebook: Path, output: Path, changed: dict, figures: Path, cell_timeout: int) -> nbformat.NotebookNode:
    """Runs the cells with $SRMCMC_FIGURES = figures; the executed notebook, cleaned, or NotebookFailed."""
    import papermill
    from ipykernel.kernelspec import make_ipkernel_cmd
    from jupyter_client import AsyncKernelManager
    from jupyter_client.kernelspec import KernelSpec

    path = os.pathsep.join(p for p in (str(paths.PACKAGE.parent), os.environ.get("PYTHONPATH")) if p)
    env = {"SRMCMC_FIGURES": str(figures.resolve()), "PYTHONPATH": path}

    argv = [*make_ipkernel_cmd(), "--log-level=ERROR"]  # it warns of every connection over TCP

    class ThisPython(AsyncKernelManager):
        """Whatever kernelspec the notebook names or the user has installed, the kernel is this very interpreter."""

        kernel_spec = KernelSpec(argv=argv, env=env, display_name="Python 3", language="python")

    try:
        papermill.execute_notebook(
            notebook, output, changed, kernel_name="python3", kernel_manager_class=ThisPython, cwd=notebook.parent,
            execution_timeout=cell_timeout, start_timeout=300, progress_bar=sys.stderr.isatty(),
        )  # fmt: skip
    except Exception as error:  # a cell's own error, a time-out or a dead kernel, each with its class
        raise NotebookFailed(f"{notebook} failed{_where(output, error)}") from error
    return _clean(nbformat.read(output, 4))


def _where(output: Path, error: Exception) -> str:
    """' in cell In [3] (the line): the error', as far as it is known."""
    line = None
    if hasattr(error, "ename"):  # raised by the cell itself
        said = f"{error.ename}: {error.evalue}"
        line = re.search(r"^-+> *\d+ (.*)$", str(error), re.MULTILINE)  # IPython's arrow; the first is the cell's
    else:
        said = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    cells = nbformat.read(output, 4).cells if output.exists() else []
    begun = [c for c in cells if c.metadata.get("papermill", {}).get("status") in ("running", "failed", "completed")]
    if not begun:
        return f": {said}"
    count = getattr(error, "exec_count", None) or begun[-1].get("execution_count") or " "
    line = line[1] if line else next(iter(begun[-1].source.strip().splitlines()), "")
    return f" in cell In [{count}] ({line.strip()}): {said}"


def _clean(nb: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Drops what differs from run to run, and widgets: without their state (GitHub fails on it) they show nothing."""
    nb.metadata = {
        "kernelspec": {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    for cell in nb.cells:
        for key in ("papermill", "execution"):
            cell.metadata.pop(key, None)
        if not cell.metadata.get("tags", True):
            del cell.metadata["tags"]
        if cell.cell_type == "code":
            cell.outputs = [o for o in cell.outputs if WIDGET_VIEW not in o.get("data", {})]
    return nbformat.from_dict(nb)


def _git() -> dict | None:
    """Revision, and whether the tree differs from it (figures aside: the notebooks before this one changed those)."""

    def say(*words):
        return subprocess.run(["git", *words], cwd=paths.home(), capture_output=True, text=True, check=True).stdout

    try:
        dirty = bool(say("status", "--porcelain", "--", ".", ":!figures").strip())
        return {"revision": say("rev-parse", "HEAD").strip(), "dirty": dirty}
    except (OSError, subprocess.CalledProcessError):  # no git, or not a checkout
        return None


def _assignment(text: str) -> tuple[str, object]:
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"--set takes name=value, got {text!r}")
    try:
        return name.strip(), yaml.load(value, Loader) if value else ""  # YAML reads nothing as None
    except yaml.YAMLError as error:
        raise argparse.ArgumentTypeError(f"--set {text}: the value can't be read: {error}") from None


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m srmcmc_lib.runner", description=__doc__.splitlines()[0])
    parser.add_argument("notebook", nargs="*", type=Path)
    parser.add_argument("--profile", type=Path, default=paths.home() / "profiles" / f"{DEFAULT_PROFILE}.yaml")
    parser.add_argument("--set", dest="overrides", action="append", default=[], type=_assignment, metavar="NAME=VALUE")
    parser.add_argument("--variant", default="", help="of a notebook that the profile lists as NOTEBOOK@VARIANT")
    parser.add_argument("--cell-timeout", type=int, default=3600, metavar="SECONDS")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--check", action="store_true", help="validate the whole profile, run nothing")
    what.add_argument("--in-place", action="store_true", help="run with the defaults, write the outputs back")
    options = parser.parse_args(argv)
    if not options.check and not options.notebook:
        parser.error("name a notebook")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the folder aside and the kernel go too
    try:
        if options.check:
            found = check(options.profile, paths.home() / "notebooks")
            print(f"{options.profile}: {len(found)} runs of notebooks, all parameters known")
        for notebook in () if options.check else options.notebook:
            print(f"{notebook}: running", file=sys.stderr, flush=True)
            started = time.perf_counter()
            where = notebook
            if options.in_place:
                refresh(notebook, options.cell_timeout)
            else:
                where = run(notebook, options.profile, dict(options.overrides), options.cell_timeout, options.variant)
            print(f"{notebook}: {time.perf_counter() - started:.0f} s, written to {where}", file=sys.stderr)
    except (ProfileError, NotebookFailed) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ProfileError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
