"""The classifier: its shape, that it learns, that the shipped one is as good as its card says."""

import json

import pytest
import torch

from srmcmc_lib import observed, paths
from srmcmc_lib.classifier import NAME, Classifier, load_classifier, train_classifier
from srmcmc_lib.data import labels, to_float
from srmcmc_lib.features import responses


def test_a_few_steps_of_learning_beat_chance_by_far_and_a_seed_repeats_them():
    images, targets = observed("fashion_mnist_mini", limit=768), labels("fashion_mnist_mini", limit=768)
    first, again, other = (train_classifier(images, targets, epochs=3, batch_size=64, seed=s) for s in (0, 0, 1))
    held_out = to_float(observed("fashion_mnist_mini", split="test", limit=300))
    right = responses(first, held_out).argmax(1) == labels("fashion_mnist_mini", "test", limit=300)
    assert right.float().mean() > 0.5  # chance: 0.1
    assert torch.equal(responses(first, held_out), responses(again, held_out))
    assert not torch.equal(responses(first, held_out), responses(other, held_out))
    assert not first.training and not any(p.requires_grad for p in first.parameters())


def test_the_shipped_classifier_is_as_good_as_its_card_says():
    card = json.loads((paths.PRETRAINED / f"{NAME}.json").read_text(encoding="utf-8"))
    assert card["test_accuracy"] >= 0.91
    x, y = to_float(observed("fashion_mnist", split="test")), labels("fashion_mnist", "test")
    p = responses(load_classifier(), x)
    assert abs((p.argmax(1) == y).float().mean().item() - card["test_accuracy"]) < 5e-4


def test_a_missing_or_damaged_file_is_refused_by_name(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"none\.safetensors: give a \.safetensors file"):
        load_classifier(tmp_path / "none.safetensors")
    monkeypatch.setattr(paths, "PRETRAINED", tmp_path)  # where the shipped one is missing
    with pytest.raises(FileNotFoundError, match=r"python -m srmcmc_lib\.classifier"):
        load_classifier()
    monkeypatch.undo()
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(b"not weights")
    with pytest.raises(ValueError, match=r"damaged\.safetensors is damaged"):
        load_classifier(damaged)
    with pytest.raises(ValueError, match="not a classifier"):
        load_classifier(paths.PRETRAINED / "fashion_mnist_mini.safetensors")


def test_images_do_not_influence_each_other():
    torch.manual_seed(0)
    model, x = Classifier().eval(), torch.rand(4, 1, 32, 32) * 2 - 1
    torch.testing.assert_close(model(x)[:1], model(x[:1]))
