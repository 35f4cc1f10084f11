"""Algorithm 1: training the short-run chain, as an iterator over explicit records."""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm.auto import tqdm

from .checkpoint import claim
from .data import check_images, to_float
from .devices import arithmetic, chain_copy, keep_pages, ranks, refresh, resolved, same_everywhere, share, summed
from .energy import rescale
from .langevin import chain, gradient, integer
from .noise import fresh
from .progress import Progress, Record, open_log, previous
from .shortrun import ShortRun


@dataclass(frozen=True)
class TrainConfig:
    """Settings of Algorithm 1, checked when made. The defaults of rate, σ and m are the authors' (public code)."""

    updates: int = 100_000  # T, the number of updates in all, those before a resume included
    batch_size: int = 64  # m, observed and synthesised images per update
    rate: float = 1e-4  # η, Adam's learning rate
    sigma: float = 0.03  # σ of the noise added to observed images: smaller is better while training is stable; σ ≥ 2 ε
    rate_final: float | None = None  # what η is lowered to; None: constant
    sigma_final: float | None = None  # what σ is lowered to; None: constant
    lower_from: float = 0.8  # the fraction of the updates after which both fall, along half a cosine (our choice)
    horizon: int | None = None  # updates over which the schedules stretch, for a run to be prolonged; None: `updates`
    average: float = 0.0  # decay of a running mean of θ, which checkpoints hold and the run ends with; 0: none (paper)
    seed: int = 0  # of all random numbers: which images, their noise, z, u
    checkpoint: str | None = None  # a .safetensors file; NAME.resume.pt beside it has what a stopped run needs to go on
    checkpoint_every: int = 100  # updates after which both are written, as they are at the end
    log: str | None = None  # a .csv file, one row an update
    progress: bool = True  # show a progress bar
    precision: str = "float32"  # of f in the chain; "bf16" (a copy of f), "tf32" on GPUs, or "auto": bf16 where native
    alarm: float | None = 1.6  # stop when chains travel this many times as far as needed, see `alarm`; None: never

    def __post_init__(self):
        for name in ("updates", "batch_size", "checkpoint_every", "horizon", "seed"):
            if (value := getattr(self, name)) is not None or name != "horizon":
                object.__setattr__(self, name, integer(name, value, int(name != "seed")))  # NumPy's become Python's
        bounds = {"rate": (1e-12, 1), "rate_final": (1e-12, 1), "sigma": (0, 10), "sigma_final": (0, 10),
                  "lower_from": (0, 1), "average": (0, 1 - 1e-9), "alarm": (1 + 1e-9, 100)}  # fmt: skip
        for name, (low, high) in bounds.items():
            if (value := getattr(self, name)) is not None or name not in ("rate_final", "sigma_final", "alarm"):
                if not low <= value <= high:
                    raise ValueError(f"{name} must lie in {low:g} … {high:g}, got {value!r}")
                object.__setattr__(self, name, float(value))
        resolved(self.precision, torch.device("meta"))

    def rate_at(self, t: int) -> float:
        """η of update t, t = 0 … updates − 1."""
        return self._lowered(self.rate, self.rate_final, t)

    def sigma_at(self, t: int) -> float:
        """σ of update t."""
        return self._lowered(self.sigma, self.sigma_final, t)

    def _lowered(self, start: float, final: float | None, t: int) -> float:
        final = start if final is None else final
        progress = (t / (self.horizon or self.updates) - self.lower_from) / max(1 - self.lower_from, 1e-12)
        return final + (start - final) * (1 + math.cos(math.pi * min(max(progress, 0.0), 1.0))) / 2


def train(model: ShortRun, images: Tensor, config: TrainConfig, resume: bool = True) -> Iterator[Record]:
    """Algorithm 1: trains model.f in place and yields a Record after each update.

    A run that was stopped and is resumed equals the run never stopped, bit for bit on the same CPU. Started on several
    devices (`accelerate launch`), each rank runs its share of the m chains, and rank 0 alone writes.

    The observed images, uint8 [n, C, H, W], stay where they are, in a memory-mapped file for instance. `resume` goes on
    from config.checkpoint if it exists; False starts anew and overwrites it.

    Raises ValueError, at the call, where images, files, checkpoint or network (docs/your-own.md) do not fit; OSError
    where a file cannot be written; FloatingPointError where training diverges, or is about to.
    """
    check_images(images, model.shape)
    if config.batch_size < ranks().num_processes:
        raise ValueError(f"batch_size={config.batch_size} leaves some of {ranks().num_processes} ranks idle")
    check_contract(model)
    state = Progress(model, config, images)
    locks = claim(config) if ranks().is_main_process else []
    if resume and config.checkpoint:
        state.restore()
    same_everywhere(state.step, model.f, state.averaged)
    keep_pages()
    return _algorithm_1(model, images, config, state, locks)


