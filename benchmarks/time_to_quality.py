"""Quality against time: the authors' recipe, ours, and each of our additions alone.

    python benchmarks/time_to_quality.py            # every arm (about three hours on one core), then the table
    python benchmarks/time_to_quality.py grow       # one arm
    python benchmarks/time_to_quality.py --table    # the table of the rows written so far

All arms train the same network on the same 40,000 images, in float32 (those named `high` with `precision="auto"`).
The clock is this process's processor time on one thread, without the measuring. The metric is classifier_frechet of
1,000 samples against the training images, all resized to 32×32 for the classifier; it is taken for θ, by which arms
are compared, and for its running average. Rows go to .cache/time_to_quality/, in a file named by the settings; an arm
that is run again, or was defined otherwise, loses its rows. The table says when the authors' recipe reached an arm's
best value, interpolated between its rows, and in how many times the arm's time.
"""

import argparse
import csv
import time
import zlib
from functools import partial
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch.optim import Adam
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from srmcmc_lib import EnergyNet, Langevin, ShortRun, TrainConfig, observed, paths, train
from srmcmc_lib.data import to_float, to_uint8
from srmcmc_lib.metrics import embed, scores
from srmcmc_lib.training import grow

AUTHORS = {"steps": 100, "rate": 1e-4, "sigma": 0.03}  # constant Adam, m = 64, no averaging
LOWERED = {"rate": 3e-4, "rate_final": 2e-5, "lower_from": 0.0}
QUIET = {"sigma": 0.06, "sigma_final": 0.01, "lower_from": 0.0}  # the noise on the data falls, too
# how the flagship begins
HIGH = {**AUTHORS, "batch_size": 16, "rate": 5e-4, "updates": 1000, "precision": "auto"}
# arm: its stages, each TrainConfig's settings, K and Adam's β₁; `updates` are those of --scale 1
ARMS = {
    "authors": [{**AUTHORS, "updates": 4500}],  # through plain_train below
    "loop": [{**AUTHORS, "updates": 1200}],  # the same recipe through this library's loop
    "schedule": [{**AUTHORS, **LOWERED, "updates": 1200}],
    "sigma": [{**AUTHORS, "sigma": 0.1, "sigma_final": 0.03, "lower_from": 0.0, "updates": 1200}],
    "batch": [{**AUTHORS, "batch_size": 16, "updates": 2000}, {**AUTHORS, "batch_size": 64, "updates": 500}],
    "short": [{"steps": 30, "rate": 1e-4, "sigma": 0.06, "updates": 4000}],
    "grow": [
        {"steps": 30, "rate": 1e-4, "sigma": 0.06, "updates": 2400},
        {**AUTHORS, "updates": 500},
    ],
    "short_rate": [{"steps": 30, **LOWERED, "rate": 2e-4, "sigma": 0.06, "updates": 4000}],
    "short_both": [{"steps": 30, **LOWERED, "rate": 2e-4, **QUIET, "updates": 4000}],
    "ours": [
        {"steps": 20, "rate": 3e-4, "rate_final": 3e-5, **QUIET, "updates": 5600},
        {"steps": 100, "rate": 3e-5, "rate_final": 1e-5, "lower_from": 0.0, "sigma": 0.01, "updates": 300},
    ],
    "high": [HIGH],
    "high_beta1_0.5": [{**HIGH, "beta1": 0.5}],
    "high_beta1_0": [{**HIGH, "beta1": 0.0}],
}
COLUMNS = ("arm", "stages", "K", "updates", "seconds", "theta", "average")


def checksum(arm: str) -> str:
    """Of the arm's definition."""
    return f"{zlib.crc32(repr(ARMS.get(arm)).encode()):08x}"


def plain_train(model, images, config):
    """Algorithm 1 as one writes it first: θ needs gradients during the chain, default memory layout, no schedules."""
    layers = model.f.layers.to(memory_format=torch.contiguous_format)
    adam, data = torch.optim.Adam(layers.parameters(), lr=config.rate), to_float(images)

    def f(x):
        return layers(x).flatten()

    for _ in range(config.updates):
        x_plus = data[torch.randint(len(images), (config.batch_size,))]
        x_plus = x_plus + config.sigma * torch.randn_like(x_plus)
        x = 2 * torch.rand_like(x_plus) - 1
        for _ in range(model.kernel.steps):
            x = x.detach().requires_grad_()
            x = model.kernel.step(x, torch.autograd.grad(f(x).sum(), x)[0], torch.randn_like(x))
        loss = f(x.detach()).mean() - f(x_plus).mean()
        adam.zero_grad()
        loss.backward()
        adam.step()
        yield None


