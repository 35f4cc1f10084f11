"""Algorithm 1: one update by hand, interruption to the bit, schedules, divergence, logs, and that learning works."""

import csv
import math
import os
import signal
import subprocess
import sys
import time
from collections import deque
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Generator

from srmcmc_lib import EnergyNet, Gaussian, Langevin, ShortRun, TrainConfig, Uniform, observed, train
from srmcmc_lib.data import to_float
from srmcmc_lib.energy import scale
from srmcmc_lib.recipes import grow, learning_curves
from srmcmc_lib.records import read_log
from srmcmc_lib.training import WATCHED, check

IMAGES = torch.randint(0, 256, (20, 1, 8, 8), generator=Generator().manual_seed(0), dtype=torch.uint8)


def tiny(steps=3, width=2, **network) -> ShortRun:
    torch.manual_seed(5)
    return ShortRun(EnergyNet(1, 8, width=width, **network), Langevin(steps, 1.0, 0.05))


def config(**settings) -> TrainConfig:
    return TrainConfig(**(dict(updates=6, batch_size=4, rate=1e-3, sigma=0.05, progress=False) | settings))


def weights(model: ShortRun) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.f.parameters()]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def timeless(records) -> list[dict]:
    return [{k: v for k, v in asdict(r).items() if k != "seconds"} for r in records]


# ------------------------------------------------------------------------------------------- one update by hand


def updates_by_hand(model: ShortRun, images: torch.Tensor, c: TrainConfig, average: float = 0.0):
    """Algorithm 1 written out a second time: own chain loop, eq. (6), Adam's published formula; no torch.optim."""
    data, sigma, z, u = (Generator().manual_seed(4 * c.seed + i) for i in range(4))
    θ = list(model.f.parameters())
    M, V = [torch.zeros_like(p) for p in θ], [torch.zeros_like(p) for p in θ]
    (β1, β2), s, ε = c.betas, model.kernel.step_size, model.kernel.noise
    mean_θ = weights(model)
    for t in range(1, c.updates + 1):
        which = torch.randint(len(images), (c.batch_size,), generator=data)
        x_plus = images[which].float() / 127.5 - 1
        x_plus = x_plus + c.sigma * torch.randn(x_plus.shape, generator=sigma)
        x_minus, norms = 2 * torch.rand(x_plus.shape, generator=z) - 1, []
        for _ in range(model.kernel.steps):
            x_minus.requires_grad_()
            (df_dx,) = torch.autograd.grad(model.f(x_minus).sum(), x_minus)
            norms += [df_dx[i].square().sum().sqrt().item() for i in range(c.batch_size)]
            x_minus = x_minus.detach() + s * df_dx + ε * torch.randn(x_plus.shape, generator=u)
        d = model.f(x_plus).mean() - model.f(x_minus).mean()
        g = [-g for g in torch.autograd.grad(d, θ)]  # Adam goes down, eq. (6) goes up
        with torch.no_grad():
            for p, grad, m, v in zip(θ, g, M, V, strict=True):
                m.mul_(β1).add_((1 - β1) * grad)
                v.mul_(β2).add_((1 - β2) * grad**2)
                p -= c.rate * (m / (1 - β1**t)) / ((v / (1 - β2**t)).sqrt() + 1e-8)
            decay = min(average, (1 + t) / (10 + t))
            mean_θ = [decay * a + (1 - decay) * p for a, p in zip(mean_θ, θ, strict=True)]
        yield t, d.item(), sum(norms) / len(norms), mean_θ


@pytest.mark.parametrize("activation", ["leaky_relu", "silu"])
@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.5, 0.9)], ids=str)
def test_updates_equal_those_written_out_by_hand(activation, betas):
    """Weights, d and the gradient norm after every update, within float32 rounding (1 % of one Adam step)."""
    c = config(updates=5, betas=betas, seed=9)
    ours, theirs = tiny(activation=activation), tiny(activation=activation)
    start = weights(ours)
    for record, (t, d, norm, _) in zip(train(ours, IMAGES, c), updates_by_hand(theirs, IMAGES, c), strict=True):
        assert record.step == t
        assert (record.d, record.grad_norm) == pytest.approx((d, norm), rel=1e-4, abs=1e-5)
        torch.testing.assert_close(weights(ours), weights(theirs), rtol=0, atol=0.01 * c.rate)
    moved = max((a - b).abs().max().item() for a, b in zip(start, weights(ours), strict=True))
    assert moved > 2 * c.rate


def test_the_average_of_the_weights_is_left_at_the_end():
    c, ours, theirs = config(average=0.7), tiny(), tiny()
    for _ in train(ours, IMAGES, c):
        pass
    *_, (_, _, _, mean_θ) = updates_by_hand(theirs, IMAGES, c, average=0.7)
    torch.testing.assert_close(weights(ours), mean_θ, rtol=0, atol=0.01 * c.rate)
    apart = max((a - b).abs().max().item() for a, b in zip(weights(theirs), mean_θ, strict=True))
    assert apart > 0.3 * c.rate  # θ itself would have failed


