"""The clipped policy loss of a whole batch of tokens, its derivative and its statistics in one pass.

    L = sum_t w_t * ( rho_t * l(logp_t, old_t, A_t) + beta * kl(logp_t, ref_t) - entropy_coef * entropy_t )

with ``l`` from `objective.py`. For the token-level clip this is, in PyTorch,

    ratio = torch.exp(logprobs - old_logprobs)
    l = -torch.minimum(ratio * A, ratio.clamp(1 - epsilon, 1 + epsilon_high) * A)
    loss = (weights * (correction * l + beta * kl_estimate(logprobs, ref_logprobs))).sum()

The derivative ``g_t = dL/dlogp_t`` is made beside the loss, and it alone is saved for the backward. Everything is
float32 (float64 for float64 inputs). A token of weight 0 contributes exactly nothing, whatever stands in its other
fields, and ``g_t`` is exactly 0 where the objective is flat, so callers can drop those rows.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from grpo_kernels._backend import choose_backend
from grpo_kernels._checks import (
    accumulation_dtype,
    require,
    require_device,
    require_floating,
    require_shape,
    require_tensors,
    sequence_ids,
    sequence_offsets,
)
from grpo_kernels._policy_terms import (
    STATISTICS,
    Tokens,
    policy_loss_ref,
    policy_terms,
)
from grpo_kernels.objective import PolicyObjective, require_objective, require_reference


class PolicyLoss(NamedTuple):
    """What `policy_loss` and `linear_policy_loss` return.

    Attributes:
        loss: scalar, differentiable.
        stats: sums over the tokens of non-zero weight, 0-dim and detached, so that they add up over microbatches:
            ``tokens`` (their count), ``entropy`` and ``kl`` (sums over tokens), ``ratios`` (how many ratios there
            are: tokens, or sequences where a ratio is theirs), ``ratio`` (their sum), ``clip_low`` and
            ``clip_high`` (how many of them are clipped below with A < 0 and above with A > 0).
        logprobs: per-token log-probabilities, detached (`linear_policy_loss` only).
        entropy: per-token entropies, detached (`linear_policy_loss` only, where they were asked for or needed).
    """

    loss: Tensor
    stats: dict[str, Tensor]
    logprobs: Tensor | None = None
    entropy: Tensor | None = None


def named_statistics(stats: Tensor) -> dict[str, Tensor]:
    return dict(zip(STATISTICS, stats.unbind(), strict=True))


class _PolicyLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logprobs, entropy, tokens, objective, offsets, terms_of):
        terms = terms_of(logprobs, tokens, objective, entropy, offsets)
        ctx.save_for_backward(terms.grad_logprobs, terms.grad_entropy)
        ctx.mark_non_differentiable(terms.stats)
        return terms.loss, terms.stats

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_loss, _):
        grad_logprobs, grad_entropy = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        return (
            grad_loss * grad_logprobs if wanted[0] else None,
            grad_loss * grad_entropy if wanted[1] else None,
            *(None,) * 4,
        )


def _policy_loss_torch(logprobs, tokens, objective, entropy, offsets):
    return _PolicyLoss.apply(logprobs, entropy, tokens, objective, offsets, policy_terms)


def _policy_loss_triton(logprobs, tokens, objective, entropy, offsets):
    from grpo_kernels.triton_kernels.policy_kernels import policy_terms_triton

    return _PolicyLoss.apply(logprobs, entropy, tokens, objective, offsets, policy_terms_triton)


_IMPLEMENTATIONS = {"triton": _policy_loss_triton, "torch": _policy_loss_torch, "reference": policy_loss_ref}


def flatten_tokens(
    op: str,
    shape: torch.Size,
    device: torch.device,
    dtype: torch.dtype,
    objective: PolicyObjective,
    advantages: Tensor,
    weights: Tensor,
    old_logprobs: Tensor | None,
    ref_logprobs: Tensor | None,
    correction: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tokens, Tensor | None]:
    """Check the loss's per-token arguments and flatten them; also return the offsets of the sequences."""
    require_objective(op, objective)
    require_tensors(op, advantages=advantages, weights=weights)
    require(len(shape) in (1, 2), f"{op}: tensors must be packed [N] or padded [B, T], got shape {tuple(shape)}")
    require_reference(op, objective, ref_logprobs)
    fields = {
        "weights": weights,
        "old_logprobs": old_logprobs,
        "ref_logprobs": ref_logprobs,
        "correction": correction,
    }
    require_floating(op, advantages=advantages, **fields)
    require_device(op, device, advantages=advantages, **fields)
    offsets = sequence_offsets(op, shape, cu_seqlens, device)
    require(
        objective.level == "token" or offsets is not None,
        f"{op}: level={objective.level!r} needs cu_seqlens for packed tensors",
    )
    if offsets is not None and advantages.shape == (offsets.numel() - 1,) and advantages.shape != shape:
        advantages = advantages[sequence_ids(offsets, shape.numel())].view(shape)
    require_shape(op, shape, advantages=advantages, **fields)
    flat = (None if field is None else field.detach().reshape(-1).to(dtype) for field in (advantages, *fields.values()))
    return Tokens(*flat), offsets