def measured(model, f, reference, samples) -> float:
    """classifier_frechet of `samples` samples of the model with the network f."""
    x = ShortRun(f, model.kernel).sample(samples, seed=0)
    return scores(resized(x), reference)["classifier_frechet"]


def resized(x):
    """Float images as the classifier takes them."""
    return to_uint8(F.interpolate(x, (32, 32), mode="bilinear"))


def run(arm: str, args) -> list[dict]:
    images = observed("fashion_mnist", args.image_size)
    reference = embed(resized(to_float(images)))
    rows, seconds, done, model = [], 0.0, 0, None
    torch.manual_seed(args.seed)
    for stage in ARMS[arm]:
        settings = {k: v for k, v in stage.items() if k not in ("steps", "beta1")}
        torch.optim.Adam = partial(Adam, betas=(stage.get("beta1", 0.9), 0.999))  # training has no option for it
        updates = max(1, round(stage["updates"] * args.scale))
        config = TrainConfig(**{**settings, "updates": updates}, seed=args.seed, progress=False)
        if model is None:
            model = ShortRun(EnergyNet(1, args.image_size, args.width), Langevin(stage["steps"]))
        else:
            model = grow(model, stage["steps"])
        average = AveragedModel(model.f, multi_avg_fn=get_ema_multi_avg_fn(0.99))
        run_of_stage = plain_train(model, images, config) if arm == "authors" else train(model, images, config)
        started = time.process_time()
        for step, _ in enumerate(run_of_stage, start=1):
            average.update_parameters(model.f)  # its cost is in the clock of every arm
            if step % max(1, round(args.every * updates)) == 0 or step == updates:
                seconds += time.process_time() - started
                found = [measured(model, f, reference, args.samples) for f in (model.f, average.module)]
                at = (stage["steps"], done + step, round(seconds, 1))
                row = (arm, checksum(arm), *at, *(round(v, 2) for v in found))
                rows.append(dict(zip(COLUMNS, row, strict=True)))
                print(*(f"{k} {v}" for k, v in rows[-1].items()), flush=True)
                started = time.process_time()
        done += updates
    return rows


def table(rows: list[dict]) -> None:
    """Each arm's best value, and when the authors' recipe first reached it."""
    arms: dict[str, list[tuple[int, float, float]]] = {}
    for row in rows:
        for kind in ("theta", "average"):
            if kind == "theta" or row["arm"] in ("loop", "ours"):
                arm = row["arm"] if kind == "theta" else f"{row['arm']}, averaged"
                arms.setdefault(arm, []).append((int(row["updates"]), float(row["seconds"]), float(row[kind])))

    authors = arms.get("authors", [])
    end = f"not in {authors[-1][1]:.0f} s" if authors else "not run"
    print(f"{'arm':16}{'updates':>8}{'seconds':>9}{'best':>9}{'authors reach it after':>28}")
    for arm, points in arms.items():
        updates, seconds, best = min(points, key=lambda point: point[2])
        answer = f"before {authors[0][1]:.0f} s" if authors and authors[0][2] <= best else end
        for (_, s, v), (_, s_next, v_next) in pairwise(authors):
            if v_next <= best < v:
                then = s + (s_next - s) * (v - best) / (v - v_next)
                answer = f"{then:.0f} s = {then / seconds:.1f} × (≥ {s / seconds:.1f})"
                break
        print(f"{arm:16}{updates:8}{seconds:9.0f}{best:9.1f}{answer:>28}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("arms", nargs="*", help=f"of {', '.join(ARMS)}; none: all")
    parser.add_argument(
        "--image-size", type=int, default=16, help="16 learns in minutes; 32 is the flagship's, in hours"
    )
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--samples", type=int, default=1_000)
    parser.add_argument("--scale", type=float, default=1.0, help="multiplies every arm's updates")
    parser.add_argument("--every", type=float, default=0.125, help="measure after this fraction of a stage")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    if unknown := set(args.arms) - set(ARMS):
        parser.error(f"unknown arm {', '.join(sorted(unknown))}; there are {', '.join(ARMS)}")
    torch.set_num_threads(1)
    names = ("image_size", "width", "samples", "scale", "every", "seed")
    file = paths.cache() / "time_to_quality" / ("-".join(f"{k}={getattr(args, k)}" for k in names) + ".csv")
    old = list(csv.DictReader(file.open())) if file.exists() else []
    old = [row for row in old if row.get("stages") == checksum(row["arm"])]
    for arm in [] if args.table else args.arms or ARMS:
        old = [row for row in old if row["arm"] != arm] + run(arm, args)
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("w", newline="") as out:
            writer = csv.DictWriter(out, COLUMNS)
            writer.writeheader()
            writer.writerows(old)
    table(old)
