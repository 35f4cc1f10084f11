"""ShortRun: seeds and streams, the chain's noise, priors, checkpoints that hold everything and never unpickle."""

import json
import pickle

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Generator, nn

from srmcmc_lib import EnergyNet, Gaussian, Langevin, ShortRun, Uniform, checkpoint, paths

K, SHAPE = 4, (1, 8, 8)


def tiny(prior=None, **kernel) -> ShortRun:
    torch.manual_seed(7)
    return ShortRun(EnergyNet(1, 8, width=4), Langevin(**(dict(steps=K, noise=0.1) | kernel)), prior or Uniform())


@pytest.fixture
def model():
    return tiny()


# ------------------------------------------------------------------------------------------------------- seeds


@pytest.mark.parametrize("batch_size", [1, 2, 3, 6, 7, 64])
def test_samples_do_not_depend_on_the_batch_size(model, batch_size):
    reference = model.sample(7, seed=3)
    assert reference.shape == (7, *SHAPE) and reference.dtype == torch.float32
    torch.testing.assert_close(model.sample(7, seed=3, batch_size=batch_size), reference)


def test_fewer_samples_are_a_prefix_of_more(model):
    torch.testing.assert_close(model.sample(3, seed=3), model.sample(7, seed=3)[:3])
    assert torch.equal(model.draw_z(3, 5, start=4), model.draw_z(7, 5)[4:])


def test_same_seed_same_samples_whatever_the_global_seed(model):
    first = model.sample(4, seed=0)
    torch.manual_seed(99)
    assert torch.equal(model.sample(4, seed=0), first)
    state = torch.get_rng_state()
    model.sample(4, seed=0)
    assert torch.equal(torch.get_rng_state(), state)  # nor is the global generator used up


def test_different_seeds_and_different_images_differ(model):
    x = torch.cat([model.sample(8, seed) for seed in (0, 1, 2, 2**31, 2**32 - 1)]).flatten(1)
    distances = torch.cdist(x, x) + 1e9 * torch.eye(len(x))
    assert distances.min() > 1


def test_sample_is_the_model_at_the_seeds_z_and_u(model):
    torch.testing.assert_close(model.sample(5, seed=11, batch_size=2), model(model.draw_z(5, 11), u=11))


def test_start_and_noise_of_one_seed_are_independent_streams():
    model = tiny(Gaussian(), steps=1, noise=1.0, step_size=1e-9)  # x = z + u
    z = model.draw_z(200, 0)
    u = model(z, u=0) - z
    r = torch.corrcoef(torch.stack([z.flatten(), u.flatten()]))[0, 1]
    assert abs(r) < 5 / z.numel() ** 0.5
    assert u.std() == pytest.approx(1, abs=5 / (2 * u.numel()) ** 0.5)


def test_a_generator_serves_as_a_seed_and_moves_on(model):
    g = Generator().manual_seed(5)
    first, second = model.sample(3, g), model.sample(3, g)
    assert torch.equal(model.sample(3, Generator().manual_seed(5)), first)
    assert not torch.allclose(first, second)
    z = model.draw_z(3, Generator().manual_seed(5))
    assert torch.equal(model(z, Generator().manual_seed(6)), model(z, Generator().manual_seed(6)))


@pytest.mark.parametrize("seed", [-1, 0.5, True, None, "0", 2**32])
def test_bad_seeds_are_refused(model, seed):
    with pytest.raises(ValueError, match="a seed is an integer in 0 … 2³² − 1"):
        model.sample(1, seed)


@pytest.mark.parametrize(("n", "batch_size"), [(0, 64), (-1, 64), (2.0, 64), (1, 0)])
def test_bad_counts_are_refused(model, n, batch_size):
    with pytest.raises(ValueError, match=r"(n|batch_size) must be an integer of at least 1"):
        model.sample(n, 0, batch_size)


# ------------------------------------------------------------------------------------------- the chain as a model


def by_hand(model: ShortRun, z, U):
    """x ← x + s f'(x) + ε u as a plain loop."""
    path = [z]
    for u in U:
        x = path[-1].clone().requires_grad_()
        (df_dx,) = torch.autograd.grad(model.f(x).sum(), x)
        path.append(x.detach() + model.kernel.step_size * df_dx + model.kernel.noise * u)
    return path


