"""Log-probabilities of samples, packed and one by one."""

from __future__ import annotations

import torch

from grpo_fast.model.attention import install
from grpo_fast.model.packing import build_microbatch, fill_microbatches, plan_rows, token_offsets

LAYOUTS = ("shared", "packed", "padded")


def plain_logprobs(model, samples):
    """Log-probabilities of each completion from the model's own logits, one sequence at a time."""
    result = []
    for prompt, completion, _ in samples:
        ids = torch.tensor([prompt + completion])
        logp = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        result.append(logp.gather(1, ids[0, 1:, None]).squeeze(1)[len(prompt) - 1 :])
    return torch.cat(result)


def packed_logprobs(policy, samples, max_tokens, layout):
    """Log-probabilities of all samples, from microbatches in one of the layouts."""
    offsets = token_offsets(samples)
    packed = layout != "padded"
    if packed:
        assert install(policy.model)
    out = torch.zeros(int(offsets[-1]), dtype=torch.float64)
    rows = plan_rows(samples, list(range(len(samples))), max_tokens if layout == "shared" else 0)
    for chosen in fill_microbatches(rows, max_tokens, packed):
        microbatch = build_microbatch(samples, chosen, offsets, 0, packed)
        assert microbatch.input_ids.numel() <= max_tokens
        assert (microbatch.segments is not None) == packed
        out = out.index_put((microbatch.tokens,), policy(microbatch))
    return out
