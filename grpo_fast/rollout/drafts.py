"""Drafts for speculative sampling: what followed the same words in other answers to the same prompt."""

from __future__ import annotations

from array import array
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np

# Longest suffix that is compared. Longer ones say little more about the next token.
MATCH = 8
# Kinds of support for a draft token: one match, or several of which up to a quarter, half, ... or all agree.
KINDS = 6
# Answers that are kept for each prompt, and tokens of all kept answers together (4 bytes each).
KEPT_ANSWERS, KEPT_TOKENS = 16, 1 << 22
# Columns by which the room for the present answers grows at first.
ROOM = 64
NOTHING = -1


class DraftToken(NamedTuple):
    """A draft token, the length of the suffix that it follows (at most MATCH), and the kind of its support."""

    token: int
    match: int
    kind: int


class GroupText:
    """The text in which the drafts of one prompt's completions are looked up: the prompt, its earlier answers, and the
    completions being sampled.

    Args:
        prompt: the prompt's tokens.
        earlier: completions of the same prompt from earlier batches.
        count: number of completions being sampled.
    """

    def __init__(self, prompt: list[int], earlier: Iterable[array], count: int):
        fixed = [NOTHING, *prompt]
        for answer in earlier:
            fixed += [NOTHING, *prompt[-MATCH:], *answer]
        self.fixed, self.count, self.room = len(fixed), count, 0
        # Each completion follows the prompt's end, so that the beginnings of answers match as well.
        self.start = [NOTHING, *prompt[-MATCH:]]
        self.lengths = [len(self.start)] * count
        self.text = np.array(fixed, dtype=np.int32)
        self._grow()

    def _grow(self) -> None:
        """Twice the room for each completion; a row ends with at least one NOTHING."""
        before, self.room = self.room, max(2 * self.room, len(self.start) + ROOM)
        grown = np.full(self.fixed + self.count * self.room + 1, NOTHING, dtype=np.int32)
        grown[: self.fixed] = self.text[: self.fixed]
        rows = grown[self.fixed : -1].reshape(self.count, self.room)
        if before:
            rows[:, :before] = self.text[self.fixed : -1].reshape(self.count, before)
        else:
            rows[:, : len(self.start)] = self.start
        self.text = grown

    def append(self, line: int, token: int) -> None:
        """Add a token to a completion, which is the `line`-th of the prompt's."""
        if self.lengths[line] + 1 >= self.room:
            self._grow()
        self.text[self.fixed + line * self.room + self.lengths[line]] = token
        self.lengths[line] += 1

    def draft(self, line: int, limit: int) -> list[DraftToken]:
        """At most `limit` tokens that may follow in a completion.

        The longest suffix that occurs elsewhere decides; where it occurs several times, the token that follows most
        often is taken, and only the occurrences that agree are followed further.
        """
        text, end = self.text, self.fixed + line * self.room + self.lengths[line] - 1
        found = np.flatnonzero(text[:-1] == text[end])
        found = found[text[found + 1] != NOTHING]
        length = 1
        while len(found) and length < MATCH and (token := text[end - length]) != NOTHING:
            longer = found[text[found - length] == token]
            if not len(longer):
                break
            found, length = longer, length + 1
        draft: list[DraftToken] = []
        while len(found) and len(draft) < limit:
            found = found + 1
            following = text[found]
            open_ends = following != NOTHING
            found, following = found[open_ends], following[open_ends]
            if not len(found):
                break
            token, kind = int(following[-1]), 0
            if len(found) > 1:
                values, counts = np.unique(following, return_counts=True)
                best = counts.argmax()
                token, kind = int(values[best]), 1 + int(4 * counts[best] / len(found))
                found = found[following == token]
            draft.append(DraftToken(token, min(length, MATCH), kind))
            length += 1
        return draft


class Answers:
    """The latest completions of each prompt, at most KEPT_TOKENS tokens in all; prompts unused for longest are
    dropped."""

    def __init__(self):
        self.kept: OrderedDict[bytes, deque[array]] = OrderedDict()
        self.tokens = 0

    def of(self, prompt: list[int]) -> list[array]:
        """The kept completions of a prompt, the latest last."""
        key = array("i", prompt).tobytes()
        if key not in self.kept:
            return []
        self.kept.move_to_end(key)
        return list(self.kept[key])

    def add(self, prompt: list[int], tokens: list[int]) -> None:
        """Keep a completion."""
        key = array("i", prompt).tobytes()
        answers = self.kept.setdefault(key, deque())
        self.kept.move_to_end(key)
        answers.append(array("i", tokens))
        self.tokens += len(tokens)
        while len(answers) > KEPT_ANSWERS:
            self.tokens -= len(answers.popleft())
        while self.tokens > KEPT_TOKENS and len(self.kept) > 1:
            _, gone = self.kept.popitem(last=False)
            self.tokens -= sum(map(len, gone))


class Acceptance:
    """How often draft tokens were what was sampled, by the length of the match and the kind of its support.

    Old counts fade, because the policy changes.
    """

    # Before any data, a token is expected to be accepted one time in four; after FADE tokens the counts are halved.
    PRIOR, PRIOR_TOKENS, FADE = 0.25, 2.0, 512

    def __init__(self):
        self.tried = [[0.0] * KINDS for _ in range(MATCH + 1)]
        self.accepted = [[0.0] * KINDS for _ in range(MATCH + 1)]

    def rate(self, token: DraftToken) -> float:
        """The probability that such a token is accepted, given that those before it were."""
        accepted = self.accepted[token.match][token.kind] + self.PRIOR * self.PRIOR_TOKENS
        return accepted / (self.tried[token.match][token.kind] + self.PRIOR_TOKENS)

    def record(self, token: DraftToken, accepted: bool) -> None:
        tried, right = self.tried[token.match], self.accepted[token.match]
        tried[token.kind] += 1
        right[token.kind] += accepted
        if tried[token.kind] >= self.FADE:
            tried[token.kind] /= 2
            right[token.kind] /= 2

    def best_length(
        self, drafts: list[list[DraftToken]], most: int, cost: Callable[[int], float], margin: float
    ) -> int:  # fmt: skip
        """How many tokens of each draft to verify, at most `most`, so that a step yields the most tokens for its cost.

        `cost` is that of a step by its number of tokens; one of R rows and n draft tokens has R (1 + n), whether all
        drafts are as long or not. A longer step must be better by the share `margin`.
        """
        rows, best = len(drafts), 0
        reached, expected = [1.0] * rows, float(rows)
        best_rate = expected / cost(rows) * (1 + margin)
        for count in range(1, most + 1):
            for row, draft in enumerate(drafts):
                reached[row] *= self.rate(draft[count - 1]) if len(draft) >= count else 0.0
            expected += sum(reached)
            if (rate := expected / cost(rows * (1 + count))) > best_rate:
                best, best_rate = count, rate
        return best
