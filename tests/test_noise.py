"""Priors, seeds and their streams, the chain's noise, and how two z mix."""

import numpy as np
import pytest
import torch
from torch import Generator

from srmcmc_lib import Gaussian, Uniform
from srmcmc_lib.noise import FOR_U, FOR_Z, MIXINGS, fresh, mix, streams

SHAPE, CPU, RHOS = (1, 4, 4), torch.device("cpu"), np.array([1.0, 0.7, 0.5, 0.2, 0.0])


def test_priors_have_their_moments():
    """Within five standard errors; the fourth moment tells uniform from Gaussian."""
    for prior, mean, std, kurtosis in ((Uniform(-0.5, 2.5), 1, 3 / 12**0.5, 1.8), (Gaussian(0.3), 0, 0.3, 3)):
        z, n = prior.draw((64_000,), Generator().manual_seed(0)).double(), 64_000
        assert z.mean() == pytest.approx(mean, abs=5 * std / n**0.5)
        assert z.std() == pytest.approx(std, abs=5 * std * ((kurtosis - 1) / (4 * n)) ** 0.5)
        assert ((z - mean) / std).pow(4).mean() == pytest.approx(kurtosis, abs=5 * (96 / n) ** 0.5)


def test_images_and_updates_have_their_own_streams():
    draws = [torch.randn(999, generator=g) for p in (FOR_Z, FOR_U) for s in (3, 4) for g in streams(s, p, 0, 5)]
    assert (torch.corrcoef(torch.stack(draws)) - torch.eye(20)).abs().max() < 5 / 999**0.5
    later, all_six = ([g.initial_seed() for g in streams(3, FOR_U, start, n)] for start, n in ((4, 2), (0, 6)))
    assert later == all_six[4:]
    pinned = [g.initial_seed() for g in (*streams(3, FOR_Z, 0, 1), *streams(3, FOR_U, 0, 1), *fresh(1, 0, CPU))]
    assert pinned == [303761048, 3607553667, 1641411168, 1963192212, 1340743928, 1254710336]  # of all published numbers
    first = [[torch.rand(1, generator=g).item() for g in fresh(*key, CPU)] for key in ((1, 0), (1, 1), (2, 0), (1, 0))]
    assert first[0] == first[3] and len({x for four in first for x in four}) == 12


def test_mixing_leads_from_z1_to_z2_by_its_rule():
    """The paper's keeps the variance, not the distribution; "linear" loses variance, "spherical" keeps the norm."""
    z1, z2 = torch.nn.functional.normalize(torch.randn(2, 3, 16).double(), dim=2).view(2, 3, *SHAPE)
    for mixing in MIXINGS:
        torch.testing.assert_close(mix(z1, z2, RHOS, mixing)[:, [0, -1]], torch.stack([z1, z2], 1))
    torch.testing.assert_close(mix(z1, z2, [0.6])[:, 0], 0.6 * z1 + 0.8 * z2)
    z = mix(z1, z2, RHOS, "spherical").flatten(2)
    torch.testing.assert_close(z.norm(dim=2), torch.ones(3, 5).double())
    torch.testing.assert_close(*((z[:, 2] * end.flatten(1)).sum(1) for end in (z1, z2)))  # half-way, half the angle
    for end in (z1, -z1):  # no arc between them
        torch.testing.assert_close(mix(z1, end, RHOS, "spherical"), mix(z1, end, RHOS, "linear"))
    z1, z2 = Uniform().draw((2, 200_000, 1, 1, 1), Generator().manual_seed(0)).double()
    for ρ in (0.9, 0.7, 0.2):
        kept, lost = (mix(z1, z2, [ρ], mixing).var() / z1.var() for mixing in ("variance", "linear"))
        assert (kept, lost) == (pytest.approx(1, abs=0.01), pytest.approx(ρ**2 + (1 - ρ) ** 2, abs=0.01))
    assert 1.3 < mix(z1, z2, [0.5**0.5]).abs().max() <= 2**0.5
