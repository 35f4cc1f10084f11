"""Descent steps for a batch of separate problems: every sum, history and decision is one image's own.

Each optimizer is built for one run and maps z, L'(z) [B, C, H, W] and η to the next z. torch.optim's L-BFGS would mix
the images of a batch in its scalar products; these do not. η = 1/2 is the whole step where L'(z) = 2(M_θ(z) − x).
"""

from collections.abc import Callable

import torch
from torch import Tensor

Step = Callable[[Tensor, Tensor, float], Tensor]


def dot(a: Tensor, b: Tensor) -> Tensor:
    """<a, b> of each image, [B, C, H, W] twice → [B, 1, 1, 1]."""
    return (a * b).sum(dim=(1, 2, 3), keepdim=True)


def gradient_descent() -> Step:
    """z ← z − η L'(z), the paper's iteration."""
    return lambda z, g, η: z - η * g


def momentum(μ: float = 0.9) -> Step:
    """v ← μ v + (1 − μ) L'(z), z ← z − η v: the running mean of the gradients, which damps a residual that rattles."""
    v = 0

    def step(z: Tensor, g: Tensor, η: float) -> Tensor:
        nonlocal v
        v = μ * v + (1 - μ) * g
        return z - η * v

    return step


def adam(β1: float = 0.9, β2: float = 0.999, tiny: float = 1e-8) -> Step:
    """Adam (Kingma and Ba 2015, Algorithm 1), on each pixel by itself."""
    m = v = t = 0

    def step(z: Tensor, g: Tensor, η: float) -> Tensor:
        nonlocal m, v, t
        t += 1
        m, v = β1 * m + (1 - β1) * g, β2 * v + (1 - β2) * g**2
        return z - η * (m / (1 - β1**t)) / ((v / (1 - β2**t)).sqrt() + tiny)

    return step


def lbfgs(memory: int = 10) -> Step:
    """z ← z − 2η H L'(z), H the inverse Hessian by L-BFGS (Nocedal and Wright 2006, Algorithm 7.4) from H_0 = I/2.

    There is no line search, which would cost whole chains. Pairs with a curvature under 0.01 are left out, so H is
    positive definite.
    """
    pairs, last = [], None

    def step(z: Tensor, g: Tensor, η: float) -> Tensor:
        nonlocal last
        if last is not None:
            s, y = z - last[0], g - last[1]
            ρ = torch.where(dot(s, y) > 0.01 * dot(s, s), 1 / dot(s, y), 0.0)  # ρ = 0: as if there were no such pair
            pairs.append((s, y, ρ))
            del pairs[:-memory]
        last = z, g
        q, α = g, []
        for s, y, ρ in reversed(pairs):
            α.append(ρ * dot(s, q))
            q = q - α[-1] * y
        q = q / 2
        for (s, y, ρ), a in zip(pairs, reversed(α), strict=True):
            q = q + (a - ρ * dot(y, q)) * s
        return z - 2 * η * q

    return step


def anderson(memory: int = 5, ridge: float = 1e-4) -> Step:
    """Anderson acceleration (Walker and Ni 2011, type II) of z ← z − η L'(z): z ← z − η L' − (ΔZ − η ΔG) γ.

    γ = argmin ‖L' − ΔG γ‖² over the last changes ΔG of L', with a ridge relative to their mean square.
    """
    history = []

    def step(z: Tensor, g: Tensor, η: float) -> Tensor:
        history.append((z.flatten(1), g.flatten(1)))
        del history[: -memory - 1]
        if len(history) == 1:
            return z - η * g
        ΔZ, ΔG = (torch.stack(h, 2).diff(dim=2) for h in zip(*history, strict=True))  # [B, pixels, m]
        gram = ΔG.mT @ ΔG
        gram = gram + ridge * torch.diag_embed(
            gram.diagonal(dim1=1, dim2=2).mean(1, keepdim=True).expand(gram.shape[:2])
        )
        γ = torch.linalg.solve_ex(gram, ΔG.mT @ history[-1][1].unsqueeze(2))[0]
        γ = γ.nan_to_num(0.0, 0.0, 0.0)  # an image that has stopped, or left the finite numbers: the plain step
        return z - η * g - ((ΔZ - η * ΔG) @ γ).view_as(z)

    return step


# Each optimizer and its usual η.
OPTIMIZERS = {
    "gd": (gradient_descent, 0.1), "momentum": (momentum, 0.1), "adam": (adam, 0.05),
    "lbfgs": (lbfgs, 0.1), "anderson": (anderson, 0.1),
}  # fmt: skip
