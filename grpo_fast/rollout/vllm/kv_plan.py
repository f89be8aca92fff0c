"""How much memory vLLM's keys and values need, from the model's configuration and the lengths."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from grpo_fast.errors import UserError


class KVPlan(NamedTuple):
    """Sequences that are sampled at once, and the bytes that their keys and values take when all reach full length."""

    sequences: int
    bytes: int


def kv_bytes_per_token(model_config: Any, dtype: torch.dtype) -> int:
    """Bytes of keys and values of one token, all layers together.

    ``2 * layers * key-value heads * head_dim * bytes``; with multi-head latent attention (``kv_lora_rank``), one
    compressed vector a layer. Layers that `layer_types` calls something else than attention keep a fixed state instead
    and are not counted. A sliding window counts as full attention, which is an upper bound.
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
    """As many of `sequences` at once as fit into `available` bytes, each with `tokens_each` tokens.

    Args:
        bytes_per_token: see `kv_bytes_per_token`.
        tokens_each: longest prompt and longest completion together.
        sequences: most that are wanted at once.
        available: bytes that may be taken.
        block: tokens that are allocated together.

    Raises:
        UserError: not even one sequence fits.
    """
    # One block more is never used: vLLM keeps it as an empty one.
    block_bytes = bytes_per_token * block
    each = -(-tokens_each // block) * block_bytes
    fitting = min(sequences, (available - block_bytes) // each)
    if fitting < 1:
        raise UserError(
            f"vLLM has {max(available, 0) / 2**30:.2f} GiB for keys and values, but one sequence of {tokens_each} "
            f"tokens takes {(each + block_bytes) / 2**30:.2f} GiB; take a smaller max_completion_length"
        )
    return KVPlan(fitting, fitting * each + block_bytes)
