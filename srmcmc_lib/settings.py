"""The settings of a training, checked when they are made."""

import math
from dataclasses import dataclass

from .checks import integer
from .devices import PRECISIONS


@dataclass(frozen=True)
class TrainConfig:
    """Settings of Algorithm 1. The defaults for rate, σ, m and Adam are those of the authors' public code.

    Attributes:
        updates: T, the number of updates in all, those before a resume included.
        batch_size: m, observed and synthesised images per update.
        rate: η, Adam's learning rate.
        sigma: σ, the standard deviation of the noise added to observed images (range [-1, 1]). The smaller the
            better until learning turns unstable; at K = 100 keep it above the chain's own noise, σ ≥ 2 ε.
        rate_final, sigma_final: what η and σ are lowered to; None keeps them constant, as in the authors' code.
        lower_from: the fraction of the updates after which both are lowered, along half a cosine (our choice: the
            paper only says "gradually"). 0 lowers over the whole run.
        horizon: the updates to which the schedules are stretched; None: `updates`. A run that stops short of its
            horizon can be prolonged later as if it had never stopped.
        betas: Adam's β_1 and β_2.
        average: decay of a running average of θ that replaces θ in checkpoints and at the end; 0 for none (the
            paper's). Learning itself never sees the average.
        seed: of the four generators (data order, data noise, z, u).
        checkpoint: a .safetensors file, written every `checkpoint_every` updates and at the end, with the full state.
        log: a .csv file, or a folder for TensorBoard.
        progress: show a progress bar.
        precision: of the chain's f and f': "float32", "bf16" (a bfloat16 copy of f; eq. (6) and the chain's update stay
            float32), on GPUs "tf32", or "auto": "bf16" where the device has instructions for it, else "float32".
            Of learning only: what is sampled later follows torch's flags, by default TF32 in a GPU's convolutions
            (`with devices.arithmetic("float32", model.device)` for float32).
        channels_last: the memory layout of f, faster on CPUs and tensor cores; False for the other one.
        compile: torch.compile f (on CPUs it gained nothing).
        sub_batch: how many images a device takes at once, to save memory; changes speed, not the update. None takes
            all of its share, or what its memory holds.
        path: more than 1, less than `alarm`: f is scaled by a few percent after each update, so that the chains' path
            K·s·‖∂f/∂x‖ is drawn towards this many times the distance ‖x⁺ − z‖ that it has to cover. f then learns to
            stop at the images, instead of being just steep enough to pass them at step K. None: as steep as eq. (6)
            makes it. Our device, not the paper's.
        alarm: stop when the chains' path is this many times as long as the way it has to go, see `check`; None: never.

    Raises:
        ValueError: a setting out of range.
    """

    updates: int = 100_000
    batch_size: int = 64
    rate: float = 1e-4
    sigma: float = 0.03
    rate_final: float | None = None
    sigma_final: float | None = None
    lower_from: float = 0.8
    horizon: int | None = None
    betas: tuple[float, float] = (0.9, 0.999)
    average: float = 0.0
    seed: int = 0
    checkpoint: str | None = None
    checkpoint_every: int = 100
    log: str | None = None
    progress: bool = True
    precision: str = "float32"
    channels_last: bool = True
    compile: bool = False
    sub_batch: int | None = None
    path: float | None = None
    alarm: float | None = 1.6

    def __post_init__(self):
        for name in ("updates", "batch_size", "checkpoint_every", "sub_batch", "horizon"):
            value = getattr(self, name)
            if value is not None or name not in ("sub_batch", "horizon"):
                integer(name, value)
        integer("seed", self.seed, 0, 2**30 - 1)
        if len(self.betas) != 2 or not all(0 <= β < 1 for β in self.betas):
            raise ValueError(f"betas must be two numbers in [0, 1), got {self.betas!r}")
        if not 0 < self.rate < 1 or not (self.rate_final is None or 0 < self.rate_final < 1):
            raise ValueError(f"rate and rate_final must lie in (0, 1), got {self.rate!r} and {self.rate_final!r}")
        if not 0 <= self.sigma < 10 or not (self.sigma_final is None or 0 <= self.sigma_final < 10):
            raise ValueError(f"sigma and sigma_final must lie in [0, 10), got {self.sigma!r} and {self.sigma_final!r}")
        if not 0 <= self.lower_from <= 1 or not 0 <= self.average < 1:
            got = f"{self.lower_from!r} and {self.average!r}"
            raise ValueError(f"lower_from must lie in [0, 1] and average in [0, 1), got {got}")
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision={self.precision!r} is unknown; choose one of {', '.join(PRECISIONS)}")
        if self.alarm is not None and not self.alarm > 1:
            raise ValueError(f"alarm must be None or a number above 1, got {self.alarm!r}")
        if self.path is not None and not 1 < self.path < (self.alarm or math.inf):
            raise ValueError(
                f"path must be None, or above 1 and below alarm={self.alarm!r} (raise that), got {self.path!r}"
            )

    def scheduled(self, start: float, final: float | None, step: int) -> float:
        """The value of a schedule at update `step` (0 … updates − 1)."""
        if final is None:
            return start
        progress = (step / (self.horizon or self.updates) - self.lower_from) / max(1 - self.lower_from, 1e-12)
        return final + (start - final) * (1 + math.cos(math.pi * min(max(progress, 0.0), 1.0))) / 2
