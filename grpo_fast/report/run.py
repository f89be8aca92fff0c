"""Reads a run folder, whether the run has finished, is still going or was interrupted."""

from __future__ import annotations

import math
import reprlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from grpo_fast.errors import UserError, one_line
from grpo_fast.files import parse_json, read_yaml, without_checksum
from grpo_fast.report.curves import number

# The most steps with completions, prompts of a step, rewards of a completion and characters of a text that are shown.
SHOWN_STEPS, SHOWN_PROMPTS, SHOWN_REWARDS, LONGEST_TEXT = 8, 3, 50, 8000
# The most bytes of a line and of a file, and levels of nested lists and objects (a run writes 4), that are read.
LONGEST_LINE, LARGEST_FILE, DEEPEST = 64 << 20, 1 << 30, 50
SUMMARY_NUMBERS = ("before", "after", "train_seconds", "steps", "best_score")


@dataclass(frozen=True)
class Run:
    """The contents of a run folder; `summary`, `plan` and `warnings` are empty if their file does not exist (yet).

    `damaged` has a line for each file that could not be read completely, or that holds what no run writes.
    """

    folder: Path
    config: dict[str, Any]
    history: list[dict[str, Any]]
    summary: dict[str, Any]
    plan: dict[str, dict[str, float]]
    warnings: list[str]
    damaged: list[str]


