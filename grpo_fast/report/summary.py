"""``summary.json`` and ``config.yaml``, and how scores are shown."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grpo_fast.config import GRPOConfig
from grpo_fast.files import json_ready, replace_text


@dataclass(frozen=True)
class Summary:
    """``summary.json``: the mean of `metric` on held-out prompts before and after `steps` steps.

    With `keep_best` also the best score that was measured while training, and the checkpoint that has it.
    """

    metric: str
    before: float
    after: float
    train_seconds: float
    steps: int
    best_score: float | None = None
    best_checkpoint: str | None = None


def write_json(path: Path, content: Any) -> None:
    replace_text(path, json.dumps(json_ready(content), indent=2) + "\n")


def write_config(path: Path, config: GRPOConfig) -> None:
    """The configuration as resolved, to be given to ``grpo-fast train`` again."""
    import yaml

    replace_text(path, yaml.safe_dump(dataclasses.asdict(config), sort_keys=False))


def is_share(*values: float) -> bool:
    """Whether figures can be shown as percentages."""
    return all(0 <= value <= 1 for value in values)


def show(value: float, share: bool) -> str:
    return f"{value:.1%}" if share else f"{value:.3f}"


def clock(seconds: float) -> str:
    """``1:05``, minutes and seconds; from an hour on ``1:01:05``."""
    minutes, hours = int(seconds // 60), int(seconds // 3600)
    return f"{hours}:{minutes % 60:02d}:{int(seconds % 60):02d}" if hours else f"{minutes}:{int(seconds % 60):02d}"