def test_the_seed_decides_and_the_global_seed_does_not():
    def run(seed, global_seed):
        model = tiny()
        torch.manual_seed(global_seed)
        return timeless(train(model, IMAGES, config(seed=seed))), weights(model)

    (a, θa), (b, θb), (c, θc) = run(0, 0), run(0, 1), run(1, 0)
    assert a == b and same(θa, θb)
    assert a != c and not same(θa, θc)


def test_the_models_prior_starts_the_chains():
    model = replace(tiny(), prior=Gaussian(3.0))
    other = tiny()
    d = [next(train(m, IMAGES, config(updates=1))).d for m in (model, other)]
    assert abs(d[0] - d[1]) > 1e-3


def test_a_consumer_may_stop_early_and_frozen_parameters_stay():
    model = tiny()
    first, *rest = model.f.parameters()
    first.requires_grad_(False)
    start = weights(model)
    for record in train(model, IMAGES, config(updates=1_000_000)):
        assert [p.requires_grad for p in model.f.parameters()] == [False] + [True] * len(rest)
        if record.step == 2:
            break
    unmoved = [torch.equal(a, b) for a, b in zip(start, weights(model), strict=True)]
    assert unmoved == [True, *[False] * (len(rest) - 1), True]  # the last bias cancels in f(x⁺) − f(x⁻)


# ---------------------------------------------------------------------------------------- interruption and resume

LONG = dict(updates=14, batch_size=4, checkpoint_every=4, average=0.9, rate=2e-3, rate_final=1e-4, sigma=0.1,
            sigma_final=0.03, lower_from=0.25, seed=3, progress=False)  # fmt: skip

CHILD = """
import os, signal, sys
from pathlib import Path
import torch
sys.path.insert(0, {tests!r})
from test_training import IMAGES, LONG, interrupted_model, train, TrainConfig
torch.set_num_threads(1)
die = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
where, folder = sys.argv[1:]
replace = Path.replace
def replace_and_die(self, target):
    if target.name != "c.safetensors" or update < 8:
        return replace(self, target)
    if where == "after the rename":
        replace(self, target)
    die()
Path.replace, update = replace_and_die, 0
config = TrainConfig(checkpoint=f"{{folder}}/c.safetensors", log=f"{{folder}}/log.csv", **LONG)
for record in train(interrupted_model(), IMAGES, config):
    update = record.step + 1
"""


def interrupted_model() -> ShortRun:
    return tiny(width=4, activation="silu")


def test_a_killed_run_resumes_to_the_bit(tmp_path):
    """SIGKILL twice: before checkpoint 8 replaces checkpoint 4, then, resumed, just after it has.

    Weights (the running average), the raw state in the checkpoint, and every record but its seconds then equal
    those of the run never stopped, and the CSV log holds each update once.
    """
    calm = interrupted_model()
    expected = timeless(train(calm, IMAGES, TrainConfig(checkpoint=str(tmp_path / "calm.safetensors"), **LONG)))

    (tmp_path / "child.py").write_text(CHILD.format(tests=str(Path(__file__).parent)))
    path, log = tmp_path / "c.safetensors", tmp_path / "log.csv"
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    for where, stored in [("before the rename", 4), ("after the rename", 8)]:
        child = subprocess.run(
            [sys.executable, tmp_path / "child.py", where, tmp_path], env=env, capture_output=True, text=True
        )
        assert child.returncode == -signal.SIGKILL, child.stderr
        assert ShortRun.load(path).training["last"]["step"] == stored, where
        assert [r.step for r in read_log(log)] == [*range(1, 9)], where

    resumed = interrupted_model()
    rest = timeless(train(resumed, IMAGES, TrainConfig(checkpoint=str(path), log=str(log), **LONG)))
    assert rest == expected[8:]
    assert same(weights(resumed), weights(calm))
    assert timeless(read_log(log)) == expected
    assert_same_state(path, tmp_path / "calm.safetensors")


def assert_same_state(a: Path, b: Path) -> None:
    from srmcmc_lib.checkpoint import read

    (_, ta), (_, tb) = read(a), read(b)
    assert ta.keys() == tb.keys() and any(k.startswith("adam.") for k in ta)
    assert [k for k in ta if not torch.equal(ta[k], tb[k])] == []


