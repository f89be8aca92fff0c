"""The policy loss of a batch of tokens, its derivative and its statistics in one pass.

    L = sum_t w_t * ( rho_t * l(logp_t, old_t, A_t) + beta * kl(logp_t, ref_t) - entropy_coef * entropy_t )

with ``l`` from `objective.py`. For the token-level clip this is, in PyTorch,

    ratio = torch.exp(logprobs - old_logprobs)
    l = -torch.minimum(ratio * A, ratio.clamp(1 - epsilon, 1 + epsilon_high) * A)
    loss = (weights * (correction * l + beta * kl_estimate(logprobs, ref_logprobs))).sum()

The derivative ``g_t = dL/dlogp_t`` is computed with the loss, and only it is saved for the backward. Everything is
float32 (float64 for float64 inputs). A token of weight 0 contributes exactly nothing, whatever its other fields hold,
and ``g_t`` is exactly 0 where the objective is flat, so callers can drop those rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from grpo_kernels import _checks as checks
from grpo_kernels._backend import choose_backend
from grpo_kernels._policy_terms import STATISTICS, Terms, Tokens, by_sign, policy_terms, vespo_weight
from grpo_kernels.custom_loss import parameters_of
from grpo_kernels.kl import kl_estimate_ref
from grpo_kernels.objective import PolicyObjective


class PolicyLoss(NamedTuple):
    """What `policy_loss` and `linear_policy_loss` return.

    Attributes:
        loss: scalar, differentiable.
        stats: sums over the tokens of non-zero weight, 0-dim and detached, so that they add up over microbatches:
            ``tokens`` (their count), ``entropy`` and ``kl`` (sums over tokens), ``ratios`` (the number of ratios:
            tokens, or sequences if the level is not the token's), ``ratio`` (their sum), ``clip_low`` and
            ``clip_high`` (how many of them are clipped below with A < 0 and above with A > 0).
        logprobs: per-token log-probabilities, detached (`linear_policy_loss` only).
        entropy: per-token entropies, detached (`linear_policy_loss` only, where they were asked for or needed).
    """

    loss: Tensor
    stats: dict[str, Tensor]
    logprobs: Tensor | None = None
    entropy: Tensor | None = None


def policy_loss(
    logprobs: Tensor,  # [N] or [B, T]
    advantages: Tensor,  # [N], [B, T], or one per sequence
    weights: Tensor,  # [N] or [B, T]
    objective: PolicyObjective = PolicyObjective(),
    *,
    old_logprobs: Tensor | None = None,  # [N] or [B, T]
    ref_logprobs: Tensor | None = None,  # [N] or [B, T]
    entropy: Tensor | None = None,  # [N] or [B, T]
    correction: Tensor | None = None,  # [N] or [B, T]
    selected: Tensor | None = None,  # [N] or [B, T]
    cu_seqlens: Tensor | None = None,  # [S + 1]
    backend: str = "auto",
) -> PolicyLoss:
    """Policy loss from per-token log-probabilities: the equation at the top of this module.

    Args:
        logprobs: ``[N]`` packed or ``[B, T]`` padded (one sequence per row); log-probabilities of the policy, nats.
        advantages: same shape, or one per sequence (``[B]``, or ``[S]`` with `cu_seqlens`; if S = N, one per token).
        weights: same shape; mask and normaliser, from `token_weights`. 0 removes a token.
        objective: what is minimised; see `PolicyObjective` and `PRESETS`.
        old_logprobs: log-probabilities of the policy that sampled the tokens. None: `logprobs`, so every ratio is 1
            (the first update on fresh samples).
        ref_logprobs: log-probabilities of the reference policy; needed if ``objective.uses_reference``.
        entropy: per-token entropies, for the bonus and for the statistics.
        correction: the constant ``rho_t`` for the difference between sampler and trainer.
        selected: 1 for the tokens that the objective treats differently, else 0, as from `covariance_mask`; needed if
            ``objective.needs_selection``.
        cu_seqlens: ``[S + 1]`` int offsets of the sequences in packed tensors; needed if
            ``objective.whole_sequences``.
        backend: ``"auto"`` (Triton on a supported GPU, else torch), ``"triton"``, ``"torch"`` or ``"reference"``.

    Returns:
        :class:`PolicyLoss`; the loss is differentiable in `logprobs` and `entropy`, float32 (or float64).

    Raises:
        ValueError: shapes, devices or sequence offsets do not fit, a needed argument is missing, or an option is
            unknown.
        TypeError: an argument has the wrong dtype or type.
    """
    op = "policy_loss"
    checks.require_tensors(op, logprobs=logprobs)
    checks.require_floating(op, logprobs=logprobs, entropy=entropy)
    checks.require_device(op, logprobs.device, entropy=entropy)
    checks.require_shape(op, logprobs.shape, entropy=entropy)
    dtype = checks.accumulation_dtype(logprobs)
    backend = choose_backend(op, backend, logprobs.device, dtype)
    tokens = make_token_loss(
        op, logprobs.shape, logprobs.device, dtype, objective, backend, advantages=advantages, weights=weights,
        old_logprobs=old_logprobs, ref_logprobs=ref_logprobs, correction=correction, selected=selected,
        cu_seqlens=cu_seqlens,
    )  # fmt: skip
    checks.require(
        objective.entropy_coef == 0.0 or entropy is not None, f"{op}: entropy_coef needs the entropy argument"
    )
    flat = logprobs.reshape(-1).to(dtype)
    flat_entropy = None if entropy is None else entropy.reshape(-1).to(dtype)
    if backend == "reference":
        loss, stats = policy_loss_ref(flat, tokens.tokens, objective, flat_entropy, tokens.offsets)
    else:
        loss, stats = _PolicyLoss.apply(flat, flat_entropy, tokens)
    return PolicyLoss(loss, named_statistics(stats))


def policy_loss_ref(
    logprobs: Tensor,  # [N]
    tokens: Tokens,
    objective: PolicyObjective,
    entropy: Tensor | None = None,  # [N]
    offsets: Tensor | None = None,  # [S + 1]
) -> tuple[Tensor, Tensor]:
    """The equation above, differentiated by autograd: what the tests compare with. Returns (loss, statistics)."""
    counted = tokens.weights != 0
    tokens = Tokens(*(None if field is None else torch.where(counted, field, 0.0) for field in tokens))
    o, (A, w, old, ref, rho, selected) = objective, tokens
    logp = torch.where(counted, logprobs, 0.0).to(w.dtype)
    log_ratio = logp - (logp.detach() if old is None else old)
    counts = counted.to(logp.dtype)
    if o.level != "token":
        ids = checks.sequence_ids(offsets, logp.numel())
        lengths = checks.sequence_sums(counts, ids, offsets).clamp(min=1)
        total = checks.sequence_sums(log_ratio * counts, ids, offsets)
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
        tau = by_sign(A, o.sapo_temperature_pos, o.sapo_temperature_neg)
        per_token = -4 / tau * torch.sigmoid(tau * (ratio - 1)) * A
    elif o.kind == "vespo":
        per_token = -vespo_weight(ratio, A, o).detach() * A * logp
    elif o.function is not None:
        per_token = _call_function(o, logp, ratio, old, A, ref, selected, offsets, counted)
    else:
        per_token = -A * logp
    if rho is not None:
        per_token = rho * per_token
    kl = torch.zeros_like(logp)
    if ref is not None:
        kl = kl_estimate_ref(logp, ref, o.kl)
        kl = kl if o.kl_clip is None else kl.clamp(-o.kl_clip, o.kl_clip)
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


def _call_function(o, logp, ratio, old, A, ref, selected, offsets, counted) -> Tensor:
    """The objective's own function on the counted tokens, differentiated by autograd."""
    lengths = None if offsets is None else torch.stack([part.sum() for part in counted.tensor_split(offsets[1:-1])])
    tensors = {
        "logprobs": logp, "old_logprobs": logp.detach() if old is None else old, "advantages": A, "ratio": ratio,
        "ref_logprobs": ref, "selected": selected,
    }  # fmt: skip
    tensors = {name: None if values is None else values[counted] for name, values in tensors.items()}
    if lengths is not None:
        tensors["cu_seqlens"] = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    given = {**tensors, **o.settings}
    value = o.function(**{name: given[name] for name in parameters_of(o.function)})
    return torch.zeros_like(logp).masked_scatter(counted, value)


@dataclass(frozen=True)
class TokenLoss:
    """The loss of N tokens, whose arguments have been checked and flattened."""

    tokens: Tokens
    objective: PolicyObjective
    offsets: Tensor | None  # [S + 1]
    terms_of: Callable[..., Terms]  # `policy_terms`, or the same in one kernel

    @property
    def has_bonus(self) -> bool:
        return self.objective.entropy_coef != 0.0

    def terms(self, logprobs: Tensor, entropy: Tensor | None) -> Terms:
        return self.terms_of(logprobs, self.tokens, self.objective, entropy, self.offsets)

    def with_weights(self, weights: Tensor) -> TokenLoss:
        return replace(self, tokens=self.tokens._replace(weights=weights))

    def take(self, at: Tensor | slice) -> TokenLoss:
        """The loss of some of the tokens, for ratios of the token level."""
        return replace(self, tokens=self.tokens.take(at))


def make_token_loss(
    op: str,
    shape: torch.Size,
    device: torch.device,
    dtype: torch.dtype,
    objective: PolicyObjective,
    backend: str,
    *,
    advantages: Tensor,  # `shape`, or one per sequence
    cu_seqlens: Tensor | None,  # [S + 1]
    **fields: Tensor | None,  # `shape`: the other fields of `Tokens`
) -> TokenLoss:
    """Check the loss's per-token arguments and flatten them."""
    if not isinstance(objective, PolicyObjective):
        raise TypeError(f"{op}: objective must be a PolicyObjective (see PRESETS), got {type(objective).__name__}")
    checks.require_tensors(op, advantages=advantages, weights=fields["weights"])
    checks.require(len(shape) in (1, 2), f"{op}: tensors must be packed [N] or padded [B, T], got shape {tuple(shape)}")
    checks.require(
        not objective.uses_reference or fields["ref_logprobs"] is not None,
        f"{op}: {f'beta={objective.beta}' if objective.beta else 'the objective'} needs ref_logprobs",
    )
    checks.require(
        not objective.needs_selection or fields.get("selected") is not None,
        f"{op}: the objective needs selected, the tokens to treat differently; see covariance_mask",
    )
    if fields.get("selected") is not None and not fields["selected"].is_floating_point():
        fields["selected"] = fields["selected"].to(dtype)
    checks.require_floating(op, advantages=advantages, **fields)
    checks.require_device(op, device, advantages=advantages, **fields)
    needed_by = None
    if objective.whole_sequences:
        needed_by = "the objective's function" if objective.level == "token" else f"level={objective.level!r}"
    offsets = checks.sequence_offsets(op, shape, cu_seqlens, device, needed_by)
    if offsets is not None and advantages.shape == (offsets.numel() - 1,) and advantages.shape != shape:
        advantages = advantages[checks.sequence_ids(offsets, shape.numel())].view(shape)
    fields = {"advantages": advantages, **fields}
    checks.require_shape(op, shape, **fields)
    flat = {name: None if t is None else t.detach().reshape(-1).to(dtype) for name, t in fields.items()}
    terms_of = policy_terms
    if backend == "triton" and objective.function is None:
        from grpo_kernels.triton_kernels.policy_kernels import policy_terms_triton as terms_of
    return TokenLoss(Tokens(**flat), objective, offsets, terms_of)


def named_statistics(stats: Tensor) -> dict[str, Tensor]:
    return dict(zip(STATISTICS, stats.unbind(), strict=True))


class _PolicyLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logprobs, entropy, loss: TokenLoss):
        terms = loss.terms(logprobs, entropy)
        ctx.save_for_backward(terms.grad_logprobs, terms.grad_entropy)
        ctx.mark_non_differentiable(terms.stats)
        return terms.loss, terms.stats

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_loss, _):
        pairs = zip(ctx.saved_tensors, ctx.needs_input_grad, strict=False)
        return *(grad_loss * grad if wanted else None for grad, wanted in pairs), None
