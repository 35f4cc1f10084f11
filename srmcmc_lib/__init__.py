"""Short-run MCMC toward an energy-based model: the K-step Langevin chain itself is the model."""

from .data import observed
from .energy import EnergyNet, LinearEnergy
from .langevin import Langevin
from .priors import Gaussian, Uniform
from .records import Record
from .shortrun import ShortRun
from .training import TrainConfig, train

__all__ = [
    "EnergyNet", "Gaussian", "Langevin", "LinearEnergy", "Record", "ShortRun", "TrainConfig", "Uniform",
    "observed", "train",
]  # fmt: skip
