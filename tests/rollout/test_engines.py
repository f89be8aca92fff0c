"""Sampling with transformers models: continuous batching and padded batches."""

import inspect
import itertools

import pytest
import torch
from accelerate.state import AcceleratorState
from transformers import (
    Gemma2Config,
    Gemma3TextConfig,
    Lfm2Config,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
)

from grpo_fast.cli import main
from grpo_fast.errors import UserError
from grpo_fast.model.loading import digit_tokenizer
from grpo_fast.rollout import Sampling, TransformersRollout, decode
from grpo_fast.rollout.rows import cache_argument
from grpo_fast.rollout.transformers import not_continuous
from support.tiny import VOCAB, tiny_model

PROMPTS = [[5, 9, 11], [7], [3, 4, 5, 6, 7, 8], [5, 9, 12, 2]]
WINDOW = {"sliding_window": 5}
UNTIED = {"tie_word_embeddings": False}  # tied embeddings repeat the last token
LAYERS = ["sliding_attention", "full_attention"]
MODELS = {
    "llama": (LlamaConfig, {}),
    "qwen2": (Qwen2Config, {}),
    "qwen3": (Qwen3Config, {"head_dim": 8}),
    "mistral": (MistralConfig, WINDOW),
    "gemma2": (Gemma2Config, {"head_dim": 8, **UNTIED, **WINDOW}),
    "gemma3": (Gemma3TextConfig, {"head_dim": 8, "layer_types": LAYERS, **UNTIED, **WINDOW}),
}
# Their caches have other layers, or they have their own prepare_inputs_for_generation.
PADDED = {
    "phi3": (Phi3Config, {}),
    "lfm2": (Lfm2Config, {"layer_types": ["conv", "full_attention"], "block_multiple_of": 8}),
}


def rollout(max_tokens=100_000, config_class=LlamaConfig, **overrides):
    model = tiny_model(torch.float32, config_class, eos_token_id=None, **overrides)
    tokenizer = digit_tokenizer()  # only its special tokens are used
    return TransformersRollout(model, tokenizer, max_tokens), model


@pytest.fixture
def reserved(monkeypatch):
    """The arguments of every `reserve` call: rows, width, columns."""
    sizes = []
    reserve = decode.RowsCache.reserve

    def kept(self, rows, width, columns, *joining):
        sizes.append((rows, width, columns))
        reserve(self, rows, width, columns, *joining)

    monkeypatch.setattr(decode.RowsCache, "reserve", kept)
    return sizes


@pytest.fixture
def decoders(monkeypatch):
    """The decoders that were made."""
    made = []

    class Kept(decode.Decoder):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            made.append(self)

    monkeypatch.setattr("grpo_fast.rollout.transformers.Decoder", Kept)
    return made


def greedy(model, prompt, length, eos):
    ids = list(prompt)
    for _ in range(length):
        ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] in eos:
            break
    return ids[len(prompt) :]


@pytest.mark.parametrize("max_tokens", [100_000, 60, 1])
@pytest.mark.parametrize("num_generations", [1, 3])
def test_greedy_sampling_equals_one_sequence_at_a_time(max_tokens, num_generations):
    """Left padding, sorting by length, batching and sharing prompts do not change the result."""
    sampler, model = rollout(max_tokens)
    responses = sampler.generate(PROMPTS, Sampling(num_generations, 12, temperature=0.0))
    with torch.no_grad():
        expected = [greedy(model, prompt, 12, sampler.eos_token_ids) for prompt in PROMPTS]
    assert [r.token_ids for r in responses] == [tokens for tokens in expected for _ in range(num_generations)]


@pytest.mark.parametrize("max_tokens", [100_000, 60])
@pytest.mark.parametrize("name", [*MODELS, *PADDED])
def test_decoder_with_rows_that_join_and_leave(name, max_tokens, monkeypatch):
    """Rows finish, join, are evicted and computed again in parts; sliding layers drop columns."""
    for bound, value in {"GROWTH": 3, "LEAST_GROWTH": 2, "PREFILL_TOKENS": 7, "CHUNK_LOGITS": 2 * VOCAB}.items():
        monkeypatch.setattr(decode, bound, value)
    monkeypatch.setattr("grpo_fast.rollout.rows.SLACK", 2)
    config_class, overrides = {**MODELS, **PADDED}[name]
    sampler, model = rollout(max_tokens, config_class, **overrides)
    assert (not_continuous(model) is None) == (name in MODELS)
    sampler.eos_token_ids = set(range(20, 24))
    responses = sampler.generate(PROMPTS, Sampling(3, 24, temperature=0.0))
    with torch.no_grad():
        expected = [greedy(model, prompt, 24, sampler.eos_token_ids) for prompt in PROMPTS]
    assert len(set(map(len, expected))) > 2
    assert [r.token_ids for r in responses] == [tokens for tokens in expected for _ in range(3)]


