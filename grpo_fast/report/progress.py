"""What a person sees while a run goes on: a live line on a terminal, plain lines anywhere else."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
import time
from pathlib import Path

from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bar
from rich.table import Column, Table

from grpo_fast.config import GRPOConfig
from grpo_fast.distributed.processes import is_main, size
from grpo_fast.report import Summary, clock, is_share, show
from grpo_fast.report.console import Terminal

# Lines printed in all where there is no terminal.
PLAIN_LINES = 20
# A longer name of the score is cut in the line of figures.
LONGEST_NAME = 16
PRETRAINED_RECIPE = "smollm2_addition"


class Progress:
    """Live figures of a run; use as a context manager around it."""

    def __init__(self, config: GRPOConfig, run_folder: Path, metric: str, num_parameters: int):
        self.config, self.run_folder, self.metric = config, run_folder, metric
        processes = f", {size()} processes" if size() > 1 else ""
        self.console = Terminal(quiet=not is_main())
        self.console.print(
            f"{config.model_name_or_path} ({_count(num_parameters)} parameters) on "
            f"{config.dataset_name}: {config.max_steps} steps of {config.prompts_per_step} prompts x "
            f"{config.num_generations} completions, loss {config.loss_type}, seed {config.seed}{processes}",
            soft_wrap=True,
        )
        self.console.print(f"run folder: {run_folder}", soft_wrap=True)
        count = 2 * len(str(config.max_steps)) + 1
        self.bar = Bar(
            BarColumn(bar_width=10),
            # Where a line is too short, its end is cut, not its beginning squeezed.
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

    def phase(self, text: str) -> None:
        self.console.print(f"{text} ...", soft_wrap=True)

    def note(self, text: str) -> None:
        self.console.print(text, soft_wrap=True)

    def warn(self, text: str) -> None:
        self.console.print(f"warning: {text}", soft_wrap=True, style="yellow")

    def stopped(self, step: int, checkpoint: Path) -> None:
        self.bar.stop()
        resume = resume_command(self.run_folder)
        self.console.print(
            f"stopped after step {step}; the model so far: {checkpoint}; to go on: {resume}", soft_wrap=True
        )

    def started(self, before: float) -> None:
        self.console.print(f"before: {self.metric} {show(before, is_share(before))}")
        self.start = time.perf_counter()
        self.bar.update(self.task, visible=True)

    def evaluated(self, step: int, score: float, best: bool) -> None:
        note = " (the best so far)" * best
        self.console.print(f"step {step}: held-out {self.metric} {show(score, is_share(score))}{note}", soft_wrap=True)

    def update(self, metrics: dict[str, float]) -> None:
        step, total = metrics["step"], self.config.max_steps
        # A resumed run does not begin with step 1.
        self.first_step = self.first_step or step
        left = (time.perf_counter() - self.start) / (step - self.first_step + 1) * (total - step)
        figures = f"left {clock(left)}  {step_figures(metrics, self.metric)}"
        self.bar.update(self.task, completed=step, figures=figures)
        if not self.console.is_terminal and (step == 1 or step % max(total // PLAIN_LINES, 1) == 0 or step >= total):
            self.console.print(f"step {step}/{total}  {figures}", soft_wrap=True)

    def finished(self, summary: Summary, checkpoint: Path) -> None:
        table = Table(title=f"{summary.metric} on held-out prompts", title_justify="left")
        for column in ("before", "after", "steps", "training time"):
            table.add_column(column, justify="right")
        share = is_share(summary.before, summary.after)
        table.add_row(
            show(summary.before, share), show(summary.after, share), str(summary.steps), clock(summary.train_seconds)
        )
        self.console.print(table)
        for label, path in (
            ("run folder", self.run_folder),
            ("report", self.run_folder / "report.html"),
            ("curves", self.run_folder / "reward.png"),
            ("completions", self.run_folder / "completions"),
            ("model", checkpoint),
            *([("best model", self.run_folder / summary.best_checkpoint)] if summary.best_checkpoint else []),
        ):
            self.console.print(f"{label + ':':<13}{path}", soft_wrap=True)
        self.console.print("\nWhat to try next", style="bold")
        for hint, arguments in self._hints():
            self.console.print(f"  {hint + ':':<20}{command()} train {arguments}", soft_wrap=True)

    def _hints(self) -> list[tuple[str, str]]:
        hints = [
            ("another objective", f"{self.run_folder / 'config.yaml'} --loss_type dr_grpo --output_dir runs/dr_grpo")
        ]
        if "smollm2" not in self.config.model_name_or_path:
            hints.append(("a pretrained model", PRETRAINED_RECIPE))
        task = "CONFIG.yaml --dataset_name my.jsonl --reward_funcs '[my_rewards.py:my_reward]'"
        return [*hints, ("your own task", task)]


def step_figures(metrics: dict[str, float], metric: str) -> str:
    """A step in one line of at most 80 characters: reward, score, mean response length, speed and peak memory."""
    score = metrics[f"rewards/{metric}/mean"]
    name = metric if len(metric) <= LONGEST_NAME else metric[: LONGEST_NAME - 1] + "…"
    memory = metrics.get("memory/peak_allocated_gib", metrics.get("memory/peak_rss_gib"))
    figures = [
        f"reward {metrics['reward']:.3f}",
        f"{name} {show(score, is_share(score))}",
        f"length {metrics['completions/mean_length']:.0f}",
        f"{metrics['tokens_per_second']:,.0f} tokens/s",
        *([] if memory is None else [f"{memory:.1f} GiB"]),
    ]
    return "  ".join(figures)


def command() -> str:
    """The program as it was called, for hints that can be pasted."""
    program = Path(sys.argv[0])
    if program.name != "grpo-fast" or shutil.which("grpo-fast"):
        return "grpo-fast"
    return min(sys.argv[0], os.path.relpath(program), key=len)


def resume_command(run_folder: Path, options: str = "") -> str:
    """What goes on with a run."""
    return f"{command()} train {shlex.quote(str(run_folder / 'config.yaml'))} --resume {options}".rstrip()


def _count(number: int) -> str:
    for limit, suffix in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= limit:
            return f"{number / limit:.3g}{suffix}"
    return str(number)
