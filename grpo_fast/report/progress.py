"""Console progress of a run: a live line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import math
import os
import shlex
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bar
from rich.table import Column, Table

from grpo_fast.config import GRPOConfig
from grpo_fast.distributed.processes import is_main, size
from grpo_fast.report import Summary, clock, curves_file, is_share, show
from grpo_fast.report.charts import figure
from grpo_fast.report.console import Terminal

# How many progress lines a run prints without a terminal, and the most characters of the score's name in them.
PLAIN_LINES, LONGEST_NAME = 20, 16
PRETRAINED_RECIPE = "smollm2_addition"


class Progress:
    """The progress line and the messages of a run. Use it as a context manager around the steps."""

    def __init__(self, config: GRPOConfig, run_folder: Path, metric: str, num_parameters: int):
        self.config, self.run_folder, self.metric = config, run_folder, metric
        self.words = WORDS[config.command]
        processes = f", {size()} processes" if size() > 1 else ""
        self.console = Terminal(quiet=not is_main())
        self.note(
            f"{config.model_name_or_path} ({figure(num_parameters)} parameters) on {config.dataset_name}: "
            f"{config.max_steps} steps of {self.words.batch(config)}, seed {config.seed}{processes}\n"
            f"run folder: {run_folder}"
        )
        count = 2 * len(str(config.max_steps)) + 1
        self.bar = Bar(
            BarColumn(bar_width=10),
            # A narrow terminal cuts the end of the line and leaves its beginning readable.
            TextColumn("{task.completed:.0f}/{task.total:.0f}", table_column=Column(no_wrap=True, min_width=count)),
            TextColumn("{task.fields[figures]}", markup=False, table_column=Column(no_wrap=True, overflow="ellipsis")),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self.task = self.bar.add_task("training", total=config.max_steps, figures="", visible=False)
        self.start, self.first_step = 0.0, 0

    def __enter__(self) -> Progress:
        self.bar.start()
        return self

    def __exit__(self, *_) -> None:
        self.bar.stop()

    def note(self, text: str, style: str | None = None) -> None:
        self.console.print(text, soft_wrap=True, style=style)

    def phase(self, text: str) -> None:
        self.note(f"{text} ...")

    def warn(self, text: str) -> None:
        self.note(f"warning: {text}", style="yellow")

    def stopped(self, step: int, checkpoint: Path) -> None:
        self.bar.stop()
        so_far = f"stopped after step {step}; the model so far: {checkpoint}"
        self.note(f"{so_far}; to continue: {resume_command(self.run_folder, self.config.command)}")

    def started(self, before: float) -> None:
        self.note(f"before: {self.metric} {show(before, is_share(before, metric=self.metric))}")
        self.start = time.perf_counter()
        self.bar.update(self.task, visible=True)

    def evaluated(self, step: int, score: float, best: bool) -> None:
        shown = show(score, is_share(score, metric=self.metric))
        self.note(f"step {step}: held-out {self.metric} {shown}{' (best so far)' * best}")

    def update(self, metrics: dict[str, float]) -> None:
        step, total = metrics["step"], self.config.max_steps
        # Only the steps of this process count: a resumed run does not begin with step 1.
        self.first_step = self.first_step or step
        left = (time.perf_counter() - self.start) / (step - self.first_step + 1) * (total - step)
        figures = f"left {clock(left)}  {step_figures(metrics, self.metric)}"
        self.bar.update(self.task, completed=step, figures=figures)
        if not self.console.is_terminal and (step == 1 or step % max(total // PLAIN_LINES, 1) == 0 or step >= total):
            self.note(f"step {step}/{total}  {figures}")

    def finished(self, summary: Summary, checkpoint: Path) -> None:
        table = Table(title=f"{summary.metric} on held-out {self.words.rows}", title_justify="left")
        for column in ("before", "after", "steps", "training time"):
            table.add_column(column, justify="right")
        share = is_share(summary.before, summary.after, metric=summary.metric)
        before, after = show(summary.before, share), show(summary.after, share)
        table.add_row(before, after, str(summary.steps), clock(summary.train_seconds))
        self.console.print(table)
        for label, path in (
            ("run folder", self.run_folder),
            ("report", self.run_folder / "report.html"),
            ("curves", self.run_folder / curves_file(summary.metric)),
            *([("completions", self.run_folder / "completions")] if self.words.samples else []),
            ("model", checkpoint),
            *([("best model", self.run_folder / summary.best_checkpoint)] if summary.best_checkpoint else []),
        ):
            self.note(f"{label + ':':<13}{path}")
        hints = self.words.hints(self.config, self.run_folder, checkpoint)
        self.note("\nWhat to try next", style="bold")
        for hint, arguments in hints.items():
            self.note(f"  {hint + ':':<20}{command()} {arguments}")


def _train_hints(config: GRPOConfig, run_folder: Path, checkpoint: Path) -> dict[str, str]:
    return {
        "another objective": f"train {run_folder / 'config.yaml'} --loss_type dr_grpo --output_dir runs/dr_grpo",
        **({} if "smollm2" in config.model_name_or_path else {"a pretrained model": f"train {PRETRAINED_RECIPE}"}),
        "your own task": "train CONFIG.yaml --dataset_name my.jsonl --reward_funcs '[my_rewards.py:my_reward]'",
    }


def _sft_hints(config: GRPOConfig, run_folder: Path, checkpoint: Path) -> dict[str, str]:
    return {
        "GRPO from here": f"train CONFIG.yaml --model_name_or_path {checkpoint}",
        "its accuracy": f"eval CONFIG.yaml --model_name_or_path {checkpoint}",
    }


class Words(NamedTuple):
    """How the console speaks of a run: its steps' batches, its held-out rows, whether it samples, what to try next."""

    batch: Callable[[GRPOConfig], str]
    rows: str
    samples: bool
    hints: Callable[[GRPOConfig, Path, Path], dict[str, str]]


