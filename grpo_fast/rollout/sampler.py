"""The trainer's sampler: it keeps an engine in sync with the weights, and asleep while they are trained."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import replace
from threading import Thread
from typing import Any

import torch
from torch import nn

from grpo_fast.distributed.processes import is_main, new_group, on_main
from grpo_fast.rollout.asynchronous import AsyncRollout
from grpo_fast.rollout.base import Response, Rollout, Sampling, eos_token_ids
from grpo_fast.rollout.dealt import DealtRollout
from grpo_fast.rollout.probe import Probe, Score
from grpo_fast.rollout.queue import Group, GroupQueue
from grpo_fast.rollout.stops import stop_texts


class Sampler:
    """Samples from the current weights of `model`, through an engine that may have a copy of them.

    After the weights have changed, the engine is woken, synced and probed before it samples again.

    Args:
        engine: the sampling engine.
        model: the trained model.
        probe: compares the engine's log-probabilities with the trainer's after a sync.
        score: the trainer's log-probabilities of a completion; see `probe.Score`.
    """

    def __init__(self, engine: Rollout, model: nn.Module, probe: Probe, score: Score):
        self.engine, self.model, self.probe, self.score = engine, model, probe, score
        self.stale, self.asleep = engine.copies_weights, False
        self.ahead: Future | None = None
        # With a queue, the first process samples from it; `version` counts the syncs since it began.
        self.queued, self.version = False, 0
        self.stream: AsyncRollout | None = None

    def check(self, prompt_ids: list[int], sampling: Sampling) -> None:
        with self.free_engine():
            self.refresh()
            self.engine.check(prompt_ids, sampling)

    def generate(self, prompt_ids: list[list[int]], sampling: Sampling) -> list[Response]:
        with self.free_engine():
            self.refresh()
            return self.engine.generate(prompt_ids, sampling)

    def begin(
        self, prompts: Iterator[tuple[int, list[int]]], sampling: Sampling, tokenizer: Any, max_staleness: int,
        per_step: int, batches: int,
    ):  # fmt: skip
        """Begin to sample ahead in a thread; the arguments are those of `GroupQueue`."""
        self.refresh()
        self.queued, self.version, self.group = True, 0, new_group()
        # Every process draws it, so that their generators stay in the same state.
        seed = int(torch.randint(2**62, ()))

        def start() -> None:
            engine = self.engine.engine if isinstance(self.engine, DealtRollout) else self.engine
            queue = GroupQueue(prompts, sampling.num_generations, max_staleness, per_step, batches)
            stops = stop_texts(tokenizer, sampling)
            ends = eos_token_ids(self.model, tokenizer)
            self.stream = AsyncRollout(engine, queue, sampling, stops, ends, seed).start()

        on_main(start, self.group)

    def take(self, count: int) -> list[Group]:
        """Wait for the next `count` groups of the queue that `begin` began; they are the same in every process.

        Raises:
            UserError: the engine failed.
        """
        if self.stale:
            with self.free_engine():
                self.refresh()
        return on_main(lambda: self.stream.take(count), self.group)

    @contextmanager
    def free_engine(self) -> Iterator[None]:
        """A context in which the engine does not sample ahead."""
        if not self.queued:
            yield
            return
        on_main(lambda: self.stream.hold(), self.group)
        try:
            yield
        finally:
            if is_main():
                self.stream.release()

    def start(self, prompt_ids: list[list[int]], sampling: Sampling) -> None:
        """Start sampling from the current weights in a thread, while the trainer goes on."""
        self.refresh()
        if sampling.seed is None:
            # Drawn in this thread: from another one, the order of draws would be undefined.
            sampling = replace(sampling, seed=int(torch.randint(2**31, ())))
        self.ahead = Future()
        Thread(target=_fulfil, args=(self.ahead, self.engine, prompt_ids, sampling), daemon=True).start()

    def finish(self) -> list[Response] | None:
        """Wait for the responses of :meth:`start` (None if it was not called), and raise the error if it failed."""
        ahead, self.ahead = self.ahead, None
        return ahead and ahead.result()

    def refresh(self) -> None:
        """Update and probe the engine if the weights have changed."""
        if self.ahead is not None:
            # Wait: weights must not change while they are sampled from. `finish` returns the result or raises.
            self.ahead.exception()
        if self.asleep:
            self.engine.wake()
            self.asleep = False
        if self.stale:
            self.engine.sync(self.model)
            self.probe.check(self.engine, self.score)
            self.stale = False
            if self.queued:
                self.version += 1
                if self.stream is not None:
                    self.stream.synced()

    def weights_change(self) -> None:
        """Call before training: marks the engine's copy as stale, and puts an engine in this process to sleep."""
        self.stale = self.engine.copies_weights
        if not self.asleep and not self.engine.separate:
            self.engine.sleep()
            self.asleep = True

    def close(self) -> None:
        if self.stream is not None:
            self.stream.close()
        self.engine.close()


def _fulfil(future: Future, engine: Rollout, prompt_ids: list[list[int]], sampling: Sampling) -> None:
    try:
        future.set_result(engine.generate(prompt_ids, sampling))
    except BaseException as error:
        future.set_exception(error)
