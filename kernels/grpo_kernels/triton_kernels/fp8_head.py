"""FP8 scoring on Triton: cuBLAS's products of FP8 operands, then `row_statistics`, which restores their scales."""

from __future__ import annotations

import torch
from torch import Tensor

from grpo_kernels._fp8 import scaled
from grpo_kernels._head import Head, Rows, RowStatistics
from grpo_kernels.budget import SCORING_SCRATCH_SHARE, SCRATCH_BYTES
from grpo_kernels.triton_kernels.product_forward import Scales, forward_by_products
from grpo_kernels.triton_kernels.triton_head import TritonHead

# cuBLAS's FP8 products need a depth that is a multiple of this.
DEPTH = 16


class FP8Products:
    """``hidden @ weight.T`` of FP8 operands."""

    def __init__(self, head: Head, hidden: Tensor):
        self.head = head
        values, self.factors = scaled(hidden)
        self.hidden = _padded(values, values.shape[0], -(-values.shape[1] // DEPTH) * DEPTH)

    def __call__(self, block: slice, width: int) -> tuple[Tensor, Scales]:
        values, factors = scaled(self.head.weight[block])
        weight = _padded(values, width, self.hidden.shape[1]).t()
        if weight.device.type == "cuda":
            one = torch.ones((), device=weight.device)
            products = torch._scaled_mm(self.hidden, weight, scale_a=one, scale_b=one, out_dtype=torch.float32)
        else:
            products = self.hidden.float() @ weight.float()
        return products, Scales(self.factors, factors)


def _padded(values: Tensor, rows: int, columns: int) -> Tensor:
    """``values``, followed by zeros up to ``[rows, columns]``."""
    if values.shape == (rows, columns):
        return values
    padded = torch.zeros(rows, columns, dtype=values.dtype, device=values.device)
    padded[: values.shape[0], : values.shape[1]] = values
    return padded


class FP8TritonHead(TritonHead):
    """`TritonHead` for scoring alone."""

    def prepared(self) -> FP8TritonHead:
        return self

    def scratch_bytes(self, scoring: bool = False) -> int:
        return min(int(SCORING_SCRATCH_SHARE * self.max_buffer_bytes), SCRATCH_BYTES)

    def forward_(self, rows: Rows, out: Tensor, with_entropy: bool) -> RowStatistics:
        return self.over_shards(forward_by_products(self, FP8Products, self.combined, rows, out, with_entropy))