def policy_loss(
    logprobs: Tensor,
    advantages: Tensor,
    weights: Tensor,
    objective: PolicyObjective = PolicyObjective(),
    *,
    old_logprobs: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    entropy: Tensor | None = None,
    correction: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> PolicyLoss:
    """Policy loss from per-token log-probabilities: the equation at the top of this module.

    Args:
        logprobs: ``[N]`` packed or ``[B, T]`` padded (a sequence a row) log-probabilities under the policy, nats.
        advantages: same shape, or one a sequence (``[B]``, or ``[S]`` with `cu_seqlens`; where S = N, one a token).
        weights: same shape; mask and normaliser, from `token_weights`. 0 removes a token altogether.
        objective: what is minimised; see `PolicyObjective` and `PRESETS`.
        old_logprobs: log-probabilities under the policy that sampled the tokens. None: the present ones, so every
            ratio is 1 (the first update on fresh samples).
        ref_logprobs: log-probabilities under the reference policy; needed when ``objective.beta`` is not 0.
        entropy: per-token entropies, for the bonus and for the statistics.
        correction: the constant ``rho_t`` for the difference between sampler and trainer.
        cu_seqlens: ``[S + 1]`` int offsets of the sequences in packed tensors; needed where a ratio is a
            sequence's.
        backend: ``"auto"`` (Triton on a supported GPU, else torch), ``"triton"``, ``"torch"`` or ``"reference"``.

    Returns:
        :class:`PolicyLoss`; the loss is differentiable in `logprobs` and `entropy`, float32 (or float64).

    Raises:
        ValueError: shapes, devices or sequence offsets do not fit, a needed argument is missing, or an option is
            unknown.
        TypeError: an argument has the wrong dtype or type.
    """
    op = "policy_loss"
    require_tensors(op, logprobs=logprobs)
    require_floating(op, logprobs=logprobs, entropy=entropy)
    require_device(op, logprobs.device, entropy=entropy)
    require_shape(op, logprobs.shape, entropy=entropy)
    dtype = accumulation_dtype(logprobs)
    tokens, offsets = flatten_tokens(
        op, logprobs.shape, logprobs.device, dtype, objective,
        advantages, weights, old_logprobs, ref_logprobs, correction, cu_seqlens,
    )  # fmt: skip
    require(objective.entropy_coef == 0.0 or entropy is not None, f"{op}: entropy_coef needs the entropy argument")
    run = choose_backend(op, _IMPLEMENTATIONS, backend, logprobs.device, dtype)
    flat_entropy = None if entropy is None else entropy.reshape(-1).to(dtype)
    loss, stats = run(logprobs.reshape(-1).to(dtype), tokens, objective, flat_entropy, offsets)
    return PolicyLoss(loss, named_statistics(stats))
