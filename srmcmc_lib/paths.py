"""Where data, caches, checkpoints and figures live: the only module that knows."""

import os
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
EMBEDDED, PRETRAINED = PACKAGE / "embedded", PACKAGE / "pretrained"


def home() -> Path:
    """$SRMCMC_HOME (`make` needs a checkout there), or this package's checkout, or, installed, the working folder."""
    checkout = (PACKAGE.parent / "pyproject.toml").exists()
    return Path(os.environ.get("SRMCMC_HOME", PACKAGE.parent if checkout else Path.cwd())).expanduser()


def data() -> Path:  # where users put data sets
    return home() / Path(os.environ.get("SRMCMC_DATA", "data")).expanduser()


def cache() -> Path:  # prepared image tensors; safe to delete
    return home() / ".cache"


def checkpoints() -> Path:  # models that you train
    return home() / "checkpoints"


def figures() -> Path:  # regenerated, one folder a notebook; $SRMCMC_FIGURES is the runner's aside folder
    return Path(os.environ.get("SRMCMC_FIGURES", home() / "figures")).expanduser()
