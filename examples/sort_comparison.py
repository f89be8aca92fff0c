"""The sorting experiments of Stanford's CS336 lecture on policy gradients, in one figure: `make sort-comparison`.

    python examples/sort_comparison.py [--seeds 3] [--output_dir runs/sort_comparison] [--field value ...]

They compare advantages, objectives with several updates per batch, and a KL term with a refreshed reference. Finished
runs are not repeated, and a run that was interrupted continues from its checkpoint.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from grpo_fast.cli import parse_config, quiet_libraries
from grpo_fast.report.compare import plot_curves, print_curves, read_curves
from grpo_fast.trainer import GRPOTrainer

RECIPE = "sort_small"
CENTRED = {"reward_baseline": "mean", "scale_rewards": "none"}
OBJECTIVE = {**CENTRED, "num_iterations": 4}

# Panel -> run -> the fields in which the run differs from the recipe.
PANELS = {
    "advantages": {
        "raw rewards": {"reward_baseline": "none", "scale_rewards": "none"},
        "best only": {"reward_baseline": "best_only", "scale_rewards": "none"},
        "less the best": {"reward_baseline": "max", "scale_rewards": "none"},
        "centred": CENTRED,
        "normalised": {"reward_baseline": "mean", "scale_rewards": "group"},
    },
    "objective, 4 updates a batch": {
        "naive": {**OBJECTIVE, "loss_type": "reinforce"},
        # No ratio reaches these bounds.
        "unclipped": {**OBJECTIVE, "epsilon": 1 - 1e-6, "epsilon_high": 1e6},
        "clipped": {**OBJECTIVE, "epsilon": 0.2},
    },
    "KL to a reference": {
        "centred": CENTRED,
        "centred, KL": {**CENTRED, "beta": 0.1},
        "centred, KL, refreshed every 10 steps": {
            **CENTRED, "beta": 0.1, "sync_ref_model": True, "ref_model_sync_steps": 10, "ref_model_mixup_alpha": 1.0,
        },
    },
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3, help="runs of each kind")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/sort_comparison"))
    arguments, fields = parser.parse_known_args()
    quiet_libraries()
    runs = {name: changes for panel in PANELS.values() for name, changes in panel.items()}
    folders = {
        name: [train(name, changes, seed, arguments.output_dir, fields) for seed in range(1, arguments.seeds + 1)]
        for name, changes in runs.items()
    }
    panels = {}
    for title, names in PANELS.items():
        print(f"\n{title}")
        for metric in ("exact_answer", "reward"):
            panels[title] = [curve for name in names for curve in read_curves(folders[name], metric)[1]]
            print_curves(panels[title], metric)
    figure = arguments.output_dir / "comparison.png"
    plot_curves(panels, "reward", figure)
    print(f"figure: {figure}")


def train(name: str, changes: dict, seed: int, output_dir: Path, fields: list[str]) -> Path:
    """Make one run, unless it is finished, and return its folder."""
    folder = output_dir / f"{name.replace(', ', '_').replace(' ', '_')}-seed{seed}"
    given = {**changes, "run_name": name, "seed": seed, "output_dir": folder, "resume_from_checkpoint": True}
    options = [f"--{key}={json.dumps(value) if isinstance(value, bool) else value}" for key, value in given.items()]
    config = parse_config([RECIPE, *options, *fields])
    summary = folder / "summary.json"
    if not summary.exists() or json.loads(summary.read_text())["steps"] != config.max_steps:
        GRPOTrainer(config).train()
    return folder


if __name__ == "__main__":
    main()
