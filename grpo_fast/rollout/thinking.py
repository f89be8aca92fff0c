"""A budget of tokens for thinking: ``</think>`` is forced where a completion has used it up within ``<think>``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor

from grpo_fast.errors import UserError
from grpo_fast.rollout.stops import StopTexts

OPEN, CLOSE = "<think>", "</think>"


class ThinkingBudget:
    """Closes the thinking of completions after `budget` tokens of it.

    Thinking begins with ``<think>``, in the completion or at the end of the prompt, and ends with ``</think>``. Its
    tokens are those of the completion after the one that completes ``<think>``. If the `budget` tokens do not complete
    ``</think>``, the tokens of that text follow, and sampling goes on behind them. Every ``<think>`` has its budget.

    Args:
        tokenizer: the completions' tokenizer.
        budget: tokens, at least 0.

    Raises:
        UserError: the tokenizer's tokens of ``</think>`` are another text.
    """

    def __init__(self, tokenizer: Any, budget: int):
        self.tokenizer, self.budget = tokenizer, budget
        self.tags = StopTexts(tokenizer, (OPEN, CLOSE))
        self.closing = tokenizer(CLOSE, add_special_tokens=False)["input_ids"]
        if self.tags.past(self.closing) != 0:
            raise UserError(f"thinking_budget is not possible: the tokenizer cannot write {CLOSE!r}")

    def begin(self, prompt_ids: list[int]) -> Thinking:
        """The state of a completion of this prompt, before its first token."""
        text = self.tokenizer.decode(prompt_ids, skip_special_tokens=False)
        return Thinking(self, text.rfind(OPEN) > text.rfind(CLOSE))


class Thinking:
    """Where one completion is: `left` tokens of thinking may be sampled (None outside of it).

    `mask` is False for the tokens that were forced.
    """

    def __init__(self, rule: ThinkingBudget, thinks: bool):
        self.rule, self.left = rule, rule.budget if thinks else None
        self.closed = 0
        self.mask: list[bool] = []

    def forced(self) -> int | None:
        """The token that must come next; None if it is sampled."""
        return self.rule.closing[self.closed] if self.left == 0 else None

    def add(self, token_ids: list[int]) -> None:
        """Take note of the last of the completion's `token_ids`."""
        self.mask.append(self.left != 0)
        if self.left == 0:
            self.closed += 1
            if self.closed == len(self.rule.closing):
                self.left, self.closed = None, 0
        elif (past := self.rule.tags.past(token_ids)) is None:
            self.left = None if self.left is None else self.left - 1
        else:
            text = self.rule.tags.text(token_ids)
            self.left = self.rule.budget if text[: len(text) - past].endswith(OPEN) else None


class ForcedTokens(LogitsProcessor):
    """Closes the thinking in transformers' `generate`: a forced token is the only one that is left.

    Args:
        states: one for each row.
    """

    def __init__(self, states: list[Thinking]):
        self.states, self.rows = states, [[] for _ in states]
        self.started = False

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self.started:
            self.add(input_ids)
        self.started = True
        forced = [(row, token) for row, state in enumerate(self.states) if (token := state.forced()) is not None]
        if not forced:
            return scores
        rows, tokens = torch.tensor(forced, device=scores.device).T
        scores = scores.clone()
        scores[rows] = -torch.inf
        scores[rows, tokens] = 0.0
        return scores

    def add(self, input_ids: Tensor) -> None:
        """Take note of the last column of the ids ``[rows, tokens]``."""
        for state, row, token in zip(self.states, self.rows, input_ids[:, -1].tolist(), strict=True):
            row.append(token)
            state.add(row)
