"""The chain's arithmetic, and every tensor on the model's device: on a fake accelerator, a tensor left behind raises.

torch's FakeTensorMode computes shapes and devices but no values, so the device need not exist. It changes the process,
so the cases run in one of their own (this file as a script).
"""

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from test_training import IMAGES, config, timeless, tiny, weights
from torch.utils._python_dispatch import TorchDispatchMode

from srmcmc_lib import EnergyNet, Langevin, LinearEnergy, ShortRun, TrainConfig, observed, train, training
from srmcmc_lib.devices import arithmetic, native_bf16, resolved
from srmcmc_lib.features import load_features, responses
from srmcmc_lib.langevin import chain

CPU, DEVICE, SIZE = torch.device("cpu"), "fakegpu", (2, 1, 32, 32)


@pytest.mark.parametrize(("flags", "auto"), [("avx2 avx512_bf16", "bf16"), ("avx2 avx512f", "float32")])
def test_auto_is_bf16_where_the_cpu_has_instructions_for_it(monkeypatch, flags, auto):
    monkeypatch.setattr(Path, "exists", lambda path: True)
    monkeypatch.setattr(Path, "read_text", lambda path: flags)
    TrainConfig(precision="bf16")  # without a warning: another machine may train
    with warnings.catch_warnings(record=True, action="always") as caught:
        assert [resolved(p, CPU) for p in ("auto", "float32", "bf16")] == [auto, "float32", "bf16"]
    assert ["no bfloat16 instructions" in str(w.message) for w in caught] == [True] * (auto == "float32")


def test_the_chain_alone_runs_in_bf16(monkeypatch):
    """Its states, eq. (6) and θ stay float32; a run differs from one in float32, by what bfloat16 leaves out."""
    monkeypatch.setattr("srmcmc_lib.devices.native_bf16", lambda device: True)
    plain, half = tiny(width=4), tiny(width=4)
    expected = timeless(train(plain, IMAGES, config(updates=3)))

    def watched(f, *rest):
        assert {p.dtype for p in f.parameters()} == {torch.bfloat16}
        for copied, p in zip(f.parameters(), half.f.parameters(), strict=True):  # refreshed at each update
            assert torch.equal(copied, p.bfloat16())
        for x, slope in chain(f, *rest):
            assert x.dtype == slope.dtype == torch.float32
            yield x, slope

    monkeypatch.setattr(training, "chain", watched)
    records = timeless(train(half, IMAGES, config(updates=3, precision="auto")))
    assert {p.dtype for p in weights(half)} == {torch.float32} and records != expected
    for one, other in zip(records, expected, strict=True):
        assert one == pytest.approx(other, rel=0.03, abs=3e-3)


@pytest.mark.skipif(not native_bf16(CPU) or "ONEDNN_MAX_CPU_ISA" in os.environ, reason="no native bf16: far too slow")
def test_a_bf16_chain_agrees_with_a_float32_chain_in_distribution():
    """Means of the classifier's features over 256 samples of a shipped model, in standard errors: 1 by chance."""
    h, models = load_features(), [ShortRun.load("fashion_mnist_fast", precision=p) for p in ("float32", "bf16")]
    a, b = (responses(h, m.with_steps(30).sample(256, seed)) for seed, m in enumerate(models))
    error, data = ((a.var(0) + b.var(0)) / 256).sqrt(), responses(h, observed("fashion_mnist", limit=256))
    apart = [((a.mean(0) - x.mean(0)) / error.clamp_min(1e-3)).square().mean() for x in (b, data)]
    assert apart[0] < 3 < 10 < apart[1]


@pytest.mark.parametrize(("precision", "tf32"), [("float32", False), ("tf32", True)])
def test_tf32_is_allowed_inside_an_update_only(precision, tf32):
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    with pytest.raises(RuntimeError, match="planted"), arithmetic(precision, torch.device("cuda")):
        assert (torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32) == (tf32, tf32)
        raise RuntimeError("planted")
    assert (torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32) == before


