"""Published losses as plain functions. `register_objective` describes their arguments."""

from __future__ import annotations

import torch
from torch import Tensor

from grpo_kernels._checks import sequence_ids, sequence_sums


def dppo_tv(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, epsilon: float = 0.15,
    epsilon_high: float | None = None, delta: float = 20.0,
) -> Tensor:  # fmt: skip
    """DPPO with the binary total variation ``|p - p_old|`` (arXiv 2602.04879).

    A token whose probability has moved by more than `epsilon`, in the direction that its advantage asks for, has no
    gradient; the ratio of the others is cut off at `delta` (section 5.4).
    """
    moved = torch.exp(logprobs) - torch.exp(old_logprobs)
    return _within(logprobs, old_logprobs, advantages, moved.abs(), epsilon, epsilon_high, delta)


def dppo_kl(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, epsilon: float = 0.05,
    epsilon_high: float | None = None, delta: float = 20.0,
) -> Tensor:  # fmt: skip
    """DPPO with the binary KL divergence of drawing this token or another (arXiv 2602.04879); see `dppo_tv`."""
    # The probability of the other tokens: expm1 keeps it exact for likely tokens, and rounding may not make it 0.
    tiny = torch.finfo(logprobs.dtype).tiny
    rest, old_rest = (-torch.expm1(values).clamp(max=-tiny) for values in (logprobs, old_logprobs))
    divergence = torch.exp(old_logprobs) * (old_logprobs - logprobs) + old_rest * torch.log(old_rest / rest)
    return _within(logprobs, old_logprobs, advantages, divergence, epsilon, epsilon_high, delta)


def _within(logprobs, old_logprobs, advantages, divergence, epsilon, epsilon_high, delta) -> Tensor:
    log_ratio = logprobs - old_logprobs
    high = epsilon if epsilon_high is None else epsilon_high
    left = ((advantages > 0) & (log_ratio > 0) & (divergence > high)) | (
        (advantages <= 0) & (log_ratio < 0) & (divergence > epsilon)
    )
    weight = torch.exp(log_ratio).clamp(max=delta).masked_fill(left, 0.0).detach()
    return -weight * advantages * logprobs


def gmpo(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, cu_seqlens: Tensor, epsilon: float = 0.4,
    epsilon_high: float | None = None,
) -> Tensor:  # fmt: skip
    """GMPO (arXiv 2507.20673): the geometric mean of a sequence's ratios, each clipped in log space beforehand."""
    log_ratio = logprobs - old_logprobs
    high = epsilon if epsilon_high is None else epsilon_high
    clipped = torch.where(advantages > 0, log_ratio.clamp(max=high), log_ratio.clamp(min=-epsilon))
    ids = sequence_ids(cu_seqlens, log_ratio.numel())
    means = sequence_sums(clipped, ids, cu_seqlens) / cu_seqlens.diff().clamp(min=1)
    return -advantages * torch.exp(means)[ids]


def kimi(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, cu_seqlens: Tensor, tau: float = 0.05) -> Tensor:
    """Kimi k1.5's surrogate of mirror descent (arXiv 2501.12599, section 2.3.2), whose gradient is the paper's.

    A sequence's loss is ``-A log p + tau / 2 (log p - log p_old)^2``, where p is the probability of the whole answer;
    the square is divided equally among its tokens. With the mean reward as baseline (``scale_rewards="none"``), that is
    half the gradient, over `tau`, of the squared distance of ``tau log(p / p_old)`` from ``r - tau log Z``. The paper
    gives no `tau`.
    """
    log_ratio = logprobs - old_logprobs
    ids = sequence_ids(cu_seqlens, log_ratio.numel())
    squares = sequence_sums(log_ratio, ids, cu_seqlens).square() / cu_seqlens.diff().clamp(min=1)
    return -advantages * logprobs + tau / 2 * squares[ids]


def dro(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, tau: float = 0.05) -> Tensor:
    """DRO (arXiv 2405.19107): a policy gradient with a squared penalty on the log-ratio, in Tinker's form."""
    return -advantages * logprobs + tau / 2 * (logprobs - old_logprobs).square()


def clip_cov(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, selected: Tensor, epsilon: float = 0.2,
    epsilon_high: float | None = None,
) -> Tensor:  # fmt: skip
    """Clip-Cov (arXiv 2505.22617): PPO's clip, and no gradient for the `selected` tokens of high covariance."""
    ratio, high = torch.exp(logprobs - old_logprobs), epsilon if epsilon_high is None else epsilon_high
    clipped = torch.where(advantages > 0, ratio.clamp(max=1 + high), ratio.clamp(min=1 - epsilon))
    return (-clipped * advantages).masked_fill(selected != 0, 0.0)


def kl_cov(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, selected: Tensor, covariance_kl: float = 1.0
) -> Tensor:
    """KL-Cov (arXiv 2505.22617): the importance-weighted policy gradient, and for the `selected` tokens of the highest
    covariance a penalty on the distance ``|log ratio|`` to the old policy."""
    log_ratio = logprobs - old_logprobs
    return -torch.exp(log_ratio) * advantages + covariance_kl * selected * log_ratio.abs()
