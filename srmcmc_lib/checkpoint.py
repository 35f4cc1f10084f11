"""Checkpoint files: one safetensors file with weights and, as JSON metadata, all that is needed to sample again."""

import json
import shutil
from importlib.metadata import PackageNotFoundError, version
from inspect import signature
from pathlib import Path
from tempfile import TemporaryFile

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from . import paths

FORMAT = 1  # of the metadata
NEEDED = {"network", "kernel", "prior", "value_range", "dataset", "training"}


def write(path: str | Path, meta: dict, tensors: dict[str, Tensor]) -> Path:
    """Writes aside and renames, so that an interrupted save leaves the old file; returns the path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    meta = {"format": FORMAT, "library": installed("srmcmc"), **meta}
    aside = path.with_name(path.name + ".part")
    tensors = {k: v.detach().contiguous().cpu() for k, v in tensors.items()}
    save_file(tensors, aside, {"srmcmc": json.dumps(meta)})
    aside.chmod(0o644)  # save_file's own 0600 would hide it from everybody else on a cluster
    aside.replace(path)
    return path


def check_writable(path: str | Path) -> None:
    """OSError where `path` could not be written; makes its folder."""
    folder = Path(path).parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(f"checkpoint {path} cannot be written ({error}): give a file in a folder that can") from error


def find(source: str | Path, suffix: str = ".safetensors") -> Path:
    """The file of a checkpoint, or with ".yaml" of a recipe: `source` itself, or a shipped one of that name."""
    for path in (Path(source), paths.PRETRAINED / f"{source}{suffix}"):
        if path.is_file():
            return path
    shipped = sorted(p.stem for p in paths.PRETRAINED.glob(f"*{suffix}") if not p.stem.endswith("_classifier"))
    what = "recipe" if suffix == ".yaml" else "checkpoint"
    raise FileNotFoundError(f"no {what} {str(source)!r}: there are {shipped}, or give the path of a {suffix} file")


def copy(source: str | Path, target: Path) -> None:
    """Copies aside and renames, so that a run killed meanwhile leaves no half file."""
    aside = target.with_suffix(".part")
    shutil.copyfile(source, aside)
    aside.replace(target)


def read(path: Path) -> tuple[dict, dict[str, Tensor]]:
    """The metadata and all tensors of a checkpoint; ValueError where the file is damaged or something else."""
    try:
        with safe_open(path, "pt") as file:
            meta = json.loads((file.metadata() or {})["srmcmc"])
            tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118 (safe_open is no mapping)
        if not isinstance(meta, dict):
            raise ValueError("its metadata are no record")
    except (SafetensorError, KeyError, ValueError, OSError) as error:
        raise ValueError(f"{path} is damaged or not a ShortRun checkpoint ({type(error).__name__}: {error})") from error
    if meta.get("format") != FORMAT:
        raise ValueError(f"{path} has checkpoint format {meta.get('format')}; this library reads {FORMAT}: update it")
    if missing := NEEDED - meta.keys():
        raise ValueError(f"{path} is damaged: its metadata lack {', '.join(sorted(missing))}")
    return meta, tensors


def rebuilt(path: Path, config: dict, classes: dict[str, type]):
    """The object that a checkpoint's metadata describe, every argument given; ValueError where they are damaged."""
    arguments = dict(config)
    try:
        made = classes[arguments.pop("class")]
        wanted = {p.name for p in signature(made).parameters.values()}
        if arguments.keys() != wanted:
            raise ValueError(f"it needs {sorted(wanted)} and has {sorted(arguments)}")
        return made(**arguments)
    except (KeyError, TypeError, ValueError) as error:
        what = " or ".join(classes)
        raise ValueError(f"{path} is damaged: its metadata {config} describe no {what} ({error})") from error


def installed(package: str) -> str:
    """The version of a package."""
    try:
        return version(package)
    except PackageNotFoundError:  # the library used from the checkout
        return "unknown (not installed)"
