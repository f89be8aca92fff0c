"""The per-token terms of the policy loss, their derivatives and their statistics, in plain PyTorch."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from grpo_kernels._checks import sequence_ids, sequence_sums
from grpo_kernels.custom_loss import function_terms
from grpo_kernels.kl import kl_and_derivative
from grpo_kernels.objective import PolicyObjective

VESPO_BOUNDS = 1e-8, math.exp(20.0)
STATISTICS = ("tokens", "entropy", "kl", "ratios", "ratio", "clip_low", "clip_high")


class Tokens(NamedTuple):
    """Flattened per-token arguments of the loss, ``[N]`` each, in the accumulation dtype; None where absent."""

    advantages: Tensor
    weights: Tensor
    old_logprobs: Tensor | None = None
    ref_logprobs: Tensor | None = None
    correction: Tensor | None = None
    selected: Tensor | None = None

    def take(self, rows: Tensor | slice) -> Tokens:
        return Tokens(*(None if field is None else field[rows] for field in self))


class Terms(NamedTuple):
    """The loss of N tokens, its statistics and its derivatives."""

    loss: Tensor  # scalar
    stats: Tensor  # [len(STATISTICS)]
    grad_logprobs: Tensor  # [N]
    grad_entropy: Tensor | None  # [N]


def by_sign(A: Tensor, positive: float, other: float) -> Tensor:
    return torch.where(A > 0, A.new_full((), positive), A.new_full((), other))


def vespo_weight(ratio: Tensor, A: Tensor, o: PolicyObjective) -> Tensor:
    """``r^k exp(lambda (1 - r))``, with the ratio's bounds of the paper's own code."""
    k = by_sign(A, o.vespo_k_pos, o.vespo_k_neg)
    decay = by_sign(A, o.vespo_lambda_pos, o.vespo_lambda_neg)
    ratio = ratio.clamp(VESPO_BOUNDS[0], VESPO_BOUNDS[1])
    return torch.exp(k * ratio.log() + decay * (1 - ratio))


def _clip(ratio, logp, A, o):
    # On a bound the gradient passes, as in torch.clamp and torch.minimum.
    bounded = torch.where(A > 0, ratio.clamp(max=o.upper_bound), ratio.clamp(min=o.lower_bound, max=o.delta))
    return -A * bounded, torch.where(ratio == bounded, -A * ratio, 0.0), None


def _cispo(ratio, logp, A, o):
    direct = -A * ratio.clamp(max=o.upper_bound)
    return direct * logp, None, direct


def _sapo(ratio, logp, A, o):
    tau = by_sign(A, o.sapo_temperature_pos, o.sapo_temperature_neg)
    gate = torch.sigmoid(tau * (ratio - 1))
    slope = 4 * gate * torch.sigmoid(-tau * (ratio - 1)) * ratio
    return -4 / tau * gate * A, torch.where(gate < 1, -A * slope, 0.0), None


def _vespo(ratio, logp, A, o):
    direct = -A * vespo_weight(ratio, A, o)
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

    Unless the level is the token's, every sequence of `offsets` must be complete.
    """
    o, (A, w, old, ref, rho, selected) = objective, tokens
    counted = w != 0
    # Garbage under a zero weight must not turn 0 * inf into NaN, so it is replaced before any arithmetic.
    logp = torch.where(counted, logprobs, 0.0)
    A = torch.where(counted, A, 0.0)
    log_ratio = torch.zeros_like(logp) if old is None else logp - torch.where(counted, old, 0.0)
    counts = counted.to(logp.dtype)
    ids = None
    if o.level != "token":
        ids = sequence_ids(offsets, logp.numel())
        totals = sequence_sums(torch.stack([log_ratio * counts, counts], 1), ids, offsets)[ids]
        lengths = totals[:, 1].clamp(min=1.0)
        divisor = lengths if o.level == "sequence" else 1.0
        log_ratio, counts = totals[:, 0] / divisor, counts / lengths
    ratio = torch.exp(log_ratio)

    scale = w if rho is None else w * torch.where(counted, rho, 0.0)
    zero = torch.zeros_like(logp)
    if o.function is None:
        value, through_ratio, direct = TOKEN_LOSSES[o.kind](ratio, logp, A, o)
        # With A = 0 an infinite ratio would still make NaN, and the coefficient must be exactly zero.
        parts, active = [scale * value], A != 0
        parts += [zero if part is None else scale * part for part in (through_ratio, direct)]
    else:
        old = None if old is None else torch.where(counted, old, 0.0)
        reference = None if ref is None else torch.where(counted, ref, 0.0)
        parts = function_terms(
            o.function, o.settings, scale, counted, logp, log_ratio, old, A, reference, selected, offsets
        )
        active = (A != 0) | (not o.scales_with_advantage)
    loss, through_ratio, grad = (torch.where(active & counted, part, 0.0) for part in parts)

    kl = zero
    if ref is not None:
        kl, kl_slope = kl_and_derivative(logp, torch.where(counted, ref, 0.0), o.kl, o.kl_clip)
        if o.beta != 0.0:
            factor = o.beta * w * (ratio if o.kl_bias_correction else 1.0)
            loss = loss + factor * kl
            grad = grad + factor * kl_slope
            if o.kl_bias_correction:
                through_ratio = through_ratio + factor * kl
    if ids is None:
        grad = grad + through_ratio
    else:
        # Every token of a sequence has a share in its ratio; in a mean, 1 / length.
        grad = torch.where(counted, grad + sequence_sums(through_ratio, ids, offsets)[ids] / divisor, 0.0)

    grad_entropy = None
    if entropy is not None:
        entropy = torch.where(counted, entropy, 0.0)
        grad_entropy = -o.entropy_coef * w
        loss = loss + grad_entropy * entropy
    clips_low = (ratio < o.lower_bound) & (A < 0) if o.kind == "clip" else zero
    clips_high = (ratio > o.upper_bound) & (A > 0) if o.kind in ("clip", "cispo") else zero
    columns = [counted, zero if entropy is None else entropy, kl, counts]
    columns += [counts * ratio, counts * clips_low, counts * clips_high]
    stats = torch.stack([torch.where(counted, column, 0.0).sum() for column in columns])
    return Terms(loss.sum(), stats, grad, grad_entropy)
