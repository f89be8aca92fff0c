"""Fixtures every test gets: reproducible random numbers, and uninitialised memory that cannot pass for a result."""

import pytest
import torch

# Two workers share two cores; threads of their own would only wait for each other.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def poisoned_memory():
    """`torch.empty` and its kin come filled with NaN (integers: the largest), so that an unwritten value shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]