@pytest.mark.parametrize("stop", [1, 4, 7])
@pytest.mark.parametrize(
    "settings",
    [{}, dict(average=0.8), dict(rate_final=1e-5, sigma_final=0.0, lower_from=0.0, betas=(0.5, 0.99))],
    ids=["constant", "averaged", "lowered"],
)
def test_a_stopped_run_equals_the_run_never_stopped(tmp_path, stop, settings):
    """In one process, stopped by the consumer after every possible place relative to a checkpoint (every 2)."""
    c = config(updates=8, checkpoint_every=2, checkpoint=str(tmp_path / "a.safetensors"), **settings)
    calm, first, second = (tiny(width=8) for _ in range(3))
    expected = timeless(train(calm, IMAGES, c))
    c2 = replace(c, checkpoint=str(tmp_path / "b.safetensors"))
    for record in train(first, IMAGES, c2):
        if record.step == stop:
            break
    assert timeless(train(second, IMAGES, c2)) == expected[stop - stop % 2 :]
    assert same(weights(second), weights(calm))
    assert_same_state(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    assert not same(weights(calm), weights(tiny(width=8)))


@pytest.mark.parametrize("average", [0.0, 0.9])
def test_resuming_a_finished_run_gives_the_finished_model(tmp_path, average):
    c = config(average=average, checkpoint=str(tmp_path / "c.safetensors"))
    done, again = tiny(), tiny()
    list(train(done, IMAGES, c))
    assert list(train(again, IMAGES, c)) == []
    assert same(weights(again), weights(done))
    assert same(weights(ShortRun.load(c.checkpoint)), weights(done))
    assert again.training == done.training


@pytest.mark.parametrize("average", [0.0, 0.9])
def test_a_finished_run_can_be_prolonged(tmp_path, average):
    c = config(updates=3, average=average, checkpoint=str(tmp_path / "c.safetensors"))
    calm, first, second = tiny(), tiny(), tiny()
    expected = timeless(train(calm, IMAGES, replace(c, updates=7, checkpoint=None)))
    list(train(first, IMAGES, c))
    assert timeless(train(second, IMAGES, replace(c, updates=7))) == expected[3:]
    assert same(weights(second), weights(calm))


def test_seconds_go_on_counting_after_a_resume(tmp_path):
    c = config(checkpoint=str(tmp_path / "c.safetensors"), updates=3)
    before = [r.seconds for r in train(tiny(), IMAGES, c)]
    after = [r.seconds for r in train(tiny(), IMAGES, replace(c, updates=5))]
    seconds = before + after
    assert seconds == sorted(seconds) and seconds[0] > 0


def test_resume_false_starts_anew(tmp_path):
    c = config(checkpoint=str(tmp_path / "c.safetensors"), log=str(tmp_path / "log.csv"))
    expected = timeless(train(tiny(), IMAGES, c))
    assert timeless(train(tiny(), IMAGES, c, resume=False)) == expected
    assert timeless(read_log(c.log)) == expected
    other = replace(c, rate=5e-4)
    assert len(list(train(tiny(), IMAGES, other, resume=False))) == 6  # other settings are no matter then
    assert ShortRun.load(c.checkpoint).training["config"]["rate"] == 5e-4


@pytest.mark.parametrize(
    "change",
    [dict(rate=2e-3), dict(batch_size=5), dict(sigma=0.1), dict(sigma_final=0.01), dict(rate_final=1e-5),
     dict(seed=1), dict(betas=(0.8, 0.999)), dict(average=0.5), dict(lower_from=0.5)],
    ids=str,
)  # fmt: skip
def test_resuming_with_other_settings_is_refused(tmp_path, change):
    c = config(updates=2, checkpoint=str(tmp_path / "c.safetensors"))
    list(train(tiny(), IMAGES, c))
    before, model = Path(c.checkpoint).read_bytes(), tiny()
    (name,) = change
    with pytest.raises(ValueError, match=f"trained with {name}=.*pass resume=False"):
        train(model, IMAGES, replace(c, **change))  # at the call
    assert same(weights(model), weights(tiny()))
    assert Path(c.checkpoint).read_bytes() == before
    harmless = replace(c, updates=3, checkpoint_every=7, log=str(tmp_path / "log.csv"))
    assert [r.step for r in train(tiny(), IMAGES, harmless)] == [3]


@pytest.mark.parametrize(
    ("other", "name"),
    [(tiny(steps=4), "kernel"), (tiny(width=3), "network"), (tiny(activation="silu"), "network"),
     (replace(tiny(), prior=Gaussian()), "prior"), (replace(tiny(), prior=Uniform(0, 1)), "prior")],
)  # fmt: skip
def test_resuming_with_another_model_is_refused(tmp_path, other, name):
    c = config(updates=2, checkpoint=str(tmp_path / "c.safetensors"))
    list(train(tiny(), IMAGES, c))
    with pytest.raises(ValueError, match=f"c.safetensors holds a model with {name}"):
        train(other, IMAGES, c)


@pytest.mark.parametrize("trained", [False, True])
def test_a_checkpoint_without_the_trainers_state_is_refused(tmp_path, trained):
    model = tiny()
    if trained:
        list(train(model, IMAGES, config()))
    path = model.save(tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match="a model without a trainer's state; load it with ShortRun"):
        train(tiny(), IMAGES, config(checkpoint=str(path)))


def test_a_damaged_checkpoint_is_refused_by_name(tmp_path):
    c = config(checkpoint=str(tmp_path / "c.safetensors"))
    list(train(tiny(), IMAGES, c))
    Path(c.checkpoint).write_bytes(Path(c.checkpoint).read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"c\.safetensors is damaged.*pass resume=False"):
        train(tiny(), IMAGES, c)


class Plain(torch.nn.Module):
    """A custom f without a `config`."""

    channels, image_size = 1, 8

    def __init__(self):
        super().__init__()
        self.w = torch.nn.Linear(64, 1)

    def forward(self, x):
        return self.w(x.flatten(1))[:, 0]


def test_a_custom_f_trains_and_resumes(tmp_path):
    c = config(updates=2, checkpoint=str(tmp_path / "c.safetensors"))
    model = ShortRun(Plain(), Langevin(2, 0.1))
    list(train(model, IMAGES, c))
    again = ShortRun(Plain(), Langevin(2, 0.1))
    assert [r.step for r in train(again, IMAGES, replace(c, updates=4))] == [3, 4]


# ------------------------------------------------------------------------------------------------ the checkpoint


def test_a_checkpoint_samples_as_the_model_does_and_tells_its_training(tmp_path):
    c = config(checkpoint=str(tmp_path / "c.safetensors"), average=0.5)
    model = tiny()
    records = list(train(model, IMAGES, c))
    stored = ShortRun.load(c.checkpoint)
    assert torch.equal(stored.sample(3, 0), model.sample(3, 0))
    assert stored.training["last"] == asdict(records[-1])
    told = stored.training["config"]
    assert (told["rate"], told["sigma"], told["updates"], told["batch_size"]) == (c.rate, c.sigma, 6, 4)
    assert stored.training == model.training


def test_learning_never_sees_the_average(tmp_path):
    c = config(checkpoint=str(tmp_path / "c.safetensors"), checkpoint_every=1)
    plain = timeless(train(tiny(), IMAGES, replace(c, checkpoint=None)))
    assert timeless(train(tiny(), IMAGES, replace(c, average=0.9))) == plain


def test_checkpoints_are_written_every_so_many_updates_and_at_the_end(tmp_path):
    c = config(updates=5, checkpoint_every=2, checkpoint=str(tmp_path / "sub" / "c.safetensors"))
    seen = []
    for _ in train(tiny(), IMAGES, c):
        seen.append(ShortRun.load(c.checkpoint).training["last"]["step"] if Path(c.checkpoint).exists() else 0)
    assert seen == [0, 2, 2, 4, 5]


# ---------------------------------------------------------------------------------------------------- schedules


def test_rate_and_sigma_are_constant_by_default():
    assert (TrainConfig().rate_final, TrainConfig().sigma_final) == (None, None)
    records = list(train(tiny(), IMAGES, config()))
    assert {(r.rate, r.sigma) for r in records} == {(1e-3, 0.05)}


def test_a_run_that_stops_short_of_its_horizon_follows_the_longer_schedule():
    short, whole = TrainConfig(updates=40, horizon=100, lower_from=0.2), TrainConfig(updates=100, lower_from=0.2)
    rates = [[c.scheduled(0.3, 0.1, step) for step in range(40)] for c in (short, whole)]
    assert rates[0] == rates[1] and rates[0][-1] < 0.3
    assert rates[0] != [replace(short, horizon=None).scheduled(0.3, 0.1, step) for step in range(40)]


@pytest.mark.parametrize(("lower_from", "constant"), [(0.0, 1), (0.5, 51), (0.8, 81)])
def test_lowered_schedules_are_constant_then_fall_to_the_final_value(lower_from, constant):
    c = TrainConfig(updates=101, lower_from=lower_from)
    values = [c.scheduled(0.3, 0.1, step) for step in range(101)]
    assert values[: constant - 1] == pytest.approx([0.3] * (constant - 1), abs=1e-12)
    assert values == sorted(values, reverse=True)
    assert c.scheduled(0.3, 0.1, 101) == pytest.approx(0.1)
    assert values[-1] == pytest.approx(0.1, abs=2e-3)
    middle = c.scheduled(0.3, 0.1, 101 * (1 + lower_from) / 2)
    assert middle == pytest.approx(0.2)  # half a cosine is half way in the middle
    assert c.scheduled(0.3, None, 100) == 0.3
    assert replace(c, lower_from=1.0).scheduled(0.3, 0.1, 100) == 0.3


def test_lowered_values_reach_the_records_and_the_update():
    c = config(updates=8, rate=4e-3, rate_final=1e-5, sigma=0.2, sigma_final=0.01, lower_from=0.25)
    model = tiny()
    before, moved, records = weights(model), [], []
    for record in train(model, IMAGES, c):
        now = weights(model)
        moved.append(max((a - b).abs().max().item() for a, b in zip(before, now, strict=True)))
        before = now
        records.append(record)
    half_cosine = [(1 + math.cos(math.pi * max(0, (k / 8 - 0.25) / 0.75))) / 2 for k in range(8)]
    assert [r.rate for r in records] == pytest.approx([1e-5 + (4e-3 - 1e-5) * h for h in half_cosine])
    assert [r.sigma for r in records] == pytest.approx([0.01 + 0.19 * h for h in half_cosine])
    assert all(m <= 3 * r.rate for m, r in zip(moved, records, strict=True))  # Adam moves a weight by about its rate
    assert moved[-1] < moved[0] / 5


def test_sigma_is_the_noise_on_observed_images():
    """One update on constant images with f(x) = w·x: d's spread over seeds is σ ‖w‖ / √m plus the chains' own."""

    def spread(sigma):
        values = []
        for seed in range(40):
            torch.manual_seed(0)
            model = ShortRun(Plain(), Langevin(1, 1e-6, 0.0), Uniform(0, 1e-6))
            values.append(next(train(model, IMAGES[:1], config(sigma=sigma, seed=seed, updates=1))).d)
        torch.manual_seed(0)
        return torch.tensor(values).std().item(), Plain().w.weight.norm().item() / 2

    (wide, unit), (none, _) = spread(0.5), spread(0.0)
    assert wide == pytest.approx(0.5 * unit, rel=5 / math.sqrt(2 * 40))
    assert none < 1e-3 * wide


# ---------------------------------------------------------------------------------------------------- divergence


@pytest.mark.parametrize("steps", [3, 30])
def test_divergence_is_raised_and_the_last_checkpoint_stays(tmp_path, steps):
    """With 30 steps the chain itself overflows to NaN within the first bad update."""
    c = config(
        updates=400,
        rate=0.3,
        checkpoint_every=1,
        checkpoint=str(tmp_path / "c.safetensors"),
        log=str(tmp_path / "l.csv"),
    )
    model, steps_done, last = tiny(steps=steps, width=8), 0, b""
    with pytest.raises(FloatingPointError, match=r"diverged at update \d+.*a rate below 0\.3") as error:
        for record in train(model, IMAGES, c):
            steps_done, last = record.step, Path(c.checkpoint).read_bytes()
    assert steps_done >= 1 and f"at update {steps_done + 1}:" in str(error.value)
    assert Path(c.checkpoint).read_bytes() == last
    assert ("c.previous.safetensors" in str(error.value)) == (steps_done > 1)  # named only where it is
    good = ShortRun.load(c.checkpoint)
    assert good.training["last"]["step"] == steps_done
    assert all(p.isfinite().all() for p in good.f.parameters())
    if steps_done > 1:
        before = ShortRun.load(tmp_path / "c.previous.safetensors")
        assert before.training["last"]["step"] == steps_done - 1
    assert [r.step for r in read_log(c.log)] == [*range(1, steps_done + 1)]
    assert all(p.requires_grad for p in model.f.parameters())


def test_a_fresh_start_does_not_keep_a_strangers_checkpoint_as_its_own_previous(tmp_path):
    """Neither the older run's checkpoint nor its NAME.previous: going back there would be going back to that run."""
    file, older = tmp_path / "c.safetensors", tmp_path / "c.previous.safetensors"
    c = config(updates=3, checkpoint=str(file), checkpoint_every=1)
    list(train(tiny(), IMAGES, c))
    assert ShortRun.load(older).training["last"]["step"] == 2
    fresh = train(tiny(), IMAGES, replace(c, seed=1), resume=False)
    next(fresh)
    assert ShortRun.load(file).training["config"]["seed"] == 1 and not older.exists()
    next(fresh)
    fresh.close()
    assert ShortRun.load(older).training["config"]["seed"] == 1
    assert ShortRun.load(older).training["last"]["step"] == 1
    next(train(tiny(), IMAGES, replace(c, seed=1)))  # a resumed run's checkpoint is its own: kept
    assert ShortRun.load(older).training["last"]["step"] == 2

    # nor is it named where a run diverges before its first own checkpoint
    diverging = config(updates=400, rate=0.3, checkpoint=str(file), checkpoint_every=400)
    with pytest.raises(FloatingPointError) as error:
        list(train(tiny(width=8), IMAGES, diverging, resume=False))
    assert older.exists() and "previous" not in str(error.value)


def steps_until_the_alarm(K: int, way: float, records, **settings) -> int | None:
    """The update at which `check` stops a run with these records; the way ‖x⁺ − z‖ is that of its data."""
    ratios = deque(maxlen=WATCHED)
    for r in records:
        ratios.append(K * r.grad_norm / way)
        settings |= {"checkpoint": "c.safetensors"}
        model = SimpleNamespace(kernel=Langevin(K))
        state = SimpleNamespace(step=r.step - 1, config=TrainConfig(**settings), model=model, ratios=ratios)
        try:
            check(r.d, r.grad_norm, state, r.rate, r.sigma)
        except FloatingPointError as error:
            assert str(error).startswith(f"learning is about to diverge at update {r.step}:")
            assert f"alarm={state.config.alarm}" in str(error)
            return r.step
    return None


def mean_way(images: torch.Tensor) -> float:
    """Mean ‖x⁺ − z‖ of uint8 images."""
    x = to_float(images)
    return (x - Uniform().draw(x.shape, Generator().manual_seed(0))).flatten(1).norm(dim=1).mean().item()


@pytest.fixture(scope="module")
def way() -> float:
    """That of Fashion-MNIST at 32×32 (its first 1,000 embedded images)."""
    return mean_way(observed("fashion_mnist_mini", limit=1_000))


def test_the_alarm_stays_silent_on_the_shipped_healthy_runs(way):
    curves = learning_curves("fashion_mnist_mini")
    assert [len(records) for _, records in curves] == [1200, 450]
    assert [steps_until_the_alarm(K, way, records) for K, records in curves] == [None, None]
    assert None not in [steps_until_the_alarm(K, way, records, alarm=1.1) for K, records in curves]


def test_the_alarm_fires_before_d_explodes_on_a_run_that_diverged(way):
    """diverged.csv: K = 10, σ = 0.1, rate 1e-3, m = 32, n_f = 8, 32×32; |d| passes 1,000 at update 321."""
    records = read_log(Path(__file__).parent / "diverged.csv")
    fired = steps_until_the_alarm(10, way, records)
    assert 200 < fired < len(records) - 20
    assert max(abs(r.d) for r in records[:fired]) < 40 < max(abs(r.d) for r in records)


def test_the_alarm_stops_train_and_can_be_switched_off(tmp_path):
    """f(x) = w·x with so large a step that the path K·s·‖w‖ is about three times ‖x⁺ − z‖, while d stays small."""
    torch.manual_seed(0)
    model = ShortRun(Plain(), Langevin(2, 17.0, 0.0))
    c = config(updates=WATCHED + 3, rate=1e-6, checkpoint=str(tmp_path / "c.safetensors"), checkpoint_every=5)
    seen = []
    with pytest.raises(FloatingPointError, match=f"about to diverge at update {WATCHED}:.*previous"):
        for record in train(model, IMAGES, c):
            seen.append(record)
    assert len(seen) == WATCHED - 1 and ShortRun.load(c.checkpoint, f=Plain()).training["last"]["step"] == 15
    again = ShortRun(Plain(), Langevin(2, 17.0, 0.0))
    with pytest.raises(FloatingPointError, match=f"update {WATCHED}:"):  # a resumed run has not forgotten
        list(train(again, IMAGES, c))
    rest = list(train(ShortRun(Plain(), Langevin(2, 17.0, 0.0)), IMAGES, replace(c, alarm=None)))
    assert [r.step for r in rest] == list(range(16, WATCHED + 4))


def test_divergence_is_the_same_in_all_units_of_f():
    """s = 1 and f, or s = T and f / T as eq. (4) has it: the same chain, d alone is 20,000 times as large."""
    model = tiny()
    kernel = Langevin.from_delta_tau(3, model.kernel.delta_tau)
    scale(model.f, 1 / model.kernel.temperature)
    assert kernel.step_size == pytest.approx(model.kernel.temperature)
    c = config(updates=2, rate=1e-9)
    records = [list(train(m, IMAGES, c)) for m in (tiny(), ShortRun(model.f, kernel))]
    for r, same_r in zip(*records, strict=True):
        assert kernel.step_size * same_r.d == pytest.approx(r.d, rel=1e-3)
    with torch.no_grad():
        scale(model.f, 1e9)  # and this is divergence in any units
    with pytest.raises(FloatingPointError, match="learning diverged at update 1:") as error:
        list(train(ShortRun(model.f, kernel), IMAGES, config(alarm=None)))
    assert "alarm=None" not in str(error.value)  # it would not help


def test_a_checkpoint_beyond_the_updates_asked_for_is_refused(tmp_path):
    c = config(updates=4, checkpoint=str(tmp_path / "c.safetensors"))
    list(train(tiny(), IMAGES, c))
    with pytest.raises(ValueError, match="is at update 4 already, the config ends at 3: raise updates"):
        train(tiny(), IMAGES, replace(c, updates=3))


def test_a_checkpoint_that_cannot_be_written_is_refused_before_the_first_update(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"checkpoint .*c\.safetensors cannot be written"):
        train(tiny(), IMAGES, config(checkpoint=str(tmp_path / "file" / "c.safetensors")))


def test_seconds_are_those_of_learning_not_of_what_is_done_with_the_records():
    for last in train(tiny(), IMAGES, config(updates=3)):
        time.sleep(0.4)
    assert 0 < last.seconds < 1.0


def test_a_log_may_be_a_path_and_a_row_left_unfinished_is_dropped(tmp_path):
    log = tmp_path / "log.csv"
    c = config(updates=3, checkpoint=str(tmp_path / "c.safetensors"), log=log)
    list(train(tiny(), IMAGES, c))
    with log.open("a") as file:
        file.write("4,0.1")  # killed here
    assert [r.step for r in read_log(log)] == [1, 2, 3]
    list(train(tiny(), IMAGES, replace(c, updates=5)))
    assert [r.step for r in read_log(log)] == [1, 2, 3, 4, 5]


def path_over_way(records, model: ShortRun) -> float:
    """K·s·‖∂f/∂x‖ of the last update, over ‖x⁺ − z‖ of IMAGES."""
    return model.kernel.steps * records[-1].grad_norm / mean_way(IMAGES)


def test_the_chains_path_is_drawn_to_the_one_asked_for():
    c = config(updates=80, rate=1e-9, path=2.0, alarm=3.0)  # θ all but stays, apart from f's scale
    model = tiny()
    assert path_over_way(list(train(model, IMAGES, c)), model) == pytest.approx(2.0, rel=0.1)
    assert path_over_way(list(train(tiny(), IMAGES, replace(c, path=None))), model) < 0.5
    learned = tiny()  # and against Adam
    assert path_over_way(list(train(learned, IMAGES, replace(c, rate=1e-3))), learned) > 1
    assert path_over_way(list(train(tiny(), IMAGES, replace(c, rate=1e-3, path=None))), learned) < 0.5


def test_a_run_with_a_path_that_is_resumed_equals_the_run_never_stopped(tmp_path):
    c = config(path=1.2, checkpoint=str(tmp_path / "c.safetensors"), checkpoint_every=3)
    whole = tiny()
    list(train(whole, IMAGES, replace(c, checkpoint=None)))
    for stop in (3, 6):
        model = tiny()
        list(train(model, IMAGES, replace(c, updates=stop)))
    free = tiny()
    list(train(free, IMAGES, replace(c, checkpoint=None, path=None)))
    assert same(weights(model), weights(whole)) and not same(weights(whole), weights(free))
    with pytest.raises(ValueError, match=r"trained with path=1\.2, here it is None"):
        train(tiny(), IMAGES, replace(c, path=None))


class Sum(torch.nn.Module):
    """f = w·Σx: no layer gives its value."""

    channels, image_size = 1, 8

    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.ones(1))

    def forward(self, x):
        return self.w * x.flatten(1).sum(1)


