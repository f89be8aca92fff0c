"""The GRPO step, top to bottom.

rollout -> rewards -> advantages -> drop what carries no gradient -> microbatches -> optimizer -> log
"""

from __future__ import annotations

import dataclasses
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from grpo_fast.config import GRPOConfig
from grpo_fast.data import encode_rows, load_rows, prompt_order
from grpo_fast.distributed.processes import connect, is_main, on_main, size
from grpo_fast.distributed.rng import rng_state, set_rng_state
from grpo_fast.distributed.sharding import check_processes, ddp_arguments, whole_weights
from grpo_fast.errors import CheckpointError, NotFiniteError, UserError, say, writing
from grpo_fast.evaluation.held_out import evaluate
from grpo_fast.files import LinesFile, cut_metrics, remove_leftovers
from grpo_fast.memory.report import write_plan
from grpo_fast.model.activations import check_activations
from grpo_fast.model.loading import (
    LORA_FIELDS,
    adapter_fields,
    check_vocabulary,
    find_adapter,
    load_model,
    max_positions,
    random_base,
)
from grpo_fast.report import Summary, plot_run, write_config, write_json, write_report
from grpo_fast.report.learning_checks import LearningSignals, Warnings
from grpo_fast.report.progress import Progress, resume_command
from grpo_fast.report.terminal import lasting_output
from grpo_fast.report.trackers import Trackers, tracker_arguments
from grpo_fast.rewards import RewardModel
from grpo_fast.rollout import Sampling, build_rollout, check_engine, check_support
from grpo_fast.rollout.dealt import DealtRollout
from grpo_fast.rollout.probe import Probe, tolerance
from grpo_fast.rollout.sampler import Sampler
from grpo_fast.train.advantages import reward_advantages
from grpo_fast.train.batch import StepBatch, build_step_batch
from grpo_fast.train.checkpoint import (
    TrainerState,
    check_same,
    check_space,
    fingerprint,
    fixed_fields,
    keep_newest,
    load_tensors,
    save_checkpoint,
    verify_model,
)
from grpo_fast.train.finite import check_finite
from grpo_fast.train.groups import Groups, sample_groups, score_responses, token_advantages
from grpo_fast.train.interrupt import Interrupt
from grpo_fast.train.learner import Learner
from grpo_fast.train.metrics import completion_metrics, peak_memory, reward_metrics
from grpo_fast.train.optimizers import check_optimizer
from grpo_fast.train.run_folder import choose_run_folder, claim, refuse_other_run, release
from grpo_fast.train.trust import remember_own


