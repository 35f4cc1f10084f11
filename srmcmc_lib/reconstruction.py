"""Reconstruction: the z that the chain turns into a given image, z* = argmin ‖x − M_θ(z, u)‖² (figures 4 and 8)."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Generator, Tensor

from .checks import integer
from .descent import OPTIMIZERS, Step
from .langevin import frozen, langevin_chain
from .langevin import gradient as derivative
from .priors import as_seed

SCHEDULES = {"cosine": lambda t: (1 + math.cos(math.pi * t)) / 2, "constant": lambda t: 1.0}
SOLVES = 3  # fixed-point iterations for each step of the reversed chain
STUCK = 0.01  # of the error at the start: where `auto`'s reversed chain leaves more, the residual is tried as well


@dataclass(frozen=True)
class Reconstruction:
    """What `reconstruct` found for B images.

    Attributes:
        z: the best initial state seen, [B, C, H, W].
        x: the reconstruction M_θ(z, u), [B, C, H, W].
        errors: mean squared error per pixel of M_θ(z_t, u), t = 0 … iterations, [iterations + 1, B], over the pixels
            that the mask leaves. It need not fall at every step; x has the column's minimum.
        restart: the index of the restart that each image's z and errors come from, [B].
        states: M_θ(z_t, u) at the iterations asked for by `keep`, [len(keep), B, C, H, W] (figure 4).
    """

    z: Tensor
    x: Tensor
    errors: Tensor
    restart: Tensor
    states: Tensor

    @property
    def error(self) -> Tensor:
        """Mean squared error per pixel of x, [B]."""
        return self.errors.amin(0)


def per_image(numbers: Tensor) -> Tensor:
    """[B] → [B, 1, 1, 1], to multiply images."""
    return numbers.view(-1, 1, 1, 1)


def residual_gradient(f, kernel, x: Tensor, z: Tensor, U: list[Tensor] | None, mask=1.0) -> tuple[Tensor, Tensor]:
    """M_θ(z, u), and L'(z) = 2(M_θ(z, u) − x): exact where ∂M/∂z = I, a fixed-point iteration's step elsewhere.

    Each step of the chain has the Jacobian I + s·f''. A piecewise-linear f has f'' = 0 almost everywhere, so their
    product is I: no graph is kept, and time and memory are those of the chain itself.
    """
    for state in langevin_chain(f, z, kernel, U):
        pass
    return state.x, 2 * mask * (state.x - x)


def chain_gradient(f, kernel, x: Tensor, z: Tensor, U: list[Tensor] | None, mask=1.0) -> tuple[Tensor, Tensor]:
    """M_θ(z, u), and L'(z) = (∂M/∂z)ᵀ 2(M_θ(z, u) − x) by differentiating through the K steps.

    Checkpointing by hand. Forward, only every √K-th state is stored; backward, each segment's states are computed
    again and v ← v + s·f''(x_k) v is applied from its last step to its first. So about 2√K images are held, and the
    graph of one step, for about three times the chain's time.
    """
    K, s = kernel.steps, kernel.step_size
    length = math.isqrt(K - 1) + 1
    starts = {}
    for k, state in enumerate(langevin_chain(f, z, kernel, U)):
        if k % length == 0 and k < K:
            starts[k] = state.x
    v = 2 * mask * (state.x - x)
    for k in reversed(list(starts)):
        segment = replace(kernel, steps=min(length, K - k))
        states = [each.x for each in langevin_chain(f, starts.pop(k), segment, U[k:] if U is not None else None)][:-1]
        while states:
            v = v + s * hessian_product(f, states.pop(), v)
    return state.x, v


def reverse_step(f, kernel, x: Tensor, z: Tensor, U: list[Tensor] | None, mask=1.0) -> tuple[Tensor, Tensor]:
    """M_θ(z, u), and 2(z − z'), where z' is z with the whole residual carried back through the chain, step by step.

    Let x_k be the states from z, and x_k + d_k those of a chain that ends at x: d_K = x − x_K. Both obey eq. (4) with
    the same noise, so d_k + s(f'(x_k + d_k) − f'(x_k)) = d_{k+1}: from K down, one equation for each step, solved by
    `SOLVES` fixed-point iterations from d_k = d_{k+1} (they contract where s‖f''‖ < 1). z' = z + d_0. Solved exactly,
    M_θ(z', u) is x; a few iterations leave a fraction of the error, which the next step takes up. Where f' does not
    change between x_k and x_k + d_k, d is carried back unchanged, and the step is `residual_gradient`'s. It costs
    1 + SOLVES chains and stores K states and gradients.

    It needs an f' that is smooth on the scale of d. In the directions that the chain contracts d grows on its way back,
    and so does what an equation leaves unsolved: f' of a piecewise-linear f jumps, and no d may solve it there.
    """
    s, states, gradients = kernel.step_size, [], []
    for state in langevin_chain(f, z, kernel, U):
        states.append(state.x)
        gradients.append(state.gradient)
    M = states.pop()
    d = mask * (x - M)
    while states:
        x_k, df_dx, following = states.pop(), gradients.pop(), d
        for _ in range(SOLVES):
            d = following - s * (derivative(f, x_k + d) - df_dx)
    return M, -2 * d


def jacobian_product(f, kernel, z: Tensor, v: Tensor, U: Iterable[Tensor] | None = None) -> tuple[Tensor, Tensor]:
    """M_θ(z, u), and (∂M/∂z) v for each image, exactly: v ← v + s·f''(x_k) v along the chain. No graph is kept.

    (∂M/∂z)ᵀ v is what `chain_gradient` applies, from the last step to the first.
    """
    for state, following in pairwise(langevin_chain(f, z, kernel, U)):
        v = v + kernel.step_size * hessian_product(f, state.x, v)
    return following.x, v


def hessian_product(f, x: Tensor, v: Tensor) -> Tensor:
    """f''(x) v for each image, [B, …] → [B, …]."""
    with frozen(f), torch.enable_grad():
        x = x.detach().requires_grad_()
        df_dx = torch.autograd.grad(f(x).sum(), x, create_graph=True)[0]
        if not df_dx.requires_grad:  # f is linear
            return torch.zeros_like(v)
        return torch.autograd.grad(df_dx, x, v, materialize_grads=True)[0]


# Each gradient, and its η and schedule if none are given (None: those of the optimizer).
GRADIENTS = {
    "residual": (residual_gradient, None, "cosine"), "chain": (chain_gradient, None, "cosine"),
    "reverse": (reverse_step, 0.5, "constant"),
}  # fmt: skip


def descend(f, kernel, x: Tensor, mask: Tensor, z: Tensor, U, etas: list[float], step: Step, gradient, keep):
    """One run from z: the best z and M_θ(z, u) of each image, the errors [iterations + 1, B], the states kept."""
    best_z = best_M = z
    best, errors, states = x.new_full(x.shape[:1], math.inf), [], {}
    for t, η in enumerate(etas):
        if t == len(etas) - 1:  # no step follows: the chain alone, which this one is
            gradient = residual_gradient
        M, dL_dz = gradient(f, kernel, x, z, U, mask)
        error = (mask * (M - x).square()).flatten(1).sum(1) / mask.flatten(1).sum(1)
        error = error.nan_to_num(math.inf, math.inf)  # an image that left the finite numbers must not stop the others
        better = per_image(error < best)
        best_z, best_M, best = torch.where(better, z, best_z), torch.where(better, M, best_M), best.minimum(error)
        errors.append(error)
        if t in keep:
            states[t] = M
        z = step(z, dL_dz, η)
    kept = torch.stack([states[t] for t in keep]) if keep else x.new_empty(0, *x.shape)
    return best_z, best_M, torch.stack(errors), kept


def chosen(better: Tensor, new: Sequence[Tensor], found: Sequence[Tensor]) -> list[Tensor]:
    """z, M_θ(z, u), errors and states of one run or the other, image by image, by `better`, [B]."""
    return [torch.where(per_image(better) if a.ndim > 2 else better, a, b) for a, b in zip(new, found, strict=True)]


def reconstruct(
    model, x: Tensor, iterations: int = 200, eta: float | None = None, schedule: str | None = None,
    optimizer: str = "gd", gradient: str = "auto", restarts: int = 1, seed: int = 0, u=None, keep: Sequence[int] = (),
    mask: Tensor | None = None,
) -> Reconstruction:  # fmt: skip
    """z_{t+1} = z_t − η_t L'(z_t), L(z) = ‖x − M_θ(z, u)‖², from z_0 ~ p_0; see `ShortRun.reconstruct`."""
    integer("iterations", iterations)
    integer("restarts", restarts)
    for name, value, known in [
        ("schedule", schedule or "cosine", SCHEDULES), ("optimizer", optimizer, OPTIMIZERS),
        ("gradient", gradient, ["auto", *GRADIENTS]),
    ]:  # fmt: skip
        if value not in known:
            raise ValueError(f"{name}={value!r} is unknown; choose one of {', '.join(known)}")
    if gradient == "reverse" and optimizer in ("adam", "momentum"):
        raise ValueError(f"gradient='reverse' gives whole steps to x, which {optimizer} would not take: use gd")
    directions = [gradient]
    if gradient == "auto":
        plain = getattr(model.f, "piecewise_linear", True) or mask is not None or optimizer != "gd"
        directions = ["residual"] if plain else ["reverse", "residual"]
    build, optimizers_eta = OPTIMIZERS[optimizer]
    if eta is not None and not 0 < eta < math.inf:
        raise ValueError(f"eta must be positive and finite, got {eta!r}")
    keep = list(keep)
    if any(isinstance(t, bool) or not isinstance(t, int) or not 0 <= t <= iterations for t in keep):
        raise ValueError(f"keep must list iterations in 0 … {iterations}, got {keep!r}")
    if not x.is_floating_point():
        raise ValueError(f"x must hold floating-point images in {list(model.value_range)}, got {x.dtype}")
    f, kernel = model.f, model.kernel
    x = model._checked(x, "x").to(next(f.parameters(), x).dtype)
    mask = torch.ones_like(x) if mask is None else torch.as_tensor(mask).to(x)
    if mask.ndim > x.ndim or any(m not in (1, n) for m, n in zip(mask.shape[::-1], x.shape[::-1], strict=False)):
        raise ValueError(f"mask must broadcast to x, {list(x.shape)}, got {list(mask.shape)}")
    mask = mask.expand_as(x)
    if not ((mask == 0) | (mask == 1)).all() or not mask.flatten(1).any(1).all():
        raise ValueError("mask must hold 1 where a pixel counts and 0 where not, and leave each image at least one")
    U = model._noise(u, len(x))
    U = None if U is None else list(U)

    seed = as_seed(seed)
    more_seeds = Generator().manual_seed(seed)
    found, restart = None, torch.zeros(len(x), dtype=torch.long, device=x.device)
    for r in range(restarts):
        z = model.draw_z(len(x), as_seed(more_seeds) if r else seed).to(x.dtype)
        new = stuck = None
        for direction in directions:
            step_to, usual_eta, usual_schedule = GRADIENTS[direction]
            η, at = eta or usual_eta or optimizers_eta, SCHEDULES[schedule or usual_schedule]
            etas = [η * at(t / iterations) for t in range(iterations + 1)]
            run = descend(f, kernel, x, mask, z, U, etas, build(), step_to, keep)
            new = run if stuck is None else chosen(stuck & (run[2].amin(0) < new[2].amin(0)), run, new)
            stuck = new[2].amin(0) > STUCK * new[2][0]
            if not stuck.any():
                break
        if found is None:
            found = new
            continue
        better = new[2].amin(0) < found[2].amin(0)
        restart, found = torch.where(better, r, restart), chosen(better, new, found)
    if not found[2].amin(0).isfinite().all():
        raise FloatingPointError("the chain left the finite numbers at every iteration: f is too steep for this kernel")
    z, M, errors, states = found
    return Reconstruction(z, M, errors, restart, states)
