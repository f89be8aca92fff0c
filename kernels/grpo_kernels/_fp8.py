"""FP8 scoring: the products of a head from operands rounded to 8 bits, for scores without gradients.

A row of hidden states, and a row of the weight, is scaled by a power of two so that its largest element fits
float8_e4m3fn, whose 3 bits of mantissa round every element by up to 6%. Products are added up in float32.
"""

from __future__ import annotations

from dataclasses import fields

import torch
from torch import Tensor

from grpo_kernels._checks import require
from grpo_kernels._head import Head
from grpo_kernels._torch_head import TorchHead

FP8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FP8).max
# The first NVIDIA GPUs whose tensor cores multiply FP8: sm_89 (RTX 40, L4) and sm_90.
CAPABILITY = 8, 9
# Copies of a block of the weight that exist at once while it is rounded.
COPIES = 4


def scaled(rows: Tensor) -> tuple[Tensor, Tensor]:
    """``rows [n, H]`` as FP8 values and factors ``[n]`` float32, powers of two, that restore them."""
    values = rows.float()
    largest = values.abs().amax(1)
    exponent = torch.log2(LARGEST / torch.where(largest == 0, LARGEST, largest)).floor()
    return (values * torch.exp2(exponent)[:, None]).to(FP8), torch.exp2(-exponent)


def rounded(rows: Tensor) -> Tensor:
    """``rows [n, H]`` rounded to FP8, in float32."""
    values, factors = scaled(rows)
    return values.float() * factors[:, None]


class FP8TorchHead(TorchHead):
    """Products of operands rounded to FP8, by those of wider dtypes: as exact as a GPU's, but not faster."""

    def prepared(self) -> FP8TorchHead:
        return self

    def operand(self, rows: Tensor) -> Tensor:
        return rounded(rows).to(self.product_dtype)

    def block_width(self, dtype: torch.dtype, num_rows: int) -> int:
        row_bytes = max(num_rows, self.weight.shape[1], 1) * self.dtype.itemsize
        return max(self.block_bytes // (COPIES * row_bytes), 1)


def fp8_head(op: str, head: Head, needs: tuple[bool, ...], backend: str) -> Head:
    """The head that scores with FP8 operands, of `head` and its backend.

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
