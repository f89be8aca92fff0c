"""Another trainer's configuration as ours, and what has no counterpart, field by field."""

from __future__ import annotations

import dataclasses
import re
import shlex
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from grpo_fast.config import GRPOConfig
from grpo_fast.convert.llama_factory import FOLDER, LLAMA_FACTORY
from grpo_fast.convert.rows import NoCounterpart, Row, Theirs, Trainer
from grpo_fast.convert.trl import PROCESSES, TRL
from grpo_fast.convert.verl import VERL
from grpo_fast.errors import UserError, import_extra, nearest, one_line, shown
from grpo_fast.files import read_yaml

TRAINERS = {"trl": TRL, "verl": VERL, "llama-factory": LLAMA_FACTORY}

_HINTS = get_type_hints(GRPOConfig)
FIELDS = [field.name for field in dataclasses.fields(GRPOConfig)]
# Fields that every run needs, and what to give.
_NEEDED = {
    "model_name_or_path": "a folder or a hub name",
    "dataset_name": "a file, a hub name or a built-in dataset (docs/rewards-and-data.md)",
    "reward_funcs": "reward functions, such as math_answer or file.py:function (docs/rewards-and-data.md)",
}
# An assignment among the words of a shell script, as verl's are started: ``data.train_batch_size=256``.
_OVERRIDE = re.compile(r"\+{0,2}(\w+(?:\.\w+)+)=(.*)", re.DOTALL)


@dataclass(frozen=True)
class Conversion:
    """A converted file.

    Attributes:
        trainer: whose file it is.
        fields: our configuration.
        sources: for each field of ours, what it was made from.
        notes: for each field of theirs (with its value) that has no counterpart, what to do.
        settled: for each field of theirs that asks for what happens here anyway, why.
        left_out: their fields that change no result.
        to_set: what the configuration needs before it runs, by our field.
    """

    trainer: str
    fields: dict[str, Any]
    sources: dict[str, str]
    notes: dict[str, str]
    settled: dict[str, str]
    left_out: list[str]
    to_set: dict[str, str]

    def text(self, name: str) -> str:
        """The configuration as a YAML file, with the notes as comments."""
        yaml = import_extra("yaml", "train")
        lines = [f"Converted from {name}, a file of {self.trainer}."]
        for title, items in (("To set before it runs:", self.to_set), ("No counterpart:", self.notes)):
            lines += [title, *(f"  {field}: {advice}" for field, advice in items.items())] if items else []
        ordered = {field: self.fields[field] for field in FIELDS if field in self.fields}
        comments = (f"# {' ' * (len(line) - len(line.lstrip()))}{one_line(line, limit=1000)}\n" for line in lines)
        return "".join(comments) + yaml.safe_dump(ordered, sort_keys=False, allow_unicode=True)

    def report(self) -> list[str]:
        """What became of each field, a line for each."""
        lines = [f"{field}: {shown(value)}  ({self.sources[field]})" for field, value in self.fields.items()]
        if self.left_out:
            lines += ["", "left out, since they change no result: " + ", ".join(self.left_out)]
        blocks = {"nothing to set:": self.settled, "no counterpart:": self.notes, "to set before it runs:": self.to_set}
        for title, items in blocks.items():
            lines += ["", title, *(f"  {field}: {advice}" for field, advice in items.items())] if items else []
        return lines


def read_file(path: Path) -> dict[str, Any]:
    """The fields of a YAML file, or the assignments (``a.b=value``) in a shell script that starts verl.

    Raises:
        UserError: there is no such file, or it holds no fields.
    """
    if not path.is_file():
        raise UserError(f"no such file: {path}")
    content = _read_script(path) if path.suffix == ".sh" else read_yaml(path)
    if not isinstance(content, dict) or not content or not all(isinstance(name, str) for name in content):
        raise UserError(f"{path} must hold fields and values, as in: learning_rate: 1e-5")
    return content


def _read_script(path: Path) -> dict[str, Any]:
    yaml = import_extra("yaml", "train")
    try:
        words = shlex.split(path.read_text(encoding="utf-8-sig"), comments=True)
    except ValueError as error:
        raise UserError(f"{path} is not a readable shell script: {one_line(error)}") from None
    found = [match for word in words if (match := _OVERRIDE.fullmatch(word))]
    try:
        return {match[1]: match[2] if "$" in match[2] else yaml.safe_load(match[2]) for match in found}
    except yaml.YAMLError as error:
        raise UserError(f"{path} has a value that is not valid YAML: {one_line(error)}") from None


