"""A decoding loop in which a finished sequence frees its row at once, for sequences that wait."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from grpo_fast.errors import UserError
from grpo_fast.rollout.base import Response
from grpo_fast.rollout.rows import RowsCache, cache_argument, plain_layers
from grpo_fast.rollout.stops import StopTexts
from grpo_fast.rollout.support import kept_ids
from grpo_fast.rollout.thinking import Thinking, ThinkingBudget
from grpo_kernels import Support

Filters = Callable[[int], Callable[[Tensor, Tensor], Tensor]]

# Numbers of logits: in one step (limits the sequences that are decoded at once), and in one copy of them.
STEP_LOGITS = 1 << 26
CHUNK_LOGITS = 1 << 23
# Prompt tokens that are computed at once.
PREFILL_TOKENS = 4096
# Fewest columns by which the cache grows; if less than LEAST_GROWTH is left, sequences are evicted instead.
GROWTH, LEAST_GROWTH = 64, 16


@dataclass(slots=True, eq=False)
class Sequence:
    """A completion being sampled; those of one prompt have the same `group`, and `place` is its place in the result."""

    place: int
    group: int
    prompt: list[int]
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    kept: list[Tensor] = field(default_factory=list)
    thinking: Thinking | None = None

    @property
    def last(self) -> int:
        """The last token, whose keys and values are not computed yet."""
        return (self.tokens or self.prompt)[-1]

    @property
    def cached(self) -> int:
        """The number of tokens before the last one: the columns that the cache needs."""
        return len(self.prompt) + len(self.tokens) - 1


class Decoder:
    """Samples sequences under a budget of cached tokens.

    As many sequences are decoded together as the budget and :data:`STEP_LOGITS` allow; each row is as wide as the
    widest. A finished sequence frees its row at once. When a quarter of the rows are free, waiting sequences join, and
    each prompt is computed once for all sequences that join with it. When the budget is used up, the shortest
    sequences are evicted and computed again later, so that at least one sequence always continues.

    Args:
        model: a transformers causal LM in eval mode whose cache has plain layers.
        max_tokens: budget of cached tokens (rows times columns); a single sequence may exceed it.
        max_new_tokens: length of the longest completion.
        eos_token_ids: tokens that end a completion.
        filters: returns the logits processors for a prompt length.
        reads_tokens: whether the processors need the tokens of the sequence.
        greedy: take the most likely token.
        stops: finds texts that end a completion.
        budget: closes the thinking.
        keeps_support: responses hold the ids that the processors kept for each token.
    """

    def __init__(
        self, model: nn.Module, max_tokens: int, max_new_tokens: int, eos_token_ids: set[int], filters: Filters,
        reads_tokens: bool, greedy: bool, stops: StopTexts | None = None, budget: ThinkingBudget | None = None,
        keeps_support: bool = False,
    ):  # fmt: skip
        self.model, self.device = model, model.device
        self.max_tokens, self.max_new_tokens, self.eos_token_ids = max_tokens, max_new_tokens, eos_token_ids
        self.filters, self.reads_tokens, self.greedy = filters, reads_tokens, greedy
        self.stops, self.budget, self.keeps_support = stops, budget, keeps_support
        # With `keeps_support`, the ids that were kept for the token of each row.
        self.kept: list[Tensor] = []
        vocab = model.config.get_text_config().vocab_size
        self.max_rows = max(STEP_LOGITS // vocab, 1)
        self.chunk_rows = max(CHUNK_LOGITS // vocab, 1)
        self.cache = RowsCache(plain_layers(model.config))
        self.cache_name, self.prompt_cache_name = cache_argument(model), cache_argument(model.base_model)
        self.live: list[Sequence] = []
        self.width = self.columns = self.most = 0
        self.steps = self.rows_computed = 0

    def __call__(self, prompt_ids: list[list[int]], num_generations: int) -> list[Response]:
        """`num_generations` consecutive responses for every prompt, in the order of the prompts."""
        order = sorted(range(len(prompt_ids)), key=lambda index: -len(prompt_ids[index]))
        self.waiting = deque(
            Sequence(index * num_generations + number, index, prompt_ids[index])
            for index in order
            for number in range(num_generations)
        )
        if self.budget is not None:
            for sequence in self.waiting:
                sequence.thinking = self.budget.begin(sequence.prompt)
        self.responses: list[Response | None] = [None] * len(self.waiting)
        while self.waiting or self.live:
            if self.waiting and len(self.live) <= 0.75 * self.most and (count := self.joining()):
                self.admit([self.waiting.popleft() for _ in range(count)])
            if self.width == self.columns:
                self.grow()
            self.step()
        return self.responses

    def remaining(self, sequences: list[Sequence]) -> int:
        """The number of further columns that `sequences` may need together."""
        longest = max(len(each.prompt) for each in sequences) - 1 + self.max_new_tokens
        return longest - max(each.cached for each in sequences)

    def joining(self) -> int:
        """The number of waiting sequences for which there is room, with half of their width left to grow."""
        width, count = self.width, 0
        for sequence in self.waiting:
            rows, width = len(self.live) + count + 1, max(width, sequence.cached)
            columns = width + min(max(GROWTH, width // 2), self.max_new_tokens)
            if rows > self.max_rows or rows * columns > self.max_tokens:
                break
            count += 1
        return count if self.live else max(count, 1)

    def admit(self, new: list[Sequence]) -> None:
        """Add `new` sequences, computing keys and values once for each prompt.

        Room is made when these are computed, so that finished rows and free columns are not in memory meanwhile.
        """
        sequences = self.live + new
        self.cache.reserve(len(self.live), self.width, self.width)
        shared: dict[tuple, list[Sequence]] = {}
        for sequence in new:
            shared.setdefault((sequence.group, sequence.place if sequence.tokens else None), []).append(sequence)
        # Empty rows come last, when the layers know their shapes.
        together = sorted(shared.values(), key=lambda same: -same[0].cached)
        joining = []
        while together:
            width = together[0][0].cached
            batch = [together.pop(0)]
            while together and (len(batch) + 1) * width <= PREFILL_TOKENS and (together[0][0].cached > 0 or not width):
                batch.append(together.pop(0))
            sources = torch.tensor([line for line, same in enumerate(batch) for _ in same], device=self.device)
            joining.append((self.prefill([same[0] for same in batch]) if width else None, sources))
            self.live += [sequence for same in batch for sequence in same]
        self.width = max(sequence.cached for sequence in sequences)
        self.columns = self.width + self.growth(sequences)
        self.most = len(sequences)
        self.cache.reserve(self.most, self.width, self.columns, joining)

    def prefill(self, sequences: list[Sequence]) -> DynamicCache:
        """Keys and values of all but the last token of each sequence, right-aligned."""
        ids, mask = left_padded([(each.prompt + each.tokens)[:-1] for each in sequences], 0, self.device)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        return self.fill(DynamicCache(config=self.model.config), ids, mask, positions)

    def fill(self, cache: DynamicCache, ids: Tensor, mask: Tensor, positions: Tensor) -> DynamicCache:
        """`cache` with the keys and values of `ids` ``[rows, width]``, computed in parts."""
        columns = max(PREFILL_TOKENS // len(ids), 1)
        for first in range(0, ids.shape[1], columns):
            part = slice(first, first + columns)
            self.model.base_model(
                input_ids=ids[:, part], attention_mask=mask[:, : part.stop], position_ids=positions[:, part],
                use_cache=True, **{self.prompt_cache_name: cache},
            )  # fmt: skip
        return cache

    def growth(self, sequences: list[Sequence]) -> int:
        """The number of columns to reserve beyond the widest of `sequences`, within the budget."""
        width, rows = max(sequence.cached for sequence in sequences), len(sequences)
        wanted = min(max(GROWTH, width // 8), self.remaining(sequences))
        return wanted if rows == 1 else min(wanted, self.max_tokens // rows - width)

    def grow(self) -> None:
        """Reserve more columns; if the budget has none left, evict the shortest sequences."""
        while (growth := self.growth(self.live)) < min(LEAST_GROWTH, self.remaining(self.live)):
            shortest = min(range(len(self.live)), key=lambda row: self.live[row].cached)
            self.waiting.appendleft(self.live[shortest])
            self.drop([shortest])
        self.columns, self.most = self.width + growth, len(self.live)
        self.cache.reserve(self.most, self.width, self.columns)

    def drop(self, rows: list[int]) -> None:
        """Remove `rows`; the last rows move to their places."""
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
        # Columns that are cut off at the front are free again only when the buffers are reallocated.
        self.columns -= self.width - width
        self.width = width

    def step(self) -> None:
        """Sample one token for every row."""
        lengths = [sequence.cached for sequence in self.live]
        ids = torch.tensor([sequence.last for sequence in self.live], device=self.device)[:, None]
        places = torch.tensor(lengths, device=self.device)[:, None]
        mask = None
        if min(lengths) < self.width:
            mask = (torch.arange(self.width + 1, device=self.device) >= self.width - places).long()
        logits = self.model(
            input_ids=ids, attention_mask=mask, position_ids=places, use_cache=True, **{self.cache_name: self.cache}
        ).logits[:, -1]
        self.width += 1
        self.steps += 1
        self.rows_computed += len(self.live)
        tokens, logprobs = self.choose(logits, self.live)
        done = []
        for row, (sequence, token, logprob) in enumerate(zip(self.live, tokens, logprobs, strict=True)):
            kept = self.kept[row] if self.keeps_support else None
            if (response := self.add(sequence, token, logprob, kept)) is not None:
                self.responses[sequence.place] = response
                done.append(row)
        if done:
            self.drop(done)

    def add(self, sequence: Sequence, token: int, logprob: float, kept: Tensor | None = None) -> Response | None:
        """Add a sampled token to its sequence, or the one that is forced instead; the response if that ends it."""
        thinking, past = sequence.thinking, None
        if thinking is not None and (forced := thinking.forced()) is not None:
            token, logprob = forced, 0.0
            kept = None if kept is None else torch.tensor([forced], dtype=torch.int32)
        if kept is not None:
            sequence.kept.append(kept)
        sequence.tokens.append(token)
        sequence.logprobs.append(logprob)
        if thinking is not None:
            thinking.add(sequence.tokens)
        ended = token in self.eos_token_ids
        if not ended and self.stops is not None:
            past = self.stops.past(sequence.tokens)
        if not ended and past is None and len(sequence.tokens) < self.max_new_tokens:
            return None
        reason, mask = "stop" if ended or past is not None else "length", None if thinking is None else thinking.mask
        support = Support.of(sequence.kept) if self.keeps_support else None
        return Response(sequence.tokens, reason, sequence.logprobs, past, mask, support)

    def uniforms(self, sequences: list[Sequence]) -> Tensor | None:
        """The random number in [0, 1) for each sequence's next token ``[rows, 1]`` float64; None leaves it to torch."""
        return None

    def choose(self, logits: Tensor, sequences: list[Sequence]) -> tuple[list[int], list[float]]:
        """A token for each of `sequences` from ``[rows, vocab]``, and its log-probability after the filters."""
        tokens = torch.empty(len(logits), dtype=torch.long, device=self.device)
        logprobs = torch.empty(len(logits), device=self.device)
        self.kept = [torch.empty(0, dtype=torch.int32)] * len(logits)
        for alike in self.alike(sequences):
            for rows in alike.split(self.chunk_rows):
                scores = (logits if len(rows) == len(logits) else logits[rows]).float()
                ids, prompt_length = rows[:, None], 1
                chosen = [sequences[row] for row in rows.tolist()]
                if self.reads_tokens:
                    ids = torch.tensor([sequence.prompt + sequence.tokens for sequence in chosen])
                    ids, prompt_length = ids.to(self.device), len(chosen[0].prompt)
                scores = self.filters(prompt_length)(ids, scores)
                tokens[rows], logprobs[rows] = sample(scores, self.greedy, self.uniforms(chosen))
                if self.keeps_support:
                    for row, kept in zip(rows.tolist(), kept_ids(scores), strict=True):
                        self.kept[row] = kept
        drawn = logprobs.tolist()
        if any(map(math.isnan, drawn)):
            raise not_finite()
        return tokens.tolist(), drawn

    def alike(self, sequences: list[Sequence]) -> list[Tensor]:
        """Rows whose logits can be filtered together: all, or those with equal prompt and completion lengths."""
        groups: dict[tuple[int, int] | None, list[int]] = {}
        for row, sequence in enumerate(sequences):
            key = (len(sequence.prompt), len(sequence.tokens)) if self.reads_tokens else None
            groups.setdefault(key, []).append(row)
        return [torch.tensor(rows, device=self.device) for rows in groups.values()]


