"""What a stopped training run needs to go on as if it had never stopped, and the log of its updates."""

import copy
import csv
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, astuple, dataclass, fields, replace
from pathlib import Path

import torch
from torch import Tensor

from . import checkpoint
from .devices import ranks
from .shortrun import ShortRun

WATCHED = 20  # updates over which `training.alarm` averages
MAY_CHANGE = {"updates", "horizon", "checkpoint", "checkpoint_every", "log", "progress", "precision", "alarm"}


@dataclass(frozen=True)
class Record:
    """What one update of Algorithm 1 saw; yielded after the update."""

    step: int  # updates done so far, from 1
    d: float  # mean f(x⁺) − mean f(x⁻) before the update; swings around a value a little above 0 in a healthy run
    grad_norm: float  # ‖∂f/∂x‖₂ of an image, mean over batch and steps; K times it is 39 … 49 in the paper's Table 2
    rate: float  # η
    sigma: float  # σ
    seconds: float  # spent in training so far, earlier runs included


class Progress:
    """θ, Adam, mean θ, the number of updates, seconds, the alarm's ratios. Only its own methods write to it."""

    def __init__(self, model: ShortRun, config, images: Sequence):
        self.model, self.config, self.step, self.seconds = model, config, 0, 0.0
        self.resumes = False  # are the files of this name this run's own?
        self.theta = [p for p in model.f.parameters() if p.requires_grad]
        self.adam = torch.optim.Adam(self.theta, lr=config.rate)
        self.averaged = copy.deepcopy(model.f) if config.average else model.f  # mean θ, which checkpoints hold
        self.ratios: deque[float] = deque(maxlen=WATCHED)
        shared = {k: v for k, v in asdict(config).items() if k not in MAY_CHANGE} | model.config
        here = {"device": model.device.type, "images": list(images.shape), "dataset": model.dataset}
        self.settings = checkpoint.plain(shared | here)

    def watch(self, ratio: float) -> float:
        """Adds one update's ratio; the mean over WATCHED updates, 0 before there are as many."""
        self.ratios.append(ratio)
        return sum(self.ratios) / WATCHED if len(self.ratios) == WATCHED else 0.0

    @torch.no_grad()
    def advance(self, Δ: Sequence[Tensor], rate: float, seconds: float) -> None:
        """One step of Adam along Δ = ∂d/∂θ, and of the running average of θ, whose window starts short."""
        for p, δ in zip(self.theta, Δ, strict=True):
            p.grad = -δ  # Adam descends, eq. (6) ascends
        self.adam.param_groups[0]["lr"] = rate
        self.adam.step()
        self.adam.zero_grad()
        self.step, self.seconds = self.step + 1, self.seconds + seconds
        if self.averaged is not self.model.f:
            decay = min(self.config.average, (1 + self.step) / (10 + self.step))
            for mean, p in zip(self.averaged.parameters(), self.model.f.parameters(), strict=True):
                mean.lerp_(p, 1 - decay)
            for kept, b in zip(self.averaged.buffers(), self.model.f.buffers(), strict=True):
                kept.copy_(b)  # of spectral normalisation, for instance

    def save(self, record: Record, main: bool = True) -> None:
        """Writes checkpoint and resume file. Those before are kept as NAME.previous, unless another run wrote them."""
        path, self.model.training, resumes = Path(self.config.checkpoint), self._described(record), self.resumes
        self.resumes = True  # on all ranks
        if not main:
            return
        for file in (resume_file(path), path):
            if resumes and file.exists():
                checkpoint.copy(file, previous(file))  # not moved: a run killed here must find its checkpoint
            else:
                previous(file).unlink(missing_ok=True)
        content = {k: getattr(self, k) for k in ("step", "seconds", "settings")} | {"ratios": list(self.ratios)}
        content |= {"f": self.model.f.state_dict(), "mean": self.averaged.state_dict(), "adam": self.adam.state_dict()}
        content |= {"horizon": self.config.horizon or self.config.updates, "training": self.model.training}
        with checkpoint.aside(resume_file(path)) as part:
            torch.save(content, part)
        replace(self.model, f=self.averaged).save(path)

    def finish(self, record: Record) -> None:
        """The model as the run leaves it: with mean θ, and a record of the training."""
        self.model.training = self._described(record)
        self.model.f.load_state_dict(self.averaged.state_dict())

    def _described(self, record: Record) -> dict:
        settings = {"updates": self.config.updates, "horizon": self.config.horizon} | self.settings
        return {**self.model.training, "config": settings, "last": asdict(record)}

    @torch.no_grad()
    def restore(self) -> None:
        """Goes on from the resume file, if there is one; ValueError where it is damaged or made with other settings."""
        file, anew = Path(self.config.checkpoint), "delete it to start anew (in Python: resume=False)"
        if not (path := resume_file(file)).exists():
            if file.exists():
                raise ValueError(f"{file} is a model without {path.name}, the state of its run: load it with "
                                 f"ShortRun.load and train that under another name, or {anew}")  # fmt: skip
            return
        try:
            saved = torch.load(path, self.model.device, weights_only=True)
            if not (differ := self._differences(saved)):
                self._fill(saved)
        except Exception as error:  # torch.load raises almost anything
            remedy = f"rename {older} to {path.name}" if (older := previous(path)).exists() else anew
            raise ValueError(f"{path} is damaged ({error}): {remedy}") from error
        if differ:
            raise ValueError(f"{path} was made with {', '.join(differ)}: set it back, take another name, or {anew}")
        self.resumes = True
        if self.step == self.config.updates:  # nothing left to do
            self.finish(Record(**self.model.training["last"]))
        if ranks().is_main_process:  # a run killed between its two files has not written this one
            replace(self.model, f=self.averaged).save(file)

    def _differences(self, saved: dict) -> list[str]:
        was, config = {"dataset": self.model.dataset} | saved["settings"], self.config  # older files have no data set
        differ = [f"{k}={was[k]!r} where it is {here!r} now" for k, here in self.settings.items() if was[k] != here]
        if saved["step"] > config.updates:
            differ.append(f"{saved['step']} updates, more than the {config.updates} asked for now")
        lowered = config.rate_final is not None or config.sigma_final is not None
        now = config.horizon or config.updates
        if lowered and saved["horizon"] != now:
            differ.append(f"horizon={saved['horizon']} (None: as many as its updates) where it is {now} now")
        return differ

    def _fill(self, saved: dict) -> None:
        moments = saved["adam"]["state"]
        if any(moments[i][k].shape != p.shape for i, p in enumerate(self.theta) for k in ("exp_avg", "exp_avg_sq")):
            raise ValueError("Adam's moments do not fit the network")
        Record(**saved["training"]["last"])
        self.step, self.seconds = int(saved["step"]), float(saved["seconds"])
        self.ratios.extend(map(float, saved["ratios"]))
        self.model.f.load_state_dict(saved["f"])
        self.averaged.load_state_dict(saved["mean"])
        self.adam.load_state_dict(saved["adam"])
        self.model.training = saved["training"]


