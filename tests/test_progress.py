"""A run killed anywhere resumes to the bit; its files, its log, its lock; clear errors for files that cannot serve."""

import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from test_training import IMAGES, config, same, timeless, tiny, weights

from srmcmc_lib import ShortRun, TrainConfig, train
from srmcmc_lib.progress import read_log

LONG = dict(updates=14, batch_size=4, checkpoint_every=4, average=0.9, rate=2e-3, rate_final=1e-4, sigma=0.1,
            sigma_final=0.03, lower_from=0.25, seed=3, progress=False)  # fmt: skip
KILLS = [("half", "c.resume.pt", 8), ("before", "c.safetensors", 8), ("after", "c.safetensors", 12),
         ("half", "c.safetensors", 14)]  # fmt: skip
CHILD = """
import os, shutil, signal, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import torch
from test_progress import IMAGES, KILLS, LONG, TrainConfig, tiny, train
torch.set_num_threads(1)
folder, busy = Path(sys.argv[1]), sys.argv[2]
try:
    train(tiny(), IMAGES, TrainConfig(checkpoint=busy))
except ValueError as error:
    print(error)

def die_at(where, name, step):
    rename, update = Path.replace, 0
    def replace(part, target):
        if target.name == name and update == step:
            if where == "half":
                os.truncate(part, part.stat().st_size // 2)
            if where == "after":
                rename(part, target)
            os.kill(os.getpid(), signal.SIGKILL)
        return rename(part, target)
    Path.replace = replace
    run = TrainConfig(checkpoint=folder / "c.safetensors", log=folder / "log.csv", **LONG)
    for record in train(tiny(width=4, activation="silu"), IMAGES, run):
        update = record.step + 1

for i, kill in enumerate(KILLS):  # each a process of its own
    if not (child := os.fork()):
        die_at(*kill)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    with (folder / "log.csv").open("a") as file:
        file.write("99,0.1")  # killed within a row
    shutil.copytree(folder, folder.parent / str(i))
"""


def test_a_killed_run_resumes_to_the_bit(tmp_path):
    """SIGKILL half way through the resume file, between the two files, after them, and half way through the last model.

    θ, Adam, mean θ, and every record but its seconds then equal those of the run never stopped; the log holds each
    update once. While this process trains, another is refused its files; a killed one leaves no lock.
    """
    calm, folder = tiny(width=4, activation="silu"), tmp_path / "run"
    expected = timeless(train(calm, IMAGES, TrainConfig(checkpoint=tmp_path / "calm.safetensors", **LONG)))
    folder.mkdir()
    busy = train(tiny(), IMAGES, config(checkpoint=tmp_path / "busy.safetensors"))
    next(busy)
    train(tiny(), IMAGES, config(checkpoint=tmp_path / "busy.safetensors"))  # given up at once: busy keeps its lock

    (tmp_path / "child.py").write_text(CHILD.format(tests=str(Path(__file__).parent)))
    root = str(Path(__file__).parents[1])
    env = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "PYTHONPATH": root}
    command = [sys.executable, tmp_path / "child.py", folder, tmp_path / "busy.safetensors"]
    child = subprocess.run(command, env=env, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    assert f"another process is training to {tmp_path / 'busy.safetensors'}" in child.stdout
    for i, stored in enumerate([(4, 4), (8, 4), (12, 12), (14, 12)]):
        copy = tmp_path / str(i)
        step = ShortRun.load(copy / "c.safetensors").training["last"]["step"]
        assert (torch.load(copy / "c.resume.pt")["step"], step) == stored
        assert [r.step for r in read_log(copy / "log.csv")] == [*range(1, KILLS[i][2] + 1)]

    between = tmp_path / "1/c.safetensors"  # the model file is written again at once
    train(tiny(width=4, activation="silu"), IMAGES, TrainConfig(checkpoint=between, **LONG))
    assert ShortRun.load(between).training["last"]["step"] == 8
    resumed, run = tiny(width=4, activation="silu"), TrainConfig(checkpoint=folder / "c.safetensors", **LONG)
    assert list(train(resumed, IMAGES, run)) == [] and same(weights(resumed), weights(calm))
    assert timeless(read_log(folder / "log.csv")) == expected
    paths = [folder / "c.safetensors", tmp_path / "calm.safetensors"]
    assert same(*[weights(ShortRun.load(path)) for path in paths])
    one, other = (torch.load(path.with_suffix(".resume.pt")) for path in paths)
    assert one["adam"]["state"] and one["step"] == other["step"] and one["ratios"] == other["ratios"]
    parts = [[s["f"], s["mean"], *s["adam"]["state"].values()] for s in (one, other)]
    for a, b in zip(*parts, strict=True):
        assert same(list(a.values()), list(b.values()))


def test_a_finished_run_is_resumed_prolonged_and_started_anew(tmp_path):
    c = config(updates=3, average=0.9, checkpoint=tmp_path / "c.safetensors", log=tmp_path / "new" / "log.csv")
    calm, done, again = tiny(), tiny(), tiny()
    expected = list(train(calm, IMAGES, config(updates=6, average=0.9)))
    records = list(train(done, IMAGES, c))
    assert read_log(c.log) == records and list(train(again, IMAGES, c)) == []
    stored = ShortRun.load(c.checkpoint)
    assert same(weights(again), weights(done)) and torch.equal(stored.sample(3, 0), done.sample(3, 0))
    assert again.training == done.training == stored.training
    assert stored.training["last"] == asdict(records[-1]) and stored.training["config"]["rate"] == c.rate
    rest = list(train(again, IMAGES, replace(c, updates=6)))
    assert timeless(records + rest) == timeless(expected) and same(weights(again), weights(calm))
    assert rest[0].seconds > records[-1].seconds > 0
    assert len(list(train(tiny(), IMAGES, replace(c, rate=5e-4), resume=False))) == 3 == len(read_log(c.log))


def test_only_a_runs_own_files_become_its_previous(tmp_path):
    """Going back to the files of another run would be going back to that run."""
    file, older = tmp_path / "c.safetensors", tmp_path / "c.previous.safetensors"
    list(train(tiny(), IMAGES, config(updates=3, checkpoint=file, checkpoint_every=1)))
    assert ShortRun.load(older).training["last"]["step"] == 2
    diverging = config(updates=400, rate=0.3, checkpoint=file)  # before its first own checkpoint
    with pytest.raises(FloatingPointError, match=r"start anew\.$"):
        list(train(tiny(width=8), IMAGES, diverging, resume=False))
    run = train(tiny(), IMAGES, config(checkpoint=file, checkpoint_every=1, seed=1), resume=False)
    assert next(run) and ShortRun.load(file).training["config"]["seed"] == 1 and not older.exists()
    assert next(run) and ShortRun.load(older).training["config"]["seed"] == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [(dict(rate=2e-3), "rate=0.001 where it is 0.002 now"), (dict(updates=1), "2 updates, more than the 1"),
     (dict(updates=4), "horizon=2 .* where it is 4 now"), (dict(model=tiny(steps=4)), "kernel="),
     (dict(model=tiny(width=3)), "network="), (dict(model=replace(tiny(), dataset="other")), "dataset=''")],
)  # fmt: skip
def test_resuming_with_other_settings_is_refused_at_the_call(tmp_path, change, message):
    c, other = config(updates=2, sigma_final=0.0, checkpoint=tmp_path / "c.safetensors"), change.pop("model", tiny())
    list(train(tiny(), IMAGES, c))
    before, start = c.checkpoint.read_bytes(), weights(other)
    with pytest.raises(ValueError, match=f"c.resume.pt was made with {message}.*resume=False"):
        train(other, IMAGES, replace(c, **change))
    assert same(weights(other), start) and c.checkpoint.read_bytes() == before
    assert [r.step for r in train(tiny(), IMAGES, replace(c, updates=3, horizon=2, checkpoint_every=7))] == [3]