class Backwards(torch.nn.Module):
    """The layer that gives f's value is made first."""

    channels, image_size = 1, 8

    def __init__(self):
        super().__init__()
        self.out, self.inn = torch.nn.Linear(4, 1), torch.nn.Linear(64, 4)

    def forward(self, x):
        return self.out(torch.tanh(self.inn(x.flatten(1))))[:, 0]


@pytest.mark.parametrize("network", [Sum, Backwards])
def test_a_path_and_growth_are_refused_for_a_network_that_cannot_be_scaled(network):
    torch.manual_seed(0)
    model = ShortRun(network(), Langevin(2))
    before = weights(model)
    with pytest.raises(ValueError, match=f"{network.__name__} cannot be scaled"):
        train(model, IMAGES, config(path=1.2))
    with pytest.raises(ValueError, match=f"{network.__name__} cannot be scaled"):
        grow(model, 4)
    assert same(before, weights(model))


def test_a_path_waits_until_there_is_one():
    model = tiny()
    torch.nn.init.zeros_(model.f.layers[-1].weight)
    first, *_, last = train(model, IMAGES, config(updates=60, path=1.2, alarm=None))
    assert first.grad_norm == 0 < last.grad_norm


@pytest.mark.parametrize("path", [1.0, 1.6, float("nan")])
def test_a_path_out_of_range_is_refused(path):
    with pytest.raises(ValueError, match=r"path must be None, or above 1 and below alarm=1\.6"):
        config(path=path)


