"""The constant factor of a token's loss where completions are not the current policy's own.

It is the ratio of the trainer's to the sampler's probabilities, or 0 for tokens that `rollout_rs` rejects and for
sequences that `off_policy_mask_threshold` leaves out.
"""

from __future__ import annotations

import torch
from torch import Tensor

from grpo_fast.config import GRPOConfig
from grpo_kernels import off_policy_mask, rejection_mask, sampling_ratio


def sampling_correction(
    config: GRPOConfig, logprobs: Tensor, sampling_logprobs: Tensor, cu_seqlens: Tensor | None, mask: Tensor
) -> Tensor:
    """``rho_t`` for the tokens of whole sequences, with `logprobs` as of when the update began.

    All tensors are ``[n]``, or ``[B, K]`` without `cu_seqlens`. It is 1 for tokens without weight, which were forced,
    unless their sequence is rejected.
    """
    shared = {"mask": mask, "cu_seqlens": cu_seqlens}
    rho = torch.ones_like(logprobs, dtype=torch.float32)
    if config.vllm_importance_sampling_correction:
        rho = sampling_ratio(
            logprobs, sampling_logprobs, config.vllm_importance_sampling_mode, **shared,
            clip_max=config.vllm_importance_sampling_clip_max, clip_min=config.vllm_importance_sampling_clip_min,
        )  # fmt: skip
    if config.rollout_rs is not None and config.rollout_rs_threshold is not None:
        rho = rho * rejection_mask(
            logprobs, sampling_logprobs, config.rollout_rs, config.rollout_rs_threshold,
            lower=config.rollout_rs_threshold_lower, **shared,
        )  # fmt: skip
    return rho


def loss_correction(
    logprobs: Tensor,
    config: GRPOConfig,
    *,
    advantages: Tensor,
    mask: Tensor,
    old_logprobs: Tensor | None = None,
    sampling_logprobs: Tensor | None = None,
    known: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor | None:
    """The factor of each token's loss under the current `logprobs`; None if it is 1 for all.

    Shapes are those of `sampling_correction`. `known` is the sampler's correction if an earlier update of this batch
    has computed it.
    """
    rho = known
    if rho is None and sampling_logprobs is not None:
        rho = sampling_correction(config, logprobs, sampling_logprobs, cu_seqlens, mask)
    # As in TRL, both the sampler's difference and the updates since then count.
    sampled = old_logprobs if sampling_logprobs is None else sampling_logprobs
    if config.off_policy_mask_threshold is not None and sampled is not None:
        kept = off_policy_mask(
            logprobs, sampled, advantages, config.off_policy_mask_threshold, mask=mask, cu_seqlens=cu_seqlens
        )
        rho = kept if rho is None else rho * kept
    return rho