DAMAGE = {
    "cut off": len,
    "a tensor of another shape": lambda s: s["mean"].update({"layers.2.bias": torch.zeros(1)}),
    "Adam of another shape": lambda s: s["adam"]["state"][1].update(exp_avg=torch.zeros(1)),
    "no settings": lambda s: s.update(settings=None),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_resume_file_is_refused_by_name(tmp_path, damage):
    c = config(average=0.5, checkpoint_every=3, checkpoint=tmp_path / "c.safetensors")
    list(train(tiny(), IMAGES, c))
    file, older = tmp_path / "c.resume.pt", tmp_path / "c.previous.resume.pt"
    content = torch.load(file)
    DAMAGE[damage](content)
    torch.save(content, file)
    os.truncate(file, file.stat().st_size - (100 if damage == "cut off" else 0))
    with pytest.raises(ValueError, match=f"(?s){file} is damaged .*: rename {older} to c.resume.pt"):
        train(tiny(), IMAGES, c)
    older.rename(file)  # and the remedy works
    assert [r.step for r in train(tiny(), IMAGES, c)] == [4, 5, 6]


@pytest.mark.parametrize(
    ("checkpoint", "log", "message"),
    [("c.pt", None, "c.pt is not a .safetensors file"),
     ("c.safetensors", "other.csv", "other.csv is not a .csv file that train may write to"),
     ("m.safetensors", None, "m.safetensors is a model without m.resume.pt.*or delete it to start anew")],
)  # fmt: skip
def test_files_that_train_may_not_write_to_are_refused_at_the_call(tmp_path, checkpoint, log, message):
    (tmp_path / "other.csv").write_bytes("größe,1\n".encode("latin-1"))
    tiny().save(tmp_path / "m.safetensors")
    before = {p: p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=message):
        train(tiny(), IMAGES, config(checkpoint=tmp_path / checkpoint, log=log and tmp_path / log))
    assert {p: p.read_bytes() for p in tmp_path.iterdir() if p.suffix != ".lock"} == before


@pytest.mark.skipif(sys.platform != "linux", reason="/dev/full, a disk that is always full, is Linux's")
def test_a_full_disk_stops_the_run_and_names_the_file(tmp_path):
    import resource

    (tmp_path / "log.csv").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"the log .* could not be written \(.*No space left.*free disk space"):
        next(train(tiny(), IMAGES, config(log=tmp_path / "log.csv")))

    c, limits = config(checkpoint=tmp_path / "c.safetensors"), resource.getrlimit(resource.RLIMIT_FSIZE)
    for work, file, rest in [
        (lambda: list(train(tiny(), IMAGES, c)), "c.resume.pt", "there is no older one"),
        (lambda: tiny(width=8).save(c.checkpoint), "c.safetensors", "the last good one stands"),
    ]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000, limits[1]))
        try:
            with pytest.raises(OSError, match=rf"{tmp_path}/{file} could not be written .*; {rest}: free disk space"):
                work()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert not list(tmp_path.glob("*.part"))
        assert (len(list(train(tiny(), IMAGES, c))) == 6) == (file == "c.resume.pt")  # and then it goes on
    assert ShortRun.load(c.checkpoint).training["last"]["step"] == 6