@pytest.mark.parametrize("kind", [torch.Tensor, list, iter])
@pytest.mark.parametrize("shared", [False, True], ids=["own noise", "shared noise"])
def test_given_noise_is_used_step_by_step(model, kind, shared):
    z, U = torch.rand(3, *SHAPE), torch.randn(K, 1 if shared else 3, *SHAPE)
    *path, x = model.trajectory(z, U if kind is torch.Tensor else kind(U.unbind()))
    assert len(path) == K
    torch.testing.assert_close([*path, x], by_hand(model, z, U))
    torch.testing.assert_close(model(z, U), x)


def test_shared_noise_moves_equal_images_alike(model):
    z, U = torch.rand(1, *SHAPE).expand(3, *SHAPE), torch.randn(K, 1, *SHAPE)
    x = model(z, U)
    torch.testing.assert_close(x[0], x[1])
    own = model(z, u=0)  # while a seed gives each image its own
    assert (own[0] - own[1]).abs().max() > 0.1


def test_no_noise_is_the_plain_ascent_and_repeats(model):
    z = torch.rand(2, *SHAPE)
    torch.testing.assert_close(model(z), by_hand(model, z, [0.0] * K)[-1])
    assert torch.equal(model(z), model(z))
    silent = tiny(noise=0.0)
    assert torch.equal(silent(z, u=3), silent(z))


def test_another_K_keeps_network_prior_and_the_first_steps(model):
    longer = model.with_steps(9)
    z = torch.rand(2, *SHAPE)
    assert longer.kernel == Langevin(9, model.kernel.step_size, model.kernel.noise) and longer.f is model.f
    assert model.kernel.steps == K
    path = list(longer.trajectory(z))
    assert len(path) == 10
    torch.testing.assert_close(path[K], model(z))


@pytest.mark.parametrize(
    ("z", "message"),
    [
        (torch.zeros(2, 8, 8), "z must have the shape"),
        (torch.zeros(2, 3, 8, 8), r"z must have the shape \[B, 1, 8, 8\], got \[2, 3, 8, 8\]"),
        (torch.zeros(2, 1, 8, 9), "z must have the shape"),
        (torch.full((2, *SHAPE), float("nan")), "z contains NaN or infinity"),
        (torch.full((2, *SHAPE), float("-inf")), "z contains NaN or infinity"),
    ],
)
def test_bad_z_is_refused(model, z, message):
    with pytest.raises(ValueError, match=message):
        model(z)


@pytest.mark.parametrize(
    "shape", [(K - 1, 2, *SHAPE), (K + 1, 1, *SHAPE), (K, 3, *SHAPE), (K, *SHAPE), (K, 2, 3, 8, 8), (K, 1, 1, 8, 9)]
)
def test_noise_of_a_wrong_shape_is_refused(model, shape):
    with pytest.raises(ValueError, match=f"u must hold K = {K} tensors"):
        model(torch.zeros(2, *SHAPE), torch.zeros(shape))


def test_noise_that_is_too_short_is_refused(model):
    two = [torch.zeros(2, *SHAPE)] * 2
    with pytest.raises(ValueError, match=f"u must hold K = {K} tensors.*got 2"):
        model(torch.zeros(2, *SHAPE), two)
    with pytest.raises(ValueError, match=f"u ended after 2 of K = {K} steps"):
        model(torch.zeros(2, *SHAPE), iter(two))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (torch.zeros(7, *SHAPE), r"u at step 1 has the shape \(7, 1, 8, 8\)"),
        (torch.full((2, *SHAPE), float("nan")), "u at step 1 has a NaN"),
    ],
)
def test_one_bad_noise_tensor_is_named(model, bad, message):
    u = [torch.zeros(2, *SHAPE)] * K
    u[1] = bad
    with pytest.raises(ValueError, match=message):
        model(torch.zeros(2, *SHAPE), u)


def test_noise_that_is_no_noise_is_refused(model):
    with pytest.raises(ValueError, match=r"u must be None, a seed, a torch.Generator or K tensors, got float"):
        model(torch.zeros(2, *SHAPE), 0.5)


def test_a_prior_that_could_not_be_loaded_again_is_refused(model):
    with pytest.raises(ValueError, match="prior must be one of Uniform, Gaussian"):
        ShortRun(model.f, model.kernel, prior=object())


def test_a_network_of_another_kind_is_refused_even_if_the_weights_would_fit(model, tmp_path):
    path = model.save(tmp_path / "m.safetensors")
    other = EnergyNet(**{**model.f.config, "activation": "softplus"})
    with pytest.raises(ValueError, match=r"but f is .*softplus"):
        ShortRun.load(path, f=other)