def renamed(kind, name, own):
    """A model class whose forward names its cache argument `name` instead of `own`."""

    class Renamed(kind):
        def forward(self, input_ids=None, attention_mask=None, position_ids=None, use_cache=None, **named):
            if name in named:
                named[own] = named.pop(name)
            return super().forward(input_ids, attention_mask, position_ids, use_cache=use_cache, **named)

    arguments = inspect.signature(kind.forward).parameters.values()
    arguments = [argument.replace(name=name if argument.name == own else argument.name) for argument in arguments]
    Renamed.forward.__signature__ = inspect.Signature(arguments)
    return Renamed


@pytest.mark.filterwarnings("error:.*is deprecated:FutureWarning")
@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_transformers_rollout_with_either_name_of_the_cache(name, decoders):
    sampler, model = rollout()
    sampling = Sampling(3, 12, temperature=0.0)
    expected = sampler.generate(PROMPTS, sampling)
    for module in (model, model.model):
        module.__class__ = renamed(type(module), name, cache_argument(module))
        assert cache_argument(module) == name
    assert TransformersRollout(model, sampler.tokenizer, 100_000).warning == ""
    assert sampler.generate(PROMPTS, sampling) == expected
    assert len(decoders) == 2


def test_cache_argument_behind_a_wrapper_without_names():
    _, model = rollout()
    expected, forward = cache_argument(model), model.forward
    assert expected in ("cache", "past_key_values")
    model.forward = lambda *arguments, **named: forward(*arguments, **named)
    assert cache_argument(model) == expected
    assert cache_argument(torch.nn.Linear(2, 2)) is None


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("llama", None),
        ("phi3", "its own prepare_inputs_for_generation"),
        ("lfm2", "layers other than full and sliding"),
    ],
)
def test_warning_names_a_model_that_needs_padded_batches(name, reason):
    config_class, overrides = {**MODELS, **PADDED}[name]
    sampler, model = rollout(config_class=config_class, **overrides)
    assert bool(reason) == bool(sampler.warning)
    if reason:
        assert reason in sampler.warning
        assert sampler.warning.startswith(f"{type(model).__name__} is sampled in padded batches")


def test_not_continuous_for_a_forward_without_positions():
    _, model = rollout()
    model.forward = lambda input_ids, attention_mask, cache=None: None
    assert not_continuous(model) == "the forward of LlamaForCausalLM does not take position_ids"


@pytest.mark.parametrize("command", ["train", "eval", "plan"])
def test_command_warns_once_about_padded_batches(command, tmp_path, capsys):
    tokenizer = digit_tokenizer()
    model = tiny_model(torch.float32, Phi3Config, vocab_size=len(tokenizer), max_position_embeddings=64)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    fields = {
        "model_name_or_path": tmp_path / "model", "dataset_name": "sort_digits", "reward_funcs": "[exact_answer]",
        "dataset_kwargs": "{length: 2, test_size: 4}", "generation_batch_size": 8, "num_generations": 4,
        "max_completion_length": 3, "max_steps": 2, "use_cpu": "true",
    }  # fmt: skip
    if command != "plan":
        fields["output_dir" if command == "train" else "output"] = tmp_path / "run"
    else:
        fields["vram"] = "24GiB"
    assert main([command, *(f"--{name}={value}" for name, value in fields.items())]) == 0
    AcceleratorState._reset_state(reset_partial_state=True)
    output = " ".join(capsys.readouterr().out.split())
    assert output.count("Phi3ForCausalLM is sampled in padded batches") == 1


def test_decoder_computes_nothing_for_a_finished_sequence(decoders, reserved):
    sampler, _ = rollout()
    sampler.eos_token_ids = set(range(2, 6))
    torch.manual_seed(0)
    responses = sampler.generate(PROMPTS, Sampling(16, 64))
    lengths = [len(r.token_ids) for r in responses]
    (decoder,) = decoders
    assert decoder.rows_computed == sum(lengths) < 0.5 * len(lengths) * max(lengths)
    assert decoder.steps == max(lengths)


