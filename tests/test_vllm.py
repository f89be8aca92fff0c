"""Real vLLM on a CPU, in process and as a server: `make test-vllm`."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
import transformers
import yaml
from transformers import AutoModelForCausalLM

from grpo_fast.config import GRPOConfig
from grpo_fast.errors import UserError
from grpo_fast.rollout import Sampling, build_rollout
from grpo_fast.rollout.probe import Probe

pytestmark = pytest.mark.vllm

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
# Whole blocks of vLLM's prefix cache on a CPU are 128 tokens.
LONG = [2 + i * i % 251 for i in range(300)]
PROMPTS = [LONG, [9, 8], [3, 4, 5], [200]]
ARCHITECTURES = [(name, tied) for name in ("Llama", "Qwen2", "Qwen3") for tied in (True, False)]


@pytest.fixture(autouse=True)
def poisoned_memory():
    """vLLM reads memory that it never wrote, and masks the result."""


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
    """One step of AdamW on some sequence."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    ids = torch.tensor([LONG[:64]])
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    model.zero_grad()


def check_sync(rollout, model):
    """The sampler's log-probabilities are the trainer's; after a step they are not; after a sync they are again."""
    rollout.sync(model)
    sampling = Sampling(4, 16, temperature=0.7)
    assert largest_difference(model, rollout.generate(PROMPTS, sampling), 0.7) < 1e-5
    optimizer_step(model)
    assert largest_difference(model, rollout.generate(PROMPTS, sampling), 0.7) > 0.1
    rollout.sync(model)
    assert largest_difference(model, rollout.generate(PROMPTS, sampling), 0.7) < 1e-5


def check_traps(rollout, model, monkeypatch):
    """The probe stops a run whose engine keeps old prefixes or, where it is tied, its old head."""
    probe = Probe(LONG, len(LONG) + 16, 1.0, 1e-3)

    def check():
        return probe.check(rollout, lambda prompt, ids: scored(model, prompt, ids))

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


@pytest.mark.parametrize(("name", "tied"), ARCHITECTURES)
def test_in_process_agrees_with_the_trainer(name, tied):
    model = make_model(name, tied)
    with colocated(model) as rollout:
        check_sync(rollout, model)


@pytest.fixture(scope="module")
def llama():
    """One engine for the tests that leave it as it was."""
    model = make_model()
    with colocated(model) as rollout:
        rollout.sync(model)
        yield rollout, model


def test_the_probe_sees_old_prefixes_and_an_old_head(llama, monkeypatch):
    rollout, model = llama
    check_traps(rollout, model, monkeypatch)


def test_filters_are_in_the_log_probabilities(llama):
    """Each of them beside transformers' own: tokens left out have no probability, the others share it."""
    rollout, model = llama
    filters = {
        "top_k": (5, transformers.TopKLogitsWarper(5)),
        "top_p": (0.8, transformers.TopPLogitsWarper(0.8)),
        "min_p": (0.1, transformers.MinPLogitsWarper(0.1)),
        "repetition_penalty": (1.3, transformers.RepetitionPenaltyLogitsProcessor(1.3)),
    }
    for name, (value, processor) in filters.items():
        arguments = {"generation_kwargs": {name: value}} if name == "repetition_penalty" else {name: value}
        for prompt in PROMPTS[:2]:
            for response in rollout.generate([prompt], Sampling(4, 6, **arguments)):
                ids = torch.tensor([prompt + response.token_ids])
                for place in range(len(prompt), ids.shape[1]):
                    with torch.no_grad():
                        logits = model(input_ids=ids[:, :place]).logits[:, -1]
                    expected = processor(ids[:, :place], logits).log_softmax(-1)[0, ids[0, place]].item()
                    assert response.logprobs[place - len(prompt)] == pytest.approx(expected, abs=1e-5), name


def test_completions_end_at_their_end_token(llama):
    rollout, _ = llama
    kept, rollout.eos_token_ids = rollout.eos_token_ids, set(range(1, 40))
    try:
        responses = rollout.generate(PROMPTS, Sampling(50, 6))
        late = rollout.generate(PROMPTS, Sampling(20, 6, generation_kwargs={"min_new_tokens": 3}))
    finally:
        rollout.eos_token_ids = kept
    ended = 0
    for response in responses:
        assert not set(response.token_ids[:-1]) & set(range(1, 40))
        assert len(response.logprobs) == len(response.token_ids)
        if response.finish_reason == "stop":
            ended += 1
            assert response.token_ids[-1] in range(1, 40)
        else:
            assert len(response.token_ids) == 6
            assert response.token_ids[-1] not in range(1, 40)
    assert 0 < ended < len(responses)
    assert min(len(r.token_ids) for r in responses) == 1
    assert min(len(r.token_ids) for r in late) >= 3


