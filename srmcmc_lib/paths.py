"""Where data, caches, checkpoints and figures live: the only module that knows."""

import os
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
EMBEDDED = PACKAGE / "embedded"
PRETRAINED = PACKAGE / "pretrained"


def home() -> Path:
    """$SRMCMC_HOME, or the checkout this package runs from, or the working directory of an installed package."""
    if "SRMCMC_HOME" in os.environ:
        return Path(os.environ["SRMCMC_HOME"]).expanduser()
    return PACKAGE.parent if (PACKAGE.parent / "pyproject.toml").exists() else Path.cwd()


def data() -> Path:
    """Where users put data sets: $SRMCMC_DATA or home/data."""
    return Path(os.environ["SRMCMC_DATA"]).expanduser() if "SRMCMC_DATA" in os.environ else home() / "data"


def cache() -> Path:
    """Prepared image tensors; safe to delete."""
    return home() / ".cache"


def checkpoints() -> Path:
    """Models that you train."""
    return home() / "checkpoints"


def figures() -> Path:
    """Regenerated figures, one folder a notebook: $SRMCMC_FIGURES (the runner's aside folder) or home/figures."""
    return Path(os.environ["SRMCMC_FIGURES"]).expanduser() if "SRMCMC_FIGURES" in os.environ else home() / "figures"