def _algorithm_1(model: ShortRun, images: Tensor, config: TrainConfig, state: Progress, locks) -> Iterator[Record]:
    f, kernel, device, main = model.f, model.kernel, model.device, ranks().is_main_process
    m, mine, shape = config.batch_size, share(config.batch_size), (config.batch_size, *model.shape)
    climbed = chain_copy(f, precision := resolved(config.precision, device))
    log = open_log(config.log, state.step) if config.log and main else None
    # one line a second: nbval loses messages of a cell that sends more than 1,000 of them
    bar = tqdm(range(state.step, config.updates), "Algorithm 1", mininterval=1.0, initial=state.step,
               total=config.updates, disable=not (config.progress and main))  # fmt: skip
    for t in bar:
        started, rate, sigma = time.perf_counter(), config.rate_at(t), config.sigma_at(t)
        data, noise, start, walk = fresh(config.seed, t, device)
        with arithmetic(precision, device):
            which = torch.randint(len(images), (m,), generator=data)[mine]  # all ranks draw m, each keeps its share
            x_plus = to_float(images[which.to(images.device)], device)  # line 1: m observed images
            z = model.prior.draw(shape, start)[mine]  # line 2: m chains start anew, nothing persists
            x_plus = x_plus + sigma * torch.randn(shape, generator=noise, device=device)[mine]  # line 3
            U, force = (torch.randn(shape, generator=walk, device=device)[mine] for _ in range(kernel.steps)), 0.0
            refresh(climbed, f)
            for x_minus, slope in chain(climbed, z, kernel, U):  # line 4: K Langevin steps
                force = force + slope.flatten(1).norm(dim=1).sum() / (kernel.steps * m)
            f_plus, f_minus = f(torch.cat([x_plus, x_minus])).split(len(z))  # one pass for both
            d = (f_plus.sum() - f_minus.sum()) / m
            Δ = torch.autograd.grad(d, state.theta, allow_unused=True, materialize_grads=True)  # eq. (6)
            distance = (x_plus - z).flatten(1).norm(dim=1).sum() / m
            seen, *Δ = summed([torch.stack([d.detach(), force, distance]), *Δ])
        d, force, distance = seen.tolist()
        alarm(state, d, force, distance, Δ, rate, sigma)
        state.advance(Δ, rate, time.perf_counter() - started)  # line 5: Adam along Δ
        record = Record(state.step, d, force, rate, sigma, state.seconds)
        if log:  # before the checkpoint: a run killed between the two then misses no row
            log(record)
        last = state.step == config.updates
        if config.checkpoint and (last or state.step % config.checkpoint_every == 0):
            state.save(record, main)
        bar.set_postfix(d=f"{d:+.2f}", grad_norm=f"{force:.2f}", refresh=False)
        if last:
            state.finish(record)
            ranks().wait_for_everyone()  # then the checkpoint is there
            for lock in locks:
                lock.path.unlink(missing_ok=True)
        yield record


def alarm(state: Progress, d: float, force: float, distance: float, Δ: list[Tensor], rate: float, sigma: float) -> None:
    """Raises FloatingPointError, before θ moves, where training has diverged or is about to.

    A chain of K steps can travel K·s·‖∂f/∂x‖ and has to go ‖x⁺ − z‖, from the noise to the data. The ratio is about 1
    in a new run, up to 2.1 at the end of long healthy ones here (their recipes set 1.7 to 2.2), and climbs 50 … 100
    updates before d explodes.
    """
    config, kernel = state.config, state.model.kernel
    ratio = state.watch(kernel.steps * kernel.step_size * force / distance)
    finite = math.isfinite(d) and math.isfinite(force) and all(δ.isfinite().all() for δ in Δ)
    if not finite or abs(d) * kernel.step_size > 1e3:  # s·f is what chains see, whatever the units of f
        what = f"diverged at update {state.step + 1}: f(x⁺) − f(x⁻) = {d:.3g}, ‖∂f/∂x‖ = {force:.3g}."
    elif config.alarm is not None and ratio > config.alarm:
        what = (f"is about to diverge at update {state.step + 1}: K·s·‖∂f/∂x‖, the length of the chains' path, is "
                f"{ratio:.2f} times ‖x⁺ − z‖, more than alarm={config.alarm:g} (alarm=None goes on).")  # fmt: skip
    else:
        return
    older = previous(config.checkpoint) if config.checkpoint and state.resumes else None
    back = f", or from {older}" if older and older.exists() else ""
    raise FloatingPointError(f"training {what} Remedies: a rate below {rate:.3g}, a sigma above {sigma:.3g}, more "
                             f"Langevin steps, or another seed; start anew{back}.")  # fmt: skip


@torch.no_grad()
def check_contract(model: ShortRun) -> None:
    """ValueError where f is not in float32, mixes images, changes from call to call, or has a wrong `gradient`."""
    name, z = type(model.f).__name__, model.draw_z(4, 0)  # in twos below: batch normalisation may refuse one image
    if any(p.dtype != torch.float32 for p in model.f.parameters() if p.requires_grad):
        raise ValueError(f"{name} must be in float32 for training: model.to(torch.float32)")
    slope = gradient(model.f, z)  # raises errors of its own
    together, again, apart = model.f(z), model.f(z), torch.cat([model.f(z[:2]), model.f(z[2:])])
    if not torch.allclose(together, again, 1e-3, 1e-4) or not torch.allclose(together, apart, 1e-3, 1e-4):
        raise ValueError(f"{name} breaks the model contract: f of an image must not depend on the "
                         "other images nor on the call; take out batch normalisation and dropout")  # fmt: skip
    if getattr(model.f, "gradient", None) and not (slope - gradient(model.f.forward, z)).norm() <= 0.01 * slope.norm():
        raise ValueError(f"{name}.gradient is not the gradient of {name}.forward: correct it, or set gradient = None")


def grow(model: ShortRun, steps: int) -> ShortRun:
    """The model with another K and almost the same images: f is scaled by K_old / K_new, so that K·s·f' is kept.

    So a model trained with a cheap short chain is a good start for the paper's K = 100. Our addition; scales in place.
    """
    grown = model.with_steps(steps)
    rescale(model.f, model.kernel.steps / grown.kernel.steps)
    return grown
