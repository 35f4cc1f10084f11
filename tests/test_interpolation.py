"""Interpolation: the ends of a row, the variance along it, and which noise its images see."""

import pytest
import torch

from srmcmc_lib import EnergyNet, Gaussian, Langevin, ShortRun, Uniform
from srmcmc_lib.interpolation import MIXINGS, mix

K, RHOS = 4, [1.0, 0.7, 0.5, 0.2, 0.0]


@pytest.fixture
def model():
    torch.manual_seed(7)
    return ShortRun(EnergyNet(1, 8, width=4), Langevin(K, noise=0.1))


@pytest.fixture
def ends(model):
    return model.draw_z(3, seed=1), model.draw_z(3, seed=2)


# ------------------------------------------------------------------------------------------------------- mixing


@pytest.mark.parametrize("mixing", MIXINGS)
def test_mixing_starts_at_z1_and_ends_at_z2(ends, mixing):
    z = mix(*ends, RHOS, mixing)
    assert z.shape == (3, 5, 1, 8, 8) and z.dtype == torch.float32
    assert torch.equal(z[:, 0], ends[0]) and torch.equal(z[:, -1], ends[1])
    assert torch.equal(mix(*ends, torch.tensor(RHOS), mixing), z)


def test_the_papers_rule_is_its_formula(ends):
    z = mix(*[z.double() for z in ends], [0.6])[:, 0]
    torch.testing.assert_close(z, 0.6 * ends[0].double() + 0.8 * ends[1].double())


@pytest.mark.parametrize("prior", [Uniform(), Gaussian(0.5)])
def test_the_papers_rule_keeps_the_variance_and_linear_mixing_does_not(prior):
    g = torch.Generator().manual_seed(0)
    z1, z2 = (prior.draw((200_000, 1, 1, 1), g).double() for _ in range(2))
    expected = z1.var()
    for ρ in (0.9, 0.7, 0.5, 0.2):
        ratio = mix(z1, z2, [ρ]).var() / expected
        assert abs(ratio - 1) < 0.01
        ratio = mix(z1, z2, [ρ], "linear").var() / expected
        assert abs(ratio - (ρ**2 + (1 - ρ) ** 2)) < 0.01
    # The variance, not the law: a mixture of two uniforms leaves [-1, 1].
    if isinstance(prior, Uniform):
        assert 1.3 < mix(z1, z2, [0.5**0.5]).abs().max() <= 2**0.5


def test_spherical_mixing_keeps_the_norm_and_halves_the_angle(ends):
    z1, z2 = (torch.nn.functional.normalize(z.double().flatten(1), dim=1).view_as(z) for z in ends)
    z = mix(z1, z2, RHOS, "spherical").flatten(2)
    torch.testing.assert_close(z.norm(dim=2), torch.ones(3, 5, dtype=torch.float64))
    torch.testing.assert_close((z[:, 2] * z1.flatten(1)).sum(1), (z[:, 2] * z2.flatten(1)).sum(1))


@pytest.mark.parametrize("other", ["same", "opposite"])
def test_spherical_mixing_without_an_arc_is_linear(ends, other):
    z1 = ends[0]
    z2 = {"same": z1.clone(), "opposite": -z1}[other]
    torch.testing.assert_close(mix(z1, z2, RHOS, "spherical"), mix(z1, z2, RHOS, "linear"))
    assert mix(z1, torch.zeros_like(z1), RHOS, "spherical").isfinite().all()  # zero has no angle at all


# --------------------------------------------------------------------------------------------------------- rows


@pytest.mark.parametrize("mixing", MIXINGS)
def test_a_row_leads_from_the_image_of_z1_to_that_of_z2(model, ends, mixing):
    rows = model.interpolate(*ends, RHOS, mixing=mixing)
    assert rows.shape == (3, 5, 1, 8, 8) and rows.isfinite().all()
    torch.testing.assert_close(rows[:, 0], model(ends[0]))
    torch.testing.assert_close(rows[:, -1], model(ends[1]))


def test_noise_is_shared_along_a_row_and_differs_between_rows(model, ends):
    z = ends[0]
    rows = model.interpolate(z, z, [1.0, 1.0, 0.0], u=5)
    torch.testing.assert_close(rows, model(z, u=5)[:, None].expand_as(rows))
    same = model.interpolate(z[:1].expand_as(z), z[:1].expand_as(z), [1.0], u=5)
    assert not torch.allclose(same[0], same[1])


def test_fresh_noise_gives_each_image_its_own_stream(model, ends):
    z1, z2 = ends
    rows = model.interpolate(z1, z1, [1.0, 0.0], u=5, fresh=True)
    torch.testing.assert_close(rows.flatten(0, 1), model(z1.repeat_interleave(2, 0), u=5))
    assert not torch.allclose(rows[:, 0], rows[:, 1])
    u = torch.randn(K, 6, 1, 8, 8)
    rows = model.interpolate(z1, z2, [1.0, 0.0], u=u, fresh=True)
    torch.testing.assert_close(rows[:, 0], model(z1, u[:, 0::2]))
    torch.testing.assert_close(rows[:, 1], model(z2, u[:, 1::2]))


@pytest.mark.parametrize("images", [1, 3])
def test_given_noise_is_shared_along_a_row(model, ends, images):
    u = torch.randn(K, images, 1, 8, 8)
    rows = model.interpolate(*ends, [1.0, 0.0], u=u)
    torch.testing.assert_close(rows[:, 0], model(ends[0], u))
    torch.testing.assert_close(rows[:, 1], model(ends[1], u))
    torch.testing.assert_close(model.interpolate(*ends, [1.0, 0.0], u=list(u)), rows)


def test_a_row_does_not_depend_on_the_other_rows(model, ends):
    one = model.interpolate(ends[0][:1], ends[1][:1], RHOS, u=5)
    torch.testing.assert_close(model.interpolate(*ends, RHOS, u=5)[:1], one)


@pytest.mark.parametrize("rhos", [[], [1.1], [-0.1], [float("nan")], [[0.5]], 0.5])
def test_rhos_outside_0_to_1_are_refused(model, ends, rhos):
    with pytest.raises(ValueError, match="rhos must be one or more numbers in 0 … 1"):
        model.interpolate(*ends, rhos)


def test_bad_input_is_named(model, ends):
    z1, z2 = ends
    with pytest.raises(ValueError, match="mixing='cubic' is unknown; choose one of variance, linear, spherical"):
        model.interpolate(z1, z2, RHOS, mixing="cubic")
    with pytest.raises(ValueError, match="same shape"):
        model.interpolate(z1, z2[:2], RHOS)
    with pytest.raises(ValueError, match="z must have the shape"):
        model.interpolate(z1[..., :4], z2, RHOS)
    with pytest.raises(ValueError, match="NaN"):
        model.interpolate(z1 * float("nan"), z2, RHOS)
    with pytest.raises(ValueError, match="fresh noise needs u"):
        model.interpolate(z1, z2, RHOS, fresh=True)
    with pytest.raises(ValueError, match=r"u (must hold K = 4 tensors|at step 0 has the shape)"):
        model.interpolate(z1, z2, RHOS, u=torch.zeros(K, 5, 1, 8, 8))
