import pytest
import torch

from srmcmc_lib.metrics import nearest_images


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
