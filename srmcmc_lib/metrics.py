"""How good are the samples: torchmetrics' distances in two feature spaces, classes, memorisation.

Two spaces that must never be confused, so their numbers have different names. In Inception-v3 space, the paper's, they
are FID, KID and IS. In the space of the shipped Fashion-MNIST classifier, which needs no network, they are
classifier_frechet, classifier_kernel and classifier_score; neither has a scale that is known elsewhere.
"""

import warnings

import torch
from torch import Generator, Tensor, nn
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.inception import InceptionScore
from torchmetrics.image.kid import KernelInceptionDistance
from torchvision.transforms.v2.functional import gaussian_blur

from .classifier import load_classifier
from .data import check_images, to_float, to_uint8
from .devices import ranks
from .features import features, responses

NAMES = {
    "classifier": ("classifier_frechet", "classifier_kernel", "classifier_score"),
    "inception": ("FID", "KID", "IS"),
}
WIDTHS = {"classifier": 128, "inception": 2048}  # d, by which the features of one space are told from the other's


@torch.no_grad()
def embed(images: Tensor, space: str = "classifier", batch_size: int = 250) -> tuple[Tensor, Tensor]:
    """(features [n, d], logits [n, classes]) of uint8 images [n, C, H, W] in "classifier" or "inception" space.

    Raises:
        ValueError: an unknown space; images that are not uint8, or that the classifier does not take.
        FileNotFoundError: the Inception weights are not here and cannot be fetched.
    """
    if space not in NAMES:
        raise ValueError(f"space={space!r} is unknown; choose one of {', '.join(NAMES)}")
    device = ranks().device
    if space == "classifier":
        h, model = features().to(device), load_classifier()
        check_images(images, (model.channels, model.image_size, model.image_size))
        parts = responses(h, images, batch_size).cpu()
        return parts, model.linear(parts)
    check_images(images, images.shape[1:])
    net = _inception().to(device)
    parts = [net(part.to(device).expand(-1, 3, -1, -1)) for part in images.split(batch_size)]
    return tuple(torch.cat(p).cpu() for p in zip(*parts, strict=True))


def _inception() -> nn.Module:
    """The network that torchmetrics' FID uses, asked for both its outputs at once."""
    try:
        return FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"])
    except OSError as error:  # urllib's errors are OSErrors
        raise FileNotFoundError(
            f"the Inception-v3 weights could not be fetched ({error}): put {URL_INCEPTION_V3} in "
            f"{torch.hub.get_dir()}/checkpoints (92 MB), or use space='classifier', which is shipped"
        ) from error


def scores(images: Tensor | tuple, reference: Tensor | tuple, space: str = "classifier", seed: int = 0) -> dict:
    """Fréchet distance, kernel distance and class score of images against a reference.

    Args:
        images, reference: uint8 [n ≥ 2, C, H, W], or what `embed` made of them.
        space: "classifier" or "inception".
        seed: of the subsets over which the kernel distance is averaged (100 of 1,000 images, or of all if fewer).

    Returns:
        classifier_frechet, classifier_kernel, classifier_score (or FID, KID, IS), images and reference (their numbers).

    Raises:
        ValueError: as `embed`, or features of the other space.
    """
    h, logits = images if isinstance(images, tuple) else embed(images, space)
    h_reference, _ = reference if isinstance(reference, tuple) else embed(reference, space)
    if (got := {h.shape[1], h_reference.shape[1]}) != {WIDTHS[space]}:
        raise ValueError(f"{space} space has {WIDTHS[space]} features, not {sorted(got)}: embed the images in it first")
    given = nn.Identity()  # passes features on: each image goes through the network once for all metrics
    given.num_features = h.shape[1]
    subset = min(1_000, len(h), len(h_reference))
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.filterwarnings("ignore", message=".*will save all extracted features")
        torch.manual_seed(seed)  # torchmetrics draws its subsets from the global generator
        frechet, score = FrechetInceptionDistance(given), InceptionScore(given)
        kernel = KernelInceptionDistance(given, subset_size=subset)
        for metric in (frechet, kernel):
            metric.update(h_reference, real=True)
            metric.update(h, real=False)
        score.update(logits)
        values = (frechet.compute(), kernel.compute()[0], score.compute()[0])
    named = {name: value.item() for name, value in zip(NAMES[space], values, strict=True)}
    return named | {"images": len(h), "reference": len(h_reference)}


def sanity_rows(images: Tensor, seed: int = 0) -> dict[str, Tensor]:
    """What a metric must rank: test images, three ways of spoiling them, uint8 [n, C, H, W] each, best first as a rule.

    Test images (the floor), these plus N(0, 0.1²) (in [-1, 1] units), blurred by a Gaussian of 5×5 pixels (σ = 1.1,
    torchvision's usual one for that size), and p_0 = U(-1, 1) noise.
    """
    x, g = to_float(images), Generator().manual_seed(seed)
    rows = {
        "test images": x,
        "test images + N(0, 0.1²)": x + 0.1 * torch.randn(x.shape, generator=g),
        "test images, blurred 5×5": gaussian_blur(x, [5, 5]),
        "p_0 noise": 2 * torch.rand(x.shape, generator=g) - 1,
    }
    return {name: to_uint8(row) for name, row in rows.items()}


def class_histogram(logits: Tensor) -> tuple[Tensor, float]:
    """(share of each class [classes], entropy in nats) by the most likely class; ten even classes: 2.30."""
    share = torch.bincount(logits.argmax(1), minlength=logits.shape[1]) / len(logits)
    return share, torch.special.entr(share).sum().item()


def nearest_images(x: Tensor, images: Tensor, k: int = 1, batch_size: int = 256) -> tuple[Tensor, Tensor]:
    """The k nearest of `images` to each of `x`, by root mean squared difference per pixel.

    Args:
        x: float [n, C, H, W] in [-1, 1].
        images: float [N ≥ k, C, H, W] in [-1, 1].
        k: neighbours, nearest first.
        batch_size: rows of x at once; bounds memory at batch_size · N floats.

    Returns:
        (distances [n, k] in 0 … 2, indices into images [n, k]).
    """
    if not 1 <= k <= len(images):
        raise ValueError(f"k must lie in 1 … {len(images)} (the number of images), got {k!r}")
    if x.shape[1:] != images.shape[1:]:
        raise ValueError(f"x and images must agree in [C, H, W], got {list(x.shape[1:])} and {list(images.shape[1:])}")
    flat, parts = images.flatten(1), []
    for rows in x.flatten(1).split(batch_size):
        parts.append(torch.cdist(rows, flat).topk(k, largest=False))
    distances, indices = (torch.cat(p) for p in zip(*parts, strict=True))
    return distances / flat.shape[1] ** 0.5, indices
