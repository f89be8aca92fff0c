"""The charts of the report page: metrics of a run as SVG paths."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from grpo_fast.report.curves import column, held_out_points, known, mean, score_name, smooth
from grpo_fast.report.diagnosis import POSITIONS

# The size of a chart and the margins for its axes, in SVG units.
WIDTH, HEIGHT = 340, 172
LEFT, RIGHT, TOP, BOTTOM = 54, 10, 10, 22
# The most points of a line, each of which is the mean of several steps in longer runs, and charts on a page.
MOST_POINTS, MOST_CHARTS = 1000, 200

# Metric -> title, colour and, for a band, the metrics of its two edges; in the order of the page.
CHARTS = {
    "reward": ("reward", "blue", ()),
    "groups/reward_mean": ("mean reward of the groups", "blue", ()),
    "reward_std": ("reward spread (std)", "amber", ()),
    "groups/reward_std": ("reward spread within the groups (mean std)", "amber", ()),
    "groups/reward_mean_std": ("reward spread between the groups (std of their means)", "amber", ()),
    "frac_reward_zero_std": ("groups with equal rewards", "amber", ()),
    "frac_selected": ("completions that are trained on (share)", "amber", ()),
    "advantages/mean": ("advantage, mean", "blue", ()),
    "advantages/std": ("advantage, spread (std)", "amber", ()),
    "completions/mean_length": (
        "response length (tokens)", "violet", ("completions/min_length", "completions/max_length"),
    ),
    "completions/clipped_ratio": ("responses that did not stop (truncated)", "violet", ()),
    "loss": ("loss", "red", ()),
    "loss/policy": ("loss: policy part", "red", ()),
    "loss/kl": ("loss: KL part", "red", ()),
    "loss/entropy": ("loss: entropy bonus", "red", ()),
    "kl": ("KL to the reference policy", "red", ()),
    "entropy": ("entropy (nats per token)", "teal", ()),
    "clip_ratio/region_mean": ("clipped ratios", "teal", ()),
    "objective/clipped_high": ("no gradient, positive advantage (share of tokens)", "teal", ()),
    "objective/clipped_low": ("no gradient, negative advantage (share of tokens)", "teal", ()),
    "objective/selected_tokens": ("selected tokens (share)", "teal", ()),
    "objective/masked_tokens": ("tokens left out (share)", "teal", ()),
    "objective/masked_sequences": ("completions left out (share)", "teal", ()),
    "objective/effective_sample_size": ("effective sample size (share of tokens)", "teal", ()),
    "entropy_coef": ("weight of the entropy bonus", "red", ()),
    "grad_norm": ("gradient norm", "grey", ()),
    "learning_rate": ("learning rate", "grey", ()),
    "tokens_per_second": ("tokens per second", "grey", ()),
    "memory/peak_allocated_gib": ("peak memory (GiB)", "grey", ()),
    "memory/peak_rss_gib": ("peak memory of the process (GiB)", "grey", ()),
}  # fmt: skip
# Metrics without a chart: they are part of another one, or their course says nothing.
UNDRAWN = {
    "step", "num_tokens", "step_time", "completions/min_length", "completions/max_length", "clip_ratio/low_mean",
    "clip_ratio/high_mean", "clip_ratio/low_min", "clip_ratio/high_max",
    *(f"position/{name}_{part}" for name in POSITIONS for part in range(1, 5)),
}  # fmt: skip

Points = list[tuple[float, float] | None]


@dataclass(frozen=True)
class Chart:
    """SVG paths and labels in SVG units; `values` are the metric at the drawn steps, None where it is missing."""

    title: str
    color: str
    last: str
    raw: str
    smoothed: str
    band: str
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    dots: list[tuple[float, float, str]]
    held_out: str
    values: list[float | None]


@dataclass(frozen=True)
class Curves:
    """The charts of a run. Each point is the mean of `width` logged steps; `left_out` charts were too many."""

    steps: list[float]
    charts: list[Chart]
    width: int
    left_out: int


def draw_curves(history: list[dict[str, Any]], summary: dict[str, Any]) -> Curves:
    """A chart for every metric in `history` that has a finite value, those of CHARTS first.

    Held-out measurements, ``eval/NAME``, are dots on the chart of NAME; the score also has dots before and after
    training.
    """
    if not history:
        return Curves([], [], 1, 0)
    steps, width = column(history, "step"), max(math.ceil(len(history) / MOST_POINTS), 1)
    names = dict.fromkeys(name for entry in history for name in entry)
    rewards = [name for name in names if name.startswith("rewards/") and name.endswith("/mean")]
    other = [n for n in names if n not in UNDRAWN and not n.startswith(("rewards/", "eval/")) and "terminated" not in n]
    metrics = list(dict.fromkeys(["reward", *rewards, *CHARTS, *other]))
    drawn, charts, score = thin(steps, width), [], score_name(history, str(summary.get("metric")))
    for metric in metrics[:MOST_CHARTS]:
        values = column(history, metric)
        if not known(values):
            continue
        name = metric.removeprefix("rewards/").removesuffix("/mean")
        title, color, band = CHARTS.get(metric, (name, "green" if metric in rewards else "grey", ()))
        held_out = [(f"step {step:g}", step, score) for step, score in held_out_points(history, metric)]
        if metric == score:
            last = [("after", drawn[-1], summary.get("after"))] * (not held_out or held_out[-1][1] != steps[-1])
            held_out = [("before", drawn[0], summary.get("before")), *held_out, *last]
            held_out = [dot for dot in held_out if isinstance(dot[2], (int, float))]
        lines = [values, smooth(values), *(column(history, edge) for edge in band)]
        charts.append(_chart(title[:100], color, drawn, [thin(line, width) for line in lines], held_out))
    return Curves(drawn, charts, width, max(len(metrics) - MOST_CHARTS, 0))


def _chart(
    title: str, color: str, steps: list[float], lines: list[list[float]], held_out: list[tuple[str, float, float]]
) -> Chart:
    values, smoothed, *band = lines
    finite = [value for line in (values, *band) for value in known(line)] + [score for _, _, score in held_out]
    y_ticks = ticks(min(finite), max(finite))
    low, high, first, last = y_ticks[0], y_ticks[-1], steps[0], max(steps[-1], steps[0] + 1)

    def x(step: float) -> float:
        return round(LEFT + (step - first) / (last - first) * (WIDTH - LEFT - RIGHT), 1)

    def y(value: float) -> float:
        return round(TOP + (high - value) / (high - low) * (HEIGHT - TOP - BOTTOM), 1)

    def points(line: list[float]) -> Points:
        return [None if math.isnan(value) else (x(step), y(value)) for step, value in zip(steps, line, strict=True)]

    edge: Points = [point for point in (points(band[1]) + points(band[0])[::-1] if band else []) if point]
    return Chart(
        title, color, figure(known(values)[-1]), path(points(values)), path(points(smoothed)),
        path(edge) + "Z" if edge else "",
        [(x(step), figure(step)) for step in ticks(first, last, whole=True) if first <= step <= last],
        [(y(value), figure(value)) for value in y_ticks],
        [(x(step), y(score), f"held out, {label}: {figure(score)}") for label, step, score in held_out],
        path([(x(step), y(score)) for _, step, score in held_out]) if len(held_out) > 2 else "",
        [None if math.isnan(value) else float(f"{value:.5g}") for value in values],
    )  # fmt: skip


def thin(values: list[float], width: int) -> list[float]:
    """The means of every `width` neighbours."""
    return [mean(values[start : start + width]) for start in range(0, len(values), width)]


def ticks(low: float, high: float, whole: bool = False) -> list[float]:
    """A few round numbers, the first at most `low` and the last at least `high`."""
    from matplotlib.ticker import MaxNLocator

    if low == high:
        pad = abs(low) / 2 or 1.0
        # A constant 0 gets an axis from 0 upwards.
        low, high = (low - pad, high + pad) if low else (0.0, pad)
    return [float(value) for value in MaxNLocator(4, steps=[1, 2, 2.5, 5, 10], integer=whole).tick_values(low, high)]


def figure(value: float) -> str:
    """A number in a few characters: ``0.25``, ``12.3k``, ``1e-05``."""
    for least, unit, suffix in ((1e9, 1e9, "B"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if abs(value) >= least:
            return f"{value / unit:.3g}{suffix}"
    return f"{value:.4g}" if abs(value) >= 1e-4 or not value else f"{value:.2g}"


def path(points: Points) -> str:
    """The SVG path through the points, interrupted at every None. A single point becomes a dot."""
    parts: list[str] = []
    for before, point, after in zip([None, *points], points, [*points[1:], None], strict=False):
        if point is not None:
            parts.append(f"{'L' if before else 'M'}{point[0]:g} {point[1]:g}")
            if before is None and after is None:
                parts.append("h.01")
    return "".join(parts)
