"""From hidden states to the policy loss and its gradients, without an [N, V] tensor.

    logprobs, entropy = linear_logprob(hidden, weight, targets, return_entropy=True)
    loss = policy_loss(logprobs, advantages, weights, objective, entropy=entropy).loss

If a token's coefficient dL/dlogp_t depends on no other token's log-probability, the gradients are computed in the
forward, while the chunk's probabilities exist; the backward only multiplies them by the incoming scalar. Cost in
U = 2 N H V flops:

    no gradient                            1U
    token level, trainable / frozen head   3U / 2U
    sequence level, trainable head         1U + 3U f      f: fraction of rows with a non-zero coefficient
    sequence level, frozen head            2U
    rows whose coefficient is known to be  1U instead of 3U, or nothing with skip_inactive
    zero (advantage 0, no KL, no entropy)

Rows of weight 0 or target -100 cost nothing. Saved for the backward: the finished gradients, hidden's in its own dtype
(float16's in float32, since it would underflow before the loss scale is applied). The weight's gradient is accumulated
in float32 over all chunks and rounded once, or added to a float32 buffer that all microbatches share.
"""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from grpo_kernels import _checks as checks
from grpo_kernels._head_arguments import make_pass
from grpo_kernels._passes import Gradients, KnownRows, Pass, Scores, partition
from grpo_kernels.linear_logprob import linear_logprob_ref
from grpo_kernels.objective import PolicyObjective
from grpo_kernels.policy_loss import PolicyLoss, TokenLoss, make_token_loss, named_statistics, policy_loss_ref
from grpo_kernels.support import Support


