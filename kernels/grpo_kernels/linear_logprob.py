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

The frozen head's backward is one multiplication, since any loss of the log-probabilities reaches hidden_t through the
one scalar dL/dlogp_t:  u_t = dlogp_t/dhidden_t = (W[y_t] - sum_v p_tv W[v]) * logit_scale / temperature_t  (each
term times its 1 - tanh**2 under a softcap).
"""

from __future__ import annotations

import torch
from torch import Tensor

from grpo_kernels._backend import choose_backend
from grpo_kernels._checks import IGNORE_INDEX, accumulation_dtype, require
from grpo_kernels._head import local_targets
from grpo_kernels._head_arguments import make_head
from grpo_kernels._passes import Gradients, forward_rows, partition, recompute_gradients, row_chunks, score


def linear_logprob_ref(hidden, weight, targets, *, bias=None, temperature=1.0, logit_scale=1.0, softcap=None):
    """The definition above on flat ``[N, H]`` hidden states with full logits: the oracle of the tests."""
    dtype = accumulation_dtype(hidden, weight)
    logits = logit_scale * (hidden.to(dtype) @ weight.to(dtype).T)
    if bias is not None:
        logits = logits + bias.to(dtype)
    if softcap is not None:
        capped = softcap * torch.tanh(logits / softcap)
        logits = torch.where(logits == float("-inf"), float("-inf"), capped)
    logits = logits / (temperature[:, None] if isinstance(temperature, Tensor) else temperature)
    valid = targets != IGNORE_INDEX
    log_p = torch.log_softmax(logits, -1)
    logprobs = log_p.gather(1, targets.long().clamp(min=0)[:, None]).squeeze(1)
    finite = torch.where(log_p == float("-inf"), 0.0, log_p)
    entropy = -(log_p.exp() * finite).sum(-1)
    return torch.where(valid, logprobs, 0.0), torch.where(valid, entropy, 0.0)


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, temperature, head, with_entropy):
        ctx.set_materialize_grads(False)
        num_tokens = hidden.shape[0]
        logprobs = torch.zeros(num_tokens, dtype=head.dtype, device=hidden.device)
        entropy = torch.zeros_like(logprobs) if with_entropy else None
        rows, _ = partition((targets == IGNORE_INDEX).long(), 2)
        targets = local_targets(head, targets)
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        ctx.head, ctx.dtypes = head, (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        ctx.frozen = not (needs_weight or needs_bias)
        weight, bias = head.weight, head.bias
        with torch.autocast(hidden.device.type, enabled=False):
            head = head.prepared()
            if ctx.frozen and needs_hidden:
                slopes = _frozen_slopes(head, hidden, targets, temperature, rows, logprobs, entropy)
                ctx.save_for_backward(rows, *slopes)
            else:
                score(head, hidden, targets, temperature, rows, logprobs, entropy)
                # The backward reads the head's own weight and bias; saving them makes torch refuse one that was
                # changed in place meanwhile, as by an optimizer step.
                ctx.save_for_backward(rows, hidden, targets, temperature, weight, bias)
        return logprobs, entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_logprobs, grad_entropy):
        if grad_logprobs is None and grad_entropy is None:
            return (None,) * 7
        rows, *saved = ctx.saved_tensors
        if ctx.frozen:
            return _from_slopes(rows, (grad_logprobs, grad_entropy), saved), *(None,) * 6
        hidden, targets, temperature, *_ = saved
        coefficients = torch.zeros_like(grad_entropy) if grad_logprobs is None else grad_logprobs
        moving = coefficients[rows] != 0
        if grad_entropy is not None:
            moving |= grad_entropy[rows] != 0
        gradients = Gradients(ctx.head, hidden, ctx.needs_input_grad[:3])
        with torch.autocast(hidden.device.type, enabled=False):
            recompute_gradients(
                ctx.head.prepared(), hidden, targets, temperature, rows[moving], coefficients, grad_entropy, gradients
            )
        grads = zip(gradients.collected(), ctx.dtypes, strict=True)
        cast = (None if grad is None else grad.to(dtype) for grad, dtype in grads)
        return *cast, *(None,) * 4


def _from_slopes(rows, upstreams, slopes):
    """The hidden states' gradient, ``sum(upstream * slope)``. Of the upstreams (or None) only `rows` are read."""
    grad = torch.zeros_like(slopes[0])
    for upstream, slope in zip(upstreams, slopes, strict=False):
        if upstream is not None:
            # An ignored token's upstream may be NaN or infinite, and NaN * 0 is not 0.
            coefficients = torch.zeros_like(upstream).index_copy_(0, rows, upstream[rows])
            grad = torch.addcmul(grad, coefficients[:, None], slope)
    return grad.to(slopes[0].dtype)


