"""Short-run MCMC toward an energy-based model: the K-step Langevin chain itself is the model.

Read the files in this order; each imports only those above it.

paths           where data, cache, checkpoints and figures lie
energy          f_θ, the paper's ConvNet, and its gradient from the top down
langevin        eq. (4): one step, and the chain
noise           where z and u come from, and how two z mix
devices         ranks and arithmetic
images          image files into one mapped uint8 file
data            observed examples by name
features        fixed h(x)
checkpoint      one safetensors file a model
reconstruction  z from x
shortrun        the model M_θ
progress        what a stopped run needs, and its log
training        Algorithm 1
metrics         how good samples are
moments         moment matching on images
grid            exact distributions on n points
exact           its solvers
plots           figures that two notebooks share
widgets         sliders and the explorer
"""

from .data import observed
from .energy import EnergyNet
from .features import LinearEnergy
from .langevin import Langevin
from .noise import Gaussian, Uniform
from .progress import Record
from .shortrun import ShortRun
from .training import TrainConfig, train

__all__ = ["EnergyNet", "Gaussian", "Langevin", "LinearEnergy", "Record", "ShortRun", "TrainConfig", "Uniform",
           "observed", "train"]  # fmt: skip
