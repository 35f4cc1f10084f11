"""ShortRun: network, kernel and prior together, because the K-step chain itself is the model."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from torch import Generator, Tensor, nn

from . import checkpoint
from .devices import resolved
from .energy import EnergyNet
from .features import LinearEnergy
from .langevin import Langevin, chain, integer
from .noise import FOR_Z, PRIORS, Gaussian, Noise, Uniform, as_seed, chain_noise, mix, streams
from .reconstruction import reconstruct

NETWORKS = {"EnergyNet": EnergyNet, "LinearEnergy": LinearEnergy}


def _built(classes: dict, config: dict, **more):
    """The object that a checkpoint's metadata describe; older files have two settings more."""
    arguments = {k: v for k, v in config.items() if k not in ("class", "pool", "weights")}
    return classes[config["class"]](**arguments, **more)


@dataclass
class ShortRun:
    """The learned model q_θ, eq. (5) and (7): z ~ p_0, x = M_θ(z, u), K Langevin steps toward f_θ, not one more.

    A seed always means: image i has streams of its own for z and for the chain's noise u, made from (seed, i). So
    image i of a seed has the same z and u whatever the batch size, the number of images or the device.
    """

    f: nn.Module  # the negative energy, [B, C, H, W] → [B]: any module with `channels` and `image_size`
    kernel: Langevin = field(default_factory=Langevin)  # K, s and ε; part of the model, so stored with it
    prior: Uniform | Gaussian = field(default_factory=Uniform)  # p_0, U(-1, 1) in the paper
    dataset: str = ""  # the name given to `observed` when the model was trained
    training: dict = field(default_factory=dict)  # its record (settings, updates, seconds), JSON-compatible

    def __post_init__(self):
        if not hasattr(self.kernel, "steps"):
            raise ValueError(f"kernel must be like Langevin(steps=100), got {self.kernel!r}")
        if type(self.prior) not in PRIORS.values():  # a checkpoint could not be read back
            raise ValueError(f"prior must be of a class in srmcmc_lib.noise.PRIORS ({', '.join(PRIORS)}), got "
                             f"{self.prior!r}: enter a class of your own there")  # fmt: skip

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one image."""
        return (self.f.channels, self.f.image_size, self.f.image_size)

    @property
    def config(self) -> dict:
        """Network, kernel and prior as JSON values: what a checkpoint stores and a resumed run compares."""
        network = {"class": type(self.f).__name__, **getattr(self.f, "config", {})}
        prior = {"class": type(self.prior).__name__, **asdict(self.prior)}
        kernel = asdict(self.kernel) | ({} if type(self.kernel) is Langevin else {"class": type(self.kernel).__name__})
        return checkpoint.plain({"network": network, "kernel": kernel, "prior": prior})

    @property
    def device(self) -> torch.device:
        return next(self.f.parameters(), torch.empty(0)).device

    def to(self, target: torch.device | str | torch.dtype) -> "ShortRun":
        """Moves the network to a device, or converts it (torch.bfloat16 samples faster where native); returns self."""
        self.f.to(target)
        return self

    def draw_z(self, n: int, seed: int | Generator, start: int = 0) -> Tensor:
        """z ~ p_0, [n, C, H, W]: the initial states of images start … start + n − 1 of this seed."""
        return torch.stack([self.prior.draw(self.shape, g) for g in streams(seed, FOR_Z, start, n)]).to(self.device)

    def trajectory(self, z: Tensor, u: Noise = None) -> Iterator[Tensor]:
        """Yields the K + 1 states of the chain from z [B, C, H, W], each [B, C, H, W]; `*path, x = …` gives both.

        u is the chain's noise: None for the noise-free chain (u = 0), a seed or torch.Generator (image i takes noise
        stream i), or K tensors [B or 1, C, H, W] (one [K, 1, C, H, W] tensor shares noise). ValueError where z or u
        has a wrong shape, NaN or infinity.
        """
        z = self._checked(z)
        yield z
        yield from (x for x, _ in chain(self.f, z, self.kernel, self._noise(u, len(z))))

    def __call__(self, z: Tensor, u: Noise = None) -> Tensor:
        """x = M_θ(z, u), eq. (7): the last state of `trajectory(z, u)`; FloatingPointError where it ran away."""
        for x in self.trajectory(z, u):
            pass
        if not x.abs().max() < 1e6:  # images lie in [-1, 1], long chains in the hundreds
            raise FloatingPointError(f"the chain ran away within K = {self.kernel.steps} steps, to |x| = "
                                     f"{x.abs().max():.3g}: f is too steep; use the kernel of training")  # fmt: skip
        return x

    def sample(self, n: int, seed: int | Generator, batch_size: int = 64) -> Tensor:
        """n samples of q_θ, float32 [n, C, H, W]; equals `self(self.draw_z(n, seed), u=seed)`, batch_size at once."""
        n, m, seed, parts = integer("n", n), integer("batch_size", batch_size), as_seed(seed), []
        for start in range(0, n, m):
            z = self.draw_z(min(m, n - start), seed, start)
            parts.append(self(z, self._noise(seed, len(z), start)))
        return torch.cat(parts)

    def interpolate(self, z1: Tensor, z2: Tensor, rhos: Sequence[float] | Tensor, u: Noise = None,
                    mixing: str = "variance", fresh: bool = False) -> Tensor:  # fmt: skip
        """Rows M_θ(z_ρ, u) with z_ρ = ρ z_1 + √(1 − ρ²) z_2 (figures 3 and 7), [B, C, H, W] twice → [B, R, C, H, W].

        With ρ falling from 1 to 0, a row leads from M_θ(z_1) at its left to M_θ(z_2) at its right. The paper does not
        say what u is here; the noise-free chain is our default, because then only ρ changes along a row.

        Args:
            rhos, mixing: R ≥ 1 numbers in 0 … 1; "variance" (the paper's rule), "linear" or "spherical", see `mix`.
            u: as in `trajectory`, row b taking noise stream b, shared along the row.
            fresh: gives each image noise of its own, and needs u: image r of row b takes stream (or image) b·R + r.
        """
        z = mix(self._checked(z1, "z1"), self._checked(z2, "z2"), rhos, mixing)
        if fresh and u is None:
            raise ValueError("fresh noise needs u: a seed, a torch.Generator or K tensors [B·R, C, H, W]")
        B, R = z.shape[:2]
        U = self._noise(u, B * R if fresh else B)
        if U is not None and not fresh:
            U = (u_k.repeat_interleave(R, 0) if len(u_k) == B else u_k for u_k in U)
        return self(z.flatten(0, 1), U).unflatten(0, (B, R))

    reconstruct = reconstruct

    def with_steps(self, steps: int) -> "ShortRun":
        """The same network and prior with another K: for K at evaluation ≠ K at training."""
        return replace(self, kernel=replace(self.kernel, steps=steps))

    def _checked(self, z: Tensor, name: str = "z") -> Tensor:
        if not (z := torch.as_tensor(z)).is_floating_point():
            raise ValueError(f"{name} must be floating point, in [-1, 1], got {z.dtype}; data.to_float converts uint8")
        z = z.to(self.device, torch.float32)  # NumPy makes float64
        if z.ndim != 4 or tuple(z.shape[1:]) != self.shape:
            raise ValueError(f"{name} must have the shape [B, {', '.join(map(str, self.shape))}], got {list(z.shape)}")
        if not z.isfinite().all():
            raise ValueError(f"{name} contains NaN or infinity")
        return z

    def _noise(self, u: Noise, n: int, start: int = 0) -> Iterator[Tensor] | None:
        return chain_noise(u, self.kernel.steps, self.shape, n, start, self.device)

    def save(self, path: str | Path) -> Path:
        """Writes one safetensors file that holds everything needed to sample again; returns its path."""
        meta = self.config | {"dataset": self.dataset, "training": self.training}
        return checkpoint.write(path, meta, {f"f.{k}": v for k, v in self.f.state_dict().items()})

    @classmethod
    def load(cls, source: str | Path, f: nn.Module | None = None, device: torch.device | str = "cpu",
             precision: str = "float32", kernel: Langevin | None = None) -> "ShortRun":  # fmt: skip
        """A saved model: a path, or the name of one shipped in srmcmc_lib/pretrained. Never unpickles.

        f and kernel are the network to fill and the kernel, where they are of classes of your own. precision is that of
        f while sampling: "float32", "bf16", or "auto" (bf16 where it is native); the chain's state and its update stay
        float32. ValueError where the file is damaged or something else, or its weights do not fit or are not finite.
        """
        path = checkpoint.find(source)
        meta, tensors = checkpoint.read(path)
        network, weights = meta["network"], {k[2:]: v for k, v in tensors.items() if k.startswith("f.")}
        if not all(v.isfinite().all() for v in weights.values()):
            raise ValueError(f"{path} holds NaN or infinite weights: take an earlier checkpoint")
        if f is None and network.get("class") not in list(NETWORKS):
            raise ValueError(f"{path} holds weights of a {network.get('class')}: build one and pass it as f=")
        if kernel is None and "class" in meta["kernel"]:
            raise ValueError(f"{path} has a kernel {meta['kernel']['class']}: build one and pass it as kernel=")
        if (prior := meta["prior"].get("class")) and prior not in list(PRIORS):
            raise ValueError(f"{path} has a prior {prior}: enter its class in noise.PRIORS")
        for part, own in (("network", f), ("kernel", kernel)):
            if own is not None and (here := cls(f or nn.Identity(), kernel or Langevin()).config[part]) != meta[part]:
                raise ValueError(f"{path} holds the {part} {meta[part]}, but yours is {here}")
        try:
            if f is None:  # the features' weights are in the file: their source is not asked for
                f = _built(NETWORKS, network, **({"trained": False} if network["class"] == "LinearEnergy" else {}))
            kernel, prior = kernel or Langevin(**meta["kernel"]), _built(PRIORS, meta["prior"])
            model = cls(f, kernel, prior, meta["dataset"], meta["training"])
            f.load_state_dict(weights)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"{path} is damaged (take another copy), or not of this f or version: {error}") from error
        model.to(device)
        return model.to(torch.bfloat16) if resolved(precision, model.device) == "bf16" else model
