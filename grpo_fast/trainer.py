"""The GRPO step, top to bottom.

rollout -> rewards -> advantages -> drop what carries no gradient -> microbatches -> optimizer -> log
"""

from __future__ import annotations

import dataclasses
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from grpo_fast.config import UNSET, GRPOConfig, steps_of_epochs
from grpo_fast.data import Row, encode_rows, load_rows, prepare_rows, prompt_order
from grpo_fast.distributed.processes import connect, is_main, on_main, size
from grpo_fast.distributed.rng import rng_state, set_rng_state
from grpo_fast.distributed.sharding import check_processes, ddp_arguments, whole_weights
from grpo_fast.errors import CheckpointError, NotFiniteError, UserError, say, writing
from grpo_fast.evaluation.held_out import evaluate
from grpo_fast.files import LinesFile, cut_metrics, remove_leftovers, user_path
from grpo_fast.memory.report import write_plan
from grpo_fast.model import loading
from grpo_fast.model.activations import check_activations
from grpo_fast.model.loading import load_model
from grpo_fast.report import Summary, plot_run, write_config, write_json, write_report
from grpo_fast.report.learning_checks import LearningSignals, Warnings
from grpo_fast.report.progress import Progress
from grpo_fast.report.terminal import lasting_output
from grpo_fast.report.trackers import Trackers, tracker_arguments
from grpo_fast.rewards import RewardModel
from grpo_fast.rollout import Sampling, build_rollout, check_engine, check_support
from grpo_fast.rollout.dealt import DealtRollout
from grpo_fast.rollout.probe import Probe, tolerance
from grpo_fast.rollout.sampler import Sampler
from grpo_fast.train import checkpoint
from grpo_fast.train.advantages import reward_advantages
from grpo_fast.train.batch import StepBatch, build_step_batch
from grpo_fast.train.checkpoint import TrainerState
from grpo_fast.train.downsampling import kept_completions
from grpo_fast.train.estimators import load_estimator
from grpo_fast.train.finite import check_finite
from grpo_fast.train.groups import Groups, sample_groups, score_responses, token_advantages
from grpo_fast.train.interrupt import Interrupt
from grpo_fast.train.learner import Learner
from grpo_fast.train.metrics import (
    advantage_metrics,
    completion_metrics,
    group_metrics,
    peak_memory,
    reward_metrics,
)
from grpo_fast.train.optimizers import check_optimizer
from grpo_fast.train.run_folder import choose_run_folder, claim, refuse_other_run, release
from grpo_fast.train.saver import Saver
from grpo_fast.train.script import read_dataset, read_script, refuse_others, weights_fingerprint
from grpo_fast.train.trust import remember_own


