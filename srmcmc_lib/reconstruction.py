"""Reconstruction: the z that the chain turns into a given image, z* = argmin ‖x − M_θ(z, u)‖² (figures 4 and 8)."""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Generator, Tensor

from .langevin import chain, gradient, integer, value
from .noise import Noise

SCHEDULES = {"cosine": lambda t: (1 + math.cos(math.pi * t)) / 2, "constant": lambda t: 1.0}
SOLVES = 3  # fixed-point iterations for each step of the inverted chain


class Reconstruction(NamedTuple):
    """What `reconstruct` found for B images: z, x = M_θ(z, u), the errors on the way, and the states asked for."""

    z: Tensor  # the best initial state seen, [B, C, H, W]
    x: Tensor  # the reconstruction M_θ(z, u), [B, C, H, W]; it has the smallest of its errors
    errors: Tensor  # mean squared error per pixel that the mask leaves, t = 0 … iterations, [iterations + 1, B]
    states: Tensor  # M_θ(z_t, u) at the iterations asked for by `keep`, [len(keep), B, C, H, W] (figure 4)

    @property
    def error(self) -> Tensor:
        """Mean squared error per pixel of x, [B]."""
        return self.errors.amin(0)


# Three ways to carry an error e = M_θ(z, u) − x, [B, C, H, W], from the chain's end back to z. `path` lists the K pairs
# (x_k, f'(x_k)), k = 0 … K − 1. Each step of the chain has the Jacobian I + s·f''(x_k).


def residual(f, kernel, path: list[tuple[Tensor, Tensor]], e: Tensor) -> Tensor:
    """e itself: the exact (∂M/∂z)ᵀ e for a piecewise-linear f, whose f'' is 0 almost everywhere; needs no path.

    For a smooth f it is a fixed-point iteration's step, as in the inversion of i-ResNets (Behrmann et al. 2019).
    """
    return e


def adjoint(f, kernel, path: list[tuple[Tensor, Tensor]], e: Tensor) -> Tensor:
    """(∂M/∂z)ᵀ e, so that 2 (∂M/∂z)ᵀ e = L'(z): e ← e + s·f''(x_k) e from the last step to the first."""
    for x, _ in reversed(path):
        e = e + kernel.step_size * hessian_product(f, x, e)
    return e


def inverted(f, kernel, path: list[tuple[Tensor, Tensor]], e: Tensor) -> Tensor:
    """z − z', where the chain from z' ends at M_θ(z, u) − e: the chain is inverted step by step.

    Both chains obey eq. (4) with the same noise, so their differences e_k satisfy
    e_k = e_{k+1} + s (f'(x_k − e_k) − f'(x_k)), one equation a step, solved by SOLVES fixed-point iterations that start
    at e_{k+1} and contract where s‖f''‖ < 1. What they leave unsolved, the next iteration of `reconstruct` takes up. It
    needs a smooth f: where f' jumps, the equation may have no solution.
    """
    for x, slope in reversed(path):
        following = e
        for _ in range(SOLVES):
            e = following + kernel.step_size * (gradient(f, x - e) - slope)
    return e


CARRIES = {"residual": residual, "adjoint": adjoint, "inverted": inverted}


def jacobian_product(f, kernel, z: Tensor, v: Tensor, U: Iterable[Tensor] | None = None) -> tuple[Tensor, Tensor]:
    """M_θ(z, u), and (∂M/∂z) v for each image: v ← v + s·f''(x_k) v along the chain. No graph is kept."""
    x = z
    for following, _ in chain(f, z, kernel, U):
        x, v = following, v + kernel.step_size * hessian_product(f, x, v)
    return x, v


def hessian_product(f, x: Tensor, v: Tensor) -> Tensor:
    """f''(x) v for each image, [B, …] → [B, …]."""
    return torch.autograd.functional.vhp(lambda x: value(f, x).sum(), x, v)[1]


