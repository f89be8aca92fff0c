"""Tokens and sequences that a step leaves out or selects, by their log-probabilities.

    covariance_mask   the tokens that drive the entropy down                   Clip-Cov, KL-Cov: arXiv 2505.22617
    off_policy_mask   negative sequences far from the policy that sampled them DeepSeek-V3.2, arXiv 2512.02556, eq. 9
    rejection_mask    tokens or sequences whose divergence is out of bounds    verl's rollout correction, `rollout_rs`

The first gives `selected` of `policy_loss`; the others are factors of its `correction`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from grpo_kernels import _checks as checks

REJECTION_MODES = (
    "token_k1", "token_k2", "token_k3", "seq_sum_k1", "seq_sum_k2", "seq_sum_k3", "seq_mean_k1", "seq_mean_k2",
    "seq_mean_k3", "seq_max_k2", "seq_max_k3",
)  # fmt: skip
# Larger log-ratios are clamped, as in verl, so that their exponential does not overflow.
LARGEST_LOG_RATIO = 20.0


@torch.no_grad()
def covariance_mask(
    logprobs: Tensor,  # any shape
    advantages: Tensor,  # the same shape
    mask: Tensor,  # the same shape
    ratio: float = 2e-4,
    *,
    low: float | None = None,
    high: float | None = None,
    candidates: Tensor | None = None,  # the same shape
) -> Tensor:
    """The tokens with a large covariance ``(A - mean A) (logp - mean logp)``, which reduce the entropy most.

    Means are over the counted tokens, so pass those of the whole step. Without bounds these are the tokens of the
    highest covariance (KL-Cov); with them, as many tokens drawn at random from those between the bounds (Clip-Cov).

    Args:
        logprobs: log-probabilities of the policy about to be updated, nats, any shape.
        advantages: same shape.
        mask: same shape; non-zero where a token counts.
        ratio: the share of the counted tokens to select, above 0 and at most 1; at least one token.
        low, high: bounds of the covariance, both or none.
        candidates: same shape; non-zero where a token may be selected (default: `mask`). verl's Clip-Cov leaves out the
            tokens whose ratio is clipped.

    Returns:
        bool tensor of the same shape, False where `mask` is 0. Random choices are drawn from torch's default generator.

    Raises:
        ValueError: `ratio` or the bounds are out of range, or the shapes differ.
    """
    op = "covariance_mask"
    checks.require_tensors(op, logprobs=logprobs, advantages=advantages, mask=mask)
    checks.require_shape(op, logprobs.shape, advantages=advantages, mask=mask, candidates=candidates)
    checks.require_number(op, "ratio", ratio)
    checks.require(0 < ratio <= 1, f"{op}: ratio must be above 0 and at most 1, got {ratio}")
    checks.require((low is None) == (high is None), f"{op}: low and high belong together, got {low} and {high}")
    counted = mask != 0
    chosen = torch.zeros_like(counted)
    places = counted.flatten().nonzero().squeeze(1)
    if not len(places):
        return chosen
    # At least float32: the mean of many bfloat16 numbers is inaccurate.
    dtype = torch.promote_types(logprobs.dtype, torch.float32)
    values, weights = logprobs.flatten()[places].to(dtype), advantages.flatten()[places].to(dtype)
    covariance = (weights - weights.mean()) * (values - values.mean())
    if candidates is not None:
        allowed = candidates.flatten()[places] != 0
        places, covariance = places[allowed], covariance[allowed]
    count = max(int(ratio * int(counted.sum())), 1)
    if low is None or high is None:
        found = places[covariance.topk(min(count, len(places))).indices]
    else:
        checks.require(low < high, f"{op}: low={low} must be below high={high}")
        found = places[(covariance > low) & (covariance < high)]
        # Drawn on the CPU, so that all processes of a run draw the same.
        found = found[torch.randperm(len(found))[:count].to(found.device)]
    chosen.view(-1)[found] = True
    return chosen


@torch.no_grad()
def off_policy_mask(
    logprobs: Tensor,  # [N] or [B, T]
    sampling_logprobs: Tensor,  # [N] or [B, T]
    advantages: Tensor,  # [N] or [B, T]
    threshold: float,
    *,
    mask: Tensor | None = None,  # [N] or [B, T]
    cu_seqlens: Tensor | None = None,  # [S + 1]
) -> Tensor:
    """Off-policy sequence masking (DeepSeek-V3.2, arXiv 2512.02556, eq. 9; TRL's `off_policy_mask_threshold`).

    A token of negative advantage is left out if its sequence's mean of ``sampling_logp - logp`` is above `threshold`.

    Args:
        logprobs: the current policy's log-probabilities, packed ``[N]`` or padded ``[B, T]``.
        sampling_logprobs: same shape; those of the sampler, or of the policy when the completions were sampled. A
            difference that is NaN counts as 0.
        advantages: same shape.
        threshold: nats per token, above 0.
        mask: same shape, non-zero where a token counts; None for all.
        cu_seqlens: ``[S + 1]`` int offsets of the sequences in packed tensors.

    Returns:
        Float32 tensor of the same shape: 0 where a token is left out, else 1.

    Raises:
        ValueError: shapes or offsets do not fit, or `threshold` is not above 0.
    """
    op = "off_policy_mask"
    checks.require_tensors(op, logprobs=logprobs, sampling_logprobs=sampling_logprobs, advantages=advantages)
    checks.require_shape(op, logprobs.shape, sampling_logprobs=sampling_logprobs, advantages=advantages, mask=mask)
    checks.require_number(op, "threshold", threshold)
    checks.require(threshold > 0, f"{op}: threshold must be above 0, got {threshold}")
    far = _reduced(op, _difference(sampling_logprobs, logprobs), mask, cu_seqlens, "mean") > threshold
    return (~(far & (advantages < 0))).to(torch.float32)


@torch.no_grad()
def rejection_mask(
    logprobs: Tensor,  # [N] or [B, T]
    sampling_logprobs: Tensor,  # [N] or [B, T]
    mode: str,
    threshold: float,
    *,
    lower: float | None = None,
    mask: Tensor | None = None,  # [N] or [B, T]
    cu_seqlens: Tensor | None = None,  # [S + 1]
) -> Tensor:
    """Rejection of samples that are far from the trainer's policy, as verl's `rollout_rs`.

    With ``d = logprobs - sampling_logprobs``, clamped to [-20, 20], a token's divergence is ``k1 = -d``, ``k2 = d² /
    2`` or ``k3 = exp(d) - 1 - d``. A mode rejects single tokens, or whole sequences by the sum, mean or maximum over
    their tokens; ``seq_mean_k1`` bounds the geometric mean of the ratios.

    Args:
        logprobs: the trainer's log-probabilities when the update began, packed ``[N]`` or padded ``[B, T]``.
        sampling_logprobs: same shape; the sampler's. A difference that is NaN counts as 0.
        mode: one of `REJECTION_MODES`.
        threshold: the largest k2 or k3 that is kept; for k1 the upper bound of the ratio ``exp(k1)``.
        lower: the lower bound of that ratio (k1 alone; None: 1 / `threshold`).
        mask, cu_seqlens: as in `off_policy_mask`; the token level needs no offsets.

    Returns:
        Float32 tensor of the same shape: 0 where a token is rejected, else 1.

    Raises:
        ValueError: `mode` is unknown, a bound is out of range or belongs to another mode, or shapes or offsets do not
            fit.
    """
    op = "rejection_mask"
    checks.require_choice(op, "mode", mode, REJECTION_MODES)
    checks.require_tensors(op, logprobs=logprobs, sampling_logprobs=sampling_logprobs)
    checks.require_shape(op, logprobs.shape, sampling_logprobs=sampling_logprobs, mask=mask)
    for name, value in (("threshold", threshold), ("lower", lower)):
        checks.require_number(op, name, value)
        checks.require(value is None or value > 0, f"{op}: {name} must be above 0, got {value}")
    level, _, estimator = mode.rpartition("_")
    checks.require(lower is None or estimator == "k1", f"{op}: mode={mode!r} has no lower bound, got {lower}")
    d = _difference(logprobs, sampling_logprobs).clamp(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO)
    divergence = {"k1": lambda: -d, "k2": lambda: d.square() / 2, "k3": lambda: torch.exp(d) - 1 - d}[estimator]()
    if level != "token":
        divergence = _reduced(op, divergence, mask, cu_seqlens, level.removeprefix("seq_"))
    if estimator == "k1":
        least = math.log(1 / threshold if lower is None else lower)
        kept = (divergence >= least) & (divergence <= math.log(threshold))
    else:
        kept = divergence <= threshold
    return kept.to(torch.float32)


def _difference(one: Tensor, other: Tensor) -> Tensor:
    """``one - other`` in at least float32, 0 where it is NaN."""
    dtype = torch.promote_types(torch.promote_types(one.dtype, other.dtype), torch.float32)
    return (one.to(dtype) - other.to(dtype)).nan_to_num(nan=0.0, posinf=math.inf, neginf=-math.inf)


def _reduced(op: str, values: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, by: str) -> Tensor:
    """At every token, the sum, mean or maximum over the counted tokens of its sequence; 0 without any."""
    offsets = checks.sequence_offsets(op, values.shape, cu_seqlens, values.device, "a whole sequence")
    assert offsets is not None
    flat = values.flatten()
    counted = torch.ones_like(flat, dtype=torch.bool) if mask is None else (mask != 0).flatten()
    ids = checks.sequence_ids(offsets, flat.numel())
    if by == "max":
        lowest = torch.full((offsets.numel() - 1,), -math.inf, dtype=flat.dtype, device=flat.device)
        found = lowest.scatter_reduce(0, ids, flat.masked_fill(~counted, -math.inf), "amax")
        found = found.masked_fill(found == -math.inf, 0.0)
    else:
        found = checks.sequence_sums(flat.masked_fill(~counted, 0.0), ids, offsets)
        if by == "mean":
            found = found / checks.sequence_sums(counted.to(flat.dtype), ids, offsets).clamp(min=1.0)
    return found[ids].view_as(values)
