"""One Langevin step and one update of Algorithm 1, against the authors' plain loop: how much faster we are, and why.

    python benchmarks/chain.py                                # all sizes, both states of malloc: about five minutes
    python benchmarks/chain.py --widths 16 --batches 64 --states told

The methods run in turns within one process, a fresh one for each line, and are compared by their medians: ratios hold
across machines, milliseconds do not. The share in brackets is of the rate at which this machine multiplies large
matrices in that precision, the limit of any method that computes the same convolutions. With one thread the clock is
the processor time, so other processes count less.

States of malloc: `fresh`, as users find it in a new process: glibc gives every large tensor new pages and takes them
back; `told`, with the MALLOC_ variables of the Makefile: it keeps them. A process that has held a very large tensor
lies in between. The peer library is optional: pip install torchebm.
"""

import argparse
import copy
import os
import statistics
import subprocess
import sys
import time

import torch

from srmcmc_lib import EnergyNet, Langevin, ShortRun, TrainConfig, train
from srmcmc_lib.devices import chain_copy, native_bf16
from srmcmc_lib.langevin import chain

TOLD = {"MALLOC_MMAP_THRESHOLD_": "1000000000", "MALLOC_TRIM_THRESHOLD_": "4000000000",
        "MALLOC_TOP_PAD_": "268435456"}  # fmt: skip
BF16 = native_bf16(torch.device("cpu"))


def authors(f):
    """The chain of the authors' public code: θ needs gradients too, default memory layout, no step in place."""

    def run(x, K):
        for _ in range(K):
            x = x.detach().requires_grad_()
            x = x + torch.autograd.grad(f(x).sum(), x)[0] + 0.01 * torch.randn_like(x)

    return run


def ours(f):
    def run(x, K):
        for _ in chain(f, x, Langevin(K), (torch.randn_like(x) for _ in range(K))):
            pass

    return run


def torchebm(f):
    """The peer library's LangevinDynamics on the same network, or None."""
    try:
        from torchebm.core import BaseModel
        from torchebm.samplers import LangevinDynamics
    except ImportError:
        return None

    class Energy(BaseModel):
        def forward(self, x):
            return -f(x)

    sampler = LangevinDynamics(Energy(), step_size=1.0, noise_scale=0.01 / 2**0.5)
    return lambda x, K: sampler.sample(x=x, n_steps=K)


def clock() -> float:
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def seconds(methods: dict, repeats: int) -> dict:
    """The median seconds of each method's call, all methods called in turns."""
    found = {name: [] for name in methods}
    for _ in range(repeats):
        for name, call in methods.items():
            started = clock()
            call()
            found[name].append(clock() - started)
    return {name: statistics.median(values) for name, values in found.items()}


def matrix_rate(dtype: torch.dtype, n: int = 2048) -> float:
    """Floating-point operations a second of an n × n matrix product."""
    a, b, out = (torch.randn(n, n).to(dtype) for _ in range(3))
    torch.mm(a, b, out=out)
    return 2 * n**3 / seconds({"mm": lambda: torch.mm(a, b, out=out)}, 5)["mm"]


def operations(f: EnergyNet) -> float:
    """Floating-point operations of f and f'(x) for one image: each convolution forwards, and its gradient in x."""
    total, size = 0, f.image_size
    for layer in f.layers[::2]:
        size = (size + 2 * layer.padding[0] - layer.kernel_size[0]) // layer.stride[0] + 1
        total += 2 * layer.weight.numel() * size**2
    return 2 * total


def step(width: int, batch: int, state: str, repeats: int) -> str:
    """A line of the table: one Langevin step."""
    f = EnergyNet(1, 32, width=width)
    plain = copy.deepcopy(f.layers).to(memory_format=torch.contiguous_format)
    x = torch.rand(batch, 1, 32, 32) * 2 - 1
    chains = {
        "authors": authors(lambda x: plain(x).flatten()),
        "float32": ours(f),
        "bf16": ours(chain_copy(f, "bf16")) if BF16 else None,
        "torchebm": torchebm(lambda x: plain(x).flatten()),
    }
    chains = {name: run for name, run in chains.items() if run}
    started = clock()
    for run in chains.values():  # the warm-up, and how long the timed calls should be
        run(x, 3)
    K = max(2, min(100, int(0.3 * len(chains) / (clock() - started))))
    times = seconds({name: lambda run=run: run(x, K) for name, run in chains.items()}, repeats)
    rates = {t: matrix_rate(t) for t in (torch.float32, *[torch.bfloat16] * BF16)}  # last, for it holds large tensors
    line = f"{width:4}{batch:6}  {state:6}"
    for name in ("authors", "float32", "bf16", "torchebm"):
        if t := times.get(name):
            what = f"{1e3 * t / K:.2f} ms" if name == "authors" else f"{times['authors'] / t:.2f} ×"
            share = K * batch * operations(f) / t / rates[torch.bfloat16 if name == "bf16" else torch.float32]
            line += f"{what:>12} ({share:.2f})"
        else:
            line += f"{'–':>19}"
    return line


def update(width: int, batch: int, state: str, repeats: int) -> str:
    """Another line: one update of `train` with K = 100, bf16 against float32. `train` itself tells malloc."""
    images = torch.randint(256, (1000, 1, 32, 32), dtype=torch.uint8)
    runs = {}
    for precision in ("float32", "bf16"):
        config = TrainConfig(updates=repeats + 1, batch_size=batch, precision=precision, progress=False)
        runs[precision] = train(ShortRun(EnergyNet(1, 32, width=width), Langevin(100)), images, config)
        next(runs[precision])
    times = seconds({name: lambda run=run: next(run) for name, run in runs.items()}, repeats)
    return (f"One update of train, n_f = {width}, m = {batch}, K = 100: float32 {times['float32']:.2f} s, "
            f"bf16 {times['float32'] / times['bf16']:.2f} × as fast")  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=[16, 32, 64], help="n_f")
    parser.add_argument("--batches", type=int, nargs="+", default=[64, 8, 1])
    parser.add_argument("--states", nargs="+", default=["told", "fresh"], choices=["told", "fresh"], help="of malloc")
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--line", choices=["step", "update"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.line:  # this is one of the fresh processes
        torch.set_num_threads(args.threads)
        torch.manual_seed(0)
        print(globals()[args.line](args.widths[0], args.batches[0], args.states[0], args.repeats))
        sys.exit()

    def fresh_process(line, width, batch, state, repeats):
        kept = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")} | (TOLD if state == "told" else {})
        words = f"--line {line} --widths {width} --batches {batch} --states {state} --repeats {repeats}"
        subprocess.run([sys.executable, __file__, *words.split(), f"--threads={args.threads}"], env=kept, check=True)

    print(f"One step, 1×32×32, {args.threads} thread(s), {'bf16 is' if BF16 else 'no'} native")
    print(" n_f batch  malloc" + "".join(f"{name:>19}" for name in ("authors' loop", "float32", "bf16", "torchebm")))
    for state in args.states:
        for width in args.widths:
            for batch in args.batches:
                fresh_process("step", width, batch, state, args.repeats)
    if BF16:
        fresh_process("update", 16, 64, "told", 5)
