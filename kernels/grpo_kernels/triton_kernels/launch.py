"""Where the kernels run: the architecture of a device, what is refused in one line, and launches."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch

from grpo_kernels.gpus import GPU
from grpo_kernels.triton_kernels.tiles import ARCHITECTURES, nearest_architecture


def interpreting() -> bool:
    """Whether the kernels run in Triton's interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


if interpreting():
    from grpo_kernels.triton_kernels import interpreter

    interpreter.install()


@dataclass(frozen=True)
class Launch:
    """One launch that was planned, not made: the arguments by their names, and the options of the launch."""

    kernel: str
    programs: int
    arguments: dict[str, Any]


@dataclass(frozen=True)
class PlannedGPU:
    """A GPU that is not present: launches for it are recorded in `record`.

    Its engine is the one named, or else the one with the lower predicted time at its rates.
    """

    architecture: str
    processors: int
    record: list[Any] = field(default_factory=list)
    rates: GPU | None = None
    engine: str | None = None


_planned: PlannedGPU | None = None


@contextmanager
def planning(gpu: PlannedGPU) -> Iterator[None]:
    """Within it every launch is noted for `gpu` instead of being made, whatever device the tensors are on."""
    global _planned
    before, _planned = _planned, gpu
    try:
        yield
    finally:
        _planned = before


def planned() -> PlannedGPU | None:
    """The GPU that launches are noted for, if any."""
    return _planned


def device_name(device: torch.device) -> str | None:
    """``"sm_90"``, ``"gfx942"`` and so on; None for a device that Triton does not compile for."""
    if device.type != "cuda":
        return None
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return properties.gcnArchName.split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def architecture_of(device: torch.device) -> str | None:
    """The row of :data:`ARCHITECTURES` for `device`, or None."""
    if _planned is not None:
        return _planned.architecture
    if interpreting():
        return "interpreter"
    name = device_name(device)
    return None if name is None else nearest_architecture(name)


def obstacle(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the kernels do not support tensors of `dtype` on `device`; None if they do."""
    if dtype == torch.float64:
        return "float64 is computed by backend='torch'"
    if architecture_of(device) is not None:
        return None
    known = ", ".join(name for name in ARCHITECTURES if name != "interpreter")
    if device.type != "cuda":
        return f"tensors are on {device}; it needs a GPU ({known}), or TRITON_INTERPRET=1 to run on the CPU, slowly"
    return f"unsupported architecture {device_name(device)}; there are kernels for {known}"


def run_kernel(kernel: Any, device: torch.device, programs: int, *arguments: Any, **constants: Any) -> None:
    """Launch `programs` programs of a kernel, if any, on `device`: by itself Triton takes the current device."""
    if programs and _planned is not None:
        named = dict(zip(kernel.arg_names, arguments, strict=False))
        _planned.record.append(Launch(kernel.__name__, programs, named | constants))
    elif programs:
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            kernel[(programs,)](*arguments, **constants)


def processors(device: torch.device) -> int:
    """How many programs run at once, at least."""
    if _planned is not None:
        return _planned.processors
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
