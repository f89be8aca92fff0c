"""Distillation through two output heads, without the logits of either: the exact divergence over the vocabulary.

With the distributions p of the student's head and q of the teacher's, for each token (`beta` as in TRL's GKD,
arXiv 2306.13649):

    beta = 1        KL(p || q), the reverse KL of on-policy distillation (MiniLLM, arXiv 2306.08543)
    beta = 0        KL(q || p)
    otherwise       beta KL(q || m) + (1 - beta) KL(p || m), with m = beta q + (1 - beta) p

    loss = sum_t weights_t * divergence_t

Its slope in the student's logits z is ``p_v (g_v - sum_u p_u g_u)`` with ``g = log p - log q`` for beta = 1 and
``g = (1 - beta) (log p - log m)`` in between, and ``p - q`` for beta = 0. Both heads' logits exist for a chunk of rows
that fits `max_buffer_bytes`, and the student's gradients are made in the same pass: with U = 2 N H V flops of its head,
3U for a trainable head and 2U for a frozen one, and 1U of the teacher's. The two hidden sizes may differ; the
vocabulary must be the same. Everything is float32 (float64 for float64 inputs).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from grpo_kernels import _checks as checks
from grpo_kernels._head_arguments import make_pass
from grpo_kernels._passes import Gradients, Pass, partition
from grpo_kernels._torch_head import TorchHead
from grpo_kernels.budget import chunks


class DistillationLoss(NamedTuple):
    """A differentiable 0-dim `loss`, and the detached divergence of each token, 0 where the weight is 0."""

    loss: Tensor
    divergence: Tensor  # [...]


def linear_distillation(
    hidden: Tensor,  # [..., H]
    weight: Tensor,  # [V, H]
    teacher_hidden: Tensor,  # [..., H_t]
    teacher_weight: Tensor,  # [V, H_t]
    weights: Tensor,  # [...]
    *,
    beta: float = 1.0,
    bias: Tensor | None = None,  # [V]
    teacher_bias: Tensor | None = None,  # [V]
    temperature: float | Tensor = 1.0,  # [...]
    logit_scale: float = 1.0,
    teacher_logit_scale: float = 1.0,
    softcap: float | None = None,
    teacher_softcap: float | None = None,
    max_buffer_bytes: int | None = None,
    backend: str = "auto",
) -> DistillationLoss:
    """The weighted sum of a divergence between a student's and a teacher's next-token distributions (defined above).

    Args:
        hidden, weight, bias, logit_scale, softcap: the student's head, as in `linear_logprob`.
        teacher_hidden, teacher_weight, teacher_bias, teacher_logit_scale, teacher_softcap: the teacher's, of the same
            vocabulary; never differentiated.
        weights: floating point, mask and normaliser of each token (`token_weights`); a token of weight 0 is not
            computed.
        beta: from 0 to 1, as above.
        temperature: divides the logits of both; a float, or one value per token.
        max_buffer_bytes: budget for temporary memory, as in `linear_logprob`, for the logits of both heads together.
        backend: ``"auto"`` or ``"torch"`` (the same here, for any device), or ``"reference"``.

    Returns:
        :class:`DistillationLoss`; ``loss`` is differentiable in `hidden`, `weight` and `bias`, once.

    Raises:
        ValueError: shapes, devices or vocabularies do not fit, or an option is out of range or unknown.
        TypeError: a tensor has the wrong dtype.
    """
    op = "linear_distillation"
    checks.require_tensors(op, hidden=hidden, teacher_hidden=teacher_hidden, weight=weight, weights=weights)
    checks.require_tensors(op, teacher_weight=teacher_weight)
    checks.require_choice(op, "backend", backend, ("auto", "torch", "reference"))
    checks.require_floating(op, weights=weights)
    checks.require_device(op, hidden.device, teacher_hidden=teacher_hidden, weights=weights)
    checks.require(hidden.dim() >= 1, f"{op}: hidden must have shape [..., H], got a scalar")
    checks.require_shape(op, hidden.shape[:-1], weights=weights)
    checks.require(
        teacher_hidden.shape[:-1] == hidden.shape[:-1],
        f"{op}: teacher_hidden must have shape {[*hidden.shape[:-1], 'H_t']}, got {list(teacher_hidden.shape)}",
    )
    checks.require(
        teacher_weight.dim() == 2 and teacher_weight.shape[:1] == weight.shape[:1],
        f"{op}: student and teacher need the same vocabulary, got weight {list(weight.shape)} and "
        f"teacher_weight {list(teacher_weight.shape)}",
    )
    checks.require(
        not isinstance(beta, bool) and isinstance(beta, int | float) and 0 <= beta <= 1,
        f"{op}: beta must be from 0 to 1, got {beta!r:.40}",
    )
    # No target is scored, so any token will do for those that are computed.
    targets = torch.where(weights.detach() == 0, checks.IGNORE_INDEX, 0)
    shared = {
        "temperature": temperature, "max_buffer_bytes": max_buffer_bytes, "process_group": None, "with_entropy": False,
        "backend": "torch",
    }  # fmt: skip
    _, student = make_pass(
        op, hidden, weight, targets, bias=bias, logit_scale=logit_scale, softcap=softcap, **shared
    )  # fmt: skip
    with torch.no_grad():
        _, teacher = make_pass(
            op, teacher_hidden.detach(), teacher_weight, targets, bias=teacher_bias, logit_scale=teacher_logit_scale,
            softcap=teacher_softcap, **shared,
        )  # fmt: skip
    flat = weights.detach().reshape(-1).to(student.head.dtype)
    if backend == "reference":
        divergence = divergence_ref(_log_softmax(student, weight, bias), _log_softmax(teacher), float(beta))
        divergence = torch.where(flat == 0, 0.0, divergence)
        loss, divergence = (flat * divergence).sum(), divergence.detach()
    else:
        loss, divergence = _LinearDistillation.apply(student.hidden, weight, bias, student, teacher, flat, float(beta))
    return DistillationLoss(loss, divergence.view(weights.shape))


def divergence_ref(log_p: Tensor, log_q: Tensor, beta: float) -> Tensor:
    """The definition in the module's docstring, from full log-probabilities ``[N, V]``, differentiated by autograd."""

    def kl(log_a: Tensor, log_b: Tensor) -> Tensor:
        # An excluded token, of log-probability -inf, adds nothing.
        excluded = log_a == float("-inf")
        return (log_a.exp() * (log_a - log_b).masked_fill(excluded, 0.0)).sum(-1)

    if beta in (0.0, 1.0):
        return kl(log_p, log_q) if beta else kl(log_q, log_p)
    log_m = torch.log(beta * log_q.exp() + (1 - beta) * log_p.exp())
    return beta * kl(log_q, log_m) + (1 - beta) * kl(log_p, log_m)


