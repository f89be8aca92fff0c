"""Compare objectives on one task over several seeds, with intervals: `make objectives-comparison`.

    python examples/objectives_comparison.py [--task sort] [--objectives dapo,gspo] [--seeds 3]
                                             [--output_dir runs/objectives_sort] [--field value ...]

Every run makes four updates on each batch, so that ratios, bounds and masks matter. Finished runs are not repeated, and
a run that was interrupted continues from its checkpoint. The results go to runs.csv, curves.csv and comparison.png in
the output folder.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path

from grpo_fast.cli import parse_config, quiet_libraries
from grpo_fast.errors import UserError
from grpo_fast.files import read_metrics
from grpo_fast.report.compare import COLORS
from grpo_fast.report.curves import new_panels, save_figure, smooth
from grpo_fast.trainer import GRPOTrainer

# Task -> recipe, the fields that all its runs change, and the metric to compare.
TASKS = {
    "sort": ("sort_small", {"max_steps": 240, "learning_rate": 1e-3, "entropy_coef": 0.05}, "reward"),
    "countdown": ("smollm2_countdown", {}, "reward"),
}
SHARED = {"num_iterations": 4, "log_completions_steps": 0}
# Objective -> the fields in which its runs differ.
OBJECTIVES = {
    "reinforce": {"loss_type": "reinforce"},
    "unclipped": {"loss_type": "unclipped"},
    "dapo": {"loss_type": "dapo"},
    "dr_grpo": {"loss_type": "dr_grpo", "scale_rewards": "none"},
    "gspo": {"loss_type": "gspo"},
    "cispo": {"loss_type": "cispo"},
    "sapo": {"loss_type": "sapo"},
    "dppo_tv": {"loss_type": "dppo_tv"},
    "gmpo": {"loss_type": "gmpo"},
    "clip_cov": {"loss_type": "clip_cov", "covariance_ratio": 0.01, "covariance_low": 0.5, "covariance_high": 5.0},
    "kl_cov": {"loss_type": "kl_cov", "covariance_ratio": 0.01},
    "dapo, off-policy mask": {"loss_type": "dapo", "off_policy_mask_threshold": 0.05},
    "dapo, adaptive entropy": {"loss_type": "dapo", "use_adaptive_entropy": True, "entropy_target": 0.3},
    "dapo, remax": {"loss_type": "dapo", "advantage_estimator": "remax"},
    "dapo, reinforce++": {"loss_type": "dapo", "advantage_estimator": "reinforce_plus_plus"},
}
COLUMNS = ("task", "objective", "seed", "score", "steps", "metric", "before", "after")
# The 97.5% quantile of Student's t for 1, 2, 3 ... degrees of freedom, and the limit beyond.
QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", choices=TASKS, default="sort")
    parser.add_argument("--objectives", default=",".join(name for name in OBJECTIVES if "," not in name))
    parser.add_argument("--seeds", type=int, default=3, help="runs of each objective")
    parser.add_argument("--output_dir", type=Path)
    arguments, fields = parser.parse_known_args(argv)
    quiet_libraries()
    folder = arguments.output_dir or Path(f"runs/objectives_{arguments.task}")
    runs, curves = [], []
    # By seed first, so that an interrupted comparison has some runs of every objective.
    for seed in range(1, arguments.seeds + 1):
        for name in chosen_objectives(arguments.objectives):
            run, values = train(arguments.task, name, seed, folder, fields)
            runs.append(run)
            curves += [{"task": arguments.task, "objective": name, "seed": seed, **point} for point in values]
            write(folder / "runs.csv", COLUMNS, runs)
            write(folder / "curves.csv", ("task", "objective", "seed", "step", "value"), curves)
            draw(runs, curves, folder / "comparison.png")
    for name, line in table(runs).items():
        print(f"{name:24} {line}")
    print(f"figure: {folder / 'comparison.png'}")


def chosen_objectives(text: str) -> list[str]:
    """The objectives named in `text`, with semicolons or commas between them; "all" for all of them."""
    if text == "all":
        return list(OBJECTIVES)
    names = [name.strip() for name in text.split(";" if ";" in text else ",") if name.strip()]
    for name in names:
        if name not in OBJECTIVES:
            raise UserError(f"--objectives: {name!r} is unknown; there is: {'; '.join(OBJECTIVES)}")
    return names


def train(task: str, name: str, seed: int, output_dir: Path, fields: list[str]) -> tuple[dict, list[dict]]:
    """Make one run, unless it is finished; returns its row and the points of its curve."""
    folder = output_dir / f"{name.replace(', ', '_').replace(' ', '_')}-seed{seed}"
    recipe, changes, metric = TASKS[task]
    given = {**SHARED, **changes, **OBJECTIVES[name], "run_name": name, "seed": seed, "output_dir": folder}
    given["resume_from_checkpoint"] = True
    options = [f"--{key}={json.dumps(value) if isinstance(value, bool) else value}" for key, value in given.items()]
    config = parse_config([recipe, *options, *fields])
    summary = folder / "summary.json"
    if not summary.exists() or json.loads(summary.read_text())["steps"] != config.max_steps:
        GRPOTrainer(config).train()
    found = json.loads(summary.read_text())
    history = [entry for entry in read_metrics(folder / "metrics.jsonl") if metric in entry]
    last = [entry[metric] for entry in history][-max(len(history) // 10, 1) :]
    row = {"task": task, "objective": name, "seed": seed, "score": round(statistics.mean(last), 5)}
    row |= {column: found[column] for column in COLUMNS[4:]}
    return row, [{"step": entry["step"], "value": round(entry[metric], 5)} for entry in history]


def interval(values: Iterable[float]) -> tuple[float, float]:
    """The mean, and half the width of its 95% confidence interval (Student's t; NaN of one value)."""
    values = list(values)
    mean = statistics.mean(values)
    if len(values) < 2:
        return mean, math.nan
    quantile = QUANTILES[len(values) - 2] if len(values) - 2 < len(QUANTILES) else 1.96
    return mean, quantile * statistics.stdev(values) / math.sqrt(len(values))


def table(runs: list[dict]) -> dict[str, str]:
    """For each objective, its mean score with the 95% interval, and that of each run."""
    lines = {}
    for name in dict.fromkeys(run["objective"] for run in runs):
        scores = [run["score"] for run in runs if run["objective"] == name]
        mean, half = interval(scores)
        each = ", ".join(f"{value:.3f}" for value in scores)
        lines[name] = f"{mean:.3f}" + (f" ± {half:.3f}" if half == half else "") + f" ({each})"
    return lines


def draw(runs: list[dict], curves: list[dict], path: Path) -> None:
    """The training curves, mean over seeds, and the means of their last tenth with 95% intervals over the seeds."""
    names = list(dict.fromkeys(run["objective"] for run in runs))
    figure, axes = new_panels(1, 2, (12, 1.6 + 0.34 * max(len(names), 9)))
    left, right = axes[0]
    for index, name in enumerate(names):
        color, style = COLORS[index % len(COLORS)], ("-", "--")[index // len(COLORS) % 2]
        seeds = sorted({point["seed"] for point in curves if point["objective"] == name})
        lines = [[p for p in curves if (p["objective"], p["seed"]) == (name, seed)] for seed in seeds]
        smoothed = [smooth([point["value"] for point in line]) for line in lines]
        steps = [point["step"] for point in lines[0]]
        means = [statistics.mean(values) for values in zip(*smoothed, strict=False)]
        left.plot(steps[: len(means)], means, color=color, linestyle=style, linewidth=1.6)
        scores = [run["score"] for run in runs if run["objective"] == name]
        mean, half = interval(scores)
        right.errorbar([mean], [index], xerr=[[half], [half]], fmt="o", color=color, capsize=3)
        right.plot(scores, [index] * len(scores), "|", color=color, markersize=9, alpha=0.7)
    metric = TASKS[runs[0]["task"]][2]
    left.set(xlabel="optimizer step", ylabel=f"{metric}, sampled in training")
    left.set_title("mean over seeds", loc="left", fontsize=11)
    right.set_yticks(range(len(names)), names)
    right.invert_yaxis()
    right.set_xlabel(f"{metric}, mean of the last tenth of the steps")
    count = len({run["seed"] for run in runs})
    right.set_title(f"dots: mean of {count} seeds with its 95% interval; ticks: the runs", loc="left", fontsize=11)
    save_figure(figure, path)


def write(path: Path, columns: Sequence[str], rows: list[dict]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
