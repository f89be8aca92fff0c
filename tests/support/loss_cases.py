"""Arguments of `linear_policy_loss`."""

from __future__ import annotations

import torch

from grpo_kernels import linear_logprob, token_weights

H, V = 17, 259
LEAVES = ("hidden", "weight", "bias")
LENGTHS = [3, 1, 8, 0, 5, 1, 15]


def make(lengths=LENGTHS, dtype=torch.float32, trainable="hw", vocab=V, width=H, **extra):
    """A packed batch with a masked stretch, ignored targets and old log-probabilities near the present ones."""
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    n = int(cu_seqlens[-1])
    targets = torch.randint(0, vocab, (n,))
    targets[1:2] = -100
    hidden = torch.randn(n, width).to(dtype)
    weight = (torch.randn(vocab, width) / width**0.5).to(dtype)
    mask = torch.ones(n, dtype=torch.bool)
    mask[4:6] = False
    exact = linear_logprob(hidden.double(), weight.double(), targets)
    arguments = {
        "hidden": hidden,
        "weight": weight,
        "targets": targets,
        "advantages": torch.randn(n),
        "weights": token_weights(mask, "sequence_mean", cu_seqlens=cu_seqlens),
        "old_logprobs": (exact + 0.3 * torch.randn(n)).float(),
        "ref_logprobs": (exact + 0.5 * torch.randn(n)).float(),
        "cu_seqlens": cu_seqlens,
        **extra,
    }
    for leaf in LEAVES:
        if leaf[0] in trainable and leaf in arguments:
            arguments[leaf] = arguments[leaf].detach().requires_grad_()
    return arguments
