"""Several ranks make the update of one, under both launchers that README names: the command line's and JupyterLab's."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_training import IMAGES, config, timeless, tiny

from srmcmc_lib import train
from srmcmc_lib.progress import read_log

CLOSE = 0.01 * 1e-3  # 1 % of what Adam's first updates move a weight by
SETTINGS = dict(updates=4, batch_size=5, checkpoint_every=2, average=0.5)  # shares of 2 and 3
RANK = """
import sys
sys.path.insert(0, {tests!r})
import torch
from srmcmc_lib.devices import ranks
from test_distributed import IMAGES, SETTINGS, config, timeless, tiny, train

def learn(folder, rank_1_elsewhere=False, **settings):
    model, rank = tiny(width=4), ranks().process_index
    if rank == 1:  # a θ of its own, which rank 0's replaces
        torch.nn.init.zeros_(model.f.layers[0].weight)
    file = f"{{folder}}/{{'elsewhere' if rank_1_elsewhere and rank else 'c'}}.safetensors"
    try:
        records = timeless(train(model, IMAGES, config(**settings, checkpoint=file, log=f"{{folder}}/log.csv")))
    except (FloatingPointError, ValueError) as error:
        records = str(error)
    torch.save((records, model.f.state_dict()), f"{{folder}}/{{rank}}-of-{{ranks().num_processes}}.pt")
"""
COMMAND = """
learn("a", **SETTINGS)
learn("b", updates=400, rate=0.3, checkpoint_every=1)
learn("c", updates=2)
learn("c", True, updates=3)
torch.distributed.destroy_process_group()
"""
NOTEBOOK = """
from accelerate import notebook_launcher
learn("before", **SETTINGS)  # in the kernel: that this is one process must not be what its children believe
notebook_launcher(lambda: learn("notebook", **SETTINGS), num_processes=2, use_port=sys.argv[1])
"""


def launched(folder: Path, script: str, *launcher: str) -> None:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    (folder / "script.py").write_text(RANK.format(tests=str(Path(__file__).parent)) + script)
    for name in ("a", "b", "c", "before", "notebook"):
        (folder / name).mkdir()
    env = {k: v for k, v in os.environ.items() if not k.startswith(("ACCELERATE_", "MASTER_"))}
    env |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, *(a.replace("PORT", port) for a in launcher), "script.py", port]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr


def results(folder: Path, size: int = 2) -> list[tuple[list[dict] | str, dict]]:
    return [torch.load(folder / f"{rank}-of-{size}.pt") for rank in range(size)]


def apart(θ: dict, **settings) -> float:
    """How far θ is from that of one process."""
    model = tiny(width=4)
    list(train(model, IMAGES, config(**SETTINGS | settings)))
    return max((θ[k] - v).abs().max().item() for k, v in model.f.state_dict().items())


def check_two_equal_one(folder: Path) -> dict:
    """Weights and records after 4 updates of uneven shares."""
    (records, θ), (other_records, other_θ) = results(folder)
    assert other_records == records and all(torch.equal(other_θ[k], θ[k]) for k in θ) and apart(θ) <= CLOSE
    for ours, one in zip(records, timeless(train(tiny(width=4), IMAGES, config(**SETTINGS))), strict=True):
        assert ours == pytest.approx(one, rel=1e-4, abs=1e-5)
    assert timeless(read_log(folder / "log.csv")) == records  # each row once: one rank writes
    return θ


def test_accelerate_launch(tmp_path):
    launch = "-m accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no"
    launched(tmp_path, COMMAND, *f"{launch} --dynamo_backend no --main_process_port PORT".split())
    θ, model = check_two_equal_one(tmp_path / "a"), tiny(width=4)
    for wrong in (dict(batch_size=2), dict(seed=1), dict(sigma=0.06)):  # the comparison would notice
        assert apart(θ, **wrong) > 10 * CLOSE, wrong
    c = config(**SETTINGS | dict(updates=6), checkpoint=tmp_path / "a" / "c.safetensors")
    assert [r.step for r in train(model, IMAGES, c)] == [5, 6]  # one process goes on where two stopped
    assert apart(model.f.state_dict(), updates=6) <= CLOSE

    (told, _), (other_told, _) = results(tmp_path / "b")  # every rank stops, and names the older checkpoint
    assert other_told == told and "diverge" in told and "c.previous.safetensors" in told
    for told, _ in results(tmp_path / "c"):
        assert "would resume from update" in told and "where all nodes can read it" in told


def test_notebook_launcher_in_a_kernel_that_has_trained_before(tmp_path):
    launched(tmp_path, NOTEBOOK)
    check_two_equal_one(tmp_path / "notebook")
    assert apart(results(tmp_path / "before", 1)[0][1]) <= CLOSE
