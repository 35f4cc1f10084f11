"""The negative energy f_θ(x) of eq. (1): the paper's ConvNet, and one that is linear in θ, with fixed features.

A network outputs f_θ(x) itself, not −f_θ(x): where f is high, images are likely, and the chain climbs f.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .checks import integer

ACTIVATIONS = {
    "leaky_relu": lambda: nn.LeakyReLU(0.2),  # the paper's choice; makes f piecewise linear
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "softplus": nn.Softplus,
}
aten = torch.ops.aten
# g ← g · φ'(h) in place, h the activation's input (of leaky_relu, whose sign its output shares, the output)
DERIVATIVES = {
    "leaky_relu": lambda g, h: aten.leaky_relu_backward.grad_input(g, h, 0.2, True, grad_input=g),
    "silu": lambda g, h: aten.silu_backward.grad_input(g, h, grad_input=g),
    "gelu": lambda g, h: aten.gelu_backward.grad_input(g, h, grad_input=g),
    "softplus": lambda g, h: aten.softplus_backward.grad_input(g, h, 1, 20, grad_input=g),
}


class EnergyNet(nn.Module):
    """f_θ, the negative energy: the paper's ConvNet, [B, C, H, W] → [B].

    At 32×32 this is the paper's table: a 3×3 convolution to n_f maps, three 4×4 stride-2 convolutions that double
    the maps, and a 4×4 convolution to one number. There are no normalisation layers. Every doubling of the image
    adds one stride-2 stage; the paper's tables for 64 and 128 are not known to us, so that rule is our assumption.

    Args:
        channels: C, the image's channels (1 or 3 as a rule).
        image_size: H = W in pixels, 5 … 1024. A size that is not a power of two is zero-padded (mid-grey in [-1, 1])
            up to the next one (28 → 32), never stretched.
        width: n_f, the base number of feature maps (paper: 32, 64, 128).
        activation: "leaky_relu" (slope 0.2, the paper), "silu", "gelu" or "softplus".

    Raises:
        ValueError: a size, channel count or width out of range, an unknown activation, an input of another shape.
    """

    def __init__(self, channels: int, image_size: int, width: int = 32, activation: str = "leaky_relu"):
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation={activation!r} is unknown; choose one of {', '.join(ACTIVATIONS)}")
        integer("channels", channels, 1, 4096)
        integer("image_size", image_size, 5, 1024)
        integer("width", width, 1, 4096)
        self.channels, self.image_size, self.width, self.activation = channels, image_size, width, activation
        padded = 1 << (image_size - 1).bit_length()  # the next power of two
        before = (padded - image_size) // 2
        self.padding = (before, padded - image_size - before) * 2

        act = ACTIVATIONS[activation]
        layers = [nn.Conv2d(channels, width, 3, stride=1, padding=1), act()]
        maps = width
        for _ in range(padded.bit_length() - 3):  # halve padded down to 4
            layers += [nn.Conv2d(maps, 2 * maps, 4, stride=2, padding=1), act()]
            maps *= 2
        self.layers = nn.Sequential(*layers, nn.Conv2d(maps, 1, 4))
        self.to(memory_format=torch.channels_last)  # measured faster on CPUs and on tensor cores

    @property
    def config(self) -> dict:
        """The constructor's arguments: what a checkpoint stores to build the same network again."""
        return {k: getattr(self, k) for k in ("channels", "image_size", "width", "activation")}

    @property
    def piecewise_linear(self) -> bool:
        """True where f'' = 0 almost everywhere, so that ∂M/∂z = I and reconstruction has a closed-form gradient."""
        return self.activation == "leaky_relu"

    def forward(self, x: Tensor) -> Tensor:
        """f_θ(x) for images x of shape [B, C, H, W]; returns [B]."""
        return self.layers(self._padded(x)).flatten()

    @torch.no_grad()
    def gradient(self, x: Tensor) -> Tensor:
        """∂f/∂x of each image, [B, C, H, W] → [B, C, H, W]: up through the filters, then down through the same ones.

        What comes down is painted by the filters of the units that were on (a generative ConvNet, Xie et al. 2016). Equal
        to automatic differentiation within rounding, and faster: nothing is recorded, derivatives are applied in place.
        In a bfloat16 copy of f the convolutions are bfloat16, x and the gradient keep x's type.
        """
        *convolutions, top = self.layers[::2]
        derivative, h, seen = DERIVATIVES[self.activation], self._padded(x).to(top.weight.dtype), []
        for convolution, activation in zip(convolutions, self.layers[1::2], strict=True):
            below = convolution(h)
            h = F.leaky_relu_(below, 0.2) if self.activation == "leaky_relu" else activation(below)
            seen.append(below)
        g = top.weight.expand(len(x), *top.weight.shape[1:]).contiguous(memory_format=torch.channels_last)
        for convolution, h in zip(convolutions[:0:-1], seen[:0:-1], strict=True):
            g = F.conv_transpose2d(derivative(g, h), convolution.weight, stride=2, padding=1)
        # the first 3×3 convolution as a product, whose nine parts F.fold adds up: faster, having so few output channels
        g = derivative(g, seen[0]).permute(0, 2, 3, 1).flatten(1, 2) @ convolutions[0].weight.flatten(1)
        g = F.fold(g.mT, seen[0].shape[2:], 3, padding=1).to(x.dtype)
        left, right, above, _ = self.padding
        return g[..., above : above + self.image_size, left : left + self.image_size] if left + right else g

    def _padded(self, x: Tensor) -> Tensor:
        if x.ndim != 4 or x.shape[1:] != (self.channels, self.image_size, self.image_size):
            size = f"{self.channels}, {self.image_size}, {self.image_size}"
            raise ValueError(f"f_θ takes images of shape [B, {size}], got {list(x.shape)}")
        if any(self.padding):
            x = F.pad(x, self.padding)
        last = self.layers[2].weight.is_contiguous(memory_format=torch.channels_last)  # the images follow the weights
        return x.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


