"""Prompts that are sampled ahead of training, in their order and at most `max_staleness` syncs of the weights early.

This module only plans what is sampled and when it may be trained on, without an engine, threads or a clock.
`rollout.asynchronous` drives it with an engine, and ``benchmarks.staleness`` with a clock of its own.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from grpo_fast.rollout.base import Response
from grpo_kernels import Support


@dataclass(slots=True, eq=False)
class Answer:
    """A completion being sampled in parts; `versions` are those of the weights that drew each token."""

    prompt: list[int]
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    # Of the parts, if responses say which tokens the filters kept.
    supports: list[Support] = field(default_factory=list)
    response: Response | None = None

    @property
    def context(self) -> list[int]:
        """What the next part follows."""
        return self.prompt + self.tokens

    def add(self, part: Response, version: int) -> None:
        """Add the tokens that weights of this `version` sampled."""
        self.tokens += part.token_ids
        self.logprobs += part.logprobs or []
        self.versions += [version] * len(part.token_ids)
        if part.support is not None:
            self.supports.append(part.support)

    def end(self, reason: str, past: int | None = None, count: int | None = None) -> None:
        """The completion is its first `count` tokens (default: all)."""
        tokens, support = self.tokens[:count], None
        if self.supports:
            support = Support.joined(self.supports).take(torch.arange(len(tokens)))
        self.response = Response(
            tokens, reason, self.logprobs[:count], past, support=support, versions=self.versions[:count]
        )


@dataclass(slots=True, eq=False)
class Group:
    """The answers to one prompt, which is a training row."""

    row: int
    answers: list[Answer]

    @property
    def finished(self) -> bool:
        return all(answer.response is not None for answer in self.answers)


class GroupQueue:
    """Groups in the order of their prompts, from which batches are taken in the same order.

    Answers are never thrown away, and short ones never overtake long ones. With `per_step` groups for each sync of the
    weights, a group may begin once at most `max_staleness` further batches have to be trained before its own. So its
    oldest token is at most that many versions older than the weights that it trains.

    Args:
        prompts: the training rows and their prompts, endless.
        num_generations: answers to each prompt.
        max_staleness: syncs.
        per_step: groups of a batch; more may be taken.
        batches: batches until the end of the run; nothing is begun for others.
    """

    def __init__(
        self, prompts: Iterator[tuple[int, list[int]]], num_generations: int, max_staleness: int, per_step: int,
        batches: int,
    ):  # fmt: skip
        self.prompts, self.num_generations, self.per_step = prompts, num_generations, per_step
        self.ahead, self.batches = max_staleness + 1, batches
        self.groups: deque[Group] = deque()
        self.version = self.begun = self.taken = 0
        # How many groups may have begun.
        self.limit = 0
        self._raise_limit()

    def _raise_limit(self) -> None:
        self.limit = max(self.limit, self.taken + min(self.ahead, self.batches) * self.per_step)

    def open(self) -> list[Answer]:
        """The answers to sample now, the oldest first; begins groups as far as the staleness allows."""
        while self.begun < self.limit:
            self._begin()
        return [answer for group in self.groups for answer in group.answers if answer.response is None]

    def _begin(self) -> None:
        row, prompt = next(self.prompts)
        self.groups.append(Group(row, [Answer(prompt) for _ in range(self.num_generations)]))
        self.begun += 1

    def wanted(self, count: int) -> None:
        """Let at least the next `count` groups begin: a batch may need more than `per_step`."""
        self.limit = max(self.limit, self.taken + count)

    def take(self, count: int) -> list[Group] | None:
        """The next `count` groups; None if they are not finished."""
        first = [group for group, _ in zip(self.groups, range(count), strict=False)]
        if len(first) < count or not all(group.finished for group in first):
            return None
        self.taken += count
        return [self.groups.popleft() for _ in first]

    def synced(self) -> None:
        """Sampling goes on with newer weights, after a batch was trained."""
        self.version += 1
        self.batches -= 1
        self._raise_limit()
