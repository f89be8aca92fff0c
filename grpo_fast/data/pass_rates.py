"""How often a model solves each training prompt, from the samples of ``grpo-fast eval --split train``.

Prompts that are always or never solved teach nothing, since their groups have no variance. `min_pass_rate` and
`max_pass_rate` leave them out, and `prompt_sampling` draws the others by their difficulty.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from grpo_fast.config import GRPOConfig
from grpo_fast.data.templates import Prompt, Row
from grpo_fast.errors import UserError, one_line
from grpo_fast.files import parse_json

SAMPLES, SUMMARY = "samples.jsonl", "summary.json"


class PassRates:
    """The pass rates of prompts: the share of each one's completions whose reward reaches the evaluation's threshold.

    Args:
        config: `pass_rates` names the evaluation's folder.
        metric: the reward function that decides what passes.

    Raises:
        UserError: the folder holds no finished evaluation with that reward, or is damaged.
    """

    def __init__(self, config: GRPOConfig, metric: str):
        self.config = config
        self.rates = read_pass_rates(Path(config.pass_rates or ""), metric)

    def filter(self, rows: list[Row], warn: Callable[[str], None]) -> list[Row]:
        """The rows whose pass rate lies within the bounds; `warn` gets a line that says how many are left out, and why.

        Raises:
            UserError: none is left.
        """
        low, high, folder = self.config.min_pass_rate, self.config.max_pass_rate, self.config.pass_rates
        found = [self.rates.get(_key(row["prompt"])) for row in rows]
        kept = [row for row, rate in zip(rows, found, strict=True) if rate is not None and low <= rate <= high]
        reasons = {
            f"below min_pass_rate={low:g}": sum(rate is not None and rate < low for rate in found),
            f"above max_pass_rate={high:g}": sum(rate is not None and rate > high for rate in found),
            f"not in {folder}": sum(rate is None for rate in found),
        }
        text = ", ".join(f"{count} {reason}" for reason, count in reasons.items() if count)
        if not kept:
            raise UserError(f"pass_rates: none of the {len(rows)} training prompts is left: {text}")
        if len(kept) < len(rows):
            warn(f"pass_rates leaves out {len(rows) - len(kept)} of {len(rows)} training prompts: {text}")
        return kept

    def of(self, rows: list[Row]) -> list[float]:
        """The rates of rows that `filter` kept.

        Raises:
            UserError: `prompt_sampling` is ``"prioritized"``, and all prompts are always solved.
        """
        found = [self.rates[_key(row["prompt"])] for row in rows]
        if self.config.prompt_sampling == "prioritized" and min(found) == 1:
            raise UserError(
                "prompt_sampling='prioritized' never draws a prompt with a pass rate of 1, and all of them have it; "
                "lower max_pass_rate, or leave prompt_sampling out"
            )
        return found


def read_pass_rates(folder: Path, metric: str) -> dict[str, float]:
    """The pass rate of every prompt of a finished evaluation, by the prompt as JSON; see `PassRates`."""
    for name in (SUMMARY, SAMPLES):
        if not (folder / name).is_file():
            raise UserError(f"pass_rates={str(folder)!r} holds no finished evaluation: it has no {name}")
    counts: dict[str, list[int]] = {}
    place = SUMMARY
    try:
        summary = parse_json((folder / SUMMARY).read_text(encoding="utf-8"))
        known, threshold = list(summary["metrics"]), float(summary["threshold"])
        if metric not in known:
            raise UserError(
                f"pass_rates={str(folder)!r} has no rewards of {metric!r}, which decides what passes; it has those of "
                f"{', '.join(map(str, known))}; set eval_metric to one of them"
            )
        with (folder / SAMPLES).open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                place = f"{SAMPLES}, line {number}"
                sample = parse_json(line)
                reward = sample["rewards"][metric]
                if reward is not None and math.isfinite(reward):
                    passed, count = counts.setdefault(_key(sample["prompt"]), [0, 0])
                    counts[_key(sample["prompt"])] = [passed + (reward >= threshold), count + 1]
    except UserError:
        raise
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"pass_rates={str(folder)!r} is damaged ({place}): {one_line(error)}") from None
    return {prompt: passed / count for prompt, (passed, count) in counts.items()}


def _key(prompt: Prompt | Any) -> str:
    return json.dumps(prompt, sort_keys=True)
