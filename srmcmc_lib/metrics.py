"""How good are the samples: torchmetrics' distances in two feature spaces, classes, memorisation."""

import warnings
from functools import cache

import torch
from torch import Generator, Tensor, nn
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.inception import InceptionScore
from torchmetrics.image.kid import KernelInceptionDistance
from torchvision.transforms.v2.functional import gaussian_blur

from .data import check_images, to_float, to_uint8
from .features import load_classifier, load_features, responses

NAMES = {  # of the scores in each space: never to be confused
    "classifier": ("classifier_frechet", "classifier_kernel", "classifier_score"),  # comparable in this project only
    "inception": ("FID", "KID", "IS"),  # the paper's
}
WIDTHS = {"classifier": 128, "inception": 2048}  # d: tells which space features come from


@torch.no_grad()
def embed(images: Tensor, space: str = "classifier", batch_size: int = 250, device="cpu") -> tuple[Tensor, Tensor]:
    """(features [n, d], logits [n, classes]) of uint8 images [n, C, H, W] in a space of NAMES, computed on device.

    Raises ValueError for an unknown space or images that it does not take, FileNotFoundError for missing weights.
    """
    if space not in NAMES:
        raise ValueError(f"space={space!r} is unknown; choose one of {', '.join(NAMES)}")
    if space == "classifier":
        model = load_classifier()
        check_images(images, (model.channels, model.image_size, model.image_size))
        features = responses(load_features(source=model).to(device), images, batch_size).cpu()
        return features, model.linear(features)
    check_images(images, images.shape[1:])
    net = _inception().to(device)
    parts = [net(part.to(device).expand(-1, 3, -1, -1)) for part in images.split(batch_size)]
    return tuple(torch.cat(p).cpu() for p in zip(*parts, strict=True))


@cache
def _inception() -> nn.Module:
    try:  # the network that torchmetrics' FID uses, asked for both its outputs at once
        return FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"]).eval()
    except OSError as error:  # urllib's errors are OSErrors
        remedy = f"put {URL_INCEPTION_V3} (92 MB) in {torch.hub.get_dir()}/checkpoints, or use space='classifier'"
        raise FileNotFoundError(f"the Inception-v3 weights could not be fetched ({error}): {remedy}") from error


def scores(images: Tensor | tuple, reference: Tensor | tuple, space: str = "classifier", seed: int = 0) -> dict:
    """Fréchet distance, kernel distance and class score against a reference, named as in NAMES, and how many images.

    images, reference: uint8 [n ≥ 2, C, H, W], or what `embed` made of them (ValueError where in another space).
    seed: of the 100 subsets over which the kernel distance is averaged, of 1,000 images, or of all if fewer.
    """
    (h, logits), (h_reference, _) = (x if isinstance(x, tuple) else embed(x, space) for x in (images, reference))
    if (got := {h.shape[1], h_reference.shape[1]}) != {WIDTHS[space]}:
        raise ValueError(f"{space} space has {WIDTHS[space]} features, not {sorted(got)}: embed the images in it first")
    given = nn.Identity()  # passes features on: each image goes through the network once for all metrics
    given.num_features = h.shape[1]
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.filterwarnings("ignore", message=".*will save all extracted features")
        torch.default_generator.manual_seed(int(seed))  # torchmetrics draws its subsets from the global generator
        frechet, score = FrechetInceptionDistance(given), InceptionScore(given)
        kernel = KernelInceptionDistance(given, subset_size=min(1_000, len(h), len(h_reference)))
        for metric in (frechet, kernel):
            metric.update(h_reference, real=True)
            metric.update(h, real=False)
        score.update(logits)
        values = (frechet.compute().item(), kernel.compute()[0].item(), score.compute()[0].item())
    return dict(zip(NAMES[space], values, strict=True)) | {"images": len(h), "reference": len(h_reference)}


def sanity_rows(images: Tensor, seed: int = 0) -> dict[str, Tensor]:
    """What a metric must rank: test images and three ways of spoiling them, uint8 [n, C, H, W], usually best first."""
    x, g = to_float(images), Generator().manual_seed(seed)
    return {
        "test images": images,
        "test images + N(0, 0.1²)": to_uint8(x + 0.1 * torch.randn(x.shape, generator=g)),
        "test images, blurred 5×5": to_uint8(gaussian_blur(x, [5, 5])),
        "p_0 noise": to_uint8(2 * torch.rand(x.shape, generator=g) - 1),
    }


def class_shares(logits: Tensor) -> tuple[Tensor, float]:
    """(share of each class [classes], their entropy in nats) by the most likely class; ten even classes: 2.30."""
    share = torch.bincount(logits.argmax(1), minlength=logits.shape[1]) / len(logits)
    return share, torch.special.entr(share).sum().item()


def nearest_images(x: Tensor, images: Tensor, k: int = 1, batch_size: int = 256) -> tuple[Tensor, Tensor]:
    """The k of `images` nearest to each x, float [n, C, H, W] in [-1, 1]: (RMS distances in 0 … 2, indices) [n, k]."""
    flat = images.flatten(1)  # in memory at once: batch_size · len(images) distances
    parts = [torch.cdist(rows, flat).topk(k, largest=False) for rows in x.flatten(1).split(batch_size)]
    distances, indices = (torch.cat(p) for p in zip(*parts, strict=True))
    return distances / flat.shape[1] ** 0.5, indices
