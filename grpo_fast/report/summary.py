"""``summary.json`` and ``config.yaml``, and how scores and times are printed."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grpo_fast.config import GRPOConfig
from grpo_fast.files import json_ready, replace_text

# Scores that are not rewards, and of which lower is better.
LOSSES = ("loss", "reverse_kl")


@dataclass(frozen=True)
class Summary:
    """``summary.json``: the mean of `metric` on held-out prompts before and after `steps` steps of training.

    With `keep_best`, also the best score measured during training and the checkpoint that reached it.
    """

    metric: str
    before: float
    after: float
    train_seconds: float
    steps: int
    best_score: float | None = None
    best_checkpoint: str | None = None


def curves_file(metric: str) -> str:
    """The file of a run's curves, by what its score is."""
    return "loss.png" if metric in LOSSES else "reward.png"


def write_json(path: Path, content: Any) -> None:
    replace_text(path, json.dumps(json_ready(content), indent=2) + "\n")


def write_config(path: Path, config: GRPOConfig) -> None:
    """The resolved configuration, which its command (``grpo-fast train``, for instance) accepts again."""
    import yaml

    fields = {name: value for name, value in dataclasses.asdict(config).items() if name not in config.unused_fields}
    replace_text(path, yaml.safe_dump(fields, sort_keys=False))


def is_share(*values: float, metric: str = "") -> bool:
    """Whether all values of `metric` lie between 0 and 1, so that they can be printed as percentages."""
    return metric not in LOSSES and all(0 <= value <= 1 for value in values)


def show(value: float, share: bool) -> str:
    return f"{value:.1%}" if share else f"{value:.3f}"


def clock(seconds: float) -> str:
    """``1:05`` for minutes and seconds; ``1:01:05`` from one hour on."""
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}" if minutes >= 60 else f"{minutes}:{rest:02d}"
