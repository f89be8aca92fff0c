"""The trainer's sampler: an engine that always has the present weights, and sleeps while they are trained."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from threading import Thread

import torch
from torch import Tensor, nn

from grpo_fast.rollout.base import Response, Rollout, Sampling
from grpo_fast.rollout.probe import Probe


class Sampler:
    """Samples from `model` as it is, through an engine that may have a copy of it.

    Whenever the weights have changed, the engine is woken, synced and probed before it samples again.

    Args:
        engine: what samples.
        model: the trained model.
        probe: compares the engine's log-probabilities with the trainer's after a sync.
        score: the trainer's log-probabilities of a completion, given the ids of its prompt and its own.
    """

    def __init__(
        self, engine: Rollout, model: nn.Module, probe: Probe, score: Callable[[list[int], list[int]], Tensor]
    ):
        self.engine, self.model, self.probe, self.score = engine, model, probe, score
        self.stale, self.asleep = engine.copies_weights, False
        self.ahead: Future | None = None

    def check(self, prompt_ids: list[int], sampling: Sampling) -> None:
        self.refresh()
        self.engine.check(prompt_ids, sampling)

    def generate(self, prompt_ids: list[list[int]], sampling: Sampling) -> list[Response]:
        self.refresh()
        return self.engine.generate(prompt_ids, sampling)

    def start(self, prompt_ids: list[list[int]], sampling: Sampling) -> None:
        """Begin to sample beside what the trainer does next, from the weights as they are now."""
        self.refresh()
        if sampling.seed is None:
            # Here, since the order of draws in another thread would be chance.
            sampling = replace(sampling, seed=int(torch.randint(2**31, ())))
        self.ahead = Future()
        Thread(target=_fulfil, args=(self.ahead, self.engine, prompt_ids, sampling), daemon=True).start()

    def finish(self) -> list[Response] | None:
        """The responses that :meth:`start` began, None if it did not; what failed there is raised here."""
        ahead, self.ahead = self.ahead, None
        return ahead and ahead.result()

    def refresh(self) -> None:
        """Give the engine the present weights, if they have changed, and prove that it has them."""
        if self.ahead is not None:
            # Weights must not change under what is being sampled; its result, or failure, is kept for `finish`.
            self.ahead.exception()
        if self.asleep:
            self.engine.wake()
            self.asleep = False
        if self.stale:
            self.engine.sync(self.model)
            self.probe.check(self.engine, self.score)
            self.stale = False

    def weights_change(self) -> None:
        """The weights are about to be trained: the engine sleeps, unless it samples ahead, and is stale afterwards."""
        self.stale = self.engine.copies_weights
        if not self.asleep and not self.engine.separate:
            self.engine.sleep()
            self.asleep = True

    def close(self) -> None:
        self.engine.close()


def _fulfil(future: Future, engine: Rollout, prompt_ids: list[list[int]], sampling: Sampling) -> None:
    try:
        future.set_result(engine.generate(prompt_ids, sampling))
    except BaseException as error:
        future.set_exception(error)
