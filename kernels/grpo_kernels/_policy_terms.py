"""The per-token terms of the policy loss, their derivatives and their statistics, in plain PyTorch."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from grpo_kernels._checks import accumulation_dtype, sequence_ids
from grpo_kernels.objective import PolicyObjective

VESPO_BOUNDS = 1e-8, math.exp(20.0)
STATISTICS = ("tokens", "entropy", "kl", "ratios", "ratio", "clip_low", "clip_high")


def kl_estimate_ref(logprobs: Tensor, ref_logprobs: Tensor, estimator: str = "k3") -> Tensor:
    """The definition above, differentiated by autograd: the oracle of the tests."""
    dtype = accumulation_dtype(logprobs, ref_logprobs)
    d = logprobs.to(dtype) - ref_logprobs.to(dtype)
    return {"k1": lambda: d, "k2": lambda: d.square() / 2, "k3": lambda: torch.exp(-d) - 1 + d}[estimator]()


def kl_and_derivative(logprobs: Tensor, ref_logprobs: Tensor, estimator: str) -> tuple[Tensor, Tensor]:
    """The estimate and its derivative with respect to `logprobs`, both elementwise.

    ``expm1`` keeps k3 accurate where policy and reference nearly agree, which is where training spends its time.
    """
    d = logprobs - ref_logprobs
    if estimator == "k1":
        return d, torch.ones_like(d)
    if estimator == "k2":
        return d.square() / 2, d
    excess = torch.expm1(-d)
    return excess + d, -excess


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
