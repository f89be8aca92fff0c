"""One step of AdamW on one tensor, with stochastic rounding to bfloat16, in one kernel: 22 to 28 bytes a weight."""

import triton
import triton.language as tl
from torch import Tensor

from grpo_kernels.triton_kernels.launch import run_kernel

BLOCK, WARPS = 2048, 8


@triton.jit
def mix(x):
    """A bijection of uint32 whose every output bit depends on every input bit ("lowbias32" of C. Wellons, 2018)."""
    x = x ^ (x >> 16)
    x = x * 0x7FEB352D
    x = x ^ (x >> 15)
    x = x * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def random_bits(counter, key, second_key):
    """uint32, a function of the counter and of both keys; see `grpo_kernels.adamw.random_bits`."""
    keyed = mix(counter.to(tl.uint32) ^ key.to(tl.uint32))
    return mix(keyed ^ second_key.to(tl.uint32))


@triton.jit
def update(
    weight, grad, exp_avg, exp_avg_sq, at, mask, counter, key, second_key,
    decay, beta1, beta2, step_size, bias_correction, eps,
):  # fmt: skip
    w = tl.load(weight + at, mask).to(tl.float32)
    g = tl.load(grad + at, mask).to(tl.float32)
    mean = tl.load(exp_avg + at, mask)
    square = tl.load(exp_avg_sq + at, mask)
    mean += (1.0 - beta1) * (g - mean)
    square += (1.0 - beta2) * (g * g - square)
    w -= decay * w + step_size * mean / (tl.sqrt(square) * bias_correction + eps)
    if weight.dtype.element_ty == tl.bfloat16:
        bits = w.to(tl.uint32, bitcast=True) + (random_bits(counter + at, key, second_key) & 0xFFFF)
        rounded = (bits & 0xFFFF0000).to(tl.float32, bitcast=True)
        # A NaN whose bits are all ones would become a zero.
        w = tl.where(w == w, rounded, w)
    tl.store(weight + at, w.to(weight.dtype.element_ty), mask)
    tl.store(exp_avg + at, mean, mask)
    tl.store(exp_avg_sq + at, square, mask)


@triton.jit(do_not_specialize=["numel", "key", "second_key"])
def adamw_step(
    weight,  # [numel]
    grad,  # [numel]
    exp_avg,  # [numel] float32
    exp_avg_sq,  # [numel] float32
    numel,
    key,
    second_key,
    decay,  # learning rate times weight decay
    beta1,
    beta2,
    step_size,  # learning rate over 1 - beta1**step
    bias_correction,  # 1 over the square root of 1 - beta2**step
    eps,
    BLOCK: tl.constexpr,
):
    start = tl.program_id(0).to(tl.int64) * BLOCK
    at = tl.arange(0, BLOCK)
    # Whole blocks have no mask, so that every access takes 16 bytes, whatever `numel` is a multiple of.
    if start + BLOCK <= numel:
        update(
            weight + start, grad + start, exp_avg + start, exp_avg_sq + start, at, None, start, key, second_key,
            decay, beta1, beta2, step_size, bias_correction, eps,
        )  # fmt: skip
    else:
        update(
            weight + start, grad + start, exp_avg + start, exp_avg_sq + start, at, at < numel - start, start, key,
            second_key, decay, beta1, beta2, step_size, bias_correction, eps,
        )  # fmt: skip


def adamw_step_(
    weight: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, keys: tuple[int, int], *numbers: float
) -> None:
    """Launch the step on flat tensors; `numbers` are those of `adamw_step` in its order."""
    run_kernel(
        adamw_step, weight.device, -(-weight.numel() // BLOCK), weight, grad, exp_avg, exp_avg_sq, weight.numel(),
        *keys, *numbers, BLOCK=BLOCK, num_warps=WARPS,
    )  # fmt: skip