def test_a_run_is_not_resumed_with_other_images(tmp_path):
    c = config(checkpoint=str(tmp_path / "c.safetensors"))
    list(train(tiny(), IMAGES, c))
    with pytest.raises(ValueError, match="was trained with images"):
        train(tiny(), 255 - IMAGES, c)


# ---------------------------------------------------------------------------------------------------------- logs


def test_the_csv_log_holds_every_record_exactly(tmp_path):
    c = config(log=str(tmp_path / "new" / "log.csv"))
    records = list(train(tiny(), IMAGES, c))
    assert read_log(c.log) == records
    with open(c.log, newline="") as file:
        assert next(csv.reader(file)) == ["step", "d", "grad_norm", "rate", "sigma", "seconds"]


@pytest.mark.parametrize("stop", [3, 4, 5])
def test_the_csv_log_has_each_row_once_after_a_resume(tmp_path, stop):
    c = config(updates=8, checkpoint_every=2, checkpoint=str(tmp_path / "c.safetensors"), log=str(tmp_path / "l.csv"))
    for record in train(tiny(), IMAGES, c):
        if record.step == stop:
            break
    assert [r.step for r in read_log(c.log)] == [*range(1, stop + 1)]
    list(train(tiny(), IMAGES, c))
    assert [r.step for r in read_log(c.log)] == [*range(1, 9)]


