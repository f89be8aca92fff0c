"""Which backend runs an operation."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping

import torch

from grpo_kernels._checks import require

BACKENDS = ("auto", "triton", "torch", "reference")


def choose_backend(
    op: str, implementations: Mapping[str, Callable], backend: str, device: torch.device, dtype: torch.dtype
) -> Callable:
    """Return the implementation of `op` for `backend`; `dtype` is what it accumulates in.

    Raises:
        ValueError: `backend` is not one of :data:`BACKENDS`, or ``"triton"`` cannot serve this device or dtype.
    """
    return implementations[backend_name(op, backend, device, dtype)]


def backend_name(op: str, backend: str, device: torch.device, dtype: torch.dtype) -> str:
    """The row of an operation's table that `backend` means; as :func:`choose_backend`."""
    if backend not in BACKENDS:
        raise ValueError(f"{op}: backend={backend!r} is unknown; choose one of {', '.join(BACKENDS)}")
    if backend == "auto":
        return auto_backend(device, dtype)
    if backend == "triton":
        obstacle = triton_obstacle(device, dtype)
        require(obstacle is None, f"{op}: backend='triton' cannot run here: {obstacle}")
    return backend


def auto_backend(device: torch.device, dtype: torch.dtype) -> str:
    return "triton" if device.type == "cuda" and triton_obstacle(device, dtype) is None else "torch"


def triton_obstacle(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why Triton kernels cannot take tensors of `device` and `dtype`; None where they can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; pip install triton"
    from grpo_kernels.triton_kernels.launch import obstacle

    return obstacle(device, dtype)
