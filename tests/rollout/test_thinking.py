"""The thinking budget: where the closing text is forced, in both ways of sampling, and that it carries no loss."""

import pytest
import torch
from transformers import LlamaConfig, Phi3Config

from grpo_fast.config import GRPOConfig
from grpo_fast.data import completion_text
from grpo_fast.errors import UserError
from grpo_fast.model.loading import digit_tokenizer
from grpo_fast.rollout import Response, Sampling
from grpo_fast.rollout.thinking import ThinkingBudget
from grpo_fast.train.metrics import completion_metrics
from support.text_models import PIECES, rollout

ENGINES = {"continuous": LlamaConfig, "padded": Phi3Config}


def ids_of(*pieces):
    return [PIECES.index(piece.encode()) + 2 for piece in pieces]


PROMPTS = [
    ids_of("1", "<think>"),
    ids_of("2", "<", "think", ">x"),
    ids_of("3", "4"),
    ids_of("<think>", "5", "</think>"),
]


@pytest.fixture
def split():
    """Engines whose tokenizer writes ``</think>`` in three tokens."""

    def build(name, max_tokens=100_000):
        engine = rollout(ENGINES[name], max_tokens)
        kind = type(engine.tokenizer)
        closing = {"input_ids": ids_of("</", "think", ">")}
        engine.tokenizer.__class__ = type("Split", (kind,), {"__call__": lambda *_, **__: closing})
        return engine

    return build


def expected_mask(tokenizer, prompt, ids, budget, closing):
    """From the texts of all prefixes: False for the `closing` tokens that follow `budget` tokens of thinking."""
    before = tokenizer.decode(prompt)
    open_since = 0 if before.rfind("<think>") > before.rfind("</think>") else None
    mask = []
    while len(mask) < len(ids):
        if open_since is not None and len(mask) - open_since == budget:
            mask += [False] * min(len(closing), len(ids) - len(mask))
            open_since = None
            continue
        mask.append(True)
        texts = [completion_text(tokenizer, ids[: len(mask) - late], ended=False) for late in (1, 0)]
        opened, closed = (texts[1].count(tag) > texts[0].count(tag) for tag in ("<think>", "</think>"))
        if opened or closed:
            open_since = len(mask) if opened else None
    return mask


@pytest.mark.parametrize("budget", [0, 3])
@pytest.mark.parametrize("max_tokens", [100_000, 120])
@pytest.mark.parametrize("name", ENGINES)
def test_thinking_is_closed_after_the_budget(name, max_tokens, budget, split):
    """With log-probabilities of the forced tokens' continuation, and for every ``<think>`` of a completion."""
    engine = split(name, max_tokens)
    closing = ids_of("</", "think", ">")
    torch.manual_seed(0)
    responses = engine.generate(PROMPTS, Sampling(30, 16, thinking_budget=budget))
    forced, again = 0, 0
    for index, response in enumerate(responses):
        prompt, ids = PROMPTS[index // 30], response.token_ids
        assert response.mask == expected_mask(engine.tokenizer, prompt, ids, budget, closing)
        places = [place for place, kept in enumerate(response.mask) if not kept]
        assert [ids[place] for place in places] == (closing * 9)[: len(places)]
        assert all(response.logprobs[place] == 0.0 for place in places)
        forced, again = forced + bool(places), again + (len(places) > 3)
        if index % 10 == 0:
            with torch.no_grad():
                logits = engine.model(input_ids=torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
            scored = logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None])[:, 0]
            kept = torch.tensor(response.mask)
            torch.testing.assert_close(torch.tensor(response.logprobs)[kept], scored[kept], rtol=0, atol=1e-4)
    assert (30 if budget else 60) <= forced < len(responses)
    assert again > 0
    assert completion_metrics(responses)["completions/thinking_closed_ratio"] == forced / len(responses)


@pytest.mark.parametrize("name", ENGINES)
def test_stop_text_may_be_the_forced_one(name, split):
    sampling = Sampling(4, 16, generation_kwargs={"stop": "</think>"}, thinking_budget=0)
    for response in split(name).generate(PROMPTS[:2], sampling):
        assert response[:2] == (ids_of("</", "think", ">"), "stop")
        assert (response.past, response.mask) == (0, [False] * 3)


@pytest.mark.parametrize("name", ENGINES)
def test_budget_above_the_length_changes_nothing(name, split):
    drawn = []
    for budget in (None, 100):
        torch.manual_seed(0)
        drawn.append(split(name).generate(PROMPTS, Sampling(4, 12, thinking_budget=budget)))
    assert [r.mask for r in drawn[1]] == [[True] * len(r.token_ids) for r in drawn[1]]
    assert [r._replace(mask=None) for r in drawn[1]] == drawn[0]


def test_completion_metrics_without_a_budget_have_no_closed_ratio():
    assert "completions/thinking_closed_ratio" not in completion_metrics([Response([3], "stop")])


def test_tokenizer_that_cannot_write_the_closing_tag_is_refused():
    with pytest.raises(UserError, match="thinking_budget is not possible: the tokenizer cannot write '</think>'"):
        ThinkingBudget(digit_tokenizer(), 3)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"thinking_budget": -1}, "thinking_budget=-1 is not allowed: it must be a finite number, at least 0"),
        ({"thinking_budget": 16}, "thinking_budget=16 is not allowed: it must be below max_completion_length=16"),
        ({"thinking_budget": 0, "use_vllm": True}, "thinking_budget is not possible with use_vllm"),
    ],
)
def test_config_refuses_a_budget(fields, words):
    with pytest.raises(UserError, match=words):
        GRPOConfig("x", dataset_name="x", reward_funcs=["x"], max_completion_length=16, **fields)