@pytest.mark.parametrize("stop", [None, 3])
def test_the_tensorboard_log_holds_every_record(tmp_path, stop):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed: pip install tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    c = config(updates=5, checkpoint=str(tmp_path / "c.safetensors"), checkpoint_every=2, log=str(tmp_path / "board"))
    records = []
    for record in train(tiny(), IMAGES, c):
        records.append(record)
        if record.step == stop:
            break
    if stop:
        records[2:] = train(tiny(), IMAGES, c)  # update 3 is done again
    board = EventAccumulator(c.log).Reload()
    assert set(board.Tags()["scalars"]) == {"d", "grad_norm", "rate", "sigma", "seconds"}
    for name in ("d", "grad_norm", "rate", "sigma"):
        assert [(e.step, e.value) for e in board.Scalars(name)] == [
            (r.step, pytest.approx(getattr(r, name))) for r in records
        ]


def test_the_progress_bar_can_be_shown_and_hidden(capsys):
    list(train(tiny(), IMAGES, config(progress=True)))
    assert "Algorithm 1" in capsys.readouterr().err
    list(train(tiny(), IMAGES, config(progress=False)))
    assert capsys.readouterr().err == ""


# -------------------------------------------------------------------------------------------------- clear errors


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (dict(updates=0), "updates must be an integer of at least 1"),
        (dict(updates=2.5), "updates must be"),
        (dict(updates=True), "updates must be"),
        (dict(batch_size=0), "batch_size must be"),
        (dict(checkpoint_every=-1), "checkpoint_every must be"),
        (dict(rate=0.0), "rate and rate_final must lie in"),
        (dict(rate=float("nan")), "rate and rate_final must lie in"),
        (dict(rate_final=1.0), "rate and rate_final must lie in"),
        (dict(sigma=-0.1), "sigma and sigma_final must lie in"),
        (dict(sigma=float("nan")), "sigma and sigma_final must lie in"),
        (dict(sigma_final=10.0), "sigma and sigma_final must lie in"),
        (dict(lower_from=1.5), "lower_from must lie in"),
        (dict(average=1.0), "average in"),
        (dict(average=-0.1), "average in"),
        (dict(seed=-1), "seed must be an integer"),
        (dict(seed=0.5), "seed must be an integer"),
        (dict(seed=2**30), "seed must be an integer"),
        (dict(betas=(0.9,)), "betas must be two numbers"),
        (dict(betas=(0.9, 1.0)), "betas must be two numbers"),
    ],
    ids=str,
)
def test_bad_settings_are_refused(bad, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**bad)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (to_float(IMAGES), "uint8 tensor.*got torch.float32; for floats .* use srmcmc_lib.data.to_uint8"),
        (torch.full((4, 1, 8, 8), float("nan")), "these contain NaN or infinity"),
        (IMAGES.numpy(), "must be a uint8 tensor"),
        (IMAGES[:0], r"\[n, 1, 8, 8\], got \[0, 1, 8, 8\]"),
        (IMAGES[:, 0], r"\[n, 1, 8, 8\], got \[20, 8, 8\]"),
        (IMAGES.expand(-1, 3, -1, -1), r"got \[20, 3, 8, 8\]"),
        (IMAGES[..., :7], r"got \[20, 1, 8, 7\]"),
        (None, "must be a uint8 tensor"),
    ],
)
def test_bad_images_are_refused_at_the_call(images, message):
    with pytest.raises(ValueError, match=message):
        train(tiny(), images, config())