def _log_softmax(call: Pass, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """Full log-probabilities ``[N, V]``; differentiable in `weight` and `bias` where they are given."""
    head = call.head
    weight, bias = head.weight if weight is None else weight, head.bias if bias is None else bias
    logits = head.logit_scale * (call.hidden.to(head.dtype) @ weight.to(head.dtype).T)
    logits = logits if bias is None else logits + bias.to(head.dtype)
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    return torch.log_softmax(logits if call.temperature is None else logits / call.temperature[:, None], -1)


class _LinearDistillation(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, student: Pass, teacher: Pass, weights: Tensor, beta: float):
        divergence = torch.zeros_like(weights)
        rows = partition((weights == 0).long(), 2)[0]
        with torch.autocast(hidden.device.type, enabled=False):
            student, teacher = student.prepared(), teacher.prepared()
            # Until the backward, float16 would underflow.
            kept = [torch.float32 if leaf.dtype == torch.float16 else leaf.dtype for leaf in (hidden, weight)]
            gradients = Gradients(student, *kept)
            _distil(student, teacher, rows, weights, beta, divergence, gradients)
        ctx.gradients, ctx.dtypes = gradients.collected(), [x if x is None else x.dtype for x in (hidden, weight, bias)]
        ctx.mark_non_differentiable(divergence)
        return (weights * divergence).sum(), divergence

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_loss, _):
        checks.require(
            ctx.gradients is not None,
            "linear_distillation: its gradients are made once, so a second backward needs a second forward",
        )
        gradients, ctx.gradients = ctx.gradients, None
        made = (
            None if grad is None else grad.mul_(grad_loss).to(dtype)
            for grad, dtype in zip(gradients, ctx.dtypes, strict=True)
        )  # fmt: skip
        return *made, *(None,) * 4


