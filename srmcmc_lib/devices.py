"""Where an update runs: ranks and their shares of a batch, precision, and how much of it the memory holds at once.

`accelerate launch`, or `accelerate.notebook_launcher` in JupyterLab, starts one process (a rank) for each device. All
ranks draw the same random numbers for the whole batch and keep their own share, so that any number of ranks makes the
same update, up to the order of sums.
"""

import copy
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
from accelerate import PartialState
from accelerate.utils import broadcast, reduce
from torch import Tensor, nn

PRECISIONS = ("float32", "tf32", "bf16")
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


class Autocast(nn.Module):
    """f with its convolutions in bfloat16, while images, f(x) and f'(x) stay float32: so does the chain's update."""

    def __init__(self, f: nn.Module):
        super().__init__()
        self.f = f

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16):
            return self.f(x).float()


def prepared(f: nn.Module, precision: str, compile: bool) -> nn.Module:
    """f as an update evaluates it; its parameters are f's own."""
    f = torch.compile(f, dynamic=False) if compile else f
    return Autocast(f) if precision == "bf16" else f


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
