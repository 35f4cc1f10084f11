"""What learning at the paper's scale would take: FLOPs, hours, cost and communication, reckoned on paper.

    python benchmarks/scale.py --utilisation 0.3 --price A100=1.5 --price H100=3

One image's forward pass costs F = Σ 2 C_in k² C_out H_out W_out over the convolutions. A step of the chain is a forward
and a backward pass to x, 2F; eq. (6) needs forward, backward and the weights' gradient of x⁺ and x⁻, 6F less what the
first layer spares. An update costs m (2K + 6) F. Here that is checked against torch's counts; and its time, with
two constants measured at two n_f, against the CPU's at others. No GPU was at hand: ALL GPU NUMBERS ARE ESTIMATES.

A GPU's step takes the longest of: FLOPs / (peak × utilisation); memory traffic / bandwidth (each map is moved 8 times
in a step); launches × 5 µs. Gradients are summed by a ring: 2 (N − 1) messages of 4 P / N bytes, each with a latency.
`peak` is the vendor's dense figure, TF32 where there is TF32. That few images use a GPU
less well is left out, so the speed-ups are upper bounds.
"""

import argparse
import time

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from srmcmc_lib import EnergyNet, Langevin, ShortRun, TrainConfig
from srmcmc_lib.devices import GIB, memory
from srmcmc_lib.resuming import State
from srmcmc_lib.training import gradients

# name: peak TFLOP/s in TF32 (float32 where there is none) and in bf16 (None: none), memory GB/s, memory GiB
GPUS = {
    "T4": (8.1, None, 320, 16),
    "L4": (60, 121, 300, 24),
    "RTX 4090": (82.6, 165.2, 1008, 24),
    "A100": (156, 312, 2039, 80),
    "H100": (494.7, 989.4, 3350, 80),
}
RUNS = [  # dataset, image size, n_f; the paper's are n_f = 32, 64, 128 on CIFAR-10, 64 on the others
    ("CIFAR-10", 32, 32),
    ("CIFAR-10", 32, 64),
    ("CIFAR-10", 32, 128),
    ("CelebA, LSUN", 64, 64),
    ("CelebA, LSUN", 128, 64),
]
LAUNCHES, LAUNCH = 40, 5e-6  # kernels a step (5 layers forward and backward, the update), seconds each
TRAFFIC = 8 * 4  # bytes a step moves for one number of a layer's output


def convolutions(f: EnergyNet) -> list[tuple[int, int]]:
    """(FLOPs of the forward pass, numbers put out) of each convolution, for one image, by the formula."""
    found, side = [], 1 << (f.image_size - 1).bit_length()
    for layer in f.layers:
        if isinstance(layer, nn.Conv2d):
            k, pad, stride = layer.kernel_size[0], layer.padding[0], layer.stride[0]
            side = (side + 2 * pad - k) // stride + 1
            put_out = layer.out_channels * side**2
            found.append((2 * layer.in_channels * k**2 * put_out, put_out))
    return found


def update_flops(f: EnergyNet, K: int, m: int) -> int:
    """FLOPs of one update; the first layer has no gradient to x to compute in eq. (6)."""
    layers = [flops for flops, _ in convolutions(f)]
    return m * ((2 * K + 6) * sum(layers) - 2 * layers[0])


class Counter(TorchDispatchMode):
    """Adds up torch's own count of each operation (its FlopCounterMode can't see autograd.grad by an input)."""

    flops = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if count := flop_registry.get(func._overloadpacket):
            self.flops += count(*args, **(kwargs or {}), out_val=out)
        return out


def measured(image_size: int, width: int, K: int, m: int, repeats: int) -> tuple[int, float]:
    """FLOPs of an update by torch's counter, and its CPU seconds on one thread (the least of some)."""
    model = ShortRun(EnergyNet(3, image_size, width=width), Langevin(K))
    images = torch.zeros(m, 3, image_size, image_size, dtype=torch.uint8)
    state = State(model, TrainConfig(batch_size=m), images)
    with Counter() as counter:
        gradients(state, model.f, images, 0.03, m)
    seconds = []
    for _ in range(repeats):
        start = time.process_time()  # of this process
        gradients(state, model.f, images, 0.03, m)
        seconds.append(time.process_time() - start)
    return counter.flops, min(seconds)


def check(K: int, m: int, repeats: int) -> None:
    """The FLOP formula against torch's counter; and time as FLOPs / rate + maps / speed, the constants from two n_f,
    against the time measured at two others."""
    print(f"\nChecked on this CPU, one thread, 32×32×3, K = {K}, m = {m}:")
    print(f"{'n_f':>5} {'formula GFLOP':>14} {'counter GFLOP':>14} {'measured s':>11} {'predicted s':>12} {'error':>7}")
    known, constants = [], None
    for width in (16, 64, 32, 96):
        f = EnergyNet(3, 32, width=width)
        costs = [update_flops(f, K, m) / 1e9, (K + 3) * m * sum(numbers for _, numbers in convolutions(f)) / 1e9]
        counted, seconds = measured(32, width, K, m, repeats)
        known.append([*costs, seconds])
        if len(known) == 2:
            table = torch.tensor(known, dtype=torch.float64)
            constants = torch.linalg.solve(table[:, :2], table[:, 2]).tolist()
        predicted = sum(a * b for a, b in zip(constants, costs, strict=True)) if len(known) > 2 else seconds
        error = f"{predicted / seconds - 1:+.0%}" if len(known) > 2 else "given"
        print(
            f"{width:5} {costs[0]:14.2f} {counted / 1e9:14.2f} {seconds:11.3f} {predicted:12.3f} {error:>7}", flush=True
        )
    start = time.process_time()
    n = sum(torch.randn(64, 3, 32, 32).numel() for _ in range(50))
    noise = (time.process_time() - start) / n
    print(f"{1 / constants[0]:.0f} GFLOP/s and {constants[1]:.2f} ns a number put out in a step")
    print(f"the chain's noise, were it drawn on this CPU: {noise * 1e9:.1f} ns a number")


