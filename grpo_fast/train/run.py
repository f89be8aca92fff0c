"""What every kind of training run does around its steps: folder, metrics, evaluation, checkpoints, signals, the end.

A kind of run (`GRPOTrainer`, `SFTTrainer`) prepares its parts, yields the metrics of its steps, and measures itself on
held-out rows.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from grpo_fast.config import UNSET, GRPOConfig, steps_of_epochs
from grpo_fast.data import prompt_order
from grpo_fast.distributed.processes import is_main, on_main
from grpo_fast.distributed.rng import set_rng_state
from grpo_fast.distributed.sharding import check_processes, ddp_arguments
from grpo_fast.errors import CheckpointError, NotFiniteError, UserError, say, writing
from grpo_fast.files import LinesFile, cut_metrics, remove_leftovers, user_path
from grpo_fast.model import loading
from grpo_fast.model.activations import check_activations
from grpo_fast.report import Summary, curves_file, plot_run, write_config, write_json, write_report
from grpo_fast.report.learning_checks import Warnings
from grpo_fast.report.progress import Progress
from grpo_fast.report.terminal import lasting_output
from grpo_fast.report.trackers import Trackers, tracker_arguments
from grpo_fast.train import checkpoint
from grpo_fast.train.batch import StepBatch
from grpo_fast.train.checkpoint import TrainerState
from grpo_fast.train.interrupt import Interrupt
from grpo_fast.train.learner import Learner
from grpo_fast.train.optimizers import check_optimizer
from grpo_fast.train.run_folder import claim, refuse_other_run, release
from grpo_fast.train.saver import Saver
from grpo_fast.train.trust import remember_own


class TrainingRun(ABC):
    """A run in its folder. A kind of run sets these attributes before `train`, some of them by the methods here.

    Attributes:
        config: the run's configuration.
        run_folder: claimed for this process.
        score: what the console and the files call the score on held-out rows.
        score_name: the score's name among the metrics of `measure`.
        lower_is_better: whether a lower score is the better one.
        train_rows: what is trained on; only their number matters here.
        learner, model, adapter, tokenizer: the policy; `adapter` is its PeftModel, or None.
    """

    config: GRPOConfig
    run_folder: Path
    score: str
    score_name: str
    lower_is_better = False
    train_rows: list[Any]
    learner: Learner
    model: nn.Module
    adapter: Any
    tokenizer: Any

    @abstractmethod
    def steps(self) -> Iterator[dict[str, float]]:
        """Train, and yield the metrics of every optimizer step."""

    @abstractmethod
    def measure(self) -> dict[str, float]:
        """The metrics on the held-out rows."""

    @abstractmethod
    def announce(self, progress: Progress) -> None:
        """Print what the user should know before the first step."""

    def held_out_rows(self) -> str:
        """The rows that are held out, in words."""
        return "held-out rows"

    @abstractmethod
    def open(self) -> None:
        """Get ready to measure and train again, after `close`."""

    @abstractmethod
    def close(self) -> None:
        """Free what the run no longer needs."""

    def start_devices(self) -> None:
        """Connect the processes, and check that device and libraries can do what the configuration wants."""
        config = self.config
        self.accelerator = Accelerator(
            mixed_precision="bf16" if config.bf16 else "no", cpu=config.use_cpu, kwargs_handlers=[ddp_arguments()],
            **tracker_arguments(config, self.run_folder),
        )  # fmt: skip
        check_processes(config, self.accelerator)
        check_optimizer(config, self.accelerator.device)
        check_activations(config, self.accelerator.device)
        torch.manual_seed(config.seed)

    def resolve_steps(self, found: tuple[Path, TrainerState] | None) -> None:
        """Set `max_steps` where epochs decide it; `found` is the checkpoint to continue from."""
        config = self.config
        if config.max_steps != UNSET:
            return
        steps = steps_of_epochs(config, len(self.train_rows))
        self.config = dataclasses.replace(config, max_steps=steps)
        if found is not None and found[1].step > steps:
            raise UserError(
                f"num_train_epochs={config.num_train_epochs:g} makes {steps} steps, less than the {found[1].step} "
                f"of {found[0]}"
            )

    def start_saver(self, found: tuple[Path, TrainerState] | None, fixed: dict[str, Any]) -> None:
        """Get ready to write checkpoints, and restore the one that was `found`.

        `fixed` is what a resumed run must have in common with this one, beside its settings.
        """
        config, model = self.config, self.model
        on_main(lambda: checkpoint.check_space(model, self.run_folder, config))
        self.warnings = Warnings(self.run_folder / "warnings.jsonl")
        fixed = {**checkpoint.fixed_fields(config), **fixed}
        fixed["number of parameters"] = sum(p.numel() for p in model.parameters())
        self.saver = Saver(config, self.run_folder, self.learner, self.adapter or model, self.tokenizer, fixed)
        # Where the run is between two updates, `updates_left` of which are still to come on the same generation batch.
        self.updates_left = self.skipped = 0
        # The last step that was evaluated, and its metrics if this process measured them.
        self.evaluated_step, self.held_out = 0, {}
        self.resuming = config.resume_from_checkpoint
        if found is not None:
            self.restore(*found)
        self.order = self.prompt_order()

    def prompt_order(self) -> Iterator[int]:
        """The training rows that are still to be drawn."""
        config = self.config
        return prompt_order(len(self.train_rows), config.shuffle_dataset, config.seed, self.state.num_prompts)

    def draw(self, count: int) -> list[int]:
        """The next `count` training rows."""
        return [next(self.order) for _ in range(count)]

    @property
    def state(self) -> TrainerState:
        """What the next checkpoint records about the run."""
        return self.saver.state

    @property
    def step(self) -> int:
        """Optimizer steps so far."""
        return self.state.step

    def warn(self, text: str) -> None:
        """Print a warning before the run's own output begins, once for all processes."""
        if is_main():
            say(f"warning: {text}", file=sys.stderr)

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
            raise UserError("to resume a run, set output_dir of its configuration to its folder")
        found = on_main(partial(checkpoint.find_checkpoint, self.run_folder, self.config))
        if wanted is not True:
            checkpoint.check_newest(Path(wanted), self.run_folder, found and found[0])
        self.resuming = True
        if found is not None:
            self.restore(*found)
            self.order = self.prompt_order()

    def run(self) -> Summary:
        """The run in its claimed folder."""
        config, folder, metric = self.config, self.run_folder, self.score
        self.open()
        history, note = on_main(self.open_folder)
        progress = Progress(config, folder, metric, sum(p.numel() for p in self.model.parameters()))
        if note:
            progress.warn(note)
        on_main(partial(self.warnings.start, self.step, progress.warn))
        trackers = Trackers(self.accelerator, config, folder, progress.warn)
        lines = LinesFile(folder / "metrics.jsonl", append=True, checksums=True)
        with progress, trackers, closing(self), lines as metrics_file:
            self.announce(progress)
            if self.step:
                new, old = config.learning_rate, self.saver.resumed_learning_rate
                changed = f" with learning_rate={new:g} instead of {old:g}, and with other prompts and random numbers"
                progress.phase(f"resuming from {folder / f'checkpoint-{self.step}'}{changed * (new != old)}")
            else:
                start = f"no checkpoint in {folder}: starting from the beginning; " * self.resuming
                if (adapter := self.own_adapter()) is not None:
                    own = ", ".join(f"{name} {getattr(config, name)}" for name in loading.LORA_FIELDS)
                    progress.phase(f"training the adapter {adapter.name} of {adapter.base} further, with its own {own}")
                progress.phase(f"{start}measuring {metric} before training on {self.held_out_rows()}")
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
        return cut_metrics(folder / "metrics.jsonl", self.step)

    def write_end(self, summary: Summary, history: list[dict[str, float]]) -> None:
        write_json(self.run_folder / "summary.json", dataclasses.asdict(summary))
        if history:
            plot_run(history, summary, self.run_folder / curves_file(summary.metric))
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
        sign = -1 if self.lower_is_better else 1
        # A score that is NaN is never better.
        if self.config.keep_best and sign * score > (sign * state.best_score if state.best_step else -math.inf):
            state.best_step, state.best_score = self.step, score
        progress.evaluated(self.step, score, best=state.best_step == self.step)
        return self.held_out

    def restore(self, folder: Path, state: TrainerState) -> None:
        """Continue from a checkpoint."""
        checkpoint.check_same(folder, state.fixed, self.state.fixed)
        self.updates_left = 0
        self.saver.restore(folder, state)
        self.evaluated_step = state.step

    def save_model(self, output_dir: str | Path | None = None) -> Path:
        """Write what `from_pretrained` loads (of an adapted model the adapter) and the tokenizer.

        `output_dir` is the run folder by default. Returns the folder.
        """
        folder = self.run_folder if output_dir is None else user_path(str(output_dir))
        self.saver.save_model(folder)
        return folder

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

    def own_adapter(self) -> loading.Adapter | None:
        """The adapter that the configuration names, which the run trains further."""
        return loading.find_adapter(self.config)
