"""Sampling completions: one small interface (`base.Rollout`), with one module for each engine."""

from typing import Any

from torch import nn

from grpo_fast.config import GRPOConfig
from grpo_fast.errors import require_extra
from grpo_fast.rollout.base import Response, Rollout, Sampling
from grpo_fast.rollout.support import check_support
from grpo_fast.rollout.transformers import TransformersRollout


def check_engine(config: GRPOConfig) -> None:
    """Refuse an engine that is not installed, or a server without the key that it needs, before a model is loaded.

    Raises:
        UserError: it says how to install the engine, or how to set the key.
    """
    if config.use_vllm and config.vllm_mode == "colocate":
        require_extra("vllm", "vllm")
    elif config.use_vllm:
        from grpo_fast.rollout.vllm.common import server_client

        server_client(config)


def build_rollout(config: GRPOConfig, model: nn.Module, tokenizer: Any, longest_prompt: int) -> Rollout:
    """Start the engine that `config` names: transformers, vLLM in this process, or a vLLM server.

    Args:
        model: a transformers causal LM, on its device.
        tokenizer: its tokenizer, with a padding token.
        longest_prompt: length of the longest prompt, in tokens.

    Raises:
        UserError: the engine cannot be started or reached, or cannot sample from this model.
    """
    if not config.use_vllm:
        budget = config.max_tokens_per_generation_batch
        return TransformersRollout(model, tokenizer, budget, config.speculative_tokens)
    if config.vllm_mode == "server":
        from grpo_fast.rollout.vllm.server import VLLMServer

        return VLLMServer(config, model, tokenizer, longest_prompt)
    from grpo_fast.rollout.vllm.colocate import VLLMColocate

    return VLLMColocate(config, model, tokenizer, longest_prompt)


__all__ = [
    "Response",
    "Rollout",
    "Sampling",
    "TransformersRollout",
    "build_rollout",
    "check_engine",
    "check_support",
]
