"""Runs a notebook with the parameters of a file; its folder of figures is replaced only if all cells succeed."""

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import nbconvert
import nbformat
import papermill
import yaml
from parameters import Mistake, check, merged, read

ROOT = Path(__file__).resolve().parents[2]
HOME = Path(os.environ.get("SRMCMC_HOME", ROOT)).expanduser()
FIGURES = Path(os.environ.get("SRMCMC_FIGURES", HOME / "figures")).expanduser()
WIDGET = "application/vnd.jupyter.widget-view+json"
KERNEL = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}


def run(notebook: Path, file: Path, overrides: dict, variant: str, cell_timeout: int) -> Path:
    """Returns the notebook's folder: figures, HTML, executed notebook, manifest.json, and the stamp .done."""
    entry, entries = f"{notebook.stem}@{variant}" if variant else notebook.stem, read(file)[0]
    if entry not in entries:
        raise Mistake(f"{file} has no entry {entry!r}; it has: {', '.join(entries)}")
    values = merged(notebook, f"{file}: {entry}", entries[entry]) | overrides
    group = "custom" if overrides else "" if file.stem == "cpu" else file.stem  # those of cpu are committed
    folder, so_far, started = FIGURES / group / entry, FIGURES / group / f"{entry}.failed.ipynb", time.perf_counter()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{entry}.") as aside:  # same disk: a rename will do
        (fresh := Path(aside) / notebook.stem).mkdir()
        executed = execute(notebook, so_far, entries[entry] | overrides, aside, cell_timeout)
        import torch  # not above, because --check and the Snakefile need not wait for it

        manifest = {
            "notebook": notebook.stem, "profile": file.stem, "variant": variant, "parameters": values,
            "seconds": round(time.perf_counter() - started, 1), "threads": torch.get_num_threads(),
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU",
            "versions": {"python": platform.python_version()} | {p: version(p) for p in ("torch", "numpy")},
            "commit": commit(),
        }  # fmt: skip
        (fresh / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
        nbformat.write(executed, fresh / notebook.name)
        (fresh / f"{notebook.stem}.html").write_text(nbconvert.HTMLExporter().from_notebook_node(executed)[0], "utf-8")
        (fresh / ".done").touch()
        if folder.exists():
            folder.rename(Path(aside) / ".last")
        fresh.rename(folder)
    so_far.unlink(missing_ok=True)
    return folder


def execute(notebook: Path, output: Path, values: dict, figures: str, cell_timeout: int) -> nbformat.NotebookNode:
    """The executed notebook, without what differs from run to run; papermill also writes `output` as it goes."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    os.environ |= {"SRMCMC_FIGURES": str(Path(figures).resolve()), "PYTHONPATH": path, "JUPYTER_PREFER_ENV_PATH": "1"}
    try:
        nb = papermill.execute_notebook(
            notebook, output, values, kernel_name="python3", cwd=notebook.parent, execution_timeout=cell_timeout,
            start_timeout=300, progress_bar=sys.stderr.isatty(), extra_arguments=["--log-level=ERROR"],
        )  # fmt: skip
    except (Exception, KeyboardInterrupt) as error:  # a cell's own error, a time-out, a dead kernel or Ctrl-C
        raise Mistake(f"{notebook} failed; so far: {output}\n{type(error).__name__}: {error}".rstrip()) from None
    nb.metadata = {"kernelspec": KERNEL, "language_info": {"name": "python"}}
    for cell in nb.cells:
        for key in ("papermill", "execution", *([] if cell.metadata.get("tags") else ["tags"])):
            cell.metadata.pop(key, None)
        if cell.cell_type == "code":  # without their state, on which GitHub fails, widgets show nothing
            cell.outputs = [o for o in cell.outputs if "data" not in o or (o["data"] and WIDGET not in o["data"])]
    return nbformat.from_dict(nb)


def commit() -> str:
    """The revision of this checkout, and whether files other than figures differ from it; empty without git."""
    words = "git rev-parse --verify -q HEAD && (git diff --quiet HEAD -- . ':!figures' || echo with changes)"
    return " ".join(subprocess.run(words, shell=True, cwd=ROOT, capture_output=True, text=True).stdout.split())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("notebook", nargs="*", type=Path)
    parser.add_argument("--parameters", type=Path, default=HOME / "workflow/parameters/cpu.yaml", metavar="FILE")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--variant", default="", help="for an entry NOTEBOOK@VARIANT")
    parser.add_argument("--cell-timeout", type=int, default=3600, metavar="SECONDS")
    parser.add_argument("--check", action="store_true", help="check all entries, run nothing")
    parser.add_argument("--in-place", action="store_true", help="run with the defaults, store the outputs")
    args = parser.parse_args()
    if args.cell_timeout < 1 or not (args.check or args.notebook) or (args.in_place and args.overrides):
        parser.error("name a notebook, and a cell time-out of at least 1 second; --in-place takes no --set")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the folder aside and the kernel go too
    if args.check:
        print(f"{args.parameters}: {len(check(args.parameters, HOME / 'notebooks'))} runs, all parameters known")
    words = (text.partition("=") for text in args.overrides)
    overrides = {name: yaml.safe_load(value) if value else "" for name, _, value in words}  # YAML: nothing is None
    for notebook in args.notebook:
        merged(notebook, "--set", overrides)
    for notebook in [] if args.check else args.notebook:
        if args.in_place:
            written, so_far = notebook, Path(tempfile.gettempdir()) / notebook.name
            with tempfile.TemporaryDirectory() as aside:  # its figures are thrown away
                nbformat.write(execute(notebook, so_far, {}, aside, args.cell_timeout), notebook)
        else:
            written = run(notebook, args.parameters, overrides, args.variant, args.cell_timeout)
        print(f"{notebook}: done, written to {written}", file=sys.stderr)


if __name__ == "__main__":
    main()
