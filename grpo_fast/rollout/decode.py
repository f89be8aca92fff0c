"""A decoding loop in which a finished sequence costs nothing further, and its room goes to those that wait."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from grpo_fast.errors import UserError
from grpo_fast.rollout.base import Response
from grpo_fast.rollout.rows import RowsCache, cache_argument, plain_layers

Filters = Callable[[int], Callable[[Tensor, Tensor], Tensor]]

# Logits of one step, numbers: they bound the sequences that are decoded at once, and the copies made of them.
STEP_LOGITS = 1 << 26
CHUNK_LOGITS = 1 << 23
# Tokens of prompts that are computed at once.
PREFILL_TOKENS = 4096
# Columns by which the cache grows, at least; and so few that it is better to make room for more.
GROWTH, LEAST_GROWTH = 64, 16


class Sequence:
    """A completion on its way; those of one prompt have the same `group`.

    `last` is its last token, and `cached` the number of those before, whose keys and values are needed for the next.
    """

    __slots__ = ("cached", "group", "last", "logprobs", "place", "prompt", "tokens")

    def __init__(self, place: int, group: int, prompt: list[int]):
        self.place, self.group, self.prompt = place, group, prompt
        self.cached, self.last = len(prompt) - 1, prompt[-1]
        self.tokens: list[int] = []
        self.logprobs: list[float] = []


class Decoder:
    """Samples sequences under a budget of cached tokens.

    As many sequences are decoded side by side as the budget and :data:`STEP_LOGITS` allow, each as wide as the widest
    of them. A finished one gives its row up at once. When a quarter of the rows are free, waiting sequences join, a
    prompt being computed once for all that join with it. When the budget is used up, the shortest sequences give way
    and are computed again once there is room, so that one sequence at least always goes on.

    Args:
        model: a transformers causal LM in eval mode, whose cache has plain layers.
        max_tokens: cached tokens, rows times columns; one sequence may exceed it.
        max_new_tokens: longest completion.
        eos_token_ids: tokens that end one.
        filters: the logits processors for a prompt of so many tokens.
        reads_tokens: they need the sequence's tokens.
        greedy: take the likeliest token.
    """

    def __init__(
        self, model: nn.Module, max_tokens: int, max_new_tokens: int, eos_token_ids: set[int], filters: Filters,
        reads_tokens: bool, greedy: bool,
    ):  # fmt: skip
        self.model, self.device = model, model.device
        self.max_tokens, self.max_new_tokens, self.eos_token_ids = max_tokens, max_new_tokens, eos_token_ids
        self.filters, self.reads_tokens, self.greedy = filters, reads_tokens, greedy
        vocab = model.config.get_text_config().vocab_size
        self.max_rows = max(STEP_LOGITS // vocab, 1)
        self.chunk_rows = max(CHUNK_LOGITS // vocab, 1)
        self.cache = RowsCache(plain_layers(model.config))
        self.cache_name, self.prompt_cache_name = cache_argument(model), cache_argument(model.base_model)
        self.live: list[Sequence] = []
        self.width = self.columns = self.most = 0
        self.steps = self.rows_computed = 0

    def __call__(self, prompt_ids: list[list[int]], num_generations: int) -> list[Response]:
        """Responses to every prompt, `num_generations` side by side, in the order of the prompts."""
        order = sorted(range(len(prompt_ids)), key=lambda index: -len(prompt_ids[index]))
        self.waiting = deque(
            Sequence(index * num_generations + number, index, prompt_ids[index])
            for index in order
            for number in range(num_generations)
        )
        self.responses: list[Response | None] = [None] * len(self.waiting)
        while self.waiting or self.live:
            if self.waiting and len(self.live) <= 0.75 * self.most and (count := self.joining()):
                self.admit([self.waiting.popleft() for _ in range(count)])
            if self.width == self.columns:
                self.grow()
            self.step()
        return self.responses

    def remaining(self, sequences: list[Sequence]) -> int:
        """Columns that the widest may still need."""
        return max(s.cached + self.max_new_tokens - len(s.tokens) for s in sequences) - max(s.cached for s in sequences)

    def joining(self) -> int:
        """How many waiting sequences have room, and can then grow by half."""
        width, count = self.width, 0
        for sequence in self.waiting:
            rows, width = len(self.live) + count + 1, max(width, sequence.cached)
            columns = width + min(max(GROWTH, width // 2), self.max_new_tokens)
            if rows > self.max_rows or rows * columns > self.max_tokens:
                break
            count += 1
        return count if self.live else max(count, 1)

    def admit(self, new: list[Sequence]) -> None:
        """Compute the keys and values of `new` sequences, those of a common prompt once, and let them join."""
        sequences = self.live + new
        self.width = max(sequence.cached for sequence in sequences)
        self.columns = self.width + self.growth(sequences)
        self.most = len(sequences)
        self.cache.reserve(self.most, self.width, self.columns)
        shared: dict[tuple, list[Sequence]] = {}
        for sequence in new:
            shared.setdefault((sequence.group, sequence.place if sequence.tokens else None), []).append(sequence)
        # Empty rows come last: the layers know their shapes by then.
        together = sorted(shared.values(), key=lambda same: -same[0].cached)
        while together:
            width = together[0][0].cached
            batch = [together.pop(0)]
            while together and (len(batch) + 1) * width <= PREFILL_TOKENS and (together[0][0].cached > 0 or not width):
                batch.append(together.pop(0))
            sources = torch.tensor([line for line, same in enumerate(batch) for _ in same], device=self.device)
            self.cache.join(self.prefill([same[0] for same in batch], width) if width else None, sources)
            self.live += [sequence for same in batch for sequence in same]

    def prefill(self, sequences: list[Sequence], width: int) -> DynamicCache:
        """Keys and values of all but the last token of each sequence, right-aligned in `width` columns."""
        ids = torch.zeros(len(sequences), width, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for line, sequence in enumerate(sequences):
            first = width - sequence.cached
            ids[line, first:] = torch.tensor((sequence.prompt + sequence.tokens)[:-1])
            mask[line, first:] = 1
        positions = (mask.cumsum(1) - 1).clamp(min=0).to(self.device)
        ids, mask = ids.to(self.device), mask.to(self.device)
        cache = DynamicCache(config=self.model.config)
        columns = max(PREFILL_TOKENS // len(sequences), 1)
        for first in range(0, width, columns):
            part = slice(first, first + columns)
            self.model.base_model(
                input_ids=ids[:, part], attention_mask=mask[:, : part.stop], position_ids=positions[:, part],
                use_cache=True, **{self.prompt_cache_name: cache},
            )  # fmt: skip
        return cache

    def growth(self, sequences: list[Sequence]) -> int:
        """Columns to reserve beyond the widest of `sequences`, within the budget."""
        width, rows = max(sequence.cached for sequence in sequences), len(sequences)
        wanted = min(max(GROWTH, width // 8), self.remaining(sequences))
        return wanted if rows == 1 else min(wanted, self.max_tokens // rows - width)

    def grow(self) -> None:
        """More columns; where the budget has none, the shortest sequences give way."""
        while (growth := self.growth(self.live)) < min(LEAST_GROWTH, self.remaining(self.live)):
            shortest = min(range(len(self.live)), key=lambda row: self.live[row].cached)
            self.waiting.appendleft(self.live[shortest])
            self.drop([shortest])
        self.columns, self.most = self.width + growth, len(self.live)
        self.cache.reserve(self.most, self.width, self.columns)

    def drop(self, rows: list[int]) -> None:
        """Take rows away; the last ones move to their places."""
        count = len(self.live) - len(rows)
        gone = set(rows)
        sources = [row for row in range(count, len(self.live)) if row not in gone]
        places = [row for row in rows if row < count]
        for place, source in zip(places, sources, strict=True):
            self.live[place] = self.live[source]
        del self.live[count:]
        width = max((sequence.cached for sequence in self.live), default=0)
        self.cache.move(
            torch.tensor(places, dtype=torch.long, device=self.device),
            torch.tensor(sources, dtype=torch.long, device=self.device), count, width,
        )  # fmt: skip
        # The columns that are cut off at the front are not given back before the buffers are made anew.
        self.columns -= self.width - width
        self.width = width

    def step(self) -> None:
        """One more token for every row."""
        lengths = [sequence.cached for sequence in self.live]
        ids = torch.tensor([sequence.last for sequence in self.live], device=self.device)[:, None]
        positions = torch.tensor(lengths, device=self.device)[:, None]
        mask = None
        if min(lengths) < self.width:
            mask = (torch.arange(self.width + 1, device=self.device) >= self.width - positions).long()
        logits = self.model(
            input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=True, **{self.cache_name: self.cache}
        ).logits[:, -1]
        self.width += 1
        self.steps += 1
        self.rows_computed += len(self.live)
        tokens, logprobs = self.choose(logits)
        done = []
        for row, (sequence, token, logprob) in enumerate(zip(self.live, tokens, logprobs, strict=True)):
            sequence.tokens.append(token)
            sequence.logprobs.append(logprob)
            sequence.last = token
            sequence.cached += 1
            if token in self.eos_token_ids or len(sequence.tokens) == self.max_new_tokens:
                reason = "stop" if token in self.eos_token_ids else "length"
                self.responses[sequence.place] = Response(sequence.tokens, reason, sequence.logprobs)
                done.append(row)
        if done:
            self.drop(done)

    def choose(self, logits: Tensor) -> tuple[list[int], list[float]]:
        """A token for every row of ``[rows, vocab]``, and their log-probabilities after the filters."""
        tokens = torch.empty(len(logits), dtype=torch.long, device=self.device)
        logprobs = torch.empty(len(logits), device=self.device)
        for alike in self.alike():
            for rows in alike.split(self.chunk_rows):
                scores = (logits if len(rows) == len(logits) else logits[rows]).float()
                tokens[rows], logprobs[rows] = sample(self.filtered(rows, scores), self.greedy)
        drawn = logprobs.tolist()
        if any(map(math.isnan, drawn)):
            raise not_finite()
        return tokens.tolist(), drawn

    def alike(self) -> list[Tensor]:
        """Rows whose logits can be filtered together: all, or those of equal prompt and completion length."""
        if not self.reads_tokens:
            return [torch.arange(len(self.live), device=self.device)]
        groups: dict[tuple[int, int], list[int]] = {}
        for row, sequence in enumerate(self.live):
            groups.setdefault((len(sequence.prompt), len(sequence.tokens)), []).append(row)
        return [torch.tensor(rows, device=self.device) for rows in groups.values()]

    def filtered(self, rows: Tensor, scores: Tensor) -> Tensor:
        if not self.reads_tokens:
            return self.filters(1)(rows[:, None], scores)
        sequences = [self.live[row] for row in rows.tolist()]
        ids = torch.tensor([sequence.prompt + sequence.tokens for sequence in sequences], device=self.device)
        return self.filters(len(sequences[0].prompt))(ids, scores)


def not_finite() -> UserError:
    return UserError("the policy's probabilities are not finite any more; try a smaller learning_rate")


def sample(scores: Tensor, greedy: bool) -> tuple[Tensor, Tensor]:
    """A token of each row of ``[rows, vocab]`` float32 scores, and its log-probability: ``[rows]`` each.

    The token is where the cumulated probabilities, in float64, reach a random number, which needs one of them a row.
    """
    logprobs = scores.log_softmax(-1)
    if greedy:
        tokens = scores.argmax(-1, keepdim=True)
    else:
        cumulated = logprobs.exp().cumsum(-1, dtype=torch.float64)
        # In (0, total]: a token without probability is never where that is first reached.
        reached = (1 - torch.rand_like(cumulated[:, :1])) * cumulated[:, -1:]
        tokens = torch.searchsorted(cumulated, reached).clamp(max=scores.shape[1] - 1)
    return tokens.squeeze(1), logprobs.gather(1, tokens).squeeze(1)
