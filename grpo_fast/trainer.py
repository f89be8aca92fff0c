"""The GRPO step, top to bottom.

rollout -> rewards -> advantages -> drop what carries no gradient -> microbatches -> optimizer -> log
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from grpo_fast.config import SELECTIVE_ESTIMATORS, GRPOConfig, ignored_settings
from grpo_fast.data import PassRates, Row, encode_rows, load_rows, prepare_rows, prompt_order
from grpo_fast.distributed.processes import connect, is_main, on_main, size
from grpo_fast.distributed.rng import rng_state
from grpo_fast.distributed.sharding import whole_weights
from grpo_fast.errors import UserError
from grpo_fast.evaluation.held_out import evaluate
from grpo_fast.files import LinesFile
from grpo_fast.memory.report import write_plan
from grpo_fast.model import loading
from grpo_fast.model.loading import load_model
from grpo_fast.report.learning_checks import LearningSignals
from grpo_fast.report.progress import Progress
from grpo_fast.rewards import RewardModel
from grpo_fast.rollout import Sampling, build_rollout, check_engine, check_support
from grpo_fast.rollout.dealt import DealtRollout
from grpo_fast.rollout.probe import Probe, tolerance
from grpo_fast.rollout.sampler import Sampler
from grpo_fast.train import checkpoint, entropy_control
from grpo_fast.train.advantages import reward_advantages
from grpo_fast.train.batch import StepBatch, build_step_batch
from grpo_fast.train.checkpoint import TrainerState
from grpo_fast.train.downsampling import kept_completions
from grpo_fast.train.estimators import check_estimator, needs_greedy
from grpo_fast.train.finite import check_finite
from grpo_fast.train.groups import Groups, sample_and_score, sample_groups, score_responses, token_advantages
from grpo_fast.train.learner import Learner
from grpo_fast.train.metrics import (
    advantage_metrics,
    completion_metrics,
    group_metrics,
    peak_memory,
    reward_metrics,
    staleness_metrics,
)
from grpo_fast.train.run import TrainingRun
from grpo_fast.train.run_folder import choose_run_folder, release
from grpo_fast.train.script import read_dataset, read_script, refuse_others, weights_fingerprint


class GRPOTrainer(TrainingRun):
    """Trains a policy, and writes the run folder.

        GRPOTrainer(GRPOConfig(model_name_or_path=..., dataset_name=..., reward_funcs=[...])).train()
        GRPOTrainer(model=..., reward_funcs=[...], args=GRPOConfig(...), train_dataset=...).train()

    Args:
        model: a folder or hub name, a transformers causal LM or its PeftModel; or a `GRPOConfig` that names everything.
        reward_funcs: a function, or several; each may also be a name, as in the configuration, or a reward model.
        args: the configuration; what the other arguments give stays out of it. Also called `config`.
        train_dataset: a `datasets.Dataset` or a list of rows, with a column ``prompt`` (a text or chat messages) or
            those that `prompt_template` needs.
        eval_dataset: the same, to evaluate on; without it about a tenth of the rows, at most 200, are held out.
        processing_class: the tokenizer (default: the model's).
        peft_config: a peft config, to train an adapter of that kind.
        reward_processing_classes: tokenizers of the reward models among reward_funcs, None for functions (default:
            those beside the models).
        others: TRL's further arguments, of which only the defaults are accepted.

    Raises:
        UserError: the arguments, the data, the rewards or the model would make the run fail later.
    """

    def __init__(
        self,
        model: GRPOConfig | str | Path | nn.Module | None = None,
        reward_funcs: str | Callable | Sequence[str | Callable] | None = None,
        args: GRPOConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        *,
        peft_config: Any = None,
        reward_processing_classes: Any = None,
        config: GRPOConfig | None = None,
        **others: Any,
    ):
        refuse_others(others)
        if isinstance(model, GRPOConfig):
            model, config = None, model
        config = args or config or GRPOConfig()
        connect(config.use_cpu)
        arguments = (model, reward_funcs, train_dataset, eval_dataset, processing_class, peft_config)
        # A script says only when it calls `train` whether it resumes a run.
        self.from_script = args is not None or any(argument is not None for argument in arguments)
        config, self.objects = read_script(config, *arguments, reward_processing_classes)
        self.config = config = config if self.objects.model is not None else loading.adapter_fields(config)
        self.run_folder, found = on_main(partial(choose_run_folder, config, self.from_script))
        try:
            self.prepare(found)
        except BaseException:
            release(self.run_folder)
            raise

    def prepare(self, found: tuple[Path, TrainerState] | None) -> None:
        """Load and check everything, and restore the checkpoint that was `found`."""
        config, objects = self.config, self.objects
        self.objective = config.objective()
        for line in ignored_settings(config, self.objective):
            self.warn(line)
        check_estimator(config)
        if config.max_staleness and needs_greedy(config):
            raise UserError(
                f"advantage_estimator={config.advantage_estimator!r} needs a greedy completion of each prompt, which "
                "max_staleness does not sample; set max_staleness=0"
            )
        check_support(config)
        self.rewards = RewardModel(
            objects.reward_funcs or config.reward_funcs, config.reward_weights, config.reward_timeout,
            config.on_reward_error, config.code_isolation,
        )  # fmt: skip
        self.rewards.warn = self.warn
        self.metric = self.rewards.index(config.eval_metric)
        self.score = self.rewards.names[self.metric]
        self.score_name = f"eval/rewards/{self.score}/mean"
        self.train_rows, self.eval_rows = load_rows(config, objects.train_rows, objects.eval_rows)
        for rows, source in ((self.train_rows, "training data"), (self.eval_rows, "held-out data")):
            self.rewards.check_rows(rows, source)
        self.pass_rates = PassRates(config, self.rewards.names[self.metric]) if config.pass_rates else None
        if self.pass_rates is not None:
            self.train_rows = self.pass_rates.filter(self.train_rows, self.warn)

        check_engine(config)
        self.start_devices()
        model, self.tokenizer = self.load_model()
        if not config.use_peft:
            check_finite(model.named_parameters(), f"model_name_or_path={config.model_name_or_path!r}")
        arguments = (self.tokenizer, config, loading.max_positions(model.config))
        self.train_rows, self.train_prompts = encode_rows(self.train_rows, *arguments, "training", self.warn)
        self.eval_rows, self.eval_prompts = encode_rows(self.eval_rows, *arguments, "held-out", self.warn)
        self.resolve_steps(found)
        config = self.config
        loading.check_vocabulary(model, self.train_prompts + self.eval_prompts, self.tokenizer)
        started = weights_fingerprint(model) if objects.model is not None else None
        first = self.train_prompts[0]
        self.learner = Learner(
            model, config, self.accelerator, first, self.tokenizer.pad_token_id, objects.adapter
        )  # fmt: skip
        self.adapter, self.model = self.learner.adapter, model
        sampling = Sampling.from_config(config, config.num_generations)
        self.sampling = dataclasses.replace(sampling, keeps_support=config.truncated_support)
        self.rollout, self.closed = self.build_sampler(), False
        self.eval_sampling = Sampling.from_config(config, config.num_generations_eval)
        self.rollout.check(self.train_prompts[0], self.sampling)
        self.signals = LearningSignals(config)
        # The rows whose completions are sampled while this step's are trained on.
        self.ahead: list[int] = []
        fixed = loading.random_base(config) if started is None else {"initial weights of the model": started}
        fixed["training data"] = checkpoint.fingerprint(self.train_prompts)
        fixed["held-out data"] = checkpoint.fingerprint(self.eval_prompts)
        self.start_saver(found, fixed)

    def load_model(self) -> tuple[nn.Module, Any]:
        """The transformers model and its tokenizer, where the script did not give them."""
        config, model, tokenizer = self.config, self.objects.model, self.objects.tokenizer
        if model is None:
            on_main(lambda: checkpoint.verify_model(Path(config.model_name_or_path)))
            model, own = load_model(config)
            return model, own if tokenizer is None else loading.with_padding(tokenizer)
        return model, loading.load_tokenizer(model) if tokenizer is None else loading.with_padding(tokenizer)

    def prompt_order(self) -> Iterator[int]:
        """The training rows that are still to be drawn."""
        config = self.config
        rates = [] if self.pass_rates is None else self.pass_rates.of(self.train_rows)
        count, start = len(self.train_rows), self.state.num_prompts
        return prompt_order(count, config.shuffle_dataset, config.seed, start, config.prompt_sampling, rates)

    def build_sampler(self) -> Sampler:
        """The engine of `config`, which is synced with the policy and probed whenever the policy has changed."""
        config = self.config
        longest = max(map(len, self.train_prompts + self.eval_prompts)) + config.max_completion_length
        allowed = tolerance(config, self.model.dtype)
        truncated = self.sampling if config.truncated_support else None
        probe = Probe(self.train_prompts[0], longest, config.temperature, allowed, truncated)
        build = partial(build_rollout, config, self.model, self.tokenizer, longest - config.max_completion_length)
        gathered = partial(whole_weights, self.learner.policy)
        engine = build() if size() == 1 else DealtRollout(build, config.use_vllm, gathered)
        return Sampler(engine, self.adapter or self.model, probe, self.learner.score_completion)

    def announce(self, progress: Progress) -> None:
        for line in self.rewards.notes:
            progress.note(line)
        self.rewards.warn = lambda text: self.warnings.warn(self.step + 1, text, text)
        if self.rollout.engine.warning:
            progress.warn(self.rollout.engine.warning)

    def held_out_rows(self) -> str:
        rows = f"{len(self.eval_rows)} held-out prompts"
        if self.objects.train_rows is not None and self.objects.eval_rows is None:
            given = len(self.objects.train_rows)
            rows += f" (of the {given} rows of train_dataset; give an eval_dataset to train on all of them)"
        return rows

    def open_folder(self) -> tuple[list[dict[str, float]], str]:
        opened = super().open_folder()
        if self.accelerator.device.type == "cuda":
            longest = max(map(len, self.train_prompts))
            write_plan(self.run_folder / "memory_plan.json", self.config, self.model.config, longest)
        return opened

    def restore(self, folder: Path, state: TrainerState) -> None:
        super().restore(folder, state)
        self.ahead = []
        # The engine was tried out with the initial weights.
        self.rollout.weights_change()

    def steps(self) -> Iterator[dict[str, float]]:
        """Train, and yield the metrics of every optimizer step; a generation batch serves `updates_per_batch` steps."""
        config, state = self.config, self.state
        if config.max_staleness:
            prompts = ((index, self.train_prompts[index]) for index in self.prompt_order())
            batches = math.ceil((config.max_steps - state.step) / config.updates_per_batch)
            self.rollout.begin(
                prompts, self.sampling, self.tokenizer, config.max_staleness, config.prompts_per_step, batches
            )
        while state.step < config.max_steps:
            start = time.perf_counter()
            batch, figures = self.collect()
            for name, text in self.signals.observe(figures).items():
                on_main(partial(self.warnings.warn, self.step + 1, name, f"step {self.step + 1}: {text}"))
            tokens = sum(len(sample.prompt_ids) + len(sample.completion_ids) for sample in batch.samples)
            updates = min(config.updates_per_batch, config.max_steps - state.step)
            if config.sample_ahead and state.step + updates < config.max_steps:
                self.ahead = self.draw(config.prompts_per_step)
                self.rollout.start([self.train_prompts[index] for index in self.ahead], self.sampling)
            self.rollout.weights_change()
            parts = self.learner.parts(batch)
            for iteration in range(updates):
                part = parts[iteration % len(parts)]
                keeps = len(parts) == 1 and config.num_iterations > 1 and iteration == 0
                metrics = self.update(part, keep_logprobs=keeps)
                state.step += 1
                if iteration == 0:
                    state.num_tokens += tokens
                    state.num_prompts += batch.drawn
                self.learner.refresh_reference(state.step)
                self.updates_left = updates - iteration - 1
                # Kept for a checkpoint: if the next step fails, it has already advanced the generators.
                self.saver.rng = rng_state()
                seconds = time.perf_counter() - start
                state.train_seconds += seconds
                speed = {"step_time": seconds, "tokens_per_second": tokens / seconds}
                speed |= peak_memory(self.accelerator.device)
                yield {"step": state.step, **figures, **metrics, "num_tokens": state.num_tokens, **speed}
                start = time.perf_counter()

    def evaluate(self, eval_dataset: Any = None) -> dict[str, float]:
        """Metrics of the present policy on the held-out prompts, or on those of another dataset.

        The names are those of training with the prefix ``eval/``; `self.score_name` names the run's score among them.
        """
        self.open()
        if eval_dataset is None:
            return self.measure()
        rows = prepare_rows(self.config, read_dataset(eval_dataset, "eval_dataset"), "eval_dataset")
        self.rewards.check_rows(rows, "eval_dataset")
        arguments = (self.tokenizer, self.config, loading.max_positions(self.model.config))
        return self.measure(*encode_rows(rows, *arguments, "eval_dataset", self.warn))

    def measure(self, rows: list[Row] | None = None, prompts: list[list[int]] | None = None) -> dict[str, float]:
        """`evaluate` with rows that are encoded already (default: the held-out ones)."""
        figures = evaluate(
            self.rollout, self.rewards, self.tokenizer, rows or self.eval_rows, prompts or self.eval_prompts,
            self.eval_sampling, self.config.seed,
        )  # fmt: skip
        # Reset, so that the next step does not report the memory of the evaluation.
        peak_memory(self.accelerator.device)
        return figures

    def own_adapter(self) -> loading.Adapter | None:
        return None if self.objects.model is not None else super().own_adapter()

    def open(self) -> None:
        """Start the engine again if a run has closed it."""
        if self.closed:
            self.rollout, self.closed = self.build_sampler(), False

    def close(self) -> None:
        """Close the engine."""
        self.closed = True
        self.rollout.close()

    def sample(self, count: int) -> Groups:
        """The next `count` prompts, their completions (sampled now, unless they were sampled ahead) and rewards."""
        taken = self.rollout.take(count) if self.config.max_staleness else []
        indices, self.ahead = [group.row for group in taken] or self.ahead or self.draw(count), []
        rows, prompts = [self.train_rows[i] for i in indices], [self.train_prompts[i] for i in indices]
        if taken:
            responses = [answer.response for group in taken for answer in group.answers]
        else:
            responses = self.rollout.finish() or self.rollout.generate(prompts, self.sampling)
        scored = score_responses(self.rewards, self.tokenizer, rows, prompts, responses)
        groups = Groups(rows, prompts, *scored)
        if needs_greedy(self.config):
            greedy = {"num_generations": 1, "temperature": 0.0, "keeps_support": False}
            sampling = dataclasses.replace(self.sampling, **greedy)
            arguments = (self.rollout, self.rewards, self.tokenizer, rows, prompts, sampling)
            groups.greedy = sample_and_score(*arguments)[2].total
        if self.config.incomplete_groups == "error":
            groups.check_complete(self.config.num_generations)
        return groups

    def collect(self) -> tuple[StepBatch, dict[str, float]]:
        """Rollout, rewards, advantages, the token weights of the whole step, and which samples may be dropped."""
        config, weights = self.config, self.rewards.weights
        groups, drawn, metrics = sample_groups(self.sample, weights, config)
        lengths = torch.tensor([float(len(response.token_ids)) for response in groups.responses])
        rewards, counted, kept = groups.rewards, groups.counted(config), None
        if config.num_generations_kept is not None:
            grid = (config.prompts_per_step, config.num_generations)
            kept = kept_completions(
                rewards.total.view(grid), lengths.view(grid), config.num_generations_kept, config.keep_generations
            ).flatten()
            rewards, counted = rewards.only(kept), counted & kept
        num_sequences = None if kept is None else int(kept.sum())
        advantages = reward_advantages(rewards, weights, config, lengths=lengths, greedy=groups.greedy)
        if config.advantage_estimator in SELECTIVE_ESTIMATORS:
            counted = counted & (advantages.outcome != 0)
            num_sequences = max(int(counted.sum()), 1)
            metrics["frac_selected"] = counted.float().mean().item()
        self.signals.see(groups.rewards.total.tolist())
        metrics |= reward_metrics(self.rewards.names, groups.rewards, advantages.equal)
        metrics |= group_metrics(groups.rewards.total, config.num_generations)
        if groups.greedy is not None:
            metrics["greedy_reward"] = groups.greedy.nanmean().item()
        batch = build_step_batch(groups.samples(), counted, self.objective, config, groups.mask(), num_sequences)
        batch.drawn, batch.weights = drawn, batch.weights.to(self.accelerator.device)
        if config.uses_sampling_logprobs:
            sampled = [logprob for response in groups.responses for logprob in response.logprobs]
            batch.sampling_logprobs = torch.tensor(sampled).to(batch.weights)
        if config.truncated_support:
            batch.support = groups.support()
        if config.uses_reference:
            batch.ref_logprobs = self.learner.score_reference(batch)
        if config.kl_in_reward:
            penalty, metrics["kl"] = self.learner.kl_penalty(batch)
            advantages = reward_advantages(rewards, weights, config, penalty, lengths, groups.greedy)
        batch.set_advantages(token_advantages(groups, advantages, self.tokenizer), self.objective)
        metrics |= advantage_metrics(batch)
        if self.logs_completions() and is_main():
            with LinesFile(self.run_folder / "completions" / f"completions_{self.step + 1:05d}.jsonl") as file:
                for line in groups.lines(self.step + 1, self.rewards.names, batch):
                    file.write(line)
        metrics |= completion_metrics(groups.responses) | self.rollout.engine.take_figures()
        return batch, metrics | staleness_metrics(groups.responses, self.rollout.version)

    def update(self, batch: StepBatch, keep_logprobs: bool = False) -> dict[str, float]:
        if self.config.use_adaptive_entropy:
            self.learner.objective = entropy_control.with_bonus(self.objective, self.config, self.state)
        metrics = super().update(batch, keep_logprobs)
        skipped = metrics.get("skipped_update") == 1.0
        return metrics if skipped else metrics | entropy_control.observe(self.config, self.state, metrics)

    def logs_completions(self) -> bool:
        """Whether completions are due to be written in one of the steps on the coming generation batch."""
        every = self.config.log_completions_steps
        last = min(self.step + self.config.updates_per_batch, self.config.max_steps)
        return bool(every) and (self.step == 0 or self.step // every != last // every)
