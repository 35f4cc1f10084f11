"""Every tensor on the model's device, tested without one: on a fake accelerator a tensor left on the CPU raises.

torch's FakeTensorMode computes shapes and devices but no values, so the device need not exist. It is not named "cuda":
automatic differentiation asks a CUDA device for its streams, and so for a driver. torch's hook for other accelerators
serves as well; it changes the process, so the cases run in one of their own (this file as a script).
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode

from srmcmc_lib import EnergyNet, Gaussian, Langevin, ShortRun, TrainConfig, Uniform, resuming
from srmcmc_lib.devices import prepared
from srmcmc_lib.features import features
from srmcmc_lib.langevin import langevin_chain
from srmcmc_lib.training import update

DEVICE = "fakegpu"
SIZE = (2, 1, 32, 32)


IMAGES = torch.zeros(6, *SIZE[1:], dtype=torch.uint8)


class Finite(TorchDispatchMode):
    """Answers what fake tensors cannot: a number read from one is 1, a condition is true, so every check passes."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            return True if args[0].dtype == torch.bool else 1
        return func(*args, **(kwargs or {}))


class Forgetful(EnergyNet):
    """The planted mistake: a constant that is neither a parameter nor a buffer, so it stays behind on the CPU."""

    offset = None

    def forward(self, x):
        self.offset = torch.zeros(1) if self.offset is None else self.offset
        return super().forward(x) + self.offset


def learn(model, n=4, **settings):
    """One update; its generators are CPU ones, for none can be made on a device that does not exist."""
    config = TrainConfig(batch_size=4, average=0.9, **settings)
    with unset_fake_temporarily():  # it takes the checksum of real images
        state = resuming.State(model, config, IMAGES)
    images = torch.zeros(6, *SIZE[1:], dtype=torch.uint8)
    update(state, prepared(model.f, config.precision, config.compile), images, 0.1, 1e-3, n)
    state.update_average()
    return [next(model.f.parameters()).grad, *state.average.values()]


def cpu_noise(model):
    *_, last = langevin_chain(model.f, model.draw_z(2, 0), model.kernel, torch.randn(3, *SIZE))
    return last.x


def reconstruction(model, **options):
    found = model.reconstruct(model.draw_z(2, 1).cpu(), iterations=3, keep=[1], **options)
    return found.z, found.x, found.errors, found.states, found.error


CASES = {  # name → what to run on a model whose network is on the device; the tensors returned must be there as well
    "sample": lambda m: m.sample(3, seed=0, batch_size=2),
    "trajectory": lambda m: list(m.trajectory(m.draw_z(2, 0), u=1)),
    "noise given on the CPU": lambda m: m(m.draw_z(2, 0).cpu(), torch.randn(3, *SIZE)),
    "interpolate": lambda m: m.interpolate(m.draw_z(2, 0).cpu(), m.draw_z(2, 1), torch.ones(3), u=3),
    "interpolate, spherical": lambda m: m.interpolate(
        *m.draw_z(4, 0).split(2), torch.ones(1), u=1, mixing="spherical", fresh=True
    ),
    "reconstruct": lambda m: reconstruction(m, restarts=2, u=1),
    "reconstruct through the chain": lambda m: reconstruction(m, gradient="chain"),
    "reconstruct with adam": lambda m: reconstruction(m, optimizer="adam"),
    "train": learn,
    "train in parts": lambda m: learn(m, n=3),
    "features": lambda m: H(m.sample(2, 0)),
}
PLANTED = {
    "sample, planted": lambda m: m.sample(3, seed=0),
    "reconstruct, planted": reconstruction,
    "train, planted": learn,
}


def run_all() -> dict[str, str]:
    """Case → "" or the error it raised."""
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

    _setup_privateuseone_for_python_backend(DEVICE)
    resuming.Generator = lambda device: torch.Generator()
    fake, h, found = FakeTensorMode(), features(), {}

    def moved(module):
        """`.to` cannot swap real tensors for fake ones: they are assigned."""
        state = module.state_dict()
        with fake:
            return (
                module.load_state_dict({k: fake.from_tensor(v).to(DEVICE) for k, v in state.items()}, assign=True)
                and module
            )

    global H
    H = moved(h)
    for i, (name, case) in enumerate((CASES | PLANTED | {"chain with CPU noise, planted": cpu_noise}).items()):
        network = Forgetful if name in PLANTED else EnergyNet
        prior = Gaussian() if i % 2 else Uniform()
        model = ShortRun(
            moved(network(1, 32, width=2, activation="silu" if i % 3 else "leaky_relu")), Langevin(3), prior
        )
        try:
            with fake, Finite():
                tensors = case(model)
            where = {t.device.type for t in ([tensors] if isinstance(tensors, torch.Tensor) else tensors)}
            found[name] = "" if where == {DEVICE} else f"returned tensors on {where}"
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("fake")
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([sys.executable, __file__, folder / "found.json"], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "found.json").read_text())


@pytest.mark.parametrize("case", CASES)
def test_no_tensor_is_left_on_the_cpu(found, case):
    assert found[case] == ""


@pytest.mark.parametrize("case", [*PLANTED, "chain with CPU noise, planted"])
def test_a_tensor_left_on_the_cpu_raises(found, case):
    assert f"at least two devices, {DEVICE}:0 and cpu" in found[case] or f"cpu and {DEVICE}:0" in found[case]


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json.dumps(run_all()))
