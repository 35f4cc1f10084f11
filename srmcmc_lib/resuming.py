"""All that a stopped run needs to go on as if it had never stopped, written beside θ in the checkpoint."""

import json
import zlib
from collections import deque
from dataclasses import asdict, fields
from pathlib import Path

import numpy as np
import torch
from torch import Generator, Tensor

from .checkpoint import copy, read
from .records import Record
from .shortrun import ShortRun

PURPOSES = ("data", "sigma", "z", "u")  # one generator each: which x⁺, their noise, z ~ p_0, the chain's noise


def fresh(seed: int, t: int, device: torch.device) -> dict[str, Generator]:
    """The generators of update t by purpose, made anew from (seed, t): a resumed run needs no generator's state.

    Three draw on the model's device: K·m images of noise an update, drawn on the CPU, would take longer than a GPU's
    chain does. The images stay in the host's memory.
    """
    seeds = np.random.SeedSequence(seed, spawn_key=(t,)).generate_state(len(PURPOSES))
    places = ["cpu", *[device] * 3]
    return {p: Generator(d).manual_seed(int(s)) for p, d, s in zip(PURPOSES, places, seeds, strict=True)}


NOT_COMPARED = {"updates", "horizon", "checkpoint", "checkpoint_every", "log", "progress", "channels_last", "compile",
                "sub_batch", "alarm"}  # may change between stop and resume; horizon: see below  # fmt: skip
WATCHED = 20  # updates over which the alarm of `training.check` averages


def previous(checkpoint: str | Path) -> Path:
    """Where the checkpoint before the last one is kept: NAME.previous.safetensors."""
    path = Path(checkpoint)
    return path.with_name(f"{path.stem}.previous{path.suffix}")


class State:
    """All that a resumed run needs besides θ: Adam's moments, the average of θ, the alarm's window, two counters."""

    def __init__(self, model: ShortRun, config, images: Tensor):
        self.model, self.config, self.step, self.seconds = model, config, 0, 0.0
        self.theta = dict(model.f.named_parameters())
        self.adam = torch.optim.Adam(self.theta.values(), lr=config.rate, betas=config.betas)
        self.ratios = deque(maxlen=WATCHED)  # of the chains' path to the way they had to go
        self.average = {k: p.detach().clone() for k, p in self.theta.items()} if config.average else {}
        self.owns_checkpoint = False  # until restored or saved: the files of that name may be another run's
        # what a resumed run must share, as JSON gives it back; the device because generators differ between them
        shared = {k: v for k, v in asdict(config).items() if k not in NOT_COMPARED}
        checksum = zlib.crc32(images.cpu().contiguous().numpy())
        shared |= {"images": [len(images), checksum], "device": model.device.type}
        self.settings = json.loads(json.dumps(shared))

    @torch.no_grad()
    def update_average(self) -> None:
        decay = min(self.config.average, (1 + self.step) / (10 + self.step))  # the first updates are soon forgotten
        for k, average in self.average.items():
            average.lerp_(self.theta[k], 1 - decay)

    def save(self, path: Path, record: Record) -> None:
        extra = {}
        for i, moments in self.adam.state_dict()["state"].items():
            extra |= {f"adam.{i}.{k}": v for k, v in moments.items()}
        theta = {k: p.detach().clone() for k, p in self.theta.items()}
        extra |= {f"theta.{k}": p for k, p in theta.items()} if self.average else {}
        self._describe(record)
        if not self.owns_checkpoint:
            previous(path).unlink(missing_ok=True)
        elif path.exists():
            copy(path, previous(path))  # not moved: a run killed here must find its checkpoint
        try:
            self._fill(self.average)  # what a reader of the checkpoint samples with
            self.model.save(path, **extra)
        finally:
            self._fill(theta)

    def finish(self, record: Record) -> None:
        self._describe(record)
        self._fill(self.average)

    def _describe(self, record: Record) -> None:
        settings = {"updates": self.config.updates, "horizon": self.config.horizon} | self.settings
        seen = {"last": asdict(record), "ratios": list(self.ratios)}
        self.model.training = {**self.model.training, "config": settings, **seen}

    @torch.no_grad()
    def _fill(self, values: dict[str, Tensor]) -> None:
        for k, value in values.items():
            self.theta[k].copy_(value)

    def restore(self, path: Path) -> None:
        try:
            meta, tensors = read(path)
        except ValueError as error:
            older = previous(path)
            remedy = f"go on from {older} under another name" if older.exists() else "pass resume=False"
            raise ValueError(f"{error}; {remedy}") from error
        stored = meta["training"].get("config")
        if stored is None or not any(k.startswith("adam.") for k in tensors):
            raise ValueError(f"{path} is a model without a trainer's state; load it with ShortRun.load and train that")
        defaults = {f.name: f.default for f in fields(self.config)}  # older checkpoints lack newer settings
        for name, here in self.settings.items():
            if (was := stored.get(name, defaults.get(name))) != here:
                raise ValueError(f"{path} was trained with {name}={was!r}, here it is {here!r}: "
                                 "set it back, or pass resume=False to start anew")  # fmt: skip
        if (done := meta["training"]["last"]["step"]) > self.config.updates:
            raise ValueError(f"{path} is at update {done} already, the config ends at {self.config.updates}: "
                             "raise updates, or pass resume=False to start anew")  # fmt: skip
        now, then = (c["horizon"] or c["updates"] for c in (asdict(self.config), {"horizon": None, **stored}))
        if now != then and (self.config.rate_final is not None or self.config.sigma_final is not None):
            raise ValueError(f"{path} lowered rate or sigma over {then} updates, not {now}: set horizon={then}")
        for name, here in json.loads(json.dumps(self.model.config)).items():
            if meta[name] != here:
                raise ValueError(f"{path} holds a model with {name} {meta[name]}, the model at hand has {here}")
        self.model.f.load_state_dict({k.removeprefix("f."): v for k, v in tensors.items() if k.startswith("f.")})
        self._fill({k: tensors[f"theta.{k}"] for k in self.average})
        for k, average in self.average.items():
            average.copy_(tensors["f." + k])
        moments: dict[int, dict[str, Tensor]] = {}
        for name in [k for k in tensors if k.startswith("adam.")]:
            _, i, key = name.split(".")
            layout = self.adam.param_groups[0]["params"][int(i)] if tensors[name].ndim else tensors[name]
            moments.setdefault(int(i), {})[key] = torch.empty_like(layout).copy_(tensors[name])  # channels_last again
        self.adam.load_state_dict({**self.adam.state_dict(), "state": moments})
        self.model.training, self.owns_checkpoint = meta["training"], True
        self.step, self.seconds = meta["training"]["last"]["step"], meta["training"]["last"]["seconds"]
        self.ratios.extend(meta["training"].get("ratios", []))  # older checkpoints lack them
        if self.step >= self.config.updates:  # nothing left to learn: the model as the finished run left it
            self._fill(self.average)
