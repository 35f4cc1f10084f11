"""Reconstruction: the z that the chain turns into a given image, z* = argmin ‖x − M_θ(z, u)‖² (figures 4 and 8)."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import pairwise, product
from typing import NamedTuple

import torch
from torch import Generator, Tensor

from .checks import integer
from .descent import OPTIMIZERS, Step
from .langevin import frozen, langevin_chain
from .langevin import gradient as derivative
from .priors import Noise, as_seed

SCHEDULES = {"cosine": lambda t: (1 + math.cos(math.pi * t)) / 2, "constant": lambda t: 1.0}
SOLVES = 3  # fixed-point iterations for each step of the reversed chain
STUCK = 0.01  # of the error at the start: where `auto`'s reversed chain leaves more, the residual is tried as well


class Reconstruction(NamedTuple):
    """What `reconstruct` found for B images.

    Attributes:
        z: the best initial state seen, [B, C, H, W].
        x: the reconstruction M_θ(z, u), [B, C, H, W].
        errors: mean squared error per pixel of M_θ(z_t, u), t = 0 … iterations, [iterations + 1, B], over the pixels
            that the mask leaves. It need not fall at every step; x has the column's minimum.
        states: M_θ(z_t, u) at the iterations asked for by `keep`, [len(keep), B, C, H, W] (figure 4).
        restart: the index of the restart that each image's z and errors come from, [B].
    """

    z: Tensor
    x: Tensor
    errors: Tensor
    states: Tensor
    restart: Tensor

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
    with frozen(f):
        return torch.autograd.functional.vhp(lambda x: f(x).sum(), x, v)[1]


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


def chosen(better: Tensor, new: Reconstruction, found: Reconstruction) -> Reconstruction:
    """One run or the other, image by image, by `better`, [B]."""
    pairs = zip(new, found, strict=True)
    return Reconstruction(*(torch.where(per_image(better) if a.ndim > 2 else better, a, b) for a, b in pairs))


def reconstruct(
    model, x: Tensor, iterations: int = 200, eta: float | None = None, schedule: str | None = None,
    optimizer: str = "gd", gradient: str = "auto", restarts: int = 1, seed: int | Generator = 0, u: Noise = None,
    keep: Sequence[int] = (), mask: Tensor | None = None,
) -> Reconstruction:  # fmt: skip
    """The z whose image M_θ(z, u) is nearest to x: z_{t+1} = z_t − η_t L'(z_t), L(z) = ‖x − M_θ(z, u)‖² (figure 4).

    Every image is its own problem, from its own z_0 ~ p_0: none depends on the others. The best z_t seen is
    returned, because the error need not fall at every iteration. Neither η_t nor u is given in the paper.

    Args:
        x: images in the model's value range, floating point, [B, C, H, W].
        iterations: T ≥ 1; costs T + 1 runs of the chain for each restart, 4 T + 1 for "reverse".
        eta: the largest η_t > 0; None takes the optimizer's usual one, 1/2 for "reverse". η_t = 1/2 steps by the
            whole residual.
        schedule: "cosine" (η_t falls to 0) or "constant"; None takes "constant" for "reverse", else "cosine".
        optimizer: "gd" (the paper's), "momentum", "adam", "lbfgs" or "anderson", on the same gradient. Over 200
            iterations no other was better in our trials; "anderson" led for the first 40.
        gradient: "residual" takes ∂M/∂z = I, so that L' = 2(M_θ(z, u) − x). For a piecewise-linear f this is the
            exact gradient; for a smooth f it is a fixed-point iteration, which did better than the gradient in
            our trials. "chain" differentiates through the K steps, with about 2√K stored images. "reverse" carries
            the residual back through the chain, for a smooth f alone (see `reconstruction.reverse_step`): a few
            iterations end at the rounding. "auto" is "reverse" where f says that it is not piecewise linear, there
            is no mask and the optimizer is "gd", and "residual" as well for an image whose error stays above 1 % of
            its first; else "residual".
        restarts: how many z_0 to try; each image keeps its best. The first is the same whatever their number.
        seed: draws every z_0.
        u: as in `trajectory`; one draw for all iterations. None, the noise-free chain, is our choice.
        keep: iterations whose M_θ(z_t, u) to return as `states`.
        mask: 1 where a pixel of x counts, 0 where it is unknown (inpainting); broadcasts to x. None: all count.

    Returns:
        a frozen record with z, x, errors [T + 1, B] (mean squared error per pixel), restart and states.

    Raises:
        ValueError: x of another shape, with NaN or not floating point; numbers out of range; unknown names.
        FloatingPointError: an image whose chain leaves the finite numbers at every iteration.
    """
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
    found = None
    for r, (way, direction) in product(range(restarts), enumerate(directions)):
        if way == 0:
            z = model.draw_z(len(x), as_seed(more_seeds) if r else seed).to(x.dtype)
            wanted = torch.ones(len(x), dtype=torch.bool, device=x.device)
        elif not wanted.any():
            continue
        step_to, usual_eta, usual_schedule = GRADIENTS[direction]
        η, at = eta or usual_eta or optimizers_eta, SCHEDULES[schedule or usual_schedule]
        etas = [η * at(t / iterations) for t in range(iterations + 1)]
        run = descend(f, kernel, x, mask, z, U, etas, build(), step_to, keep)
        new = Reconstruction(*run, torch.full(x.shape[:1], r, device=x.device))
        found = new if found is None else chosen(wanted & (new.error < found.error), new, found)
        wanted = new.error > STUCK * new.errors[0]
    if not found.error.isfinite().all():
        raise FloatingPointError("the chain left the finite numbers at every iteration: f is too steep for this kernel")
    return found
