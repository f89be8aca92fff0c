"""Fixtures of every test: reproducible random numbers, and uninitialised memory that cannot pass for a result."""

import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

# The device of the kernel tests; `make test-gpu` sets it to cuda.
DEVICE = os.environ.get("GRPO_KERNELS_TEST_DEVICE", "cpu")
if DEVICE == "cpu":
    # Interpret Triton's kernels, which is decided when they are imported.
    os.environ["TRITON_INTERPRET"] = "1"
else:
    torch.set_default_device(DEVICE)

from grpo_kernels import _backend  # noqa: E402
from grpo_kernels.triton_kernels.tiles import ARCHITECTURES, Tile  # noqa: E402
from support.fake_cuda import build_guard  # noqa: E402

# Two workers share two cores; more threads would only wait for each other.
torch.set_num_threads(1)

# A runner in the background (nohup, CI) may ignore these signals, and so would every process that the tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)
if hasattr(signal, "SIGHUP"):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(autouse=True, scope="session")
def own_state(tmp_path_factory):
    """Runs record themselves in a state folder of this session instead of the user's."""
    os.environ["XDG_STATE_HOME"] = str(tmp_path_factory.mktemp("state"))


@pytest.fixture(scope="session")
def fake_cuda_guard(tmp_path_factory) -> Path:
    """The library behind `support.fake_cuda`, compiled for this session; see `run_cases` there."""
    library = build_guard(tmp_path_factory.mktemp("fake_cuda"))
    if isinstance(library, str):
        pytest.skip(library)
    return library


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def fresh_accelerator():
    """accelerate keeps its precision for the life of a process."""
    yield
    state = sys.modules.get("accelerate.state")
    if state is not None:
        state.AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(autouse=True)
def poisoned_memory():
    """`torch.empty` and the like return NaN (integers: the largest value), so that an unwritten value is noticed."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=DEVICE != "cpu")
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]


def pytest_collection_modifyitems(items):
    """Only the portable path supports float64, so its tests need not run twice."""
    items[:] = [item for item in items if not _served_by_torch(getattr(item, "callspec", None))]


def _served_by_torch(callspec) -> bool:
    params = callspec.params if callspec else {}
    return params.get("backend") == "triton" and params.get("dtype") == torch.float64


@pytest.fixture(params=["torch", "triton"])
def backend(request, monkeypatch):
    """``backend="auto"`` chooses this backend if it supports the tensors (only torch supports float64)."""

    def choose(device, dtype):
        served = request.param == "torch" or _backend.triton_obstacle(device, dtype) is None
        return request.param if served else "torch"

    monkeypatch.setattr(_backend, "auto_backend", choose)
    return request.param


@pytest.fixture
def large_tiles(monkeypatch):
    """Tiles for real vocabularies: the interpreter's time grows with the number of tiles."""
    tile = Tile(128, 2048, 64, 1024, 4, 2)
    large = replace(ARCHITECTURES["interpreter"], half=(tile,), single=(tile,))
    monkeypatch.setitem(ARCHITECTURES, "interpreter", large)
