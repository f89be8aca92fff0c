"""Speculative sampling: the same tokens as the plain decoder's at the same random numbers, in fewer steps."""

import pytest
import torch
from transformers import Gemma2Config, Gemma3TextConfig, LlamaConfig, MistralConfig, Phi3Config, Qwen3Config

from grpo_fast.errors import UserError
from grpo_fast.files import read_metrics
from grpo_fast.rollout import Sampling, TransformersRollout, decode, drafts, speculative
from grpo_fast.rollout.decode import Decoder
from grpo_fast.rollout.drafts import KEPT_ANSWERS, Acceptance, Answers, DraftToken, GroupText
from grpo_fast.rollout.speculative import SpeculativeDecoder
from support import text_models
from support.small import trainer
from support.tiny import VOCAB

PROMPTS = [[5, 9, 11], [7], [3, 4, 5, 6, 7, 8], [5, 9, 12, 2]]
LAYERS = ["sliding_attention", "full_attention"]
MODELS = {
    "llama": (LlamaConfig, {}),
    "qwen3": (Qwen3Config, {"head_dim": 8}),
    "mistral": (MistralConfig, {"sliding_window": 5}),
    "gemma2": (Gemma2Config, {"head_dim": 8, "sliding_window": 5}),
    "gemma3": (Gemma3TextConfig, {"head_dim": 8, "layer_types": LAYERS, "sliding_window": 5}),
}


class FixedDecoder(Decoder):
    """The plain decoder at the random numbers of the speculative one."""

    uniforms, stream = SpeculativeDecoder.uniforms, SpeculativeDecoder.stream

    def __call__(self, *arguments):
        self.streams, self.seed = {}, int(torch.randint(2**62, ()))
        return super().__call__(*arguments)


@pytest.fixture
def eager(monkeypatch):
    """Verify drafts whatever they cost."""
    monkeypatch.setattr(speculative, "step_cost", lambda device: lambda tokens: 1e9 + tokens)


def speculating(sampler, limit=4):
    return TransformersRollout(sampler.model, sampler.tokenizer, sampler.max_tokens, limit)


def both(monkeypatch, sampler, sampling, prompts=PROMPTS, calls=2, limit=4):
    """Responses of the plain decoder and of the speculative one, of `calls` calls each, and the latter's decoders."""
    found, made = [], []

    class Kept(SpeculativeDecoder):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            made.append(self)

    monkeypatch.setattr("grpo_fast.rollout.transformers.Decoder", FixedDecoder)
    monkeypatch.setattr("grpo_fast.rollout.transformers.SpeculativeDecoder", Kept)
    fast = speculating(sampler, limit)
    fast.eos_token_ids = sampler.eos_token_ids
    for one in (sampler, fast):
        torch.manual_seed(0)
        found.append([response for _ in range(calls) for response in one.generate(prompts, sampling)])
    return *found, made


def assert_same(plain, fast):
    assert [r.token_ids for r in fast] == [r.token_ids for r in plain]
    assert [(r.finish_reason, r.past, r.mask) for r in fast] == [(r.finish_reason, r.past, r.mask) for r in plain]
    for one, other in zip(fast, plain, strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-5)


@pytest.mark.parametrize("max_tokens", [100_000, 150])
@pytest.mark.parametrize("name", MODELS)
def test_speculative_decoder_samples_the_tokens_of_the_plain_one(name, max_tokens, monkeypatch, eager):
    """In float64 and at the same random numbers, also with rows that join, leave and are evicted.

    Eager attention, which gemma2 needs, has its softmax in float32, where padding is masked by minus infinity.
    """
    for bound, value in {"GROWTH": 8, "LEAST_GROWTH": 3, "PREFILL_TOKENS": 7}.items():
        monkeypatch.setattr(decode, bound, value)
    config_class, overrides = MODELS[name]
    sampler = text_models.rollout(config_class, max_tokens, **overrides)
    sampler.model.to(torch.float32 if name == "gemma2" else torch.float64)
    sampler.eos_token_ids = set(range(20, 24))
    plain, fast, decoders = both(monkeypatch, sampler, Sampling(6, 30, temperature=0.3))
    assert_same(plain, fast)
    tokens = sum(len(response.token_ids) for response in fast)
    rows = sum(decoder.rows_computed for decoder in decoders)
    assert rows < 0.9 * tokens


