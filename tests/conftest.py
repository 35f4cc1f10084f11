"""Shared by all tests: one thread, so that sums are taken in one order and results can be compared bit for bit."""

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def seeded():
    """Every test starts from the same global seed; the library itself must not depend on it."""
    torch.manual_seed(0)
