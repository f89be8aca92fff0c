"""Models, engines and checks for tests with real vLLM on a CPU."""

from contextlib import contextmanager
from types import SimpleNamespace

import peft
import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from grpo_fast.config import GRPOConfig
from grpo_fast.errors import UserError
from grpo_fast.rollout import Sampling, build_rollout
from grpo_fast.rollout.probe import Probe

VOCAB = 259
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "initializer_range": 0.15,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
}
TOKENIZER = SimpleNamespace(eos_token_id=1)
# Longer than two blocks of vLLM's prefix cache, which have 128 tokens on a CPU.
LONG = [2 + i * i // 3 % 10 for i in range(300)]
PROMPTS = [LONG, [9, 8], [3, 4, 5], [11]]


def make_model(name="Llama", tied=True, **overrides):
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**{**SHAPE, **overrides}, tie_word_embeddings=tied)
    return AutoModelForCausalLM.from_config(config).float().eval()


def make_config(**fields):
    fields = {"num_generations": 4, "generation_batch_size": 16, "max_completion_length": 16, **fields}
    return GRPOConfig(
        model_name_or_path="random-llama", dataset_name="sort_digits", reward_funcs=["exact_answer"], use_vllm=True,
        **fields,
    )  # fmt: skip


def adapt(model, **fields):
    """A PeftModel around `model`, whose adapters change its distribution."""
    lora = {"r": 4, "lora_alpha": 16, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **fields}
    adapted = peft.get_peft_model(model, peft.LoraConfig(**lora))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return adapted


@contextmanager
def colocated(model, **fields):
    rollout = build_rollout(make_config(**fields), model, TOKENIZER, len(LONG))
    try:
        yield rollout
    finally:
        rollout.close()


@torch.no_grad()
def scored(model, prompt, token_ids, temperature=1.0):
    """The model's log-probabilities of a completion ``[n]``, from its full logits."""
    ids = torch.tensor([prompt + token_ids])
    logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].float() / temperature
    return logits.log_softmax(-1).gather(1, ids[0, len(prompt) :, None]).squeeze(1)


def largest_difference(model, responses, temperature=1.0):
    each = len(responses) // len(PROMPTS)
    return max(
        (scored(model, PROMPTS[i // each], r.token_ids, temperature) - torch.tensor(r.logprobs)).abs().max().item()
        for i, r in enumerate(responses)
    )


def optimizer_step(model):
    """One AdamW step on a fixed sequence."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.004)
    ids = torch.tensor([LONG[:64]])
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    model.zero_grad()


def check_sync(rollout, model):
    """Log-probabilities of engine and model agree after a sync, differ after a step, and agree after the next sync."""
    rollout.sync(model)
    sampling = Sampling(4, 16, temperature=0.7)
    assert largest_difference(model, rollout.generate(PROMPTS, sampling), 0.7) < 1e-5
    optimizer_step(model)
    assert largest_difference(model, rollout.generate(PROMPTS, sampling), 0.7) > 0.1
    rollout.sync(model)
    assert largest_difference(model, rollout.generate(PROMPTS, sampling), 0.7) < 1e-5


def check_stale(rollout, adapted, model, monkeypatch, method, *traps):
    """The probe refuses an engine that keeps old adapters, which each of `traps` does in place of `method`."""
    probe = Probe(LONG, len(LONG) + 16, 1.0, 1e-3)

    def check():
        return probe.check(rollout, lambda prompt, ids, _: scored(model, prompt, ids))

    rollout.sync(adapted)
    assert check() < 1e-5
    for trap in traps:
        optimizer_step(adapted)
        with monkeypatch.context() as patch:
            patch.setattr(rollout, method, trap)
            rollout.sync(adapted)
            with pytest.raises(UserError, match=r"does not have the trainer's weights.*differ by up to"):
                check()
        rollout.sync(adapted)
        assert check() < 1e-5


def check_traps(rollout, model, monkeypatch):
    """The probe refuses an engine that keeps old prefixes or an old tied head."""
    probe = Probe(LONG, len(LONG) + 16, 1.0, 1e-3)

    def check():
        return probe.check(rollout, lambda prompt, ids, _: scored(model, prompt, ids))

    rollout.sync(model)
    assert check() < 1e-5
    for step in ("_reset_prefix_cache", "_repack_head"):
        optimizer_step(model)
        with monkeypatch.context() as patch:
            patch.setattr(rollout, step, lambda: None)
            rollout.sync(model)
            with pytest.raises(UserError, match=r"does not have the trainer's weights.*differ by up to"):
                check()
        rollout.sync(model)
        assert check() < 1e-5
