"""Reading a run folder: of a run that ended, that goes on, or that was interrupted."""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from grpo_fast.errors import UserError, one_line

# Steps whose completions are shown, prompts of each, and characters of a text.
SHOWN_STEPS = 8
SHOWN_PROMPTS = 3
LONGEST_TEXT = 8000


@dataclass(frozen=True)
class Run:
    """What the folder holds; `summary`, `plan` and `warnings` are empty where there is no such file (yet)."""

    folder: Path
    config: dict[str, Any]
    history: list[dict[str, Any]]
    summary: dict[str, Any]
    plan: dict[str, dict[str, float]]
    warnings: list[str]


@dataclass(frozen=True)
class Sample:
    """A completion with its rewards by function; `label` says which one of its group it is."""

    label: str
    text: str
    rewards: dict[str, float | None]
    advantage: float | None


@dataclass(frozen=True)
class Group:
    """A prompt with the best and the worst of its `count` completions."""

    prompt: str
    count: int
    samples: list[Sample]


def read_run(folder: Path) -> Run:
    """Read what is there.

    Raises:
        UserError: `folder` holds no run, or files that are none of a run.
    """
    import yaml

    path = folder / "config.yaml"
    if not path.is_file():
        raise UserError(f"{folder} is not a run folder: it has no config.yaml")
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid YAML: {one_line(error)}") from None
    if not isinstance(config, dict):
        raise UserError(f"{path} must hold fields and values")
    history = [entry for entry in read_lines(folder / "metrics.jsonl") if isinstance(entry.get("step"), int)]
    warnings = [str(entry["text"]) for entry in read_lines(folder / "warnings.jsonl") if "text" in entry]
    summary, plan = (_read_object(folder / name) for name in ("summary.json", "memory_plan.json"))
    return Run(folder, config, history, summary, plan, warnings)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file; none without the file. A line cut off by an interruption is left out."""
    if not path.is_file():
        return []
    entries = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(entry, dict):
            entries.append(entry)
    return entries


def read_completions(folder: Path) -> list[tuple[int, list[Group]]]:
    """A few prompts of a few steps from the first to the last: (step, groups), those of the widest rewards first."""
    chosen = _spread(sorted((folder / "completions").glob("*.jsonl")), SHOWN_STEPS)
    return [(lines[0].get("step", 0), _groups(lines)) for lines in map(read_lines, chosen) if lines]


def _read_object(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid JSON: {one_line(error)}") from None
    return content if isinstance(content, dict) else {}


def _spread(items: list, count: int) -> list:
    """At most `count` items, evenly spaced, with the first and the last."""
    if len(items) <= count:
        return items
    return [items[round(index * (len(items) - 1) / (count - 1))] for index in range(count)]


def _groups(lines: list[dict[str, Any]]) -> list[Group]:
    """The prompts on whose completions the advantages differ most."""
    # A prompt may have several groups side by side; older runs have no numbers for them.
    groups = [list(group) for _, group in groupby(lines, key=lambda line: (line.get("group"), line.get("prompt")))]
    ranked = [sorted(group, key=_advantage, reverse=True) for group in groups]
    widest = sorted(ranked, key=lambda group: _advantage(group[0]) - _advantage(group[-1]), reverse=True)
    return [_group(group) for group in widest[:SHOWN_PROMPTS]]


def _group(ranked: list[dict[str, Any]]) -> Group:
    best, worst = ranked[0], ranked[-1]
    if _advantage(best) == _advantage(worst):
        samples = [_sample("one of equals" if len(ranked) > 1 else "only one", best)]
    else:
        samples = [_sample("best", best), _sample("worst", worst)]
    return Group(_text(best.get("prompt")), len(ranked), samples)


def _sample(label: str, line: dict[str, Any]) -> Sample:
    rewards = line.get("rewards")
    return Sample(
        label, _text(line.get("completion")), rewards if isinstance(rewards, dict) else {}, line.get("advantage")
    )


def _advantage(line: dict[str, Any]) -> float:
    value = line.get("advantage")
    return value if isinstance(value, (int, float)) else 0.0


def _text(content: Any) -> str:
    """A prompt or completion as text; chat messages with their roles. Very long ones lose their middle."""
    if isinstance(content, list):
        content = "\n\n".join(
            f"{message.get('role')}: {message.get('content')}" if isinstance(message, dict) else str(message)
            for message in content
        )
    text = "" if content is None else str(content)
    left_out = len(text) - LONGEST_TEXT
    if left_out <= 0:
        return text
    half = LONGEST_TEXT // 2
    return f"{text[:half]}\n\n[... {left_out:,} characters left out ...]\n\n{text[-half:]}"
