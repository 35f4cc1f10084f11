"""EnergyNet: the paper's table of layers, its gradient from the top down, padding, `rescale`, clear errors."""

import pytest
import torch
import torch.nn.functional as F

from srmcmc_lib import EnergyNet
from srmcmc_lib.energy import ACTIVATIONS, rescale
from srmcmc_lib.langevin import gradient


def test_the_network_is_the_papers_table():
    """Shapes, then strides, paddings and the slope 0.2, which shapes don't show. n_f = 32 is the default."""
    shapes = [tuple(p.shape) for p in EnergyNet(3, 32).parameters() if p.ndim == 4]
    assert shapes == [(32, 3, 3, 3), (64, 32, 4, 4), (128, 64, 4, 4), (256, 128, 4, 4), (1, 256, 4, 4)]
    assert sum(p.numel() for p in EnergyNet(3, 32).parameters()) == 693_569  # these and biases: no normalisation
    for size, maps in ((5, [8, 16]), (28, [8, 16, 32, 64]), (64, [8, 16, 32, 64, 128])):
        assert [len(p) for p in EnergyNet(1, size, width=8).parameters() if p.ndim == 4] == [*maps, 1]
    net, h = EnergyNet(3, 32, width=4).double(), torch.randn(5, 3, 32, 32, dtype=torch.float64)
    f, w, b = net(h), list(net.parameters())[::2], list(net.parameters())[1::2]
    h = F.conv2d(h, w[0], b[0], stride=1, padding=1)
    for i in (1, 2, 3):
        h = F.conv2d(torch.where(h > 0, h, 0.2 * h), w[i], b[i], stride=2, padding=1)
    torch.testing.assert_close(f, F.conv2d(torch.where(h > 0, h, 0.2 * h), w[4], b[4])[:, 0, 0, 0])


@pytest.mark.parametrize(("dtype", "close"), [(torch.float64, 1e-12), (torch.float32, 1e-4), (torch.bfloat16, 0.03)])
@pytest.mark.parametrize(("size", "channels"), [(8, 3), (12, 1), (28, 1), (32, 3)])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradient_equals_automatic_differentiation(activation, size, channels, dtype, close):
    """Within the type's rounding; for each layout in memory, and for one image, whose weights a step must not write."""
    f = EnergyNet(channels, size, width=4, activation=activation).to(dtype)
    weights = [p.clone() for p in f.parameters()]
    x = torch.rand(2, channels, size, size, dtype=max(dtype, torch.float32, key=lambda t: t.itemsize)) * 2 - 1
    turned = x.mT.contiguous().mT
    for same in (x, x.contiguous(memory_format=torch.channels_last), turned, x[:1], x[:1].expand(3, -1, -1, -1)):
        before, leaf = same.clone(), same.clone().requires_grad_()
        ours, theirs = gradient(f, same), torch.autograd.grad(f(leaf.to(dtype)).sum(), leaf)[0]
        assert ours.dtype == x.dtype and ours.shape == same.shape and not ours.requires_grad
        assert (ours - theirs).norm() <= close * theirs.norm()
        assert torch.equal(same, before) and all(map(torch.equal, f.parameters(), weights))


def test_other_sizes_equal_the_32_network_on_the_zero_padded_image():
    for size, pads in ((28, (2, 2)), (17, (7, 8))):
        small, paper, x = EnergyNet(3, size, width=4), EnergyNet(3, 32, width=4), torch.randn(3, 3, size, size)
        paper.load_state_dict(small.state_dict())
        torch.testing.assert_close(small(x), paper(F.pad(x, pads * 2)))


class Tempered(EnergyNet):
    """A subclass with another forward, for which the inherited gradient would be wrong: f − |x|²/2."""

    def forward(self, x):
        return super().forward(x) - x.square().flatten(1).sum(1) / 2


def test_another_forward_has_another_gradient_and_rescale_refuses_it():
    f, other, x = EnergyNet(1, 8, width=2), Tempered(1, 8, width=2), torch.randn(2, 1, 8, 8)
    torch.testing.assert_close(gradient(other, x), EnergyNet.gradient(other, x) - x)
    mixed = type("Mixed", (type("Twice", (), {"forward": lambda f, x: 2 * EnergyNet.forward(f, x)}), EnergyNet), {})
    assert mixed.gradient is None
    before = f(x), other(x)
    rescale(f, 0.3)
    torch.testing.assert_close(f(x), 0.3 * before[0])
    with pytest.raises(ValueError, match="Tempered cannot be scaled"):
        rescale(other, 0.3)
    assert torch.equal(other(x), before[1])
