"""PPO compared with GRPO on the sorting task of `ppo.py`: steps, seconds and memory in one figure.

    python examples/ppo_comparison.py [--seeds 3] [--steps 200] [--output_dir runs/ppo_comparison]

Each run is a separate process with one thread, and its seconds are CPU time, on which other programs on the machine
have little effect. Finished runs are not repeated.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

from grpo_fast.report.compare import COLORS
from grpo_fast.report.curves import mean, new_panels, save_figure, smooth

METHODS = {"grpo": "GRPO", "ppo": "PPO"}
REACHED = 0.9


def run(method: str, seed: int, steps: int, folder: Path) -> dict:
    """The record of one run, made now unless it is there already."""
    path = folder / f"{method}-{steps}-seed{seed}.json"
    if not path.exists():
        command = [sys.executable, str(Path(__file__).with_name("ppo.py")), "--method", method, "--seed", str(seed)]
        partial = path.with_suffix(".partial")
        command += ["--steps", str(steps), "--output", str(partial)]
        subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        partial.rename(path)
    return json.loads(path.read_text(encoding="utf-8"))


def first_above(values: list[float], level: float) -> int | None:
    """The first step from which the mean of 10 steps is at least `level`; None if there is none."""
    return next((end for end in range(10, len(values) + 1) if sum(values[end - 10 : end]) / 10 >= level), None)


def summarize(records: list[dict]) -> dict[str, float | None]:
    """The costs of a method, as means over its seeds; of steps and seconds None if a seed did not get there."""
    reached = [first_above(record["rewards"], REACHED) for record in records]
    seconds = [record["seconds"][step - 1] for record, step in zip(records, reached, strict=True) if step is not None]
    everywhere = None not in reached
    return {
        "held-out reward": mean([record["after"] for record in records]),
        f"steps to {REACHED}": mean([step for step in reached if step is not None]) if everywhere else None,
        f"CPU seconds to {REACHED}": mean(seconds) if everywhere else None,
        "CPU seconds a step": mean([record["seconds"][-1] / len(record["seconds"]) for record in records]),
        "MiB of weights, gradients, optimizer, reference": sum(records[0]["state_bytes"].values()) / 2**20,
        "peak MiB of the process": mean([record["peak_rss_bytes"] for record in records]) / 2**20,
    }


def draw(records: dict[str, list[dict]], path: Path) -> None:
    """Rewards over steps and over seconds (thin lines are seeds, smoothed), and memory by its use."""
    figure, axes = new_panels(1, 3, (15, 4.6))
    for index, (method, runs) in enumerate(records.items()):
        lines = [smooth(record["rewards"]) for record in runs]
        times = [record["seconds"] for record in runs]
        for axis, places in zip(axes[0], ([range(1, len(line) + 1) for line in lines], times), strict=False):
            for place, line in zip(places, lines, strict=True):
                axis.plot(place, line, color=COLORS[index], alpha=0.3, linewidth=1)
            shared = [mean(values) for values in zip(*places, strict=True)]
            average = [mean(values) for values in zip(*lines, strict=True)]
            axis.plot(shared, average, color=COLORS[index], linewidth=2, label=METHODS[method])
    for axis, label in zip(axes[0], ("step", "CPU seconds"), strict=False):
        axis.set_xlabel(label)
        axis.set_ylabel("mean reward of the step")
        axis.legend(loc="lower right")
    bottom = [0.0] * len(records)
    for index, part in enumerate(("weights", "gradients", "optimizer", "reference")):
        sizes = [runs[0]["state_bytes"][part] / 2**20 for runs in records.values()]
        axes[0, 2].bar([METHODS[method] for method in records], sizes, 0.5, bottom, color=COLORS[index], label=part)
        bottom = [low + size for low, size in zip(bottom, sizes, strict=True)]
    axes[0, 2].set_ylabel("MiB")
    axes[0, 2].legend(loc="upper left")
    save_figure(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/ppo_comparison"))
    arguments = parser.parse_args()
    if arguments.seeds < 1 or arguments.steps < 1:
        parser.error("--seeds and --steps must be at least 1")
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    records = {
        method: [run(method, seed, arguments.steps, arguments.output_dir) for seed in range(arguments.seeds)]
        for method in METHODS
    }
    table = {METHODS[method]: summarize(runs) for method, runs in records.items()}
    for name in table["PPO"]:
        cells = (table[column][name] for column in table)
        print(f"{name:<50}" + "".join(f"{'not reached' if cell is None else f'{cell:.3f}':>14}" for cell in cells))
    figure = arguments.output_dir / "ppo_comparison.png"
    draw(records, figure)
    print(f"columns: {', '.join(table)}; figure: {figure}")


if __name__ == "__main__":
    main()
