"""EnergyNet: the paper's parameter table, gradients against finite differences, padding, clear errors. LinearEnergy."""

import shutil
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck
from torch.func import functional_call

from srmcmc_lib import EnergyNet, Langevin, LinearEnergy, ShortRun, TrainConfig, observed, paths, train
from srmcmc_lib.data import to_float
from srmcmc_lib.energy import ACTIVATIONS
from srmcmc_lib.features import features

PAPER_32 = [  # n_f = 32, C = 3: (weight's shape, weights + biases), worked out by hand from the paper's table
    ((32, 3, 3, 3), 864 + 32),
    ((64, 32, 4, 4), 32_768 + 64),
    ((128, 64, 4, 4), 131_072 + 128),
    ((256, 128, 4, 4), 524_288 + 256),
    ((1, 256, 4, 4), 4_096 + 1),
]


def parameter_table(net: EnergyNet) -> list:
    return [(tuple(m.weight.shape), m.weight.numel() + m.bias.numel()) for m in net.layers if hasattr(m, "weight")]


def test_parameters_are_the_papers_table():
    net = EnergyNet(channels=3, image_size=32, width=32)
    assert parameter_table(net) == PAPER_32
    assert sum(p.numel() for p in net.parameters()) == 693_569  # nothing but these convolutions: no normalisation
    assert EnergyNet(3, 32).config == net.config  # n_f = 32 is the default


@pytest.mark.parametrize(
    ("size", "maps"),
    [(5, [8, 16]), (8, [8, 16]), (16, [8, 16, 32]), (28, [8, 16, 32, 64]), (32, [8, 16, 32, 64]),
     (64, [8, 16, 32, 64, 128]), (128, [8, 16, 32, 64, 128, 256])],
)  # fmt: skip
def test_each_doubling_of_the_image_adds_one_stage_of_twice_the_maps(size, maps):
    shapes = [shape for shape, _ in parameter_table(EnergyNet(1, size, width=8))]
    stages = [(out, into, 4, 4) for into, out in pairwise(maps)]
    assert shapes == [(8, 1, 3, 3), *stages, (1, maps[-1], 4, 4)]


def test_forward_is_the_papers_table_written_out():
    """Strides, paddings and the slope 0.2, which shapes alone don't show."""
    net, x = EnergyNet(3, 32, width=4).double(), torch.randn(5, 3, 32, 32, dtype=torch.float64)
    (w1, b1, w2, b2, w3, b3, w4, b4, w5, b5) = net.parameters()
    h = F.conv2d(x, w1, b1, stride=1, padding=1)
    for w, b in ((w2, b2), (w3, b3), (w4, b4)):
        h = F.conv2d(torch.where(h > 0, h, 0.2 * h), w, b, stride=2, padding=1)
    h = F.conv2d(torch.where(h > 0, h, 0.2 * h), w5, b5)
    assert h.shape == (5, 1, 1, 1)
    torch.testing.assert_close(net(x), h[:, 0, 0, 0])


@pytest.mark.parametrize("size", [5, 8, 16])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients_equal_finite_differences(activation, size):
    """∂f/∂x and ∂f/∂θ in float64; for leaky_relu the seed keeps every pre-activation off its kink."""
    net = EnergyNet(2, size, width=2, activation=activation).double()
    x = torch.randn(2, 2, size, size, dtype=torch.float64, requires_grad=True)
    names, θ = zip(*net.named_parameters(), strict=True)
    fast = size > 8  # gradcheck's random projections instead of every entry
    assert gradcheck(lambda x: net(x), x, fast_mode=fast)
    assert gradcheck(lambda *θ: functional_call(net, dict(zip(names, θ, strict=True)), x.detach()), θ, fast_mode=fast)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_piecewise_linear_tells_whether_the_second_derivative_vanishes(activation):
    net = EnergyNet(1, 8, width=4, activation=activation).double()
    x = torch.randn(1, 1, 8, 8, dtype=torch.float64, requires_grad=True)
    (g,) = torch.autograd.grad(net(x).sum(), x, create_graph=True)
    curvature = torch.autograd.grad((g * g.detach()).sum(), x, allow_unused=True)[0] if g.requires_grad else None
    vanishes = curvature is None or curvature.abs().max() == 0
    assert vanishes == net.piecewise_linear == (activation == "leaky_relu")


@pytest.mark.parametrize(("size", "pads"), [(28, (2, 2)), (31, (0, 1)), (17, (7, 8))])
def test_other_sizes_equal_the_32_network_on_the_zero_padded_image(size, pads):
    small, paper = EnergyNet(3, size, width=4), EnergyNet(3, 32, width=4)
    paper.load_state_dict(small.state_dict())
    x = torch.randn(3, 3, size, size)
    torch.testing.assert_close(small(x), paper(F.pad(x, pads * 2)))


def test_images_do_not_influence_each_other():
    net, x = EnergyNet(1, 16, width=4).double(), torch.randn(6, 1, 16, 16, dtype=torch.float64)
    torch.testing.assert_close(net(x), torch.cat([net(one[None]) for one in x]))