def left_padded(rows: list[list[int]], padding: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask ``[rows, width]`` int64, with the tokens at the end of each row."""
    width = max(map(len, rows))
    ids = torch.tensor([[padding] * (width - len(tokens)) + tokens for tokens in rows])
    mask = torch.tensor([[0] * (width - len(tokens)) + [1] * len(tokens) for tokens in rows])
    return ids.to(device), mask.to(device)


def not_finite() -> UserError:
    return UserError("the policy's probabilities are no longer finite; try a smaller learning_rate")


def sample(scores: Tensor, greedy: bool, uniforms: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Sample a token from each row of ``[rows, vocab]`` float32 scores; returns it and its log-probability ``[rows]``.

    It inverts the cumulative probabilities, in float64, at one random number for each row: at `uniforms`, in [0, 1)
    ``[rows, 1]`` float64, or at new ones of torch's default generator.
    """
    logprobs = scores.log_softmax(-1)
    if greedy:
        tokens = scores.argmax(-1, keepdim=True)
    else:
        cumulated = logprobs.exp().cumsum(-1, dtype=torch.float64)
        # In (0, total], so that a token with probability 0 is never chosen.
        drawn = torch.rand_like(cumulated[:, :1]) if uniforms is None else uniforms
        reached = (1 - drawn) * cumulated[:, -1:]
        tokens = torch.searchsorted(cumulated, reached).clamp(max=scores.shape[1] - 1)
    return tokens.squeeze(1), logprobs.gather(1, tokens).squeeze(1)