# ---------------------------------------------------------------------------------------------------------- grow


@pytest.mark.parametrize("steps", [1, 12, 30])
def test_grow_keeps_K_times_the_force(steps):
    model, x = tiny(steps=3), torch.randn(4, 1, 8, 8)
    f_old = model.f(x).detach()
    grown = grow(model, steps)
    assert grown.kernel == Langevin(steps, 1.0, 0.05) and grown.prior == model.prior
    torch.testing.assert_close(steps * grown.f(x).detach(), 3 * f_old)  # for all x, so K·f' is kept too


def test_grow_keeps_the_images_of_a_noise_free_chain_nearly():
    """Ten times as many steps a tenth as long follow the same ascent: the images hardly move."""
    model, z = (
        replace(tiny(steps=10, width=8, activation="silu"), kernel=Langevin(10, 5.0, 0.0)),
        torch.rand(4, 1, 8, 8),
    )
    x = model(z)
    moved = (x - z).norm()
    assert (grow(model, 100)(z) - x).norm() < 0.1 * moved


@pytest.mark.parametrize("steps", [0, -3, 1.5])
def test_grow_refuses_a_bad_K_before_it_touches_the_network(steps):
    model = tiny()
    with pytest.raises(ValueError, match=r"steps \(K\)"):
        grow(model, steps)
    assert same(weights(model), weights(tiny()))