class GRPOTrainer:
    """Trains a policy, and writes the run folder.

        GRPOTrainer(GRPOConfig(model_name_or_path=..., dataset_name=..., reward_funcs=[...])).train()
        GRPOTrainer(model=..., reward_funcs=[...], args=GRPOConfig(...), train_dataset=...).train()

    Args:
        model: a folder or hub name, a transformers causal LM or its PeftModel; or a `GRPOConfig` that names everything.
        reward_funcs: a function, or several; each may also be a name, as in the configuration.
        args: the configuration; what the other arguments give stays out of it. Also called `config`.
        train_dataset: a `datasets.Dataset` or a list of rows, with a column ``prompt`` (a text or chat messages) or
            those that `prompt_template` needs.
        eval_dataset: the same, to evaluate on; without it about a tenth of the rows, at most 200, are held out.
        processing_class: the tokenizer (default: the model's).
        peft_config: a peft config, to train an adapter of that kind.
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
        config, self.objects = read_script(config, *arguments)
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
        if config.advantage_estimator is not None:
            load_estimator(config.advantage_estimator)
        check_support(config)
        self.rewards = RewardModel(
            objects.reward_funcs or config.reward_funcs, config.reward_weights, config.reward_timeout,
            config.on_reward_error, config.code_isolation,
        )  # fmt: skip
        self.rewards.warn = self.warn
        self.metric = self.rewards.index(config.eval_metric)
        self.score_name = f"eval/rewards/{self.rewards.names[self.metric]}/mean"
        self.train_rows, self.eval_rows = load_rows(config, objects.train_rows, objects.eval_rows)
        for rows, source in ((self.train_rows, "training data"), (self.eval_rows, "held-out data")):
            self.rewards.check_rows(rows, source)

        trackers = tracker_arguments(config, self.run_folder)
        self.accelerator = Accelerator(
            mixed_precision="bf16" if config.bf16 else "no", cpu=config.use_cpu, kwargs_handlers=[ddp_arguments()],
            **trackers,
        )  # fmt: skip
        check_processes(config, self.accelerator)
        check_engine(config)
        check_optimizer(config, self.accelerator.device)
        check_activations(config, self.accelerator.device)
        torch.manual_seed(config.seed)
        model, self.tokenizer = self.load_model()
        if not config.use_peft:
            check_finite(model.named_parameters(), f"model_name_or_path={config.model_name_or_path!r}")
        arguments = (self.tokenizer, config, loading.max_positions(model.config))
        self.train_rows, self.train_prompts = encode_rows(self.train_rows, *arguments, "training", self.warn)
        self.eval_rows, self.eval_prompts = encode_rows(self.eval_rows, *arguments, "held-out", self.warn)
        if config.max_steps == UNSET:
            steps = steps_of_epochs(config, len(self.train_rows))
            self.config = config = dataclasses.replace(config, max_steps=steps)
            if found is not None and found[1].step > steps:
                raise UserError(
                    f"num_train_epochs={config.num_train_epochs:g} makes {steps} steps, less than the {found[1].step} "
                    f"of {found[0]}"
                )
        loading.check_vocabulary(model, self.train_prompts + self.eval_prompts, self.tokenizer)
        started = weights_fingerprint(model) if objects.model is not None else None
        first = self.train_prompts[0]
        self.learner = Learner(
            model, config, self.accelerator, first, self.tokenizer.pad_token_id, objects.adapter
        )  # fmt: skip
        self.adapter, self.model = self.learner.adapter, model
        on_main(lambda: checkpoint.check_space(model, self.run_folder, config))
        sampling = Sampling.from_config(config, config.num_generations)
        self.sampling = dataclasses.replace(sampling, keeps_support=config.truncated_support)
        self.rollout, self.closed = self.build_sampler(), False
        self.eval_sampling = Sampling.from_config(config, config.num_generations_eval)
        self.rollout.check(self.train_prompts[0], self.sampling)
        self.signals, self.warnings = LearningSignals(config), Warnings(self.run_folder / "warnings.jsonl")
        # The rows whose completions are sampled while this step's are trained on.
        self.ahead: list[int] = []
        # What a resumed run must have in common with this one.
        fixed = checkpoint.fixed_fields(config)
        fixed |= loading.random_base(config) if started is None else {"initial weights of the model": started}
        fixed["number of parameters"] = sum(p.numel() for p in model.parameters())
        fixed["training data"] = checkpoint.fingerprint(self.train_prompts)
        fixed["held-out data"] = checkpoint.fingerprint(self.eval_prompts)
        # Where the run is between two updates, `updates_left` of which are still to come on the same generation batch.
        self.saver = Saver(config, self.run_folder, self.learner, self.adapter or model, self.tokenizer, fixed)
        self.updates_left = self.skipped = 0
        # The last step that was evaluated, and its metrics if this process measured them.
        self.evaluated_step, self.held_out = 0, {}
        self.resuming = config.resume_from_checkpoint
        if found is not None:
            self.restore(*found)
        self.order = self.prompt_order()

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
        return prompt_order(len(self.train_rows), config.shuffle_dataset, config.seed, self.state.num_prompts)

    @property
    def state(self) -> TrainerState:
        """What the next checkpoint says of the run."""
        return self.saver.state

    @property
    def step(self) -> int:
        """Optimizer steps so far."""
        return self.state.step

    def warn(self, text: str) -> None:
        """Print a warning before the run's own output begins, once for all processes."""
        if is_main():
            say(f"warning: {text}", file=sys.stderr)

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

    def train(self, resume_from_checkpoint: bool | str | Path | None = None) -> Summary:
        """Evaluate, train for `max_steps` optimizer steps, evaluate again, and write the run folder.

        A run that is stopped, by a signal, by the user or by wrong rewards, still leaves its metrics and a checkpoint.
        A resumed run continues from its last checkpoint as if it had never stopped.

        Args:
            resume_from_checkpoint: continue from the newest checkpoint in `output_dir`, if there is one; or from this
                one, which must be the newest.

        Raises:
            UserError: `output_dir` holds a run that is not to be resumed, or a checkpoint of another run.
        """
        try:
            on_main(partial(claim, self.run_folder))
            self.resume(resume_from_checkpoint)
            with lasting_output():
                return self.run()
        finally:
            release(self.run_folder)

    def resume(self, wanted: bool | str | Path | None) -> None:
        """Restore the newest checkpoint of `output_dir` if that is `wanted`, unless the trainer has begun with it."""
        if not wanted or (self.config.resume_from_checkpoint and wanted is True):
            return
        if self.config.output_dir is None:
            raise UserError("to resume a run, set output_dir of the GRPOConfig to its folder")
        found = on_main(partial(checkpoint.find_checkpoint, self.run_folder, self.config))
        if wanted is not True:
            checkpoint.check_newest(Path(wanted), self.run_folder, found and found[0])
        self.resuming = True
        if found is not None:
            self.restore(*found)
            self.order = self.prompt_order()

    def run(self) -> Summary:
        """The run in its claimed folder."""
        config, folder = self.config, self.run_folder
        metric = self.rewards.names[self.metric]
        self.open_sampler()
        history, note = on_main(self.open_folder)
        progress = Progress(config, folder, metric, sum(p.numel() for p in self.model.parameters()))
        if note:
            progress.warn(note)
        for line in self.rewards.notes:
            progress.note(line)
        on_main(partial(self.warnings.start, self.step, progress.warn))
        self.rewards.warn = lambda text: self.warnings.warn(self.step + 1, text, text)
        trackers = Trackers(self.accelerator, config, folder, progress.warn)
        lines = LinesFile(folder / "metrics.jsonl", append=True, checksums=True)
        with progress, trackers, closing(self), lines as metrics_file:
            if self.rollout.engine.warning:
                progress.warn(self.rollout.engine.warning)
            if self.step:
                new, old = config.learning_rate, self.saver.resumed_learning_rate
                changed = f" with learning_rate={new:g} instead of {old:g}, and with other prompts and random numbers"
                progress.phase(f"resuming from {folder / f'checkpoint-{self.step}'}{changed * (new != old)}")
            else:
                start = f"no checkpoint in {folder}: starting from the beginning; " * self.resuming
                if (adapter := self.own_adapter()) is not None:
                    own = ", ".join(f"{name} {getattr(config, name)}" for name in loading.LORA_FIELDS)
                    progress.phase(f"training the adapter {adapter.name} of {adapter.base} further, with its own {own}")
                rows = f"{len(self.eval_rows)} held-out prompts"
                if self.objects.train_rows is not None and self.objects.eval_rows is None:
                    given = len(self.objects.train_rows)
                    rows += f" (of the {given} rows of train_dataset; give an eval_dataset to train on all of them)"
                progress.phase(f"{start}measuring {metric} before training on {rows}")
                figures = self.measure()
                self.state.before = figures[self.score_name]
                trackers.log(figures, step=self.step)
            progress.started(self.state.before)

            def log(metrics: dict[str, float]) -> None:
                history.append(metrics)
                named = {self.evaluated_step, config.max_steps, *([1] if config.logging_first_step else [])}
                if self.step in named or self.step % config.logging_steps == 0:
                    metrics_file.write(metrics)
                    trackers.log(metrics, step=self.step)
                progress.update(metrics)

            last = self.run_steps(log, progress)
            if not self.held_out or self.evaluated_step != self.step:
                progress.phase(f"measuring {metric} after training")
                self.held_out = self.measure()
                trackers.log(self.held_out, step=self.step)
            state, after = self.state, self.held_out[self.score_name]
            best = (state.best_score, f"checkpoint-{state.best_step}") if state.best_step else ()
            summary = Summary(metric, state.before, after, round(state.train_seconds, 2), self.step, *best)
            on_main(partial(self.write_end, summary, history))
        progress.finished(summary, last)
        return summary

    def open_folder(self) -> tuple[list[dict[str, float]], str]:
        """Write what is known at the start, and return the metrics of earlier steps and a note; see `cut_metrics`."""
        config, folder = self.config, self.run_folder
        claim(folder)
        if not self.resuming:
            refuse_other_run(folder)
        with writing(folder):
            remove_leftovers(folder)
        written = dataclasses.replace(config, output_dir=str(folder), resume_from_checkpoint=False)
        write_config(folder / "config.yaml", written)
        remember_own(folder, config)
        if self.accelerator.device.type == "cuda":
            longest = max(map(len, self.train_prompts))
            write_plan(folder / "memory_plan.json", config, self.model.config, longest)
        return cut_metrics(folder / "metrics.jsonl", self.step)

    def write_end(self, summary: Summary, history: list[dict[str, float]]) -> None:
        write_json(self.run_folder / "summary.json", dataclasses.asdict(summary))
        if history:
            plot_run(history, summary, self.run_folder / "reward.png")
        write_report(self.run_folder)

    def run_steps(self, log: Callable[[dict[str, float]], None], progress: Progress) -> Path:
        """Train the remaining steps, with a checkpoint every `save_steps` and after the last one, which is returned.

        Checkpoints fall between generation batches: with several updates on a batch, a checkpoint that is due, and a
        signal that stops the run, wait for the remaining updates on the same batch.
        """
        if self.saver.rng:
            set_rng_state(self.saver.rng)
        with Interrupt() as interrupt:
            try:
                for metrics in self.steps():
                    try:
                        if self.evaluation_is_due():
                            metrics |= self.evaluate_step(progress)
                    finally:
                        on_main(partial(log, metrics))
                    if interrupt.agree() and not self.updates_left:
                        break
                    if (self.saver.is_due() and not self.updates_left) or self.state.best_step == self.step:
                        self.saver.save()
                last = self.saver.save()
            except CheckpointError:
                raise
            except NotFiniteError as error:
                raise UserError(f"{error}; {self.saver.last_good(error.weights_lost)}") from None
            except (KeyboardInterrupt, UserError) as error:
                # A second Ctrl-C ends at once.
                if self.step and not (interrupt.signal and isinstance(error, KeyboardInterrupt)):
                    progress.stopped(self.step, self.saver.save())
                raise
        if interrupt.signal:
            progress.stopped(self.step, last)
            interrupt.exit()
        return last

    def evaluation_is_due(self) -> bool:
        """Every `eval_steps` between generation batches, and after the last step."""
        every = self.config.eval_steps
        due = bool(every) and (self.step // every != self.evaluated_step // every or self.step >= self.config.max_steps)
        return due and not self.updates_left

    def evaluate_step(self, progress: Progress) -> dict[str, float]:
        """Metrics on the held-out prompts after this step, which may be the best so far."""
        self.evaluated_step, self.held_out = self.step, self.measure()
        score, state = self.held_out[self.score_name], self.state
        if self.config.keep_best and score > state.best_score:
            state.best_step, state.best_score = self.step, score
        progress.evaluated(self.step, score, best=state.best_step == self.step)
        return self.held_out

    def restore(self, folder: Path, state: TrainerState) -> None:
        """Continue from a checkpoint."""
        checkpoint.check_same(folder, state.fixed, self.state.fixed)
        self.ahead, self.updates_left = [], 0
        # The engine was tried out with the initial weights.
        self.rollout.weights_change()
        self.saver.restore(folder, state)
        self.evaluated_step = state.step

    def steps(self) -> Iterator[dict[str, float]]:
        """Train, and yield the metrics of every optimizer step; a generation batch serves `updates_per_batch` steps."""
        config, state = self.config, self.state
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
        self.open_sampler()
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

    def save_model(self, output_dir: str | Path | None = None) -> Path:
        """Write what `from_pretrained` loads (of an adapted model the adapter) and the tokenizer.

        `output_dir` is the run folder by default. Returns the folder.
        """
        folder = self.run_folder if output_dir is None else user_path(str(output_dir))
        self.saver.save_model(folder)
        return folder

    def own_adapter(self) -> loading.Adapter | None:
        """The adapter that the configuration names, which the run trains further."""
        return None if self.objects.model is not None else loading.find_adapter(self.config)

    def open_sampler(self) -> None:
        """Start the engine again if a run has closed it."""
        if self.closed:
            self.rollout, self.closed = self.build_sampler(), False

    def close(self) -> None:
        """Close the engine."""
        self.closed = True
        self.rollout.close()

    def sample(self, count: int) -> Groups:
        """The next `count` prompts, their completions (sampled now, unless they were sampled ahead) and rewards."""
        indices, self.ahead = self.ahead or self.draw(count), []
        rows, prompts = [self.train_rows[i] for i in indices], [self.train_prompts[i] for i in indices]
        responses = self.rollout.finish() or self.rollout.generate(prompts, self.sampling)
        groups = Groups(rows, prompts, *score_responses(self.rewards, self.tokenizer, rows, prompts, responses))
        if self.config.incomplete_groups == "error":
            groups.check_complete(self.config.num_generations)
        return groups

    def draw(self, count: int) -> list[int]:
        """The next `count` training rows."""
        return [next(self.order) for _ in range(count)]

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
        advantages = reward_advantages(rewards, weights, config, lengths=lengths)
        self.signals.see(groups.rewards.total.tolist())
        metrics |= reward_metrics(self.rewards.names, groups.rewards, advantages.equal)
        metrics |= group_metrics(groups.rewards.total, config.num_generations)
        batch = build_step_batch(groups.samples(), counted, self.objective, config, groups.mask(), num_sequences)
        batch.drawn, batch.weights = drawn, batch.weights.to(self.accelerator.device)
        if config.corrects_sampler:
            sampled = [logprob for response in groups.responses for logprob in response.logprobs]
            batch.sampling_logprobs = torch.tensor(sampled).to(batch.weights)
        if config.truncated_support:
            batch.support = groups.support()
        if config.uses_reference:
            batch.ref_logprobs = self.learner.score_reference(batch)
        if config.kl_in_reward:
            penalty, metrics["kl"] = self.learner.kl_penalty(batch)
            advantages = reward_advantages(rewards, weights, config, penalty, lengths)
        batch.set_advantages(token_advantages(groups, advantages, self.tokenizer), self.objective)
        metrics |= advantage_metrics(batch)
        if self.logs_completions() and is_main():
            with LinesFile(self.run_folder / "completions" / f"completions_{self.step + 1:05d}.jsonl") as file:
                for line in groups.lines(self.step + 1, self.rewards.names, batch):
                    file.write(line)
        return batch, metrics | completion_metrics(groups.responses)

    def update(self, batch: StepBatch, keep_logprobs: bool = False) -> dict[str, float]:
        """One optimizer step; its errors name the step.

        An update whose loss or gradient is not finite is skipped, at most `max_skipped_updates` times in a row.
        """
        try:
            metrics = self.learner.update(batch, keep_logprobs)
        except NotFiniteError as error:
            text = f"step {self.step + 1}: {error}"
            if error.weights_lost or self.skipped >= self.config.max_skipped_updates:
                raise NotFiniteError(text, error.weights_lost) from None
            self.skipped += 1
            count = f"{self.skipped} of at most {self.config.max_skipped_updates} in a row"
            on_main(partial(self.warnings.warn, self.step + 1, text, f"{text}; skipped ({count})"))
            self.learner.skip_update()
            finite = {name: value for name, value in error.metrics.items() if math.isfinite(value)}
            return finite | {"skipped_update": 1.0}
        except UserError as error:
            path = self.run_folder / "metrics.jsonl"
            raise UserError(f"step {self.step + 1}: {error}; the metrics so far are in {path}") from None
        self.skipped = 0
        return metrics | ({"skipped_update": 0.0} if self.config.max_skipped_updates else {})

    def logs_completions(self) -> bool:
        """Whether completions are due to be written in one of the steps on the coming generation batch."""
        every = self.config.log_completions_steps
        last = min(self.step + self.config.updates_per_batch, self.config.max_steps)
        return bool(every) and (self.step == 0 or self.step // every != last // every)
