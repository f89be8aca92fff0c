"""Sampling by several processes: each samples its share of the prompts, or the first one asks a server for all."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace

import torch
from torch import nn

from grpo_fast.distributed import processes
from grpo_fast.distributed.rng import own_random_numbers
from grpo_fast.rollout.base import Response, Rollout, Sampling


class DealtRollout(Rollout):
    """One engine in each process, or one in the first process only; every process gets all responses.

    Each process samples with its own random numbers, and from whole weights: a sharded policy is gathered first.

    Args:
        build: makes the engine.
        separate: the engine is a server, to which only the first process connects.
        gathered: a context in which every process has all weights of the policy.

    Raises:
        UserError: the engine cannot be started or reached.
    """

    def __init__(self, build: Callable[[], Rollout], separate: bool, gathered: Callable[[], AbstractContextManager]):
        self.separate, self.gathered = separate, gathered
        self.engine: Rollout | None = None
        self.group = processes.new_group()
        self._each(lambda: setattr(self, "engine", build()))
        self.copies_weights, self.warning = processes.on_main(lambda: (self.engine.copies_weights, self.engine.warning))

    def check(self, prompt_ids: list[int], sampling: Sampling) -> None:
        with self.gathered():
            self._each(lambda: self.engine.check(prompt_ids, sampling))

    def generate(self, prompt_ids: list[list[int]], sampling: Sampling) -> list[Response]:
        if self.separate:
            if sampling.seed is None:
                # Every process draws it, so that their generators stay in the same state.
                sampling = replace(sampling, seed=int(torch.randint(2**31, ())))
            return processes.on_main(lambda: self.engine.generate(prompt_ids, sampling), self.group)
        mine = processes.share(prompt_ids)
        with self.gathered(), own_random_numbers():
            shares = processes.gather(lambda: self.engine.generate(mine, sampling) if mine else [], self.group)
        size = sampling.num_generations
        groups = [[share[at : at + size] for at in range(0, len(share), size)] for share in shares]
        return [response for group in processes.join(groups) for response in group]

    def sync(self, model: nn.Module) -> None:
        with self.gathered():
            self._each(lambda: self.engine.sync(model))

    def take_figures(self) -> dict[str, float]:
        """Those of this process's engine."""
        return {} if self.engine is None else self.engine.take_figures()

    def sleep(self) -> None:
        self._each(lambda: self.engine.sleep())

    def wake(self) -> None:
        self._each(lambda: self.engine.wake())

    def close(self) -> None:
        if self.engine is not None:
            self.engine.close()

    def _each(self, call: Callable[[], None]) -> None:
        """Make the call in every process that has an engine; an error in one process is raised in all."""
        run = processes.on_main if self.separate else processes.gather
        run(call, self.group)
