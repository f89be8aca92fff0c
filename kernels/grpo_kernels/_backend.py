"""The one place that chooses a backend.

``"auto"`` is the fastest that the device supports; a named backend is used or refused, never replaced.
"""

from __future__ import annotations

import importlib.util

import torch

from grpo_kernels._checks import require, require_choice

BACKENDS = ("auto", "triton", "torch", "reference")


def choose_backend(op: str, backend: str, device: torch.device, dtype: torch.dtype) -> str:
    """The backend that runs `op`, never ``"auto"``; `dtype` is what it accumulates in.

    Raises:
        ValueError: `backend` is not one of :data:`BACKENDS`, or ``"triton"`` does not support this device or dtype.
    """
    require_choice(op, "backend", backend, BACKENDS)
    if backend == "auto":
        return auto_backend(device, dtype)
    if backend == "triton":
        obstacle = triton_obstacle(device, dtype)
        require(obstacle is None, f"{op}: backend='triton' cannot run here: {obstacle}")
    return backend


def auto_backend(device: torch.device, dtype: torch.dtype) -> str:
    return "triton" if device.type == "cuda" and triton_obstacle(device, dtype) is None else "torch"


def triton_obstacle(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why Triton kernels do not support tensors of `device` and `dtype`; None if they do."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; pip install triton"
    from grpo_kernels.triton_kernels.launch import obstacle

    return obstacle(device, dtype)