# ------------------------------------------------------------------------------------------------ a fake accelerator


class OnDevice(torch.Generator):
    """No real generator can be made on a device that does not exist."""

    device = property(lambda self: torch.device(DEVICE))


class Finite(TorchDispatchMode):
    """Answers what fake tensors cannot: a number read from one is 1, a condition is true, so every check passes."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            return True if args[0].dtype == torch.bool else 1
        return func is torch.ops.aten.allclose.default or func(*args, **(kwargs or {}))


class Forgetful(EnergyNet):
    """The planted mistake: a constant that is neither a parameter nor a buffer, so it stays on the CPU."""

    offset = None

    def forward(self, x):
        self.offset = torch.zeros(1) if self.offset is None else self.offset
        return super().forward(x) + self.offset


def trained(model):
    images, c = torch.zeros(6, *SIZE[1:], dtype=torch.uint8), config(updates=2, average=0.9)
    return [*train(model, images, c)] and [*model.f.parameters(), model.sample(2, 0)]


def cpu_noise(model):
    return [x for x, _ in chain(model.f, model.draw_z(2, 0), model.kernel, torch.randn(3, *SIZE))]


def found_z(model, **options):
    return [*model.reconstruct(model.draw_z(2, 1).cpu(), iterations=3, keep=[1], **options)]


CASES = {  # name → what to run on a model whose network is on the device; the tensors returned must be there as well
    "sample": lambda m: [m.sample(3, seed=0, batch_size=2)],
    "noise given on the CPU": lambda m: [*m.trajectory(m.draw_z(2, 0).cpu(), torch.randn(3, *SIZE))],
    "interpolate": lambda m: [m.interpolate(m.draw_z(2, 0).cpu(), m.draw_z(2, 1), torch.ones(3), u=3)],
    "spherical": lambda m: [m.interpolate(*m.draw_z(4, 0).split(2), torch.ones(1), 1, "spherical", fresh=True)],
    "reconstruct": lambda m: found_z(m, u=1, gradient="residual"),
    "reconstruct, adjoint": lambda m: found_z(m, gradient="adjoint"),
    "reconstruct, inverted": lambda m: found_z(m, gradient="inverted"),
    "train": trained,
    "linear": trained,
}
PLANTED = {"reconstruct, planted": CASES["reconstruct, adjoint"], "train, planted": trained, "CPU noise": cpu_noise}


def run_all() -> dict[str, str]:
    """Case → "" or the error it raised."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

    _setup_privateuseone_for_python_backend(DEVICE)
    training.fresh = lambda seed, t, device: [torch.Generator()] + [OnDevice() for _ in range(3)]
    fake, found = FakeTensorMode(), {}
    fake.__deepcopy__ = lambda memo: fake  # a copied tensor stays in it
    for i, (name, case) in enumerate((CASES | PLANTED).items()):
        network = Forgetful if "planted" in name else EnergyNet
        f = LinearEnergy() if name == "linear" else network(1, 32, 2, "silu" if i % 2 else "leaky_relu")
        state = f.state_dict()
        try:
            with fake, Finite():  # `.to` cannot swap real tensors for fake ones: they are assigned
                f.load_state_dict({k: fake.from_tensor(v).to(DEVICE) for k, v in state.items()}, assign=True)
                where = {t.device.type for t in case(ShortRun(f, Langevin(3)))}
            found[name] = "" if where == {DEVICE} else f"returned tensors on {where}"
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"
    return found


def test_no_tensor_is_left_on_the_cpu_and_a_planted_one_raises():
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([sys.executable, __file__], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert {case: found[case] for case in CASES if found[case]} == {}
    assert all(f"at least two devices, {DEVICE}:0 and cpu" in found[case] for case in PLANTED), found


if __name__ == "__main__":
    print(json.dumps(run_all()))
