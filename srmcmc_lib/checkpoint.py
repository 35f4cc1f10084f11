"""Checkpoint files: one safetensors file with weights and, as JSON metadata, all that is needed to sample again."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from weakref import WeakValueDictionary

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from . import paths

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

FORMAT = 1  # of the metadata
SCHEMA = {"network": dict, "kernel": dict, "prior": dict, "dataset": str, "training": dict}


def write(path: str | Path, meta: dict, tensors: dict[str, Tensor]) -> Path:
    """Writes a temporary file and renames it: an interrupted save leaves the old file. Returns the path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    meta = plain({"format": FORMAT, **meta})
    with aside(path) as part:
        copies = {k: v.detach().cpu().clone().contiguous() for k, v in tensors.items()}  # layers may share one
        save_file(copies, part, {"srmcmc": json.dumps(meta)})
    return path


def plain(meta: dict) -> dict:
    """The same as JSON values: tuples become lists, NumPy's numbers Python's."""
    return json.loads(json.dumps(meta, default=lambda value: value.item()))


def copy(source: str | Path, target: str | Path) -> None:
    """Copies to a temporary file and renames it, so that a killed run leaves no half file."""
    with aside(Path(target)) as part:
        shutil.copyfile(source, part)


@contextmanager
def aside(path: Path) -> Iterator[Path]:
    """Gives a file beside `path` to write to, which becomes `path` at the end and goes away after an error."""
    part = path.with_name(path.name + ".part")
    try:
        yield part
        part.chmod(0o644)  # save_file's own 0600 would hide it from everybody else on a cluster
        part.replace(path)
    except (OSError, SafetensorError, RuntimeError) as error:  # torch.save raises RuntimeErrors
        old = "the last good one stands" if path.exists() else "there is no older one"
        raise OSError(f"{path} could not be written ({error}); {old}: free disk space or give another path") from error
    finally:
        part.unlink(missing_ok=True)


def find(source: str | Path, suffix: str = ".safetensors") -> Path:
    """The file of a model: `source` itself, or the shipped one of that name; FileNotFoundError lists those."""
    for path in (Path(source), paths.PRETRAINED / f"{source}{suffix}"):
        if path.is_file():
            return path
    shipped = sorted(p.stem for p in paths.PRETRAINED.glob(f"*{suffix}") if not p.stem.endswith("_classifier"))
    raise FileNotFoundError(f"no checkpoint {str(source)!r}: there are {shipped}, or give the path of a {suffix} file")


def read(path: Path) -> tuple[dict, dict[str, Tensor]]:
    """The metadata and all tensors of a checkpoint; ValueError where the file is damaged or something else."""
    try:
        with safe_open(path, "pt") as file:
            meta = json.loads((file.metadata() or {})["srmcmc"])
            tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118 (safe_open is no mapping)
    except (SafetensorError, KeyError, ValueError, OSError) as error:
        raise ValueError(f"{path} is damaged or not a ShortRun checkpoint ({type(error).__name__}: {error})") from error
    if isinstance(meta, dict) and meta.get("format") != FORMAT:
        raise ValueError(f"{path} has checkpoint format {meta.get('format')}; this library reads {FORMAT}: update it")
    if not isinstance(meta, dict) or any(not isinstance(meta.get(k), kind) for k, kind in SCHEMA.items()):
        raise ValueError(f"{path} is damaged: its metadata must have {', '.join(SCHEMA)}; take another copy of it")
    return meta, tensors


class Lock:
    """Keeps other processes from a file as long as it lives. The system takes away the lock of a killed process."""

    def __init__(self, path: Path):
        self.path = path.with_name(f".{path.name}.lock")
        self.file = os.open(self.path, os.O_RDWR | os.O_CREAT)
        try:
            fcntl.lockf(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            raise ValueError(f"another process is training to {path}: wait for it, or give another name") from error

    def __del__(self):
        os.close(self.file)


LIVE: WeakValueDictionary[tuple, Lock] = WeakValueDictionary()  # closing one of two would unlock the file for both


def claim(config) -> list[Lock]:
    """Makes the folders of config's checkpoint and log, and locks both for this process, as long as the result lives.

    Raises ValueError for a wrong suffix, a folder, another program's .csv file, and if another process trains to it.
    """
    named = [(Path(p), suffix) for p, suffix in ((config.checkpoint, ".safetensors"), (config.log, ".csv")) if p]
    for path, suffix in named:
        other = suffix == ".csv" and path.is_file() and path.read_bytes()[:7] not in (b"", b"step,d,")
        if path.suffix != suffix or path.is_dir() or other:
            raise ValueError(f"{path} is not a {suffix} file that train may write to: give another name")
        path.parent.mkdir(parents=True, exist_ok=True)
    keys = [(os.getpid(), path.absolute()) for path, _ in named if fcntl]  # a forked process does not inherit locks
    locks = [lock if (lock := LIVE.get(key)) and lock.path.exists() else Lock(key[1]) for key in keys]
    LIVE.update(zip(keys, locks, strict=True))
    return locks
