"""Arguments of `policy_loss`, and a run of it."""

from __future__ import annotations

import torch

from grpo_kernels import policy_loss, token_weights

LENGTHS = [3, 1, 8, 0, 5, 1, 2]


def make(lengths=LENGTHS, dtype=torch.float32, spread=0.3, **extra):
    """A packed batch whose ratios fall inside and outside of the clip bounds, with both signs of advantages."""
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    n = int(cu_seqlens[-1])
    old = torch.randn(n, dtype=dtype) - 2
    mask = torch.ones(n, dtype=torch.bool)
    mask[4:6] = False
    return {
        "logprobs": (old + spread * torch.randn(n, dtype=dtype)).requires_grad_(),
        "advantages": torch.randn(n, dtype=dtype),
        "weights": token_weights(mask[:n], "sequence_mean", cu_seqlens=cu_seqlens).to(dtype),
        "old_logprobs": old,
        "ref_logprobs": old + 0.5 * torch.randn(n, dtype=dtype),
        "entropy": (torch.rand(n, dtype=dtype) * 3).requires_grad_(),
        "cu_seqlens": cu_seqlens,
        **extra,
    }


def runner(objective):
    def run(arguments, **options):
        result = policy_loss(objective=objective, **arguments, **options)
        (result.loss * 1.7).backward()
        entropy = arguments.get("entropy")
        gradients = {"d logprobs": arguments["logprobs"].grad, "d entropy": None if entropy is None else entropy.grad}
        return {"loss": result.loss, **gradients, **{name: value.float() for name, value in result.stats.items()}}

    return run
