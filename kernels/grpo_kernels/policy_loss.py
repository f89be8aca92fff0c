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

import math
from typing import NamedTuple

import torch
from torch import Tensor

from grpo_kernels._common import (
    accumulation_dtype,
    choose_backend,
    require,
    require_device,
    require_floating,
    require_shape,
    require_tensors,
    sequence_ids,
    sequence_offsets,
)
from grpo_kernels.kl import kl_and_derivative, kl_estimate_ref
from grpo_kernels.objective import PolicyObjective, require_objective, require_reference

VESPO_BOUNDS = 1e-8, math.exp(20.0)
STATISTICS = ("tokens", "entropy", "kl", "ratios", "ratio", "clip_low", "clip_high")


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


class Tokens(NamedTuple):
    """Flattened per-token arguments of the loss, ``[N]`` each, in the accumulation dtype; None where absent."""

    advantages: Tensor
    weights: Tensor
    old_logprobs: Tensor | None = None
    ref_logprobs: Tensor | None = None
    correction: Tensor | None = None

    def take(self, rows: Tensor | slice) -> Tokens:
        return Tokens(*(None if field is None else field[rows] for field in self))


class Terms(NamedTuple):
    loss: Tensor
    grad_logprobs: Tensor
    grad_entropy: Tensor | None
    stats: Tensor  # [len(STATISTICS)]


def _by_sign(A: Tensor, positive: float, other: float) -> Tensor:
    return torch.where(A > 0, A.new_full((), positive), A.new_full((), other))


def _vespo_weight(ratio: Tensor, A: Tensor, o: PolicyObjective) -> Tensor:
    """``r^k exp(lambda (1 - r))``, with the ratio's bounds of the paper's own code."""
    k = _by_sign(A, o.vespo_k_pos, o.vespo_k_neg)
    decay = _by_sign(A, o.vespo_lambda_pos, o.vespo_lambda_neg)
    ratio = ratio.clamp(VESPO_BOUNDS[0], VESPO_BOUNDS[1])
    return torch.exp(k * ratio.log() + decay * (1 - ratio))


def policy_loss_ref(logprobs, tokens: Tokens, objective: PolicyObjective, entropy=None, offsets=None):
    """The equation above on flat ``[N]`` tensors, differentiated by autograd: the oracle of the tests."""
    counted = tokens.weights != 0
    tokens = Tokens(*(None if field is None else torch.where(counted, field, 0.0) for field in tokens))
    o, (A, w, old, ref, rho) = objective, tokens
    logp = torch.where(counted, logprobs, 0.0).to(w.dtype)
    log_ratio = logp - (logp.detach() if old is None else old)
    counts = counted.to(logp.dtype)
    if o.level != "token":
        ids = sequence_ids(offsets, logp.numel())
        size = offsets.numel() - 1
        lengths = logp.new_zeros(size).index_add(0, ids, counts).clamp(min=1)
        total = logp.new_zeros(size).index_add(0, ids, log_ratio * counts)
        log_ratio = (total / lengths if o.level == "sequence" else total)[ids]
        counts = counts / lengths[ids]
    ratio = torch.exp(log_ratio)
    low, high = 1 - o.epsilon, 1 + o.upper_epsilon
    if o.kind == "clip":
        bounded = ratio if o.delta is None else ratio.clamp(max=o.delta)
        per_token = -torch.minimum(bounded * A, ratio.clamp(low, high) * A)
    elif o.kind == "cispo":
        high = o.epsilon_high
        per_token = -ratio.clamp(max=high).detach() * A * logp
    elif o.kind == "sapo":
        tau = _by_sign(A, o.sapo_temperature_pos, o.sapo_temperature_neg)
        per_token = -4 / tau * torch.sigmoid(tau * (ratio - 1)) * A
    elif o.kind == "vespo":
        per_token = -_vespo_weight(ratio, A, o).detach() * A * logp
    else:
        per_token = -A * logp
    if rho is not None:
        per_token = rho * per_token
    kl = torch.zeros_like(logp)
    if ref is not None:
        kl = kl_estimate_ref(logp, ref, o.kl)
        per_token = per_token + o.beta * kl * (ratio if o.kl_bias_correction else 1.0)
    if entropy is not None:
        per_token = per_token - o.entropy_coef * entropy
    loss = torch.where(counted, w * per_token, 0.0).sum()
    clips_low = (ratio < low) & (A < 0) & (o.kind == "clip")
    clips_high = (ratio > high) & (A > 0) & (o.kind in ("clip", "cispo"))
    sums = [counted.sum(), 0 if entropy is None else torch.where(counted, entropy, 0.0).sum()]
    sums += [torch.where(counted, kl, 0.0).sum(), counts.sum()]
    sums += [torch.where(counted, x * counts, 0.0).sum() for x in (ratio, clips_low, clips_high)]
    return loss, torch.stack([torch.as_tensor(s, dtype=logp.dtype, device=logp.device) for s in sums]).detach()


