"""Reconstruction, measured: the speed of its gradients, memory against K, errors on held-out images.

    python benchmarks/reconstruction.py speed memory                 # a minute or two; no model is needed
    python benchmarks/reconstruction.py errors --model fashion_mnist # 256 test images, 200 iterations: over an hour
    python benchmarks/reconstruction.py errors --model fashion_mnist_smooth --iterations 8  # each costs 4 chains

Times are ratios within one run; bytes are the CPU allocator's.
"""

import argparse
import time

import numpy as np
import torch
from torch.profiler import profile

from srmcmc_lib import EnergyNet, Langevin, ShortRun, observed
from srmcmc_lib.data import to_float
from srmcmc_lib.langevin import chain
from srmcmc_lib.reconstruction import CARRIES

STEPS = (10, 25, 50, 100, 200, 400)


def carried(name: str):
    """L'(z) = 2 (∂M/∂z)ᵀ (M_θ(z) − x) by one of the library's ways to carry the error back to z."""

    def gradient(f, kernel, x, z):
        path, M = [], z
        for following, slope in chain(f, z, kernel):
            if name != "residual":
                path.append((M, slope))
            M = following
        return 2 * CARRIES[name](f, kernel, path, M - x)

    return gradient


def torch_graph(f, kernel, x, z):
    """L'(z) as one would write it at first: torch keeps the graph of all K steps."""
    M = z = z.detach().requires_grad_()
    for _ in range(kernel.steps):
        M = M + kernel.step_size * torch.autograd.grad(f(M).sum(), M, create_graph=True)[0]
    return torch.autograd.grad((x - M).square().sum(), z)[0]


WAYS = {"residual": carried("residual"), "adjoint": carried("adjoint"), "torch's graph": torch_graph}


def problem(activation: str, steps: int, images: int = 8) -> tuple:
    """A chain of an untrained n_f = 16 network at 32×32, which costs what a trained one does."""
    torch.manual_seed(0)
    model = ShortRun(EnergyNet(1, 32, width=16, activation=activation), Langevin(steps))
    return model.f, model.kernel, torch.rand(images, *model.shape) * 2 - 1, model.draw_z(images, 0)


def speed(args) -> None:
    """Three ways to the same gradient, in turns, LeakyReLU, K = 100."""
    arguments, seconds = problem("leaky_relu", 100), {name: [] for name in WAYS}
    gradients = {name: gradient(*arguments) for name, gradient in WAYS.items()}  # also the warm-up
    for _ in range(args.repeats):
        for name, gradient in WAYS.items():
            started = time.process_time()  # of this process, so that others count less
            gradient(*arguments)
            seconds[name].append(time.process_time() - started)
    for name, values in seconds.items():
        ratio = np.median(values) / np.median(seconds["residual"])
        off = (gradients[name] - gradients["residual"]).norm() / gradients["residual"].norm()
        print(f"{name:14} {ratio:5.1f} × the residual's time; its gradient differs by {off:.1e}")


def peak_bytes(gradient, arguments: tuple) -> int:
    """The most bytes that the allocator had handed out at one time, beyond those there before."""
    with profile(profile_memory=True) as profiler:
        gradient(*arguments)
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    return int(np.cumsum([e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]).max())


def memory(args) -> None:
    """Peak memory against K, SiLU, 8 images; the path of the adjoint is 2 K batches of images."""
    for name, gradient in WAYS.items():
        for K in STEPS[:3] if gradient is torch_graph else STEPS:
            print(f"{name:14} K = {K:3}: {peak_bytes(gradient, problem('silu', K)) / 1e6:7.1f} MB")


def errors(args) -> None:
    """Squared error per pixel of held-out test images."""
    model, started = ShortRun.load(args.model), time.perf_counter()
    x = to_float(observed(model.dataset, model.f.image_size, limit=args.images, split="test"))
    options = {"eta": args.eta, "gradient": args.gradient, "seed": 0}
    e = torch.cat([model.reconstruct(part, args.iterations, **options).error for part in x.split(64)])
    quantiles = ", ".join(f"{q:.0%} {e.quantile(q):.3g}" for q in (0.1, 0.5, 0.9, 0.99))
    print(f"{args.model}: {len(x)} test images of {model.dataset}, {model.kernel}, {args.iterations} iterations")
    print(f"squared error per pixel: {quantiles}, worst {e.max():.3g}; {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=["speed", "memory", "errors"])
    parser.add_argument("--model", default="fashion_mnist")
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--iterations", type=int, default=200)
    parser.add_argument("--gradient", default="auto", choices=["auto", *CARRIES])
    parser.add_argument("--eta", type=float)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    for part in args.parts:
        globals()[part](args)
