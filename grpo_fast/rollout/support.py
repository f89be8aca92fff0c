"""The tokens that top_p, top_k and min_p keep, recorded while sampling, for the loss over these tokens alone."""

from __future__ import annotations

from torch import Tensor

from grpo_fast.config import GRPOConfig
from grpo_fast.errors import UserError

# The filters that cut the distribution, and the values that turn them off.
CUTS = {"top_p": 1.0, "top_k": 0, "min_p": None}


def kept_ids(scores: Tensor) -> list[Tensor]:
    """The ids ``[k]`` int32 on the CPU that each row of filtered ``scores [rows, vocab]`` keeps: those above -inf."""
    kept = scores > float("-inf")
    counts = kept.sum(1).tolist()
    return list(kept.nonzero()[:, 1].int().cpu().split(counts))


def check_support(config: GRPOConfig) -> None:
    """Refuse to train with filters that would make the ratio to the sampler wrong.

    vLLM normalises log-probabilities over the tokens that a filter keeps, the loss over the whole vocabulary unless
    `truncated_support` is set. Each token's ratio is therefore multiplied by the kept probability: at 0.95, the ratio
    of 1,000 tokens is 5e-23. Without the correction, and with transformers as the engine, the loss does not use the
    sampler's log-probabilities.

    Raises:
        UserError: `top_p`, `top_k` or `min_p` is set for a run whose loss corrects for vLLM's log-probabilities; or
            `truncated_support` is set without any of them, or with a filter that changes the kept tokens' logits.
    """
    cuts = {name: value for name, off in CUTS.items() if (value := getattr(config, name)) and value != off}
    if config.truncated_support:
        if not cuts:
            raise UserError("truncated_support=true needs top_p, top_k or min_p, which cut the sampled distribution")
        if "repetition_penalty" in (config.generation_kwargs or {}):
            raise UserError(
                "generation_kwargs: repetition_penalty is not possible with truncated_support, because it changes the "
                "logits of the kept tokens; leave one of them out"
            )
        return
    if not config.uses_sampling_logprobs:
        return
    # What compares the two, and the values that turn it off.
    uses = {"vllm_importance_sampling_correction": "false"} if config.corrects_sampler else {}
    masks = ("rollout_rs", "off_policy_mask_threshold")
    uses |= {name: "null" for name in masks if getattr(config, name) is not None}
    for name, value in cuts.items():
        off = CUTS[name]
        ways = ["set truncated_support=true, whose loss covers the same tokens"]
        if "truncated_support" in config.unused_fields:
            ways = []
        ways += [f"leave out {name} ({name}={'null' if off is None else off})"]
        ways += ["set " + " and ".join(f"{use}={unset}" for use, unset in uses.items())]
        raise UserError(
            f"{name}={value!r} is not allowed in training with use_vllm and {' and '.join(uses)}, because vLLM's "
            f"log-probabilities cover only the tokens that it keeps: {', or '.join(ways)}"
        )