class GRPOTrainer:
    """Trains a policy as `config` says, and writes the run folder.

    Args:
        config: the run.

    Raises:
        UserError: anything about the configuration, the data, the rewards or the model that would fail later.
    """

    def __init__(self, config: GRPOConfig):
        connect(config.use_cpu)
        self.config = config = adapter_fields(config)
        self.run_folder, found = on_main(partial(choose_run_folder, config))
        try:
            self.prepare(found)
        except BaseException:
            release(self.run_folder)
            raise

    def prepare(self, found: tuple[Path, TrainerState] | None) -> None:
        """Load and check everything, and go to the checkpoint that was `found`."""
        config = self.config
        self.objective = config.objective()
        check_support(config)
        self.rewards = RewardModel(
            config.reward_funcs,
            config.reward_weights,
            config.reward_timeout,
            config.on_reward_error,
            config.code_isolation,
        )
        self.rewards.warn = self.warn
        self.metric = self.rewards.index(config.eval_metric)
        self.score_name = f"eval/rewards/{self.rewards.names[self.metric]}/mean"
        self.train_rows, self.eval_rows = load_rows(config)
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
        on_main(lambda: verify_model(Path(config.model_name_or_path)))
        model, self.tokenizer = load_model(config)
        if not config.use_peft:
            check_finite(model.named_parameters(), f"model_name_or_path={config.model_name_or_path!r}")
        arguments = (self.tokenizer, config, max_positions(model.config))
        self.train_rows, self.train_prompts = encode_rows(self.train_rows, *arguments, "training", self.warn)
        self.eval_rows, self.eval_prompts = encode_rows(self.eval_rows, *arguments, "held-out", self.warn)
        check_vocabulary(model, self.train_prompts + self.eval_prompts, self.tokenizer)
        self.learner = Learner(model, config, self.accelerator, self.train_prompts[0], self.tokenizer.pad_token_id)
        self.adapter, self.model = self.learner.adapter, model
        on_main(lambda: check_space(model, self.run_folder, config))
        self.rollout = self.build_sampler()
        self.sampling = Sampling.from_config(config, config.num_generations)
        self.eval_sampling = Sampling.from_config(config, config.num_generations_eval)
        self.rollout.check(self.train_prompts[0], self.sampling)
        self.signals, self.warnings = LearningSignals(config), Warnings(self.run_folder / "warnings.jsonl")
        # The rows whose completions are being sampled while this step's are trained on.
        self.ahead: list[int] = []
        self.fixed = (
            fixed_fields(config)
            | random_base(config)
            | {
                "number of parameters": sum(p.numel() for p in model.parameters()),
                "training data": fingerprint(self.train_prompts),
                "held-out data": fingerprint(self.eval_prompts),
            }
        )
        # Where the run is between two updates; `updates_left` are those to come on the same generation batch.
        self.step = self.saved_step = self.updates_left = self.num_tokens = self.num_prompts = 0
        self.train_seconds, self.before = 0.0, math.nan
        # That of the checkpoint that the run goes on from.
        self.old_learning_rate = config.learning_rate
        # The last step that was evaluated, with its figures where this process made them; the best one so far.
        self.evaluated_step, self.held_out = 0, {}
        self.best_step, self.best_score = 0, -math.inf
        self.rng: dict[str, Tensor] = {}
        if found is not None:
            self.restore(*found)
        self.order = prompt_order(len(self.train_rows), config.shuffle_dataset, config.seed, self.num_prompts)

    def warn(self, text: str) -> None:
        """Say something before the run's own lines begin, once for all processes."""
        if is_main():
            say(f"warning: {text}", file=sys.stderr)

    def build_sampler(self) -> Sampler:
        """The engine that `config` names, synced with the policy and probed whenever it has changed."""
        config = self.config
        longest = max(map(len, self.train_prompts + self.eval_prompts)) + config.max_completion_length
        allowed = tolerance(config, self.model.dtype)
        probe = Probe(self.train_prompts[0], longest, config.temperature, allowed)
        build = partial(build_rollout, config, self.model, self.tokenizer, longest - config.max_completion_length)
        gathered = partial(whole_weights, self.learner.policy)
        engine = build() if size() == 1 else DealtRollout(build, config.use_vllm, gathered)
        return Sampler(engine, self.adapter or self.model, probe, self.learner.score_completion)

    def train(self) -> Summary:
        """Evaluate, train for `max_steps` optimizer steps, evaluate again, and write the run folder.

        A run that is stopped, by a signal, by the user or by wrong rewards, still leaves its metrics and a checkpoint.
        A resumed one goes on after its last checkpoint as if it had never stopped.
        """
        try:
            with lasting_output():
                return self.run()
        finally:
            release(self.run_folder)

    def run(self) -> Summary:
        """The run in its folder, which no other process writes to."""
        config, folder = self.config, self.run_folder
        metric = self.rewards.names[self.metric]
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
        with progress, trackers, closing(self.rollout), lines as metrics_file:
            if self.rollout.engine.warning:
                progress.warn(self.rollout.engine.warning)
            if self.step:
                progress.phase(f"going on from {folder / f'checkpoint-{self.step}'}{self.changed_learning_rate()}")
                progress.started(self.before)
            else:
                start = f"no checkpoint in {folder}: starting from the beginning; " * config.resume_from_checkpoint
                if (adapter := find_adapter(config)) is not None:
                    own = ", ".join(f"{name} {getattr(config, name)}" for name in LORA_FIELDS)
                    progress.phase(f"training the adapter {adapter.name} of {adapter.base} further, with its own {own}")
                progress.phase(f"{start}measuring {metric} before training on {len(self.eval_rows)} held-out prompts")
                figures = self.evaluate()
                self.before = figures[self.score_name]
                progress.started(self.before)
                trackers.log(figures, step=self.step)

            def log(metrics: dict[str, float]) -> None:
                history.append(metrics)
                if self.step in (self.evaluated_step, config.max_steps) or self.step % config.logging_steps == 0:
                    metrics_file.write(metrics)
                    trackers.log(metrics, step=self.step)
                progress.update(metrics)

            checkpoint = self.run_steps(log, progress)
            if not self.held_out or self.evaluated_step != self.step:
                progress.phase(f"measuring {metric} after training")
                self.held_out = self.evaluate()
                trackers.log(self.held_out, step=self.step)
            best = (self.best_score, f"checkpoint-{self.best_step}") if self.best_step else ()
            after = self.held_out[self.score_name]
            summary = Summary(metric, self.before, after, round(self.train_seconds, 2), self.step, *best)
            on_main(partial(self.write_end, summary, history))
        progress.finished(summary, checkpoint)
        return summary

    def changed_learning_rate(self) -> str:
        if self.old_learning_rate == self.config.learning_rate:
            return ""
        new, old = self.config.learning_rate, self.old_learning_rate
        return f" with learning_rate={new:g} instead of {old:g}, and with other prompts and random numbers"

    def open_folder(self) -> tuple[list[dict[str, float]], str]:
        """Write what is known when the run begins; the figures of earlier steps and a note, as in `cut_metrics`."""
        config, folder = self.config, self.run_folder
        claim(folder)
        if not config.resume_from_checkpoint:
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
        """The remaining steps, with a checkpoint every `save_steps` of them and after the last one, which is returned.

        Checkpoints fall between generation batches: with `num_iterations` above 1, one that is due, and a signal that
        stops the run, wait for the other updates on the same batch.
        """
        if self.rng:
            set_rng_state(self.rng)
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
                    if self.save_is_due() or self.best_step == self.step:
                        self.save()
                checkpoint = self.save()
            except CheckpointError:
                raise
            except NotFiniteError as error:
                raise UserError(f"{error}; {self.last_good(error.weights_lost)}") from None
            except (KeyboardInterrupt, UserError) as error:
                # A second Ctrl-C ends at once.
                if self.step and not (interrupt.signal and isinstance(error, KeyboardInterrupt)):
                    progress.stopped(self.step, self.save())
                raise
        if interrupt.signal:
            progress.stopped(self.step, checkpoint)
            interrupt.exit()
        return checkpoint

    def warn_once(self, name: str, text: str) -> None:
        """Say `text` in the step that is being taken, unless there was a warning of that name in this run."""
        on_main(partial(self.warnings.warn, self.step + 1, name, f"step {self.step + 1}: {text}"))

    def last_good(self, weights_lost: bool) -> str:
        """After a step that was not finite: the newest finite checkpoint, which nothing replaces, and how to go on."""
        if self.step and not weights_lost:
            # Whatever led here may have begun before this one, so those before it stay, too.
            self.save(remove_old=False)
        newest = self.run_folder / f"checkpoint-{self.saved_step}"
        whence = f"from {newest}, with other prompts" if self.saved_step else "from the beginning"
        resume = resume_command(self.run_folder, f"--learning_rate {self.config.learning_rate / 2:g}")
        return f"to go on {whence} and a smaller learning_rate: {resume}"

    def save_is_due(self) -> bool:
        every = self.config.save_steps
        return bool(every) and not self.updates_left and self.step // every != self.saved_step // every

    def evaluation_is_due(self) -> bool:
        """Every `eval_steps`, but between generation batches, and after the last step."""
        every = self.config.eval_steps
        due = bool(every) and (self.step // every != self.evaluated_step // every or self.step >= self.config.max_steps)
        return due and not self.updates_left

    def evaluate_step(self, progress: Progress) -> dict[str, float]:
        """The figures on the held-out prompts after this step, which may be the best one so far."""
        self.evaluated_step, self.held_out = self.step, self.evaluate()
        score = self.held_out[self.score_name]
        if self.config.keep_best and score > self.best_score:
            self.best_step, self.best_score = self.step, score
        progress.evaluated(self.step, score, best=self.best_step == self.step)
        return self.held_out

    def save(self, remove_old: bool = True) -> Path:
        """Write a checkpoint, unless this step has one, and remove those beyond `save_total_limit`.

        The weights are finite: a step that makes others ends in an error.
        """
        folder = self.run_folder / f"checkpoint-{self.step}"
        if self.saved_step != self.step:
            best = {"best_step": self.best_step, "best_score": self.best_score}
            state = TrainerState(
                self.step, self.num_tokens, self.num_prompts, self.train_seconds, self.before, self.fixed, **best
            )
            weights, tensors = self.learner.weights(), {**self.learner.tensors(), "rng": self.rng}
            arguments = (folder, self.adapter or self.model, self.tokenizer, state, tensors, weights)
            on_main(partial(save_checkpoint, *arguments))
            self.saved_step = self.step
            if remove_old:
                on_main(partial(keep_newest, self.run_folder, self.config.save_total_limit, self.best_step))
        return folder

    def restore(self, folder: Path, state: TrainerState) -> None:
        """Go on where the checkpoint was written."""
        check_same(folder, state.fixed, self.fixed)
        # The engine was tried out with the weights that the run began with.
        self.rollout.weights_change()
        self.learner.restore(folder, state.step)
        check_finite(self.learner.trained(), str(folder))
        self.rng = load_tensors(folder, "rng")
        self.step = self.saved_step = self.evaluated_step = state.step
        self.num_tokens, self.num_prompts, self.train_seconds = state.num_tokens, state.num_prompts, state.train_seconds
        self.before = math.nan if state.before is None else state.before
        self.best_step, self.best_score = state.best_step, -math.inf if state.best_score is None else state.best_score
        self.old_learning_rate = state.fixed.get("learning_rate", self.config.learning_rate)
        if self.old_learning_rate != self.config.learning_rate:
            # The same prompts and random numbers would lead to the same gradient, which may be what stopped the run.
            self.num_prompts += self.config.prompts_per_step
            torch.manual_seed(self.config.seed + state.step)
            self.rng["torch"] = torch.get_rng_state()
            if torch.cuda.is_initialized():
                self.rng["cuda.0"] = torch.cuda.get_rng_state()

    def steps(self) -> Iterator[dict[str, float]]:
        """Train, and yield the figures of every optimizer step. A generation batch serves `num_iterations` of them."""
        while self.step < self.config.max_steps:
            start = time.perf_counter()
            batch, figures = self.collect()
            for name, text in self.signals.observe(figures).items():
                self.warn_once(name, text)
            tokens = sum(len(sample.prompt_ids) + len(sample.completion_ids) for sample in batch.samples)
            updates = min(self.config.num_iterations, self.config.max_steps - self.step)
            if self.config.sample_ahead and self.step + updates < self.config.max_steps:
                self.ahead = self.draw(self.config.prompts_per_step)
                self.rollout.start([self.train_prompts[index] for index in self.ahead], self.sampling)
            self.rollout.weights_change()
            for iteration in range(updates):
                metrics = self.update(batch, keep_logprobs=self.config.num_iterations > 1 and iteration == 0)
                self.step += 1
                if iteration == 0:
                    self.num_tokens += tokens
                    self.num_prompts += batch.drawn
                self.learner.refresh_reference(self.step)
                self.updates_left = updates - iteration - 1
                # Kept for a checkpoint: should the next step fail, the generators will have moved on.
                self.rng = rng_state()
                seconds = time.perf_counter() - start
                self.train_seconds += seconds
                speed = {"step_time": seconds, "tokens_per_second": tokens / seconds}
                speed |= peak_memory(self.accelerator.device)
                yield {"step": self.step, **figures, **metrics, "num_tokens": self.num_tokens, **speed}
                start = time.perf_counter()

    def evaluate(self) -> dict[str, float]:
        """Figures of the policy on the held-out prompts; `self.score_name` names the run's score among them."""
        figures = evaluate(
            self.rollout, self.rewards, self.tokenizer, self.eval_rows, self.eval_prompts, self.eval_sampling,
            self.config.seed,
        )  # fmt: skip
        # The memory that it took is not the next step's.
        peak_memory(self.accelerator.device)
        return figures

    def sample(self, count: int) -> Groups:
        """The next `count` prompts, their completions, sampled now if not ahead, and rewards."""
        indices, self.ahead = self.ahead or self.draw(count), []
        rows, prompts = [self.train_rows[i] for i in indices], [self.train_prompts[i] for i in indices]
        responses = self.rollout.finish() or self.rollout.generate(prompts, self.sampling)
        return Groups(rows, prompts, *score_responses(self.rewards, self.tokenizer, rows, prompts, responses))

    def draw(self, count: int) -> list[int]:
        """The next `count` training rows."""
        return [next(self.order) for _ in range(count)]

    def collect(self) -> tuple[StepBatch, dict[str, float]]:
        """Rollout, rewards, advantages, token weights of the whole step, and what may be dropped."""
        config, weights = self.config, self.rewards.weights
        groups, drawn, metrics = sample_groups(self.sample, weights, config)
        advantages = reward_advantages(groups.rewards, weights, config)
        self.signals.see(groups.rewards.total.tolist())
        metrics |= reward_metrics(self.rewards.names, groups.rewards, advantages.equal)
        batch = build_step_batch(groups.samples(), groups.counted(config), self.objective, config)
        batch = dataclasses.replace(batch.to(self.accelerator.device), drawn=drawn)
        if config.corrects_sampler:
            sampled = [logprob for response in groups.responses for logprob in response.logprobs]
            batch.sampling_logprobs = torch.tensor(sampled).to(batch.weights)
        if config.uses_reference:
            batch.ref_logprobs = self.learner.score_reference(batch)
        if config.kl_in_reward:
            penalty, metrics["kl"] = self.learner.kl_penalty(batch)
            advantages = reward_advantages(groups.rewards, weights, config, penalty)
        batch.set_advantages(token_advantages(groups, advantages, self.tokenizer), self.objective)
        if self.logs_completions() and is_main():
            with LinesFile(self.run_folder / "completions" / f"completions_{self.step + 1:05d}.jsonl") as file:
                for line in groups.lines(self.step + 1, self.rewards.names, batch):
                    file.write(line)
        return batch, metrics | completion_metrics(groups.responses)

    def update(self, batch: StepBatch, keep_logprobs: bool = False) -> dict[str, float]:
        """One optimizer step; what stops it says where."""
        try:
            return self.learner.update(batch, keep_logprobs)
        except NotFiniteError as error:
            raise NotFiniteError(f"step {self.step + 1}: {error}", error.weights_lost) from None
        except UserError as error:
            figures = self.run_folder / "metrics.jsonl"
            raise UserError(f"step {self.step + 1}: {error}; the figures so far are in {figures}") from None

    def logs_completions(self) -> bool:
        """Whether one of the steps on the coming generation is due for its completions to be written."""
        every = self.config.log_completions_steps
        last = min(self.step + self.config.num_iterations, self.config.max_steps)
        return bool(every) and (self.step == 0 or self.step // every != last // every)
