"""From hidden states to the policy loss and its gradients, without an [N, V] tensor.

    logprobs, entropy = linear_logprob(hidden, weight, targets, return_entropy=True)
    loss = policy_loss(logprobs, advantages, weights, objective, entropy=entropy).loss

Where a token's coefficient dL/dlogp_t is known once its own log-probability is, the gradients are made in the forward,
while the chunk's probabilities are still there; the backward only multiplies by the incoming scalar. Cost in
U = 2 N H V flops:

    no gradient                            1U
    token level, trainable / frozen head   3U / 2U
    sequence level, trainable head         1U + 3U f      f: fraction of rows with a non-zero coefficient
    sequence level, frozen head            2U
    rows whose coefficient is known to be  1U instead of 3U, or nothing with skip_inactive
    zero (advantage 0, no KL, no entropy)

Rows of weight 0 or target -100 cost nothing. Saved for the backward: the finished gradients, hidden's in its own dtype
(float16's in float32, out of reach of underflow until the loss scale arrives). The weight's gradient is accumulated in
float32 over all chunks, and rounded to the weight's dtype once; or it is added to a float32 buffer that lives across
microbatches.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from grpo_kernels._backend import choose_backend
from grpo_kernels._checks import (
    IGNORE_INDEX,
    require,
    require_device,
    require_floating,
    require_shape,
    require_tensors,
    sequence_ids,
    values_can_be_checked,
)
from grpo_kernels._head import local_targets
from grpo_kernels._head_arguments import make_head
from grpo_kernels._passes import Gradients, forward_rows, partition, recompute_gradients, row_chunks, score
from grpo_kernels._policy_terms import Terms, Tokens, policy_loss_ref, policy_terms
from grpo_kernels.linear_logprob import linear_logprob_ref
from grpo_kernels.objective import PolicyObjective
from grpo_kernels.policy_loss import PolicyLoss, flatten_tokens, named_statistics


def linear_policy_loss_ref(hidden, weight, targets, tokens: Tokens, objective, offsets=None, **head_options):
    """Full logits, then `policy_loss_ref`, differentiated by autograd: the oracle of the tests."""
    logprobs, entropy = linear_logprob_ref(hidden, weight, targets, **head_options)
    tokens = tokens._replace(weights=torch.where(targets == IGNORE_INDEX, 0.0, tokens.weights))
    loss, stats = policy_loss_ref(logprobs, tokens, objective, entropy, offsets)
    return loss, stats, logprobs.detach(), entropy.detach()


def _split_rows(tokens: Tokens, objective: PolicyObjective, offsets: Tensor | None) -> tuple[Tensor, Tensor]:
    """Rows that may have a gradient, and rows whose coefficient is known to be zero. Weightless rows are in neither."""
    counted = tokens.weights != 0
    if not objective.advantage_alone:
        moving, _ = partition((~counted).long(), 2)
        return moving, moving.new_zeros(0)
    moves = counted & (tokens.advantages != 0)
    if tokens.correction is not None:
        moves = moves & (tokens.correction != 0)
    if objective.level != "token":
        # One moving token moves the ratio of its whole sequence.
        ids = sequence_ids(offsets, counted.numel())
        moving = torch.zeros(offsets.numel() - 1, device=ids.device).index_add_(0, ids, moves.float())
        moves = counted & (moving[ids] > 0)
    moving, still, _ = partition(torch.where(moves, 0, torch.where(counted, 1, 2)), 3)
    return moving, still


def _kept_dtype(dtype: torch.dtype) -> torch.dtype:
    """What a gradient is kept in until the backward: float16 would underflow before a loss scale reaches it."""
    return torch.float32 if dtype == torch.float16 else dtype


class _Options(NamedTuple):
    with_entropy: bool
    skip_inactive: bool
    grad_weight_buffer: Tensor | None
    # `policy_loss.policy_terms`, or the same in one kernel.
    terms: Callable[..., Terms] = policy_terms


def _token_level(head, hidden, targets, temperature, tokens, objective, rows, logprobs, entropy, gradients, terms_of):
    """3U or 2U: the coefficient is made from each chunk's own log-probabilities. Returns (loss, statistics)."""
    loss, stats = 0.0, 0.0
    bonus = objective.entropy_coef != 0.0
    buffer = head.buffer(rows.numel())
    for at in row_chunks(rows, targets.numel(), buffer.shape[0]):
        operand, e, row_stats, row_temperature = forward_rows(
            head, hidden, targets, temperature, at, buffer, entropy is not None
        )
        logprobs[at] = row_stats.logprobs
        if entropy is not None:
            entropy[at] = row_stats.entropy
        terms = terms_of(logprobs[at], tokens.take(at), objective, None if entropy is None else entropy[at])
        loss, stats = loss + terms.loss, stats + terms.stats
        d, row_scale = head.gradient_(
            e, row_stats, targets[at], row_temperature, terms.grad_logprobs, terms.grad_entropy if bonus else None
        )
        gradients.add(head, d, row_scale, operand, at)
    return loss, stats