@pytest.mark.parametrize("max_tokens", [400, 1500])
def test_decoder_cache_stays_within_the_budget(decoders, reserved, max_tokens):
    """Sequences join as others end, and most of the budget is used."""
    sampler, _ = rollout(max_tokens)
    sampler.eos_token_ids = {2, 3}
    torch.manual_seed(0)
    responses = sampler.generate(PROMPTS, Sampling(16, 100))
    assert len(responses) == 64
    assert all(rows == 1 or rows * columns <= max_tokens for rows, _, columns in reserved)
    assert max(rows * columns for rows, _, columns in reserved) > 0.8 * max_tokens
    lengths = [len(r.token_ids) for r in responses]
    (decoder,) = decoders
    assert decoder.rows_computed == sum(lengths)
    # The steps of padded batches with room for the longest completion, each as long as its longest.
    rows = max_tokens // (6 + 100)
    assert decoder.steps < 0.8 * sum(max(lengths[first : first + rows]) for first in range(0, 64, rows))


def test_decoder_computes_a_prompt_once_for_its_group(monkeypatch):
    sampler, model = rollout()
    rows = []
    forward = model.model.forward

    def counted(*arguments, **named):
        rows.append(tuple(named["input_ids"].shape))
        return forward(*arguments, **named)

    monkeypatch.setattr(model.model, "forward", counted)
    sampler.generate(PROMPTS, Sampling(5, 1))
    # Three prompts with more than one token, without their last one; then one step of all twenty sequences.
    assert rows == [(3, 5), (20, 1)]


def filtered(scores, seen, temperature, *, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0):
    """Log-probabilities of one position after the filters, computed step by step."""
    scores = scores.clone()
    for token in set(seen):
        scores[token] = scores[token] / repetition_penalty if scores[token] > 0 else scores[token] * repetition_penalty
    scores = scores / temperature
    if top_k:
        scores[scores < scores.sort(descending=True).values[top_k - 1]] = -torch.inf
    if top_p < 1:
        p, order = scores.softmax(0).sort(descending=True)
        scores[order[p.cumsum(0) - p >= top_p]] = -torch.inf
    p = scores.softmax(0)
    scores[p < min_p * p.max()] = -torch.inf
    return scores.log_softmax(0)


FILTERED = [
    {},
    {"top_k": 5},
    {"top_p": 0.7},
    {"min_p": 0.1},
    {"repetition_penalty": 1.5},
    {"top_k": 12, "top_p": 0.8, "min_p": 0.05, "repetition_penalty": 1.3},
]


@pytest.mark.parametrize("name", ["llama", "gemma3", "lfm2"])
@pytest.mark.parametrize("filters", FILTERED, ids=lambda filters: "-".join(filters) or "none")
def test_logprobs_equal_those_of_the_full_logits(name, filters):
    """To 1e-5, after temperature and filters, also for sequences that join later."""
    config_class, overrides = {**MODELS, **PADDED}[name]
    # With sharper attention, float32 rounding alone exceeds 1e-5.
    sampler, model = rollout(200, config_class, **{**overrides, "initializer_range": 0.2})
    sampler.eos_token_ids = {2, 3}
    torch.manual_seed(1)
    own = {key: value for key, value in filters.items() if key != "repetition_penalty"}
    rest = {key: value for key, value in filters.items() if key == "repetition_penalty"}
    prompts = (
        PROMPTS if name != "lfm2" or not rest else [[5, 9, 11], [6, 6, 6]]
    )  # in `generate` the penalty also covers padding
    responses = sampler.generate(prompts, Sampling(6, 20, temperature=0.7, generation_kwargs=rest, **own))
    for prompt, response in zip([p for p in prompts for _ in range(6)], responses, strict=True):
        ids = prompt + response.token_ids
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids[:-1]])).logits[0]
        for place, (token, logprob) in enumerate(zip(response.token_ids, response.logprobs, strict=True), len(prompt)):
            expected = filtered(logits[place - 1], ids[:place], 0.7, **filters)[token].item()
            assert logprob == pytest.approx(expected, abs=1e-5)


def test_sample_never_draws_a_token_with_probability_zero():
    torch.manual_seed(0)
    scores = torch.full((100_000, 6), -torch.inf)
    scores[:, [1, 4]] = torch.tensor([0.0, -20.0])
    tokens, logprobs = decode.sample(scores, greedy=False)
    assert set(tokens.tolist()) <= {1, 4}
    assert (tokens == 1).float().mean() > 0.999
    assert torch.allclose(logprobs[tokens == 1], torch.zeros(()), atol=1e-6)


def test_generate_with_the_same_seed():
    sampler, _ = rollout(300)
    first, second, third = (
        torch.manual_seed(seed) and sampler.generate(PROMPTS, Sampling(4, 30)) for seed in (0, 0, 1)
    )
    assert first == second != third