def linear_policy_loss(
    hidden: Tensor,  # [N, H] or [B, T, H]
    weight: Tensor,  # [V, H]
    targets: Tensor,  # [N] or [B, T]
    advantages: Tensor,  # [N], [B, T], or one per sequence
    weights: Tensor,  # [N] or [B, T]
    objective: PolicyObjective = PolicyObjective(),
    *,
    old_logprobs: Tensor | None = None,  # [N] or [B, T]
    ref_logprobs: Tensor | None = None,  # [N] or [B, T]
    correction: Tensor | None = None,  # [N] or [B, T]
    selected: Tensor | None = None,  # [N] or [B, T]
    cu_seqlens: Tensor | None = None,  # [S + 1]
    bias: Tensor | None = None,  # [V]
    temperature: float | Tensor = 1.0,  # [N] or [B, T]
    logit_scale: float = 1.0,
    softcap: float | None = None,
    support: Support | None = None,
    return_entropy: bool = False,
    skip_inactive: bool = False,
    rows: Tensor | Literal["all"] | None = None,  # [n]
    grad_weight_buffer: Tensor | None = None,  # [V, H]
    max_buffer_bytes: int | None = None,
    process_group: torch.distributed.ProcessGroup | None = None,
    backend: str = "auto",
) -> PolicyLoss:
    """Policy loss from hidden states: `linear_logprob` and `policy_loss` in one; for its cost see the module's top.

    Args:
        hidden: ``[N, H]`` packed or ``[B, T, H]`` padded, floating point.
        weight, targets, bias, temperature, logit_scale, softcap, support, max_buffer_bytes, process_group: as in
            `linear_logprob`; targets are ``[N]`` or ``[B, T]``.
        advantages, weights, objective, old_logprobs, ref_logprobs, correction, selected, cu_seqlens: as in
            `policy_loss`.
        return_entropy: also return (and sum up) entropies; implied by ``objective.entropy_coef``.
        skip_inactive: skip the forward of rows whose coefficient is known to be zero. Their log-probabilities and
            entropies are NaN, and the statistics do not count them.
        rows: the tokens to compute, if the caller knows them, as in `linear_logprob`: on a GPU the host then waits for
            nothing. All of them get the gradient's products, those whose weight or coefficient is zero too.
        grad_weight_buffer: float32 ``[V, H]``; the weight's gradient is added to it during the forward, and autograd
            gives `weight` none. The loss must then be backpropagated with gradient 1, so `weights` must include the
            normaliser.
        backend: ``"auto"`` (Triton on a supported GPU, else torch), ``"triton"``, ``"torch"`` or ``"reference"``.

    Returns:
        :class:`PolicyLoss`: ``loss`` is differentiable in `hidden`, `weight` and `bias`, once; ``logprobs`` and
        ``entropy`` (or None) are detached, ``[N]`` or ``[B, T]``, 0 where the weight is 0. Without any token of
        non-zero weight the loss and its gradients are 0, so that a microbatch of padding adds nothing to its step;
        targets that are all -100 also cause a warning (where their values can be checked, as above).

    Raises:
        ValueError: shapes, devices or sequence offsets do not fit, a needed argument is missing, a target id is
            outside the vocabulary, or an option is out of range or unknown.
        TypeError: an argument has the wrong dtype or type.
    """
    op = "linear_policy_loss"
    checks.require_tensors(op, hidden=hidden, targets=targets)
    checks.require(
        hidden.dim() in (2, 3), f"{op}: hidden must have shape [N, H] or [B, T, H], got {tuple(hidden.shape)}"
    )
    backend, call = make_pass(
        op, hidden, weight, targets, bias=bias, temperature=temperature, logit_scale=logit_scale, softcap=softcap,
        support=support, rows=rows, max_buffer_bytes=max_buffer_bytes, process_group=process_group,
        with_entropy=return_entropy, backend=backend,
    )  # fmt: skip
    checks.require(
        rows is None or not skip_inactive, f"{op}: skip_inactive finds the rows itself, so rows must be None"
    )
    loss = make_token_loss(
        op, targets.shape, hidden.device, call.head.dtype, objective, backend, advantages=advantages, weights=weights,
        old_logprobs=old_logprobs, ref_logprobs=ref_logprobs, correction=correction, selected=selected,
        cu_seqlens=cu_seqlens,
    )  # fmt: skip
    if objective.entropy_coef != 0.0:
        call = replace(call, with_entropy=True)
    if grad_weight_buffer is not None:
        checks.require_floating(op, grad_weight_buffer=grad_weight_buffer)
        checks.require_shape(op, weight.shape, grad_weight_buffer=grad_weight_buffer)
        checks.require_device(op, weight.device, grad_weight_buffer=grad_weight_buffer)
        if grad_weight_buffer.dtype != call.head.dtype:
            raise TypeError(f"{op}: grad_weight_buffer must be {call.head.dtype}, got {grad_weight_buffer.dtype}")
        if torch.is_grad_enabled():
            call = replace(call, needs=(call.needs[0], True, call.needs[2]), grad_weight_buffer=grad_weight_buffer)
    ignored = call.targets == checks.IGNORE_INDEX
    if checks.values_can_be_checked(targets.device) and targets.numel() and bool(ignored.all()):
        found = f"all {targets.numel()} targets are {checks.IGNORE_INDEX} (ignored)"
        warnings.warn(f"{op}: {found}, so the loss and its gradients are 0", stacklevel=2)
    loss = loss.with_weights(loss.tokens.weights.masked_fill(ignored, 0.0))
    if backend == "reference":
        for name, given in (("process_group", process_group), ("grad_weight_buffer", grad_weight_buffer)):
            checks.require(given is None, f"{op}: backend='reference' does not support {name}")
        checks.require(not skip_inactive, f"{op}: backend='reference' does not support skip_inactive")
        total, stats, scores = linear_policy_loss_ref(call, weight, bias, loss)
    else:
        total, stats, *found = _LinearPolicyLoss.apply(call.hidden, weight, bias, call, loss, skip_inactive)
        scores = Scores(*found)
    entropy = scores.entropy.view(targets.shape) if call.with_entropy and scores.entropy is not None else None
    return PolicyLoss(total, named_statistics(stats), scores.logprobs.view(targets.shape), entropy)


def linear_policy_loss_ref(
    call: Pass, weight: Tensor, bias: Tensor | None, loss: TokenLoss
) -> tuple[Tensor, Tensor, Scores]:
    """Full logits, then the loss's definition, differentiated by autograd: what the tests compare with."""
    logprobs, entropy = linear_logprob_ref(call, weight, bias)
    total, stats = policy_loss_ref(logprobs, loss.tokens, loss.objective, entropy, loss.offsets)
    return total, stats, Scores(logprobs.detach(), entropy.detach())


