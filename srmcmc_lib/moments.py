"""Moments E[h] on images: θ of f_θ = <θ, h> learned by matching them, and how well q_θ matches them measured.

`python -m srmcmc_lib.moments moments_deep --samples 10000` measures a shipped model on fresh samples.
"""

import argparse
import csv
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Generator, Tensor
from tqdm.auto import tqdm

from .checks import integer
from .data import observed, to_float
from .energy import LinearEnergy, scale
from .features import Features, responses
from .langevin import frozen
from .shortrun import ShortRun


@dataclass(frozen=True)
class Match:
    """Moments after learning beside those asked for.

    Attributes:
        data, start, reached: E_data[h], E_p0[h] and E_q[h], each [d].
        error: the standard error of `reached`, [d]; the data's moments are exact over the training images.
        samples: how many were averaged for `reached`.
    """

    data: Tensor
    start: Tensor
    reached: Tensor
    error: Tensor
    samples: int

    @property
    def relative(self) -> float:
        """‖E_q h − E_data h‖ / ‖E_data h − E_p0 h‖: 1 before learning, 0 on Ω."""
        return ((self.reached - self.data).norm() / (self.data - self.start).norm()).item()

    @property
    def by_chance(self) -> float:
        """What `relative` is about for a q_θ exactly on Ω, from the finite number of samples alone."""
        return (self.error.norm() / (self.data - self.start).norm()).item()

    def beyond(self, limit: float = 4.0) -> dict[int, float]:
        """(E_q h − E_data h) / standard error of each moment where that is beyond ±limit, by its index."""
        z = (self.reached - self.data) / self.error.clamp_min(1e-12)
        return {i: z[i].item() for i in (z.abs() > limit).nonzero()[:, 0].tolist()}


def match(h: Features, x: Tensor, data: Tensor, start: Tensor) -> Match:
    """Compares samples x [n ≥ 2, C, H, W] with the data's moments [d]; start is E_p0[h], [d]."""
    hx = responses(h, x)
    return Match(data, start, hx.mean(0), hx.std(0) / len(hx) ** 0.5, len(hx))


def given(model: ShortRun) -> tuple[Tensor, Tensor]:
    """(E_data[h], E_p0[h]) as stored with a model that `run` learned, [d] each."""
    try:
        return tuple(torch.tensor(model.training[name], device=model.device) for name in ("data", "start"))
    except KeyError as error:
        raise ValueError(f"the model's record lacks {error}: learn it with `python -m srmcmc_lib.recipes`") from None


def gram(h: Features, x: Tensor) -> Tensor:
    """E[∂h/∂x ∂h/∂xᵀ] over images x [n, C, H, W], [d, d]: how a step along f' = ∂h/∂xᵀ θ moves the moments."""
    with frozen(h), torch.enable_grad():
        x = x.detach().requires_grad_()
        J = torch.stack([torch.autograd.grad(y.sum(), x, retain_graph=True)[0].flatten(1) for y in h(x).T], 1)
    return torch.einsum("nid,njd->ij", J, J) / len(x)


class Learning(NamedTuple):
    """After `step` updates: θ and the weighted average of all θ so far, [d]; the last update's Δ(θ) [d], and
    the mean length of its chains' paths, Σ_k ‖x_{k+1} − x_k‖, the kernel's noise included."""

    step: int
    theta: Tensor
    mean: Tensor
    delta: Tensor
    length: float