def _sequence_level(
    head, hidden, targets, temperature, tokens, objective, offsets, rows, logprobs, entropy, gradients, terms_of
):
    """Log-probabilities first; then the rows that move, recomputed (trainable head) or by their slope (frozen)."""
    bonus = objective.entropy_coef != 0.0
    frozen = gradients.weight is None and gradients.bias is None
    slopes = frozen and not bonus
    if slopes:
        buffer = head.buffer(rows.numel())
        for at in row_chunks(rows, targets.numel(), buffer.shape[0]):
            _, e, row_stats, row_temperature = forward_rows(
                head, hidden, targets, temperature, at, buffer, entropy is not None
            )
            logprobs[at] = row_stats.logprobs
            if entropy is not None:
                entropy[at] = row_stats.entropy
            d, row_scale = head.gradient_(e, row_stats, targets[at], row_temperature, None)
            gradients.hidden[at] = head.grad_hidden(d, row_scale).to(gradients.hidden.dtype)
    else:
        score(head, hidden, targets, temperature, rows, logprobs, entropy)
    terms = terms_of(logprobs, tokens, objective, entropy, offsets)
    if slopes:
        gradients.hidden.mul_(terms.grad_logprobs[:, None])
        return terms.loss, terms.stats
    moving = terms.grad_logprobs != 0
    if bonus:
        moving = moving | (terms.grad_entropy != 0)
    recompute_gradients(
        head, hidden, targets, temperature, partition((~moving).long(), 2)[0],
        terms.grad_logprobs, terms.grad_entropy if bonus else None, gradients,
    )  # fmt: skip
    return terms.loss, terms.stats


