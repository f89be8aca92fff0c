"""Per-token log-probabilities (and entropies) straight from hidden states, without an [N, V] tensor.

    z = softcap(logit_scale * hidden @ weight.T + bias) / temperature
    logprobs = torch.log_softmax(z.float(), -1).gather(-1, targets[..., None]).squeeze(-1)
    entropy = torch.distributions.Categorical(logits=z.float()).entropy()

Products run over chunks of rows that fit `max_buffer_bytes`; a logit is never rounded to 16 bits before the softmax,
and every statistic is float32 (float64 for float64 inputs). Cost in U = 2 N H V flops, and what is saved:

    no gradient       1U            nothing
    frozen weight     2U            u = dlogp/dhidden, [N, H] in hidden's dtype, in place of the hidden states;
                      (+1U with     du = dentropy/dhidden likewise
                      entropy)
    trainable weight  1U + 3U f     the inputs; f: fraction of tokens with a non-zero incoming gradient

The backward of a frozen head is one multiplication, since any loss of the log-probabilities reaches hidden_t through
the one scalar dL/dlogp_t:  u_t = dlogp_t/dhidden_t = (W[y_t] - sum_v p_tv W[v]) * logit_scale / temperature_t  (each
term times its 1 - tanh**2 under a softcap).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, overload

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from grpo_kernels._checks import IGNORE_INDEX, require
from grpo_kernels._fp8_scoring import fp8_head
from grpo_kernels._head_arguments import make_pass
from grpo_kernels._passes import KnownRows, Pass, Scores, partition
from grpo_kernels.support import Support


@overload
def linear_logprob(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, bias: Tensor | None = ..., temperature: float | Tensor = ...,
    logit_scale: float = ..., softcap: float | None = ..., support: Support | None = ...,
    return_entropy: Literal[False] = ...,
    rows: Tensor | Literal["all"] | None = ..., max_buffer_bytes: int | None = ...,
    process_group: ProcessGroup | None = ..., backend: str = ..., precision: Literal["fp8"] | None = ...,
) -> Tensor: ...  # fmt: skip
@overload
def linear_logprob(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, bias: Tensor | None = ..., temperature: float | Tensor = ...,
    logit_scale: float = ..., softcap: float | None = ..., support: Support | None = ...,
    return_entropy: Literal[True],
    rows: Tensor | Literal["all"] | None = ..., max_buffer_bytes: int | None = ...,
    process_group: ProcessGroup | None = ..., backend: str = ..., precision: Literal["fp8"] | None = ...,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@overload
def linear_logprob(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, bias: Tensor | None = ..., temperature: float | Tensor = ...,
    logit_scale: float = ..., softcap: float | None = ..., support: Support | None = ...,
    return_entropy: bool,
    rows: Tensor | Literal["all"] | None = ..., max_buffer_bytes: int | None = ...,
    process_group: ProcessGroup | None = ..., backend: str = ..., precision: Literal["fp8"] | None = ...,
) -> Tensor | tuple[Tensor, Tensor]: ...  # fmt: skip
def linear_logprob(
    hidden: Tensor,  # [..., H]
    weight: Tensor,  # [V, H]
    targets: Tensor,  # [...]
    *,
    bias: Tensor | None = None,  # [V]
    temperature: float | Tensor = 1.0,  # [...]
    logit_scale: float = 1.0,
    softcap: float | None = None,
    support: Support | None = None,
    return_entropy: bool = False,
    rows: Tensor | Literal["all"] | None = None,  # [n]
    max_buffer_bytes: int | None = None,
    process_group: ProcessGroup | None = None,
    backend: str = "auto",
    precision: Literal["fp8"] | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-probabilities of `targets` under a linear head, and entropies on request: see the top of this module.

    Args:
        hidden: ``[..., H]`` floating point; any leading shape and strides.
        weight: ``[V, H]`` floating point, in any dtype; this rank's rows ``[V_local, H]`` with a process group.
        targets: ``[...]`` int64 or int32 ids in ``[0, V)``; ``-100`` gives log-probability and entropy 0, no
            gradient and no work.
        bias: ``[V]``; ``-inf`` excludes a token.
        temperature: float, or one value per token (``[...]``), above 0. Not differentiable.
        logit_scale: factor on the products, above 0 (Cohere, Granite).
        softcap: ``softcap * tanh(z / softcap)`` before the temperature (Gemma 2).
        support: the kept ids of each of the N targets, if they were drawn from a truncated distribution (top-p, top-k,
            min-p): a :class:`grpo_kernels.Support`, or a pair ``ids [K]``, ``offsets [N + 1]``, with ids of the whole
            vocabulary (not of a shard). The softmax, the entropy and all gradients are over these alone. Few ids cost
            K H multiplications instead of N V H. On a CPU a target outside of its support is refused; on a GPU, where a
            check would stall the stream, it has log-probability -inf and no gradient.
        return_entropy: also return entropies (nats).
        rows: the tokens to compute, if the caller knows them: ``"all"``, or ascending indices ``[n]`` int64 into the
            flattened targets. Every other token is treated as a target of ``-100``. On a GPU the host otherwise waits
            for their number, in the forward and in the backward. All of `rows` are multiplied, those with a target of
            ``-100`` or without an incoming gradient too, so their hidden states must be finite.
        max_buffer_bytes: budget for temporary memory beyond inputs, outputs and gradients (default: 256 MiB on a
            CPU; on a GPU 1 GiB, half of it with a frozen head, or a quarter of the free memory where that is more and
            there is no process group). At least one row of float32 logits is always held. On a GPU, autocast to 16
            bits adds a 16-bit copy of a float32 weight (see `weight_copies`).
        process_group: ranks that hold the vocabulary in shards, in rank order; hidden states and targets are the
            same on all of them, and so are the results and hidden's gradient. The shards' sizes are exchanged once
            for each weight, so ranks must replace a weight by another together.
        backend: ``"auto"`` (Triton on a supported GPU, else torch), ``"triton"``, ``"torch"`` or ``"reference"``.
        precision: ``"fp8"`` rounds hidden states and weight to float8_e4m3fn for the product, to check a sampler's
            scores at twice the rate; without gradients, on a GPU from sm_89 on (a CPU emulates it). Log-probabilities
            then have an error of about 4% of the standard deviation of a token's logits: 0.24 on average, and up to
            1.4, for SmolLM2-135M-Instruct, where bfloat16 operands cause 0.007. Importance ratios need ``None``.

    Returns:
        ``logprobs [...]`` or ``(logprobs, entropy)``, float32 (float64 for float64 inputs), differentiable in
        `hidden`, `weight` and `bias`.

    Raises:
        ValueError: shapes or devices do not fit, a target id is outside the vocabulary or its support (checked on CPU,
            and on a GPU with GRPO_KERNELS_DEBUG=1), an option is out of range or unknown, or `precision` is not
            possible here.
        TypeError: a tensor has the wrong dtype.
    """
    op = "linear_logprob"
    backend, call = make_pass(
        op, hidden, weight, targets, bias=bias, temperature=temperature, logit_scale=logit_scale, softcap=softcap,
        support=support, rows=rows, max_buffer_bytes=max_buffer_bytes, process_group=process_group,
        with_entropy=return_entropy, backend=backend,
    )  # fmt: skip
    require(precision in (None, "fp8"), f"{op}: precision must be 'fp8' or None, got {precision!r}")
    if precision == "fp8":
        # Its products come from cuBLAS, whose row kernel has no mask, and gathered ids would not be rounded.
        require(support is None, f"{op}: precision='fp8' is not possible with a support; leave one of them out")
        call = replace(call, head=fp8_head(op, call.head, call.needs, backend))
    if backend == "reference":
        require(process_group is None, f"{op}: backend='reference' does not support process_group")
        logprobs, entropy = linear_logprob_ref(call, weight, bias)
    else:
        logprobs, entropy = _LinearLogprob.apply(call.hidden, weight, bias, call)
    logprobs = logprobs.view(targets.shape)
    return (logprobs, entropy.view(targets.shape)) if return_entropy else logprobs


