"""Algorithm 1: updates by hand, schedules, divergence, what a network must be, and that training works."""

import math
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from torch import Generator, nn

from srmcmc_lib import EnergyNet, Langevin, ShortRun, TrainConfig, Uniform, observed, train
from srmcmc_lib.data import to_float
from srmcmc_lib.langevin import gradient
from srmcmc_lib.noise import fresh
from srmcmc_lib.progress import WATCHED, Progress, learning_curves, read_log
from srmcmc_lib.training import alarm, grow

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


class Linear(nn.Module):
    """f = w·x, a network of one's own with neither `config` nor `gradient`."""

    def __init__(self):
        super().__init__()
        self.channels, self.image_size, self.w = 1, 8, nn.Linear(64, 1)

    def forward(self, x):
        return self.w(x.flatten(1))[:, 0]


def updates_by_hand(model: ShortRun, images: torch.Tensor, c: TrainConfig):
    """Algorithm 1 written out a second time: own chain loop, eq. (6), Adam's published formula; no torch.optim."""
    θ, s, ε = list(model.f.parameters()), model.kernel.step_size, model.kernel.noise
    M, V, mean_θ = [torch.zeros_like(p) for p in θ], [torch.zeros_like(p) for p in θ], weights(model)
    for t in range(1, c.updates + 1):
        h = (1 + math.cos(math.pi * max(0, ((t - 1) / (c.horizon or c.updates) - 0.25) / 0.75))) / 2  # half a cosine
        η, σ = c.rate_final + h * (c.rate - c.rate_final), c.sigma_final + h * (c.sigma - c.sigma_final)
        data, noise, start, u = fresh(c.seed, t - 1, torch.device("cpu"))
        x_plus = images[torch.randint(len(images), (c.batch_size,), generator=data)].float() / 127.5 - 1
        x_plus, norms = x_plus + σ * torch.randn(x_plus.shape, generator=noise), []
        low, high = model.prior.low, model.prior.high
        x_minus = low + (high - low) * torch.rand(x_plus.shape, generator=start)
        for _ in range(model.kernel.steps):
            (df_dx,) = torch.autograd.grad(model.f(x_minus.requires_grad_()).sum(), x_minus)
            norms += [df_dx[i].square().sum().sqrt().item() for i in range(c.batch_size)]
            x_minus = x_minus.detach() + s * df_dx + ε * torch.randn(x_plus.shape, generator=u)
        d = model.f(x_plus).mean() - model.f(x_minus).mean()
        g = [-g for g in torch.autograd.grad(d, θ)]  # Adam descends, eq. (6) ascends
        with torch.no_grad():
            for p, grad, m, v in zip(θ, g, M, V, strict=True):
                m.mul_(0.9).add_(0.1 * grad)
                v.mul_(0.999).add_(0.001 * grad**2)
                p -= η * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
            decay = min(c.average, (1 + t) / (10 + t))
            mean_θ = [decay * a + (1 - decay) * p for a, p in zip(mean_θ, θ, strict=True)]
        yield t, d.item(), sum(norms) / len(norms), η, σ, mean_θ


@pytest.mark.parametrize(("activation", "low", "horizon"), [("leaky_relu", -1, None), ("silu", 0, 8)])
def test_updates_equal_those_written_out_by_hand(activation, low, horizon):
    """Within float32 rounding (1 % of one Adam step): θ, d and the gradient norm at every update, mean θ at the end.

    8 noisy images: a unit that all leave on or off has no gradient but rounding, which Adam makes a step of.
    """
    c = config(updates=5, batch_size=8, sigma=0.3, seed=9, average=0.7, rate_final=5e-4, sigma_final=0.2,
               lower_from=0.25, horizon=horizon)  # fmt: skip
    close = dict(rtol=0, atol=1e-5)
    ours, theirs, start = (replace(tiny(activation=activation), prior=Uniform(low, low + 2)) for _ in range(3))
    ours.f.register_buffer("calls", torch.zeros(1))
    ours.f.register_forward_hook(lambda f, *_: f.calls.add_(1) and None)  # as in spectral normalisation
    for record, hand in zip(train(ours, IMAGES, c), updates_by_hand(theirs, IMAGES, c), strict=True):
        assert list(asdict(record).values())[:5] == pytest.approx(hand[:5], rel=1e-4, abs=1e-5)
        torch.testing.assert_close(weights(ours), weights(theirs) if record.step < 5 else hand[5], **close)
    assert ours.f.calls == 4 + 5  # calls before training, and one an update
    for other in (start, theirs):  # it moved, and mean θ is not θ
        assert max((a - b).abs().max().item() for a, b in zip(*map(weights, (other, ours)), strict=True)) > 3e-4


