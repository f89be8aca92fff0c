"""The shapes of models that people often train, so that a plan needs no network.

Sources: the ``config.json`` of each model on its hub, as litgpt's table of configurations repeats them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from grpo_fast.errors import import_extra


class Shape(NamedTuple):
    """A model's `model_type` in transformers, and the sizes that decide its memory.

    `tied` says that the output head is the embedding, and `positions` for how many tokens the model was configured.
    """

    model_type: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    positions: int
    tied: bool


QWEN2_SMALL, QWEN2_LARGE, QWEN3, LLAMA3 = 151_936, 152_064, 151_936, 128_256

SHAPES = {
    "HuggingFaceTB/SmolLM2-135M": Shape("llama", 30, 576, 1536, 9, 3, 64, 49_152, 8192, True),
    "HuggingFaceTB/SmolLM2-360M": Shape("llama", 32, 960, 2560, 15, 5, 64, 49_152, 8192, True),
    "HuggingFaceTB/SmolLM2-1.7B": Shape("llama", 24, 2048, 8192, 32, 32, 64, 49_152, 8192, True),
    "Qwen/Qwen2.5-0.5B": Shape("qwen2", 24, 896, 4864, 14, 2, 64, QWEN2_SMALL, 32_768, True),
    "Qwen/Qwen2.5-1.5B": Shape("qwen2", 28, 1536, 8960, 12, 2, 128, QWEN2_SMALL, 131_072, True),
    "Qwen/Qwen2.5-3B": Shape("qwen2", 36, 2048, 11_008, 16, 2, 128, QWEN2_SMALL, 32_768, True),
    "Qwen/Qwen2.5-7B": Shape("qwen2", 28, 3584, 18_944, 28, 4, 128, QWEN2_LARGE, 131_072, False),
    "Qwen/Qwen2.5-14B": Shape("qwen2", 48, 5120, 13_824, 40, 8, 128, QWEN2_LARGE, 131_072, False),
    "Qwen/Qwen2.5-32B": Shape("qwen2", 64, 5120, 27_648, 40, 8, 128, QWEN2_LARGE, 131_072, False),
    "Qwen/Qwen2.5-72B": Shape("qwen2", 80, 8192, 29_568, 64, 8, 128, QWEN2_LARGE, 131_072, False),
    "Qwen/Qwen2.5-Math-1.5B": Shape("qwen2", 28, 1536, 8960, 12, 2, 128, QWEN2_SMALL, 4096, True),
    "Qwen/Qwen2.5-Math-7B": Shape("qwen2", 28, 3584, 18_944, 28, 4, 128, QWEN2_LARGE, 4096, False),
    "Qwen/Qwen3-0.6B": Shape("qwen3", 28, 1024, 3072, 16, 8, 128, QWEN3, 40_960, True),
    "Qwen/Qwen3-1.7B": Shape("qwen3", 28, 2048, 6144, 16, 8, 128, QWEN3, 40_960, True),
    "Qwen/Qwen3-4B": Shape("qwen3", 36, 2560, 9728, 32, 8, 128, QWEN3, 40_960, True),
    "Qwen/Qwen3-8B": Shape("qwen3", 36, 4096, 12_288, 32, 8, 128, QWEN3, 40_960, False),
    "Qwen/Qwen3-14B": Shape("qwen3", 40, 5120, 17_408, 40, 8, 128, QWEN3, 40_960, False),
    "Qwen/Qwen3-32B": Shape("qwen3", 64, 5120, 25_600, 64, 8, 128, QWEN3, 40_960, False),
    "meta-llama/Llama-3.2-1B": Shape("llama", 16, 2048, 8192, 32, 8, 64, LLAMA3, 131_072, True),
    "meta-llama/Llama-3.2-3B": Shape("llama", 28, 3072, 8192, 24, 8, 128, LLAMA3, 131_072, True),
    "meta-llama/Llama-3.1-8B": Shape("llama", 32, 4096, 14_336, 32, 8, 128, LLAMA3, 131_072, False),
    "meta-llama/Llama-3.1-70B": Shape("llama", 80, 8192, 28_672, 64, 8, 128, LLAMA3, 131_072, False),
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": Shape(
        "qwen2", 28, 1536, 8960, 12, 2, 128, QWEN2_SMALL, 131_072, False
    ),
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B": Shape(
        "qwen2", 28, 3584, 18_944, 28, 4, 128, QWEN2_LARGE, 131_072, False
    ),
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-14B": Shape(
        "qwen2", 48, 5120, 13_824, 40, 8, 128, QWEN2_LARGE, 131_072, False
    ),
    "deepseek-ai/DeepSeek-R1-Distill-Llama-8B": Shape("llama", 32, 4096, 14_336, 32, 8, 128, LLAMA3, 131_072, False),
    "google/gemma-2-2b": Shape("gemma2", 26, 2304, 9216, 8, 4, 256, 256_000, 8192, True),
    "google/gemma-2-9b": Shape("gemma2", 42, 3584, 14_336, 16, 8, 256, 256_000, 8192, True),
    "google/gemma-3-1b-pt": Shape("gemma3_text", 26, 1152, 6912, 4, 1, 256, 262_144, 32_768, True),
    "microsoft/phi-4": Shape("phi3", 40, 5120, 17_920, 40, 10, 128, 100_352, 16_384, False),
    "microsoft/Phi-4-mini-instruct": Shape("phi3", 32, 3072, 8192, 24, 8, 128, 200_064, 131_072, True),
    "mistralai/Mistral-7B-v0.3": Shape("mistral", 32, 4096, 14_336, 32, 8, 128, 32_768, 32_768, False),
}
# Fields of transformers' configurations that differ from the defaults of the model type.
EXTRA = {
    "mistralai/Mistral-7B-v0.3": {"sliding_window": None},
    "google/gemma-3-1b-pt": {"sliding_window": 512},
    "microsoft/phi-4": {"sliding_window": None, "pad_token_id": 0},
    "microsoft/Phi-4-mini-instruct": {"sliding_window": None, "pad_token_id": 0},
}
# Fine-tuned models have the shape of the model that they were trained from.
ENDINGS = ("-Instruct-v0.3", "-Instruct-2507", "-Thinking-2507", "-Instruct", "-Base", "-it", "-pt")
SAME = {
    "mistralai/Mistral-7B-Instruct-v0.3": "mistralai/Mistral-7B-v0.3",
    "meta-llama/Llama-3.3-70B-Instruct": "meta-llama/Llama-3.1-70B",
    "meta-llama/Meta-Llama-3.1-8B-Instruct": "meta-llama/Llama-3.1-8B",
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-32B": "Qwen/Qwen2.5-32B",
    "deepseek-ai/DeepSeek-R1-Distill-Llama-70B": "meta-llama/Llama-3.1-70B",
    "google/gemma-3-1b-it": "google/gemma-3-1b-pt",
    "microsoft/Phi-4-reasoning": "microsoft/phi-4",
}


def known_shape(name: str) -> str | None:
    """The key of `SHAPES` for a model's hub name, with or without its owner; None for an unknown model.

    Instruction-tuned variants have the shape of their base model.
    """
    plain = SAME.get(name, name).removeprefix("unsloth/").lower()
    for ending in ("", *ENDINGS):
        for key in SHAPES:
            if plain.removesuffix(ending.lower()) in (key.lower(), key.rsplit("/", 1)[1].lower()):
                return key
    return None


def known_config(name: str, changes: dict[str, Any] | None = None) -> Any | None:
    """The transformers configuration of a model in `SHAPES`, in bfloat16, with `changes`; None for an unknown model."""
    key = known_shape(name)
    if key is None:
        return None
    shape = SHAPES[key]
    fields = {
        "num_hidden_layers": shape.layers,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "vocab_size": shape.vocab,
        "max_position_embeddings": shape.positions,
        "tie_word_embeddings": shape.tied,
        "dtype": "bfloat16",
    }
    fields |= EXTRA.get(key, {}) | (changes or {})
    return import_extra("transformers", "train").AutoConfig.for_model(shape.model_type, **fields)
