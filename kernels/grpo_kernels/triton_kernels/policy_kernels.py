"""The policy loss in Triton: loss, derivative and every logged sum in one pass over the tokens.

    policy_tokens     ratio of a token: each program computes a block of tokens
    policy_sequences  ratio of a sequence (mean or product of its tokens'): each program reads the tokens of a sequence
                      once for the ratio, once for the terms and once to add the derivative of the ratio

Both write float32 sums [8, programs] (the loss, then the statistics `STATISTICS` of `_policy_terms.py`), which are
added up afterwards, always in the same order. Clip bounds and coefficients are run-time numbers.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from grpo_kernels._policy_terms import STATISTICS, VESPO_BOUNDS, Terms, Tokens
from grpo_kernels.objective import PolicyObjective
from grpo_kernels.triton_kernels.launch import run_kernel
from grpo_kernels.triton_kernels.math import kl_terms, sigmoid

BLOCK, WARPS = 1024, 8
CLIP, CISPO, SAPO, VESPO, REINFORCE = (tl.constexpr(index) for index in range(5))
KINDS = {"clip": 0, "cispo": 1, "sapo": 2, "vespo": 3, "reinforce": 4}
VESPO_LOW, VESPO_HIGH = (tl.constexpr(bound) for bound in VESPO_BOUNDS)
_POINTERS = ["logprobs", "advantages", "weights", "old_logprobs", "ref_logprobs", "correction", "entropy", "offsets"]
_POINTERS += ["grad_logprobs", "sums"]


@triton.jit
def _objective(
    ratio, logp, A, low, high, delta, pos, neg, decay_pos, decay_neg, KIND: tl.constexpr, HAS_DELTA: tl.constexpr
):
    """l, dl/dlog_ratio and dl/dlogp at a fixed ratio: as in `_policy_terms.TOKEN_LOSSES`. NaN passes every bound.

    `pos` and `neg` are sapo's temperatures or vespo's k, `decay_pos` and `decay_neg` vespo's lambda.
    """
    through = tl.zeros(ratio.shape, tl.float32)
    direct = tl.zeros(ratio.shape, tl.float32)
    if KIND == CLIP:
        # On a bound the gradient passes.
        upper = tl.where(ratio > high, high, ratio)
        lower = tl.where(ratio < low, low, ratio)
        if HAS_DELTA:
            lower = tl.where(lower > delta, delta, lower)
        bounded = tl.where(A > 0, upper, lower)
        value = -A * bounded
        through = tl.where(ratio == bounded, -A * ratio, 0.0)
    elif KIND == CISPO:
        direct = -A * tl.where(ratio > high, high, ratio)
        value = direct * logp
    elif KIND == SAPO:
        tau = tl.where(A > 0, pos, neg)
        gate = sigmoid(tau * (ratio - 1.0))
        slope = 4.0 * gate * sigmoid(-tau * (ratio - 1.0)) * ratio
        value = -4.0 / tau * gate * A
        through = tl.where(gate < 1.0, -A * slope, 0.0)
    elif KIND == VESPO:
        k = tl.where(A > 0, pos, neg)
        decay = tl.where(A > 0, decay_pos, decay_neg)
        bounded = tl.where(ratio > VESPO_HIGH, VESPO_HIGH, tl.where(ratio < VESPO_LOW, VESPO_LOW, ratio))
        direct = -A * tl.exp(k * tl.log(bounded) + decay * (1.0 - bounded))
        value = direct * logp
    else:
        direct = -A
        value = direct * logp
    return value, through, direct


@triton.jit
def _terms(
    at, mask, counted, w, logp, A, ratio, share, ref_logprobs, correction, entropy,
    low, high, delta, pos, neg, decay_pos, decay_neg, beta, kl_clip, entropy_coef,
    KIND: tl.constexpr, KL: tl.constexpr, HAS_DELTA: tl.constexpr, HAS_REF: tl.constexpr,
    HAS_CORRECTION: tl.constexpr, HAS_ENTROPY: tl.constexpr, KL_BIAS_CORRECTION: tl.constexpr,
):  # fmt: skip
    """For a block of tokens: dL/dlog_ratio, dL/dlogp at a fixed ratio, and the eight sums; `share` counts a ratio."""
    value, through, direct = _objective(
        ratio, logp, A, low, high, delta, pos, neg, decay_pos, decay_neg, KIND, HAS_DELTA
    )  # fmt: skip
    scale = w
    if HAS_CORRECTION:
        scale *= tl.where(counted, tl.load(correction + at, mask, other=0.0), 0.0)
    # With A = 0 an infinite ratio would still make NaN, and the coefficient must be exactly zero.
    active = A != 0
    loss = tl.where(active, scale * value, 0.0)
    through = tl.where(active, scale * through, 0.0)
    direct = tl.where(active, scale * direct, 0.0)
    kl = tl.zeros(w.shape, tl.float32)
    if HAS_REF:
        kl, kl_slope = kl_terms(logp - tl.where(counted, tl.load(ref_logprobs + at, mask, other=0.0), 0.0), KL)
        # NaN passes.
        outside = tl.abs(kl) > kl_clip
        kl = tl.where(outside, tl.where(kl > 0, kl_clip, -kl_clip), kl)
        kl_slope = tl.where(outside, 0.0, kl_slope)
        if beta != 0.0:
            factor = beta * w
            if KL_BIAS_CORRECTION:
                factor *= ratio
                through += factor * kl
            loss += factor * kl
            direct += factor * kl_slope
    token_entropy = tl.zeros(w.shape, tl.float32)
    if HAS_ENTROPY:
        token_entropy = tl.where(counted, tl.load(entropy + at, mask, other=0.0), 0.0)
        loss -= entropy_coef * w * token_entropy
    clips_low = tl.zeros(w.shape, tl.float32)
    clips_high = tl.zeros(w.shape, tl.float32)
    if KIND == CLIP:
        clips_low = tl.where((ratio < low) & (A < 0), share, 0.0)
    if KIND == CLIP or KIND == CISPO:  # noqa: SIM109 (compiled by Triton)
        clips_high = tl.where((ratio > high) & (A > 0), share, 0.0)
    ones = counted.to(tl.float32)
    sums = (
        tl.sum(loss, 0), tl.sum(ones, 0), tl.sum(token_entropy, 0), tl.sum(tl.where(counted, kl, 0.0), 0),
        tl.sum(share, 0), tl.sum(tl.where(counted, share * ratio, 0.0), 0), tl.sum(clips_low, 0),
        tl.sum(clips_high, 0),
    )  # fmt: skip
    return through, direct, sums


@triton.jit
def _load_tokens(at, mask, logprobs, advantages, weights, old_logprobs, HAS_OLD: tl.constexpr):
    """(counted, w, logp, A, log_ratio); garbage under a zero weight is replaced before any arithmetic."""
    w = tl.load(weights + at, mask, other=0.0)
    counted = w != 0
    logp = tl.where(counted, tl.load(logprobs + at, mask, other=0.0), 0.0)
    A = tl.where(counted, tl.load(advantages + at, mask, other=0.0), 0.0)
    log_ratio = tl.zeros(w.shape, tl.float32)
    if HAS_OLD:
        log_ratio = tl.where(counted, logp - tl.load(old_logprobs + at, mask, other=0.0), 0.0)
    return counted, w, logp, A, log_ratio


@triton.jit(do_not_specialize=["N"], do_not_specialize_on_alignment=_POINTERS)
def policy_tokens(
    logprobs, advantages, weights, old_logprobs, ref_logprobs, correction, entropy, offsets, grad_logprobs, sums,
    N, low, high, delta, pos, neg, decay_pos, decay_neg, beta, kl_clip, entropy_coef,
    KIND: tl.constexpr, KL: tl.constexpr, HAS_DELTA: tl.constexpr, HAS_OLD: tl.constexpr, HAS_REF: tl.constexpr,
    HAS_CORRECTION: tl.constexpr, HAS_ENTROPY: tl.constexpr, KL_BIAS_CORRECTION: tl.constexpr, PRODUCT: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < N
    counted, w, logp, A, log_ratio = _load_tokens(at, mask, logprobs, advantages, weights, old_logprobs, HAS_OLD)
    through, direct, block_sums = _terms(
        at, mask, counted, w, logp, A, tl.exp(log_ratio), counted.to(tl.float32), ref_logprobs, correction, entropy,
        low, high, delta, pos, neg, decay_pos, decay_neg, beta, kl_clip, entropy_coef,
        KIND, KL, HAS_DELTA, HAS_REF, HAS_CORRECTION, HAS_ENTROPY, KL_BIAS_CORRECTION,
    )  # fmt: skip
    tl.store(grad_logprobs + at, through + direct, mask)
    for index in tl.static_range(8):
        tl.store(sums + index * tl.num_programs(0) + tl.program_id(0), block_sums[index])


@triton.jit(do_not_specialize=["N"], do_not_specialize_on_alignment=_POINTERS)
def policy_sequences(
    logprobs, advantages, weights, old_logprobs, ref_logprobs, correction, entropy, offsets, grad_logprobs, sums,
    N, low, high, delta, pos, neg, decay_pos, decay_neg, beta, kl_clip, entropy_coef,
    KIND: tl.constexpr, KL: tl.constexpr, HAS_DELTA: tl.constexpr, HAS_OLD: tl.constexpr, HAS_REF: tl.constexpr,
    HAS_CORRECTION: tl.constexpr, HAS_ENTROPY: tl.constexpr, KL_BIAS_CORRECTION: tl.constexpr, PRODUCT: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    sequence = tl.program_id(0)
    # Unchecked offsets must not lead outside the tensors.
    start = tl.maximum(tl.load(offsets + sequence).to(tl.int64), 0)
    end = tl.minimum(tl.load(offsets + sequence + 1).to(tl.int64), N)
    log_ratios = tl.zeros([BLOCK], tl.float32)
    counts = tl.zeros([BLOCK], tl.float32)
    for first in range(start, end, BLOCK):
        at = first + tl.arange(0, BLOCK)
        counted, w, logp, A, log_ratio = _load_tokens(
            at, at < end, logprobs, advantages, weights, old_logprobs, HAS_OLD
        )
        log_ratios += log_ratio
        counts += counted.to(tl.float32)
    length = tl.maximum(tl.sum(counts, 0), 1.0)
    divisor = length
    if PRODUCT:
        divisor = 1.0
    sequence_ratio = tl.exp(tl.sum(log_ratios, 0) / divisor)

    throughs = tl.zeros([BLOCK], tl.float32)
    totals = (0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
    for first in range(start, end, BLOCK):
        at = first + tl.arange(0, BLOCK)
        mask = at < end
        counted, w, logp, A, log_ratio = _load_tokens(at, mask, logprobs, advantages, weights, old_logprobs, HAS_OLD)
        through, direct, block_sums = _terms(
            at, mask, counted, w, logp, A, tl.zeros([BLOCK], tl.float32) + sequence_ratio,
            counted.to(tl.float32) / length, ref_logprobs, correction, entropy,
            low, high, delta, pos, neg, decay_pos, decay_neg, beta, kl_clip, entropy_coef,
            KIND, KL, HAS_DELTA, HAS_REF, HAS_CORRECTION, HAS_ENTROPY, KL_BIAS_CORRECTION,
        )  # fmt: skip
        throughs += through
        totals = _add(totals, block_sums)
        tl.store(grad_logprobs + at, direct, mask)
    for index in tl.static_range(8):
        tl.store(sums + index * tl.num_programs(0) + sequence, totals[index])

    # Every token of a sequence has a share in its ratio; in a mean, 1 / length.
    each = tl.sum(throughs, 0) / divisor
    for first in range(start, end, BLOCK):
        at = first + tl.arange(0, BLOCK)
        mask = at < end
        counted = tl.load(weights + at, mask, other=0.0) != 0
        direct = tl.load(grad_logprobs + at, mask, other=0.0)
        tl.store(grad_logprobs + at, tl.where(counted, direct + each, 0.0), mask)


@triton.jit
def _add(a, b):
    return (
        a[0] + b[0], a[1] + b[1], a[2] + b[2], a[3] + b[3], a[4] + b[4], a[5] + b[5], a[6] + b[6], a[7] + b[7]
    )  # fmt: skip


def policy_terms_triton(
    logprobs: Tensor,
    tokens: Tokens,
    objective: PolicyObjective,
    entropy: Tensor | None = None,
    offsets: Tensor | None = None,
) -> Terms:
    """`_policy_terms.policy_terms` in one kernel; float32 ``[N]`` tensors."""
    o, N = objective, logprobs.numel()
    fields = (None if field is None else field.contiguous() for field in (logprobs, *tokens, entropy))
    logprobs, advantages, weights, old, ref, correction, _, entropy = fields
    by_sequence = o.level != "token"
    programs = offsets.numel() - 1 if by_sequence else -(-N // BLOCK)
    # Unchecked offsets may leave tokens without a sequence; they have no gradient.
    grad = torch.zeros_like(logprobs) if by_sequence else torch.empty_like(logprobs)
    sums = torch.empty(1 + len(STATISTICS), programs, dtype=torch.float32, device=logprobs.device)
    shape = (o.vespo_k_pos, o.vespo_k_neg) if o.kind == "vespo" else (o.sapo_temperature_pos, o.sapo_temperature_neg)
    run_kernel(
        policy_sequences if by_sequence else policy_tokens, logprobs.device, programs,
        logprobs, advantages, weights, old, ref, correction, entropy, offsets, grad, sums,
        N, o.lower_bound, o.upper_bound, o.delta or 0.0, *shape, o.vespo_lambda_pos, o.vespo_lambda_neg,
        float(o.beta), math.inf if o.kl_clip is None else float(o.kl_clip), float(o.entropy_coef),
        KIND=KINDS[o.kind], KL=int(o.kl[1]), HAS_DELTA=o.delta is not None, HAS_OLD=old is not None,
        HAS_REF=ref is not None, HAS_CORRECTION=correction is not None, HAS_ENTROPY=entropy is not None,
        KL_BIAS_CORRECTION=o.kl_bias_correction, PRODUCT=o.level == "product", BLOCK=BLOCK, num_warps=WARPS,
    )  # fmt: skip
    loss, *stats = sums.sum(1)
    return Terms(loss, torch.stack(stats), grad, None if entropy is None else -o.entropy_coef * weights)
