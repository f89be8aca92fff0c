"""Reading a run folder: of a run that ended, that goes on, or that was interrupted."""

from __future__ import annotations

import math
import reprlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

from grpo_fast.errors import UserError, one_line
from grpo_fast.files import parse_json, read_yaml, without_checksum
from grpo_fast.report.curves import number

# Steps whose completions are shown, prompts of each, rewards of a completion, and characters of a text.
SHOWN_STEPS = 8
SHOWN_PROMPTS = 3
SHOWN_REWARDS = 50
LONGEST_TEXT = 8000
# Bytes of a line and of a file that are read.
LONGEST_LINE, LARGEST_FILE = 64 << 20, 1 << 30
# Levels of lists and objects inside each other; a run writes 4.
DEEPEST = 50
# Figures of ``summary.json``; those that a run did not measure are null.
SUMMARY_FIGURES = ("before", "after", "train_seconds", "steps", "best_score")


@dataclass(frozen=True)
class Run:
    """What the folder holds; `summary`, `plan` and `warnings` are empty where there is no such file (yet).

    `damaged` says, in a line for each file, what could not be read or is not what a run writes.
    """

    folder: Path
    config: dict[str, Any]
    history: list[dict[str, Any]]
    summary: dict[str, Any]
    plan: dict[str, dict[str, float]]
    warnings: list[str] = field(default_factory=list)
    damaged: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Sample:
    """A completion with its rewards by function; `label` says which one of its group it is.

    Rewards and advantage are as they were found: a damaged file may hold anything.
    """

    label: str
    text: str
    rewards: dict[str, Any]
    advantage: Any


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
    path = folder / "config.yaml"
    if not path.is_file():
        raise UserError(f"{folder} is not a run folder: it has no config.yaml")
    config = read_yaml(path)
    if not isinstance(config, dict):
        raise UserError(f"{path} must hold fields and values")
    damaged: list[str] = []
    history = read_lines(folder / "metrics.jsonl", damaged, _wrong_step, LARGEST_FILE, without_checksum)
    wrong = [(entry, name) for entry in history for name, value in entry.items() if _is_wrong(value)]
    for entry, name in wrong[:1]:
        found = f"{_quoted(name)} of step {entry['step']} is not a number ({_quoted(entry[name])})"
        damaged.append(f"metrics.jsonl: {found} and is not drawn{_more(wrong)}")
    noted = read_lines(folder / "warnings.jsonl", damaged, most=LARGEST_FILE)
    warnings = [str(entry["text"]) for entry in noted if "text" in entry]
    summary, plan = (_read_object(folder / name) for name in ("summary.json", "memory_plan.json"))
    for name in SUMMARY_FIGURES:
        if _is_wrong(summary.get(name)):
            damaged.append(f"summary.json: {name} is not a number: {_quoted(summary[name])}")
        if number(summary.get(name)) is None:
            summary.pop(name, None)
    return Run(folder, _plain(config), history, summary, plan, warnings, damaged)


def read_lines(
    path: Path,
    damaged: list[str] | None = None,
    wrong: Callable[[dict[str, Any]], str | None] = lambda entry: None,
    most: int = sys.maxsize,
    unwrap: Callable[[str], str] = str,
) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file; none without the file.

    A last line that an interruption cut off is left out, and so are lines that are not objects.

    Args:
        damaged: gets a line about those.
        wrong: says what is wrong about an object that is left out, too.
        most: bytes of the file that are read.
        unwrap: the JSON of a line; a ValueError says what is wrong with the line.
    """
    if not path.is_file():
        return []
    entries, reasons = [], []
    for place, line in enumerate(_lines(path, most), 1):
        try:
            entry = _shallow(parse_json(unwrap(line.decode("utf-8", "replace"))))
            reason = wrong(entry) if isinstance(entry, dict) else "not an object"
        except ValueError as error:
            reason = None if line[-1:] != b"\n" and len(line) < LONGEST_LINE else f"not JSON: {one_line(error, 80)}"
            entry = None
        if reason is not None:
            reasons.append(f"line {place} ({reason})")
        elif entry is not None:
            entries.append(entry)
    if reasons and damaged is not None:
        damaged.append(f"{path.name}: {reasons[0]} is damaged and left out{_more(reasons)}")
    if damaged is not None and path.stat().st_size > most:
        damaged.append(f"{path.name}: only its first {most:,} bytes are read")
    return entries


def _lines(path: Path, most: int) -> Iterator[bytes]:
    """The lines of a file, up to about `most` bytes; those of more than LONGEST_LINE come in pieces."""
    with path.open("rb") as file:
        while file.tell() < most and (line := file.readline(LONGEST_LINE)):
            yield line


def _more(found: list) -> str:
    return f", and {len(found) - 1:,} more" if len(found) > 1 else ""


def _wrong_step(entry: dict[str, Any]) -> str | None:
    step = entry.get("step")
    return None if isinstance(step, int) and number(step) is not None else f"its step is {_quoted(step)}"


def _is_wrong(value: Any) -> bool:
    """Whether a figure is neither a number nor NaN or infinite, which are figures that a run may have."""
    return value is not None and number(value) is None and not (isinstance(value, float) and not math.isfinite(value))


def read_completions(folder: Path, damaged: list[str] | None = None) -> list[tuple[Any, list[Group]]]:
    """A few prompts of a few steps from the first to the last: (step, groups), those of the widest rewards first.

    Args:
        damaged: gets a line about every file of which something could not be read.
    """
    chosen = _spread(sorted((folder / "completions").glob("*.jsonl")), SHOWN_STEPS)
    read = [read_lines(path, damaged, most=LARGEST_FILE) for path in chosen]
    return [(lines[0].get("step", 0), _groups(lines)) for lines in read if lines]


def _read_object(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        with path.open("rb") as file:
            content = _shallow(parse_json(file.read(LONGEST_LINE).decode("utf-8")))
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {one_line(error)}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} is not valid: it must hold an object")
    return content


def _shallow(value: Any, levels: int = DEEPEST) -> Any:
    """`value` itself.

    Raises:
        ValueError: it has more levels, and could be neither compared nor shown.
    """
    if isinstance(value, (dict, list)):
        if not levels:
            raise ValueError("nested too deeply")
        for part in value.values() if isinstance(value, dict) else value:
            _shallow(part, levels - 1)
    return value


def _plain(value: Any) -> Any:
    """What YAML holds as JSON would hold it: dates, bytes and odd keys become text."""
    if isinstance(value, dict):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [_plain(part) for part in value]
    return value if value is None or isinstance(value, (str, int, float)) else str(value)


def _quoted(value: Any) -> str:
    return one_line(reprlib.repr(value), 80)


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
    if not isinstance(rewards, dict):
        rewards = {} if rewards is None else {"rewards": rewards}
    rewards = dict(list(rewards.items())[:SHOWN_REWARDS])
    return Sample(label, _text(line.get("completion")), rewards, line.get("advantage"))


def _advantage(line: dict[str, Any]) -> float:
    return number(line.get("advantage")) or 0.0


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