def convert(
    content: dict[str, Any],
    folder: Path,
    trainer: str | None = None,
    processes: int = 1,
    changes: dict[str, Any] | None = None,
) -> Conversion:
    """Our configuration for another trainer's.

    Args:
        content: its fields.
        folder: where its file lies.
        trainer: a name in `TRAINERS`; None recognises it by its fields.
        processes: of the run, which TRL and LLaMA-Factory multiply the batch by.
        changes: fields of ours that take precedence.
    """
    flat = _flatten(content)
    kind = TRAINERS[trainer] if trainer else _recognise(content, flat)
    if kind is VERL:
        # Classes of the configuration are no settings.
        names = [name for name in flat if not name.endswith("_target_")]
        flat = {name.removeprefix("actor_rollout_ref."): _at_home(flat[name]) for name in names}
    else:
        flat = {name: _at_home(value) for name, value in content.items()}
    made = _Made(flat, flat | {PROCESSES: processes, FOLDER: str(folder)})
    for row in kind.rows:
        made.apply(row)
    made.take_over(kind)
    own = {name: (value, "given") for name, value in (changes or {}).items()}
    usual = {name: (value, f"{kind.title}'s default") for name, value in made.defaults(kind).items()}
    for name, (value, source) in {**usual, **made.fields, **own}.items():
        made.set(name, value, source)
    made.check(own)
    if not {"max_steps", "num_train_epochs"} & made.fields.keys():
        made.set("max_steps", GRPOConfig.max_steps, f"our default; {kind.title} counts epochs")
    to_set = {name: advice for name, advice in _NEEDED.items() if not made.fields.get(name)}
    if problem := made.problem(own):
        to_set["and"] = problem
    fields = {name: made.fields[name][0] for name in FIELDS if name in made.fields}
    sources = {name: made.fields[name][1] for name in fields}
    return Conversion(kind.title, fields, sources, made.notes, made.settled, made.left_out, to_set)


