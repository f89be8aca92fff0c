"""Gradients times the incoming scalar, which is nearly always 1: the device looks before it reads and writes them."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from grpo_kernels.triton_kernels.launch import processors, run_kernel

BLOCK, WARPS = 2048, 8
PROGRAMS_PER_PROCESSOR = 4


def scale_unless_one_(values: Tensor, factor: Tensor) -> None:
    """``values *= factor`` for one number on the device; if it is 1, one short launch that touches nothing else.

    Args:
        values: any shape, contiguous, float32 or 16 bits.
        factor: scalar.
    """
    blocks = -(-values.numel() // BLOCK)
    run_kernel(
        scale_unless_one, values.device, min(blocks, PROGRAMS_PER_PROCESSOR * processors(values.device)),
        values, factor.to(torch.float32), values.numel(), blocks, BLOCK=BLOCK, num_warps=WARPS,
    )  # fmt: skip


@triton.jit(do_not_specialize=["numel", "blocks"], do_not_specialize_on_alignment=["factor"])
def scale_unless_one(
    values,  # [numel]
    factor,  # [1] float32
    numel,
    blocks,
    BLOCK: tl.constexpr,
):
    scale = tl.load(factor)
    if scale != 1.0:
        for block in range(tl.program_id(0), blocks, tl.num_programs(0)):
            at = tl.cast(block, tl.int64) * BLOCK + tl.arange(0, BLOCK)
            mask = at < numel
            scaled = tl.load(values + at, mask).to(tl.float32) * scale
            tl.store(values + at, scaled.to(values.dtype.element_ty), mask)