# By the command of the configuration.
WORDS = {
    "train": Words(
        lambda c: f"{c.prompts_per_step} prompts x {c.num_generations} completions, loss {c.loss_type}",
        "prompts", True, _train_hints,
    ),
    "distill": Words(
        lambda c: (
            f"{c.prompts_per_step} prompts x {c.num_generations} completions, {c.distillation_loss} divergence from "
            f"{c.teacher_model_name_or_path}"
        ),
        "prompts", True, _sft_hints,
    ),
    "sft": Words(lambda c: f"{c.prompts_per_step} examples", "rows", False, _sft_hints),
}  # fmt: skip


def step_figures(metrics: dict[str, float], metric: str) -> str:
    """One step in about 80 characters: reward, score, mean response length, speed and peak memory.

    Without rewards, those are the score and the norm of the gradient.
    """
    memory = metrics.get("memory/peak_allocated_gib", metrics.get("memory/peak_rss_gib"))
    peak = "" if memory is None else f"  {memory:.1f} GiB"
    speed = f"{metrics['tokens_per_second']:,.0f} tokens/s{peak}"
    if f"rewards/{metric}/mean" not in metrics:
        norm = "" if "grad_norm" not in metrics else f"grad_norm {metrics['grad_norm']:.3f}  "
        return f"{metric} {metrics.get(metric, math.nan):.4f}  {norm}{speed}"
    score = metrics[f"rewards/{metric}/mean"]
    name = metric if len(metric) <= LONGEST_NAME else metric[: LONGEST_NAME - 1] + "…"
    scores = f"reward {metrics['reward']:.3f}  {name} {show(score, is_share(score))}"
    return f"{scores}  length {metrics['completions/mean_length']:.0f}  {speed}"


def command() -> str:
    """How this program was called, for commands that can be pasted."""
    program = Path(sys.argv[0])
    if program.name != "grpo-fast" or shutil.which("grpo-fast"):
        return "grpo-fast"
    return min(sys.argv[0], os.path.relpath(program), key=len)


def resume_command(run_folder: Path, kind: str, options: str = "") -> str:
    """The command that resumes a run, which the command `kind` started."""
    return f"{command()} {kind} {shlex.quote(str(run_folder / 'config.yaml'))} --resume {options}".rstrip()
