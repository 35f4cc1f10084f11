"""Where an update runs: ranks and their shares of a batch, and the arithmetic of the chain.

`accelerate launch` starts one process (a rank) for each device. All ranks draw the same random numbers for the whole
batch and keep their own share, so any number of ranks makes the same update, up to the order of sums.
"""

import copy
import ctypes
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import broadcast, reduce
from torch import Tensor, nn

PRECISIONS = ("auto", "float32", "tf32", "bf16")


def ranks() -> PartialState:
    """The processes that train together, usually one, and this one's place, device and role among them."""
    # accelerate joins CPU processes only when told that there is no GPU; otherwise each would train alone
    no_gpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true") or not torch.accelerator.is_available()
    return PartialState(cpu=no_gpu, timeout=timedelta(hours=2))  # others may wait while one prepares a data set


if hasattr(os, "register_at_fork"):  # forked by notebook_launcher, a child must not think it is the only process
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
def same_everywhere(step: int, *modules: nn.Module) -> None:
    """Gives every rank rank 0's weights; ValueError, on all ranks, if they do not all stand at the same update."""
    if ranks().num_processes == 1:
        return
    mean, mean_square = reduce(torch.tensor([step, step**2], dtype=torch.float64, device=ranks().device)).tolist()
    if mean_square != mean**2:
        raise ValueError(f"rank {ranks().process_index} would resume from update {step}, others from another one: "
                         "put the checkpoint where all nodes can read it")  # fmt: skip
    for tensor in [t for module in modules for t in module.state_dict().values()]:
        tensor.copy_(broadcast(tensor.contiguous()))


def native_bf16(device: torch.device) -> bool:
    """Whether the device has instructions for bfloat16. CPUs of one name come with and without: ask, don't guess."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    cpuinfo = Path("/proc/cpuinfo")
    flags = cpuinfo.read_text() if device.type == "cpu" and cpuinfo.exists() else ""
    return "avx512_bf16" in flags or "amx_bf16" in flags


def resolved(precision: str, device: torch.device) -> str:
    """What "auto" means on this device: "bf16" where it is native, else "float32". Other precisions as they are."""
    if precision not in PRECISIONS:
        raise ValueError(f"precision={precision!r} is unknown; choose one of {', '.join(PRECISIONS)}")
    if precision == "bf16" and device.type in ("cpu", "cuda") and not native_bf16(device):
        warnings.warn(f"bf16 is slow: this {device.type} has no bfloat16 instructions; take 'auto'", stacklevel=2)
    return precision if precision != "auto" else "bf16" if native_bf16(device) else "float32"


def chain_copy(f: nn.Module, precision: str) -> nn.Module:
    """The network that the chain climbs: f itself, or for "bf16" a bfloat16 copy, which `refresh` brings up to date."""
    # autocast would convert the weights again at each of the K steps, which costs what bfloat16 gains
    return copy.deepcopy(f).to(torch.bfloat16) if precision == "bf16" else f


def refresh(climbed: nn.Module, f: nn.Module) -> None:
    """Copies f's weights to `climbed`, once an update; nothing to do where the chain climbs f itself."""
    if climbed is not f:
        climbed.load_state_dict(f.state_dict())


@contextmanager
def arithmetic(precision: str, device: torch.device) -> Iterator[None]:
    """On CUDA, only "tf32" allows TF32 in this block (cuDNN takes it by default); put back after it."""
    with ExitStack() as after:
        for b in (torch.backends.cudnn, torch.backends.cuda.matmul) if device.type == "cuda" else ():
            after.callback(setattr, b, "allow_tf32", b.allow_tf32)
            b.allow_tf32 = precision == "tf32"
        yield


def keep_pages() -> None:
    """Tells glibc to keep freed memory: new pages for large tensors take up to a quarter of a step's time."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "gnu_get_libc_version"):
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
        libc.mallopt(-3, 2**30) or libc.mallopt(-3, 2**25)  # M_MMAP_THRESHOLD; older ones take no more than 32 MiB