@pytest.mark.parametrize(
    "config", [dict(channels=3, image_size=28, width=5, activation="gelu"), dict(channels=1, image_size=64)]
)
def test_config_builds_the_same_network_again(config):
    net = EnergyNet(**config)
    again = EnergyNet(**net.config)
    again.load_state_dict(net.state_dict())
    x = torch.randn(2, net.channels, net.image_size, net.image_size)
    assert torch.equal(net(x), again(x))
    assert config.items() <= net.config.items()


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (dict(image_size=4), "image_size must be an integer in 5 … 1024, got 4"),
        (dict(image_size=1025), "image_size must be an integer"),
        (dict(image_size=32.0), "image_size must be an integer"),
        (dict(channels=0), "channels must be an integer"),
        (dict(channels=None), "channels must be an integer"),
        (dict(width=-1), "width must be an integer"),
        (dict(width="32"), "width must be an integer"),
        (dict(width=True), "width must be an integer"),
        (dict(activation="relu"), "activation='relu' is unknown; choose one of leaky_relu, silu, gelu, softplus"),
    ],
)
def test_bad_settings_are_refused(bad, message):
    with pytest.raises(ValueError, match=message):
        EnergyNet(**(dict(channels=1, image_size=32) | bad))


@pytest.mark.parametrize("shape", [(2, 1, 32, 28), (2, 1, 28, 28), (2, 3, 32, 32), (1, 32, 32), (2, 1, 1, 32, 32)])
def test_images_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match=r"images of shape \[B, 1, 32, 32\], got \["):
        EnergyNet(1, 32, width=2)(torch.zeros(shape))


@pytest.fixture
def linear():
    """A LinearEnergy on the classifier's second layer, θ random."""
    f = LinearEnergy(layer=2)
    with torch.no_grad():
        f.theta.normal_(generator=torch.Generator().manual_seed(0))
    return f


def test_linear_energy_is_the_inner_product_and_its_gradient_the_mean_of_h(linear):
    x, h = to_float(observed("fashion_mnist_mini", limit=5)), features(layer=2)
    assert linear.theta.shape == (64,)
    torch.testing.assert_close(linear(x), h(x) @ linear.theta)
    linear(x).mean().backward()
    torch.testing.assert_close(linear.inner.weight.grad[0], h(x).mean(0))
    assert not any(p.requires_grad for p in linear.h.parameters())


def test_linear_energy_starts_at_theta_zero_where_the_chain_adds_nothing_but_noise():
    model = ShortRun(LinearEnergy(layer=1), Langevin(steps=2, noise=0.0))
    z = model.draw_z(2, seed=0)
    assert torch.equal(model(z), z)


def test_linear_energy_is_piecewise_linear(linear):
    """Its gradient is the same at x and beside it, but for the few pixels whose ReLUs turn in between."""
    x = torch.randn(1, 1, 32, 32, dtype=torch.float64)
    gradients = []
    for t in (0.0, 1e-7):
        moved = (x + t * torch.randn(x.shape, generator=torch.Generator().manual_seed(1))).requires_grad_()
        gradients.append(torch.autograd.grad(linear.double()(moved).sum(), moved)[0])
    assert linear.piecewise_linear and (gradients[0] == gradients[1]).double().mean() > 0.9


def test_a_linear_energy_is_saved_with_its_features_and_loaded_by_name_alone(linear, tmp_path):
    with torch.no_grad():
        linear.h.responses[0][0].weight.mul_(1.5)  # as if the shipped classifier had been another one then
    model = ShortRun(linear, Langevin(steps=3), dataset="fashion_mnist_mini")
    again = ShortRun.load(model.save(tmp_path / "linear.safetensors"))
    assert again.config == model.config and again.config["network"]["class"] == "LinearEnergy"
    assert torch.equal(again.sample(2, seed=0), model.sample(2, seed=0))


def test_a_saved_linear_energy_needs_no_more_where_its_features_came_from(tmp_path):
    source = tmp_path / "mine.safetensors"
    shutil.copyfile(paths.PRETRAINED / "fashion_mnist_classifier.safetensors", source)
    model = ShortRun(LinearEnergy(source=str(source), layer=1), Langevin(steps=2))
    path = model.save(tmp_path / "linear.safetensors")
    source.unlink()
    again = ShortRun.load(path)
    assert again.config == model.config
    assert torch.equal(again.f.h.responses[0][0].weight, model.f.h.responses[0][0].weight)


def test_algorithm_1_moves_theta_and_nothing_else():
    model, images = ShortRun(LinearEnergy(layer=1), Langevin(steps=2)), observed("fashion_mnist_mini", limit=8)
    before = {k: v.clone() for k, v in model.f.state_dict().items()}
    list(train(model, images, TrainConfig(updates=2, batch_size=4, average=0.5, progress=False)))
    moved = [k for k, v in model.f.state_dict().items() if not torch.equal(v, before[k])]
    assert moved == ["inner.weight"]


def test_a_linear_energy_refuses_images_that_its_features_do_not_take():
    with pytest.raises(ValueError, match="takes images with channels=1, image_size=32, got 3 and 32"):
        LinearEnergy(channels=3)
    with pytest.raises(ValueError, match="layer must be an integer in 1 … 4"):
        LinearEnergy(layer=7)
