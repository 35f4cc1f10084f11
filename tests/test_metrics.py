"""Metrics against independent formulas, and that they rank what they must."""

from unittest.mock import Mock
from urllib.error import URLError

import numpy as np
import pytest
import scipy.linalg
import torch
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from srmcmc_lib import metrics, observed
from srmcmc_lib.metrics import class_shares, embed, nearest_images, sanity_rows, scores

INCEPTION = "torch_fidelity.feature_extractor_inceptionv3.load_state_dict_from_url"


@pytest.fixture(scope="module")
def embedded():
    """Features and logits of 600 training images and of 600 test images as they are and spoilt."""
    rows = {"reference": observed("fashion_mnist", limit=600)}
    return {k: embed(v) for k, v in (rows | sanity_rows(observed("fashion_mnist", split="test", limit=600))).items()}


def test_nearest_images_equal_a_plain_search_and_class_shares_a_count():
    x, images = torch.rand(7, 1, 4, 4), torch.rand(20, 1, 4, 4)
    distances, indices = nearest_images(x, images, k=3, batch_size=2)
    for i in range(7):
        rms = ((x[i] - images) ** 2).mean(dim=(1, 2, 3)).sqrt()
        assert indices[i].tolist() == rms.argsort()[:3].tolist()
        torch.testing.assert_close(distances[i], rms[indices[i]])
    share, entropy = class_shares(torch.eye(4)[[0, 0, 1, 2, 2, 2, 2, 2]])
    assert share.tolist() == [0.25, 0.125, 0.625, 0.0]
    assert entropy == pytest.approx(-sum(p * np.log(p) for p in (0.25, 0.125, 0.625)))


def test_the_metrics_rank_what_they_must_and_frechet_is_the_formula_by_scipy(embedded):
    same, real, noisy, blurred, p_0 = (scores(v, embedded["reference"]) for v in embedded.values())
    for name in ("classifier_frechet", "classifier_kernel"):
        assert real[name] < noisy[name] < p_0[name] and 5 * real[name] < blurred[name] < p_0[name]
    assert abs(same["classifier_frechet"]) < 1e-3 and real["classifier_score"] > 6 > 2 * p_0["classifier_score"]
    assert real["images"] == real["reference"] == 600
    a, b = (embedded[k][0].double().numpy() for k in ("test images, blurred 5×5", "reference"))
    Σa, Σb = np.cov(a.T), np.cov(b.T)
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(Σa + Σb - 2 * scipy.linalg.sqrtm(Σa @ Σb).real)
    assert blurred["classifier_frechet"] == pytest.approx(expected, rel=1e-3)


def test_a_seed_repeats_the_kernel_distance_and_leaves_the_global_generator_alone(embedded):
    state, few = torch.get_rng_state(), tuple(x[:120] for x in embedded["test images, blurred 5×5"])
    one, again, other = (scores(few, embedded["reference"], seed=s)["classifier_kernel"] for s in (0, np.int64(0), 1))
    assert one == pytest.approx(again, rel=1e-6) and one != pytest.approx(other, rel=1e-6)
    assert torch.equal(state, torch.get_rng_state())


def test_inceptions_two_outputs_are_features_and_logits_and_have_names_of_their_own(monkeypatch, embedded):
    """The real network, its weights random: those are all that CI cannot fetch."""
    monkeypatch.setattr(INCEPTION, lambda *_, **__: {})
    monkeypatch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
    h, logits = embed(observed("fashion_mnist_mini", limit=3), "inception", batch_size=2)
    metrics._inception.cache_clear()
    assert h.shape == (3, 2048) and logits.shape == (3, 1008)
    assert scores((h, logits), (h, logits), space="inception").keys() == {"FID", "KID", "IS", "images", "reference"}
    with pytest.raises(ValueError, match="inception space has 2048 features"):
        scores(embedded["reference"], embedded["test images"], space="inception")


def test_missing_weights_floats_other_sizes_and_other_spaces_are_refused(monkeypatch):
    images = observed("fashion_mnist_mini", limit=2)
    monkeypatch.setattr(INCEPTION, Mock(side_effect=URLError("no network")))
    with pytest.raises(FileNotFoundError, match=r"Inception-v3.*https://.*space='classifier'"):
        embed(images, "inception")
    for bad, space, message in (
        (images.float(), "classifier", "to_uint8"),
        (images[..., :28, :28], "classifier", r"\[n, 1, 32, 32\]"),
        (images, "vgg", "unknown; choose one of classifier, inception"),
    ):
        with pytest.raises(ValueError, match=message):
            embed(bad, space)
