"""Where an update runs: ranks and their shares of a batch, precision, and how much of it the memory holds at once.

`accelerate launch`, or `accelerate.notebook_launcher` in JupyterLab, starts one process (a rank) for each device. All
ranks draw the same random numbers for the whole batch and keep their own share, so that any number of ranks makes the
same update, up to the order of sums.
"""

import copy
import ctypes
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import broadcast, reduce
from torch import Tensor, nn

PRECISIONS = ("auto", "float32", "tf32", "bf16")
GIB = 2**30


def ranks() -> PartialState:
    """The processes that learn together, usually one, and this one's place, device and role among them.

    accelerate joins processes on CPUs only when told that there is no GPU to use; else each would learn alone. A rank
    may wait long for the one that prepares a data set: NCCL's own limit is 10 minutes.
    """
    no_gpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true") or not torch.accelerator.is_available()
    return PartialState(cpu=no_gpu, timeout=timedelta(hours=2))


if hasattr(os, "register_at_fork"):
    # notebook_launcher forks the kernel: its children must not take over what it found, that it is the only process
    os.register_at_fork(after_in_child=PartialState._reset_state)


def keep_pages() -> None:
    """Tells glibc to keep freed memory: fresh pages for each large tensor of a step cost up to a quarter of its time."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "gnu_get_libc_version"):
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
        libc.mallopt(-3, 2**30)  # M_MMAP_THRESHOLD


def share(m: int) -> slice:
    """The images of a batch of m that are this rank's own."""
    rank, size = ranks().process_index, ranks().num_processes
    return slice(rank * m // size, (rank + 1) * m // size)


def summed(tensors: list[Tensor]) -> list[Tensor]:
    """The sums over all ranks, sent as one vector: one message an update, whatever the number of layers."""
    if ranks().num_processes == 1:
        return tensors
    total = reduce(torch.cat([t.reshape(-1) for t in tensors]), "sum")
    return [part.view(t.shape) for part, t in zip(total.split([t.numel() for t in tensors]), tensors, strict=True)]


@torch.no_grad()
def same_start(f: nn.Module) -> None:
    """Gives every rank rank 0's θ: ranks may have built the network from different seeds."""
    if ranks().num_processes > 1:
        for tensor in f.state_dict().values():
            tensor.copy_(broadcast(tensor.contiguous()))


def check_same(step: int) -> None:
    """ValueError, on every rank, where the ranks found different checkpoints to resume from."""
    if ranks().num_processes == 1:
        return
    mean, mean_square = reduce(torch.tensor([step, step**2], dtype=torch.float64, device=ranks().device)).tolist()
    if mean_square != mean**2:
        raise ValueError(f"rank {ranks().process_index} would resume from update {step}, others from another one: "
                         "put the checkpoint where all nodes can read it")  # fmt: skip


def native_bf16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 in hardware; a CPU that does not is 20 to 80 times slower with it."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    try:  # CPUs of the same name come with and without it
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return device.type == "cpu" and ("avx512_bf16" in flags or "amx_bf16" in flags)


def resolved(precision: str, device: torch.device) -> str:
    """"auto" as "bf16" or "float32", whichever is fast on this device; other precisions as they are."""
    if precision == "auto":
        return "bf16" if native_bf16(device) else "float32"
    if precision == "bf16" and not native_bf16(device):
        warnings.warn(f"bfloat16 is slow on this {device.type}, which has no instruction for it: take precision='auto'",
                      stacklevel=2)
    return precision


def chain_copy(f: nn.Module, precision: str) -> nn.Module:
    """The network that the chain climbs: f itself, or for "bf16" a copy of it in bfloat16, for `refresh` to renew.

    Autocast would convert weights and activations again at each of the K steps; the copy is converted once an update.
    """
    return f if precision != "bf16" else copy.deepcopy(f).to(torch.bfloat16).requires_grad_(False)


@torch.no_grad()
def refresh(climbed: nn.Module, f: nn.Module) -> None:
    """Gives the copy the values of f; nothing to do where the chain climbs f itself."""
    if climbed is not f:
        for target, source in zip(climbed.parameters(), f.parameters(), strict=True):
            target.copy_(source)


@contextmanager
def arithmetic(precision: str, device: torch.device) -> Iterator[None]:
    """On CUDA, float32 means float32 inside the block, not the TF32 that cuDNN takes by default; put back after it."""
    if device.type != "cuda":
        yield
        return
    backends = torch.backends.cudnn, torch.backends.cuda.matmul
    before = [b.allow_tf32 for b in backends]
    try:
        for b in backends:
            b.allow_tf32 = precision != "float32"
        yield
    finally:
        for b, allowed in zip(backends, before, strict=True):
            b.allow_tf32 = allowed


def memory(f: nn.Module, shape: tuple[int, int, int], m: int) -> int:
    """An estimate of the bytes that learning takes with m images at once, in float32; bf16 needs less.

    The peak is the one pass over x⁺ and x⁻ together. What automatic differentiation keeps for it is counted exactly, on
    a copy of f without data; gradients on their way back add the largest of these tensors once more (our reckoning),
    θ, its gradient, Adam and the average of θ five times θ. Within 15 % of the allocations measured on a CPU. Not
    counted: cuDNN's workspace and the CUDA context (together about 1 GiB).
    """
    ghost, kept = copy.deepcopy(f).to("meta"), {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.setdefault(t.untyped_storage()._cdata, t), lambda t: t
    ):
        ghost(torch.empty(2, *shape, device="meta"))
    weights = {p.untyped_storage()._cdata for p in ghost.parameters()}
    sizes = [t.untyped_storage().nbytes() for key, t in kept.items() if key not in weights]
    θ = sum(p.numel() * p.element_size() for p in ghost.parameters())
    return m * (sum(sizes) + max(sizes, default=0)) + 5 * θ


def at_once(f: nn.Module, shape: tuple[int, int, int], m: int, device: torch.device) -> tuple[int, str]:
    """How many of this rank's m images to take at once, halved until the estimate fits, and a sentence about it."""
    if device.type != "cuda":
        return m, ""  # the host's memory is paged, other devices do not tell what is free
    (free, _), n = torch.cuda.mem_get_info(device), m
    try:
        while n > 1 and memory(f, shape, n) > 0.9 * free:
            n = (n + 1) // 2
        need = f"about {memory(f, shape, n) / GIB:.2g}"
    except RuntimeError as error:  # a network of the user's own that does not run without data
        need = f"an unknown number of ({error})"
    return n, f"{device}: {n} of {m} images at once need {need} GiB of {free / GIB:.3g} GiB free"
