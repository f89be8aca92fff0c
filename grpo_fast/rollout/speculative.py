"""Speculative sampling without loss: tokens drafted from other answers to the prompt, verified several in one forward.

Every token is sampled from the policy's distribution given the tokens before it, with a random number that depends on
its completion and position, whether it was drafted or not. A draft token that equals the sampled one saves a step, and
a wrong one ends the row's part in the step, so the tokens are those of the plain decoder with the same random numbers.
A wrong draft is rejected with the same probability as in the usual scheme (Leviathan et al., arXiv 2211.17192), because
here the draft's distribution puts all probability on its token.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from transformers import DynamicCache

from grpo_fast.errors import UserError
from grpo_fast.model.attention import PREFIX
from grpo_fast.rollout.base import Response
from grpo_fast.rollout.decode import Decoder, Sequence
from grpo_fast.rollout.drafts import Acceptance, Answers, DraftToken, GroupText
from grpo_fast.rollout.rows import plain_layers
from grpo_fast.rollout.slots import SlotsCache

# A step costs as much as this many tokens, plus one for each token of each row: the time to read the weights, in units
# of a token's arithmetic. Measured on a CPU: 14 with one thread and 28 with two. A GPU's number is a low guess.
FIXED_TOKENS_PER_THREAD, COUNTED_THREADS, FIXED_TOKENS_ELSEWHERE = 12.0, 4, 128.0
# On a CPU, a step of a single token multiplies matrices by a vector, in this share of the time of one with two tokens.
LONE_TOKEN = 0.6
# The share by which a step with drafts must be expected to be better.
MARGIN = 0.1
# Most steps without drafts after one in which they would not have paid.
LONGEST_REST = 3


class Speculation:
    """What is kept from one call of the decoder to the next: earlier answers, acceptance rates, and counts.

    Args:
        limit: most draft tokens for each row and step.
    """

    def __init__(self, limit: int):
        self.limit, self.answers, self.acceptance = limit, Answers(), Acceptance()
        self.drafted = self.accepted = self.tokens = self.row_steps = 0

    def take_figures(self) -> dict[str, float]:
        """The share of the verified draft tokens that were accepted, and the tokens per row and step, since last time.

        Empty if nothing was sampled.
        """
        if not self.row_steps:
            return {}
        figures = {
            "speculative/acceptance_rate": self.accepted / max(self.drafted, 1),
            "speculative/tokens_per_step": self.tokens / self.row_steps,
        }
        self.drafted = self.accepted = self.tokens = self.row_steps = 0
        return figures


def step_cost(device: torch.device) -> Callable[[int], float]:
    """What a step costs by its number of tokens, in units of a further token."""
    if device.type != "cpu":
        return lambda tokens: FIXED_TOKENS_ELSEWHERE + tokens
    fixed = FIXED_TOKENS_PER_THREAD * min(torch.get_num_threads(), COUNTED_THREADS)
    return lambda tokens: fixed + tokens if tokens > 1 else LONE_TOKEN * (fixed + 2)


def attention_of(model: nn.Module) -> str:
    """The name of the model's own attention function."""
    return (model.config.get_text_config()._attn_implementation or "").removeprefix(PREFIX)


def check_speculation(model: nn.Module, limit: int, not_continuous: str | None) -> None:
    """Refuse speculative sampling for a model that it cannot sample; `not_continuous` says why rows cannot join.

    Raises:
        UserError: it says why.
    """
    reason = not_continuous
    if reason is None and attention_of(model) not in ("sdpa", "eager"):
        reason = f"attn_implementation={attention_of(model)!r} takes no mask for each row; set sdpa or eager"
    if reason is not None:
        raise UserError(f"speculative_tokens={limit} is not possible with {type(model).__name__}, because {reason}")


