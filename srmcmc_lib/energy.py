"""The negative energy f_θ(x) of eq. (1): the paper's ConvNet, and its gradient in x by hand.

A network outputs f_θ(x) itself, not −f_θ(x): where f is high, images are likely, and the chain climbs f.
"""

import copy
from operator import index

import torch
import torch.nn.functional as F
from torch import Tensor, nn

aten = torch.ops.aten
ROUNDING = 0.2  # r of RoundedLeakyReLU; its chains can be inverted almost exactly, with 0.1 less so


class RoundedLeakyReLU(nn.Module):
    """LeakyReLU with a rounded kink: between −r and r the slope goes linearly from 0.2 to 1 (r = ROUNDING)."""

    def forward(self, h: Tensor) -> Tensor:
        c = h.clamp(-ROUNDING, ROUNDING)
        return (0.6 * h + 0.2 * ROUNDING).addcmul_(c, h.sub(c, alpha=0.5), value=0.4 / ROUNDING)


# Each activation φ, and g ← g·φ'(h) in place, h being φ's input. (LeakyReLU's derivative only needs the sign of h,
# which its output shares: `gradient` overwrites h with φ(h).)
ACTIVATIONS = {
    "leaky_relu": (  # the paper's choice; makes f piecewise linear
        lambda: nn.LeakyReLU(0.2),
        lambda g, h: aten.leaky_relu_backward.grad_input(g, h, 0.2, True, grad_input=g),
    ),
    "silu": (nn.SiLU, lambda g, h: aten.silu_backward.grad_input(g, h, grad_input=g)),
    "rounded": (  # our addition: with it the chain can be inverted
        RoundedLeakyReLU,
        lambda g, h: g.mul_(torch.rsub(h.clamp_(-ROUNDING, ROUNDING), 0.6, alpha=-0.4 / ROUNDING)),
    ),
}


class EnergyNet(nn.Module):
    """f_θ, the negative energy: the paper's ConvNet, [B, C, H, W] → [B].

    At 32×32 this is the paper's table: a 3×3 convolution to n_f maps, three 4×4 convolutions of stride 2 that double
    the maps, and a 4×4 convolution to one number. There is no normalisation. Every doubling of the image adds one
    stage of stride 2. The paper's tables for 64 and 128 pixels are not known to us, so that rule is our assumption.

    Args:
        image_size: H = W in pixels, 5 … 1024 (else ValueError). A size that is not a power of two is padded with zeros
            (mid-grey in [-1, 1]) up to the next one (28 → 32), never stretched.
        width: n_f, the base number of feature maps (paper: 32, 64, 128).
        activation: "leaky_relu" (slope 0.2, the paper), "silu", or "rounded": LeakyReLU with a rounded kink.
    """

    def __init__(self, channels: int, image_size: int, width: int = 32, activation: str = "leaky_relu"):
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation={activation!r} is unknown; choose one of {', '.join(ACTIVATIONS)}")
        if not 5 <= image_size <= 1024 or channels < 1 or width < 1:
            got = f"{channels!r}, {image_size!r} and {width!r}"
            raise ValueError(f"channels and width must be at least 1, image_size in 5 … 1024; got {got}")
        channels, image_size, width = map(index, (channels, image_size, width))  # NumPy's integers become Python's
        self.channels, self.image_size, self.width, self.activation = channels, image_size, width, activation
        padded = 1 << (image_size - 1).bit_length()  # the next power of two
        before = (padded - image_size) // 2
        self.padding = (before, padded - image_size - before) * 2
        φ = ACTIVATIONS[activation][0]
        layers, maps = [nn.Conv2d(channels, width, 3, stride=1, padding=1), φ()], width
        for _ in range(padded.bit_length() - 3):  # halve padded down to 4
            layers += [nn.Conv2d(maps, 2 * maps, 4, stride=2, padding=1), φ()]
            maps *= 2
        self.layers = nn.Sequential(*layers, nn.Conv2d(maps, 1, 4))
        self.to(memory_format=torch.channels_last)  # faster on CPUs

    def __init_subclass__(cls):
        forward, gradient = (next(i for i, c in enumerate(cls.mro()) if k in vars(c)) for k in ("forward", "gradient"))
        if forward < gradient:
            cls.gradient = None  # another f has another gradient: automatic differentiation

    @property
    def config(self) -> dict:
        """The constructor's arguments, which a checkpoint stores to build the same network again."""
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
        """∂f/∂x of each image, [B, C, H, W] → [B, C, H, W]: a pass up through the filters, and one down.

        On the way down, the filters of the active units build the gradient, as in the generative ConvNet of Xie et al.
        (2016). It equals automatic differentiation within rounding and is faster: nothing is recorded, and derivatives
        are applied in place. A bfloat16 copy of f returns x's type all the same.
        """
        *convolutions, top = self.layers[::2]
        times_derivative, h, inputs = ACTIVATIONS[self.activation][1], self._padded(x).to(top.weight.dtype), []
        for convolution, φ in zip(convolutions, self.layers[1::2], strict=True):
            inputs.append(convolution(h))
            h = F.leaky_relu_(inputs[-1], 0.2) if self.activation == "leaky_relu" else φ(inputs[-1])
        # f is linear in the last h. A copy: what follows writes to g, which for one image would be the weights.
        g = top.weight.expand_as(h).clone(memory_format=torch.channels_last)
        for convolution, h in zip(reversed(convolutions), reversed(inputs), strict=True):
            g = F.conv_transpose2d(times_derivative(g, h), convolution.weight, stride=convolution.stride, padding=1)
        g = g.to(x.dtype)
        return F.pad(g, [-p for p in self.padding]) if any(self.padding) else g

    def _padded(self, x: Tensor) -> Tensor:
        if (shape := [self.channels, self.image_size, self.image_size]) != [*x.shape[1:]]:
            raise ValueError(f"f_θ takes images of shape [B, {str(shape)[1:]}, got {[*x.shape]}")
        return F.pad(x, self.padding).contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def rescale(f: nn.Module, c: float) -> None:
    """f ← c·f in place, by its last convolution or linear layer; ValueError where that would not scale f."""
    dtype = torch.promote_types(next(f.parameters()).dtype, torch.float32)  # bfloat16 is too coarse to compare in
    exact, scaled = (copy.deepcopy(f).to(dtype) for _ in range(2))
    layers = [m for m in scaled.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    for p in layers[-1].parameters() if layers else ():
        p.mul_(c)
    x = torch.linspace(-1, 1, f.channels * f.image_size**2).view(1, f.channels, f.image_size, f.image_size)
    x = x.to(next(scaled.parameters()))
    if not torch.allclose(scaled(x), c * exact(x), rtol=1e-3):
        raise ValueError(f"{type(f).__name__} cannot be scaled: f must be the output of its last Conv2d or Linear")
    f.load_state_dict(scaled.state_dict())
