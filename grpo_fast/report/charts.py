"""Small charts: figures of a run as the paths of an SVG."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from grpo_fast.report.curves import column, smooth

# The drawing and the space for its axes, in units of the SVG.
WIDTH, HEIGHT = 340, 172
LEFT, RIGHT, TOP, BOTTOM = 54, 10, 10, 22
# Points of a line at most; of longer runs several steps are averaged.
MOST_POINTS = 1000
# Charts of a page; more figures than any run writes are left out.
MOST_CHARTS = 200

# title, metric, colour; a band of (lowest, highest) around it. In the order of the page.
CHARTS = [
    ("reward", "reward", "blue", None),
    ("reward spread (std)", "reward_std", "amber", None),
    ("groups with equal rewards", "frac_reward_zero_std", "amber", None),
    (
        "response length (tokens)", "completions/mean_length", "violet",
        ("completions/min_length", "completions/max_length"),
    ),
    ("responses cut off", "completions/clipped_ratio", "violet", None),
    ("loss", "loss", "red", None),
    ("KL to the initial policy", "kl", "red", None),
    ("entropy (nats per token)", "entropy", "teal", None),
    ("clipped ratios", "clip_ratio/region_mean", "teal", None),
    ("gradient norm", "grad_norm", "grey", None),
    ("learning rate", "learning_rate", "grey", None),
    ("tokens per second", "tokens_per_second", "grey", None),
    ("peak memory (GiB)", "memory/peak_allocated_gib", "grey", None),
    ("peak memory of the process (GiB)", "memory/peak_rss_gib", "grey", None),
]  # fmt: skip
# Parts of what is drawn, or of no interest over time.
UNDRAWN = {
    "step", "num_tokens", "step_time", "completions/min_length", "completions/max_length", "clip_ratio/low_mean",
    "clip_ratio/high_mean",
}  # fmt: skip


@dataclass(frozen=True)
class Chart:
    """Paths and labels in units of the SVG; `values` are the figures at the drawn steps, None where there are none."""

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
    """The charts of a run, with one point for `width` logged steps each."""

    steps: list[float] = field(default_factory=list)
    charts: list[Chart] = field(default_factory=list)
    width: int = 1
    left_out: int = 0


def draw_curves(history: list[dict[str, Any]], summary: dict[str, Any]) -> Curves:
    """A chart of every figure of `history` that has a finite value, the known ones first.

    What was measured on held-out prompts, ``eval/NAME``, is marked on the chart of NAME; the score also at both ends.
    """
    if not history:
        return Curves()
    steps = thin(column(history, "step"))
    known = {metric for _, metric, _, _ in CHARTS}
    names = {name: None for entry in history for name in entry}
    rewards = [name for name in names if name.startswith("rewards/") and name.endswith("/mean")]
    other = [
        name for name in names
        if name not in known | UNDRAWN | set(rewards)
        and not name.startswith(("rewards/", "eval/")) and "terminated" not in name
    ]  # fmt: skip
    table = [
        CHARTS[0],
        *((name.removeprefix("rewards/").removesuffix("/mean"), name, "green", None) for name in rewards),
        *CHARTS[1:],
        *((name, name, "grey", None) for name in other),
    ]
    charts = []
    for title, metric, color, band in table[:MOST_CHARTS]:
        values = column(history, metric)
        if any(value == value for value in values):
            held_out = [
                (f"step {step:g}", step, score)
                for step, score in zip(column(history, "step"), column(history, f"eval/{metric}"), strict=True)
                if score == score
            ]
            if metric == f"rewards/{summary.get('metric')}/mean":
                if not held_out or held_out[-1][1] != history[-1]["step"]:
                    held_out.append(("after", steps[-1], summary.get("after")))
                held_out.insert(0, ("before", steps[0], summary.get("before")))
            lines = [values, smooth(values), *(column(history, name) for name in band or ())]
            charts.append(_chart(title[:100], color, steps, [thin(line) for line in lines], held_out))
    return Curves(steps, charts, width_of(len(history)), max(len(table) - MOST_CHARTS, 0))


def _chart(title: str, color: str, steps: list[float], lines: list[list[float]], held_out: list[tuple]) -> Chart:
    values, smoothed, *band = lines
    held_out = [(label, step, score) for label, step, score in held_out if isinstance(score, (int, float))]
    finite = [v for line in (values, *band) for v in line if v == v] + [score for _, _, score in held_out]
    y_ticks = ticks(min(finite), max(finite))
    low, high = y_ticks[0], y_ticks[-1]
    first, last = steps[0], max(steps[-1], steps[0] + 1)

    def x(step: float) -> float:
        return round(LEFT + (step - first) / (last - first) * (WIDTH - LEFT - RIGHT), 1)

    def y(value: float) -> float:
        return round(TOP + (high - value) / (high - low) * (HEIGHT - TOP - BOTTOM), 1)

    def points(line: list[float]) -> list[tuple[float, float] | None]:
        return [(x(step), y(value)) if value == value else None for step, value in zip(steps, line, strict=True)]

    known = [value for value in values if value == value]
    return Chart(
        title, color, figure(known[-1]), path(points(values)), path(points(smoothed)),
        area(*map(points, band)) if band else "",
        [(x(step), figure(step)) for step in ticks(first, last, whole=True) if first <= step <= last],
        [(y(value), figure(value)) for value in y_ticks],
        [(x(step), y(score), f"held out, {label}: {figure(score)}") for label, step, score in held_out],
        path([(x(step), y(score)) for _, step, score in held_out]) if len(held_out) > 2 else "",
        [float(f"{value:.5g}") if value == value else None for value in values],
    )  # fmt: skip


def width_of(steps: int) -> int:
    """How many steps a point stands for."""
    return max(math.ceil(steps / MOST_POINTS), 1)


def thin(values: list[float]) -> list[float]:
    """At most MOST_POINTS values: means of as many neighbours as that takes."""
    width = width_of(len(values))
    if width == 1:
        return values
    chunks = [[v for v in values[start : start + width] if v == v] for start in range(0, len(values), width)]
    return [sum(chunk) / len(chunk) if chunk else math.nan for chunk in chunks]


def ticks(low: float, high: float, whole: bool = False) -> list[float]:
    """A few round numbers that hold `low` to `high` between them."""
    from matplotlib.ticker import MaxNLocator

    if low == high:
        pad = abs(low) / 2 or 1.0
        # A constant of no negative kind keeps to zero and above.
        low, high = (low - pad, high + pad) if low else (0.0, pad)
    return [float(value) for value in MaxNLocator(4, steps=[1, 2, 2.5, 5, 10], integer=whole).tick_values(low, high)]


def figure(value: float) -> str:
    """A figure in a few characters: ``0.25``, ``12.3k``, ``1e-05``."""
    for limit, suffix in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= limit:
            return f"{value / (1e3 if suffix == 'k' else limit):.3g}{suffix}"
    return f"{value:.4g}" if abs(value) >= 1e-4 or not value else f"{value:.2g}"


def path(points: list[tuple[float, float] | None]) -> str:
    """SVG path through the points, with a gap at every None. A point alone becomes a dot."""
    parts: list[str] = []
    for before, point, after in zip([None, *points], points, [*points[1:], None], strict=False):
        if point is not None:
            parts.append(f"{'L' if before else 'M'}{point[0]:g} {point[1]:g}")
            if before is None and after is None:
                parts.append("h.01")
    return "".join(parts)


def area(low: list[tuple[float, float] | None], high: list[tuple[float, float] | None]) -> str:
    """SVG path around the band between two lines."""
    edge = [point for point in high if point] + [point for point in reversed(low) if point]
    return path(edge) + "Z" if edge else ""
