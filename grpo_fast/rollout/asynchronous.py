"""A thread that keeps an engine sampling ahead of training, and stops it for syncs of the weights."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import replace
from threading import Condition, Thread

import torch

from grpo_fast.rollout.base import Response, Rollout, Sampling
from grpo_fast.rollout.queue import Answer, Group, GroupQueue
from grpo_fast.rollout.stops import StopTexts, ending

# The most tokens sampled between two points at which the weights may change and new answers may join.
PART_TOKENS = 256


def part_lengths(longest: int) -> tuple[int, int]:
    """Tokens of each part of an answer and of the last one, about equal and at most PART_TOKENS."""
    count = -(-longest // PART_TOKENS)
    part = -(-longest // count)
    return part, longest - (count - 1) * part


class AsyncRollout:
    """Samples the groups of a `GroupQueue` in a thread, each answer in parts.

    Between two parts the weights may change; an answer then continues after its tokens so far, whose keys and values
    the engine computes with the new weights.

    Args:
        engine: samples in another process, while the trainer goes on.
        queue: what to sample; only this object uses it.
        sampling: the run's.
        stops: finds the run's stop texts.
        eos_token_ids: tokens that end a completion.
        seed: of the parts' seeds.
    """

    def __init__(
        self, engine: Rollout, queue: GroupQueue, sampling: Sampling, stops: StopTexts | None,
        eos_token_ids: Container[int], seed: int,
    ):  # fmt: skip
        self.engine, self.queue, self.sampling, self.stops = engine, queue, sampling, stops
        self.eos_token_ids = eos_token_ids
        # A generator for the thread: with torch's default one, the order of draws would be undefined.
        self.seeds = torch.Generator().manual_seed(seed)
        self.part, self.last_part = part_lengths(sampling.max_completion_length)
        self.changed = Condition()
        self.busy = self.stopped = False
        self.holds = 0
        self.error: BaseException | None = None

    def start(self) -> AsyncRollout:
        """Sample in a thread from now on."""
        Thread(target=self._run, daemon=True).start()
        return self

    def take(self, count: int) -> list[Group]:
        """Wait for the next `count` groups.

        Raises:
            UserError: the engine failed.
        """
        with self.changed:
            self.queue.wanted(count)
            self.changed.notify_all()
            while (groups := self.queue.take(count)) is None:
                if self.error is not None:
                    raise self.error
                self.changed.wait()
            return groups

    def hold(self) -> None:
        """Wait for the parts that are being sampled, and leave the engine to others until `release`.

        Raises:
            UserError: the engine failed, and it is not held.
        """
        with self.changed:
            # Before waiting, or the thread could begin one part after another.
            self.holds += 1
            self.changed.wait_for(lambda: not self.busy)
            if self.error is not None:
                self.holds -= 1
                raise self.error

    def release(self) -> None:
        with self.changed:
            self.holds -= 1
            self.changed.notify_all()

    def synced(self) -> None:
        """Call while it is held, after the engine got newer weights."""
        self.queue.synced()

    def close(self) -> None:
        """Sample no further parts."""
        with self.changed:
            self.stopped = True
            self.changed.notify_all()

    def _run(self) -> None:
        try:
            while self.sample_part():
                pass
        except BaseException as error:
            with self.changed:
                self.error, self.busy = error, False
                self.changed.notify_all()

    def sample_part(self) -> bool:
        """Wait for open answers, and sample one part of each; False once it is closed."""
        answers: list[Answer] = []

        def ready() -> bool:
            answers[:] = [] if self.holds or self.stopped else self.queue.open()
            return bool(answers) or self.stopped

        with self.changed:
            self.changed.wait_for(ready)
            if self.stopped:
                return False
            self.busy, version = True, self.queue.version
        last = self.sampling.max_completion_length - self.last_part
        in_last_part = [answer for answer in answers if len(answer.tokens) >= last]
        others = [answer for answer in answers if len(answer.tokens) < last]
        sampled = self._sample(others, self.part) + self._sample(in_last_part, self.last_part)
        with self.changed:
            for answer, response in sampled:
                answer.add(response, version)
                self._end(answer, response)
            self.busy = False
            self.changed.notify_all()
        return True

    def _sample(self, answers: list[Answer], tokens: int) -> list[tuple[Answer, Response]]:
        """The next part of `answers`, at most so many tokens of each."""
        if not answers:
            return []
        seed = int(torch.randint(2**62, (), generator=self.seeds))
        sampling = replace(self.sampling, num_generations=1, max_completion_length=tokens, seed=seed)
        responses = self.engine.generate([answer.context for answer in answers], sampling)
        return list(zip(answers, responses, strict=True))

    def _end(self, answer: Answer, part: Response) -> None:
        """End an answer whose last part ends it; a stop text may have begun in the part before."""
        found = ending(answer.tokens, self.eos_token_ids, self.stops) if self.stops is not None else None
        if found is not None:
            answer.end("stop", found[1], found[0])
        elif part.finish_reason == "stop":
            answer.end("stop", part.past)
        elif len(answer.tokens) >= self.sampling.max_completion_length:
            answer.end("length")
