"""The classifier, its features h(x) (frozen, gradients reach x alone), and the energy that is linear in them."""

import json

import numpy as np
import pytest
import torch

from srmcmc_lib import LinearEnergy, observed, paths
from srmcmc_lib.data import labels, to_float
from srmcmc_lib.features import NAME, load_classifier, load_features, responses

x = pytest.fixture(lambda: to_float(observed("fashion_mnist_mini", limit=6)))


def test_the_shipped_classifier_is_as_good_as_its_card_says():
    card = json.loads((paths.PRETRAINED / f"{NAME}.json").read_text(encoding="utf-8"))
    images, y = observed("fashion_mnist", split="test", limit=1_000), labels("fashion_mnist", "test", limit=1_000)
    model = load_classifier()
    right = responses(model, images).argmax(1) == y
    assert card["test_accuracy"] >= 0.91 and abs(right.float().mean() - card["test_accuracy"]) < 0.03
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    torch.testing.assert_close(responses(model, images[:9], batch_size=2), model(to_float(images[:9])))


def test_a_missing_or_damaged_file_is_refused_by_name(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.safetensors; .*train_classifier"):
        load_classifier(tmp_path / "none.safetensors")
    good = (paths.PRETRAINED / f"{NAME}.safetensors").read_bytes()
    for content in (good[: len(good) // 2], bytes(len(good))):
        (tmp_path / "damaged.safetensors").write_bytes(content)
        with pytest.raises(ValueError, match=r"damaged\.safetensors is damaged or not a classifier"):
            load_classifier(tmp_path / "damaged.safetensors")


@pytest.mark.parametrize(("layer", "d"), [(1, 32), (2, 64), (3, 128), (np.int64(4), 128), (None, 128)])
def test_the_classifiers_layers_are_averaged_over_space(x, layer, d):
    h, model = load_features(layer), load_classifier()
    assert h.size == d
    torch.testing.assert_close(h(x), model.stages[: layer or 4](x).mean((2, 3)))
    torch.testing.assert_close(load_features(layer, model)(x), h(x))
    h.train()(x.requires_grad_()).sum().backward()  # train as a module that contains h may ask
    assert x.grad.abs().sum() > 0 and not any(p.requires_grad for p in h.parameters())


def test_wrong_layers_and_images_are_refused(x):
    for layer in (0, True):
        with pytest.raises(ValueError, match="layer must be an integer in 1 … 4"):
            load_features(layer)
    with pytest.raises(ValueError, match=r"\[B, 1, 32, 32\], got \[6, 1, 16, 16\]"):
        load_features()(x[..., ::2, ::2])
    with pytest.raises(ValueError, match=r"\(channels, image_size\) = \(1, 32\), got \(3, 32\)"):
        LinearEnergy(channels=3)


def test_the_linear_energy_is_the_inner_product_and_its_config_builds_it_again(x):
    f, h = LinearEnergy(layer=2), load_features(2)(x)
    assert not f.theta.any() and f.piecewise_linear
    f.inner.weight.data.normal_()
    torch.testing.assert_close(f(x), h @ f.theta)
    f(x).mean().backward()
    torch.testing.assert_close(f.inner.weight.grad[0], h.mean(0))
    for each in (f, LinearEnergy(trained=False)):
        assert [name for name, p in each.named_parameters() if p.requires_grad] == ["inner.weight"]
    f = LinearEnergy(np.int64(1), 32, np.int64(2), source=NAME)
    assert json.loads(json.dumps(f.config)) == {"channels": 1, "image_size": 32, "layer": 2, "source": NAME}
    assert LinearEnergy(**f.config).state_dict().keys() == f.state_dict().keys()