FILTERS = {
    "stop": {"generation_kwargs": {"stop": ["</answer>", "1", "b "]}},
    "thinking": {"thinking_budget": 3},
    "repetition": {"generation_kwargs": {"repetition_penalty": 1.3, "min_new_tokens": 5}},
    "filters": {"top_p": 0.8, "top_k": 12, "min_p": 0.02},
    "greedy": {"temperature": 0.0},
}


@pytest.mark.parametrize("name", FILTERS)
def test_speculative_decoder_with_filters_and_endings(name, monkeypatch, eager):
    """Stop texts, forced tokens and filters that read the sequence apply within a step as they do between steps."""
    sampler = text_models.rollout()
    sampler.model.double()
    plain, fast, decoders = both(monkeypatch, sampler, Sampling(8, 24, **{"temperature": 0.3, **FILTERS[name]}))
    assert_same(plain, fast)
    assert sum(d.rows_computed for d in decoders) < 0.95 * sum(len(response.token_ids) for response in fast)
    if name == "stop":
        assert any(response.past is not None for response in fast)
    if name == "thinking":
        assert any(response.mask is not None and not all(response.mask) for response in fast)


def test_speculative_samples_follow_the_distribution_of_the_model(eager):
    """Chi-square tests of the second token given the first, most of which come from drafts."""
    # A small budget, so that later completions are drafted from those before them.
    sampler = speculating(text_models.rollout(max_tokens=1000))
    torch.manual_seed(0)
    draws, prompt = 4000, [5, 9, 11]
    responses = sampler.generate([prompt], Sampling(draws, 3, temperature=0.5))
    figures = sampler.take_figures()
    assert figures["speculative/tokens_per_step"] > 1.05
    assert 0 < figures["speculative/acceptance_rate"] < 1
    pairs = torch.tensor([response.token_ids[:2] for response in responses if len(response.token_ids) > 1])
    assert len(pairs) > 0.9 * draws
    with torch.no_grad():
        for first in pairs[:, 0].bincount().topk(3).indices.tolist():
            p = sampler.model(input_ids=torch.tensor([[*prompt, first]])).logits[0, -1].div(0.5).softmax(-1)
            drawn = pairs[pairs[:, 0] == first, 1]
            counts = torch.bincount(drawn, minlength=VOCAB)
            likely = p * len(drawn) >= 5
            chi_square = ((counts - p * len(drawn)) ** 2 / (p * len(drawn)))[likely].sum().item()
            # The statistic has mean k and standard deviation sqrt(2 k); allow six standard deviations.
            assert chi_square < likely.sum() + 6 * (2 * likely.sum()) ** 0.5


def test_speculative_sampling_learns_from_earlier_epochs(monkeypatch, eager):
    """The second greedy answer to a prompt is drafted from the first."""
    sampler = text_models.rollout()
    _, fast, decoders = both(monkeypatch, sampler, Sampling(1, 40, temperature=0.0), prompts=[[5, 9, 11]], calls=2)
    assert fast[0].token_ids == fast[1].token_ids
    assert decoders[1].steps < 0.5 * decoders[0].steps
    assert decoders[1].steps >= len(fast[1].token_ids) / 5


def test_speculative_decoder_without_a_gain_takes_single_tokens(monkeypatch):
    """Where a step's cost grows with its tokens, drafts that are mostly wrong are not verified."""
    monkeypatch.setattr(speculative, "step_cost", lambda device: float)
    sampler = text_models.rollout()
    plain, fast, decoders = both(monkeypatch, sampler, Sampling(6, 30, temperature=1.5))
    assert_same(plain, fast)
    assert sum(decoder.rows_computed for decoder in decoders) == sum(len(response.token_ids) for response in fast)


def test_check_speculation_refuses_other_models():
    with pytest.raises(UserError, match="speculative_tokens=4 is not possible with Phi3ForCausalLM, because it has"):
        speculating(text_models.rollout(Phi3Config))
    sampler = text_models.rollout()
    sampler.model.config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(UserError, match="attn_implementation='flash_attention_2' takes no mask for each row"):
        speculating(sampler)