def test_torchs_seed_decides_what_is_sampled(llama):
    """And nothing else: a resumed run samples the same, and other users of the generator are not disturbed."""
    rollout, _ = llama
    torch.manual_seed(7)
    first = rollout.generate(PROMPTS, Sampling(4, 8))
    after = torch.rand(3)
    torch.manual_seed(7)
    assert rollout.generate(PROMPTS, Sampling(4, 8)) == first
    assert torch.equal(torch.rand(3), after)
    assert rollout.generate(PROMPTS, Sampling(4, 8)) != first
    assert len({tuple(r.token_ids) for r in first}) == len(first)
    own = Sampling(4, 8, seed=3)
    before = torch.get_rng_state()
    assert rollout.generate(PROMPTS, own) == rollout.generate(PROMPTS, own)
    assert torch.equal(torch.get_rng_state(), before)


def test_samples_follow_the_models_distribution(llama):
    rollout, model = llama
    draws = 4000
    prompt = PROMPTS[2]
    first = torch.tensor([r.token_ids[0] for r in rollout.generate([prompt], Sampling(draws, 1, temperature=0.8))])
    with torch.no_grad():
        p = (model(input_ids=torch.tensor([prompt])).logits[0, -1] / 0.8).softmax(-1)
    counts = torch.bincount(first, minlength=VOCAB)
    likely = p * draws >= 5
    chi_square = ((counts - p * draws) ** 2 / (p * draws))[likely].sum().item()
    # Mean k, standard deviation sqrt(2 k): six of them away would be a wrong distribution.
    assert chi_square < likely.sum() + 6 * (2 * likely.sum()) ** 0.5


def test_greedy_takes_the_likeliest_token(llama):
    rollout, model = llama
    (response,) = rollout.generate([PROMPTS[2]], Sampling(1, 8, temperature=0.0))
    ids = torch.tensor([PROMPTS[2] + response.token_ids])
    with torch.no_grad():
        likeliest = model(input_ids=ids).logits[0].argmax(-1)
    assert response.token_ids == likeliest[len(PROMPTS[2]) - 1 : -1].tolist()


def test_what_vllm_does_not_have_is_refused(llama):
    rollout, _ = llama
    for filters, message in (
        ({"typical_p": 0.5}, r"'typical_p' is not allowed with vLLM"),
        ({"repetition_penlty": 1.1}, r"did you mean 'repetition_penalty'"),
        ({"repetition_penalty": -1.0}, r"repetition_penalty=-1.0 is not allowed: it must be above 0"),
        ({"min_new_tokens": 9}, r"min_new_tokens=9 is not allowed: it must be from 0 to 8"),
    ):
        with pytest.raises(UserError, match=message):
            rollout.check([5], Sampling(2, 8, generation_kwargs=filters))
    state = torch.get_rng_state()
    rollout.check([5], Sampling(2, 8, top_p=0.5, top_k=3, generation_kwargs={"repetition_penalty": 1.1}))
    assert torch.equal(torch.get_rng_state(), state)


def test_the_process_stays_the_trainers(llama):
    """vLLM would forbid `torch.set_num_threads` and preload libraries into subprocesses."""
    assert "skip" not in torch.set_num_threads.__name__
    assert "tcmalloc" not in os.environ.get("LD_PRELOAD", "")
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize("rslora", [False, True])
def test_adapters_come_merged(rslora):
    """Also after a step that trains the adapters alone; the trained tensors stay as they are."""
    import peft

    model = make_model("Qwen2")
    lora = peft.LoraConfig(r=4, lora_alpha=16, use_rslora=rslora, target_modules="all-linear", task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(model, lora)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    kept = {name: parameter.clone() for name, parameter in adapted.named_parameters()}
    with colocated(model) as rollout:
        rollout.sync(adapted)
        assert largest_difference(model, rollout.generate(PROMPTS, Sampling(4, 16))) < 1e-5
        assert all(torch.equal(parameter, kept[name]) for name, parameter in adapted.named_parameters())
        with adapted.disable_adapter():
            assert largest_difference(model, rollout.generate(PROMPTS, Sampling(4, 16))) > 0.1
        check_sync(rollout, model)


def test_a_model_that_vllm_cannot_run_is_refused():
    with pytest.raises(UserError, match=r"vLLM cannot sample from LlamaForCausalLM: .*"):
        build_rollout(make_config(), make_model(head_dim=24), TOKENIZER, 20)
