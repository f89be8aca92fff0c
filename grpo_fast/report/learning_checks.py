"""Warnings for a run that is not learning, each given once, on the console and in ``report.html``."""

from __future__ import annotations

import json
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

from grpo_fast.config import UNCENTRED, GRPOConfig
from grpo_fast.errors import say
from grpo_fast.files import LinesFile, replace_text
from grpo_fast.report.run import read_lines

# Consecutive generation batches in which a problem must show before it is reported; fewer if the run has fewer.
PATIENCE = 3


# What each problem is called, why nothing is learned, and what to change.
TEXTS = {
    "no reward": (
        "no completion got a reward, so nothing is learned: every function of reward_funcs returned None, or failed, "
        "for all of them; check that these functions fit these prompts and read columns that the data has"
    ),
    "solved": (
        "all completions of all prompts had the highest reward of this run, {reward:g}, so nothing more is learned "
        "from them: the task may be solved; stop the run, or make the task harder (harder prompts, or a reward that "
        "still tells good answers apart)"
    ),
    "constant reward": (
        "all completions of all prompts had the same reward, {reward:g}, so nothing is learned from them; read some "
        "completions, and change reward_funcs (partial credit tells answers apart) or the prompts, if they are too "
        "hard or too easy for this model"
    ),
    "no variance": (
        "the completions of each prompt all had the same reward, so nothing is learned from them; raise "
        "num_generations={config.num_generations} or temperature={config.temperature:g}, use prompts that this model "
        "sometimes answers right, or {resample}"
    ),
    "all truncated": (
        "every completion was cut off at max_completion_length={config.max_completion_length}{masked}; raise it, or "
        "check that the prompts use the model's own chat template, without which it may not know how to end"
    ),
}


class LearningSignals:
    """Watches the generation batches of a run for signs that it learns nothing from them."""

    def __init__(self, config: GRPOConfig):
        self.config = config
        self.patience = min(PATIENCE, math.ceil(config.max_steps / config.updates_per_batch))
        self.in_a_row: Counter[str] = Counter()
        self.lowest, self.highest, self.batch_highest = math.inf, -math.inf, math.nan

    def see(self, rewards: Iterable[float]) -> None:
        """Record the total rewards of a batch's completions (NaN: none); call it before :meth:`observe`."""
        known = [reward for reward in rewards if not math.isnan(reward)]
        self.batch_highest = max(known, default=math.nan)
        self.lowest, self.highest = min([self.lowest, *known]), max([self.highest, *known])

    def observe(self, metrics: dict[str, float]) -> dict[str, str]:
        """Check the metrics of a batch; returns the texts of the warnings that are due now, by their names."""
        config, due = self.config, {}
        found = {self.reward_problem(metrics), "all truncated" if metrics["completions/clipped_ratio"] == 1 else None}
        batches = "in the only batch" if self.patience == 1 else f"for {self.patience} batches in a row"
        more = f"raise max_num_gen_batches={config.max_num_gen_batches}"
        masked = ", and mask_truncated_completions leaves all of them out of the loss, so nothing is learned"
        words = {
            "config": config, "reward": metrics["reward"], "masked": masked * config.mask_truncated_completions,
            "resample": more if config.dynamic_sampling else "switch on dynamic_sampling",
        }  # fmt: skip
        for name, text in TEXTS.items():
            self.in_a_row[name] = self.in_a_row[name] + 1 if name in found else 0
            if self.in_a_row[name] == self.patience:
                due[name] = f"{batches} {text.format(**words)}"
        return due

    def reward_problem(self, metrics: dict[str, float]) -> str | None:
        """Why the rewards of a batch give no gradient, as a key of TEXTS; None if they give one."""
        if math.isnan(metrics["reward"]):
            return "no reward"
        # Rewards that are not centred give a gradient even if they are all equal.
        centred = self.config.reward_baseline not in UNCENTRED or not metrics["reward"]
        centred = centred and not metrics.get("frac_selected")
        if metrics["frac_reward_zero_std"] != 1 or not centred:
            return None
        if metrics["reward_std"]:
            return "no variance"
        return "solved" if self.batch_highest == self.highest > self.lowest else "constant reward"


class Warnings:
    """The warnings of a run. Each is given once and kept in `path`, for the report and for a resumed run.

    Before :meth:`start`, they go to stderr.
    """

    def __init__(self, path: Path):
        self.path, self.said = path, set()
        self.say: Callable[[str], None] = lambda text: say(f"warning: {text}", file=sys.stderr)

    def start(self, step: int, say: Callable[[str], None]) -> None:
        """Pass warnings to `say` from now on, and forget those given after `step`, from which the run resumes."""
        self.say = say
        lines = [line for line in read_lines(self.path) if isinstance(line.get("step"), int) and line["step"] <= step]
        self.said = {line.get("name") for line in lines}
        if self.path.exists():
            replace_text(self.path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))

    def warn(self, step: int, name: str, text: str) -> None:
        """Give and keep the warning, unless there was one of that name."""
        if name in self.said:
            return
        self.said.add(name)
        self.say(text)
        with LinesFile(self.path, append=True) as file:
            file.write({"step": step, "name": name, "text": text})
