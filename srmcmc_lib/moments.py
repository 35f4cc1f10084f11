"""Moment matching on images: θ of f_θ = <θ, h> from given moments E[h], and how well samples have these moments."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Generator, Tensor

from .data import to_float
from .features import Features, responses
from .langevin import integer
from .shortrun import ShortRun


@dataclass(frozen=True)
class Match:
    """E_data[h], E_p0[h], E_q[h] over samples, and the standard error of the last, [d] each."""

    data: Tensor
    start: Tensor
    reached: Tensor
    error: Tensor

    @property
    def relative(self) -> float:
        """‖E_q h − E_data h‖ / ‖E_data h − E_p0 h‖: 1 before training, 0 in Ω."""
        return ((self.reached - self.data).norm() / (self.data - self.start).norm()).item()

    @property
    def by_chance(self) -> float:
        """About what `relative` would be for a q_θ in Ω, from so many samples."""
        return (self.error.norm() / (self.data - self.start).norm()).item()

    def beyond(self, limit: float = 4.0) -> dict[int, float]:
        """(E_q h_i − E_data h_i) / standard error, by i, of the moments where this is beyond ±limit."""
        z = (self.reached - self.data) / self.error.clamp_min(1e-12)
        return {i: z[i].item() for i in (z.abs() > limit).nonzero()[:, 0].tolist()}


def match(h: Features, x: Tensor, data: Tensor, start: Tensor) -> Match:
    """Compares the moments of samples x [n ≥ 2, C, H, W] with the data's, [d]; start is E_p0[h], [d]."""
    hx = responses(h, x)
    return Match(data, start, hx.mean(0), hx.std(0) / len(hx) ** 0.5)


def targets(model: ShortRun) -> tuple[Tensor, Tensor]:
    """(E_data[h], E_p0[h]), [d] each, from the record that workflow/scripts/train_model.py stores with a model."""
    try:
        return tuple(torch.tensor(model.training[name], device=model.device) for name in ("data", "start"))
    except KeyError as error:
        raise ValueError(f"the model has no record of {error}: workflow/scripts/train_model.py stores one") from None


@torch.enable_grad()
def gram(h: Features, x: Tensor, v: Tensor) -> Tensor:
    """E[∂h/∂x ∂h/∂xᵀ] v over images x [n, C, H, W], [d]: how a step along f' = ∂h/∂xᵀ v changes the moments."""
    x, v = x.detach().requires_grad_(), v.detach().requires_grad_()
    slope = torch.autograd.grad((h(x) @ v).sum(), x, create_graph=True)[0]
    return torch.autograd.grad(slope.square().sum() / 2, v)[0] / len(x)


class Update(NamedTuple):
    """After `step` updates: θ, the weighted average of all θ so far, and the update's Δ(θ), [d] each."""

    step: int
    theta: Tensor
    mean: Tensor
    delta: Tensor


def learn(model: ShortRun, data: Tensor, images: Tensor, updates: int, batch_size: int = 64, rate: float = 0.3,
          decay: float = 20.0, damping: float = 0.005, renew: int = 12, seed: int = 0) -> Iterator[Update]:  # fmt: skip
    """Algorithm 1 for f_θ = <θ, h>, with changes of ours that need θ to be d numbers, not a network's weights.

    Eq. (6) is Δ(θ) = E_data[h] − E_q[h]. E_data[h] is known, so no observed images are drawn (σ = 0). And the step is
    preconditioned, θ ← θ + η_t / (K s) (G + λ I)⁻¹ Δ(θ), G = E[∂h/∂x ∂h/∂xᵀ], because K steps along f' change the
    moments by about K s G θ: η = 1 would be a Newton step. This holds near θ = 0. Later the chain crosses kinks of h,
    and the moments change by about a fifth of that (measured: layer 2, K = 50): late stages may have rates above 1.
    η_t = rate / (1 + t/decay)^⅔. The average has weights of about t³ (Shamir and Zhang 2013).

    Args:
        model, data: f is a LinearEnergy; training starts from its θ, and leaves the average there. E_data[h], [d].
        images: uint8 [n, C, H, W]. While θ = 0, four replace the chains' last states in G: else training may diverge.
        rate, decay, damping: η_0, and the update at which it starts to fall; λ as a fraction of ‖G‖.
        renew: G is computed again every `renew` updates, from the first, middle and last states of four chains.
    """
    for name, value in (("updates", updates), ("batch_size", batch_size), ("renew", renew)):
        integer(name, value)
    if not 0 < rate < float("inf") or not decay > 0 or not damping > 0:
        raise ValueError("rate, decay and damping must be positive")
    g, Ks, first = Generator().manual_seed(seed), model.kernel.steps * model.kernel.step_size, None
    θ = mean = model.f.theta.detach().clone()
    for t in range(updates):
        if t % renew == 0:
            *path, end = model.trajectory(model.draw_z(4, g), g)
            end = end if θ.any() else to_float(images[:4], model.device)
            seen, v = torch.cat([path[0], path[len(path) // 2], end]), torch.ones_like(data)
            for _ in range(8):  # ‖v‖ → ‖G‖
                v = gram(model.f.h, seen, v / v.norm())
        Δ = data - responses(model.f.h, model(model.draw_z(batch_size, g), g)).mean(0)
        if not Δ.norm() <= 10 * (first := first or Δ.norm()):
            raise FloatingPointError(f"training diverged at update {t + 1}: take a rate below {rate:g} or more damping")
        y, r, p = 0, Δ, Δ  # conjugate gradients: y → (G + λ I)⁻¹ Δ
        for _ in range(min(12, len(Δ))):  # more than d steps would divide 0 by 0
            Ap, rr = gram(model.f.h, seen, p) + damping * v.norm() * p, r @ r
            y, r = y + rr / (p @ Ap) * p, r - rr / (p @ Ap) * Ap
            p = r + r @ r / rr * p
        θ = θ + rate / (1 + t / decay) ** (2 / 3) / Ks * y
        mean = mean + 4 / (t + 4) * (θ - mean)
        model.f.theta.detach().copy_(θ if t + 1 < updates else mean)
        yield Update(t + 1, θ, mean, Δ)