def _clip(ratio, logp, A, o):
    # On a bound the gradient passes, as in torch.clamp and torch.minimum.
    low, high = 1 - o.epsilon, 1 + o.upper_epsilon
    positive = A > 0
    bounded = torch.where(positive, ratio.clamp(max=high), ratio.clamp(min=low, max=o.delta))
    return -A * bounded, torch.where(ratio == bounded, -A * ratio, 0.0), None


def _cispo(ratio, logp, A, o):
    direct = -A * ratio.clamp(max=o.epsilon_high)
    return direct * logp, None, direct


def _sapo(ratio, logp, A, o):
    tau = _by_sign(A, o.sapo_temperature_pos, o.sapo_temperature_neg)
    gate = torch.sigmoid(tau * (ratio - 1))
    slope = 4 * gate * torch.sigmoid(-tau * (ratio - 1)) * ratio
    return -4 / tau * gate * A, torch.where(gate < 1, -A * slope, 0.0), None


def _vespo(ratio, logp, A, o):
    direct = -A * _vespo_weight(ratio, A, o)
    return direct * logp, None, direct


def _reinforce(ratio, logp, A, o):
    return -A * logp, None, -A


# kind -> (l, dl/dlog_ratio or None, dl/dlogp at a fixed ratio or None), elementwise from (ratio, logp, A, objective)
TOKEN_LOSSES = {"clip": _clip, "cispo": _cispo, "sapo": _sapo, "vespo": _vespo, "reinforce": _reinforce}


def policy_terms(
    logprobs: Tensor,
    tokens: Tokens,
    objective: PolicyObjective,
    entropy: Tensor | None = None,
    offsets: Tensor | None = None,
) -> Terms:
    """Loss, derivatives and statistics of flat ``[N]`` tokens, without autograd.

    Where a ratio is a sequence's, every sequence of `offsets` must be whole.
    """
    o, (A, w, old, ref, rho) = objective, tokens
    counted = w != 0
    # Garbage under a zero weight must not turn 0 * inf into NaN, so it is replaced before any arithmetic.
    logp = torch.where(counted, logprobs, 0.0)
    A = torch.where(counted, A, 0.0)
    log_ratio = torch.zeros_like(logp) if old is None else logp - torch.where(counted, old, 0.0)
    counts = counted.to(logp.dtype)
    ids = None
    if o.level != "token":
        ids = sequence_ids(offsets, logp.numel())
        sums = torch.stack([log_ratio * counts, counts], 1)
        totals = sums.new_zeros(offsets.numel() - 1, 2).index_add_(0, ids, sums)[ids]
        lengths = totals[:, 1].clamp(min=1.0)
        divisor = lengths if o.level == "sequence" else 1.0
        log_ratio, counts = totals[:, 0] / divisor, counts / lengths
    ratio = torch.exp(log_ratio)

    value, through_ratio, direct = TOKEN_LOSSES[o.kind](ratio, logp, A, o)
    # With A = 0 an infinite ratio would still make NaN, and the coefficient must be exactly zero.
    moves = A != 0
    scale = w if rho is None else w * torch.where(counted, rho, 0.0)
    loss = torch.where(moves, scale * value, 0.0)
    zero = torch.zeros_like(logp)
    through_ratio = zero if through_ratio is None else torch.where(moves, scale * through_ratio, 0.0)
    grad = zero if direct is None else torch.where(moves, scale * direct, 0.0)

    kl = zero
    if ref is not None:
        kl, kl_slope = kl_and_derivative(logp, torch.where(counted, ref, 0.0), o.kl)
        if o.beta != 0.0:
            factor = o.beta * w * (ratio if o.kl_bias_correction else 1.0)
            loss = loss + factor * kl
            grad = grad + factor * kl_slope
            if o.kl_bias_correction:
                through_ratio = through_ratio + factor * kl
    if ids is None:
        grad = grad + through_ratio
    else:
        # Every token of a sequence moves the one ratio, a mean by 1 / length.
        per_sequence = zero.new_zeros(offsets.numel() - 1).index_add_(0, ids, through_ratio)
        grad = torch.where(counted, grad + per_sequence[ids] / divisor, 0.0)

    grad_entropy = None
    if entropy is not None:
        entropy = torch.where(counted, entropy, 0.0)
        grad_entropy = -o.entropy_coef * w
        loss = loss + grad_entropy * entropy
    clips_low = (ratio < 1 - o.epsilon) & (A < 0) if o.kind == "clip" else zero
    bound = {"clip": 1 + o.upper_epsilon, "cispo": o.epsilon_high}.get(o.kind)
    clips_high = (ratio > bound) & (A > 0) if bound is not None else zero
    columns = [counted, zero if entropy is None else entropy, kl, counts]
    columns += [counts * ratio, counts * clips_low, counts * clips_high]
    stats = torch.stack([torch.where(counted, column, 0.0).sum() for column in columns])
    return Terms(loss.sum(), grad, grad_entropy, stats)


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
    from grpo_kernels.triton_kernels.policy import policy_terms_triton

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