def step_seconds(f: EnergyNet, images: float, peak: float, bandwidth: float, utilisation: float) -> float:
    """One step of the chain for so many images on one GPU."""
    layers = convolutions(f)
    compute = 2 * sum(flops for flops, _ in layers) * images / (peak * 1e12 * utilisation)
    traffic = TRAFFIC * sum(numbers for _, numbers in layers) * images / (bandwidth * 1e9)
    return max(compute, traffic, LAUNCHES * LAUNCH)


def update_seconds(f: EnergyNet, K: int, images: float, gpu: str, precision: str, utilisation: float) -> float:
    tf32, bf16, bandwidth, _ = GPUS[gpu]
    peak = bf16 if precision == "bf16" and bf16 else tf32
    return (K + 3) * step_seconds(f, images, peak, bandwidth, utilisation)  # eq. (6) costs as much as three steps


def hours(args) -> None:
    names = "".join(f"{gpu:>12}" for gpu in GPUS)
    print(f"\nESTIMATED hours of {args.updates:,} updates, K = {args.steps}, m = {args.batch}, {args.precision}, "
          f"utilisation {args.utilisation:.0%}:")  # fmt: skip
    print(f"{'dataset':13} {'size':>4} {'n_f':>4} {'params':>7} {'TFLOP/update':>13} {'memory GiB':>11}{names}")
    for dataset, size, width in RUNS:
        f = EnergyNet(3, size, width=width)
        count = sum(p.numel() for p in f.parameters())
        flops, need = update_flops(f, args.steps, args.batch), memory(f, (3, size, size), args.batch)
        cells = []
        for gpu in GPUS:
            time_h = (
                args.updates * update_seconds(f, args.steps, args.batch, gpu, args.precision, args.utilisation) / 3600
            )
            price = args.price.get(gpu)
            cells.append(f"{time_h:.0f}" + (f" = {time_h * price:.0f}" if price else ""))
        print(f"{dataset:13} {size:4} {width:4} {count / 1e6:6.1f}M {flops / 1e12:13.2f} "
              f"{need / GIB:11.2f}" + "".join(f"{c:>12}" for c in cells))  # fmt: skip
    if args.price:
        print("hours = cost, at", ", ".join(f"{gpu} {price:g}" for gpu, price in args.price.items()), "an hour")


def scaling(args) -> None:
    gpu = args.scaling_on
    print(f"\nESTIMATED scaling of one update on {gpu}s, m = {args.batch} in all, links of {args.link:g} GB/s, "
          f"{args.latency:g} µs a message:")  # fmt: skip
    print(f"{'dataset':13} {'size':>4} {'n_f':>4} {'GPUs':>5} {'MB sent by each':>16} {'sending ms':>11} "
          f"{'update ms':>10} {'speed-up':>9} {'efficiency':>11}")  # fmt: skip
    for dataset, size, width in RUNS[1:4]:
        f = EnergyNet(3, size, width=width)
        volume = 4 * sum(p.numel() for p in f.parameters())
        alone = update_seconds(f, args.steps, args.batch, gpu, args.precision, args.utilisation)
        stop = 1
        for N in (1, 2, 4, 8, 16, 32, 64):
            share = -(-args.batch // N)
            sent = 2 * (N - 1) / N * volume
            sending = 2 * (N - 1) * args.latency * 1e-6 + sent / (args.link * 1e9)
            total = update_seconds(f, args.steps, share, gpu, args.precision, args.utilisation) + sending
            stop = N if alone / total / N >= 0.5 else stop
            print(f"{dataset:13} {size:4} {width:4} {N:5} {sent / 1e6:16.1f} {sending * 1e3:11.2f} {total * 1e3:10.1f} "
                  f"{alone / total:9.1f} {alone / total / N:11.0%}")  # fmt: skip
        print(f"{'':13} efficient (50 % or more) up to {stop} GPUs; beyond that the launches of a step "
              "set the time, and a larger m costs little")  # fmt: skip


def prices(text: str) -> tuple[str, float]:
    gpu, _, price = text.partition("=")
    if gpu not in GPUS:
        raise argparse.ArgumentTypeError(f"{gpu!r} is unknown; choose one of {', '.join(GPUS)}")
    return gpu, float(price)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=200_000)
    parser.add_argument("--steps", type=int, default=100, help="K (default 100)")
    parser.add_argument("--batch", type=int, default=64, help="m, on all GPUs together (default 64)")
    parser.add_argument("--utilisation", type=float, default=0.3, help="of the peak; a guess (default 0.3)")
    parser.add_argument("--precision", choices=("tf32", "bf16"), default="tf32")
    parser.add_argument("--price", type=prices, action="append", default=[], metavar="GPU=PRICE", help="of an hour")
    parser.add_argument("--scaling-on", choices=GPUS, default="A100")
    parser.add_argument("--link", type=float, default=25, help="GB/s of a link (default 25: 200 Gbit/s between nodes)")
    parser.add_argument("--latency", type=float, default=10, help="µs of a message (default 10)")
    parser.add_argument("--repeats", type=int, default=5, help="of each CPU measurement (default 5)")
    args = parser.parse_args()
    args.price = dict(args.price)
    torch.set_num_threads(1)
    hours(args)
    scaling(args)
    check(K=4, m=16, repeats=args.repeats)
