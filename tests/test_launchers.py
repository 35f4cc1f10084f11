"""The launchers that README names, on two CPU processes, against one process: the command line and JupyterLab's."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from srmcmc_lib import ShortRun
from srmcmc_lib.records import read_log

RECIPE = {
    "dataset": "fashion_mnist_mini",
    "limit": 100,
    "network": {"channels": 1, "image_size": 8, "width": 4},
    "seed": 3,
    "stages": [{"steps": 2, "updates": 3, "batch_size": 5, "average": 0.5, "progress": False},
               {"steps": 4, "updates": 2, "batch_size": 5, "progress": False}],
}  # fmt: skip
NOTEBOOK = """
import sys
from pathlib import Path
from accelerate import notebook_launcher
from srmcmc_lib import recipes

# learned in the kernel before: what it found, one process, must not be what its children believe
recipes.run("tiny.yaml", Path("before"), Path("before"))
learn = lambda: recipes.run("tiny.yaml", Path("work"), Path("out"))
notebook_launcher(learn, num_processes=2, use_port=sys.argv[1])
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("launchers")
    (folder / "tiny.yaml").write_text(yaml.safe_dump(RECIPE))
    return folder


@pytest.fixture(scope="module")
def alone(folder) -> dict[str, torch.Tensor]:
    launched(folder, "-m", "srmcmc_lib.recipes", "tiny.yaml", "--work", "alone", "--out", "alone")
    return ShortRun.load(folder / "alone" / "tiny.safetensors").f.state_dict()


def free_port() -> str:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


def launched(folder: Path, *command: str) -> str:
    surroundings = {k: v for k, v in os.environ.items() if not k.startswith(("ACCELERATE_", "MASTER_"))}
    env = surroundings | {
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(Path(__file__).parents[1]),
    }
    done = subprocess.run([sys.executable, *command], cwd=folder, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def check(folder: Path, said: str, alone: dict[str, torch.Tensor]) -> None:
    """Two ranks that shared each batch: weights of one process up to rounding, and one of them wrote."""
    assert re.findall(r"tiny: (\d) process\(es\), cpu", said)[-1] == "2", said
    together = ShortRun.load(folder / "out" / "tiny.safetensors").f.state_dict()
    assert max((together[k] - alone[k]).abs().max().item() for k in alone) <= 0.01 * 1e-4  # 1 % of an Adam step
    assert [r.step for r in read_log(folder / "out" / "tiny-stage1.csv")] == [1, 2, 3]


def test_accelerate_launch(folder, alone):
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
    rest = ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", free_port()]
    learn = ["-m", "srmcmc_lib.recipes", "tiny.yaml", "--work", "launch/work", "--out", "launch/out"]
    said = launched(folder, *launch, *rest, *learn)
    check(folder / "launch", said, alone)
    assert said.count("process(es)") == said.count("tiny.safetensors") == 1, "every rank printed"


def test_notebook_launcher_in_a_kernel_that_has_learned_before(folder, alone):
    (folder / "cells.py").write_text(NOTEBOOK)
    said = launched(folder, "cells.py", free_port())
    check(folder, said, alone)
    assert said.count("process(es)") == 2, "once before, once by one of the two ranks"
