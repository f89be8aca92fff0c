"""The constant correction ``rho_t`` for the difference between a sampler's and the trainer's log-probabilities.

A sampling engine computes the same policy with other kernels, in another precision, or with weights that are a step
old. Importance sampling corrects for that ("Your efficient RL framework secretly brings you off-policy RL training",
and TRL's `vllm_importance_sampling_mode`). With ``d_t = logprobs_t - sampling_logprobs_t``, a mode is a level and a
bound:

    token      rho_t = exp(d_t)                 truncate   min(max(rho, clip_min), clip_max)
    sequence   rho   = exp(sum_t d_t)           mask       rho where clip_min <= rho <= clip_max, else 0
    geometric  rho   = exp(mean_t d_t)

The product over a sequence of thousands of tokens exceeds any bounds; the geometric form does not grow with the length
(GSPO's ratio, arXiv 2507.18071, eq. 7).
"""

from __future__ import annotations

import torch
from torch import Tensor

from grpo_kernels import _checks as checks

RATIO_LEVELS = ("token", "sequence", "geometric")
RATIO_BOUNDS = ("truncate", "mask")
SAMPLING_RATIO_MODES = tuple(f"{level}_{bound}" for level in RATIO_LEVELS for bound in RATIO_BOUNDS)


@torch.no_grad()
def sampling_ratio(
    logprobs: Tensor,  # [N] or [B, T]
    sampling_logprobs: Tensor,  # [N] or [B, T]
    mode: str = "sequence_mask",
    *,
    clip_max: float | None = 3.0,
    clip_min: float | None = None,
    mask: Tensor | None = None,  # [N] or [B, T]
    cu_seqlens: Tensor | None = None,  # [S + 1]
) -> Tensor:
    """``rho_t`` of every token, for the `correction` of `policy_loss` and `linear_policy_loss`.

    Args:
        logprobs: the trainer's log-probabilities when the update began, packed ``[N]`` or padded ``[B, T]``.
        sampling_logprobs: same shape; the sampler's log-probabilities of its tokens, after temperature and filters.
            Where either is NaN (unknown, or left out by `skip_inactive`), the difference counts as 0. Where this is
            -inf, the ratio is infinite before the bounds; where `logprobs` is -inf, the ratio is always 0.
        mode: a level and a bound of the table above, ``"token_truncate"`` to ``"geometric_mask"``.
        clip_max, clip_min: bounds of the ratio; None for none.
        mask: same shape, non-zero where a token counts; None for all.
        cu_seqlens: ``[S + 1]`` int offsets of the sequences in a packed tensor; the token level needs none.

    Returns:
        Float32 tensor of the same shape, without a gradient; 1 where `mask` is 0.

    Raises:
        ValueError: an unknown mode, bounds in the wrong order, different shapes, or a packed sequence level without
            `cu_seqlens`.
    """
    op = "sampling_ratio"
    checks.require_choice(op, "mode", mode, SAMPLING_RATIO_MODES)
    checks.require_tensors(op, logprobs=logprobs, sampling_logprobs=sampling_logprobs)
    checks.require_floating(op, logprobs=logprobs, sampling_logprobs=sampling_logprobs)
    if mask is not None:
        checks.require_tensors(op, mask=mask)
    checks.require_shape(op, logprobs.shape, sampling_logprobs=sampling_logprobs, mask=mask)
    checks.require_device(op, logprobs.device, sampling_logprobs=sampling_logprobs, mask=mask)
    for name, value in (("clip_max", clip_max), ("clip_min", clip_min)):
        checks.require_number(op, name, value)
        checks.require(value is None or value >= 0, f"{op}: {name} must be at least 0, got {value}")
    checks.require(
        clip_min is None or clip_max is None or clip_min <= clip_max,
        f"{op}: clip_min={clip_min} is above clip_max={clip_max}",
    )
    level, bound = mode.split("_")
    difference = logprobs.float() - sampling_logprobs.float()
    difference = difference.masked_fill(logprobs.isnan() | sampling_logprobs.isnan(), 0.0)
    # A token that the policy never draws has ratio 0; a finite value in place of +inf keeps inf - inf out of the sums.
    difference = difference.masked_fill(logprobs == float("-inf"), float("-inf")).clamp(
        max=torch.finfo(torch.float32).max
    )
    if mask is not None:
        difference = difference.masked_fill(mask == 0, 0.0)
    log_ratio = difference
    if level != "token":
        offsets = checks.sequence_offsets(op, logprobs.shape, cu_seqlens, logprobs.device, f"mode={mode!r}")
        assert offsets is not None
        flat = difference.flatten()
        ids = checks.sequence_ids(offsets, flat.numel())
        totals = checks.sequence_sums(flat, ids, offsets)
        if level == "geometric":
            counts = torch.ones_like(flat) if mask is None else (mask != 0).flatten().to(flat)
            totals = totals / checks.sequence_sums(counts, ids, offsets).clamp_(min=1.0)
        log_ratio = totals[ids].view_as(difference)
    ratio = torch.exp(log_ratio)
    low, high = clip_min or 0.0, float("inf") if clip_max is None else clip_max
    ratio = ratio.clamp(low, high) if bound == "truncate" else ratio.masked_fill((ratio < low) | (ratio > high), 0.0)
    return ratio if mask is None else ratio.masked_fill(mask == 0, 1.0)
