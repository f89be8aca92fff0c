"""``reward.png``: the main curves of a run. Also what every figure and chart shares: columns, means and panels."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grpo_fast.errors import one_line, writing
from grpo_fast.report.summary import Summary, is_share, show

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Larger values are not drawn: the distance between two of them may overflow a float.
LARGEST = 1e100


def number(value: Any) -> float | None:
    """`value` as a float; None if it is not a number, not finite, or beyond LARGEST."""
    known = isinstance(value, (int, float)) and not isinstance(value, bool) and -LARGEST <= value <= LARGEST
    return float(value) if known else None


def column(history: list[dict], name: str) -> list[float]:
    """One metric at every step; NaN where a step does not have it."""
    values = (number(entry.get(name)) for entry in history)
    return [math.nan if value is None else value for value in values]


def score_name(history: list[dict], score: str) -> str:
    """The metric that a run's summary calls its score: a reward function's mean, or a metric such as ``loss``."""
    reward = f"rewards/{score}/mean"
    return reward if known(column(history, reward)) or not known(column(history, score)) else score


def held_out_points(history: list[dict], name: str) -> list[tuple[float, float]]:
    """The steps after which `name` was measured on held-out prompts, and its values."""
    points = zip(column(history, "step"), column(history, f"eval/{name}"), strict=True)
    return [(step, value) for step, value in points if not math.isnan(value)]


def known(values: Iterable[float]) -> list[float]:
    """The values that are not NaN."""
    return [value for value in values if not math.isnan(value)]


def mean(values: Iterable[float]) -> float:
    """The mean of the values that are not NaN; NaN if there are none."""
    left = known(values)
    return sum(left) / len(left) if left else math.nan


def smooth(values: list[float]) -> list[float]:
    """At each place, the mean of the last 4% of the values up to there."""
    window = max(len(values) // 25, 1)
    return [mean(values[max(end - window, 0) : end]) for end in range(1, len(values) + 1)]


def plain(text: Any) -> str:
    """`text` for a matplotlib label: one line, at most 80 characters, dollar signs escaped."""
    return one_line(str(text), 80).replace("$", r"\$")


def new_panels(rows: int, columns: int, size: tuple[float, float], **shared: bool) -> tuple[Figure, Any]:
    """A figure of `size` inches and its axes ``[rows, columns]``; `shared` is ``sharex`` or ``sharey``."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, **shared)
    for axis in axes.flat:
        axis.grid(alpha=0.25, which="both")
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def save_figure(figure: Figure, path: Path) -> None:
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=130)


def plot_run(history: list[dict[str, float]], summary: Summary, path: Path) -> None:
    """Draw score, rewards, advantages, completions and parts of the loss over the steps, as far as there are any."""
    steps = column(history, "step")
    metric = score_name(history, summary.metric)
    supervised = metric == summary.metric
    panels = [
        ("reward", "reward", "#1f6feb"),
        (metric, f"{plain(summary.metric)} ({'' if supervised else 'sampled '}in training)", "#1a7f37"),
        ("reward_std", "reward std", "#9a6700"),
        ("completions/mean_length", "completion length (tokens)", "#8250df"),
        ("groups/reward_std", "reward std within groups", "#9a6700"),
        ("frac_reward_zero_std", "groups with equal rewards", "#9a6700"),
        ("advantages/std", "advantage std", "#0550ae"),
        ("completions/clipped_ratio", "completions that did not stop", "#8250df"),
        ("loss/policy", "loss: policy part", "#cf222e"),
        ("loss/kl", "loss: KL part", "#cf222e"),
    ]
    if supervised:
        panels = [
            *panels[1::-1],
            *panels[3:4],
            ("entropy", "entropy (nats per token)", "#0550ae"),
            ("grad_norm", "gradient norm", "#6e7781"),
            ("learning_rate", "learning rate", "#6e7781"),
        ]
    always = (metric,) if supervised else (metric, "reward")
    panels = [panel for panel in panels if panel[0] in always or known(column(history, panel[0]))]
    rows = math.ceil(len(panels) / 2)
    figure, axes = new_panels(rows, 2, (10, 3 * rows), sharex=True)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    share = is_share(summary.before, summary.after, *known(column(history, metric)), metric=summary.metric)
    for axis, (name, title, color) in zip(axes.flat, panels, strict=False):
        values = column(history, name)
        axis.plot(steps, values, color=color, alpha=0.25, linewidth=1)
        axis.plot(steps, smooth(values), color=color, linewidth=2)
        if held_out := held_out_points(history, name):
            axis.plot(*zip(*held_out, strict=True), "o--", color="black", linewidth=1, markersize=4)
        axis.set_title(title, loc="left", fontsize=11)
        if name == metric:
            if share:
                axis.set_ylim(-0.03, 1.03)
            for value, label, place, offset, side in (
                (summary.before, "before", steps[0], (8, 10), "left"),
                (summary.after, "after", steps[-1], (-8, -18), "right"),
            ):
                axis.scatter([place], [value], color="black", zorder=3, s=22)
                axis.annotate(
                    f"held out, {label}: {show(value, share)}", (place, value), textcoords="offset points",
                    xytext=offset, ha=side, fontsize=9,
                    bbox={"facecolor": "white", "alpha": 0.85, "edgecolor": "none", "pad": 1},
                )  # fmt: skip
    for axis in axes[-1]:
        axis.set_xlabel("optimizer step")
    scores = f"{plain(summary.metric)}: {show(summary.before, share)} to {show(summary.after, share)}"
    figure.suptitle(f"{scores} in {summary.steps} steps, {summary.train_seconds:.0f} s of training", fontsize=12)
    save_figure(figure, path)
