"""The checkpoints of a run: when one is due, what it holds, and how a run goes on from it."""

from __future__ import annotations

import dataclasses
import math
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from grpo_fast.config import GRPOConfig
from grpo_fast.distributed.processes import on_main
from grpo_fast.report.progress import resume_command
from grpo_fast.train import checkpoint
from grpo_fast.train.checkpoint import TrainerState
from grpo_fast.train.finite import check_finite
from grpo_fast.train.learner import Learner


class Saver:
    """Writes the checkpoints of a run into its folder, and restores one; every process takes part.

    Args:
        config: the run's configuration.
        run_folder: where the checkpoints go.
        learner: whose weights, optimizer and reference policy they hold.
        model: the model, or of an adapted one the PeftModel, of which only the adapter is saved.
        tokenizer: saved beside the model.
        fixed: what a resumed run must have in common with this one.
    """

    def __init__(
        self, config: GRPOConfig, run_folder: Path, learner: Learner, model: nn.Module, tokenizer: Any,
        fixed: dict[str, Any],
    ):  # fmt: skip
        self.config, self.run_folder, self.learner = config, run_folder, learner
        self.model, self.tokenizer = model, tokenizer
        # The run's progress and random numbers after its last step, as the next checkpoint holds them.
        self.state = TrainerState(0, 0, 0, 0.0, math.nan, fixed)
        self.rng: dict[str, torch.Tensor] = {}
        self.saved_step = 0
        self.resumed_learning_rate = config.learning_rate

    def is_due(self) -> bool:
        """Whether a multiple of `save_steps` has passed since the last checkpoint."""
        every = self.config.save_steps
        return bool(every) and self.state.step // every != self.saved_step // every

    def save(self, remove_old: bool = True) -> Path:
        """Write a checkpoint, unless this step has one, and remove those beyond `save_total_limit`.

        The weights are finite, because a step that makes them anything else raises an error.
        """
        step = self.state.step
        folder = self.run_folder / f"checkpoint-{step}"
        if self.saved_step != step:
            weights, tensors = self.learner.weights(), {**self.learner.tensors(), "rng": self.rng}
            arguments = (folder, self.model, self.tokenizer, self.state, tensors, weights)
            on_main(partial(checkpoint.save_checkpoint, *arguments))
            self.saved_step = step
            if remove_old:
                limit, best = self.config.save_total_limit, self.state.best_step
                on_main(partial(checkpoint.keep_newest, self.run_folder, limit, best))
        return folder

    def save_model(self, folder: Path) -> None:
        """Write the model (of an adapted one the adapter) and the tokenizer alone."""
        weights = self.learner.weights()
        on_main(partial(checkpoint.save_model, folder, self.model, self.tokenizer, weights))

    def last_good(self, weights_lost: bool) -> str:
        """After a step that was not finite: how to continue from the newest checkpoint, whose weights are finite."""
        if self.state.step and not weights_lost:
            # The cause may be older than this checkpoint, so keep the earlier ones, too.
            self.save(remove_old=False)
        newest = self.run_folder / f"checkpoint-{self.saved_step}"
        start = f"from {newest}, with other prompts" if self.saved_step else "from the beginning"
        resume = resume_command(
            self.run_folder, self.config.command, f"--learning_rate {self.config.learning_rate / 2:g}"
        )
        return f"to continue {start} and a smaller learning_rate: {resume}"

    def restore(self, folder: Path, state: TrainerState) -> None:
        """Take the weights, the optimizer, the random numbers and the progress of a checkpoint of this run."""
        self.learner.restore(folder, state.step)
        check_finite(self.learner.trained(), str(folder))
        self.rng = checkpoint.load_tensors(folder, "rng")
        self.resumed_learning_rate = state.fixed.get("learning_rate", self.config.learning_rate)
        self.state = dataclasses.replace(state, fixed=self.state.fixed)
        self.saved_step = state.step
        if self.resumed_learning_rate != self.config.learning_rate:
            # The same prompts and random numbers would lead to the same gradient, which may have stopped the run.
            self.state.num_prompts += self.config.prompts_per_step
            torch.manual_seed(self.config.seed + state.step)
            self.rng["torch"] = torch.get_rng_state()
            if torch.cuda.is_initialized():
                self.rng["cuda.0"] = torch.cuda.get_rng_state()