@dataclass(frozen=True)
class Sample:
    """A completion and its place in the group. In a damaged file, rewards and advantage may be anything."""

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
    """Read everything in a run folder except the completions.

    Raises:
        UserError: `folder` holds no run, or a file in it is not one that a run writes.
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
    for name in SUMMARY_NUMBERS:
        if _is_wrong(summary.get(name)):
            damaged.append(f"summary.json: {name} is not a number: {_quoted(summary[name])}")
        if number(summary.get(name)) is None:
            summary.pop(name, None)
    return Run(folder, _plain(config), history, summary, plan, warnings, damaged)


def read_completions(folder: Path, damaged: list[str] | None = None) -> list[tuple[Any, list[Group]]]:
    """(step, groups) for a few steps from the first to the last, the groups with the widest advantages first.

    Args:
        damaged: gets a line about every file that could not be read completely.
    """
    paths = sorted((folder / "completions").glob("*.jsonl"))
    if len(paths) > SHOWN_STEPS:
        paths = [paths[round(index * (len(paths) - 1) / (SHOWN_STEPS - 1))] for index in range(SHOWN_STEPS)]
    read = [read_lines(path, damaged, most=LARGEST_FILE) for path in paths]
    return [(lines[0].get("step", 0), _groups(lines)) for lines in read if lines]


def read_lines(
    path: Path,
    damaged: list[str] | None = None,
    wrong: Callable[[dict[str, Any]], str | None] = lambda entry: None,
    most: int = sys.maxsize,
    unwrap: Callable[[str], str] = str,
) -> list[dict[str, Any]]:
    """The objects in a JSON-lines file; empty if it does not exist.

    Skips lines that are not objects, and a last line that an interruption cut short.

    Args:
        damaged: gets a line about the skipped ones, other than the last.
        wrong: returns what is wrong with an object, which is then skipped too, or None.
        most: how many bytes of the file are read.
        unwrap: returns the JSON in a line, or raises ValueError with what is wrong with the line.
    """
    if not path.is_file():
        return []
    entries, reasons = [], []
    for place, line in enumerate(_lines(path, most), 1):
        try:
            entry = _bounded(parse_json(unwrap(line.decode("utf-8", "replace"))))
            reason = wrong(entry) if isinstance(entry, dict) else "not an object"
        except ValueError as error:
            if line[-1:] != b"\n" and len(line) < LONGEST_LINE:
                continue
            entry, reason = None, f"not JSON: {one_line(error, 80)}"
        if reason is None:
            entries.append(entry)
        else:
            reasons.append(f"line {place} ({reason})")
    if damaged is not None:
        if reasons:
            damaged.append(f"{path.name}: {reasons[0]} is damaged and left out{_more(reasons)}")
        if path.stat().st_size > most:
            damaged.append(f"{path.name}: only its first {most:,} bytes are read")
    return entries


def _lines(path: Path, most: int) -> Iterator[bytes]:
    """The lines of a file up to about `most` bytes; longer ones than LONGEST_LINE in pieces."""
    with path.open("rb") as file:
        while file.tell() < most and (line := file.readline(LONGEST_LINE)):
            yield line


def _read_object(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        with path.open("rb") as file:
            content = _bounded(parse_json(file.read(LONGEST_LINE).decode("utf-8")))
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {one_line(error)}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} is not valid: it must hold an object")
    return content


def _bounded(value: Any, levels: int = DEEPEST) -> Any:
    """`value` itself; ValueError if it has more than `levels` levels, too many to compare or print it safely."""
    if isinstance(value, (dict, list)):
        if not levels:
            raise ValueError("nested too deeply")
        for part in value.values() if isinstance(value, dict) else value:
            _bounded(part, levels - 1)
    return value


def _more(found: list) -> str:
    return f", and {len(found) - 1:,} more" if len(found) > 1 else ""


def _wrong_step(entry: dict[str, Any]) -> str | None:
    step = entry.get("step")
    return None if isinstance(step, int) and number(step) is not None else f"its step is {_quoted(step)}"


def _is_wrong(value: Any) -> bool:
    """Whether a metric is not a number. NaN, infinity and None are valid: a run may write them."""
    return value is not None and number(value) is None and not (isinstance(value, float) and not math.isfinite(value))


def _plain(value: Any) -> Any:
    """The contents of a YAML file as JSON could hold them: dates, bytes and keys of other types become text."""
    if isinstance(value, dict):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [_plain(part) for part in value]
    return value if value is None or isinstance(value, (str, int, float)) else str(value)


def _quoted(value: Any) -> str:
    return one_line(reprlib.repr(value), 80)


def _groups(lines: list[dict[str, Any]]) -> list[Group]:
    """The prompts whose completions differ most in their advantages."""
    # Adjacent groups may share a prompt; files of older runs have no group numbers.
    groups = [list(group) for _, group in groupby(lines, key=lambda line: (line.get("group"), line.get("prompt")))]
    ranked = [sorted(group, key=_advantage, reverse=True) for group in groups]
    ranked.sort(key=lambda group: _advantage(group[0]) - _advantage(group[-1]), reverse=True)
    chosen = []
    for group in ranked[:SHOWN_PROMPTS]:
        best, worst = group[0], group[-1]
        if _advantage(best) > _advantage(worst):
            samples = [_sample("best", best), _sample("worst", worst)]
        else:
            samples = [_sample("all equal" if len(group) > 1 else "only one", best)]
        chosen.append(Group(_text(best.get("prompt")), len(group), samples))
    return chosen


def _sample(label: str, line: dict[str, Any]) -> Sample:
    rewards = line.get("rewards")
    if not isinstance(rewards, dict):
        rewards = {} if rewards is None else {"rewards": rewards}
    rewards = dict(list(rewards.items())[:SHOWN_REWARDS])
    return Sample(label, _text(line.get("completion")), rewards, line.get("advantage"))


def _advantage(line: dict[str, Any]) -> float:
    return number(line.get("advantage")) or 0.0


def _text(content: Any) -> str:
    """A prompt or completion as text, chat messages with their roles, cut in the middle beyond LONGEST_TEXT."""
    if isinstance(content, list):
        content = "\n\n".join(
            f"{message.get('role')}: {message.get('content')}" if isinstance(message, dict) else str(message)
            for message in content
        )
    text, half = "" if content is None else str(content), LONGEST_TEXT // 2
    note = f"\n\n[... {len(text) - LONGEST_TEXT:,} characters left out ...]\n\n"
    return text if len(text) <= LONGEST_TEXT else text[:half] + note + text[-half:]
