"""Texts that end a completion: exactly, in both ways of sampling, and at a bounded cost for each token."""

import random

import pytest
import torch
from transformers import LlamaConfig, Phi3Config

from grpo_fast.data import completion_text
from grpo_fast.errors import UserError
from grpo_fast.rollout import Sampling
from grpo_fast.rollout.stops import StopTexts
from grpo_fast.train.metrics import completion_metrics
from support.text_models import PIECES, STOPS, rollout, tokenizer

PROMPTS = [[5, 9, 11], [7], [3, 4, 5, 6, 7, 8]]
TOKENIZERS = {
    "bytes": tokenizer(PIECES),
    "fallback": tokenizer([p for p in PIECES if len(p) == 1 or p.isascii()] + ["é".encode()], byte_fallback=True),
}


def expected_end(made, ids, texts):
    """The first number of tokens whose text has a stop text, and the characters after it."""
    for count in range(1, len(ids) + 1):
        text = completion_text(made, ids[:count], ended=False)
        ends = [text.find(stop) + len(stop) for stop in texts if stop in text]
        if ends:
            return count, len(text) - min(ends)
    return None


def found_end(stops, ids):
    for count in range(1, len(ids) + 1):
        if (past := stops.past(ids[:count])) is not None:
            return count, past
    return None


@pytest.mark.parametrize("name", TOKENIZERS)
def test_past_equals_a_search_of_the_whole_text(name):
    """Random tokens, which break texts and characters at any place, invalid bytes and tokens without text included."""
    made, draw, ends = TOKENIZERS[name], random.Random(0), set()
    for texts in [STOPS, *[(text,) for text in STOPS], ("xé", "b <"), ("r", "k>a")]:
        stops = StopTexts(made, texts)
        for _ in range(60):
            alike = [token for token in range(2, len(made)) if made.decode([token]) in "".join(texts) + "\ufffd"]
            pool = draw.choice((alike, draw.sample(range(len(made)), 6), range(len(made))))
            ids = draw.choices(pool, k=24)
            ends.add(expected := expected_end(made, ids, texts))
            assert found_end(stops, ids) == expected, (texts, made.convert_ids_to_tokens(ids))
    assert len(ends) > 25
    assert {past for _, past in ends - {None}} >= {0, 1}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_past_with_a_text_in_single_bytes_after_a_long_text(name):
    made = TOKENIZERS[name]
    pieces = [b"a", b"</", b"an", b"swer", b">x"]
    names = {piece: index + 2 for index, piece in enumerate(PIECES)}
    if name == "bytes":
        ids = [names[piece] for piece in [b"\xc3", b"\xa9", *[b"a"] * 300, *pieces]]
    else:
        ids = made.convert_tokens_to_ids(["<0xC3>", "<0xA9>", *["a"] * 300, *[piece.decode() for piece in pieces]])
    assert found_end(StopTexts(made, ("</answer>", "zz")), ids) == (len(ids), 1)


def test_past_ignores_texts_within_the_first_tokens():
    """As in vLLM, with min_new_tokens; the text begins anywhere."""
    made = TOKENIZERS["bytes"]
    ids = [PIECES.index(piece) + 2 for piece in (b"a", b"\n", b"1", b"\n", b"\n")]
    assert [found_end(StopTexts(made, ("\n",), least), ids) for least in range(6)] == [
        (2, 0), (2, 0), (4, 0), (4, 0), (5, 0), None,
    ]  # fmt: skip


@pytest.mark.parametrize("last", [">", "é", "\n"])
def test_past_decodes_a_bounded_number_of_tokens(last, monkeypatch):
    """However long the completion is, and even if each of its tokens could be the last of a stop text."""
    made, sizes = tokenizer(PIECES), []
    decode = made.decode
    monkeypatch.setattr(made, "decode", lambda ids, **options: sizes.append(len(ids)) or decode(ids, **options))
    stops = StopTexts(made, ("</answer" + last,))
    ids = [PIECES.index(piece) + 2 for piece in (b"a", b">", "é".encode(), b"\xc3", b"\xa9", b"\x80")] * 500
    assert found_end(stops, ids) is None
    assert max(sizes) <= len("</answeré".encode()) + 7
    assert sum(sizes) / len(ids) < 80


ENGINES = {"continuous": LlamaConfig, "padded": Phi3Config}


@pytest.mark.parametrize("stop", ["\n", list(STOPS)])
@pytest.mark.parametrize("name", ENGINES)
def test_stop_ends_greedy_completions(name, stop):
    """Each is the completion without stop texts, up to the token that completes the first of them."""
    engine = rollout(ENGINES[name], max_tokens=80)
    plain = engine.generate(PROMPTS * 3, Sampling(1, 30, temperature=0.0))
    stopped = engine.generate(PROMPTS * 3, Sampling(1, 30, temperature=0.0, generation_kwargs={"stop": stop}))
    for whole, response in zip(plain, stopped, strict=True):
        ids = whole.token_ids[:-1] if whole.ended else whole.token_ids
        found = expected_end(engine.tokenizer, ids, [stop] if isinstance(stop, str) else stop)
        count, past = found or (len(whole.token_ids), None)
        assert response.token_ids == whole.token_ids[:count]
        assert response.logprobs == pytest.approx(whole.logprobs[:count], abs=1e-5)
        assert (response.past, response.finish_reason) == (past, "stop" if found else whole.finish_reason)


@pytest.mark.parametrize("name", ENGINES)
def test_stop_ends_sampled_completions(name):
    """The text ends with the stop text; what the last token has after it stays in the tokens."""
    engine = rollout(ENGINES[name], max_tokens=300)
    torch.manual_seed(0)
    sampling = Sampling(60, 20, generation_kwargs={"stop": list(STOPS), "min_new_tokens": 2})
    responses = engine.generate(PROMPTS, sampling)
    for response in responses:
        text = completion_text(engine.tokenizer, response.token_ids, response.ended, response.past or 0)
        assert (response.past is not None) == text.endswith(STOPS)
        assert len(response.token_ids) > 2
        if response.past is not None:
            whole = completion_text(engine.tokenizer, response.token_ids, ended=False)
            assert whole[: len(whole) - response.past] == text
            assert not response.ended
            assert response.finish_reason == "stop"
    assert {0, 1} <= {response.past for response in responses}
    assert {"stop", "length"} == {response.finish_reason for response in responses}
    share = sum(response.finish_reason == "length" for response in responses) / len(responses)
    assert completion_metrics(responses)["completions/clipped_ratio"] == pytest.approx(share)


@pytest.mark.parametrize("stop", ["", [], ["a", ""], 3, ["a", 4], None])
def test_stop_without_text_is_refused(stop):
    with pytest.raises(UserError, match=r"generation_kwargs: stop=.* is not allowed: it must be a text"):
        rollout().check(PROMPTS[0], Sampling(1, 4, generation_kwargs={"stop": stop}))
