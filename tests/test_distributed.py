"""Several ranks make the update of one; sub-batches, precision and layout; the memory estimate; the alarm."""

import json
import os
import shutil
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_training import IMAGES, config, same, timeless, tiny, weights
from torch import nn

from srmcmc_lib import EnergyNet, Langevin, ShortRun, TrainConfig, train
from srmcmc_lib.checkpoint import read
from srmcmc_lib.devices import arithmetic, memory, share
from srmcmc_lib.records import read_log
from srmcmc_lib.resuming import State
from srmcmc_lib.training import gradients, update

TOLERANCE = dict(rtol=0, atol=0.01 * 1e-3)  # 1 % of what Adam's first updates move a weight by

RANKS = """
import json, sys
sys.path.insert(0, {tests!r})
import torch
from srmcmc_lib.devices import ranks
from test_training import IMAGES, config, timeless, tiny, train
torch.set_num_threads(1)
rank = ranks().process_index
settings, folder = json.loads(sys.argv[1]), sys.argv[2]
model = tiny(width=4)
if rank == 1:  # a θ of its own, which rank 0's replaces
    torch.nn.init.zeros_(model.f.layers[0].weight)
files = dict(checkpoint=f"{{folder}}/c.safetensors", log=f"{{folder}}/log.csv")
try:
    records = timeless(train(model, IMAGES, config(**settings, **files)))
except FloatingPointError as error:
    records = str(error)
assert torch.distributed.get_world_size() == 2
torch.save((records, model.f.state_dict()), f"{{folder}}/rank{{rank}}.pt")
torch.distributed.destroy_process_group()
"""


