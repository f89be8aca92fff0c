"""Real vLLM on a CPU, in process: `make test-vllm`."""

import os
import re

import pytest
import torch
import transformers
from safetensors.torch import save_file

from grpo_fast.errors import UserError
from grpo_fast.rollout import Sampling, build_rollout
from grpo_fast.rollout.vllm import adapters, shared
from support.vllm_models import (
    PROMPTS,
    SHAPE,
    TOKENIZER,
    VOCAB,
    adapt,
    check_stale,
    check_sync,
    check_traps,
    colocated,
    largest_difference,
    make_config,
    make_model,
)

pytestmark = pytest.mark.vllm

ARCHITECTURES = [(name, tied) for name in ("Llama", "Qwen2", "Qwen3") for tied in (True, False)]


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Replaces the global fixture: vLLM reads memory that it never wrote, and masks the result."""


@pytest.mark.parametrize(("name", "tied"), ARCHITECTURES)
def test_colocate_logprobs_equal_the_trainer(name, tied):
    model = make_model(name, tied)
    with colocated(model) as rollout:
        check_sync(rollout, model)


@pytest.fixture(scope="module")
def llama():
    """One engine for tests that do not change it."""
    model = make_model()
    with colocated(model) as rollout:
        rollout.sync(model)
        yield rollout, model


def test_colocate_probe_detects_old_prefixes_and_an_old_head(llama, monkeypatch):
    rollout, model = llama
    check_traps(rollout, model, monkeypatch)


def test_colocate_logprobs_include_filters(llama):
    """Each filter, compared with the one of transformers."""
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


def test_colocate_completions_end_at_the_end_token(llama):
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


def test_colocate_samples_depend_only_on_the_seed_of_torch(llama):
    """A resumed run samples the same, and the engine draws only its seed from the generator."""
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


def test_colocate_samples_follow_the_distribution_of_the_model(llama):
    rollout, model = llama
    draws = 4000
    prompt = PROMPTS[2]
    first = torch.tensor([r.token_ids[0] for r in rollout.generate([prompt], Sampling(draws, 1, temperature=0.8))])
    with torch.no_grad():
        p = (model(input_ids=torch.tensor([prompt])).logits[0, -1] / 0.8).softmax(-1)
    counts = torch.bincount(first, minlength=VOCAB)
    likely = p * draws >= 5
    chi_square = ((counts - p * draws) ** 2 / (p * draws))[likely].sum().item()
    # The statistic has mean k and standard deviation sqrt(2 k); allow six standard deviations.
    assert chi_square < likely.sum() + 6 * (2 * likely.sum()) ** 0.5


def test_colocate_greedy_takes_the_most_likely_token(llama):
    rollout, model = llama
    (response,) = rollout.generate([PROMPTS[2]], Sampling(1, 8, temperature=0.0))
    ids = torch.tensor([PROMPTS[2] + response.token_ids])
    with torch.no_grad():
        likeliest = model(input_ids=ids).logits[0].argmax(-1)
    assert response.token_ids == likeliest[len(PROMPTS[2]) - 1 : -1].tolist()


def test_colocate_check_refuses_unsupported_filters(llama):
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


def test_colocate_restores_the_process(llama):
    """vLLM replaces `torch.set_num_threads` and preloads libraries into subprocesses."""
    assert "skip" not in torch.set_num_threads.__name__
    assert "tcmalloc" not in os.environ.get("LD_PRELOAD", "")
    assert torch.get_default_dtype() == torch.float32


@pytest.fixture(scope="module")
def tuned():
    """An engine with adapters alone, for tests that may train them."""
    model = make_model("Qwen2", tied=False)
    adapted = adapt(model, use_rslora=True, rank_pattern={"q_proj": 7})
    with colocated(model) as rollout:
        yield rollout, adapted, model


def test_colocate_takes_adapters_alone(tuned, monkeypatch):
    """Each sync sends the adapters, which it does not change, and nothing else."""
    rollout, adapted, model = tuned
    assert rollout.warning == ""
    kept = {name: parameter.clone() for name, parameter in adapted.named_parameters()}
    monkeypatch.setattr(rollout, "_load_weights", None)
    rollout.sync(adapted)
    assert largest_difference(model, rollout.generate(PROMPTS, Sampling(4, 16))) < 1e-5
    assert all(torch.equal(parameter, kept[name]) for name, parameter in adapted.named_parameters())
    with adapted.disable_adapter():
        assert largest_difference(model, rollout.generate(PROMPTS, Sampling(4, 16))) > 0.1
    check_sync(rollout, adapted)
    assert rollout.llm.llm_engine.list_loras() == {rollout.syncs}


def test_colocate_probe_detects_stale_adapters(tuned, monkeypatch):
    """Nothing is sent, or new adapters have the name of old ones, which vLLM then keeps."""
    rollout, adapted, model = tuned
    load = rollout._load_adapter

    def same_name(model):
        rollout.syncs -= 1
        load(model)

    check_stale(rollout, adapted, model, monkeypatch, "_load_adapter", lambda model: None, same_name)


def test_colocate_refuses_completions_of_other_adapters(tuned):
    rollout, adapted, _ = tuned
    rollout.sync(adapted)
    generate = rollout.llm.generate
    rollout.llm.generate = lambda *arguments, lora_request, **options: generate(*arguments, **options)
    try:
        with pytest.raises(UserError, match=r"vLLM sampled with adapters None, not with version \d+ of"):
            rollout.generate(PROMPTS, Sampling(1, 2))
    finally:
        rollout.llm.generate = generate


@pytest.mark.parametrize(("name", "tied"), ARCHITECTURES)
def test_colocate_has_the_weights_once(name, tied):
    """The trainer's weights are vLLM's memory, fused layers included, before and after training and syncs."""
    model = make_model(name, tied)
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    adapted = adapt(model, target_modules=["q_proj", "v_proj", "down_proj"])
    with colocated(model) as rollout:
        (found,) = rollout.llm.apply_model(lambda engine: list(engine.named_parameters()))
        theirs = {name.replace(".base_layer", ""): weight for name, weight in found}
        check_sync(rollout, adapted)
        own = dict(shared.frozen(model))
        assert own.keys() == before.keys()
        held = {weight.untyped_storage().data_ptr() for weight in theirs.values()}
        for key, weight in own.items():
            assert torch.equal(weight, before[key])
            assert weight.untyped_storage().data_ptr() in held
            if key in theirs:
                assert weight.data_ptr() == theirs[key].data_ptr()
        layer = "model.layers.1."
        for block, fused, parts in (("self_attn", "qkv_proj", "qkv"), ("mlp", "gate_up_proj", ("gate", "up"))):
            start = theirs[f"{layer}{block}.{fused}.weight"].data_ptr()
            for part in parts:
                weight = own[f"{layer}{block}.{part}_proj.weight"]
                assert weight.data_ptr() == start
                start += weight.nbytes
        # Nothing else of vLLM's model is as large as a weight.
        numbers = sum(weight.numel() for weight in theirs.values())
        padding = (numbers - sum(map(torch.Tensor.numel, own.values()))) / SHAPE["hidden_size"]
        assert padding == (1 if tied else 2) * (320 - VOCAB)


def test_colocate_merges_adapters_that_vllm_cannot_take(monkeypatch):
    """It says why: biases are trained as well, or vLLM refuses the adapters. The trainer keeps its own weights."""

    def unknown_layer(model, folder, write=adapters.write_adapter):
        checksum = write(model, folder)
        (folder / adapters.TENSORS).unlink()
        save_file({"base_model.model.model.layers.0.self_attn.other.lora_A.weight": torch.ones(4, 64)},
                  folder / adapters.TENSORS)  # fmt: skip
        return checksum

    for bias, patched, reason in (
        ("all", adapters.write_adapter, r"because model\.layers\.0\.self_attn\.q_proj\.\S*bias is trained besides the"),
        ("none", unknown_layer, r"because vLLM refuses the adapters \(.*target modules in .*other"),
    ):
        model = make_model("Qwen2")
        adapted = adapt(model, bias=bias)
        own = {weight.data_ptr() for _, weight in shared.frozen(model)}
        monkeypatch.setattr(adapters, "write_adapter", patched)
        with colocated(model) as rollout:
            assert re.search(reason, rollout.warning)
            check_sync(rollout, adapted)
        assert {weight.data_ptr() for _, weight in shared.frozen(model)} == own


def test_colocate_refuses_an_unsupported_model():
    with pytest.raises(UserError, match=r"^vLLM cannot sample from LlamaForCausalLM: .*head_dim=16"):
        build_rollout(make_config(), make_model(head_dim=16), TOKENIZER, 20)
    # Another engine can be started afterwards.
    with colocated(make_model()) as rollout:
        rollout.check([5], Sampling(1, 1))


def test_colocate_refuses_truncated_support_without_the_model_runner_that_returns_kept_ids():
    """On a CPU; another engine can be started afterwards."""
    with pytest.raises(UserError, match=r"^truncated_support is not possible with vLLM here: .*model runner V2"):
        build_rollout(make_config(truncated_support=True, top_p=0.9), make_model(), TOKENIZER, 20)
    with colocated(make_model()) as rollout:
        rollout.check([5], Sampling(1, 1))
