"""Which head scores with FP8 operands, and where FP8 scoring is not available."""

from __future__ import annotations

from dataclasses import fields

import torch

from grpo_kernels._checks import require
from grpo_kernels._fp8 import FP8TorchHead
from grpo_kernels._head import Head

# The first NVIDIA GPUs whose tensor cores multiply FP8: sm_89 (RTX 40, L4) and sm_90.
CAPABILITY = 8, 9


def fp8_head(op: str, head: Head, needs: tuple[bool, ...], backend: str) -> Head:
    """The head that scores with FP8 operands in place of `head`, for its backend.

    Raises:
        ValueError: a gradient is needed, or the backend, dtype or device has no FP8 scoring.
    """
    said, device = f"{op}: precision='fp8'", head.weight.device
    require(not any(needs), f"{said} has no gradients; call it under torch.no_grad(), or leave precision out")
    require(backend != "reference", f"{said} needs backend 'auto', 'triton' or 'torch', got 'reference'")
    require(head.operand_dtype != torch.float64, f"{said} needs 16-bit or float32 operands, got float64")
    if device.type == "cuda":
        found = torch.cuda.get_device_capability(device)
        name = f"sm_{found[0]}{found[1]}" if torch.version.hip is None else "an AMD GPU"
        require(
            torch.version.hip is None and found >= CAPABILITY,
            f"{said} needs an NVIDIA GPU of sm_89 or newer, or a CPU, where it is emulated; got {name}",
        )
    kind: type[Head] = FP8TorchHead
    if backend == "triton":
        from grpo_kernels.triton_kernels.fp8_head import FP8TritonHead as kind
    return kind(**{field.name: getattr(head, field.name) for field in fields(head)})