def test_divergence_is_raised_and_the_last_checkpoints_stay(tmp_path):
    file, older, done = tmp_path / "c.safetensors", tmp_path / "c.previous.safetensors", 0
    c = config(updates=400, rate=0.3, checkpoint_every=1, checkpoint=file, log=tmp_path / "l.csv")
    with pytest.raises(FloatingPointError, match=r"diverged at update \d+.*a rate below 0\.3") as error:
        for record in train(tiny(width=8), IMAGES, c):
            done, last = record.step, file.read_bytes()
    assert done >= 2 and f"at update {done + 1}:" in str(error.value) and str(older) in str(error.value)
    assert file.read_bytes() == last and ShortRun.load(file).training["last"]["step"] == done
    assert ShortRun.load(older).training["last"]["step"] == done - 1
    assert [r.step for r in read_log(c.log)] == [*range(1, done + 1)]


@pytest.mark.parametrize(("bad", "value"), [(2, float("inf")), (3, float("nan"))])  # 3 is the very last update
def test_infinite_gradients_stop_before_theta_moves(tmp_path, bad, value):
    """d is finite all the while: its gradient alone overflows."""
    model, seen = tiny(), []

    def overflow(g):
        seen.append(weights(model))
        return g * value if len(seen) == bad else g

    model.f.layers[0].weight.register_hook(overflow)
    c = config(updates=3, checkpoint=tmp_path / "c.safetensors", checkpoint_every=1)
    with pytest.raises(FloatingPointError, match=f"training diverged at update {bad}"):
        list(train(model, IMAGES, c))
    assert same(weights(model), seen[-1])
    assert same(weights(ShortRun.load(c.checkpoint)), seen[-1])


def steps_until_the_alarm(K: int, records, **settings) -> int | None:
    """The update at which `alarm` stops a run of Fashion-MNIST with these records."""
    x = to_float(observed("fashion_mnist_mini", limit=1_000))
    distance = (x - Uniform().draw(x.shape, Generator().manual_seed(0))).flatten(1).norm(dim=1).mean().item()
    state = Progress(ShortRun(Linear(), Langevin(K)), TrainConfig(**settings), IMAGES)
    for r in records:
        state.step = r.step - 1
        try:
            alarm(state, r.d, r.grad_norm, distance, [], r.rate, r.sigma)
        except FloatingPointError as error:
            assert str(error).startswith(f"training is about to diverge at update {r.step}:")
            return r.step


def test_the_alarm_tells_a_run_that_diverged_from_a_healthy_one_that_is_shipped():
    """diverged.csv: K = 10, σ = 0.1, rate 1e-3, m = 32, n_f = 8, 32×32; |d| passes 1,000 at update 321."""
    curves = learning_curves("fashion_mnist")
    assert [len(records) for _, records in curves] == [2500, 1000, 7000, 4500]
    assert [steps_until_the_alarm(*curve, alarm=2) for curve in curves] == [None] * 4  # as its recipe
    assert None not in [steps_until_the_alarm(*curve, alarm=1.1) for curve in curves]
    records = read_log(Path(__file__).parent / "diverged.csv")
    fired = steps_until_the_alarm(10, records)
    assert 200 < fired < len(records) - 20
    assert max(abs(r.d) for r in records[:fired]) < 40 < max(abs(r.d) for r in records)


