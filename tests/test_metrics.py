"""Metrics against independent formulas, and that they rank what they must."""

from urllib.error import URLError

import numpy as np
import pytest
import scipy.linalg
import torch
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from srmcmc_lib import observed
from srmcmc_lib.metrics import class_histogram, embed, nearest_images, sanity_rows, scores


def test_nearest_images_equal_a_plain_search():
    g = torch.Generator().manual_seed(0)
    x, images = torch.rand(7, 1, 4, 4, generator=g), torch.rand(20, 1, 4, 4, generator=g)
    distances, indices = nearest_images(x, images, k=3, batch_size=2)
    for i in range(7):
        rms = ((x[i] - images) ** 2).mean(dim=(1, 2, 3)).sqrt()
        expected = rms.argsort()[:3]
        assert indices[i].tolist() == expected.tolist()
        torch.testing.assert_close(distances[i], rms[expected])


def test_a_copy_is_found_at_distance_zero_and_black_lies_two_from_white():
    images = torch.stack([torch.full((1, 4, 4), v) for v in (-1.0, 1.0)])
    distances, indices = nearest_images(images[1:], images, k=2)
    assert indices.tolist() == [[1, 0]]
    torch.testing.assert_close(distances, torch.tensor([[0.0, 2.0]]))


@pytest.mark.parametrize("k", [0, 3])
def test_k_out_of_range_is_refused(k):
    with pytest.raises(ValueError, match=r"1 … 2"):
        nearest_images(torch.zeros(1, 1, 4, 4), torch.zeros(2, 1, 4, 4), k)


def test_other_shapes_are_refused():
    with pytest.raises(ValueError, match="agree"):
        nearest_images(torch.zeros(1, 1, 4, 4), torch.zeros(2, 3, 4, 4))


# ------------------------------------------------------------------------------------------------- distances in h-space


@pytest.fixture(scope="module")
def embedded():
    """Features and logits of 600 training images and of 600 test images as they are and spoilt."""
    rows = {"reference": observed("fashion_mnist", limit=600)}
    return {k: embed(v) for k, v in (rows | sanity_rows(observed("fashion_mnist", split="test", limit=600))).items()}


def test_frechet_equals_the_formula_by_scipy(embedded):
    a, b = (embedded[k][0].double().numpy() for k in ("test images, blurred 5×5", "reference"))
    Σa, Σb = np.cov(a.T), np.cov(b.T)
    root = scipy.linalg.sqrtm(Σa @ Σb).real
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(Σa + Σb - 2 * root)
    got = scores(embedded["test images, blurred 5×5"], embedded["reference"])["classifier_frechet"]
    assert got == pytest.approx(expected, rel=1e-3)


def test_the_metrics_rank_what_they_must(embedded):
    """Real images best, then a little noise and blur, p_0 far off; the class score tells garments from noise."""
    rows = {k: scores(v, embedded["reference"]) for k, v in embedded.items() if k != "reference"}
    real, noisy, blurred, p_0 = (rows[k] for k in rows)
    for name in ("classifier_frechet", "classifier_kernel"):
        assert real[name] < noisy[name] < p_0[name] and 5 * real[name] < blurred[name] < p_0[name]
    assert real["classifier_score"] > 6 > 2 * p_0["classifier_score"]
    assert real["images"] == real["reference"] == 600


def test_the_same_images_are_at_distance_zero(embedded):
    same = scores(embedded["reference"], embedded["reference"])
    assert abs(same["classifier_frechet"]) < 1e-3


def test_a_seed_repeats_the_kernel_distance_and_leaves_the_global_generator_alone(embedded):
    state = torch.get_rng_state()
    few = {k: (h[:120], logits[:120]) for k, (h, logits) in embedded.items()}
    pair = few["test images, blurred 5×5"], embedded["reference"]
    one, again, other = (scores(*pair, seed=s)["classifier_kernel"] for s in (0, 0, 1))
    assert one == again != other
    assert torch.equal(state, torch.get_rng_state())


def test_names_of_the_two_spaces_never_mix(monkeypatch, embedded):
    """Inception's weights cannot be had in CI: other features replace them, the rest is the real path."""
    from srmcmc_lib import metrics

    class Stub(torch.nn.Module):
        def forward(self, x):
            assert x.dtype == torch.uint8 and x.shape[1] == 3  # what Inception takes
            h = x.float().flatten(1)[:, :2048]
            return h, h[:, 1000:1010] / 255

    monkeypatch.setattr(metrics, "_inception", Stub)
    images = observed("fashion_mnist_mini", limit=100)
    got = scores(images[:50], images[50:], space="inception")
    assert got.keys() == {"FID", "KID", "IS", "images", "reference"}
    assert not got.keys() & {"classifier_frechet", "classifier_kernel", "classifier_score"}
    with pytest.raises(ValueError, match="unknown; choose one of classifier, inception"):
        scores(images, images, space="vgg")


def test_inception_weights_that_cannot_be_fetched_are_named(monkeypatch):
    def no_network(*_, **__):
        raise URLError("no network")

    monkeypatch.setattr("torch_fidelity.feature_extractor_inceptionv3.load_state_dict_from_url", no_network)
    with pytest.raises(FileNotFoundError, match=r"Inception-v3.*https://.*space='classifier'"):
        embed(observed("fashion_mnist_mini", limit=2), "inception")


def test_inceptions_two_outputs_are_features_and_logits(monkeypatch):
    """The real network, its weights random: those are all that CI cannot fetch."""
    torch.manual_seed(0)
    monkeypatch.setattr("torch_fidelity.feature_extractor_inceptionv3.load_state_dict_from_url", lambda *_, **__: {})
    monkeypatch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
    h, logits = embed(observed("fashion_mnist_mini", limit=3), "inception", batch_size=2)
    assert h.shape == (3, 2048) and logits.shape == (3, 1008)


def test_features_of_the_other_space_are_refused(embedded):
    with pytest.raises(ValueError, match="inception space has 2048 features"):
        scores(embedded["reference"], embedded["test images"], space="inception")


def test_floats_and_other_sizes_are_refused():
    with pytest.raises(ValueError, match="to_uint8"):
        embed(torch.zeros(2, 1, 32, 32))
    with pytest.raises(ValueError, match=r"\[n, 1, 32, 32\]"):
        embed(observed("fashion_mnist_mini", 28, limit=2))


def test_class_histogram_by_hand():
    logits = torch.eye(4)[[0, 0, 1, 2, 2, 2, 2, 2]]
    share, entropy = class_histogram(logits)
    assert share.tolist() == [0.25, 0.125, 0.625, 0.0]
    assert entropy == pytest.approx(-sum(p * np.log(p) for p in (0.25, 0.125, 0.625)))


def test_classes_of_the_test_images_are_even(embedded):
    share, entropy = class_histogram(embedded["test images"][1])
    assert share.min() > 0.05 and entropy > 2.2
