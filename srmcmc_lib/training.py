"""Algorithm 1: learning the short-run chain, as an iterator over explicit records."""

import math
import time
import warnings
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from .data import check_images, to_float
from .devices import PRECISIONS, arithmetic, at_once, check_same, prepared, ranks, same_start, share, summed
from .langevin import langevin_chain
from .records import Record, open_log
from .resuming import State, previous
from .shortrun import ShortRun

WATCHED = 20  # updates over which the alarm averages


@dataclass(frozen=True)
class TrainConfig:
    """Settings of Algorithm 1. The defaults for rate, σ, m and Adam are those of the authors' public code.

    Attributes:
        updates: T, the number of updates in all, those before a resume included.
        batch_size: m, observed and synthesised images per update.
        rate: η, Adam's learning rate.
        sigma: σ, the standard deviation of the noise added to observed images (range [-1, 1]). The smaller the
            better until learning turns unstable; keep it above the chain's own noise, σ ≥ 2 ε.
        rate_final, sigma_final: what η and σ are lowered to; None keeps them constant, as in the authors' code.
        lower_from: the fraction of the updates after which both are lowered, along half a cosine (our choice: the
            paper only says "gradually"). 0 lowers over the whole run.
        horizon: the updates to which the schedules are stretched; None: `updates`. A run that stops short of its
            horizon can be prolonged later as if it had never stopped.
        betas: Adam's β_1 and β_2.
        average: decay of a running average of θ that replaces θ in checkpoints and at the end; 0 for none (the
            paper's). Learning itself never sees the average.
        seed: of the four generators (data order, data noise, z, u).
        checkpoint: a .safetensors file, written every `checkpoint_every` updates and at the end, with the full state.
        log: a .csv file, or a folder for TensorBoard.
        progress: show a progress bar.
        precision: "float32", or on GPUs "tf32" or "bf16" for f and its gradient; the chain's update stays float32.
        channels_last: the memory layout of f, faster on CPUs and tensor cores; False for the other one.
        compile: torch.compile f (on CPUs it gained nothing).
        sub_batch: how many images a device takes at once, to save memory; changes speed, not the update. None takes
            all of its share, or what its memory holds.
        alarm: stop when the chains' path is this many times as long as the way it has to go, see `check`; None: never.

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
    horizon: int | None = None
    betas: tuple[float, float] = (0.9, 0.999)
    average: float = 0.0
    seed: int = 0
    checkpoint: str | None = None
    checkpoint_every: int = 100
    log: str | None = None
    progress: bool = True
    precision: str = "float32"
    channels_last: bool = True
    compile: bool = False
    sub_batch: int | None = None
    alarm: float | None = 1.6

    def __post_init__(self):
        for name in ("updates", "batch_size", "checkpoint_every", "sub_batch", "horizon"):
            value = getattr(self, name)
            if name in ("sub_batch", "horizon") and value is None:
                continue
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
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision={self.precision!r} is unknown; choose one of {', '.join(PRECISIONS)}")
        if self.alarm is not None and not self.alarm > 1:
            raise ValueError(f"alarm must be None or a number above 1, got {self.alarm!r}")

    def scheduled(self, start: float, final: float | None, step: int) -> float:
        """The value of a schedule at update `step` (0 … updates − 1)."""
        if final is None:
            return start
        progress = (step / (self.horizon or self.updates) - self.lower_from) / max(1 - self.lower_from, 1e-12)
        return final + (start - final) * (1 + math.cos(math.pi * min(max(progress, 0.0), 1.0))) / 2


def train(model: ShortRun, images: Tensor, config: TrainConfig, resume: bool = True) -> Iterator[Record]:
    """Implements Algorithm 1: learns model.f in place and yields a Record after each update.

    Each update draws m observed images plus N(0, σ²), m fresh z ~ p_0 (nothing persists), runs K Langevin steps,
    and follows eq. (6) with Adam. A stopped run that is resumed equals the run never stopped, bit for bit on the CPU.
    Started on several devices (`accelerate launch`), each rank runs its share of the m chains, gradients are averaged,
    all ranks yield the same records, and rank 0 alone writes.

    Args:
        model: network, kernel and prior; its device is used (on several: each rank's own).
        images: observed examples, uint8 [n, C, H, W]; they stay where they are, a memory-mapped file for instance.
        config: settings.
        resume: continue from config.checkpoint if that file exists; False starts anew and overwrites it.

    Raises (at the call, before any work):
        ValueError: wrong images, a checkpoint that was made with other settings, fewer images in a batch than ranks.
    Raises (while iterating):
        FloatingPointError: learning diverged, or the alarm fired before it did; the last two checkpoints are kept (the
            older as NAME.previous…), because images and d look healthy for a while after K·‖∂f/∂x‖ began to climb.
        torch.OutOfMemoryError: not even one image at a time fits.
    """
    check_images(images, model.shape)
    if config.batch_size < ranks().num_processes:
        raise ValueError(f"batch_size={config.batch_size} leaves some of {ranks().num_processes} ranks idle")
    if not config.channels_last:
        model.f.to(memory_format=torch.contiguous_format)
    same_start(model.f)
    state = State(model, config, images)
    if resume and config.checkpoint and Path(config.checkpoint).exists():
        state.restore(Path(config.checkpoint))
    check_same(state.step)
    return _updates(images, state)


def _updates(images: Tensor, state: State) -> Iterator[Record]:
    model, config, main = state.model, state.config, ranks().is_main_process
    f = prepared(model.f, config.precision, config.compile)
    mine = share(config.batch_size)
    n, sentence = at_once(model.f, model.shape, config.sub_batch or mine.stop - mine.start, model.device)
    write = open_log(config.log, state.step) if config.log and main else None
    # one line a second: nbval's kernel client loses messages of a cell that sends more than 1,000 of them
    settings = {"desc": "Algorithm 1", "mininterval": 1.0, "disable": not (config.progress and main)}
    bar = tqdm(total=config.updates, initial=state.step, **settings)
    if sentence:
        bar.write(sentence)
    started, watched = time.perf_counter() - state.seconds, deque(maxlen=WATCHED)
    with bar:
        while state.step < config.updates:
            rate = config.scheduled(config.rate, config.rate_final, state.step)
            sigma = config.scheduled(config.sigma, config.sigma_final, state.step)
            with arithmetic(config.precision, model.device):
                d, grad_norm, way, n = update(state, f, images, sigma, rate, n)
            watched.append(model.kernel.steps * model.kernel.step_size * grad_norm / way)
            check(d, grad_norm, watched, state, rate, sigma)
            state.step += 1
            state.seconds = time.perf_counter() - started
            state.update_average()
            record = Record(state.step, d, grad_norm, rate, sigma, state.seconds)
            if write:  # before the checkpoint: a run killed in between then misses no row
                write(record)
            last = state.step == config.updates
            if config.checkpoint and main and (last or state.step % config.checkpoint_every == 0):
                state.save(Path(config.checkpoint), record)
            bar.update()
            bar.set_postfix(d=f"{d:+.2f}", grad_norm=f"{grad_norm:.2f}", refresh=False)
            if last:
                state.finish(record)
                ranks().wait_for_everyone()  # the checkpoint is there when any rank has finished
            yield record


def check(d: float, grad_norm: float, ratios: deque[float], state: State, rate: float, sigma: float) -> None:
    """Raises FloatingPointError where learning has diverged (d ran away), or is about to (the alarm).

    A chain of K steps covers a path of at most K·s·‖∂f/∂x‖ and has to go ‖x⁺ − z‖, from the noise to the data. Their
    ratio says how far the chain strays: 0.9 … 1.2 for the paper's CIFAR-10 (Table 2), up to 1.4 in healthy runs here.
    It climbs 50 … 100 updates before d explodes. So K·‖∂f/∂x‖ ≈ 40 is no constant of nature: it is that distance.
    """
    ratio, config = sum(ratios) / len(ratios), state.config
    if not math.isfinite(d) or abs(d) > 1e3:
        what = f"learning diverged at update {state.step + 1}: f(x⁺) − f(x⁻) = {d:.3g}, ‖∂f/∂x‖ = {grad_norm:.3g}."
    elif config.alarm is not None and ratio > config.alarm and len(ratios) == WATCHED:
        what = (f"learning is about to diverge at update {state.step + 1}: over {WATCHED} updates the chains' path "
                f"K·s·‖∂f/∂x‖ was {ratio:.2f} times ‖x⁺ − z‖, more than alarm={config.alarm}.")  # fmt: skip
    else:
        return
    older = ""
    if config.checkpoint and previous(config.checkpoint).exists():
        older = (f", or from ShortRun.load({str(previous(config.checkpoint))!r}) under another checkpoint name "
                 "(the latest checkpoint may already be on its way out)")  # fmt: skip
    raise FloatingPointError(
        f"{what} Remedies: a rate below {rate:.1g}, a sigma above {sigma:.2g}, more Langevin steps, or another seed; "
        f"start anew{older}. alarm=None goes on regardless."
    )


def update(state: State, f: nn.Module, images: Tensor, sigma: float, rate: float, n: int) -> tuple:
    """One pass of Algorithm 1's loop, n chains at once: returns d and grad_norm as in Record, mean ‖x⁺ − z‖, and n.

    Where n is too much for the memory, the same update is tried again with half as many, which is then returned.
    """
    before = {p: g.get_state() for p, g in state.generators.items()}
    while True:
        state.adam.zero_grad()
        try:
            seen = gradients(state, f, images, sigma, n)
            break
        except torch.OutOfMemoryError:
            if n == 1:
                raise
        n = (n + 1) // 2  # outside of `except`, which still holds the tensors of the attempt
        warnings.warn(f"{state.model.device} is out of memory: {n} images at once from now on", stacklevel=2)
        for p, g in state.generators.items():
            g.set_state(before[p])

    θ = [p for p in state.model.f.parameters() if p.grad is not None]
    seen, *grads = summed([seen, *[p.grad for p in θ]])
    for p, grad in zip(θ, grads, strict=True):
        p.grad = grad
    for group in state.adam.param_groups:
        group["lr"] = rate
    state.adam.step()
    return *seen.tolist(), n


def gradients(state: State, f: nn.Module, images: Tensor, sigma: float, n: int) -> Tensor:
    """The loop's lines 1 to 4 for this rank's share: adds its part of −∂d/∂θ to .grad; its part of (d, grad_norm, way).

    Every rank draws the whole batch's randomness, so a share does not depend on how many ranks there are.
    """
    model, g, m = state.model, state.generators, state.config.batch_size
    device, mine, shape = model.device, share(m), (m, *model.shape)
    x_plus = to_float(images[torch.randint(len(images), (m,), generator=g["data"])[mine].to(images.device)].to(device))
    z = model.prior.draw(shape, g["z"])[mine].to(device)
    x_plus = x_plus + sigma * randn(shape, g["sigma"])[mine].to(device)
    before, seen = g["u"].get_state(), 0.0
    for start in range(0, len(z), n):
        g["u"].set_state(before)  # each part sees its own rows of the same noise
        part = slice(start, start + n)
        U = (randn(shape, g["u"])[mine][part].to(device) for _ in range(model.kernel.steps))
        norms, x_part = [], x_plus[part]
        for x_minus, df_dx in langevin_chain(f, z[part], model.kernel, U):
            norms += [df_dx.flatten(1).norm(dim=1).mean()] if df_dx is not None else []
        f_plus, f_minus = f(torch.cat([x_part, x_minus])).split(len(x_part))  # one forward pass for both
        d, weight = f_plus.mean() - f_minus.mean(), len(x_part) / m
        (-d * weight).backward()  # Adam descends, eq. (6) ascends
        way = (x_part - z[part]).flatten(1).norm(dim=1).mean()
        seen = seen + weight * torch.stack([d.detach(), torch.stack(norms).mean(), way])
    return seen


def randn(shape: tuple, generator: torch.Generator) -> Tensor:
    """N(0, I), on the generator's device."""
    return torch.randn(shape, generator=generator, device=generator.device)
