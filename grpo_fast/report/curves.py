"""``reward.png``: a run's curves at one glance."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from grpo_fast.errors import one_line, writing
from grpo_fast.report.summary import Summary, is_share, show

# Figures further from 0 are not drawn: the room between two of them may be more than a float can hold.
LARGEST = 1e100


def number(value: Any) -> float | None:
    """A figure as a float; None for what is no number, not finite, or beyond LARGEST."""
    known = isinstance(value, (int, float)) and not isinstance(value, bool) and -LARGEST <= value <= LARGEST
    return float(value) if known else None


def column(history: list[dict], name: str) -> list[float]:
    """A figure of every step; NaN where a step has none."""
    values = (number(entry.get(name)) for entry in history)
    return [math.nan if value is None else value for value in values]


def smooth(values: list[float]) -> list[float]:
    """Means over the last values, a 25th of them; NaN counts in none."""
    window, means = max(len(values) // 25, 1), []
    for end in range(1, len(values) + 1):
        known = [value for value in values[max(end - window, 0) : end] if value == value]
        means.append(sum(known) / len(known) if known else math.nan)
    return means


def plain(text: Any) -> str:
    """`text` for a figure: one line, not too long, and no mathematics between dollar signs."""
    return one_line(str(text), 80).replace("$", r"\$")


def plot_run(history: list[dict[str, float]], summary: Summary, path: Path) -> None:
    """Draw reward, its spread, the metric and the completions' length over the steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    steps = [metrics["step"] for metrics in history]
    metric = f"rewards/{summary.metric}/mean"
    panels = [
        ("reward", "reward", "#1f6feb"),
        (metric, f"{plain(summary.metric)} (sampled in training)", "#1a7f37"),
        ("reward_std", "reward std", "#9a6700"),
        ("completions/mean_length", "completion length (tokens)", "#8250df"),
    ]
    figure, axes = plt.subplots(2, 2, figsize=(10, 6), sharex=True, layout="constrained")
    share = is_share(summary.before, summary.after, *(v for v in column(history, metric) if v == v))
    for axis, (name, title, color) in zip(axes.flat, panels, strict=True):
        values = column(history, name)
        axis.plot(steps, values, color=color, alpha=0.25, linewidth=1)
        axis.plot(steps, smooth(values), color=color, linewidth=2)
        measured = zip(steps, column(history, f"eval/{name}"), strict=True)
        held_out = [(step, value) for step, value in measured if value == value]
        if held_out:
            axis.plot(*zip(*held_out, strict=True), "o--", color="black", linewidth=1, markersize=4)
        axis.set_title(title, loc="left", fontsize=11)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        if name == metric:
            if share:
                axis.set_ylim(-0.03, 1.03)
            for value, label, place in ((summary.before, "before", steps[0]), (summary.after, "after", steps[-1])):
                axis.scatter([place], [value], color="black", zorder=3, s=22)
                axis.annotate(
                    f"held out, {label}: {show(value, share)}", (place, value), textcoords="offset points",
                    xytext=(8, 10) if label == "before" else (-8, -18), fontsize=9,
                    bbox={"facecolor": "white", "alpha": 0.85, "edgecolor": "none", "pad": 1},
                    ha="left" if label == "before" else "right",
                )  # fmt: skip
    for axis in axes[1]:
        axis.set_xlabel("optimizer step")
    figure.suptitle(
        f"{plain(summary.metric)}: {show(summary.before, share)} to {show(summary.after, share)} in "
        f"{summary.steps} steps, {summary.train_seconds:.0f} s of training",
        fontsize=12,
    )  # fmt: skip
    with writing(path):
        figure.savefig(path, dpi=130)
    plt.close(figure)
