"""Console progress of ``grpo-fast eval``: a live line on a terminal, plain lines elsewhere, and a final table."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bar
from rich.table import Column, Table

from grpo_fast.report import clock, is_share, show
from grpo_fast.report.console import Terminal


class EvalProgress:
    """Progress of an evaluation; use it as a context manager around the evaluation."""

    def __init__(self, title: str, num_prompts: int, metric: str, folder: Path, kind: str = "held-out"):
        self.title, self.num_prompts, self.metric, self.folder = title, num_prompts, metric, folder
        self.console = Terminal()
        self.console.print(title, soft_wrap=True)
        self.bar = Bar(
            BarColumn(bar_width=10),
            TextColumn("{task.fields[figures]}", markup=False, table_column=Column(no_wrap=True, overflow="ellipsis")),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self.task = self.bar.add_task("evaluating", total=num_prompts, figures="")
        self.start, self.first = time.perf_counter(), None
        self.kind = kind

    def __enter__(self) -> EvalProgress:
        self.bar.start()
        return self

    def __exit__(self, *_) -> None:
        self.bar.stop()

    def warn(self, text: str) -> None:
        self.console.print(f"warning: {text}", soft_wrap=True, style="yellow")

    def update(self, lines: list[dict[str, Any]]) -> None:
        """Show the progress and the mean score of the lines of ``samples.jsonl`` so far."""
        done = lines[-1]["index"] + 1 if lines else 0
        figures = f"{done}/{self.num_prompts} prompts"
        # Prompts from before a resume do not count towards the speed.
        self.first = done if self.first is None else self.first
        if done > self.first:
            left = (time.perf_counter() - self.start) / (done - self.first) * (self.num_prompts - done)
            figures += f"  left {clock(left)}"
        if values := [value for line in lines if (value := line["rewards"][self.metric]) is not None]:
            score = sum(values) / len(values)
            figures += f"  {self.metric} {show(score, is_share(score))}"
        self.bar.update(self.task, completed=done, figures=figures)
        if not self.console.is_terminal and done:
            self.console.print(figures, soft_wrap=True)

    def stopped(self, command: str) -> None:
        self.bar.stop()
        self.console.print(f"stopped; the samples so far are in {self.folder}; to continue: {command}", soft_wrap=True)

    def finished(self, summary: dict[str, Any]) -> None:
        table = Table(title=f"on {self.num_prompts} {self.kind} prompts", title_justify="left")
        table.add_column("reward")
        for column in ("estimate", "value", "95% interval", "standard error"):
            table.add_column(column, justify="right")
        for metric, estimates in summary["metrics"].items():
            for row, (label, found) in enumerate(estimates.items()):
                share = found["value"] is not None and is_share(abs(found["value"]))
                value, low, high, error = (
                    "n/a" if found[name] is None else show(found[name], share)
                    for name in ("value", "low", "high", "standard_error")
                )
                interval = low if low == high else f"{low} to {high}"
                table.add_row(metric if row == 0 else "", label, value, interval, error)
        self.console.print(table)
        if summary["compared_with"]:
            self.console.print(
                f"difference: to the means in {summary['compared_with']}, paired by prompt", soft_wrap=True
            )
        self.console.print(
            f"mean length {summary['mean_length']:.1f} tokens, {summary['clipped_ratio']:.1%} cut off", soft_wrap=True
        )
        for label, name in (("samples", "samples.jsonl"), ("summary", "summary.json")):
            self.console.print(f"{label + ':':<9}{self.folder / name}", soft_wrap=True)