def _frozen_slopes(head, hidden, targets, temperature, rows, logprobs, entropy):
    """2U (3U with entropy): fill the outputs, return dlogp/dhidden and dentropy/dhidden, ``[N, H]`` each."""
    slopes = [torch.zeros_like(hidden) for _ in range(1 if entropy is None else 2)]
    # The entropy's slope is made in a copy of e.
    buffer = head.buffer(rows.numel(), copies=len(slopes))
    copy = None if entropy is None else torch.empty_like(buffer)
    for at in row_chunks(rows, targets.numel(), buffer.shape[0]):
        _, e, stats, row_temperature = forward_rows(head, hidden, targets, temperature, at, buffer, entropy is not None)
        logprobs[at] = stats.logprobs
        if entropy is not None:
            entropy[at] = stats.entropy
            one, zero = torch.ones_like(stats.total), torch.zeros_like(stats.total)
            d = copy[: e.shape[0]].copy_(e)
            d, row_scale = head.gradient_(d, stats, targets[at], row_temperature, zero, one)
            slopes[1][at] = head.grad_hidden(d, row_scale).to(hidden.dtype)
        d, row_scale = head.gradient_(e, stats, targets[at], row_temperature, None)
        slopes[0][at] = head.grad_hidden(d, row_scale).to(hidden.dtype)
    return slopes


def _linear_logprob_torch(hidden, weight, bias, targets, temperature, head, with_entropy):
    if not torch.is_grad_enabled():
        hidden, weight, bias = hidden.detach(), weight.detach(), None if bias is None else bias.detach()
    return _LinearLogprob.apply(hidden, weight, bias, targets, temperature, head, with_entropy)


def _linear_logprob_triton(hidden, weight, bias, targets, temperature, head, with_entropy):
    from grpo_kernels.triton_kernels.triton_head import TritonHead

    return _linear_logprob_torch(hidden, weight, bias, targets, temperature, TritonHead(**vars(head)), with_entropy)


def _linear_logprob_reference(hidden, weight, bias, targets, temperature, head, with_entropy):
    require(head.process_group is None, "linear_logprob: backend='reference' has no process_group")
    logprobs, entropy = linear_logprob_ref(
        hidden, weight, targets, bias=bias, temperature=1.0 if temperature is None else temperature,
        logit_scale=head.logit_scale, softcap=head.softcap,
    )  # fmt: skip
    return logprobs, entropy if with_entropy else None


_IMPLEMENTATIONS = {
    "triton": _linear_logprob_triton,
    "torch": _linear_logprob_torch,
    "reference": _linear_logprob_reference,
}


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    return_entropy: bool = False,
    max_buffer_bytes: int | None = None,
    process_group: torch.distributed.ProcessGroup | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-probabilities of `targets` under a linear head, and entropies on demand: see the top of this module.

    Args:
        hidden: ``[..., H]`` floating point; any leading shape and strides.
        weight: ``[V, H]`` floating point, in any dtype; this rank's rows ``[V_local, H]`` with a process group.
        targets: ``[...]`` int64 or int32 ids in ``[0, V)``; ``-100`` gives log-probability and entropy 0, no
            gradient and no work.
        bias: ``[V]``; ``-inf`` excludes a token.
        temperature: float, or one value per token (``[...]``), above 0. Not differentiable.
        logit_scale: factor on the products, above 0 (Cohere, Granite).
        softcap: ``softcap * tanh(z / softcap)`` before the temperature (Gemma 2).
        return_entropy: also return entropies (nats).
        max_buffer_bytes: budget for temporary memory beyond inputs, outputs and gradients (default: 256 MiB on a
            CPU; on a GPU 1 GiB, half of it with a frozen head). At least one row of float32 logits is always held.
        process_group: ranks that hold the vocabulary in shards, in rank order; hidden states and targets are the
            same on all of them, and so are the results and hidden's gradient.
        backend: ``"auto"`` (Triton on a supported GPU, else torch), ``"triton"``, ``"torch"`` or ``"reference"``.

    Returns:
        ``logprobs [...]`` or ``(logprobs, entropy)``, float32 (float64 for float64 inputs), differentiable in
        `hidden`, `weight` and `bias`.

    Raises:
        ValueError: shapes or devices do not fit, a target id is outside the vocabulary (checked on CPU, and on a GPU
            with GRPO_KERNELS_DEBUG=1), or an option is out of range or unknown.
        TypeError: a tensor has the wrong dtype.
    """
    op = "linear_logprob"
    head, temperatures = make_head(
        op, hidden, weight, targets, bias=bias, temperature=temperature, logit_scale=logit_scale, softcap=softcap,
        max_buffer_bytes=max_buffer_bytes, process_group=process_group,
    )  # fmt: skip
    run = choose_backend(op, _IMPLEMENTATIONS, backend, hidden.device, head.dtype)
    flat = hidden.reshape(-1, hidden.shape[-1])
    logprobs, entropy = run(flat, weight, bias, targets.reshape(-1), temperatures, head, return_entropy)
    logprobs = logprobs.view(targets.shape)
    return (logprobs, entropy.view(targets.shape)) if return_entropy else logprobs