class _LinearPolicyLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, call: Pass, loss: TokenLoss, skip_inactive: bool):
        scores = Scores.zeros(call)
        active, inactive = _split_rows(loss) if call.rows is None else (call.rows, call.rows[:0])
        with torch.autocast(hidden.device.type, enabled=False):
            call = call.prepared()
            gradients = call.gradients(_kept_dtype(hidden.dtype), _kept_dtype(weight.dtype))
            if skip_inactive:
                for score in scores:
                    if score is not None:
                        score[inactive] = float("nan")
                loss, inactive = loss.with_weights(loss.tokens.weights.index_fill(0, inactive, 0.0)), inactive[:0]
            else:
                call.score(inactive, scores)
            if not any(call.needs):
                call.score(active, scores)
                total, stats, *_ = loss.terms(*scores)
            elif loss.objective.whole_sequences:
                total, stats = _sequence_level(call, loss, active, scores, gradients)
            else:
                total, stats = _token_level(call, loss, active, inactive, scores, gradients)
        if call.rows is not None:
            scores.clear(loss.tokens.weights == 0)
        ctx.scale_, ctx.buffered = call.head.scale_, call.grad_weight_buffer is not None
        ctx.dtypes = [None if leaf is None else leaf.dtype for leaf in (hidden, weight, bias)]
        made = list(gradients.collected())
        if ctx.buffered:
            made[1] = None
        ctx.gradients = [
            None if grad is None else grad.to(_kept_dtype(dtype)) for grad, dtype in zip(made, ctx.dtypes, strict=True)
        ]
        ctx.mark_non_differentiable(stats, *(score for score in scores if score is not None))
        return total, stats, *scores

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_loss, *_):
        checks.require(
            ctx.gradients is not None,
            "linear_policy_loss: its gradients are made once, so a second backward needs a second forward",
        )
        gradients, ctx.gradients = ctx.gradients, None
        if ctx.buffered:
            # The buffer already holds the gradient of the loss itself.
            _require_unit(grad_loss)
        if grad_loss.device.type != "cpu" or grad_loss.item() != 1:
            for grad in gradients:
                if grad is not None:
                    ctx.scale_(grad, grad_loss)
        cast = (None if grad is None else grad.to(dtype) for grad, dtype in zip(gradients, ctx.dtypes, strict=True))
        return *cast, *(None,) * 3


def _token_level(
    call: Pass, loss: TokenLoss, rows: Tensor, inactive: Tensor, scores: Scores, gradients: Gradients
) -> tuple[Tensor, Tensor]:
    """3U or 2U: the gradients of each chunk follow from its own log-probabilities. Returns (loss, statistics)."""
    found = []
    for chunk in call.gradient_chunks(rows):
        scores.write(chunk)
        terms = loss.take(chunk.at).terms(*scores.take(chunk.at))
        gradients.add(chunk, terms.grad_logprobs, terms.grad_entropy if loss.has_bonus else None)
        found.append(terms[:2])
    if inactive.numel() > 0 or not found:
        found.append(loss.take(inactive).terms(*scores.take(inactive))[:2])
    totals, stats = zip(*found, strict=True)
    return torch.stack(totals).sum(), torch.stack(stats).sum(0)


def _sequence_level(
    call: Pass, loss: TokenLoss, rows: Tensor, scores: Scores, gradients: Gradients
) -> tuple[Tensor, Tensor]:
    """Log-probabilities first; then the gradients, by recomputation (trainable head) or from slopes (frozen)."""
    if gradients.hidden is not None and call.frozen and not loss.has_bonus:
        call.slopes(rows, scores, [gradients.hidden])
        terms = loss.terms(*scores)
        gradients.hidden.mul_(terms.grad_logprobs[:, None])
        return terms.loss, terms.stats
    known = KnownRows.zeros(call)
    call.score(rows, scores, known)
    terms = loss.terms(*scores)
    grad_entropy = terms.grad_entropy if loss.has_bonus else None
    if call.rows is None:
        active = terms.grad_logprobs != 0
        if grad_entropy is not None:
            active = active | (grad_entropy != 0)
        rows, _ = partition((~active).long(), 2)
    gradients.recompute(call, rows, known, terms.grad_logprobs, grad_entropy)
    return terms.loss, terms.stats


def _split_rows(loss: TokenLoss) -> tuple[Tensor, Tensor]:
    """Rows that may have a gradient, and rows of weight other than 0 whose coefficient is known to be zero."""
    tokens, objective = loss.tokens, loss.objective
    counted = tokens.weights != 0
    if not objective.advantage_alone:
        active, _ = partition((~counted).long(), 2)
        return active, active[:0]
    active = counted & (tokens.advantages != 0)
    if tokens.correction is not None:
        active = active & (tokens.correction != 0)
    if loss.offsets is not None and objective.whole_sequences:
        # One active token makes its whole sequence active through the ratio.
        ids = checks.sequence_ids(loss.offsets, counted.numel())
        active = counted & (checks.sequence_sums(active.float(), ids, loss.offsets)[ids] > 0)
    active, inactive, _ = partition(torch.where(active, 0, torch.where(counted, 1, 2)), 3)
    return active, inactive


def _kept_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of a gradient until the backward: float16 would underflow before the loss scale is applied."""
    return torch.float32 if dtype == torch.float16 else dtype


def _require_unit(grad_loss: Tensor) -> None:
    message = "linear_policy_loss: with grad_weight_buffer the loss must be backpropagated with gradient 1"
    if grad_loss.device.type == "cpu":
        checks.require(grad_loss.item() == 1, f"{message}, got {grad_loss.item()}")
    else:
        # Checked on the device, so that the stream is not stalled.
        torch._assert_async(grad_loss == 1, message)