def test_the_alarm_stops_train_and_can_be_switched_off(tmp_path):
    """f = w·x with so large a step that the path K·s·‖w‖ is about three times ‖x⁺ − z‖, while d stays small."""
    c = config(updates=WATCHED + 3, rate=1e-6, checkpoint=tmp_path / "c.safetensors", checkpoint_every=5)
    steep = lambda: ShortRun(Linear(), Langevin(2, 17.0, 0.0))  # noqa: E731
    for done in ([*range(1, WATCHED)], [*range(16, WATCHED)]):  # the second run resumes, and has not forgotten
        seen = []
        with pytest.raises(FloatingPointError, match=f"about to diverge at update {WATCHED}:.*previous"):
            seen += [(seen.append(r.step), r.step)[0] for r in train(steep(), IMAGES, c)]
        assert seen == done
    assert [r.step for r in train(steep(), IMAGES, replace(c, alarm=None))] == [*range(16, WATCHED + 4)]


def test_bad_settings_are_refused():
    bad = {"updates": 0, "batch_size": 2.5, "rate": math.nan, "sigma_final": -0.1, "precision": "fp16"}
    for name, value in bad.items():
        with pytest.raises(ValueError, match=f"{name}.*(must|unknown; choose one of auto, float32).*"):
            TrainConfig(**{name: value})


@pytest.mark.parametrize("layer", [nn.BatchNorm1d(64), nn.Dropout(0.2)], ids=["mixes images", "changes"])
def test_a_network_that_breaks_the_model_contract_is_refused_at_the_call(layer):
    """What `gradient` refuses is in test_shortrun."""
    f = Linear()
    f.w = nn.Sequential(layer, f.w)
    with pytest.raises(ValueError, match="breaks the model contract"):
        train(ShortRun(f, Langevin(2)), IMAGES, config())
    f.w = nn.Linear(64, 1)
    f.gradient = lambda x: -gradient(f.forward, x)  # that of the energy, not of f
    for model, message in ((ShortRun(f), "Linear.gradient is not"), (tiny().to(torch.bfloat16), "be in float32")):
        with pytest.raises(ValueError, match=message):
            train(model, IMAGES, config())


def test_grow_keeps_K_times_the_force_and_refuses_a_bad_K_before_it_touches_f():
    model, x = tiny(steps=3), torch.randn(4, 1, 8, 8)
    f_old = model.f(x).detach()
    with pytest.raises(ValueError, match=r"steps \(K\)"):
        grow(model, 0)
    grown = grow(model, 12)
    assert grown.kernel == Langevin(12, 1.0, 0.05) and grown.prior == model.prior
    torch.testing.assert_close(12 * grown.f(x).detach(), 3 * f_old)  # for all x, so K·f' is kept too


def test_training_brings_the_samples_to_the_data():
    """8×8 images with one blob, top left or bottom right: mean and spread come near, and hardly an image has both."""
    y, x = torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij")
    blobs = torch.stack([torch.exp(-((x - c) ** 2 + (y - c) ** 2) / 3) for c in (2, 5)])
    images = (255 * blobs[torch.randint(2, (256,), generator=Generator().manual_seed(0))]).to(torch.uint8)[:, None]
    torch.manual_seed(0)
    model, data = ShortRun(EnergyNet(1, 8, width=4), Langevin(10, 1.0, 0.01)), to_float(images)

    def distances():
        x = model.sample(256, seed=1, batch_size=256)
        corr = torch.corrcoef(torch.stack([x[:, 0, 2, 2], x[:, 0, 5, 5]]))[0, 1].item()
        return (x.mean(0) - data.mean(0)).norm().item(), (x.std(0) - data.std(0)).norm().item(), corr

    mean_before, std_before, corr_before = distances()
    list(train(model, images, config(updates=120, batch_size=32, rate=3e-3, sigma=0.1)))
    mean, std, corr = distances()
    assert mean < 0.2 * mean_before and std < 0.6 * std_before
    assert abs(corr_before) < 0.2 and corr < -0.25  # data: −1; of 256 unrelated ones: ± 0.06
