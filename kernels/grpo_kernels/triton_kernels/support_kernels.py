"""A head on the kept ids alone: a program for each token, or for each row of the weight, walks through its pairs.

    support_bits         the kept ids of each row as a mask of bits, for the kernels on the whole vocabulary
    support_forward      z of each pair, with scale, bias, softcap and temperature, and the statistics of each token
    support_gradient     z -> dL/d(hidden . weight) of each pair, in float32
    support_grad_hidden  sum of d_k weight_v over the pairs k = (n, v) of a token n
    support_grad_weight  sum of d_k hidden_n over the pairs of an id v, in the order of the tokens

Every sum is float32 and has one program, so that results are the same in each run. A product reads its row of the
weight, `w H` bytes, from memory or the second-level cache: multiplying is never what takes the time.
"""

import triton
import triton.language as tl

from grpo_kernels.triton_kernels.math import expm1, tanh


@triton.jit(do_not_specialize=["stride"], do_not_specialize_on_alignment=["ids", "starts", "ends", "words"])
def support_bits(
    ids,  # [K] int32, -1 for those of other shards
    starts,  # [C] int64
    ends,  # [C] int64
    words,  # [C, words] int32, zero before
    stride,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    start = tl.load(starts + row)
    count = (tl.load(ends + row) - start).to(tl.int32)
    for first in range(0, count, BLOCK):
        place = first + tl.arange(0, BLOCK)
        column = tl.load(ids + start + place, place < count, other=-1)
        tl.atomic_or(words + row * stride + column // 32, 1 << (column % 32), mask=column >= 0, sem="relaxed")


@triton.jit(
    do_not_specialize=["N"],
    do_not_specialize_on_alignment=[
        "bias", "ids", "starts", "ends", "tokens", "targets", "temperature", "z", "statistics",
    ],
)  # fmt: skip
def support_forward(
    hidden,  # [., H]
    weight,  # [V, H]
    bias,  # [V]
    ids,  # [K] int32, -1 for those of other shards
    starts,  # [N] int64, of the pairs of each token
    ends,  # [N] int64
    tokens,  # [N] int64: the row of `hidden` of each token
    targets,  # [N] int64, -1 where the target lies in another shard
    temperature,  # [N] float32
    z,  # [K] float32
    statistics,  # [4, N] float32: maximum, sum(e), sum(e log e), z at the target
    N,
    H,
    hidden_stride,
    weight_stride_v,
    weight_stride_h,
    logit_scale,
    softcap,
    HAS_BIAS: tl.constexpr,
    HAS_TEMPERATURE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    start = tl.load(starts + row)
    count = (tl.load(ends + row) - start).to(tl.int32)
    at_hidden = hidden + tl.load(tokens + row) * hidden_stride
    target = tl.load(targets + row).to(tl.int32)
    inverse_temperature = 1.0
    if HAS_TEMPERATURE:
        inverse_temperature = 1.0 / tl.load(temperature + row)
    maximum = tl.full([1], float("-inf"), tl.float32)
    total = tl.zeros([1], tl.float32)
    weighted = tl.zeros([1], tl.float32)
    at_target = tl.zeros([1], tl.float32)
    found = tl.zeros([1], tl.int32)
    for first in range(0, count, PAIRS):
        place = first + tl.arange(0, PAIRS)
        id = tl.load(ids + start + place, place < count, other=-1)
        inside = id >= 0
        at_weight = weight + id.to(tl.int64) * weight_stride_v
        products = tl.zeros([PAIRS, BLOCK_H], tl.float32)
        for h in range(0, H, BLOCK_H):
            depth = h + tl.arange(0, BLOCK_H)
            a = tl.load(at_hidden + depth, depth < H, other=0.0)
            b = tl.load(
                at_weight[:, None] + depth[None, :] * weight_stride_h, inside[:, None] & (depth < H)[None, :], other=0.0
            )
            products += a.to(DOT_DTYPE).to(tl.float32)[None, :] * b.to(DOT_DTYPE).to(tl.float32)
        logit = tl.sum(products, 1) * logit_scale
        if HAS_BIAS:
            logit += tl.load(bias + id, inside, other=0.0).to(tl.float32)
        if HAS_SOFTCAP:
            logit = tl.where(logit == float("-inf"), logit, softcap * tanh(logit / softcap))
        logit = tl.where(inside, logit * inverse_temperature, float("-inf"))
        tl.store(z + start + place, logit, place < count)
        is_target = inside & (id == target)
        at_target += tl.sum(tl.where(is_target, logit, 0.0), 0)
        found += tl.sum(is_target.to(tl.int32), 0)
        merged = tl.maximum(maximum, tl.max(logit, 0))
        finite = tl.where(merged == float("-inf"), 0.0, merged)
        shift = tl.where(maximum == float("-inf"), 0.0, maximum - finite)
        # An excluded id must count as 0 * log 0 = 0; exp(-200) is 0 already. NaN stays NaN.
        log_e = tl.maximum(logit - finite, -200.0, propagate_nan=tl.PropagateNan.ALL)
        e = tl.exp(log_e)
        weighted = tl.exp(shift) * (weighted + shift * total) + tl.sum(e * log_e, 0)
        total = tl.exp(shift) * total + tl.sum(e, 0)
        maximum = merged
    # The target of another shard adds 0 there; one that was not kept has no logit.
    at_target = tl.where((found == 0) & (target >= 0), float("-inf"), at_target)
    one = tl.arange(0, 1)
    values = (maximum, total, weighted, at_target)
    for index in tl.static_range(4):
        tl.store(statistics + index * tl.cast(N, tl.int64) + row + one, values[index])


@triton.jit(
    do_not_specialize_on_alignment=[
        "z", "ids", "starts", "ends", "targets", "temperature", "maximum", "total", "weighted", "at_target",
        "grad_logprobs", "grad_entropy", "d",
    ],
)  # fmt: skip
def support_gradient(
    z,  # [K] float32
    ids,  # [K] int32
    starts,  # [N] int64
    ends,  # [N] int64
    targets,  # [N] int64
    temperature,  # [N] float32
    maximum,  # [N] float32, as total, weighted and at_target
    total,
    weighted,
    at_target,
    grad_logprobs,  # [N] float32
    grad_entropy,  # [N] float32
    d,  # [K] float32
    logit_scale,
    softcap,
    HAS_TEMPERATURE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_GRAD_ENTROPY: tl.constexpr,
    PAIRS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    start = tl.load(starts + row)
    count = (tl.load(ends + row) - start).to(tl.int32)
    target = tl.load(targets + row).to(tl.int32)
    row_maximum = tl.load(maximum + row)
    row_total = tl.load(total + row)
    log_total = tl.log(row_total)
    target_logprob = (tl.load(at_target + row) - row_maximum) - log_total
    g = tl.load(grad_logprobs + row)
    row_temperature = 1.0
    if HAS_TEMPERATURE:
        row_temperature = tl.load(temperature + row)
    g_entropy = 0.0
    entropy = 0.0
    if HAS_GRAD_ENTROPY:
        g_entropy = tl.load(grad_entropy + row)
        entropy = log_total - tl.load(weighted + row) / row_total
    for first in range(0, count, PAIRS):
        place = first + tl.arange(0, PAIRS)
        id = tl.load(ids + start + place, place < count, other=-1)
        inside = id >= 0
        logit = tl.load(z + start + place, place < count, other=float("-inf"))
        logprob = (logit - row_maximum) - log_total
        p = tl.exp(logprob)
        gradient = g * tl.where(inside & (id == target), -expm1(target_logprob), -p)
        if HAS_GRAD_ENTROPY:
            gradient -= g_entropy * tl.where(p > 0.0, p * (logprob + entropy), 0.0)
        if HAS_SOFTCAP:
            capped = tl.where(logit == float("-inf"), 0.0, logit) * row_temperature / softcap
            gradient *= tl.maximum(1.0 - capped * capped, 0.0)
        gradient = tl.where(inside, gradient * (logit_scale / row_temperature), 0.0)
        tl.store(d + start + place, gradient, place < count)


@triton.jit(
    do_not_specialize_on_alignment=["d", "ids", "starts", "ends", "tokens"],
)
def support_grad_hidden(
    d,  # [K] float32
    ids,  # [K] int32
    starts,  # [N] int64
    ends,  # [N] int64
    tokens,  # [N] int64: the row of `out` of each token
    weight,  # [V, H]
    out,  # [., H]
    H,
    weight_stride_v,
    weight_stride_h,
    out_stride,
    DOT_DTYPE: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    spans = tl.cdiv(H, BLOCK_H)
    row = (tl.program_id(0) // spans).to(tl.int64)
    depth = (tl.program_id(0) % spans) * BLOCK_H + tl.arange(0, BLOCK_H)
    start = tl.load(starts + row)
    count = (tl.load(ends + row) - start).to(tl.int32)
    sums = tl.zeros([PAIRS, BLOCK_H], tl.float32)
    for first in range(0, count, PAIRS):
        place = first + tl.arange(0, PAIRS)
        id = tl.load(ids + start + place, place < count, other=-1)
        value = tl.load(d + start + place, place < count, other=0.0)
        b = tl.load(
            (weight + id.to(tl.int64) * weight_stride_v)[:, None] + depth[None, :] * weight_stride_h,
            (id >= 0)[:, None] & (depth < H)[None, :],
            other=0.0,
        )
        sums += value[:, None] * b.to(DOT_DTYPE).to(tl.float32)
    at = out + tl.load(tokens + row) * out_stride + depth
    tl.store(at, tl.sum(sums, 0).to(out.dtype.element_ty), depth < H)


@triton.jit(
    do_not_specialize_on_alignment=["d", "order", "bounds", "pair_tokens", "grad_bias"],
)
def support_grad_weight(
    d,  # [K] float32, 0 for pairs without a gradient
    order,  # [K] int64: the pairs in the order of their ids
    bounds,  # [V + 1] int64: the pairs of each id in `order`
    pair_tokens,  # [K] int64: the row of `hidden` of each pair
    hidden,  # [., H]
    out,  # [V, H]
    grad_bias,  # [V] float32
    H,
    hidden_stride,
    out_stride,
    bias_scale,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ADD: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    spans = tl.cdiv(H, BLOCK_H)
    span = tl.program_id(0) % spans
    column = (tl.program_id(0) // spans).to(tl.int64)
    depth = span * BLOCK_H + tl.arange(0, BLOCK_H)
    start = tl.load(bounds + column)
    count = (tl.load(bounds + column + 1) - start).to(tl.int32)
    if count > 0:
        sums = tl.zeros([PAIRS, BLOCK_H], tl.float32)
        of_bias = tl.zeros([PAIRS], tl.float32)
        for first in range(0, count, PAIRS):
            place = first + tl.arange(0, PAIRS)
            pair = tl.load(order + start + place, place < count, other=0)
            value = tl.load(d + pair, place < count, other=0.0)
            if HAS_BIAS:
                of_bias += value
            if HAS_WEIGHT:
                token = tl.load(pair_tokens + pair, place < count, other=0)
                # A token without a gradient may have a hidden state that is not finite.
                a = tl.load(
                    (hidden + token * hidden_stride)[:, None] + depth[None, :],
                    (value != 0.0)[:, None] & (depth < H)[None, :],
                    other=0.0,
                )
                sums += value[:, None] * a.to(DOT_DTYPE).to(tl.float32)
        if HAS_WEIGHT:
            at = out + column * out_stride + depth
            found = tl.sum(sums, 0)
            if ADD:
                found += tl.load(at, depth < H, other=0.0)
            tl.store(at, found.to(out.dtype.element_ty), depth < H)
        if HAS_BIAS:
            one = tl.arange(0, 1)
            tl.store(grad_bias + column + one, tl.sum(of_bias, 0) * bias_scale + one, span + one == 0)
