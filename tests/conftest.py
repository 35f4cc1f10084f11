"""Shared by all tests: one thread, so that sums are taken in one order, and one global seed, which must not matter."""

import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread_and_seeded():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)
