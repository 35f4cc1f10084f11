"""ShortRun: network, kernel, prior and value range together, because the K-step chain itself is the model."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from torch import Generator, Tensor, nn

from . import checkpoint
from .checks import integer
from .energy import EnergyNet, LinearEnergy
from .interpolation import mix
from .langevin import Langevin, langevin_chain
from .priors import FOR_Z, PRIORS, Gaussian, Noise, Uniform, as_seed, chain_noise, streams
from .reconstruction import reconstruct


@dataclass
class ShortRun:
    """The learned model q_θ, eq. (5) and (7): z ~ p_0, x = M_θ(z, u), K Langevin steps toward f_θ, not one more.

    Attributes:
        f: the negative energy, [B, C, H, W] → [B]; an EnergyNet, a LinearEnergy, or any module with `channels` and
            `image_size`.
        kernel: K, s and ε; part of the model, so stored with it.
        prior: p_0, Uniform(-1, 1) (the paper) or Gaussian.
        value_range: the range of the data in the model's units; samples are not clamped to it.
        dataset: the name given to `observed` when the model was learned.
        training: a record of the learning (settings, updates, seconds), JSON-compatible.

    A seed always means: image i has streams of its own for z and for the chain's noise u, made from (seed, i). So
    image i of a seed is the same whatever the batch size, the number of images or the device.
    """

    f: nn.Module
    kernel: Langevin = field(default_factory=Langevin)
    prior: Uniform | Gaussian = field(default_factory=Uniform)
    value_range: tuple[float, float] = (-1.0, 1.0)
    dataset: str = ""
    training: dict = field(default_factory=dict)

    def __post_init__(self):
        if type(self.prior) not in PRIORS.values():  # a checkpoint could not be read back
            raise ValueError(f"prior must be one of {', '.join(PRIORS)}, got {self.prior!r}")

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one image."""
        return (self.f.channels, self.f.image_size, self.f.image_size)

    @property
    def config(self) -> dict:
        """Network, kernel and prior in words and numbers: what a checkpoint stores and a resumed run compares."""
        return {
            "network": {"class": type(self.f).__name__, **getattr(self.f, "config", {})},
            "kernel": asdict(self.kernel),
            "prior": {"class": type(self.prior).__name__, **asdict(self.prior)},
        }

    @property
    def device(self) -> torch.device:
        return next(self.f.parameters(), torch.empty(0)).device

    def to(self, device: torch.device | str) -> "ShortRun":
        """Moves the network to a device; returns self."""
        self.f.to(device)
        return self

    def draw_z(self, n: int, seed: int | Generator, start: int = 0) -> Tensor:
        """z ~ p_0, [n, C, H, W]: the initial states of images start … start + n − 1 of this seed."""
        return torch.stack([self.prior.draw(self.shape, g) for g in streams(seed, FOR_Z, start, n)]).to(self.device)

    def trajectory(self, z: Tensor, u: Noise = None) -> Iterator[Tensor]:
        """Yields the K + 1 states of the chain from z [B, C, H, W], each [B, C, H, W]; `*path, x = …` gives both.

        Args:
            z: the initial state.
            u: the chain's noise: None for the noise-free chain (u = 0), a seed or torch.Generator (image i takes
                noise stream i), or K tensors that broadcast to z (one [K, 1, C, H, W] tensor shares noise).

        Raises:
            ValueError: z or u of a wrong shape, z with NaN or infinity.
        """
        for state in langevin_chain(self.f, self._checked(z), self.kernel, self._noise(u, len(z))):
            yield state.x

    def __call__(self, z: Tensor, u: Noise = None) -> Tensor:
        """x = M_θ(z, u), eq. (7): the last state of `trajectory(z, u)`, [B, C, H, W]."""
        for x in self.trajectory(z, u):
            pass
        if not x.isfinite().all():
            raise FloatingPointError(
                f"the chain left the finite numbers within K = {self.kernel.steps} steps: f is too steep for this step "
                "size; use the kernel it was trained with, or an earlier checkpoint"
            )
        return x

    def sample(self, n: int, seed: int | Generator, batch_size: int = 64) -> Tensor:
        """n samples of q_θ, float32 [n, C, H, W], on the model's device; equals `self(self.draw_z(n, seed), u=seed)`.

        Args:
            n: how many, at least 1.
            seed: an integer in 0 … 2³² − 1 or a torch.Generator.
            batch_size: how many chains run at once; changes speed and memory, not the images.
        """
        integer("n", n)
        integer("batch_size", batch_size)
        seed = as_seed(seed)
        parts = []
        for start in range(0, n, batch_size):
            m = min(batch_size, n - start)
            parts.append(self(self.draw_z(m, seed, start), self._noise(seed, m, start)))
        return torch.cat(parts)

    def interpolate(
        self, z1: Tensor, z2: Tensor, rhos: Sequence[float] | Tensor, u: Noise = None,
        mixing: str = "variance", fresh: bool = False,
    ) -> Tensor:  # fmt: skip
        """Rows M_θ(z_ρ, u) with z_ρ = ρ z_1 + √(1 − ρ²) z_2 (figures 3 and 7), [B, C, H, W] twice → [B, R, C, H, W].

        With ρ falling from 1 to 0, a row leads from M_θ(z_1) at its left to M_θ(z_2) at its right. The paper does not
        say what u is here; the noise-free chain is our default, because then only ρ changes along a row.

        Args:
            z1, z2: the initial states at the ends of B rows.
            rhos: R ≥ 1 numbers in 0 … 1.
            u: as in `trajectory`: None for the noise-free chain; a seed (row b takes noise stream b) or K tensors for
                B images, shared along each row.
            mixing: "variance" (the paper's rule), "linear" or "spherical": see `interpolation.mix`.
            fresh: gives every image noise of its own instead: image r of row b takes stream b·R + r of the seed, or
                image b·R + r of the tensor u, then [K, B·R, C, H, W].

        Raises:
            ValueError: shapes, ρ or u that do not fit, an unknown mixing, fresh noise without u.
        """
        z = mix(self._checked(z1), self._checked(z2), rhos, mixing)
        if fresh and u is None:
            raise ValueError("fresh noise needs u: a seed, a torch.Generator or a tensor [K, B·R, C, H, W]")
        B, R = z.shape[:2]
        U = self._noise(u, B * R if fresh else B)
        if U is not None and not fresh:
            U = (u_k.repeat_interleave(R, 0) if u_k.ndim == 4 and len(u_k) == B else u_k for u_k in U)
        return self(z.flatten(0, 1), U).unflatten(0, (B, R))

    reconstruct = reconstruct

    def with_steps(self, steps: int) -> "ShortRun":
        """The same network and prior with another K: for K at evaluation ≠ K at training."""
        return replace(self, kernel=replace(self.kernel, steps=steps))

    def _checked(self, z: Tensor, name: str = "z") -> Tensor:
        if z.ndim != 4 or tuple(z.shape[1:]) != self.shape:
            raise ValueError(f"{name} must have the shape [B, {', '.join(map(str, self.shape))}], got {list(z.shape)}")
        if not z.isfinite().all():
            raise ValueError(f"{name} contains NaN or infinity")
        return z.to(self.device)

    def _noise(self, u: Noise, n: int, start: int = 0) -> Iterator[Tensor] | None:
        return chain_noise(u, self.kernel.steps, self.shape, n, start, self.device)

    def save(self, path: str | Path, **extra: Tensor) -> Path:
        """Writes one safetensors file that holds everything needed to sample again; returns its path.

        The file is written aside and renamed, so an interrupted save leaves the old one. `extra` tensors (a trainer's
        state) travel along and are ignored by `load`.
        """
        more = {"value_range": list(self.value_range), "image_size": self.f.image_size}
        meta = self.config | more | {"dataset": self.dataset, "training": self.training}
        return checkpoint.write(path, meta, {f"f.{k}": v for k, v in self.f.state_dict().items()} | extra)

    @classmethod
    def load(cls, source: str | Path, f: nn.Module | None = None, device: torch.device | str = "cpu") -> "ShortRun":
        """A saved model: a path, or the name of one shipped in srmcmc_lib/pretrained. Never unpickles.

        Args:
            source: a file, or a name such as "fashion_mnist".
            f: the network to fill, needed only where it is neither an EnergyNet nor a LinearEnergy.
            device: where the network goes.

        Raises:
            FileNotFoundError: no such file or name.
            ValueError: a damaged file, one that is no ShortRun checkpoint, or weights that do not fit the network.
        """
        path = checkpoint.find(source)
        meta, tensors = checkpoint.read(path)
        known = {"EnergyNet": EnergyNet, "LinearEnergy": LinearEnergy}
        if f is None and meta["network"].get("class") not in known:
            raise ValueError(f"{path} holds weights of a {meta['network'].get('class')}: build one and pass it as f=")
        if f is None:
            network = meta["network"]  # h's weights are in the file: what they once came from is not asked for again
            f = checkpoint.rebuilt(path, {**network, "weights": None} if "weights" in network else network, known)
            if "weights" in network:
                f.weights = network["weights"]
        else:
            here = json.loads(json.dumps(cls(f).config["network"]))  # with lists for tuples, as the file has them
            if here != meta["network"]:
                raise ValueError(f"{path} holds the network {meta['network']}, but f is {here}")
        try:
            f.load_state_dict({k.removeprefix("f."): v for k, v in tensors.items() if k.startswith("f.")})
        except RuntimeError as error:
            raise ValueError(f"the weights in {path} do not fit the network: {error}") from error
        kernel = checkpoint.rebuilt(path, {"class": "Langevin", **meta["kernel"]}, {"Langevin": Langevin})
        prior = checkpoint.rebuilt(path, meta["prior"], PRIORS)
        return cls(f, kernel, prior, tuple(meta["value_range"]), meta["dataset"], meta["training"]).to(device)
