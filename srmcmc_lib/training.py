"""Algorithm 1: learning the short-run chain, as an iterator over explicit records."""

import json
import math
import shutil
import time
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from torch import Generator, Tensor
from tqdm.auto import tqdm

from .checkpoint import read
from .data import check_images, to_float
from .langevin import langevin_chain
from .records import Record, open_log
from .shortrun import ShortRun

PURPOSES = ("data", "sigma", "z", "u")  # one generator each: which x⁺, their noise, z ~ p_0, the chain's noise
NOT_COMPARED = {"updates", "checkpoint", "checkpoint_every", "log", "progress"}  # may change between stop and resume


@dataclass(frozen=True)
class TrainConfig:
    """Settings of Algorithm 1. The defaults for rate, σ, m and Adam are those of the authors' public code.

    Attributes:
        updates: T, the number of updates in all, those before a resume included. A lowered schedule is stretched to
            it, so prolonging a finished run continues it exactly only where rate and sigma are constant.
        batch_size: m, observed and synthesised images per update.
        rate: η, Adam's learning rate.
        sigma: σ, the standard deviation of the noise added to observed images (range [-1, 1]). The smaller the
            better until learning turns unstable; keep it above the chain's own noise, σ ≥ 2 ε.
        rate_final, sigma_final: what η and σ are lowered to; None keeps them constant, as in the authors' code.
        lower_from: the fraction of the updates after which both are lowered, along half a cosine (our choice: the
            paper only says "gradually"). 0 lowers over the whole run.
        betas: Adam's β_1 and β_2.
        average: decay of a running average of θ that replaces θ in checkpoints and at the end; 0 for none (the
            paper's). Learning itself never sees the average.
        seed: of the four generators (data order, data noise, z, u).
        checkpoint: a .safetensors file, written every `checkpoint_every` updates and at the end, with the full state.
        log: a .csv file, or a folder for TensorBoard.
        progress: show a progress bar.

    Raises:
        ValueError: a setting out of range.
    """

    updates: int = 100_000
    batch_size: int = 64
    rate: float = 1e-4
    sigma: float = 0.03
    rate_final: float | None = None
    sigma_final: float | None = None
    lower_from: float = 0.8
    betas: tuple[float, float] = (0.9, 0.999)
    average: float = 0.0
    seed: int = 0
    checkpoint: str | None = None
    checkpoint_every: int = 100
    log: str | None = None
    progress: bool = True

    def __post_init__(self):
        for name in ("updates", "batch_size", "checkpoint_every"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or not 0 <= self.seed < 2**30:
            raise ValueError(f"seed must be an integer in 0 … 2³⁰ − 1, got {self.seed!r}")
        if len(self.betas) != 2 or not all(0 <= β < 1 for β in self.betas):
            raise ValueError(f"betas must be two numbers in [0, 1), got {self.betas!r}")
        if not 0 < self.rate < 1 or not (self.rate_final is None or 0 < self.rate_final < 1):
            raise ValueError(f"rate and rate_final must lie in (0, 1), got {self.rate!r} and {self.rate_final!r}")
        if not 0 <= self.sigma < 10 or not (self.sigma_final is None or 0 <= self.sigma_final < 10):
            raise ValueError(f"sigma and sigma_final must lie in [0, 10), got {self.sigma!r} and {self.sigma_final!r}")
        if not 0 <= self.lower_from <= 1 or not 0 <= self.average < 1:
            got = f"{self.lower_from!r} and {self.average!r}"
            raise ValueError(f"lower_from must lie in [0, 1] and average in [0, 1), got {got}")

    def scheduled(self, start: float, final: float | None, step: int) -> float:
        """The value of a schedule at update `step` (0 … updates − 1)."""
        if final is None:
            return start
        progress = (step / self.updates - self.lower_from) / max(1 - self.lower_from, 1e-12)
        return final + (start - final) * (1 + math.cos(math.pi * min(max(progress, 0.0), 1.0))) / 2


def train(model: ShortRun, images: Tensor, config: TrainConfig, resume: bool = True) -> Iterator[Record]:
    """Implements Algorithm 1: learns model.f in place and yields a Record after each update.

    Each update draws m observed images plus N(0, σ²), m fresh z ~ p_0 (nothing persists), runs K Langevin steps,
    and follows eq. (6) with Adam. A stopped run that is resumed equals the run never stopped, bit for bit on the CPU.

    Args:
        model: network, kernel and prior; its device is used.
        images: observed examples, uint8 [n, C, H, W], kept resident on the model's device.
        config: settings.
        resume: continue from config.checkpoint if that file exists; False starts anew and overwrites it.

    Raises (at the call, before any work):
        ValueError: wrong images, or a checkpoint that was made with other settings.
    Raises (while iterating):
        FloatingPointError: learning diverged; the last two checkpoints are kept (the older as NAME.previous…), because
            images and d look healthy for a while after K·‖∂f/∂x‖ has started to climb.
    """
    check_images(images, model.shape)
    state = _State(model, config, images)
    if resume and config.checkpoint and Path(config.checkpoint).exists():
        state.restore(Path(config.checkpoint))
    return _updates(model, images.to(model.device), config, state)


def _updates(model: ShortRun, images: Tensor, config: TrainConfig, state: "_State") -> Iterator[Record]:
    write = open_log(config.log, state.step) if config.log else None
    bar = tqdm(total=config.updates, initial=state.step, disable=not config.progress, desc="Algorithm 1")
    started = time.perf_counter() - state.seconds
    with bar:
        while state.step < config.updates:
            rate = config.scheduled(config.rate, config.rate_final, state.step)
            sigma = config.scheduled(config.sigma, config.sigma_final, state.step)
            d, grad_norm = update(model, images, config.batch_size, sigma, rate, state.adam, state.generators)
            if not math.isfinite(d) or abs(d) > 1e3:
                raise FloatingPointError(
                    f"learning diverged at update {state.step + 1}: f(x⁺) − f(x⁻) = {d:.3g}, ‖∂f/∂x‖ = {grad_norm:.3g}."
                    f" Remedies: a rate below {rate:.1g}, a sigma above {sigma:.2g}, more Langevin steps, or another "
                    f"seed; start anew, or from ShortRun.load({str(previous(config.checkpoint or 'NAME'))!r}) under "
                    "another checkpoint name (the latest checkpoint may already be on its way out)."
                )
            state.step += 1
            state.seconds = time.perf_counter() - started
            state.update_average()
            record = Record(state.step, d, grad_norm, rate, sigma, state.seconds)
            if write:  # before the checkpoint: a run killed in between then misses no row
                write(record)
            if config.checkpoint and (state.step % config.checkpoint_every == 0 or state.step == config.updates):
                state.save(Path(config.checkpoint), record)
            bar.update()
            bar.set_postfix(d=f"{d:+.2f}", grad_norm=f"{grad_norm:.2f}", refresh=False)
            if state.step == config.updates:
                state.finish(record)
            yield record


def update(model: ShortRun, images: Tensor, m: int, sigma: float, rate: float, adam, generators) -> tuple[float, float]:
    """One pass of Algorithm 1's loop, its five lines in order; returns (d, grad_norm) as in Record."""
    g, device = generators, images.device
    x_plus = to_float(images[torch.randint(len(images), (m,), generator=g["data"], device=device)])
    x_minus = model.prior.draw(x_plus.shape, g["z"])
    x_plus = x_plus + sigma * torch.randn(x_plus.shape, generator=g["sigma"], device=device)
    U = (torch.randn(x_plus.shape, generator=g["u"], device=device) for _ in range(model.kernel.steps))
    norms = []
    for x_minus, df_dx in langevin_chain(model.f, x_minus, model.kernel, U):  # noqa: B020 (the chain starts at x_minus)
        norms += [df_dx.flatten(1).norm(dim=1).mean()] if df_dx is not None else []

    f_plus, f_minus = model.f(torch.cat([x_plus, x_minus])).split(m)  # one forward pass for both
    d = f_plus.mean() - f_minus.mean()
    for group in adam.param_groups:
        group["lr"] = rate
    adam.zero_grad()
    (-d).backward()  # Adam descends, eq. (6) ascends
    adam.step()
    return d.item(), torch.stack(norms).mean().item()


def previous(checkpoint: str | Path) -> Path:
    """Where the checkpoint before the last one is kept: NAME.previous.safetensors."""
    path = Path(checkpoint)
    return path.with_name(f"{path.stem}.previous{path.suffix}")


class _State:
    """All that a resumed run needs besides θ: Adam's moments, the average of θ, four generators, two counters."""

    def __init__(self, model: ShortRun, config: TrainConfig, images: Tensor):
        self.model, self.config, self.step, self.seconds = model, config, 0, 0.0
        self.adam = torch.optim.Adam(model.f.parameters(), lr=config.rate, betas=config.betas)
        self.generators = {p: Generator(model.device).manual_seed(4 * config.seed + i) for i, p in enumerate(PURPOSES)}
        self.average = {k: p.detach().clone() for k, p in self._theta()} if config.average else {}
        # what a resumed run must share besides its settings: generators differ between devices
        checksum = zlib.crc32(images.cpu().contiguous().numpy())
        self.circumstances = {"images": [len(images), checksum], "device": model.device.type}

    def _theta(self):
        return self.model.f.named_parameters()

    @torch.no_grad()
    def update_average(self) -> None:
        decay = min(self.config.average, (1 + self.step) / (10 + self.step))  # the first updates are soon forgotten
        for k, p in self._theta() if self.average else ():
            self.average[k].lerp_(p, 1 - decay)

    def save(self, path: Path, record: Record) -> None:
        extra = {f"generator.{k}": g.get_state() for k, g in self.generators.items()}
        for i, moments in self.adam.state_dict()["state"].items():
            extra |= {f"adam.{i}.{k}": v for k, v in moments.items()}
        theta = {k: p.detach().clone() for k, p in self._theta()}
        extra |= {f"theta.{k}": p for k, p in theta.items()} if self.average else {}
        self._describe(record)
        if path.exists():
            aside = previous(path).with_suffix(".part")
            shutil.copyfile(path, aside)  # not moved: a run killed here must find its checkpoint
            aside.replace(previous(path))
        try:
            self._fill(self.average)  # what a reader of the checkpoint samples with
            self.model.save(path, **extra)
        finally:
            self._fill(theta)

    def finish(self, record: Record) -> None:
        self._describe(record)
        self._fill(self.average)

    def _describe(self, record: Record) -> None:
        settings = {k: v for k, v in asdict(self.config).items() if k not in NOT_COMPARED - {"updates"}}
        settings["betas"] = list(settings["betas"])  # as JSON gives them back
        settings |= self.circumstances
        self.model.training = {**self.model.training, "config": settings, "last": asdict(record)}

    @torch.no_grad()
    def _fill(self, values: dict[str, Tensor]) -> None:
        for k, p in self._theta() if values else ():
            p.copy_(values[k])

    def restore(self, path: Path) -> None:
        meta, tensors = read(path)
        stored = meta["training"].get("config")
        if stored is None or "generator.data" not in tensors:
            raise ValueError(f"{path} is a model without a trainer's state; load it with ShortRun.load and train that")
        for name in [f.name for f in fields(TrainConfig) if f.name not in NOT_COMPARED]:
            asked = getattr(self.config, name)
            asked = list(asked) if isinstance(asked, tuple) else asked
            if stored.get(name) != asked:
                raise ValueError(f"{path} was trained with {name}={stored.get(name)!r}, the config says {asked!r}: "
                                 "set it back, or pass resume=False to start anew")  # fmt: skip
        for name, here in self.circumstances.items():
            if stored.get(name) != here:
                raise ValueError(f"{path} was trained with {name} {stored.get(name)}, not {here}: give the same")
        for name, here in json.loads(json.dumps(self.model.config)).items():
            if meta[name] != here:
                raise ValueError(f"{path} holds a model with {name} {meta[name]}, the model at hand has {here}")
        self.model.f.load_state_dict({k.removeprefix("f."): v for k, v in tensors.items() if k.startswith("f.")})
        theta = "theta." if self.average else "f."
        self._fill({k: tensors[theta + k] for k, _ in self._theta()})
        for k, average in self.average.items():
            average.copy_(tensors["f." + k])
        moments: dict[int, dict[str, Tensor]] = {}
        for name in [k for k in tensors if k.startswith("adam.")]:
            _, i, key = name.split(".")
            layout = self.adam.param_groups[0]["params"][int(i)] if tensors[name].ndim else tensors[name]
            moments.setdefault(int(i), {})[key] = torch.empty_like(layout).copy_(tensors[name])  # channels_last again
        self.adam.load_state_dict({**self.adam.state_dict(), "state": moments})
        for purpose, g in self.generators.items():
            g.set_state(tensors[f"generator.{purpose}"])
        self.model.training = meta["training"]
        self.step, self.seconds = meta["training"]["last"]["step"], meta["training"]["last"]["seconds"]
        if self.step >= self.config.updates:  # nothing left to learn: the model as the finished run left it
            self._fill(self.average)
