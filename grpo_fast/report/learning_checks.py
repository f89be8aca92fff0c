"""Signs that a run is learning nothing, each said once, in the terminal and in ``report.html``."""

from __future__ import annotations

import json
import math
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from grpo_fast.config import UNCENTRED, GRPOConfig
from grpo_fast.errors import say
from grpo_fast.files import LinesFile, replace_text
from grpo_fast.report.run import read_lines

# Generation batches in a row after which a sign is taken seriously; one where the run has no more.
PATIENCE = 3


class Signal(NamedTuple):
    """`holds` tells it from a batch's figures; `text` names the cause and what to change. Both also get the config."""

    holds: Callable[[dict[str, float], GRPOConfig], bool]
    text: Callable[[dict[str, float], GRPOConfig], str]


def _unscored(figures: dict[str, float], config: GRPOConfig) -> bool:
    return math.isnan(figures["reward"])


def _no_reward(figures: dict[str, float], config: GRPOConfig) -> str:
    return (
        "no completion got a reward, so nothing is learned: every function of reward_funcs returned None, or failed, "
        "for all of them; check that these functions are meant for these prompts and read columns that the data has"
    )


def _is_flat(figures: dict[str, float], config: GRPOConfig) -> bool:
    """Whether all advantages are 0; rewards that are not centred push even where all are equal."""
    return figures["frac_reward_zero_std"] == 1 and (config.reward_baseline not in UNCENTRED or not figures["reward"])


def _is_constant(figures: dict[str, float], config: GRPOConfig) -> bool:
    return figures["reward_std"] == 0 and _is_flat(figures, config)


def _constant_reward(figures: dict[str, float], config: GRPOConfig) -> str:
    if figures["earlier_highest"] is not None and figures["reward"] >= figures["earlier_highest"]:
        return (
            f"all completions of all prompts had the same reward, {figures['reward']:g}, and no earlier batch had a "
            "higher mean: the task may be solved, and nothing more is learned; end the run, or take harder prompts"
        )
    return (
        f"all completions of all prompts had the same reward, {figures['reward']:g}, so nothing is learned from them; "
        "read some completions, and change reward_funcs (a reward for what is partly right tells answers apart) or the "
        "prompts, if they are too hard or too easy for this model"
    )


def _no_variance(figures: dict[str, float], config: GRPOConfig) -> str:
    sampled = f"max_num_gen_batches={config.max_num_gen_batches}" if config.dynamic_sampling else "dynamic_sampling"
    return (
        "the completions of each prompt all had the same reward, so nothing is learned from them; raise "
        f"num_generations={config.num_generations} or temperature={config.temperature:g}, take prompts that this model "
        f"answers right sometimes, or {'raise' if config.dynamic_sampling else 'switch on'} {sampled}"
    )


def _is_truncated(figures: dict[str, float], config: GRPOConfig) -> bool:
    return figures["completions/clipped_ratio"] == 1


def _all_truncated(figures: dict[str, float], config: GRPOConfig) -> str:
    left_out = ", and mask_truncated_completions leaves all of them out of the loss, so nothing is learned"
    return (
        f"every completion was cut off at max_completion_length={config.max_completion_length}"
        f"{left_out * config.mask_truncated_completions}; raise it, or check that the prompts are in the model's own "
        "chat template, without which it may not know how to end"
    )


# Of each of these only the first that holds is said: the most specific comes first.
SIGNALS = (
    {
        "no reward": Signal(_unscored, _no_reward),
        "constant reward": Signal(_is_constant, _constant_reward),
        "no variance": Signal(_is_flat, _no_variance),
    },
    {"all truncated": Signal(_is_truncated, _all_truncated)},
)


class LearningSignals:
    """Watches a run's generation batches for signs that they teach nothing."""

    def __init__(self, config: GRPOConfig):
        self.config = config
        self.patience = min(PATIENCE, math.ceil(config.max_steps / config.num_iterations))
        self.in_a_row: Counter[str] = Counter()
        # The highest mean reward of the batches whose rewards differed.
        self.highest: float | None = None

    def observe(self, figures: dict[str, float]) -> dict[str, str]:
        """Take in the figures of a batch; the texts, by name, of the signs that have now held for long enough."""
        found = {}
        figures = {**figures, "earlier_highest": self.highest}
        if figures["reward_std"] > 0:
            self.highest = max(figures["reward"], self.highest if self.highest is not None else -math.inf)
        for signals in SIGNALS:
            holding = next((name for name, signal in signals.items() if signal.holds(figures, self.config)), None)
            for name, signal in signals.items():
                self.in_a_row[name] = self.in_a_row[name] + 1 if name == holding else 0
                if self.in_a_row[name] == self.patience:
                    found[name] = f"{_batches(self.patience)} {signal.text(figures, self.config)}"
        return found


def _batches(count: int) -> str:
    return "in the only batch" if count == 1 else f"for {count} batches in a row"


class Warnings:
    """The warnings of a run: each is said once, and kept in `path`, so that the report has it and a resumed run knows.

    Without :meth:`start`, they go to stderr.
    """

    def __init__(self, path: Path):
        self.path, self.said = path, set()
        self.say: Callable[[str], None] = lambda text: say(f"warning: {text}", file=sys.stderr)

    def start(self, step: int, say: Callable[[str], None]) -> None:
        """Leave warnings to `say` from now on, and take back those of a run that goes on after `step`."""
        self.say = say
        lines = [line for line in read_lines(self.path) if isinstance(line.get("step"), int) and line["step"] <= step]
        self.said = {line.get("name") for line in lines}
        if self.path.exists():
            replace_text(self.path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))

    def warn(self, step: int, name: str, text: str) -> None:
        """Say and keep `text`, unless there was a warning of that name."""
        if name in self.said:
            return
        self.said.add(name)
        self.say(text)
        with LinesFile(self.path, append=True) as file:
            file.write({"step": step, "name": name, "text": text})