def reconstruct(model, x: Tensor, iterations: int = 200, eta: float | None = None, schedule: str | None = None,
                gradient: str = "auto", seed: int | Generator = 0, u: Noise = None, keep: Sequence[int] = (),
                mask: Tensor | None = None) -> Reconstruction:  # fmt: skip
    """The z whose image M_θ(z, u) is nearest to x: z_{t+1} = z_t − 2 η_t e_t, e_t from M_θ(z_t, u) − x (figure 4).

    Every image of x, [B, C, H, W] in [-1, 1], is its own problem, from its own z_0 ~ p_0 (`seed`). The best z_t seen is
    returned, because the error need not fall at every iteration. Neither η_t nor u is given in the paper.

    Args:
        iterations: T ≥ 1; costs T + 1 runs of the chain, 4 T + 1 for "inverted", 6 to 7 T for "adjoint".
        eta: the largest η_t > 0; None is 1/2 (a whole step) for "inverted", else 0.1.
        schedule: "cosine" (η_t falls to 0) or "constant"; None is "constant" for "inverted", else "cosine".
        gradient: how the error is carried back to z. "residual": as it is, so that the iteration is
            z ← z − 2 η (M_θ(z, u) − x); the exact gradient step for a piecewise-linear f. "adjoint": the exact gradient
            step for any f. "inverted": through the inverted chain, for a smooth f; a few iterations reach the rounding
            of float32. "auto": "inverted" where f says that it is not piecewise linear and there is no mask, else
            "residual".
        u: as in `trajectory`; one draw for all iterations. None, the noise-free chain, is our choice.
        keep: iterations whose M_θ(z_t, u) to return as `states`.
        mask: 1 where a pixel of x counts, 0 where it is unknown (inpainting); broadcasts to x. None: all count.

    ValueError for x or settings that do not fit; FloatingPointError where all of an image's chains diverge.
    """
    iterations = integer("iterations", iterations)
    keep = [integer("an iteration to keep", t, 0, iterations) for t in keep]
    if gradient == "auto":
        gradient = "residual" if getattr(model.f, "piecewise_linear", True) or mask is not None else "inverted"
    schedule = schedule or ("constant" if gradient == "inverted" else "cosine")
    for name, choice, known in (("gradient", gradient, CARRIES), ("schedule", schedule, SCHEDULES)):
        if choice not in known:
            raise ValueError(f"{name}={choice!r} is unknown; choose one of {', '.join(known)}")
    eta = (0.5 if gradient == "inverted" else 0.1) if eta is None else eta
    if not 0 < eta < math.inf:
        raise ValueError(f"eta must be positive and finite, got {eta!r}")
    if not ((x := model._checked(x, "x")).min() < 0 or x.max() <= 20):  # samples are not clamped to [-1, 1]
        raise ValueError(f"x reaches {x.max():.0f}, images lie in [-1, 1]; data.to_float converts 0 … 255")
    mask = torch.ones_like(x) if mask is None else torch.as_tensor(mask).to(x).expand_as(x)
    if not ((mask == 0) | (mask == 1)).all() or not mask.flatten(1).any(1).all():
        raise ValueError("mask must hold 1 where a pixel counts and 0 where not, and leave each image at least one")
    U = None if u is None else list(model._noise(u, len(x)))
    f, kernel, carry = model.f, model.kernel, CARRIES[gradient]
    z = best_z = best_x = model.draw_z(len(x), seed)
    best, errors, states = x.new_full(x.shape[:1], math.inf), [], {}
    for t in range(iterations + 1):
        path, M = [], z
        for following, slope in chain(f, z, kernel, U):
            if carry is not residual:
                path.append((M, slope))
            M = following
        error = (mask * (M - x).square()).flatten(1).sum(1) / mask.flatten(1).sum(1)
        error = error.nan_to_num(math.inf, math.inf)  # an image that left the finite numbers must not stop the others
        better = (error < best).view(-1, 1, 1, 1)
        best_z, best_x, best = torch.where(better, z, best_z), torch.where(better, M, best_x), best.minimum(error)
        errors.append(error)
        if t in keep:
            states[t] = M
        if t < iterations:
            z = z - 2 * eta * SCHEDULES[schedule](t / iterations) * carry(f, kernel, path, mask * (M - x))
    if not best.isfinite().all():
        raise FloatingPointError("the chain left the finite numbers at every iteration: f is too steep for this kernel")
    kept = torch.stack([states[t] for t in keep]) if keep else x.new_empty(0, *x.shape)
    return Reconstruction(best_z, best_x, torch.stack(errors), kept)