def _distil(
    student: Pass, teacher: Pass, rows: Tensor, weights: Tensor, beta: float, divergence: Tensor, gradients: Gradients
) -> None:
    """Write the divergences of `rows`, and add their share to the gradients, a chunk at a time."""
    heads, count = (student.head, teacher.head), rows.numel()
    # The two buffers share the budget; the smaller of the two lengths fits both.
    length = min(head.chunk_rows(count, 2, trained=student.needs[1]) for head in heads)
    buffers = [head.allocate(length) for head in heads]
    chunked = [call.inputs(rows, length) for call in (student, teacher)]
    for (at, inputs, last), (_, teacher_inputs, _) in zip(*chunked, strict=True):
        z, teacher_z = (
            head.logits(given, buffer[: given.hidden.shape[0]])
            for head, given, buffer in zip(heads, (inputs, teacher_inputs), buffers, strict=True)
        )
        divergence[at] = _slopes_(student.head, z, teacher_z, inputs.temperature, beta)
        if any(student.needs):
            scale = weights[at] * student.head.logit_scale
            scale = scale if inputs.temperature is None else scale / inputs.temperature
            gradients.multiply(at, inputs, z, scale, last)


def _slopes_(
    head: TorchHead, z: Tensor, teacher_z: Tensor, temperature: Tensor | None, beta: float
) -> Tensor:  # fmt: skip
    """Turn the student's logits ``[C, V]`` into the slopes of its products, in place; returns divergences ``[C]``.

    The teacher's logits are overwritten. A block of rows is processed at once, which bounds the temporary memory.
    """
    found = z.new_empty(z.shape[0])
    row_bytes = z.shape[1] * z.element_size()
    for at in chunks(z.shape[0], head.block_bytes // row_bytes):
        log_p, log_q = z[at], teacher_z[at]
        flattening = None
        if head.softcap is not None:
            capped = log_p if temperature is None else log_p * temperature[at, None]
            flattening = 1 - (capped / head.softcap).square()
        log_p -= log_p.logsumexp(1, keepdim=True)
        log_q -= log_q.logsumexp(1, keepdim=True)
        excluded = log_p == float("-inf")
        if beta == 0:
            # Where the teacher excludes a token, both are -inf or its share is 0.
            q = log_q.exp()
            found[at] = torch.linalg.vecdot(q, (log_q - log_p).masked_fill_(q == 0, 0.0))
            log_p.exp_().sub_(q)
        elif beta == 1:
            gap = torch.sub(log_p, log_q, out=log_q).masked_fill_(excluded, 0.0)
            p = log_p.exp_()
            found[at] = torch.linalg.vecdot(p, gap)
            p *= gap.sub_(found[at, None])
        else:
            q = log_q.exp()
            log_m = (beta * q + (1 - beta) * log_p.exp()).log_()
            teacher_part = torch.linalg.vecdot(q, log_q.sub_(log_m).masked_fill_(q == 0, 0.0))
            gap = torch.sub(log_p, log_m, out=log_m).mul_(1 - beta).masked_fill_(excluded, 0.0)
            p = log_p.exp_()
            mean = torch.linalg.vecdot(p, gap)
            found[at] = mean + beta * teacher_part
            p *= gap.sub_(mean[:, None])
        if flattening is not None:
            z[at] *= flattening
    return found
