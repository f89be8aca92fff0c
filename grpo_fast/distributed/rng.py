"""Random state: reading it, restoring it, and separate random numbers."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy
import torch
from torch import Tensor

from grpo_fast.distributed.processes import rank, size


def rng_state() -> dict[str, Tensor]:
    """States of the random generators of torch (CPU, and the GPU in use), Python and numpy."""
    _, python, gauss = random.getstate()
    _, keys, *numpy_rest = numpy.random.get_state()
    state = {
        "torch": torch.get_rng_state(),
        "python": torch.tensor(python),
        # A normal number stored for the next call, or NaN.
        "python_gauss": torch.tensor(math.nan if gauss is None else gauss, dtype=torch.float64),
        "numpy": torch.from_numpy(keys.astype("int64")),
        "numpy_rest": torch.tensor(numpy_rest, dtype=torch.float64),
    }
    if torch.cuda.is_initialized():
        state["cuda.0"] = torch.cuda.get_rng_state()
    return state


def set_rng_state(state: dict[str, Tensor]) -> None:
    """Restore the states that `rng_state` returned."""
    gauss = state["python_gauss"].item()
    random.setstate((3, tuple(state["python"].tolist()), None if math.isnan(gauss) else gauss))
    position, has_gauss, cached = state["numpy_rest"].tolist()
    numpy.random.set_state(("MT19937", state["numpy"].numpy().astype("uint32"), int(position), int(has_gauss), cached))
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_initialized() and "cuda.0" in state:
        torch.cuda.set_rng_state(state["cuda.0"])


@contextmanager
def kept_torch_generators() -> Iterator[None]:
    """torch's random generators, of the CPU and of the GPU in use, are where they were after it.

    `torch.random.fork_rng` by itself takes every GPU of the machine, and makes a context on each.
    """
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        yield


@contextmanager
def own_random_numbers() -> Iterator[None]:
    """Within it, each process draws other random numbers; afterwards all draw the same ones again.

    A single process keeps its generators.
    """
    if size() == 1:
        yield
        return
    with own_generators(int(torch.randint(2**31, ())) + rank()):
        yield


@contextmanager
def own_generators(seed: int) -> Iterator[None]:
    """Within it, all generators are seeded with `seed`; afterwards they have their former states."""
    kept = rng_state()
    try:
        torch.manual_seed(seed)
        random.seed(seed)
        numpy.random.seed(seed % 2**32)
        yield
    finally:
        set_rng_state(kept)