# ------------------------------------------------------------------------------------------------- learning works


def two_blobs(n: int) -> torch.Tensor:
    """8×8 images with one bright blob, either top left or bottom right."""
    y, x = torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij")
    blobs = torch.stack([torch.exp(-((x - c) ** 2 + (y - c) ** 2) / 3) for c in (2, 5)])
    return (255 * blobs[torch.randint(2, (n,), generator=Generator().manual_seed(0))]).to(torch.uint8)[:, None]


@pytest.mark.parametrize("activation", ["leaky_relu", "silu"])
def test_learning_brings_the_samples_to_the_data(activation):
    """Mean image and pixel spread come much nearer; an image has one of the two blobs, hardly both or neither."""
    torch.manual_seed(0)
    model = ShortRun(EnergyNet(1, 8, width=4, activation=activation), Langevin(10, 1.0, 0.01))
    images = two_blobs(256)
    data = to_float(images)

    def distances():
        x = model.sample(256, seed=1, batch_size=256)
        corr = torch.corrcoef(torch.stack([x[:, 0, 2, 2], x[:, 0, 5, 5]]))[0, 1].item()
        return (x.mean(0) - data.mean(0)).norm().item(), (x.std(0) - data.std(0)).norm().item(), corr

    mean_before, std_before, corr_before = distances()
    for _ in train(model, images, config(updates=120, batch_size=32, rate=3e-3, sigma=0.1)):
        pass
    mean, std, corr = distances()
    assert mean < 0.2 * mean_before
    assert std < 0.6 * std_before
    assert abs(corr_before) < 0.2 and corr < -0.25  # data: −1; of 256 unrelated ones: ± 0.06
