"""Short-run MCMC toward an energy-based model: the K-step Langevin chain itself is the model."""

from .data import observed
from .energy import EnergyNet
from .langevin import Langevin
from .shortrun import Gaussian, ShortRun, Uniform
from .training import Record, TrainConfig, grow, train

__all__ = [
    "EnergyNet", "Gaussian", "Langevin", "Record", "ShortRun", "TrainConfig", "Uniform", "grow", "observed", "train",
]  # fmt: skip
