"""``grpo-fast compare``: several runs in one figure, where runs that differ only in their seed share a curve."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grpo_fast.config import FREE_FIELDS
from grpo_fast.errors import UserError, say
from grpo_fast.report.curves import column, known, mean, new_panels, plain, save_figure, smooth
from grpo_fast.report.run import Run, read_run
from grpo_fast.report.summary import LOSSES, is_share, show

COLORS = ["#1f6feb", "#1a7f37", "#cf222e", "#9a6700", "#8250df", "#0a7f8c", "#bf3989", "#57606a", "#000000", "#bc4c00"]
# Fields in which runs of one curve may differ: their names and folders, the seed, and what changes no result.
LEFT_OUT = FREE_FIELDS - {"max_steps"} | {"seed"}


@dataclass(frozen=True)
class Curve:
    """One setting: for each seed, the steps and the smoothed training metric, and its mean over the last tenth of the
    steps. `before` and `after` are the held-out scores of the finished runs whose score is this metric."""

    label: str
    lines: list[tuple[list[int], list[float]]]
    last: list[float]
    before: list[float]
    after: list[float]


def read_curves(folders: Sequence[Path], metric: str | None = None) -> tuple[str, list[Curve]]:
    """The metric's name, and a curve for every setting among the runs, in their order.

    Args:
        folders: run folders; the runs need not have finished.
        metric: the name of a reward function or of any metric in ``metrics.jsonl`` (default: the runs' score).

    Raises:
        UserError: a folder holds no run, the runs have different scores, or a run does not have this metric.
    """
    runs = [read_run(folder) for folder in folders]
    for run in runs:
        for line in run.damaged:
            say(f"warning: {run.folder}: {line}", file=sys.stderr)
    metrics = [metric or _score(run) for run in runs]
    for run, name in zip(runs, metrics, strict=True):
        if name != metrics[0]:
            raise UserError(
                f"{runs[0].folder} is scored by {metrics[0]!r}, {run.folder} by {name!r}; choose one with --metric"
            )
    settings: dict[str, list[Run]] = {}
    for run in runs:
        fixed = {name: value for name, value in run.config.items() if name not in LEFT_OUT}
        settings.setdefault(json.dumps(fixed, sort_keys=True), []).append(run)
    groups = list(settings.values())
    labels = _labels([group[0].config for group in groups])
    return metrics[0], [_curve(label, group, metrics[0]) for label, group in zip(labels, groups, strict=True)]


def _score(run: Run) -> str:
    functions = run.config.get("reward_funcs") or "reward"
    last = str(functions[-1] if isinstance(functions, list) else functions)
    return str(run.summary.get("metric") or run.config.get("eval_metric") or re.split("[.:]", last)[-1])


def _labels(configs: list[dict[str, Any]]) -> list[str]:
    """The runs' names; settings that share a name are labelled with the fields in which they differ."""
    names = [str(config.get("run_name") or "run") for config in configs]
    labels = []
    for config, name in zip(configs, names, strict=True):
        alike = [other for other, same in zip(configs, names, strict=True) if same == name]
        keys = [key for key in config if key not in LEFT_OUT and any(other.get(key) != config[key] for other in alike)]
        labels.append(", ".join(f"{key}={config[key]}" for key in keys) or name)
    return labels


def _curve(label: str, runs: list[Run], metric: str) -> Curve:
    lines, last = [], []
    for run in runs:
        name = f"rewards/{metric}/mean" if any(f"rewards/{metric}/mean" in entry for entry in run.history) else metric
        values = column(run.history, name)
        if not known(values):
            raise UserError(f"{run.folder} has no values of {metric!r} (yet)")
        lines.append(([entry["step"] for entry in run.history], smooth(values)))
        last.append(mean(values[-max(len(values) // 10, 1) :]))
    ended = [run.summary for run in runs if run.summary.get("metric") == metric]
    before, after = ([s[name] for s in ended if s.get(name) is not None] for name in ("before", "after"))
    return Curve(label, lines, last, before, after)


def spread(values: list[float], share: bool) -> str:
    """The mean, and the range if there are several values; `share` prints percentages."""
    if not values:
        return ""
    average = show(sum(values) / len(values), share)
    return f"{average} ({show(min(values), share)} to {show(max(values), share)})" if len(values) > 1 else average


def plot_curves(panels: dict[str, list[Curve]], metric: str, path: Path) -> None:
    """Draw each entry as a panel: every seed as a thin line, the mean over a setting's seeds as a thick one."""
    figure, axes = new_panels(1, len(panels), (1 + 5 * len(panels), 4.8), sharey=True)
    values = [value for curves in panels.values() for curve in curves for _, line in curve.lines for value in line]
    share = is_share(*known(values), metric=metric)
    ended = all(curve.after for curves in panels.values() for curve in curves)
    for axis, (title, curves) in zip(axes[0], panels.items(), strict=True):
        for index, curve in enumerate(curves):
            color = COLORS[index % len(COLORS)]
            for steps, line in curve.lines:
                axis.plot(steps, line, color=color, alpha=0.3, linewidth=1)
            label = f"{plain(curve.label)}: {spread(curve.after if ended else curve.last, share)}"
            tables = [dict(zip(steps, line, strict=True)) for steps, line in curve.lines]
            shared = [step for step in tables[0] if all(step in table for table in tables)]
            means = [sum(table[step] for table in tables) / len(tables) for step in shared]
            axis.plot(shared, means, color=color, linewidth=2, label=label)
        axis.set_title(plain(title), loc="left", fontsize=11)
        axis.set_xlabel("optimizer step")
        axis.legend(
            title="held out, after training" if ended else "mean over the last tenth of the steps", title_fontsize=8,
            fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.13), frameon=False,
        )  # fmt: skip
    axes[0, 0].set_ylabel(f"{plain(metric)} ({'' if metric in LOSSES else 'sampled '}in training)")
    save_figure(figure, path)


def print_curves(curves: list[Curve], metric: str) -> None:
    """Print the means over the last tenth of the steps and the held-out scores as a table."""
    from rich.table import Table

    from grpo_fast.report.console import Terminal

    share = is_share(*(value for curve in curves for value in curve.last), metric=metric)
    columns = {"in the last tenth": "last", "held out, before": "before", "held out, after": "after"}
    columns = {title: name for title, name in columns.items() if any(getattr(curve, name) for curve in curves)}
    table = Table("runs", title=metric, title_justify="left")
    for title in ("seeds", *columns):
        table.add_column(title, justify="right")
    for curve in curves:
        scores = (spread(getattr(curve, name), share) for name in columns.values())
        table.add_row(curve.label, str(len(curve.lines)), *scores)
    Terminal().print(table)