class _LinearPolicyLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, temperature, head, tokens, objective, offsets, options):
        with_entropy, skip_inactive, grad_weight_buffer, terms_of = options
        needs = list(ctx.needs_input_grad[:3])
        needs[1] = needs[1] or grad_weight_buffer is not None
        outputs = hidden.new_zeros(2, hidden.shape[0], dtype=head.dtype)
        logprobs, entropy = outputs[0], outputs[1] if with_entropy else None
        targets = local_targets(head, targets)
        moving, still = _split_rows(tokens, objective, offsets)
        with torch.autocast(hidden.device.type, enabled=False):
            head = head.prepared()
            common = head, hidden, targets, temperature
            gradients = Gradients(head, hidden, needs, grad_weight_buffer, _kept_dtype(hidden.dtype))
            if skip_inactive:
                outputs[:, still] = float("nan")
                tokens = tokens._replace(weights=tokens.weights.index_fill(0, still, 0.0))
            else:
                score(*common, still, logprobs, entropy)
            if not any(needs):
                score(*common, moving, logprobs, entropy)
                terms = terms_of(logprobs, tokens, objective, entropy, offsets)
                loss, stats = terms.loss, terms.stats
            elif objective.level != "token":
                loss, stats = _sequence_level(
                    *common, tokens, objective, offsets, moving, logprobs, entropy, gradients, terms_of
                )
            else:
                loss, stats = _token_level(*common, tokens, objective, moving, logprobs, entropy, gradients, terms_of)
                if (still.numel() > 0 and not skip_inactive) or moving.numel() == 0:
                    rest = terms_of(logprobs[still], tokens.take(still), objective,
                                    None if entropy is None else entropy[still])  # fmt: skip
                    loss, stats = loss + rest.loss, stats + rest.stats
        ctx.buffered = grad_weight_buffer is not None
        ctx.dtypes = hidden.dtype, weight.dtype, None if bias is None else bias.dtype
        made_hidden, made_weight, made_bias = gradients.collected()
        made = made_hidden, None if ctx.buffered else made_weight, made_bias
        ctx.gradients = [
            None if grad is None else grad.to(_kept_dtype(dtype)) for grad, dtype in zip(made, ctx.dtypes, strict=True)
        ]
        ctx.mark_non_differentiable(stats, logprobs, *(() if entropy is None else (entropy,)))
        return loss, stats, logprobs, entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_loss, *_):
        require(
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
                    grad.mul_(grad_loss)
        cast = (None if grad is None else grad.to(dtype) for grad, dtype in zip(gradients, ctx.dtypes, strict=True))
        return *cast, *(None,) * 7


def _require_unit(grad_loss: Tensor) -> None:
    message = "linear_policy_loss: with grad_weight_buffer the loss must be backpropagated with gradient 1"
    if grad_loss.device.type == "cpu":
        require(grad_loss.item() == 1, f"{message}, got {grad_loss.item()}")
    else:
        # Checked on the device, so that the stream is not stalled.
        torch._assert_async(grad_loss == 1, message)


def _linear_policy_loss_torch(hidden, weight, bias, targets, temperature, head, tokens, objective, offsets, options):
    if not torch.is_grad_enabled():
        hidden, weight, bias = hidden.detach(), weight.detach(), None if bias is None else bias.detach()
        options = options._replace(grad_weight_buffer=None)
    return _LinearPolicyLoss.apply(
        hidden, weight, bias, targets, temperature, head, tokens, objective, offsets, options
    )


def _linear_policy_loss_triton(hidden, weight, bias, targets, temperature, head, tokens, objective, offsets, options):
    from grpo_kernels.triton_kernels.policy_kernels import policy_terms_triton
    from grpo_kernels.triton_kernels.triton_head import TritonHead

    return _linear_policy_loss_torch(
        hidden, weight, bias, targets, temperature, TritonHead(**vars(head)), tokens, objective, offsets,
        options._replace(terms=policy_terms_triton),
    )  # fmt: skip


def _linear_policy_loss_reference(
    hidden, weight, bias, targets, temperature, head, tokens, objective, offsets, options
):
    op = "linear_policy_loss"
    with_entropy, skip_inactive, grad_weight_buffer, _ = options
    require(head.process_group is None, f"{op}: backend='reference' has no process_group")
    require(grad_weight_buffer is None, f"{op}: backend='reference' has no grad_weight_buffer")
    require(not skip_inactive, f"{op}: backend='reference' has no skip_inactive")
    loss, stats, logprobs, entropy = linear_policy_loss_ref(
        hidden, weight, targets, tokens, objective, offsets, bias=bias, logit_scale=head.logit_scale,
        softcap=head.softcap, temperature=1.0 if temperature is None else temperature,
    )  # fmt: skip
    return loss, stats, logprobs, entropy if with_entropy else None


_IMPLEMENTATIONS = {
    "triton": _linear_policy_loss_triton,
    "torch": _linear_policy_loss_torch,
    "reference": _linear_policy_loss_reference,
}


def linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    advantages: Tensor,
    weights: Tensor,
    objective: PolicyObjective = PolicyObjective(),
    *,
    old_logprobs: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    correction: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    return_entropy: bool = False,
    skip_inactive: bool = False,
    grad_weight_buffer: Tensor | None = None,
    max_buffer_bytes: int | None = None,
    process_group: torch.distributed.ProcessGroup | None = None,
    backend: str = "auto",
) -> PolicyLoss:
    """Policy loss from hidden states: `linear_logprob` and `policy_loss` in one, at the cost named above.

    Args:
        hidden: ``[N, H]`` packed or ``[B, T, H]`` padded, floating point.
        weight, targets, bias, temperature, logit_scale, softcap, max_buffer_bytes, process_group: as in
            `linear_logprob`; targets are ``[N]`` or ``[B, T]``.
        advantages, weights, objective, old_logprobs, ref_logprobs, correction, cu_seqlens: as in `policy_loss`.
        return_entropy: also return (and sum up) entropies; implied by ``objective.entropy_coef``.
        skip_inactive: leave rows whose coefficient is known to be zero out of the forward as well. Their
            log-probabilities and entropies are NaN, and the statistics do not count them.
        grad_weight_buffer: float32 ``[V, H]``; the weight's gradient is added to it during the forward and `weight`
            gets none from autograd. The loss must then be backpropagated with gradient 1, as it is when `weights`
            carry the normaliser.
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
    require_tensors(op, hidden=hidden, targets=targets)
    require(hidden.dim() in (2, 3), f"{op}: hidden must have shape [N, H] or [B, T, H], got {tuple(hidden.shape)}")
    head, temperatures = make_head(
        op, hidden, weight, targets, bias=bias, temperature=temperature, logit_scale=logit_scale, softcap=softcap,
        max_buffer_bytes=max_buffer_bytes, process_group=process_group,
    )  # fmt: skip
    tokens, offsets = flatten_tokens(
        op, targets.shape, hidden.device, head.dtype, objective,
        advantages, weights, old_logprobs, ref_logprobs, correction, cu_seqlens,
    )  # fmt: skip
    if grad_weight_buffer is not None:
        require_floating(op, grad_weight_buffer=grad_weight_buffer)
        require_shape(op, weight.shape, grad_weight_buffer=grad_weight_buffer)
        require_device(op, weight.device, grad_weight_buffer=grad_weight_buffer)
        if grad_weight_buffer.dtype != head.dtype:
            raise TypeError(f"{op}: grad_weight_buffer must be {head.dtype}, got {grad_weight_buffer.dtype}")
    flat_targets = targets.reshape(-1)
    if values_can_be_checked(targets.device) and targets.numel() and bool((flat_targets == IGNORE_INDEX).all()):
        message = (
            f"{op}: all {targets.numel()} targets are {IGNORE_INDEX} (ignored), so the loss and its gradients are 0"
        )
        warnings.warn(message, stacklevel=2)
    tokens = tokens._replace(weights=tokens.weights.masked_fill(flat_targets == IGNORE_INDEX, 0.0))
    with_entropy = return_entropy or objective.entropy_coef != 0.0
    run = choose_backend(op, _IMPLEMENTATIONS, backend, hidden.device, head.dtype)
    loss, stats, logprobs, entropy = run(
        hidden.reshape(-1, hidden.shape[-1]), weight, bias, flat_targets, temperatures, head, tokens, objective,
        offsets, _Options(with_entropy, skip_inactive, grad_weight_buffer),
    )  # fmt: skip
    return PolicyLoss(
        loss,
        named_statistics(stats),
        logprobs.view(targets.shape),
        None if entropy is None else entropy.view(targets.shape),
    )