@pytest.mark.parametrize("lost", ["step_size", "noise"])
def test_a_checkpoint_that_lost_a_constant_is_damaged_not_defaulted(model, tmp_path, lost):
    path = model.save(tmp_path / "m.safetensors")
    meta, tensors = checkpoint.read(path)
    del meta["kernel"][lost]
    checkpoint.write(path, meta, tensors)
    with pytest.raises(ValueError, match=rf"m\.safetensors is damaged.*{lost}"):
        ShortRun.load(path)


def test_a_chain_that_explodes_says_so():
    steep = tiny(steps=40, step_size=1e5)
    steep.f = Steep()
    with pytest.raises(FloatingPointError, match="left the finite numbers within K = 40 steps"):
        steep.sample(2, seed=0)


class Steep(nn.Module):
    """A custom f with no parameters at all: f(x) = Σ x²."""

    channels, image_size = 1, 8

    def forward(self, x):
        return x.square().flatten(1).sum(1)


# ------------------------------------------------------------------------------------------------------ priors


@pytest.mark.parametrize(
    ("prior", "mean", "std", "kurtosis"),
    [(Uniform(), 0, 1 / 3**0.5, 1.8), (Uniform(-0.5, 2.5), 1, 3 / 12**0.5, 1.8),
     (Gaussian(), 0, 1, 3), (Gaussian(0.3), 0, 0.3, 3)],
    ids=str,
)  # fmt: skip
def test_priors_have_their_moments(prior, mean, std, kurtosis):
    """Within five standard errors of 64,000 pixels; the fourth moment tells uniform from Gaussian."""
    z = tiny(prior).draw_z(1_000, seed=0)
    assert z.shape == (1_000, *SHAPE) and z.dtype == torch.float32
    z, n = z.double().flatten(), z.numel()
    assert z.mean() == pytest.approx(mean, abs=5 * std / n**0.5)
    assert z.std() == pytest.approx(std, abs=5 * std * ((kurtosis - 1) / (4 * n)) ** 0.5)
    assert ((z - mean) / std).pow(4).mean() == pytest.approx(kurtosis, abs=5 * (96 / n) ** 0.5)
    if isinstance(prior, Uniform):
        assert prior.low <= z.min() and z.max() <= prior.high


@pytest.mark.parametrize(
    "prior", [(Uniform, 1, 1), (Uniform, 1, -1), (Uniform, float("nan"), 1), (Gaussian, 0), (Gaussian, -1)], ids=str
)
def test_bad_priors_are_refused(prior):
    kind, *constants = prior
    with pytest.raises(ValueError, match=f"{kind.__name__} needs"):
        kind(*constants)


# -------------------------------------------------------------------------------------------------- checkpoints


@pytest.fixture
def full():
    """A model in which nothing is at its default."""
    torch.manual_seed(1)
    f = EnergyNet(3, 12, width=3, activation="softplus")
    training = {"config": {"updates": 9, "betas": [0.9, 0.99]}, "last": {"step": 9, "d": -0.125}, "note": "größer"}
    return ShortRun(f, Langevin(7, 0.5, 0.02), Gaussian(0.7), (0.0, 1.0), "folder:/my/images", training)


def test_a_checkpoint_holds_everything_needed_to_sample_again(full, tmp_path):
    path = full.save(tmp_path / "new" / "folder" / "my.safetensors", extra=torch.arange(3))
    again = ShortRun.load(str(path))
    assert again.f.config == full.f.config
    assert (again.kernel, again.prior, again.value_range, again.dataset) == (
        full.kernel,
        full.prior,
        (0.0, 1.0),
        "folder:/my/images",
    )
    assert again.training == full.training
    assert [*again.f.state_dict()] == [*full.f.state_dict()]
    assert all(torch.equal(a, b) for a, b in zip(again.f.parameters(), full.f.parameters(), strict=True))
    assert torch.equal(again.sample(3, seed=2), full.sample(3, seed=2))
    assert [p.name for p in path.parent.iterdir()] == ["my.safetensors"]  # nothing left aside


def test_the_metadata_are_readable_json_with_library_version_and_image_size(full, tmp_path):
    with safe_open(full.save(tmp_path / "my.safetensors"), "pt") as file:
        meta = json.loads(file.metadata()["srmcmc"])
    assert meta["image_size"] == 12 and meta["network"]["class"] == "EnergyNet" and meta["library"]


