"""Arguments of `linear_logprob`, and its results with gradients."""

from __future__ import annotations

import torch

from grpo_kernels import linear_logprob

LEAVES = ("hidden", "weight", "bias")


def make(shape, H, V, dtype=torch.float32, *, weight_dtype=None, trainable="hw", scale=1.0, **extra):
    """Arguments of one call; `trainable` lists which of (h)idden, (w)eight and (b)ias require a gradient."""
    shape = shape if isinstance(shape, tuple) else (shape,)
    arguments = {
        "hidden": (torch.randn(*shape, H) * scale).to(dtype),
        "weight": (torch.randn(V, H) / H**0.5).to(weight_dtype or dtype),
        "targets": torch.randint(0, V, shape),
    }
    arguments.update(extra)
    for leaf in LEAVES:
        if leaf[0] in trainable and leaf in arguments:
            arguments[leaf].requires_grad_(True)
    return arguments


def run(arguments, *, entropy_in_loss=True, **options):
    """Outputs and gradients of a loss with a different coefficient for every output."""
    logprobs, entropy = linear_logprob(**arguments, return_entropy=True, **options)
    upstream = torch.linspace(-1, 1.3, logprobs.numel(), dtype=torch.float64).view(logprobs.shape).to(logprobs.dtype)
    loss = (logprobs * upstream)[logprobs.isfinite()].sum()
    if entropy_in_loss:
        loss = loss + (entropy * upstream.flip(0)).sum()
    if loss.requires_grad:
        loss.backward()
    leaves = {name: arguments[name].grad for name in LEAVES if isinstance(arguments.get(name), torch.Tensor)}
    return {"logprobs": logprobs, "entropy": entropy, **leaves}
