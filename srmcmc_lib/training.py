"""Algorithm 1: learning the short-run chain, as an iterator over explicit records."""

import math
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from .checkpoint import check_writable
from .data import check_images, to_float
from .devices import (
    arithmetic, at_once, chain_copy, check_same, keep_pages, ranks, refresh, resolved, same_start, share, summed,
)  # fmt: skip
from .energy import check_scalable, scale
from .langevin import langevin_chain
from .priors import Gaussian
from .records import Record, open_log
from .resuming import WATCHED, State, fresh, previous
from .settings import TrainConfig
from .shortrun import ShortRun

NOISE = Gaussian()  # N(0, I), drawn on the generator's device
PULL = 0.1  # the share of log(path / ratio) by which f is scaled at each update


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
        resume: continue from config.checkpoint if that file exists; False starts anew and overwrites it, and the older
            NAME.previous… of another run is removed.

    Raises (at the call, before any work):
        ValueError: wrong images, a checkpoint that was made with other settings or is beyond config.updates, fewer
            images in a batch than ranks, a `path` for a network that `energy.check_scalable` refuses.
        OSError: the checkpoint's folder cannot be made or written to.
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
    if config.path:
        check_scalable(model.f)
    same_start(model.f)
    if config.checkpoint:
        check_writable(config.checkpoint)
    state = State(model, config, images)
    if resume and config.checkpoint and Path(config.checkpoint).exists():
        state.restore(Path(config.checkpoint))
    check_same(state.step)
    return _updates(images, state)


def _updates(images: Tensor, state: State) -> Iterator[Record]:
    model, config, main = state.model, state.config, ranks().is_main_process
    keep_pages()
    precision = resolved(config.precision, model.device)
    f = torch.compile(model.f, dynamic=False) if config.compile else model.f
    climbed = chain_copy(f, precision)
    mine = share(config.batch_size)
    n, sentence = at_once(model.f, model.shape, config.sub_batch or mine.stop - mine.start, model.device)
    write = open_log(config.log, state.step) if config.log and main else None
    # one line a second: nbval's kernel client loses messages of a cell that sends more than 1,000 of them
    settings = {"desc": "Algorithm 1", "mininterval": 1.0, "disable": not (config.progress and main)}
    bar = tqdm(total=config.updates, initial=state.step, **settings)
    if sentence:
        bar.write(sentence)
    with bar:
        while state.step < config.updates:
            rate = config.scheduled(config.rate, config.rate_final, state.step)
            sigma = config.scheduled(config.sigma, config.sigma_final, state.step)
            started = time.perf_counter()
            refresh(climbed, f)
            with arithmetic(precision, model.device):
                d, grad_norm, way, n = update(state, f, climbed, images, sigma, rate, n)
            state.ratios.append(model.kernel.steps * model.kernel.step_size * grad_norm / way)
            check(d, grad_norm, state, rate, sigma)
            if config.path and grad_norm > 0:  # f = 0, where LinearEnergy starts, has no path
                scale(model.f, (config.path / state.ratios[-1]) ** PULL)
            state.step += 1
            state.update_average()
            state.seconds += time.perf_counter() - started  # of learning, not of what is done with the records
            record = Record(state.step, d, grad_norm, rate, sigma, state.seconds)
            if write:  # before the checkpoint: a run killed in between then misses no row
                write(record)
            last = state.step == config.updates
            if config.checkpoint and (last or state.step % config.checkpoint_every == 0):
                if main:
                    state.save(Path(config.checkpoint), record)
                state.owns_checkpoint = True  # on all ranks: `check` tells each the same
            bar.update()
            bar.set_postfix(d=f"{d:+.2f}", grad_norm=f"{grad_norm:.2f}", refresh=False)
            if last:
                state.finish(record)
                ranks().wait_for_everyone()  # the checkpoint is there when any rank has finished
            yield record