def test_an_interrupted_save_leaves_the_old_checkpoint(full, tmp_path, monkeypatch):
    path = full.save(tmp_path / "my.safetensors")
    before = path.read_bytes()

    def half(tensors, aside, metadata):
        aside.write_bytes(before[: len(before) // 2])
        raise KeyboardInterrupt

    monkeypatch.setattr("srmcmc_lib.checkpoint.save_file", half)
    with pytest.raises(KeyboardInterrupt):
        full.save(path)
    assert path.read_bytes() == before


def without_kernel(path):
    """Arguments of save_file for the same checkpoint with one record missing from its metadata."""
    with safe_open(path, "pt") as file:
        meta = json.loads(file.metadata()["srmcmc"])
        tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
    del meta["kernel"]
    return tensors, path, {"srmcmc": json.dumps(meta)}


DAMAGE = {
    "truncated": lambda p: p.write_bytes(p.read_bytes()[:-10]),
    "truncated in the header": lambda p: p.write_bytes(p.read_bytes()[:50]),
    "empty": lambda p: p.write_bytes(b""),
    "overwritten header": lambda p: p.write_bytes(b"\xff" * 64 + p.read_bytes()[64:]),
    "text": lambda p: p.write_text("these are no weights"),
    "pickle": lambda p: p.write_bytes(pickle.dumps({"f": [1.0]})),
    "torch.save": lambda p: torch.save({"f.layers.0.weight": torch.zeros(3)}, p),
    "foreign safetensors": lambda p: save_file({"w": torch.zeros(2)}, p),
    "foreign metadata": lambda p: save_file({"w": torch.zeros(2)}, p, {"format": "pt"}),
    "metadata that are no JSON": lambda p: save_file({"w": torch.zeros(2)}, p, {"srmcmc": "{"}),
    "metadata that are no record": lambda p: save_file({"w": torch.zeros(2)}, p, {"srmcmc": "[1]"}),
    "metadata with a key missing": lambda p: save_file(*without_kernel(p)),
    "another format": lambda p: save_file({"w": torch.zeros(2)}, p, {"srmcmc": '{"format": 99}'}),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_and_foreign_files_are_refused_by_name(full, tmp_path, damage):
    path = full.save(tmp_path / "my.safetensors")
    DAMAGE[damage](path)
    with pytest.raises(ValueError, match=str(path)):
        ShortRun.load(path)


class Trap:
    def __reduce__(self):
        return (exec, ("raise SystemExit('unpickled')",))


@pytest.mark.parametrize(
    "write", [lambda o, p: p.write_bytes(pickle.dumps(o)), torch.save], ids=["pickle", "torch.save"]
)
def test_loading_never_unpickles(tmp_path, write):
    path = tmp_path / "trap.safetensors"
    write(Trap(), path)
    with pytest.raises(ValueError, match="damaged or not a ShortRun checkpoint"):
        ShortRun.load(path)


def test_a_missing_checkpoint_lists_the_shipped_names(model, tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "PRETRAINED", tmp_path)
    monkeypatch.chdir(tmp_path)
    for name in ("trousers", "a_bag"):
        model.save(tmp_path / f"{name}.safetensors")
    with pytest.raises(FileNotFoundError, match=r"no checkpoint 'shoes'.*\['a_bag', 'trousers'\]"):
        ShortRun.load("shoes")
    assert torch.equal(ShortRun.load("trousers").sample(2, 0), model.sample(2, 0))  # and a shipped name is found


class Bilinear(nn.Module):
    """A custom f: not an EnergyNet, with a buffer, no config."""

    channels, image_size = 1, 8

    def __init__(self, hidden=3):
        super().__init__()
        self.inner = nn.Linear(64, hidden)
        self.register_buffer("scale", torch.tensor(2.0))

    def forward(self, x):
        return -self.scale * self.inner(x.flatten(1)).square().sum(1)


def test_a_custom_f_is_saved_and_filled_by_load(tmp_path):
    f = Bilinear()
    f.scale.fill_(0.5)
    model = ShortRun(f, Langevin(3, 0.1, 0.1))
    path = model.save(tmp_path / "custom.safetensors")
    with pytest.raises(ValueError, match="holds weights of a Bilinear: build one and pass it as f="):
        ShortRun.load(path)
    again = ShortRun.load(path, f=Bilinear())
    assert torch.equal(again.sample(2, 0), model.sample(2, 0))
    with pytest.raises(ValueError, match=f"the weights in {path} do not fit the network"):
        ShortRun.load(path, f=Bilinear(hidden=4))
