"""Which engine runs the forward pass of a head on a GPU.

    fused      `head_forward`: one kernel, whose logits stay in registers
    products   cuBLAS's products of a block of the vocabulary, float32 in memory, then `row_statistics`

Both give the same statistics and store the same exponentials. cuBLAS multiplies faster, but writes and reads 8 bytes
for each logit, so the faster engine depends on the GPU and on H. Both are timed on a head's first chunk of at least
MEASURED_ROWS rows, and the choice is kept on disk. Until then, for shorter chunks and with a process group, whose ranks
must not choose differently, it is the engine with the lower predicted time. GRPO_KERNELS_ENGINE names an engine
instead.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from functools import lru_cache
from typing import Any

import torch
import triton
from torch._subclasses.fake_tensor import FakeTensor

from grpo_kernels._checks import require
from grpo_kernels.gpus import predicted_forward, rates_of
from grpo_kernels.triton_kernels import launch
from grpo_kernels.triton_kernels.tuning_file import TuningFile

ENGINES = ("fused", "products")
# Shorter chunks take microseconds with either engine, and predict nothing about long ones.
MEASURED_ROWS = 1024
# Runs of each engine that are timed.
ROUNDS = 5


def named_engine() -> str | None:
    """The engine that GRPO_KERNELS_ENGINE names, if any.

    Raises:
        ValueError: it names another.
    """
    name = os.environ.get("GRPO_KERNELS_ENGINE") or None
    require(
        name is None or name in ENGINES,
        f"GRPO_KERNELS_ENGINE={name} is not allowed: it must be {' or '.join(ENGINES)}, or unset",
    )
    return name


def _valid(value: Any) -> str:
    if value not in ENGINES:
        raise ValueError(value)
    return value


measured = TuningFile("engines.json", _valid)


def _rounds_to_tf32() -> bool:
    """Whether cuBLAS may round float32 operands, which the fused kernel does not."""
    try:
        return torch.backends.cuda.matmul.allow_tf32
    except RuntimeError:
        # torch raises this where its newer setting was used.
        return True


def on_gpu(device: torch.device) -> bool:
    return device.type == "cuda"


@lru_cache(maxsize=256)
def predicted(device: torch.device, dtype: torch.dtype, sizes: tuple[int, int, int], stored_bytes: int) -> str:
    """The engine with the lower predicted time; "fused" on a GPU whose rates are not known."""
    rates = rates_of(torch.cuda.get_device_name(device)) if not torch.version.hip else None
    return faster(rates, sizes, stored_bytes) if rates is not None and dtype.itemsize == 2 else "fused"


def faster(rates: Any, sizes: tuple[int, int, int], stored_bytes: int) -> str:
    return min(ENGINES, key=lambda engine: predicted_forward(rates, engine, sizes, stored_bytes))


@lru_cache(maxsize=256)
def entry(device: torch.device, dtype: torch.dtype, H: int, V: int, stored_bytes: int, softcap: bool) -> str:
    """The name of a head's measurement in the file."""
    kind = str(dtype).removeprefix("torch.")
    versions = f"torch {torch.__version__} triton {triton.__version__}"
    return f"{torch.cuda.get_device_name(device)} {versions} {kind} {softcap=} {H=} {V=} store={stored_bytes > 0}"


def decided(
    device: torch.device, dtype: torch.dtype, sizes: tuple[int, int, int], stored_bytes: int, softcap: bool, alone: bool
) -> tuple[str | None, str]:
    """(The engine that is named, measured or need not be measured, or None; the predicted one).

    Args:
        sizes: rows, H and V.
        stored_bytes: for each logit, 0 for scoring.
        alone: no other rank shares the head.
    """
    _, H, V = sizes
    named = named_engine()
    if named is not None or V == 0:
        return named or "fused", named or "fused"
    if launch.planned() is not None:
        chosen = launch.planned().engine
        if chosen is None:
            rates = launch.planned().rates
            chosen = "fused" if rates is None else faster(rates, sizes, stored_bytes)
        return chosen, chosen
    if not on_gpu(device) or (dtype == torch.float32 and _rounds_to_tf32()):
        return "fused", "fused"
    guess = predicted(device, dtype, sizes, stored_bytes)
    if not alone:
        return guess, guess
    return measured.known().get(entry(device, dtype, H, V, stored_bytes, softcap)), guess


def measure(name: str, tensor: torch.Tensor, launches: dict[str, Callable[[], Any]]) -> str | None:
    """The fastest of the launches, measured in turns and stored as `name`; None where nothing can be measured."""
    if isinstance(tensor, FakeTensor) or torch.cuda.is_current_stream_capturing():
        return None
    seconds: dict[str, list[float]] = {}
    for engine, run in launches.items():
        try:
            # Compiles its kernels.
            run()
            seconds[engine] = []
        except RuntimeError as error:
            warnings.warn(
                f"grpo_kernels: the engine {engine!r} is not used, because it failed: {str(error).splitlines()[0]}",
                stacklevel=2,
            )
    for _ in range(ROUNDS if len(seconds) > 1 else 0):
        # Events belong to the current device.
        with torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext():
            for engine, times in seconds.items():
                times.append(timed(launches[engine]))
    if not seconds:
        return None
    fastest = min(seconds, key=lambda engine: sorted(seconds[engine])[len(seconds[engine]) // 2 :][:1])
    if len(seconds) == len(launches):
        measured.keep(name, fastest)
    else:
        # The failure may be one of this process, such as too little memory.
        measured.known()[name] = fastest
    return fastest


def timed(run: Callable[[], Any]) -> float:
    """Milliseconds of a run on the current GPU."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)