class SpeculativeDecoder(Decoder):
    """A decoder whose steps verify drafts; the arguments are those of :class:`Decoder`, after `speculation`."""

    def __init__(self, speculation: Speculation, *arguments):
        super().__init__(*arguments)
        self.speculation = speculation
        windows = [getattr(layer, "sliding_window", None) for layer in plain_layers(self.model.config)]
        self.cache = SlotsCache(windows, attention_of(self.model) == "eager")
        self.cost = step_cost(self.device)
        self.groups: dict[int, GroupText] = {}
        self.streams: dict[int, np.random.Generator] = {}
        self.rest = self.resting = 0

    def __call__(self, prompt_ids: list[list[int]], num_generations: int) -> list[Response]:
        self.num_generations = num_generations
        # Drawn from torch's default generator, like the random numbers of the plain decoder.
        self.seed = int(torch.randint(2**62, ()))
        responses = super().__call__(prompt_ids, num_generations)
        for place, response in enumerate(responses):
            self.speculation.answers.add(prompt_ids[place // num_generations], response.token_ids)
        return responses

    def uniforms(self, sequences: list[Sequence]) -> Tensor:
        drawn = [[self.stream(each.place).random()] for each in sequences]
        return torch.tensor(drawn, dtype=torch.float64, device=self.device)

    def stream(self, place: int) -> np.random.Generator:
        """The random numbers of a completion, one for each token; they do not depend on the drafts."""
        if place not in self.streams:
            self.streams[place] = np.random.Generator(np.random.Philox(key=[self.seed, place]))
        return self.streams[place]

    def prefill(self, sequences: list[Sequence]) -> DynamicCache:
        """Keys and values of all but the last token of each sequence, from the first column on."""
        rows = [(each.prompt + each.tokens)[:-1] for each in sequences]
        width = max(map(len, rows))
        ids = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=self.device)
        positions = torch.arange(width, device=self.device).expand_as(ids)
        # Without a configuration, layers with a sliding window keep all columns; the model still masks them.
        return self.fill(DynamicCache(), ids, torch.ones_like(ids), positions)

    def drop(self, rows: list[int]) -> None:
        columns = self.columns
        super().drop(rows)
        # Columns beyond the widest row stay free.
        self.columns = columns

    def step(self) -> None:
        """Sample one token for every row, and more as long as they match its draft."""
        drafts = self.drafts()
        count = 1 + self.draft_length(drafts)
        begin = torch.tensor([sequence.cached for sequence in self.live], device=self.device)
        columns = begin[:, None] + torch.arange(count, device=self.device)
        ids = torch.tensor(
            [
                [sequence.last, *(each.token for each in draft[: count - 1]), *[0] * (count - 1 - len(draft))]
                for sequence, draft in zip(self.live, drafts, strict=True)
            ],
            device=self.device,
        )
        self.cache.begin(columns, self.width + count)
        level = count == 1 and min(sequence.cached for sequence in self.live) == self.width
        mask = None if level and set(self.cache.windows) == {None} else self.cache.mask(self.model.dtype)
        logits = self.model(
            input_ids=ids, attention_mask=mask, position_ids=columns, use_cache=True, **{self.cache_name: self.cache}
        ).logits
        self.steps += 1
        self.rows_computed += len(self.live)
        done = self.sample_rows(logits, drafts)
        self.width = max(sequence.cached for sequence in self.live)
        if done:
            self.drop(done)

    def sample_rows(self, logits: Tensor, drafts: list[list[DraftToken]]) -> list[int]:
        """Sample from ``[rows, tokens, vocab]`` as far as the drafts are right; returns the rows that are finished."""
        self.speculation.row_steps += len(self.live)
        rows, done = list(range(len(self.live))), []
        for place in range(logits.shape[1]):
            sequences = [self.live[row] for row in rows]
            scores = logits[:, place] if len(rows) == len(self.live) else logits[rows, place]
            chosen = zip(rows, sequences, *self.choose(scores, sequences), self.kept, strict=True)
            rows = []
            for row, sequence, token, logprob, kept in chosen:
                response = self.add(sequence, token, logprob, kept if self.keeps_support else None)
                self.extend_text(sequence)
                right = self.check_draft(sequence, drafts[row][place : place + 1], verified=place + 1 < logits.shape[1])
                if response is not None:
                    self.responses[sequence.place] = response
                    done.append(row)
                elif right:
                    rows.append(row)
            if not rows:
                break
        return sorted(done)

    def check_draft(self, sequence: Sequence, draft: list[DraftToken], verified: bool) -> bool:
        """Compare a row's last token with its draft; returns whether the row continues in this step."""
        self.speculation.tokens += 1
        if not draft:
            return False
        right = draft[0].token == sequence.tokens[-1]
        self.speculation.acceptance.record(draft[0], right)
        if verified:
            self.speculation.drafted += 1
            self.speculation.accepted += right
        return right and verified

    def extend_text(self, sequence: Sequence) -> None:
        """Add a sequence's last token to the text of its group."""
        self.text(sequence).append(sequence.place % self.num_generations, sequence.tokens[-1])

    def text(self, sequence: Sequence) -> GroupText:
        """The text for a sequence's drafts."""
        if sequence.group not in self.groups:
            earlier = self.speculation.answers.of(sequence.prompt)
            self.groups[sequence.group] = GroupText(sequence.prompt, earlier, self.num_generations)
        return self.groups[sequence.group]

    def drafts(self) -> list[list[DraftToken]]:
        """A draft for every row, or none while they would not pay."""
        if self.resting:
            self.resting -= 1
            return [[] for _ in self.live]
        return [
            self.text(sequence).draft(sequence.place % self.num_generations, limit)
            for sequence in self.live
            for limit in [max(min(self.speculation.limit, self.max_new_tokens - len(sequence.tokens) - 1), 0)]
        ]

    def draft_length(self, drafts: list[list[DraftToken]]) -> int:
        """How many tokens of each draft this step verifies."""
        if not any(drafts):
            return 0
        most = min(max(map(len, drafts)), self.columns - self.width - 1, self.max_rows // len(self.live) - 1)
        count = self.speculation.acceptance.best_length(drafts, most, self.cost, MARGIN)
        self.rest = 0 if count else min(2 * self.rest + 1, LONGEST_REST)
        self.resting = self.rest
        return count
