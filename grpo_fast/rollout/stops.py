"""Texts that end a completion, found while it is sampled at a cost per token that does not grow with its length."""

from __future__ import annotations

from collections.abc import Callable, Container
from functools import cache
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria

from grpo_fast.data.encoding import completion_text, silent_tokens
from grpo_fast.rollout.base import Sampling

# What a decoder writes for bytes that are no complete character.
INCOMPLETE = "\ufffd"
# Tokens to decode beyond the bytes of the longest text: a decoder may drop the space before the first token.
CONTEXT = 4
# A character has up to this many bytes, each of which may be a token.
CHARACTER_BYTES = 4


class StopTexts:
    """Finds the first of `texts` in a completion, whose text is that of `completion_text`.

    Most tokens cannot complete a text, because they lack its last character; those cost one look-up. After the others,
    a bounded number of tokens is decoded, and the whole completion once a text was found there. transformers'
    StopStringCriteria matches tokens one by one instead, also against the prompt's end, and does not give the place.

    Args:
        tokenizer: the completions' tokenizer.
        texts: texts that are not empty.
        min_new_tokens: texts that end within so many first tokens are ignored, as in vLLM.
    """

    def __init__(self, tokenizer: Any, texts: tuple[str, ...], min_new_tokens: int = 0):
        self.tokenizer, self.texts, self.min_new_tokens = tokenizer, texts, min_new_tokens
        self.silent = silent_tokens(tokenizer)
        self.tail = max(len(text.encode()) for text in texts) + CONTEXT
        lasts = {text[-1] for text in texts}
        # Some decoders drop the space before the first token, so each token is decoded after another one.
        first = tokenizer("a", add_special_tokens=False)["input_ids"]
        start = self.text(first)
        every = not start and any(last.isspace() for last in lasts)

        @cache
        def may_end(token: int) -> bool:
            text = self.text([*first, token])
            own = text[len(start) :] if text.startswith(start) else ""
            return token not in self.silent and (every or not own or INCOMPLETE in own or not lasts.isdisjoint(own))

        self.may_end: Callable[[int], bool] = may_end

    def past(self, token_ids: list[int]) -> int | None:
        """How many characters follow the stop text that the last token completes; None if it completes none."""
        if len(token_ids) <= self.min_new_tokens or not self.may_end(token_ids[-1]) or not self._in_tail(token_ids):
            return None
        text, before = self.text(token_ids), self.text(token_ids[:-1])
        both = enumerate(zip(text, before, strict=False))
        old = next((place for place, (one, other) in both if one != other), min(len(text), len(before)))
        starts = [(text.find(stop, max(old - len(stop) + 1, 0)), len(stop)) for stop in self.texts]
        ends = [start + length for start, length in starts if start >= 0]
        return len(text) - min(ends) if ends else None

    def _in_tail(self, token_ids: list[int]) -> bool:
        """Whether the last tokens contain a stop text; where they begin within a character, also some before them."""
        heard = (token for token in reversed(token_ids) if token not in self.silent)
        last = list(islice(heard, self.tail + CHARACTER_BYTES - 1))[::-1]
        for count in range(self.tail, self.tail + CHARACTER_BYTES):
            text = self.text(last[-count:])
            if any(stop in text for stop in self.texts):
                return True
            if INCOMPLETE not in text:
                break
        return False

    def text(self, token_ids: list[int]) -> str:
        """The text of a completion's tokens."""
        return completion_text(self.tokenizer, token_ids, ended=False)


def ending(
    token_ids: list[int], eos_token_ids: Container[int], stops: StopTexts | None
) -> tuple[int, int | None] | None:
    """Where a completion ends, if more may follow there: the number of its tokens, and `Response.past`."""
    for count, token in enumerate(token_ids, 1):
        if token in eos_token_ids:
            return count, None
        if stops is not None and stops.may_end(token) and (past := stops.past(token_ids[:count])) is not None:
            return count, past
    return None


def stop_texts(tokenizer: Any, sampling: Sampling) -> StopTexts | None:
    """What finds the stop texts of `sampling`; None if there are none."""
    texts = sampling.stop_texts
    return StopTexts(tokenizer, texts, sampling.filters.get("min_new_tokens", 0)) if texts else None


class StopCriterion(StoppingCriteria):
    """Ends the rows of transformers' `generate` at a stop text; it is called after each of their tokens."""

    def __init__(self, stops: StopTexts, rows: int):
        self.stops, self.rows = stops, [[] for _ in range(rows)]

    def __call__(self, input_ids: Tensor, scores: Any, **others: Any) -> Tensor:
        for row, token in zip(self.rows, input_ids[:, -1].tolist(), strict=True):
            row.append(token)
        return torch.tensor([self.stops.past(row) is not None for row in self.rows], device=input_ids.device)
