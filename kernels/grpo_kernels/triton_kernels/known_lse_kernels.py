"""dL/dlogits of rows whose softmax statistics are known from an earlier pass: one kernel, straight from hidden states.

    head_gradient_known   z as in `head_forward`; p = exp((z - maximum) - log(total)); writes dL/d(hidden @ weight.T)
                          = scale / temperature * (g (1[v = y] - p) - g_entropy p (log p + entropy))

Nothing is reduced over the vocabulary and no exponential is stored, so each logit costs one product and one store.
"""

import triton
import triton.language as tl

from grpo_kernels.triton_kernels.head_kernels import _part, _products, kept_columns
from grpo_kernels.triton_kernels.math import expm1, tanh


@triton.jit
def _gradient_of_tile(
    z, first_column, target, inverse_temperature, maximum, log_total, at_target_gradient, g, g_entropy, entropy, scale,
    bias, V, logit_scale, softcap, words, row_mask, HAS_SUPPORT: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_TEMPERATURE: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_GRAD_ENTROPY: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """The gradient of a tile of products."""
    column = tl.arange(0, WIDTH)
    z *= logit_scale
    if HAS_BIAS:
        z += tl.load(bias + first_column + column, column < V - first_column, other=0.0).to(tl.float32)[None, :]
    if HAS_SOFTCAP:
        capped = tanh(z / softcap)
        # An excluded column has no gradient: 1 - tanh**2 is 0 there.
        z = tl.where(z == float("-inf"), z, softcap * capped)
    shifted = z
    if HAS_TEMPERATURE:
        shifted = z * inverse_temperature[:, None]
    if HAS_SUPPORT:
        kept = kept_columns(words, first_column, V, row_mask, WIDTH)
        shifted = tl.where(kept, shifted, float("-inf"))
    # The maximum is subtracted first: rounding maximum + log(total) would cost large logits their last digits.
    logprob = (shifted - maximum[:, None]) - log_total[:, None]
    p = tl.exp(logprob)
    is_target = column[None, :] == (target - first_column).to(tl.int32)[:, None]
    gradient = g[:, None] * tl.where(is_target, at_target_gradient[:, None], -p)
    if HAS_GRAD_ENTROPY:
        gradient -= g_entropy[:, None] * tl.where(p > 0.0, p * (logprob + entropy[:, None]), 0.0)
    if HAS_SOFTCAP:
        gradient *= 1.0 - capped * capped
    return gradient * scale[:, None]


@triton.jit(
    do_not_specialize=["N", "tiles_per_split", "splits", "support_stride"],
    do_not_specialize_on_alignment=[
        "bias", "targets", "temperature", "maximum", "total", "weighted", "at_target", "grad_logprobs", "grad_entropy",
        "support",
    ],
)  # fmt: skip
def head_gradient_known(
    hidden,  # [N, H] in DOT_DTYPE: a pointer, or a descriptor of blocks [BLOCK_N, BLOCK_K]
    weight,  # [V, H]: a pointer, or a descriptor of blocks [BLOCK_V, BLOCK_K]
    bias,  # [V]
    targets,  # [N] int64, negative where the target lies in another shard
    temperature,  # [N] float32
    maximum,  # [N] float32, as total, weighted and at_target
    total,
    weighted,
    at_target,
    grad_logprobs,  # [N] float32
    grad_entropy,  # [N] float32
    out,  # [N, V]: the gradient; a pointer, or a descriptor of blocks [BLOCK_N, PART_V]
    N,
    V,
    padded_columns,  # of out: V, or the next multiple of 16, which needs no mask for each column
    H,
    hidden_stride,
    weight_stride_v,
    weight_stride_h,
    out_stride,
    tiles_per_split,
    splits,
    logit_scale,
    softcap,
    gradient_scale,
    support,  # [N, words] int32: a bit for each column that is kept
    support_stride,
    HAS_SUPPORT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_TEMPERATURE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_GRAD: tl.constexpr,
    HAS_GRAD_ENTROPY: tl.constexpr,
    ROW_SCALED: tl.constexpr,  # the gradient is gradient_scale times dL/dz alone
    DESCRIPTORS: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    PART_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    row_blocks = tl.cdiv(N, BLOCK_N)
    tiles = tl.cdiv(V, BLOCK_V)
    part_column = tl.arange(0, PART_V)
    for item in range(tl.program_id(0), row_blocks * splits, tl.num_programs(0)):
        split = item // row_blocks
        first_row = (item % row_blocks) * BLOCK_N
        rows = first_row + tl.arange(0, BLOCK_N).to(tl.int64)
        row_mask = rows < N
        target = tl.load(targets + rows, row_mask, other=-1)
        row_maximum = tl.load(maximum + rows, row_mask, other=0.0)
        row_total = tl.load(total + rows, row_mask, other=1.0)
        log_total = tl.log(row_total)
        z_target = tl.load(at_target + rows, row_mask, other=0.0)
        # p - 1 at the target is computed from the float32 statistics, and rounded once, in the store.
        at_target_gradient = -expm1((z_target - row_maximum) - log_total)
        g = tl.full([BLOCK_N], 1.0, tl.float32)
        if HAS_GRAD:
            g = tl.load(grad_logprobs + rows, row_mask, other=0.0)
        scale = tl.full([BLOCK_N], gradient_scale, tl.float32)
        inverse_temperature = tl.full([BLOCK_N], 1.0, tl.float32)
        if HAS_TEMPERATURE:
            inverse_temperature = 1.0 / tl.load(temperature + rows, row_mask, other=1.0)
            if not ROW_SCALED:
                scale = gradient_scale * inverse_temperature
        g_entropy = tl.zeros([BLOCK_N], tl.float32)
        entropy = tl.zeros([BLOCK_N], tl.float32)
        if HAS_GRAD_ENTROPY:
            g_entropy = tl.load(grad_entropy + rows, row_mask, other=0.0)
            entropy = log_total - tl.load(weighted + rows, row_mask, other=0.0) / row_total
        for tile in range(split * tiles_per_split, min((split + 1) * tiles_per_split, tiles)):
            first_column = tile * BLOCK_V
            z = _products(
                hidden, weight, first_row, first_column, rows, row_mask, V, H, hidden_stride, weight_stride_v,
                weight_stride_h, DESCRIPTORS, DOT_DTYPE, BLOCK_N, BLOCK_V, BLOCK_K,
            )  # fmt: skip
            for part in tl.static_range(BLOCK_V // PART_V):
                part_start = first_column + part * PART_V
                gradient = _gradient_of_tile(
                    _part(z, part, BLOCK_N, BLOCK_V, PART_V), part_start, target, inverse_temperature, row_maximum,
                    log_total, at_target_gradient, g, g_entropy, entropy, scale, bias, V, logit_scale, softcap,
                    support + rows * support_stride if HAS_SUPPORT else rows, row_mask, HAS_SUPPORT,
                    HAS_BIAS, HAS_TEMPERATURE, HAS_SOFTCAP, HAS_GRAD_ENTROPY, PART_V,
                )  # fmt: skip
                if DESCRIPTORS:
                    out.store([first_row, part_start], gradient.to(out.dtype))
                else:
                    tl.store(
                        (out + rows * out_stride + part_start)[:, None] + part_column[None, :],
                        gradient.to(out.dtype.element_ty),
                        row_mask[:, None] & (part_column < padded_columns - part_start)[None, :],
                    )