def previous(path: str | Path) -> Path:
    """Where the file before the last one is kept: NAME.previous.safetensors for NAME.safetensors."""
    name, suffix = Path(path).name, ".resume.pt" if str(path).endswith(".resume.pt") else Path(path).suffix
    return Path(path).with_name(f"{name.removesuffix(suffix)}.previous{suffix}")


def resume_file(path: Path) -> Path:
    """NAME.resume.pt beside NAME.safetensors."""
    return path.with_suffix(".resume.pt")


def read_log(path: str | Path) -> list[Record]:
    """The records of a log, in order, without a row that a killed run left unfinished."""
    text = Path(path).read_text()
    rows = csv.DictReader(text[: text.rfind("\n") + 1].splitlines())
    return [Record(int(row.pop("step")), **{k: float(v) for k, v in row.items()}) for row in rows]


def open_log(path: str | Path, step: int) -> Callable[[Record], None]:
    """A function that appends a Record to a CSV file, of which rows beyond `step` are dropped first."""
    path, names = Path(path).resolve(), [f.name for f in fields(Record)]  # a link stays one
    kept = [r for r in read_log(path) if r.step <= step] if step and path.is_file() else []

    def write(rows: Sequence[Sequence], mode: str = "a", target: Path = path) -> None:
        try:
            with target.open(mode, newline="") as file:
                csv.writer(file).writerows(rows)
        except OSError as error:
            raise OSError(f"the log {path} could not be written ({error}): free disk space, then train again; it goes "
                          "on from the last checkpoint") from error  # fmt: skip

    with checkpoint.aside(path) if kept else nullcontext(path) as part:  # a run killed here must find its rows
        write([names, *map(astuple, kept)], "w", part)
    return lambda record: write([astuple(record)])


def learning_curves(source: str | Path) -> list[tuple[int, list[Record]]]:
    """(K, records) of each stage of a model made by a recipe; an empty list for a model without logs beside it."""
    path = checkpoint.find(source)
    stages = ShortRun.load(path).training.get("recipe", {}).get("stages", [])
    logs = [path.with_name(f"{path.stem}-stage{i}.csv") for i in range(1, len(stages) + 1)]
    return [(stage["steps"], read_log(log)) for stage, log in zip(stages, logs, strict=True) if log.exists()]