def learn(
    model: ShortRun, data: Tensor, images: Tensor, updates: int, batch_size: int = 64, rate: float = 0.3,
    decay: float = 20.0, damping: float = 0.005, renew: int = 12, seed: int = 0,
) -> Iterator[Learning]:  # fmt: skip
    """Algorithm 1 for f_θ = <θ, h>, with two changes that d numbers instead of a network's weights make possible.

    Eq. (6) is Δ(θ) = E_data[h] − E_q[h]: its first half is known exactly, so no observed images are drawn (σ = 0). And
    the step is preconditioned, θ ← θ + η_t / (K s) (G + λ I)⁻¹ Δ(θ), G = E[∂h/∂x ∂h/∂xᵀ]: K steps along f' move the
    moments by about K s G θ, so that η = 1 would be a Newton step. That holds near θ = 0; later the path bends at h's
    kinks and they move by about a fifth of that (measured: layer 2, K = 50), hence rates beyond 1 in late stages.
    η_t = rate / (1 + t/decay)^⅔; the average weighs θ_t by about t³ (Shamir and Zhang 2013) and is what model.f holds
    after the last update.

    Args:
        model: with a LinearEnergy, learned in place from the θ it has.
        data: E_data[h], [d].
        images: at least 8 observed images, uint8 [n, C, H, W]: at θ = 0 they stand for the end of the path, where the
            chains are to be, in the first G. (With p_0 alone the first step was so long that learning diverged.)
        updates, batch_size: T, and chains an update.
        rate, decay: η_0 > 0, and the update at which it starts to fall.
        damping: λ as a fraction of G's largest eigenvalue.
        renew: G is taken anew every so many updates, from the states of eight chains half way and at the end.
        seed: of the chains.
    """
    for name, value in (("updates", updates), ("batch_size", batch_size), ("renew", renew)):
        integer(name, value)
    if not 0 < rate < float("inf") or not decay > 0 or not damping > 0:
        raise ValueError("rate, decay and damping must be positive")
    g, θ, scale = Generator().manual_seed(seed), model.f.theta.detach().clone(), model.kernel.steps
    scale *= model.kernel.step_size
    mean, first = θ, None
    for t in range(updates):
        if t % renew == 0:
            path = list(model.trajectory(model.draw_z(8, g), g))
            G = gram(model.f.h, torch.cat([path[len(path) // 2], path[-1] if θ.any() else to_float(images[:8])]))
            solve = torch.linalg.inv(G + damping * torch.linalg.matrix_norm(G, 2) * torch.eye(len(G), device=G.device))
        path = list(model.trajectory(model.draw_z(batch_size, g), g))
        moved = torch.stack(path[1:]) - torch.stack(path[:-1])
        Δ = data - responses(model.f.h, path[-1]).mean(0)
        first = Δ.norm() if first is None else first
        if not Δ.norm() < 10 * first:
            raise FloatingPointError(f"learning diverged at update {t + 1}: take a rate below {rate:g} or more damping")
        θ = θ + rate / (1 + t / decay) ** (2 / 3) / scale * (solve @ Δ)
        mean = mean + 4 / (t + 4) * (θ - mean)
        with torch.no_grad():
            model.f.theta.copy_(θ if t + 1 < updates else mean)
        yield Learning(t + 1, θ, mean, Δ, moved.flatten(2).norm(dim=2).mean().item() * model.kernel.steps)


def run(recipe: dict, log: Path) -> tuple[ShortRun, int, float]:
    """Learns a model from nothing by the stages of a recipe's `moments`, each from the θ of the one before times
    K_old / K_new (as `recipes.grow`); writes step, K, ‖Δ(θ)‖ / ‖Δ(0)‖ and the length of the paths to a CSV.

    Returns:
        the model (E_data[h] over all images and E_p0[h] over 2,000 z in its record), the number of images, seconds.
    """
    model = ShortRun(LinearEnergy(**recipe["network"]), dataset=recipe["dataset"])
    images = observed(recipe["dataset"], model.f.image_size, recipe["limit"])
    data = responses(model.f.h, images).mean(0)
    start = responses(model.f.h, model.draw_z(2_000, recipe["seed"])).mean(0)
    unit = (data - start).norm()
    started, step = time.perf_counter(), 0
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["step", "steps", "relative", "length"])
        for i, stage in enumerate(recipe["moments"]):
            stage, K = dict(stage), model.kernel.steps
            model = model.with_steps(stage.pop("steps"))
            scale(model.f, K / model.kernel.steps)
            updates = learn(model, data, images, **{"seed": recipe["seed"] + i} | stage)
            for r in tqdm(updates, total=stage["updates"], desc=f"K = {model.kernel.steps}"):
                step += 1
                table.writerow([step, model.kernel.steps, (r.delta.norm() / unit).item(), r.length])
                file.flush()
    model.training = {"data": data.tolist(), "start": start.tolist()}
    return model, len(images), time.perf_counter() - started


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[-1])
    parser.add_argument("name", help="moments_deep, moments_shallow or a .safetensors file of a LinearEnergy")
    parser.add_argument("--samples", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--write", action="store_true", help="put the measurements on the card beside the weights")
    args = parser.parse_args()
    if args.write:
        from .cards import card_of, write  # not above: cards imports recipes, and that this module

        card_of(args.name)  # missing, it is missed before the measuring
    model = ShortRun.load(args.name)
    found = match(model.f.h, model.sample(args.samples, args.seed), *given(model))
    command = f"python -m srmcmc_lib.moments {args.name} --samples {args.samples} --seed {args.seed}"
    measured = {
        "samples": found.samples, "relative": found.relative, "by_chance": found.by_chance,
        "beyond_4_standard_errors": found.beyond(),
    }  # fmt: skip
    print(json.dumps({"command": command, **measured}, indent=1))
    if args.write:
        write(args.name, "moments", command, measured)
