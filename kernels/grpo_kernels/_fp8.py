"""FP8 scoring: the products of a head from operands rounded to 8 bits, for scores without gradients.

A row of hidden states, and a row of the weight, is scaled by a power of two so that its largest element fits
float8_e4m3fn, whose 3 bits of mantissa round every element by up to 6%. Products are added up in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from grpo_kernels._torch_head import TorchHead

FP8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FP8).max
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
    """Products of operands rounded to FP8, computed in a wider dtype: as exact as a GPU's, but not faster."""

    def prepared(self) -> FP8TorchHead:
        return self

    def operand(self, rows: Tensor) -> Tensor:
        return rounded(rows).to(self.product_dtype)

    def block_width(self, dtype: torch.dtype, num_rows: int) -> int:
        row_bytes = max(num_rows, self.weight.shape[1], 1) * self.dtype.itemsize
        return max(self.block_bytes // (COPIES * row_bytes), 1)
