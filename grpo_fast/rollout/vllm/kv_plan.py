"""The memory of vLLM's KV cache, from the model's configuration and the lengths of sequences; and of its adapters."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from grpo_fast.config import GRPOConfig
from grpo_fast.errors import UserError

# Tokens that vLLM allocates together (a block or several).
BLOCK = {"cpu": 128, "cuda": 16}
# The ranks of adapters for which it allocates memory.
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


class KVPlan(NamedTuple):
    """The number of sequences that are sampled at once, and the bytes of their KV cache at full length."""

    sequences: int
    bytes: int


def kv_bytes_per_token(model_config: Any, dtype: torch.dtype) -> int:
    """Bytes of the keys and values of one token in all layers.

    ``2 * layers * key-value heads * head_dim * bytes``, or one compressed vector for each layer with multi-head latent
    attention (``kv_lora_rank``). Layers that `layer_types` does not call attention have a state of fixed size, which is
    not counted. Sliding windows count as full attention, which is an upper bound.
    """
    config = model_config.get_text_config()
    kinds = getattr(config, "layer_types", None) or ["attention"] * config.num_hidden_layers
    layers = sum(kind.endswith("attention") and "linear" not in kind for kind in kinds)
    if getattr(config, "kv_lora_rank", None):
        numbers = config.kv_lora_rank + config.qk_rope_head_dim
    else:
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        numbers = 2 * heads * (getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
    return layers * numbers * dtype.itemsize


def plan_kv_cache(bytes_per_token: int, tokens_each: int, sequences: int, available: int, block: int) -> KVPlan:
    """The cache of `sequences` sequences, or of as many as fit `available` bytes.

    Args:
        bytes_per_token: see `kv_bytes_per_token`.
        tokens_each: length of the longest prompt and completion together.
        sequences: the wanted number of sequences.
        available: bytes for the cache.
        block: number of tokens that are allocated together.

    Raises:
        UserError: not even one sequence fits.
    """
    # vLLM allocates one more block, which stays empty.
    block_bytes = bytes_per_token * block
    each = -(-tokens_each // block) * block_bytes
    fitting = min(sequences, (available - block_bytes) // each)
    if fitting < 1:
        raise UserError(
            f"vLLM has {max(available, 0) / 2**30:.2f} GiB for keys and values, but one sequence of {tokens_each} "
            f"tokens needs {(each + block_bytes) / 2**30:.2f} GiB; choose a smaller max_completion_length"
        )
    return KVPlan(fitting, fitting * each + block_bytes)


def sequences_at_once(config: GRPOConfig, length: int) -> int:
    """Completions of `length` tokens to sample at once: a generation batch, or what the token budget allows of it."""
    return max(1, min(config.generation_batch_size, config.max_tokens_per_generation_batch // length))


def plan_engine_cache(
    config: GRPOConfig, model_config: Any, dtype: torch.dtype, device: str, length: int, available: int
) -> KVPlan:
    """The KV cache of `sequences_at_once`, or of as many of them as fit `available` bytes; the others wait."""
    token = kv_bytes_per_token(model_config, dtype)
    return plan_kv_cache(token, length, sequences_at_once(config, length), available, BLOCK[device])


def padded_rank(rank: int) -> int:
    """The rank for which vLLM allocates memory."""
    return next(each for each in RANKS if each >= rank)
