"""On-policy distillation: a student samples, and learns at every token from a teacher's distribution.

Two forms of the reverse KL from the teacher (GKD, arXiv 2306.13649; MiniLLM, arXiv 2306.08543):

    exact      sum over the vocabulary at each sampled position, through both heads without logits
    sampled    the token's advantage is log q - log p of the teacher and the student, in any policy loss: its gradient
               is an unbiased estimate of the exact one at that token

Everything else is GRPO's trainer. Rewards, if there are any, are measured and do not train.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from grpo_fast.config import DistillConfig
from grpo_fast.data import Row
from grpo_fast.distributed.rng import own_generators
from grpo_fast.errors import UserError
from grpo_fast.model import loading
from grpo_fast.model.attention import install
from grpo_fast.model.loading import load_trained
from grpo_fast.model.microbatch_policy import MicrobatchPolicy
from grpo_fast.report.learning_checks import LearningSignals
from grpo_fast.train import checkpoint
from grpo_fast.train.batch import StepBatch, build_step_batch
from grpo_fast.train.checkpoint import TrainerState
from grpo_fast.train.finite import check_finite
from grpo_fast.train.groups import Groups, sample_and_score
from grpo_fast.train.metrics import completion_metrics, peak_memory
from grpo_fast.trainer import GRPOTrainer


def no_reward(prompts: list[Any], completions: list[Any], **columns: Any) -> list[float]:
    """The reward of a run that measures none."""
    return [0.0] * len(completions)


class DistillationSignals(LearningSignals):
    """The signals of a run that learns nothing from rewards."""

    def reward_problem(self, metrics: dict[str, float]) -> None:
        return None


class DistillationTrainer(GRPOTrainer):
    """Distils a teacher into a student, on what the student samples, and writes the run folder.

        config = DistillConfig(model_name_or_path=..., teacher_model_name_or_path=..., dataset_name=...)
        DistillationTrainer(config).train()

    The score is the reverse KL on completions of the held-out prompts, exact over the vocabulary, a mean over their
    tokens (nats).

    Raises:
        UserError: the configuration, the data or a model would make the run fail later, or student and teacher have
            different vocabularies.
    """

    lower_is_better = True
    config: DistillConfig

    def prepare(self, found: tuple[Path, TrainerState] | None) -> None:
        if not (self.objects.reward_funcs or self.config.reward_funcs):
            self.objects.reward_funcs = [no_reward]
        super().prepare(found)
        self.score, self.score_name = "reverse_kl", "eval/reverse_kl"
        self.signals = DistillationSignals(self.config)
        self.teacher = self.load_teacher()
        if self.config.distillation_loss == "exact":
            self.learner.teach = partial(self.teacher.teach, beta=self.config.distillation_beta)

    def load_teacher(self) -> MicrobatchPolicy:
        """The frozen teacher, whose vocabulary and tokenizer are the student's, on the device."""
        config, name = self.config, self.config.teacher_model_name_or_path
        own = dataclasses.replace(
            config, model_name_or_path=name, model_init_kwargs=config.teacher_model_init_kwargs, use_peft=False,
            gradient_checkpointing=False, activation_offloading=False, layers_on_host=0,
            load_in_4bit=False,
        )  # fmt: skip
        try:
            checkpoint.verify_model(Path(name))
            model, tokenizer = load_trained(own)
        except UserError as error:
            raise UserError(f"teacher_model_name_or_path={name!r}: {error}") from None
        sizes = [one.get_output_embeddings().weight.shape[0] for one in (self.model, model)]
        if sizes[0] != sizes[1]:
            raise UserError(
                f"the teacher {name!r} has a vocabulary of {sizes[1]} tokens, the student {sizes[0]}: distillation "
                "compares their probabilities token by token, so choose a teacher of the student's family"
            )
        if tokenizer.get_vocab() != self.tokenizer.get_vocab():
            raise UserError(
                f"the teacher {name!r} and the student have different tokenizers: their token IDs mean different tokens"
            )
        loading.check_vocabulary(model, self.train_prompts + self.eval_prompts, tokenizer)
        check_finite(model.named_parameters(), f"teacher_model_name_or_path={name!r}")
        teacher = MicrobatchPolicy(model.requires_grad_(False), config.temperature, config.max_buffer_bytes)
        teacher.eval().to(self.accelerator.device)
        with self.accelerator.autocast():
            teacher.check_head(self.train_prompts[0])
        # Both get the same microbatches.
        if self.learner.packed:
            self.learner.packed = teacher.check_packing(self.train_prompts[0], config.padding_free)
            if self.learner.packed:
                install(teacher.model)
        return teacher

    def collect(self) -> tuple[StepBatch, dict[str, float]]:
        """As GRPO's, with the teacher's view of the tokens in place of advantages from rewards."""
        batch, metrics = super().collect()
        batch.active = batch.counted.nonzero().squeeze(1).tolist()
        if self.learner.teach is not None:
            batch.advantages = torch.ones_like(batch.weights)
        else:
            gap = self.teacher_gap(batch)
            metrics["reverse_kl"] = -_mean(gap, batch.weights)
            batch.set_advantages(gap.cpu(), self.objective)
        return batch, metrics

    def steps(self) -> Iterator[dict[str, float]]:
        for metrics in super().steps():
            yield _measured(metrics)

    def update(self, batch: StepBatch, keep_logprobs: bool = False) -> dict[str, float]:
        metrics = super().update(batch, keep_logprobs)
        if "divergence" in metrics and self.config.distillation_beta == 1:
            metrics["reverse_kl"] = metrics.pop("divergence")
        return metrics

    def teacher_gap(self, batch: StepBatch) -> Tensor:
        """The teacher's log-probability less the student's ``[N]``, for each token of the active completions."""
        self.learner.policy.eval()
        with self.accelerator.autocast():
            theirs = self.learner.score(self.teacher, batch)
        return theirs - self.learner.score(self.learner.policy, batch)

    def measure(self, rows: list[Row] | None = None, prompts: list[list[int]] | None = None) -> dict[str, float]:
        """The reverse KL, the rewards and the lengths on held-out prompts."""
        rows, prompts = rows or self.eval_rows, prompts or self.eval_prompts
        with own_generators(self.config.seed):
            sampled = sample_and_score(self.rollout, self.rewards, self.tokenizer, rows, prompts, self.eval_sampling)
        groups = Groups(rows, prompts, *sampled)
        counted = torch.ones(len(groups.responses), dtype=torch.bool)
        batch = build_step_batch(groups.samples(), counted, self.objective, self.config, groups.mask())
        batch.weights = batch.weights.to(self.accelerator.device)
        batch.advantages = torch.ones_like(batch.weights)
        found = self.learner.divergences(batch, partial(self.teacher.teach, beta=1.0))
        figures = {"reverse_kl": _mean(found, batch.weights)}
        for index, name in enumerate(self.rewards.names):
            figures[f"rewards/{name}/mean"] = groups.rewards.each[:, index].nanmean().item()
        lengths = completion_metrics(groups.responses)
        figures |= {name: lengths[name] for name in ("completions/mean_length", "completions/clipped_ratio")}
        peak_memory(self.accelerator.device)
        return {f"eval/{name}": value for name, value in _measured(figures).items()}


def _mean(values: Tensor, weights: Tensor) -> float:
    """The mean over the tokens of non-zero weight."""
    return values[weights != 0].double().mean().item()


def _measured(metrics: dict[str, float]) -> dict[str, float]:
    """The metrics without those of rewards where none is measured, and without those of advantages."""
    absent = f"rewards/{no_reward.__name__}/mean" in metrics
    left_out = ("reward", "frac_reward", "groups/") if absent else ()
    return {name: value for name, value in metrics.items() if not name.startswith((*left_out, "advantages/"))}
