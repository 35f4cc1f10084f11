"""Fixed features h(x) from a ConvNet classifier of Fashion-MNIST, and the linear energy f_θ(x) = <θ, h(x)>."""

from itertools import accumulate
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from . import paths
from .data import to_float
from .langevin import integer

NAME = "fashion_mnist_classifier"


class Classifier(nn.Module):
    """x [B, 1, 32, 32] in [-1, 1] → logits [B, 10]: convolutions, batch normalisation and ReLU, averaged over space."""

    channels, image_size, classes = 1, 32, 10

    def __init__(self):
        super().__init__()
        self.stages = nn.Sequential()
        for a, b, stride in ((1, 32, 1), (32, 64, 2), (64, 128, 2), (128, 128, 1)):  # maps of 32, 16, 8 and 8 pixels
            self.stages.append(nn.Sequential(nn.Conv2d(a, b, 3, stride, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU()))
        self.linear = nn.Linear(128, self.classes)
        self.to(memory_format=torch.channels_last)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.stages(x).mean((2, 3)))


def load_classifier(source: str | Path = NAME) -> Classifier:
    """The shipped classifier or one from a .safetensors file, frozen, in eval mode; ValueError if that is damaged."""
    path = Path(source) if Path(source).suffix else paths.PRETRAINED / f"{source}.safetensors"
    if not path.exists():
        raise FileNotFoundError(f"no classifier at {path}; workflow/scripts/train_classifier.py trains one in minutes")
    model = Classifier()
    try:
        model.load_state_dict(load_file(path))
    except Exception as error:  # safetensors and torch have no common error
        raise ValueError(f"{path} is damaged or not a classifier ({error}); train it again") from error
    return model.eval().requires_grad_(False)


class Features(nn.Module):
    """h(x): float images [B, C, H, W] in [-1, 1] → [B, d]: frozen `responses` [B, d, H', W'] averaged over space. With
    `cells`: means of y and y² in cells[i]² parts of the image (0: none), y the output of layer i, layer 0 the image."""

    def __init__(self, responses: nn.Module, channels: int, image_size: int, cells: list[int] | None = None):
        super().__init__()
        self.responses, self.cells = responses.eval().requires_grad_(False), cells
        self.channels, self.image_size = channels, image_size
        self.size = self(torch.zeros(1, channels, image_size, image_size)).shape[1]  # d

    def forward(self, x: Tensor) -> Tensor:
        if (shape := [self.channels, self.image_size, self.image_size]) != [*x.shape[1:]]:
            raise ValueError(f"h takes images of shape [B, {str(shape)[1:]}, got {[*x.shape]}")
        if not self.cells:
            return self.responses(x).mean((2, 3))
        layers = zip(self.cells, accumulate([x, *self.responses], lambda y, layer: layer(y)), strict=True)
        pooled = [nn.functional.adaptive_avg_pool2d(torch.cat([y, y * y], 1), n) for n, y in layers if n]
        return torch.cat([part.flatten(1) for part in pooled], 1)


def load_features(layer=None, source: str | Path | Classifier = NAME, cells: list[int] | None = None) -> Features:
    """h(x) of a layer, 1 … 4 (d = 32, 64, 128, 128; None: the deepest), or of all up to it by layer + 1 `cells`."""
    model = source if isinstance(source, Classifier) else load_classifier(source)
    layer = len(model.stages) if layer is None else integer("layer", layer, 1, len(model.stages))
    if cells and (len(cells) != layer + 1 or not any(cells)):
        raise ValueError(f"cells must hold {layer + 1} integers (the image, then each layer), not all 0; got {cells}")
    # batch normalisation becomes part of the convolution: 0.8 of the time
    fused = (nn.Sequential(fuse_conv_bn_eval(conv, norm), relu) for conv, norm, relu in model.eval().stages[:layer])
    return Features(nn.Sequential(*fused), model.channels, model.image_size, cells)


@torch.no_grad()
def responses(h: nn.Module, x: Tensor, batch_size: int = 250) -> Tensor:
    """h of n images, [n, d]; x is uint8, or float in [-1, 1], [n, C, H, W]."""
    device, convert = next(h.parameters()).device, Tensor.to if x.is_floating_point() else to_float
    return torch.cat([h(convert(part, device)) for part in x.split(batch_size)])


class LinearEnergy(nn.Module):
    """f_θ(x) = <θ, h(x)> with fixed features h, [B, C, H, W] → [B]: the case of the paper's theory.

    Only θ [d] is trained, from θ = 0; ∂f/∂θ = h(x). `layer`, `source`, `cells` are those of load_features; channels and
    image_size must be the classifier's (else ValueError). A checkpoint holds h's weights beside θ, so that training the
    classifier again does not change the model. trained=False leaves h random, to be filled from a checkpoint.
    """

    def __init__(self, channels=1, image_size=32, layer: int | None = None, source=NAME, trained=True, cells=None):
        super().__init__()
        self.h = load_features(layer, source if trained else Classifier(), cells)
        self.channels, self.image_size, self.cells = self.h.channels, self.h.image_size, cells
        self.piecewise_linear = not cells  # convolutions and ReLUs, no squares
        self.layer, self.source = layer if layer is None else int(layer), str(source)
        if (got := (channels, image_size)) != (want := (self.channels, self.image_size)):
            raise ValueError(f"{source} takes images of (channels, image_size) = {want}, got {got}")
        self.inner = nn.Linear(self.h.size, 1, bias=False)  # <θ, ·>
        nn.init.zeros_(self.inner.weight)

    @property
    def config(self) -> dict:  # the constructor's arguments, for a checkpoint
        more = {"cells": self.cells} if self.cells else {}
        return {k: getattr(self, k) for k in ("channels", "image_size", "layer", "source")} | more

    @property
    def theta(self) -> Tensor:  # [d]
        return self.inner.weight[0]

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self.h(x))[:, 0]
