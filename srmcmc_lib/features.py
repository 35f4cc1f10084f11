"""Fixed features h(x) of a pretrained ConvNet: frozen, in eval mode, gradients with respect to x only."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torchvision.models import get_model, get_model_weights
from torchvision.models.feature_extraction import create_feature_extractor

from .checks import integer
from .classifier import NAME, Classifier, load_classifier
from .data import to_float

# torchvision's networks, and the output of each stage, shallow to deep
STAGES = {
    "resnet18": ("relu", "layer1", "layer2", "layer3", "layer4"),
    "vgg16": ("features.3", "features.8", "features.15", "features.22", "features.29"),
}


class Features(nn.Module):
    """h(x): float images [B, C, H, W] in [-1, 1] → [B, d], the filter responses of one layer, averaged over space.

    Attributes:
        channels, image_size: of the images it takes; None where any will do.
        size: d.
    """

    def __init__(self, responses: nn.Module, channels: int | None, image_size: int | None, pool: int = 1):
        super().__init__()
        self.responses = responses.eval().requires_grad_(False)
        self.channels, self.image_size, self.pool = channels, image_size, pool
        with torch.no_grad():
            self.size = self(torch.zeros(1, channels or 1, image_size or 32, image_size or 32)).shape[1]

    @property
    def num_features(self) -> int:
        """The name by which torchmetrics asks for d."""
        return self.size

    def train(self, mode: bool = True) -> "Features":
        """Stays in eval mode, whatever module it becomes part of."""
        return super().train(False)

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim != 4 or not x.is_floating_point():
            raise ValueError(f"h takes float images [B, C, H, W] in [-1, 1], got {x.dtype} {list(x.shape)}")
        if self.image_size and tuple(x.shape[1:]) != (self.channels, self.image_size, self.image_size):
            size = f"{self.channels}, {self.image_size}, {self.image_size}"
            raise ValueError(f"h takes images of shape [B, {size}], got {list(x.shape)}")
        return F.adaptive_avg_pool2d(self.responses(x), self.pool).flatten(1)


class _ImageNetMaps(nn.Module):
    """A torchvision network's stage, fed as it was trained: three channels, ImageNet's mean and deviation."""

    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

    def __init__(self, name: str, layer: int, weights):
        super().__init__()
        stage = STAGES[name][layer - 1]
        self.extract = create_feature_extractor(get_model(name, weights=weights).eval(), {stage: "maps"})
        self.register_buffer("shift", torch.tensor(self.mean).view(3, 1, 1))
        self.register_buffer("scale", torch.tensor(self.std).view(3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = ((x + 1) / 2).expand(-1, 3, -1, -1)
        return self.extract((x - self.shift) / self.scale)["maps"]


def features(source: str = NAME, layer: int | None = None, pool: int = 1, weights: str | None = "DEFAULT") -> Features:
    """h(x) from the shipped Fashion-MNIST classifier (offline), or from torchvision's ResNet-18 or VGG-16.

    Args:
        source: "fashion_mnist_classifier" or a classifier's .safetensors file (d = 32, 64, 128, 128 at layers 1 … 4);
            "resnet18" or "vgg16" (their weights are fetched on first use).
        layer: counted from 1, shallow to deep; None is the deepest.
        pool: responses are averaged over pool × pool cells, which multiplies d by pool².
        weights: "DEFAULT", or None for random ones.

    Raises:
        ValueError: a layer or pool out of range.
        FileNotFoundError: weights that are not here and cannot be fetched.
    """
    depth = len(STAGES.get(source, range(4)))
    layer = depth if layer is None else layer
    for name, value, high in (("layer", layer, depth), ("pool", pool, 32)):
        integer(name, value, 1, high)
    if source not in STAGES:
        model = load_classifier(source) if weights else Classifier().eval().requires_grad_(False)
        fused = (nn.Sequential(fuse_conv_bn_eval(conv, norm), relu) for conv, norm, relu in model.stages[:layer])
        return Features(nn.Sequential(*fused), model.channels, model.image_size, pool)  # 0.8 of the time, measured
    try:
        responses = _ImageNetMaps(source, layer, weights)
    except OSError as error:  # urllib's errors are OSErrors
        url = get_model_weights(source).DEFAULT.url
        raise FileNotFoundError(
            f"the weights of {source} could not be fetched ({error}): put {url} in {torch.hub.get_dir()}/checkpoints, "
            f"or take {NAME!r}, which is shipped"
        ) from error
    return Features(responses, None, None, pool)


@torch.no_grad()
def responses(h: Features, x: Tensor, batch_size: int = 250) -> Tensor:
    """h of n images, [n, d]; x is uint8, or float in [-1, 1], [n, C, H, W]."""
    device = next(h.parameters()).device
    return torch.cat([h(part if part.is_floating_point() else to_float(part, device)) for part in x.split(batch_size)])
