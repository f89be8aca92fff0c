"""Print for how many token counts each kernel would be compiled again for one GPU.

Run as a separate process, where Triton's kernels are not interpreted: launches are recorded but not executed.
"""

import json
from collections import defaultdict

import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime import jit

from grpo_kernels import PolicyObjective, kl_estimate, linear_logprob, linear_policy_loss, masked_mean, policy_loss
from grpo_kernels.triton_kernels import launch, triton_head

BACKEND = make_backend(GPUTarget("cuda", 90, 32))
# kernel -> number of tokens -> the ways it is specialised
ways = defaultdict(lambda: defaultdict(set))
tokens_now = 0


def record(kernel, *args, grid, warmup, **kwargs):
    assert len(grid) == 1, "a grid of several dimensions has small limits"
    bind = jit.create_function_from_signature(kernel.signature, kernel.params, BACKEND)
    bound, specialization, _ = bind(*args, **kwargs)
    assert list(bound) == kernel.arg_names
    ways[kernel.__name__][tokens_now].add(str(specialization))


def batch(tokens: int) -> dict:
    lengths = torch.tensor([0, tokens // 3, tokens])
    return {
        "advantages": torch.randn(tokens),
        "weights": torch.ones(tokens),
        "old_logprobs": torch.randn(tokens),
        "cu_seqlens": lengths,
    }


def main():
    global tokens_now
    jit.JITFunction.run = record
    for module in (triton_head, launch):
        module.architecture_of = lambda device: "sm_90"
    for tokens in (1, 7, 16, 33, 64, 100, 257):
        tokens_now = tokens
        hidden = torch.randn(tokens, 64).bfloat16().requires_grad_()
        weight = torch.randn(264, 64).bfloat16().requires_grad_()
        targets = torch.randint(0, 264, (tokens,))
        # Chunks of a few rows, so that slices of the narrow tensors start anywhere.
        head = (hidden, weight, targets)
        options = {"backend": "triton", "max_buffer_bytes": 20_000, "temperature": torch.rand(tokens) + 0.5}
        linear_logprob(*head, **options).sum().backward()
        for level in ("token", "sequence"):
            objective = PolicyObjective(level=level, entropy_coef=0.1)
            linear_policy_loss(*head, objective=objective, **batch(tokens), **options).loss.backward()
        logprobs = torch.randn(tokens, requires_grad=True)
        for level in ("token", "sequence"):
            policy_loss(logprobs, objective=PolicyObjective(level=level), **batch(tokens), backend="triton")
        kl_estimate(logprobs, torch.randn(tokens), backend="triton").sum().backward()
        masked_mean(logprobs, torch.ones(tokens), backend="triton").backward()
    print(json.dumps({name: len(set(map(frozenset, found.values()))) - 1 for name, found in ways.items()}))


if __name__ == "__main__":
    main()