def test_group_text_follows_the_longest_suffix():
    group = GroupText([1, 2], [[7, 8, 9, 4], [8, 9, 5, 6]], 2)
    for token in (3, 7, 8, 9):
        group.append(0, token)
    assert group.draft(0, 3) == [DraftToken(4, 3, 0)]
    for token in (8, 9):
        group.append(1, token)
    # After the prompt and these two: the second answer, whole.
    assert [each.token for each in group.draft(1, 8)] == [5, 6]
    assert group.draft(1, 1) == [DraftToken(5, 4, 0)]


def test_group_text_takes_the_most_frequent_continuation():
    group = GroupText([1], [[7, 4, 2], [7, 4, 3], [7, 4, 3], [7, 5]], 1)
    group.append(0, 7)
    assert group.draft(0, 2) == [DraftToken(4, 2, 4), DraftToken(3, 3, 3)]
    group.append(0, 40)
    assert group.draft(0, 2) == []


def test_group_text_grows(monkeypatch):
    monkeypatch.setattr(drafts, "ROOM", 2)
    group = GroupText([1], [], 3)
    for token in range(2, 40):
        for line in range(3):
            group.append(line, token * 3 + line)
    group.append(1, 31)
    assert [each.token for each in group.draft(1, 4)] == [34, 37, 40, 43]


def test_answers_keep_the_latest_within_a_budget(monkeypatch):
    answers = Answers()
    for number in range(KEPT_ANSWERS + 3):
        answers.add([1, 2], [number])
    assert [list(tokens) for tokens in answers.of([1, 2])] == [[number] for number in range(3, KEPT_ANSWERS + 3)]
    assert answers.tokens == KEPT_ANSWERS
    monkeypatch.setattr(drafts, "KEPT_TOKENS", KEPT_ANSWERS + 2)
    answers.add([3], [1, 1])
    answers.of([1, 2])
    answers.add([4], [1])
    assert answers.of([3]) == []
    assert len(answers.of([1, 2])) == KEPT_ANSWERS
    assert answers.tokens == KEPT_ANSWERS + 1


def test_acceptance_weighs_tokens_against_their_cost():
    acceptance, sure, unsure = Acceptance(), DraftToken(5, 8, 5), DraftToken(6, 1, 0)
    for _ in range(2000):
        acceptance.record(sure, True)
        acceptance.record(unsure, False)
    assert acceptance.rate(sure) > 0.99
    assert acceptance.rate(unsure) < 0.01
    assert max(map(max, acceptance.tried)) <= Acceptance.FADE
    arguments = {"most": 4, "cost": lambda tokens: 24.0 + tokens, "margin": 0.1}
    assert acceptance.best_length([[sure] * 4], **arguments) == 4
    assert acceptance.best_length([[sure] * 2], **arguments) == 2
    assert acceptance.best_length([[sure, unsure, sure]], **arguments) == 1
    assert acceptance.best_length([[unsure] * 4], **arguments) == 0
    # One sure row of many does not pay for the tokens that all rows compute.
    assert acceptance.best_length([[sure] * 4] + [[]] * 40, **arguments) == 0
    assert acceptance.best_length([[sure] * 4] + [[]] * 40, most=4, cost=lambda tokens: 1e9 + tokens, margin=0.0) == 4


def test_run_with_speculative_tokens_logs_acceptance(tmp_path):
    """A run of two steps over the same prompts; with 0, metrics have no such names."""
    made = trainer(tmp_path / "run", speculative_tokens=3, max_steps=2, dataset_kwargs={"length": 2, "test_size": 90})
    made.train()
    for entry in read_metrics(tmp_path / "run" / "metrics.jsonl"):
        assert entry["speculative/tokens_per_step"] >= 1
        assert 0 <= entry["speculative/acceptance_rate"] <= 1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"speculative_tokens": -1}, "speculative_tokens=-1 is not allowed: it must be a finite number, at least 0"),
        ({"speculative_tokens": 4, "use_vllm": True}, "speculative_tokens requires use_vllm=false"),
    ],
)
def test_config_refuses_speculative_tokens(tmp_path, fields, message):
    with pytest.raises(UserError, match=message):
        trainer(tmp_path, **fields)