@pytest.mark.parametrize("name", ["llama", "lfm2"])
def test_generate_refuses_probabilities_that_are_not_finite(name):
    config_class, overrides = {**MODELS, **PADDED}[name]
    sampler, model = rollout(config_class=config_class, **overrides)
    torch.nn.init.constant_(model.get_output_embeddings().weight, torch.nan)
    with pytest.raises(UserError, match="no longer finite; try a smaller learning_rate"):
        sampler.generate(PROMPTS, Sampling(2, 4))


def test_generation_kwargs_filter_as_transformers_does():
    """Also filters that count from the end of the prompt, with unequal prompts and rows that join later."""
    sampler, _ = rollout(60)
    sampler.eos_token_ids = set(range(20))
    torch.manual_seed(0)
    rules = {
        "min_new_tokens": 5,
        "begin_suppress_tokens": [20, 21, 22],
        "suppress_tokens": [30],
        "bad_words_ids": [[25, 26]],
    }
    responses = sampler.generate(PROMPTS, Sampling(25, 12, generation_kwargs=rules))
    drawn = [r.token_ids for r in responses]
    assert min(map(len, drawn)) == 6  # an end token after five others
    assert not {ids[0] for ids in drawn} & {20, 21, 22}
    assert {20, 21, 22} <= {token for ids in drawn for token in ids}
    assert 30 not in {token for ids in drawn for token in ids}
    pairs = {pair for ids in drawn for pair in itertools.pairwise(ids)}
    assert (25, 26) not in pairs
    assert any(first == 25 for first, _ in pairs)
    sampler.eos_token_ids = set()
    repeats = sampler.generate(PROMPTS, Sampling(2, 30, temperature=0.0, generation_kwargs={"no_repeat_ngram_size": 2}))
    for prompt, response in zip([p for p in PROMPTS for _ in range(2)], repeats, strict=True):
        ids = prompt + response.token_ids
        pairs = list(itertools.pairwise(ids))
        assert len(set(pairs)) == len(pairs)


def test_samples_follow_the_distribution_of_the_model():
    sampler, model = rollout()
    torch.manual_seed(0)
    draws = 20_000
    temperature = 0.8
    responses = sampler.generate(PROMPTS[:2], Sampling(draws, 2, temperature=temperature))
    for index, prompt in enumerate(PROMPTS[:2]):
        with torch.no_grad():
            p = (model(input_ids=torch.tensor([prompt])).logits[0, -1] / temperature).softmax(-1)
        first = torch.tensor([r.token_ids[0] for r in responses[index * draws : (index + 1) * draws]])
        counts = torch.bincount(first, minlength=VOCAB)
        likely = p * draws >= 5
        chi_square = ((counts - p * draws) ** 2 / (p * draws))[likely].sum().item()
        # The statistic has mean k and standard deviation sqrt(2 k); allow six standard deviations.
        assert chi_square < likely.sum() + 6 * (2 * likely.sum()) ** 0.5


def test_responses_end_at_the_first_end_token():
    sampler, _ = rollout()
    sampler.eos_token_ids = {0, 17, 23}
    torch.manual_seed(0)
    responses = sampler.generate(PROMPTS, Sampling(200, 6))
    reasons = {"stop": 0, "length": 0}
    for token_ids, reason, *_ in responses:
        reasons[reason] += 1
        assert not set(token_ids[:-1]) & sampler.eos_token_ids
        assert (token_ids[-1] in sampler.eos_token_ids) == (reason == "stop")
        assert len(token_ids) == 6 or reason == "stop"
    assert min(reasons.values()) > 0


def test_generation_config_of_the_model_is_not_applied():
    """Its defaults would make the sampled policy differ from the trained one."""
    sampler, model = rollout()
    expected = sampler.generate(PROMPTS, Sampling(1, 12, temperature=0.0))
    model.generation_config.repetition_penalty = 1000.0
    model.generation_config.min_new_tokens = 12
    assert sampler.generate(PROMPTS, Sampling(1, 12, temperature=0.0)) == expected
    assert model.generation_config.repetition_penalty == 1000.0
    penalised = Sampling(1, 12, temperature=0.0, generation_kwargs={"repetition_penalty": 1000.0})
    assert sampler.generate(PROMPTS, penalised) != expected


def test_generate_restores_the_mode_of_the_model():
    sampler, model = rollout()
    model.train()
    sampler.generate(PROMPTS, Sampling(2, 2))
    assert model.training


def test_generation_kwargs_unknown_name_is_refused():
    sampler, _ = rollout()
    with pytest.raises(UserError, match=r"'repetition_penlty' is not allowed .did you mean 'repetition_penalty'"):
        sampler.generate(PROMPTS, Sampling(2, 2, generation_kwargs={"repetition_penlty": 1.1}))
