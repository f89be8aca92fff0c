"""What a person sees while a run goes on: a live line on a terminal, plain lines anywhere else."""

from __future__ import annotations

import os
import shutil
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar
from rich.table import Table

from grpo_fast.config import GRPOConfig
from grpo_fast.report import Summary, is_share, show

# Lines printed in all where there is no terminal.
PLAIN_LINES = 20
PRETRAINED_RECIPE = Path("examples/smollm2_addition.yaml")


class Progress:
    """Live figures of a run; use as a context manager around it."""

    def __init__(self, config: GRPOConfig, run_folder: Path, metric: str, num_parameters: int):
        self.config, self.run_folder, self.metric = config, run_folder, metric
        # Paths may hold brackets, which are not markup.
        self.console = Console(highlight=False, markup=False)
        self.console.print(
            f"{config.model_name_or_path} ({_count(num_parameters)} parameters) on "
            f"{config.dataset_name}: {config.max_steps} steps of {config.prompts_per_step} prompts x "
            f"{config.num_generations} completions, loss {config.loss_type}, seed {config.seed}",
            soft_wrap=True,
        )
        self.console.print(f"run folder: {run_folder}", soft_wrap=True)
        self.bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            TextColumn("{task.fields[figures]}", markup=False),
            TimeElapsedColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self.task = self.bar.add_task("training", total=config.max_steps, figures="", visible=False)
        self.start = 0.0

    def __enter__(self) -> Progress:
        self.bar.start()
        return self

    def __exit__(self, *_) -> None:
        self.bar.stop()

    def phase(self, text: str) -> None:
        self.console.print(f"{text} ...", soft_wrap=True)

    def stopped(self, step: int, checkpoint: Path) -> None:
        self.bar.stop()
        self.console.print(f"stopped after step {step}; the model so far: {checkpoint}", soft_wrap=True)

    def started(self, before: float) -> None:
        self.console.print(f"before: {self.metric} {show(before, is_share(before))}")
        self.start = time.perf_counter()
        self.bar.update(self.task, visible=True)

    def update(self, metrics: dict[str, float]) -> None:
        step, total = metrics["step"], self.config.max_steps
        left = (time.perf_counter() - self.start) / step * (total - step)
        score = metrics[f"rewards/{self.metric}/mean"]
        figures = (
            f"reward {metrics['reward']:.3f}  {self.metric} {show(score, is_share(score))}  "
            f"{metrics['tokens_per_second']:,.0f} tokens/s  left {_clock(left)}"
        )
        self.bar.update(self.task, completed=step, figures=figures)
        if not self.console.is_terminal and (step == 1 or step % max(total // PLAIN_LINES, 1) == 0 or step >= total):
            self.console.print(f"step {step}/{total}  {figures}", soft_wrap=True)

    def finished(self, summary: Summary, checkpoint: Path) -> None:
        table = Table(title=f"{summary.metric} on held-out prompts", title_justify="left")
        for column in ("before", "after", "steps", "training time"):
            table.add_column(column, justify="right")
        share = is_share(summary.before, summary.after)
        table.add_row(
            show(summary.before, share), show(summary.after, share), str(summary.steps), _clock(summary.train_seconds)
        )
        self.console.print(table)
        for label, path in (
            ("run folder", self.run_folder),
            ("curves", self.run_folder / "reward.png"),
            ("completions", self.run_folder / "completions"),
            ("model", checkpoint),
        ):
            self.console.print(f"{label + ':':<13}{path}", soft_wrap=True)
        self.console.print("\nWhat to try next", style="bold")
        for hint, arguments in self._hints():
            self.console.print(f"  {hint + ':':<20}{_command()} train {arguments}", soft_wrap=True)

    def _hints(self) -> list[tuple[str, str]]:
        hints = [
            ("another objective", f"{self.run_folder / 'config.yaml'} --loss_type dr_grpo --output_dir runs/dr_grpo")
        ]
        if PRETRAINED_RECIPE.exists() and "smollm2" not in self.config.model_name_or_path:
            hints.append(("a pretrained model", str(PRETRAINED_RECIPE)))
        task = "CONFIG.yaml --dataset_name my.jsonl --reward_funcs '[my_rewards.py:my_reward]'"
        return [*hints, ("your own task", task)]


def _command() -> str:
    """The program as it was called, for hints that can be pasted."""
    program = Path(sys.argv[0])
    if program.name != "grpo-fast" or shutil.which("grpo-fast"):
        return "grpo-fast"
    return min(sys.argv[0], os.path.relpath(program), key=len)


def _clock(seconds: float) -> str:
    return f"{int(seconds // 60)}:{int(seconds % 60):02d}"


def _count(number: int) -> str:
    for limit, suffix in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= limit:
            return f"{number / limit:.3g}{suffix}"
    return str(number)
