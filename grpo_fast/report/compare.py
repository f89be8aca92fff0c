"""Several runs in one figure, ``grpo-fast compare``: a curve for each, runs that differ in their seed alone as one."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grpo_fast.config import FREE_FIELDS
from grpo_fast.errors import UserError, say, writing
from grpo_fast.report.curves import column, plain, smooth
from grpo_fast.report.run import Run, read_run
from grpo_fast.report.summary import is_share, show

COLORS = ["#1f6feb", "#1a7f37", "#cf222e", "#9a6700", "#8250df", "#0a7f8c", "#bf3989", "#57606a", "#000000", "#bc4c00"]
# A run's name and place, its seed, and what does not change its figures.
LEFT_OUT = FREE_FIELDS - {"max_steps"} | {"seed"}


@dataclass(frozen=True)
class Curve:
    """One setting: for each of its seeds the steps and the metric in training, smoothed, and `last`, its mean over the
    last tenth of the steps. `before` and `after` have the held-out score of every run that ended, where the metric is
    the score.
    """

    label: str
    lines: list[tuple[list[int], list[float]]]
    last: list[float]
    before: list[float]
    after: list[float]


def read_curves(folders: Sequence[Path], metric: str | None = None) -> tuple[str, list[Curve]]:
    """The metric's name and a curve for every setting among the runs, in their order.

    Args:
        folders: run folders, of runs that ended or go on.
        metric: name of a reward function (default: the one whose mean is the runs' score), or any figure of
            ``metrics.jsonl``.

    Raises:
        UserError: a folder holds no run, the runs have different scores, or a run has no such figure.
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
    last = functions[-1] if isinstance(functions, list) else functions
    name = str(last).replace(":", ".").rpartition(".")[2]
    return str(run.summary.get("metric") or run.config.get("eval_metric") or name)


def _labels(configs: list[dict[str, Any]]) -> list[str]:
    """The runs' names; where several settings bear one name, what they differ in."""
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
        if not any(map(math.isfinite, values)):
            raise UserError(f"{run.folder} has no figures of {metric!r} (yet)")
        lines.append(([entry["step"] for entry in run.history], smooth(values)))
        ending = [value for value in values[-max(len(values) // 10, 1) :] if value == value]
        last.append(sum(ending) / len(ending) if ending else math.nan)
    ended = [run.summary for run in runs if run.summary.get("metric") == metric]
    scores = {name: [summary[name] for summary in ended if summary.get(name) is not None] for name in _SCORES}
    return Curve(label, lines, last, **scores)


_SCORES = ("before", "after")


def spread(values: list[float], share: bool) -> str:
    """The mean, with the lowest and the highest where there are several; `share` shows them as percentages."""
    if not values:
        return ""
    mean = sum(values) / len(values)
    if len(values) == 1:
        return show(mean, share)
    return f"{show(mean, share)} ({show(min(values), share)} to {show(max(values), share)})"


def plot_curves(panels: dict[str, list[Curve]], metric: str, path: Path) -> None:
    """Draw a panel for every entry: the mean over the seeds of each curve, and each seed's own line faintly."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(
        1, len(panels), figsize=(1 + 5 * len(panels), 4.8), sharey=True, squeeze=False, layout="constrained"
    )
    values = [value for curves in panels.values() for curve in curves for _, line in curve.lines for value in line]
    share = is_share(*(value for value in values if value == value))
    ended = all(curve.after for curves in panels.values() for curve in curves)
    for axis, (title, curves) in zip(axes[0], panels.items(), strict=True):
        for index, curve in enumerate(curves):
            color = COLORS[index % len(COLORS)]
            for steps, line in curve.lines:
                axis.plot(steps, line, color=color, alpha=0.3, linewidth=1)
            label = f"{plain(curve.label)}: {spread(curve.after if ended else curve.last, share)}"
            axis.plot(*_mean(curve.lines), color=color, linewidth=2, label=label)
        axis.set_title(plain(title), loc="left", fontsize=11)
        axis.set_xlabel("optimizer step")
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        if share:
            axis.set_ylim(-0.03, 1.03)
        axis.legend(
            title="held out, after training" if ended else "in the last tenth of the steps", title_fontsize=8,
            fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.13), frameon=False,
        )  # fmt: skip
    axes[0, 0].set_ylabel(f"{plain(metric)} (sampled in training)")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=130)
    plt.close(figure)


def _mean(lines: list[tuple[list[int], list[float]]]) -> tuple[list[int], list[float]]:
    """Steps that all lines have, and the means there."""
    tables = [dict(zip(steps, values, strict=True)) for steps, values in lines]
    steps = [step for step in lines[0][0] if all(step in table for table in tables)]
    return steps, [sum(table[step] for table in tables) / len(tables) for step in steps]


def print_curves(curves: list[Curve], metric: str) -> None:
    """The figures of the last tenth of the steps and the held-out scores, as a table."""
    from rich.table import Table

    from grpo_fast.report.console import Terminal

    share = is_share(*(value for curve in curves for value in curve.last))
    columns = {"in the last tenth": "last", "held out, before": "before", "held out, after": "after"}
    columns = {title: name for title, name in columns.items() if any(getattr(curve, name) for curve in curves)}
    table = Table("runs", title=metric, title_justify="left")
    for title in ("seeds", *columns):
        table.add_column(title, justify="right")
    for curve in curves:
        scores = (spread(getattr(curve, name), share) for name in columns.values())
        table.add_row(curve.label, str(len(curve.lines)), *scores)
    Terminal().print(table)
