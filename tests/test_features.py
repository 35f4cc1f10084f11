"""h(x): frozen, in eval mode, gradients with respect to x only, from the classifier or from torchvision's networks."""

from urllib.error import URLError

import pytest
import torch

from srmcmc_lib import observed
from srmcmc_lib.classifier import load_classifier
from srmcmc_lib.data import to_float
from srmcmc_lib.features import STAGES, features


@pytest.fixture
def x():
    return to_float(observed("fashion_mnist_mini", limit=6))


@pytest.mark.parametrize(("layer", "d"), [(1, 32), (2, 64), (3, 128), (4, 128), (None, 128)])
def test_the_classifiers_layers_are_averaged_over_space(x, layer, d):
    h, stages = features(layer=layer), load_classifier().stages
    assert h.size == h.num_features == d
    torch.testing.assert_close(h(x), stages[: layer or 4](x).mean((2, 3)))


def test_pooling_over_cells_multiplies_d(x):
    h = features(layer=4, pool=2)
    assert h.size == 512
    torch.testing.assert_close(h(x).unflatten(1, (128, 4)).mean(2), features(layer=4)(x))


def test_gradients_reach_x_and_nothing_else(x):
    h = features()
    h.train()  # as a module that contains h may ask
    before = {k: v.clone() for k, v in h.state_dict().items()}
    x.requires_grad_()
    h(x).sum().backward()
    assert x.grad.abs().sum() > 0
    assert not h.responses.training and not any(p.requires_grad for p in h.parameters())
    assert all(torch.equal(v, before[k]) for k, v in h.state_dict().items())  # batch statistics among them


def test_features_know_the_classes(x):
    """Real garments of one class lie closer together than those of two: the space means something."""
    from srmcmc_lib.data import labels

    h, y = (
        features()(to_float(observed("fashion_mnist", split="test", limit=300))),
        labels("fashion_mnist", "test", 300),
    )
    distances, same = torch.cdist(h, h), y[:, None] == y
    off = ~torch.eye(300, dtype=bool)
    assert distances[same & off].mean() < 0.7 * distances[~same].mean()


@pytest.mark.parametrize("name", sorted(STAGES))
def test_torchvisions_networks_through_the_same_interface(x, name):
    sizes = []
    for layer in (1, len(STAGES[name])):
        torch.manual_seed(0)
        h = features(name, layer, weights=None)
        sizes.append(h.size)
        assert h(x).shape == (6, h.size) and h(x.expand(-1, 3, -1, -1)).allclose(h(x))
    assert sizes == [64, 512]


def test_weights_that_cannot_be_fetched_are_named(monkeypatch, tmp_path):
    def no_network(*_, **__):
        raise URLError("no network")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub.download_url_to_file", no_network)
    with pytest.raises(FileNotFoundError, match=r"https://.*resnet18.*fashion_mnist_classifier"):
        features("resnet18")


@pytest.mark.parametrize("wrong", [{"layer": 0}, {"layer": 5}, {"layer": 2.0}, {"pool": 0}, {"pool": True}])
def test_arguments_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be an integer in 1 …"):
        features(**wrong)


def test_images_of_another_kind_are_refused(x):
    with pytest.raises(ValueError, match=r"\[B, 1, 32, 32\], got \[6, 1, 16, 16\]"):
        features()(x[..., ::2, ::2])
    with pytest.raises(ValueError, match="float images"):
        features()(observed("fashion_mnist_mini", limit=2))
