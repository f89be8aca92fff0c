"""`kl_estimate` and `masked_mean` in Triton, forward and backward."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from grpo_kernels.triton_kernels.launch import run_kernel
from grpo_kernels.triton_kernels.math import kl_terms

BLOCK = 1024
# Rows that one program of a full reduction adds up.
SEGMENT = 16 * BLOCK


@triton.jit(do_not_specialize=["N"])
def kl_forward(logprobs, ref_logprobs, out, N, KL: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < N
    d = tl.load(logprobs + at, mask).to(tl.float32) - tl.load(ref_logprobs + at, mask).to(tl.float32)
    value, _ = kl_terms(d, KL)
    tl.store(out + at, value, mask)


@triton.jit(do_not_specialize=["N"])
def kl_backward(
    logprobs, ref_logprobs, grad_output, grad_logprobs, grad_ref, N,
    KL: tl.constexpr, NEEDS_LOGPROBS: tl.constexpr, NEEDS_REF: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < N
    d = tl.load(logprobs + at, mask).to(tl.float32) - tl.load(ref_logprobs + at, mask).to(tl.float32)
    _, slope = kl_terms(d, KL)
    grad = slope * tl.load(grad_output + at, mask)
    if NEEDS_LOGPROBS:
        tl.store(grad_logprobs + at, grad.to(grad_logprobs.dtype.element_ty), mask)
    if NEEDS_REF:
        tl.store(grad_ref + at, (-grad).to(grad_ref.dtype.element_ty), mask)


class KLEstimateTriton(torch.autograd.Function):
    """Saves its inputs; the backward computes the derivative again."""

    @staticmethod
    def forward(ctx, logprobs, ref_logprobs, estimator):
        logprobs, ref_logprobs = logprobs.contiguous(), ref_logprobs.contiguous()
        ctx.save_for_backward(logprobs, ref_logprobs)
        ctx.kl = int(estimator[1])
        out = torch.empty_like(logprobs, dtype=torch.float32)
        N = out.numel()
        run_kernel(kl_forward, out.device, -(-N // BLOCK), logprobs, ref_logprobs, out, N, KL=ctx.kl, BLOCK=BLOCK)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_output):
        logprobs, ref_logprobs = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        grads = [torch.empty_like(t) if need else None for t, need in zip(ctx.saved_tensors, wanted[:2], strict=True)]
        N = logprobs.numel()
        run_kernel(
            kl_backward, logprobs.device, -(-N // BLOCK), logprobs, ref_logprobs, grad_output.contiguous(), *grads, N,
            KL=ctx.kl, NEEDS_LOGPROBS=wanted[0], NEEDS_REF=wanted[1], BLOCK=BLOCK,
        )  # fmt: skip
        return *grads, None


@triton.jit(do_not_specialize=["numel", "length", "inner"])
def masked_sums(
    values,  # [outer, length, inner], numel of them
    mask,  # bool, the same
    sums,  # [outer, inner] float32: the sum of the masked values
    counts,  # [outer, inner] float32: their number
    numel,
    length,
    inner,
    BLOCK_L: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    blocks = tl.cdiv(inner, BLOCK_I)
    outer = (tl.program_id(0) // blocks).to(tl.int64)
    column = (tl.program_id(0) % blocks) * BLOCK_I + tl.arange(0, BLOCK_I)
    total = tl.zeros([BLOCK_L, BLOCK_I], tl.float32)
    count = tl.zeros([BLOCK_L, BLOCK_I], tl.float32)
    for first in range(0, length, BLOCK_L):
        row = first + tl.arange(0, BLOCK_L)
        at = (outer * length + row)[:, None] * inner + column[None, :]
        inside = (row < length)[:, None] & (column < inner)[None, :] & (at < numel)
        selected = tl.load(mask + at, inside, other=0) != 0
        total += tl.where(selected, tl.load(values + at, inside, other=0.0).to(tl.float32), 0.0)
        count += selected.to(tl.float32)
    at = outer * inner + column
    tl.store(sums + at, tl.sum(total, 0), column < inner)
    tl.store(counts + at, tl.sum(count, 0), column < inner)


@triton.jit(do_not_specialize=["numel", "length", "inner"])
def masked_mean_backward(
    mask,  # bool [outer, length, inner], numel of them
    grad_mean,  # [outer, inner] float32: incoming gradient over count
    grad_values,
    numel,
    length,
    inner,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < numel
    slice_size = tl.cast(length, tl.int64) * inner
    grad = tl.load(grad_mean + (at // slice_size) * inner + at % inner, inside, other=0.0)
    selected = tl.load(mask + at, inside, other=0) != 0
    tl.store(grad_values + at, tl.where(selected, grad, 0.0).to(grad_values.dtype.element_ty), inside)


class MaskedMeanTriton(torch.autograd.Function):
    """Saves the mask as it was given and the counts."""

    @staticmethod
    def forward(ctx, values, mask, dim):
        mask = mask.bool()
        shape = values.shape
        kept = torch.Size(()) if dim is None else shape[: dim % values.dim()] + shape[dim % values.dim() + 1 :]
        sums, counts = _masked_sums(values.contiguous(), mask.expand(shape).contiguous(), dim)
        ctx.save_for_backward(mask, counts)
        ctx.dim, ctx.shape, ctx.dtype = dim, shape, values.dtype
        return (sums / counts).view(kept)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_output):
        mask, counts = ctx.saved_tensors
        grad_mean = grad_output.reshape(-1) / counts
        grad = torch.empty(ctx.shape, dtype=ctx.dtype, device=grad_output.device)
        numel = grad.numel()
        _, length, inner = _factors(ctx.shape, ctx.dim)
        run_kernel(
            masked_mean_backward, grad.device, -(-numel // BLOCK),
            mask.expand(ctx.shape).contiguous(), grad_mean, grad, numel, length, inner, BLOCK=BLOCK,
        )  # fmt: skip
        return grad, None, None


def _factors(shape: torch.Size, dim: int | None) -> tuple[int, int, int]:
    """``[outer, length, inner]`` of which `length` is reduced."""
    if dim is None:
        return 1, math.prod(shape), 1
    dim %= len(shape)
    return math.prod(shape[:dim]), shape[dim], math.prod(shape[dim + 1 :])


def _masked_sums(values: Tensor, mask: Tensor, dim: int | None) -> tuple[Tensor, Tensor]:
    outer, length, inner = _factors(values.shape, dim)
    if dim is None:
        # Segments instead of one long row; the kernel compares with `numel`, since the last one may be short.
        outer, length = -(-length // SEGMENT), SEGMENT
    both = torch.empty(2, outer * inner, dtype=torch.float32, device=values.device)
    block_i = min(triton.next_power_of_2(max(inner, 1)), 128)
    run_kernel(
        masked_sums, values.device, outer * -(-inner // block_i), values, mask, *both, values.numel(), length, inner,
        BLOCK_L=max(BLOCK // block_i, 1), BLOCK_I=block_i,
    )  # fmt: skip
    if dim is not None:
        return both[0], both[1]
    # float32 is exact only for integers up to 2**24; the count of a segment is smaller.
    return both[0].sum().reshape(1), both[1].double().sum().float().reshape(1)