def linear_logprob_ref(call: Pass, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """The definition above with full logits, differentiated by autograd: what the tests compare with."""
    head, targets = call.head, call.targets
    logits = head.logit_scale * (call.hidden.to(head.dtype) @ weight.to(head.dtype).T)
    if bias is not None:
        logits = logits + bias.to(head.dtype)
    if head.softcap is not None:
        capped = head.softcap * torch.tanh(logits / head.softcap)
        logits = torch.where(logits == float("-inf"), float("-inf"), capped)
    if call.temperature is not None:
        logits = logits / call.temperature[:, None]
    outside = torch.zeros_like(targets, dtype=torch.bool)
    if call.support is not None:
        kept = call.support.mask(logits.shape[1])
        # A row without ids only keeps its softmax finite; its target is outside.
        logits = logits.masked_fill(~kept & kept.any(1, keepdim=True), float("-inf"))
        outside = ~kept.gather(1, targets.clamp(min=0)[:, None]).squeeze(1)
    valid = targets != IGNORE_INDEX
    log_p = torch.log_softmax(logits, -1)
    logprobs = log_p.gather(1, targets.clamp(min=0)[:, None]).squeeze(1)
    logprobs = torch.where(outside, float("-inf"), logprobs)
    finite = torch.where(log_p == float("-inf"), 0.0, log_p)
    entropy = -(log_p.exp() * finite).sum(-1)
    return torch.where(valid, logprobs, 0.0), torch.where(valid, entropy, 0.0)


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, call: Pass):
        ctx.set_materialize_grads(False)
        scores = Scores.zeros(call)
        ignored = call.targets == IGNORE_INDEX
        rows = partition(ignored.long(), 2)[0] if call.rows is None else call.rows
        ctx.head, ctx.needs, ctx.frozen, ctx.rows_given = call.head, call.needs, call.frozen, call.rows is not None
        ctx.kind, ctx.support = type(call), call.support
        ctx.dtypes = [None if leaf is None else leaf.dtype for leaf in (hidden, weight, bias)]
        with torch.autocast(hidden.device.type, enabled=False):
            if call.frozen and call.needs[0]:
                slopes = [torch.zeros_like(hidden) for _ in range(2 if call.with_entropy else 1)]
                call.prepared().slopes(rows, scores, slopes)
                ctx.save_for_backward(rows, ignored, *slopes)
            else:
                known = KnownRows.zeros(call) if any(call.needs) else None
                call.prepared().score(rows, scores, known)
                # The backward reads the head's weight and bias; since they are saved, torch refuses them if something
                # like an optimizer step changes them in place before.
                ctx.save_for_backward(
                    rows,
                    ignored,
                    None if known is None else known.planes,
                    call.hidden,
                    call.targets,
                    call.temperature,
                    call.head.weight,
                    call.head.bias,
                )
        if ctx.rows_given:
            scores.clear(ignored)
        return scores.logprobs, scores.entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_logprobs, grad_entropy):
        if grad_logprobs is None and grad_entropy is None:
            return (None,) * 4
        rows, ignored, *saved = ctx.saved_tensors
        # An ignored token's gradient may be NaN or infinite, and NaN * 0 is not 0.
        grad_logprobs, grad_entropy = (
            None if grad is None else grad.masked_fill(ignored, 0.0) for grad in (grad_logprobs, grad_entropy)
        )
        if ctx.frozen:
            return _from_slopes((grad_logprobs, grad_entropy), saved), *(None,) * 3
        planes, hidden, targets, temperature, *_ = saved
        coefficients = torch.zeros_like(grad_entropy) if grad_logprobs is None else grad_logprobs
        if not ctx.rows_given:
            active = coefficients[rows] != 0
            if grad_entropy is not None:
                active |= grad_entropy[rows] != 0
            rows = rows[active]
        with torch.autocast(hidden.device.type, enabled=False):
            inputs = ctx.head, hidden, targets, temperature, ctx.needs, grad_entropy is not None
            call = ctx.kind(*inputs, support=ctx.support).prepared()
            gradients = call.gradients(hidden.dtype, ctx.dtypes[1])
            gradients.recompute(call, rows, KnownRows(planes), coefficients, grad_entropy)
        grads = zip(gradients.collected(), ctx.dtypes, strict=True)
        return *(None if grad is None else grad.to(dtype) for grad, dtype in grads), None


def _from_slopes(
    upstreams: tuple[Tensor | None, ...],  # [N]
    slopes: list[Tensor],  # [N, H]
) -> Tensor:
    """The hidden states' gradient, ``sum(upstream * slope)``."""
    grad = torch.zeros_like(slopes[0])
    for upstream, slope in zip(upstreams, slopes, strict=False):
        if upstream is not None:
            grad = torch.addcmul(grad, upstream[:, None], slope)
    return grad.to(slopes[0].dtype)
