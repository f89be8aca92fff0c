"""Small models and completions for the trainer's tests."""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from grpo_fast.model.loading import digit_tokenizer
from grpo_fast.model.packing import Sample

VOCAB = 41
SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,  # far from uniform, so that a wrong mask or position shows
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
}


def tiny_model(dtype=torch.float64, config_class=LlamaConfig, **overrides):
    """A model with random weights. The default one has no float32 step, so float64 gradients can be compared."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_class(**{**SMALL, **overrides})).to(dtype).eval()
    if config_class is LlamaConfig:
        # transformers' norm computes in float32 whatever the dtype.
        for name, _ in list(model.named_modules()):
            if name.endswith("layernorm") or name == "model.norm":
                norm = torch.nn.RMSNorm(model.config.hidden_size, model.config.rms_norm_eps, dtype=dtype)
                model.set_submodule(name, norm)
    return model


def random_samples(groups=4, per_group=4, longest=9, seed=0) -> list[Sample]:
    """Completions of unequal length, 1 to `longest` tokens, to prompts of unequal length."""
    generator = torch.Generator().manual_seed(seed)

    def ids(low, high):
        length = int(torch.randint(low, high + 1, (), generator=generator))
        return torch.randint(2, VOCAB, (length,), generator=generator).tolist()

    samples = []
    for group in range(groups):
        prompt = ids(1, 7)
        samples += [Sample(prompt, ids(1, longest), group) for _ in range(per_group)]
    return samples


def digit_llama():
    """A small Llama in float32 for the tokenizer of digits."""
    tokenizer = digit_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=1024, eos_token_id=tokenizer.eos_token_id, bos_token_id=None,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(config)