def check(d: float, grad_norm: float, state: State, rate: float, sigma: float) -> None:
    """Raises FloatingPointError where learning has diverged (d ran away), or is about to (the alarm).

    A chain of K steps covers a path of at most K·s·‖∂f/∂x‖ and has to go ‖x⁺ − z‖, from the noise to the data. Their
    ratio says how far the chain strays: 0.9 … 1.2 for the paper's CIFAR-10 (Table 2), up to 1.5 in healthy runs here,
    more where `config.path` says so. It climbs 50 … 100 updates before d explodes. So K·‖∂f/∂x‖ ≈ 40 is no constant of
    nature: it is that distance.
    """
    ratio, config, way_out = sum(state.ratios) / len(state.ratios), state.config, ""
    if not math.isfinite(d) or abs(d) * state.model.kernel.step_size > 1e3:  # s·f is what chains see, in any units of f
        what = f"learning diverged at update {state.step + 1}: f(x⁺) − f(x⁻) = {d:.3g}, ‖∂f/∂x‖ = {grad_norm:.3g}."
    elif config.alarm is not None and ratio > config.alarm and len(state.ratios) == WATCHED:
        what = (f"learning is about to diverge at update {state.step + 1}: over {WATCHED} updates the chains' path "
                f"K·s·‖∂f/∂x‖ was {ratio:.2f} times ‖x⁺ − z‖, more than alarm={config.alarm}.")  # fmt: skip
        way_out = " alarm=None goes on regardless."
    else:
        return
    older = ""
    if config.checkpoint and previous(config.checkpoint).exists() and state.owns_checkpoint:
        older = (f", or from ShortRun.load({str(previous(config.checkpoint))!r}) under another checkpoint name "
                 "(the latest checkpoint may already be on its way out)")  # fmt: skip
    raise FloatingPointError(
        f"{what} Remedies: a rate below {rate:.3g}, a sigma above {sigma:.3g}, more Langevin steps, "
        f"{'a shorter path, ' if config.path else ''}or another seed; start anew{older}.{way_out}"
    )


def update(state: State, f: nn.Module, climbed: nn.Module, images: Tensor, sigma: float, rate: float, n: int) -> tuple:
    """One pass of Algorithm 1's loop, n chains at once: returns d and grad_norm as in Record, mean ‖x⁺ − z‖, and n.

    Where n is too much for the memory, the same update is tried again with half as many, which is then returned.
    """
    while True:
        state.adam.zero_grad()
        try:
            seen = gradients(state, f, climbed, images, sigma, n)
            break
        except torch.OutOfMemoryError:
            if n == 1:
                raise
        n = (n + 1) // 2  # outside of `except`, which still holds the tensors of the attempt
        warnings.warn(f"{state.model.device} is out of memory: {n} images at once from now on", stacklevel=2)

    θ = [p for p in state.model.f.parameters() if p.grad is not None]
    seen, *grads = summed([seen, *[p.grad for p in θ]])
    for p, grad in zip(θ, grads, strict=True):
        p.grad = grad
    for group in state.adam.param_groups:
        group["lr"] = rate
    state.adam.step()
    return *seen.tolist(), n


def gradients(state: State, f: nn.Module, climbed: nn.Module, images: Tensor, sigma: float, n: int) -> Tensor:
    """The loop's lines 1 to 4 for this rank's share: adds its part of −∂d/∂θ to .grad; its part of (d, grad_norm, way).

    Every rank draws the whole batch's randomness, so a share does not depend on how many ranks there are.
    """
    model, m = state.model, state.config.batch_size
    g = fresh(state.config.seed, state.step, model.device)
    device, mine, shape = model.device, share(m), (m, *model.shape)
    x_plus = to_float(images[torch.randint(len(images), (m,), generator=g["data"])[mine].to(images.device)].to(device))
    z = model.prior.draw(shape, g["z"])[mine].to(device)
    x_plus = x_plus + sigma * NOISE.draw(shape, g["sigma"])[mine].to(device)
    before, seen = g["u"].get_state(), 0.0
    for start in range(0, len(z), n):
        g["u"].set_state(before)  # each part sees its own rows of the same noise
        part = slice(start, start + n)
        U = (NOISE.draw(shape, g["u"])[mine][part].to(device) for _ in range(model.kernel.steps))
        norms, x_part = [], x_plus[part]
        for x_minus, df_dx in langevin_chain(climbed, z[part], model.kernel, U):
            norms += [df_dx.flatten(1).norm(dim=1).mean()] if df_dx is not None else []
        f_plus, f_minus = f(torch.cat([x_part, x_minus])).split(len(x_part))  # one forward pass for both
        d, weight = f_plus.mean() - f_minus.mean(), len(x_part) / m
        (-d * weight).backward()  # Adam descends, eq. (6) ascends
        way = (x_part - z[part]).flatten(1).norm(dim=1).mean()
        seen = seen + weight * torch.stack([d.detach(), torch.stack(norms).mean(), way])
    return seen