class LinearEnergy(nn.Module):
    """f_θ(x) = <θ, h(x)> with fixed features h, [B, C, H, W] → [B]: what the paper's theory speaks of.

    Only θ [d] is learned, from θ = 0, and ∂f/∂θ = h(x): eq. (6) compares nothing but averages of h. A checkpoint holds
    h's weights beside θ, so that it stays true when a source's weights are trained anew.

    Args:
        channels, image_size: C and H = W of the images; a classifier takes only its own.
        source, layer, pool, weights: of h, see `features.features`.

    Raises:
        ValueError, FileNotFoundError: as `features.features` does; images that h does not take.
    """

    piecewise_linear = True  # all sources have ReLUs, poolings and, in eval mode, fixed normalisations

    def __init__(
        self, channels: int = 1, image_size: int = 32, source: str = "fashion_mnist_classifier",
        layer: int | None = None, pool: int = 1, weights: str | None = "DEFAULT",
    ):  # fmt: skip
        super().__init__()
        from .features import features  # torchvision's models, which the ConvNet above does without

        self.channels, self.image_size = channels, image_size
        self.source, self.layer, self.pool, self.weights = source, layer, pool, weights
        self.h = features(source, layer, pool, weights)
        if self.h.image_size and (channels, image_size) != (self.h.channels, self.h.image_size):
            want = f"channels={self.h.channels}, image_size={self.h.image_size}"
            raise ValueError(f"{source} takes images with {want}, got {channels!r} and {image_size!r}")
        self.inner = nn.Linear(self.h.size, 1, bias=False)  # <θ, ·>
        nn.init.zeros_(self.inner.weight)

    @property
    def config(self) -> dict:
        """The constructor's arguments: what a checkpoint stores to build the same energy again."""
        return {k: getattr(self, k) for k in ("channels", "image_size", "source", "layer", "pool", "weights")}

    @property
    def theta(self) -> Tensor:
        """θ, [d]."""
        return self.inner.weight[0]

    def forward(self, x: Tensor) -> Tensor:
        """f_θ(x) for images x of shape [B, C, H, W]; returns [B]."""
        return self.inner(self.h(x))[:, 0]


@torch.no_grad()
def scale(f: nn.Module, c: float) -> None:
    """f ← c·f, in place, by its last convolution or linear layer, if f is as `check_scalable` wants it."""
    for p in _layers(f)[-1].parameters():
        p.mul_(c)


@torch.no_grad()
def check_scalable(f: nn.Module) -> None:
    """ValueError where `scale` would not scale f, which is left as it was, to the bit."""
    if _layers(f):
        shape = (1, f.channels, f.image_size, f.image_size)
        x = torch.linspace(-1, 1, math.prod(shape)).view(shape).to(next(f.parameters()))
        before = f(x)
        scale(f, 2.0)
        after = f(x)
        scale(f, 0.5)  # powers of two: no rounding
        if torch.allclose(after, 2 * before, rtol=1e-3):
            return
    raise ValueError(f"{type(f).__name__} cannot be scaled: its value must come from a convolution or linear layer, "
                     "the last that its constructor makes")  # fmt: skip


def _layers(f: nn.Module) -> list[nn.Module]:
    return [m for m in f.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