def two_ranks(folder: Path, **settings) -> list[tuple[list[dict] | str, dict]]:
    """The records (or the message of the alarm) and weights of two gloo processes that learn together, in the
    surroundings of `accelerate launch`."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    (folder / "child.py").write_text(RANKS.format(tests=str(Path(__file__).parent)))
    env = os.environ | {
        "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1]), "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true",
    }  # fmt: skip
    command = [sys.executable, folder / "child.py", json.dumps(settings), folder]
    logs = [folder / "0.txt", folder / "1.txt"]
    ranks = []
    for r, log in enumerate(logs):
        with log.open("w") as file:
            ranks.append(subprocess.Popen(command, env=env | {"RANK": str(r), "LOCAL_RANK": str(r)}, stderr=file))
    try:
        codes = [rank.wait(timeout=300) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert codes == [0, 0], "\n".join(log.read_text()[-2000:] for log in logs)
    return [torch.load(folder / f"rank{rank}.pt") for rank in (0, 1)]


def alone(**settings):
    model = tiny(width=4)
    return timeless(train(model, IMAGES, config(**settings))), model.f.state_dict()


def apart(a: dict, b: dict) -> float:
    return max((a[k] - b[k]).abs().max().item() for k in a)


def test_two_ranks_make_the_updates_of_one(tmp_path):
    """Weights and records after 4 updates of uneven shares (2 and 3 of 5), then one process goes on from there."""
    settings = dict(updates=4, batch_size=5, checkpoint_every=2, average=0.5, sub_batch=2)
    (records, θ), (other_records, other_θ) = two_ranks(tmp_path, **settings)
    one_records, one_θ = alone(**settings)
    assert other_records == records and apart(θ, other_θ) == 0
    assert apart(θ, one_θ) <= TOLERANCE["atol"]
    for ours, one in zip(records, one_records, strict=True):
        assert ours == pytest.approx(one, rel=1e-4, abs=1e-5)
    assert timeless(read_log(tmp_path / "log.csv")) == records  # each row once: one rank writes

    c = config(**settings | dict(updates=6), checkpoint=str(tmp_path / "c.safetensors"))
    model = tiny(width=4)
    assert [r.step for r in train(model, IMAGES, c)] == [5, 6]
    assert apart(model.f.state_dict(), alone(**settings | dict(updates=6))[1]) <= TOLERANCE["atol"]

    # the comparison would notice: a rank's share taken for the whole, or other noise
    for wrong in (dict(batch_size=2), dict(seed=1), dict(sigma=0.06)):
        assert apart(θ, alone(**settings | wrong)[1]) > 10 * TOLERANCE["atol"], wrong


def test_every_rank_that_stops_at_the_alarm_names_the_older_checkpoint(tmp_path):
    (said, _), (other_said, _) = two_ranks(tmp_path, updates=400, rate=0.3, checkpoint_every=1)
    assert other_said == said and "about to diverge at update" in said and "c.previous.safetensors" in said


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_the_shares_make_up_the_batch(monkeypatch, size):
    ranks = [SimpleNamespace(process_index=r, num_processes=size) for r in range(size)]
    parts = []
    for rank in ranks:
        monkeypatch.setattr("srmcmc_lib.devices.ranks", lambda rank=rank: rank)
        parts.append(list(range(5))[share(5)])
    assert [i for part in parts for i in part] == list(range(5)) and min(map(len, parts)) >= 5 // size


def test_a_batch_smaller_than_the_ranks_is_refused(monkeypatch):
    monkeypatch.setattr("srmcmc_lib.training.ranks", lambda: SimpleNamespace(num_processes=5))
    with pytest.raises(ValueError, match="batch_size=4 leaves some of 5 ranks idle"):
        train(tiny(), IMAGES, config())


# ---------------------------------------------------------------------------------------------------- sub-batches


class Small(EnergyNet):
    """Memory for `holds` images at most; counts the calls that do not fit."""

    holds, failures = 6, 0

    def forward(self, x):
        if len(x) > self.holds:
            self.failures += 1
            raise torch.OutOfMemoryError("planted")
        return super().forward(x)


def after_one_gradient(n: int, m: int = 5) -> tuple[list[torch.Tensor], torch.Tensor, list[torch.Tensor]]:
    model = tiny(width=4)
    state = State(model, config(batch_size=m), IMAGES)
    seen = gradients(state, model.f, IMAGES, 0.05, n)
    return [p.grad for p in model.f.parameters()], seen, [g.get_state() for g in state.generators.values()]


@pytest.mark.parametrize("n", [1, 2, 4, 7])
def test_sub_batches_make_the_same_gradient(n):
    """Within float rounding; the generators end where they would have; a batch of another size would be noticed."""
    (whole, seen, states), (parts, seen_in_parts, states_in_parts) = after_one_gradient(5), after_one_gradient(n)
    torch.testing.assert_close(seen_in_parts, seen, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-6)
    assert same(states_in_parts, states)
    assert not torch.allclose(after_one_gradient(5, m=4)[0][0], whole[0], rtol=0.01, atol=1e-4)


def test_a_batch_too_large_for_memory_is_split_and_not_crashed():
    """16 images at the one pass over x⁺ and x⁻; 6 fit: halved twice, at the first update only."""
    torch.manual_seed(5)
    small = ShortRun(Small(1, 8, width=4), Langevin(3, 1.0, 0.05))
    whole, c = tiny(width=4), config(batch_size=8, updates=3)
    with pytest.warns(UserWarning, match="out of memory: [42] images at once from now on"):
        records = timeless(train(small, IMAGES, c))
    assert small.f.failures == 2
    for ours, one in zip(records, timeless(train(whole, IMAGES, c)), strict=True):
        assert ours == pytest.approx(one, rel=1e-4, abs=1e-5)
    torch.testing.assert_close(weights(small), weights(whole), **TOLERANCE)


def test_one_image_that_does_not_fit_is_an_error(monkeypatch):
    monkeypatch.setattr(Small, "holds", 1)
    with pytest.raises(torch.OutOfMemoryError), pytest.warns(UserWarning, match="out of memory"):
        list(train(ShortRun(Small(1, 8, width=4), Langevin(3)), IMAGES, config()))


# ------------------------------------------------------------------------------------------------- memory estimate


def peak_bytes(work) -> int:
    """The most that CPU tensors held at once while work() ran, beyond what was there before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as p:
        work()
    changes = [e for e in p.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for e in sorted(changes, key=lambda e: e.start_ns()):
        held += e.nbytes()
        peak = max(peak, held)
    return peak


@pytest.mark.parametrize(("size", "width", "m"), [(32, 8, 8), (16, 32, 16), (28, 16, 4), (64, 8, 4)])
def test_the_memory_estimate_is_what_learning_takes(size, width, m):
    """Within 15 % of the peak of CPU allocations, from the making of the model to the second update."""

    def learn():
        model = ShortRun(EnergyNet(3, size, width=width), Langevin(2))
        images = torch.zeros(m, 3, size, size, dtype=torch.uint8)
        state = State(model, config(batch_size=m, average=0.9), images)
        for _ in range(2):
            update(state, model.f, images, 0.1, 1e-3, m)

    assert memory(EnergyNet(3, size, width=width), (3, size, size), m) == pytest.approx(peak_bytes(learn), rel=0.15)


def test_the_estimate_needs_no_memory_itself_and_leaves_f_alone():
    f = EnergyNet(3, 32, width=16)
    assert peak_bytes(lambda: memory(f, (3, 32, 32), 10_000)) < 3 * sum(4 * p.numel() for p in f.parameters())
    assert {p.device.type for p in f.parameters()} == {"cpu"} and all(p.requires_grad for p in f.parameters())


# ------------------------------------------------------------------------------------------- precision and layout


@pytest.mark.parametrize("change", [dict(precision="bf16"), dict(channels_last=False)], ids=str)
def test_f_alone_changes_its_precision_or_layout(change):
    """The chain's states and gradients stay float32; records stay near those of float32, weights too."""
    seen = []

    class Watched(EnergyNet):
        def forward(self, x):
            y = self.layers[0](x)
            seen.append((x.dtype, y.dtype, x.requires_grad))
            return super().forward(x)

    torch.manual_seed(5)
    model = ShortRun(Watched(1, 8, width=4), Langevin(3, 1.0, 0.05))
    plain, c = tiny(width=4), config(updates=2)
    records = timeless(train(model, IMAGES, replace(c, **change)))
    half = torch.bfloat16 if "precision" in change else torch.float32
    assert {s[:2] for s in seen} == {(torch.float32, half)}
    assert {p.dtype for p in model.f.parameters()} == {torch.float32}
    expected = timeless(train(plain, IMAGES, c))
    for ours, one in zip(records, expected, strict=True):
        assert ours == pytest.approx(one, rel=0.02, abs=2e-3)
    assert (records == expected) == ("precision" not in change) or "channels_last" in change
    is_last = model.f.layers[2].weight.is_contiguous(memory_format=torch.channels_last)
    assert is_last == change.get("channels_last", True)


def test_torch_compile_is_asked_to_compile_f(monkeypatch):
    calls = []
    monkeypatch.setattr(torch, "compile", lambda f, **options: calls.append(options) or nn.Sequential(f))
    plain, compiled = tiny(), tiny()
    expected = timeless(train(plain, IMAGES, config()))
    assert timeless(train(compiled, IMAGES, config(compile=True))) == expected and len(calls) == 1
    assert same(weights(plain), weights(compiled))


COMPILED = dict(updates=2, batch_size=5, sub_batch=3)  # a part of 3 images and one of 2: two shapes


def compiled_is_uncompiled(**settings) -> None:
    """The same records and weights as without compiling, within float32 rounding."""
    plain, compiled = tiny(width=4), tiny(width=4)
    expected = timeless(train(plain, IMAGES, config(**settings)))
    for ours, one in zip(timeless(train(compiled, IMAGES, config(**settings, compile=True))), expected, strict=True):
        assert ours == pytest.approx(one, rel=1e-4, abs=1e-5)
    assert apart(plain.f.state_dict(), compiled.f.state_dict()) <= TOLERANCE["atol"]


@pytest.fixture
def fresh_dynamo(monkeypatch):
    torch._dynamo.reset()
    yield monkeypatch
    torch._dynamo.reset()


def test_f_is_traced_without_a_graph_break_and_learns_the_same(fresh_dynamo):
    """torch.compile's own tracing and differentiation, whose graphs then run as they are: no compiler is needed."""
    graphs, compile = [], torch.compile

    def traced(f, **options):
        backend = torch._dynamo.lookup_backend("aot_eager")
        return compile(
            f, backend=lambda g, x: graphs.append(tuple(x[0].shape)) or backend(g, x), fullgraph=True, **options
        )

    fresh_dynamo.setattr(torch, "compile", traced)
    compiled_is_uncompiled(**COMPILED)
    assert 2 <= len(graphs) <= 8, "one graph for each shape and use, not one for each step"


@pytest.mark.skipif(not shutil.which("c++") and not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
def test_f_compiled_by_a_real_compiler_learns_the_same(fresh_dynamo, tmp_path):
    fresh_dynamo.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    fresh_dynamo.setattr("torch._inductor.config.compile_threads", 1)  # no pool of worker processes
    compiled_is_uncompiled(updates=1)
    assert list(tmp_path.rglob("*.so")), "nothing was compiled"


@pytest.mark.parametrize(("precision", "tf32"), [("float32", False), ("tf32", True), ("bf16", True)])
def test_tf32_is_allowed_inside_an_update_only(precision, tf32):
    def flags():
        return torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32

    before = flags()
    with pytest.raises(RuntimeError, match="planted"), arithmetic(precision, torch.device("cuda")):
        assert flags() == (tf32, tf32)
        raise RuntimeError("planted")
    assert flags() == before


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (dict(precision="fp16"), "precision='fp16' is unknown; choose one of float32, tf32, bf16"),
        (dict(sub_batch=0), "sub_batch must be an integer of at least 1"),
        (dict(sub_batch=2.0), "sub_batch must be"),
        (dict(updates=np.int64(3)), "updates must be"),  # JSON, and so a checkpoint, would not take it
        (dict(alarm=1.0), "alarm must be None or a number above 1"),
        (dict(alarm=float("nan")), "alarm must be"),
    ],
    ids=str,
)
def test_bad_settings_are_refused(bad, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**bad)


def test_a_run_may_move_to_other_sub_batches_but_not_to_another_precision(tmp_path):
    c = config(updates=2, checkpoint=str(tmp_path / "c.safetensors"))
    list(train(tiny(), IMAGES, c))
    moved = replace(c, updates=3, sub_batch=1, channels_last=False, alarm=None)
    assert [r.step for r in train(tiny(), IMAGES, moved)] == [3]
    with pytest.raises(ValueError, match="trained with precision='float32', here it is 'bf16'"):
        train(tiny(), IMAGES, replace(c, precision="bf16"))
    meta, _ = read(Path(c.checkpoint))
    assert meta["training"]["config"]["precision"] == "float32"
