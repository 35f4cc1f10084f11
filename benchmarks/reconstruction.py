"""Reconstruction by hand-run measurements: errors on held-out images, the closed form's speed, memory against K.

python benchmarks/reconstruction.py speed memory                 # a minute or two; no model is needed
python benchmarks/reconstruction.py errors --model fashion_mnist # 256 test images × 200 iterations: K = 100, n_f = 16
                                                                 # take about 40 minutes on one free core
python benchmarks/reconstruction.py errors --model fashion_mnist_silu --iterations 8  # its iterations cost four chains

Times are ratios within one run, for they mean nothing across machines; bytes are the CPU allocator's.
"""

import argparse
import time

import numpy as np
import torch
from torch.autograd import grad
from torch.profiler import profile

from srmcmc_lib import EnergyNet, Langevin, ShortRun, observed
from srmcmc_lib.data import to_float
from srmcmc_lib.reconstruction import chain_gradient, residual_gradient

STEPS = (10, 25, 50, 100, 200, 400)


def autograd_gradient(f, kernel, x, z, U):
    """L'(z) as one would write it at first: torch keeps the graph of all K steps."""
    M = z = z.detach().requires_grad_()
    for _ in range(kernel.steps):
        M = M + kernel.step_size * grad(f(M).sum(), M, create_graph=True)[0]
    return M, grad((x - M).square().sum(), z)[0]


def problem(activation: str, steps: int, images: int = 8) -> tuple:
    """A chain of an untrained n_f = 16 network at 32×32, whose cost and memory are those of a trained one."""
    torch.manual_seed(0)
    model = ShortRun(EnergyNet(1, 32, width=16, activation=activation), Langevin(steps))
    return model.f, model.kernel, torch.rand(images, *model.shape) * 2 - 1, model.draw_z(images, 0), None


def speed(args) -> None:
    """The closed form against two ways to differentiate through the chain, in turns, LeakyReLU, K = 100."""
    ways = {"closed form": residual_gradient, "checkpointed": chain_gradient, "torch's graph": autograd_gradient}
    arguments, seconds = problem("leaky_relu", 100), {name: [] for name in ways}
    gradients = {name: gradient(*arguments)[1] for name, gradient in ways.items()}  # also the warm-up
    for _ in range(args.repeats):
        for name, gradient in ways.items():
            started = time.process_time()  # of the CPU, so that other work on the machine counts less
            gradient(*arguments)
            seconds[name].append(time.process_time() - started)
    base = np.median(seconds["closed form"])
    for name, values in seconds.items():
        same = torch.equal(gradients[name], gradients["closed form"])
        print(f"{name:14} {np.median(values) / base:5.1f} × the closed form's time; the same gradient: {same}")


def peak_bytes(gradient, arguments: tuple) -> int:
    """The largest number of bytes that the allocator had handed out at one time, on top of what was there before."""
    with profile(profile_memory=True) as profiler:
        gradient(*arguments)
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    return int(np.cumsum([e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]).max())


def memory(args) -> None:
    """Peak memory of the gradient through the chain against K, silu."""
    plain = {k: peak_bytes(autograd_gradient, problem("silu", k)) for k in STEPS[:3]}
    closed = {k: peak_bytes(residual_gradient, problem("silu", k)) for k in STEPS}
    peaks = {k: peak_bytes(chain_gradient, problem("silu", k)) for k in STEPS}
    one_step, batch = peak_bytes(chain_gradient, problem("silu", 1)), problem("silu", 1)[2].nbytes
    held = {k: 2 + (peaks[k] - one_step) / batch for k in STEPS}  # at K = 1 it holds two: the first state, and v
    for k in STEPS:
        graph = f"{plain[k] / 1e6:.1f} MB" if k in plain else "not run"
        print(
            f"K = {k:3}: checkpointed {peaks[k] / 1e6:.2f} MB, in it {held[k]:.1f} batches of images (2√K = "
            f"{2 * k**0.5:.1f}); closed form {closed[k] / 1e6:.2f} MB; torch's graph {graph}"
        )
    for name, values in (("peak", peaks), ("images held", held)):
        exponent = np.polyfit(np.log(STEPS), np.log([values[k] for k in STEPS]), 1)[0]
        print(f"checkpointed: {name} ∝ K^{exponent:.2f} (aim: at most 0.5)")


def errors(args) -> None:
    """Squared error per pixel over held-out test images."""
    model = ShortRun.load(args.model)
    x = to_float(observed(model.dataset, model.f.image_size, limit=args.images, split="test"))
    started, found = time.perf_counter(), []
    for part in x.split(64):
        options = {"eta": args.eta, "optimizer": args.optimizer, "gradient": args.gradient}
        found.append(model.reconstruct(part, args.iterations, seed=0, **options).error)
    e = torch.cat(found)
    quantiles = ", ".join(
        f"{q:.0%} {v:.3g}"
        for q, v in zip((0.1, 0.5, 0.9, 0.99), e.quantile(torch.tensor((0.1, 0.5, 0.9, 0.99))), strict=True)
    )
    print(f"{args.model}: {len(x)} test images of {model.dataset}, {model.kernel}, {args.iterations} iterations")
    print(f"squared error per pixel: {quantiles}, worst {e.max():.3g}; {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=["speed", "memory", "errors"])
    parser.add_argument("--model", default="fashion_mnist")
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--iterations", type=int, default=200)
    parser.add_argument("--optimizer", default="gd")
    parser.add_argument("--gradient", default="auto")
    parser.add_argument("--eta", type=float)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    for part in args.parts:
        {"speed": speed, "memory": memory, "errors": errors}[part](args)