def _flatten(content: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested fields by their dotted names."""
    flat = {}
    for name, value in content.items():
        if isinstance(value, dict) and value:
            flat |= _flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def _at_home(value: Any) -> Any:
    """A path that begins with the variable of the home folder, which is ``~`` here."""
    if isinstance(value, list):
        return [_at_home(each) for each in value]
    return re.sub(r"^\$(HOME|\{HOME\})(?=/|$)", "~", value) if isinstance(value, str) else value


def _recognise(content: dict[str, Any], flat: dict[str, Any]) -> Trainer:
    names = {*content, *(name.split(".")[0] for name in flat)}
    return next((kind for kind in TRAINERS.values() if names & set(kind.known_by)), TRL)


class _Made:
    """What has been made of a file so far."""

    def __init__(self, flat: dict[str, Any], theirs: Theirs):
        self.flat, self.theirs = flat, theirs
        self.fields: dict[str, tuple[Any, str]] = {}
        self.notes: dict[str, str] = {}
        self.settled: dict[str, str] = {}
        self.left_out: list[str] = []
        self.seen: set[str] = set()

    def note(self, name: str, advice: str) -> None:
        self.notes[f"{name}={shown(self.flat[name])}" if name in self.flat else name] = advice

    def apply(self, row: Row) -> None:
        # A field with our name has our meaning, unless the row says what becomes of it.
        names = [name for name in row.theirs if name in self.flat and (name not in _HINTS or name in row.ours)]
        if not names or self.seen.issuperset(names):
            return
        self.seen.update(names)
        unset = [name for name in names if "$" in str(self.flat[name])]
        for name in unset:
            self.note(name, f"write its value in place of the variable, then {row.advice()}")
        names = [name for name in names if name not in unset]
        if unset and row.make is not None:
            for name in names:
                self.note(name, f"depends on {', '.join(unset)}; {row.advice()}")
            return
        if not names:
            return
        try:
            if row.make is not None:
                made = row.make(self.theirs)
            elif len(row.ours) == len(row.theirs):
                pairs = zip(row.theirs, row.ours, strict=True)
                made = {ours: self.flat[name] for name, ours in pairs if name in names and self.flat[name] is not None}
            elif all(self.flat[name] in (None, False) for name in names):
                made = {}
            else:
                raise NoCounterpart
        except NoCounterpart as missing:
            for name in names:
                self.note(name, str(missing) or row.advice())
            return
        except (TypeError, ValueError, KeyError, IndexError, AttributeError):
            for name in names:
                self.note(name, f"its value was not understood; {row.advice()}")
            return
        if not made:
            self.settled |= dict.fromkeys(names, row.explanation() or "as it is here by default")
        self.fields |= {name: (value, ", ".join(names)) for name, value in made.items()}

    def take_over(self, kind: Trainer) -> None:
        """Fields with our names, those that are not needed, and those that nobody knows."""
        for name, value in self.flat.items():
            if name in self.seen:
                continue
            if name in _HINTS:
                if "$" in str(value):
                    self.note(name, "write its value in place of the variable")
                elif value is not None:
                    self.fields.setdefault(name, (value, name))
            elif value is None or _is_among(name, kind.not_needed):
                self.left_out.append(name)
            else:
                self.note(name, f"not known here{nearest(name, FIELDS)}; leave it out, or see docs/migration.md")

    def defaults(self, kind: Trainer) -> dict[str, Any]:
        try:
            return kind.defaults(self.theirs)
        except (TypeError, ValueError):
            # A value that was not understood already has its note.
            return {}

    def set(self, name: str, value: Any, source: str) -> None:
        """Set a field of ours to a value of its type; a note says if it has another one."""
        try:
            self.fields[name] = _typed(name, value), source
        except ValueError as error:
            self.fields.pop(name, None)
            if source == "given":
                raise UserError(str(error)) from None
            for origin in source.split(", "):
                self.note(origin, str(error))

    def check(self, own: dict[str, Any]) -> None:
        """Take out values that our configuration refuses by their field's name, with a note for each."""
        for _ in range(len(self.fields)):
            problem = self.problem(own) or ""
            name = re.match(r"(\w+)=", problem)
            if not name or name[1] not in self.fields or name[1] in own or name[1] == "generation_batch_size":
                return
            _, source = self.fields.pop(name[1])
            for origin in source.split(", "):
                self.note(origin, problem)

    def problem(self, own: dict[str, Any]) -> str | None:
        """Why our configuration refuses the fields, apart from what is missing."""
        fields = dict.fromkeys(_NEEDED, "any") | {name: value for name, (value, _) in self.fields.items()}
        try:
            GRPOConfig(**fields)
        except UserError as error:
            return str(error)
        return None


def _is_among(name: str, known: tuple[str, ...]) -> bool:
    return name in known or any(name.startswith(each) for each in known if each.endswith("."))


def _typed(name: str, value: Any) -> Any:
    """`value` in the type of our field, such as 1e-5 for that text, which is no number in YAML.

    Raises:
        ValueError: it has another type.
    """
    hint = _HINTS[name]
    parts = get_args(hint) if isinstance(hint, UnionType) or get_origin(hint) is Union else (hint,)
    kinds = {str if get_origin(part) is Literal else get_origin(part) or part for part in parts}
    for kind in kinds - {int, float}:
        if isinstance(value, kind):
            return value
    for kind in (int, float):
        if kind in kinds and not isinstance(value, bool):
            with suppress(TypeError, ValueError, OverflowError):
                if kind is float or float(value) == int(float(value)):
                    return kind(float(value))
    if list in kinds and isinstance(value, str):
        return [part.strip() for part in value.split(",")]
    raise ValueError(f"{name}={shown(value)} is not allowed: it must be {str(hint).replace('typing.', '')}")


def markdown(kind: Trainer) -> str:
    """The table of a trainer's fields for the documents, and the fields that are left out."""
    lines = [f"| {kind.title} | here | difference |", "|---|---|---|"]
    for row in kind.rows:
        theirs = [name for name in row.theirs if name not in _HINTS or name in row.ours]
        cells = [", ".join(f"`{name}`" for name in names) or "-" for names in (theirs, row.ours)]
        if theirs:
            lines.append(f"| {cells[0]} | {cells[1]} | {row.difference}{' ' * bool(row.difference)}|")
    names = [f"`{name}*`" if name.endswith(".") else f"`{name}`" for name in kind.not_needed]
    return "\n".join([*lines, "", f"These change no result and are left out: {', '.join(names)}."])


def fill_tables(text: str) -> str:
    """`text` with the tables of `markdown` between ``<!-- fields: NAME -->`` and ``<!-- end -->``."""

    def fill(found: re.Match[str]) -> str:
        return f"{found[1]}\n\n{markdown(TRAINERS[found[2]])}\n\n<!-- end -->"

    return re.sub(r"(<!-- fields: ([\w-]+) -->).*?<!-- end -->", fill, text, flags=re.DOTALL)
