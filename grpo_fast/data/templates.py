"""Prompts from a row's columns: the column ``prompt``, a template, a prompt file, or a form of instruction data.

A prompt file is a text with ``{column}`` placeholders, or a YAML list of chat messages whose contents have them. If the
last message is the assistant's, the model continues it. ``{{`` and ``}}`` stand for braces.
"""

from __future__ import annotations

import datetime
import numbers
import re
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

from grpo_fast.config import GRPOConfig
from grpo_fast.data.instructions import alpaca_prompt, is_alpaca, is_sharegpt, sharegpt_prompt
from grpo_fast.errors import UserError, nearest, one_line
from grpo_fast.files import read_yaml, user_path

Row = dict[str, Any]
Prompt = str | list[dict[str, str]]


class _Columns(string.Formatter):
    """`str.format` whose placeholders are whole column names: no attributes, indices or positions."""

    def get_field(self, field_name: str, args: Any, kwargs: Any) -> tuple[Any, str]:
        return kwargs[field_name], field_name


_fill = _Columns().vformat

# The prompt files in the package, by name.
PROMPTS = {path.stem: path for path in sorted((Path(__file__).parent / "prompts").iterdir())}


def load_template(config: GRPOConfig) -> Callable[[Row], Prompt]:
    """The function that makes a row's prompt from `prompt_template`, `prompt_file`, the column ``prompt``, or the
    columns of Alpaca's or ShareGPT's data.

    That function raises UserError for a column that is missing or not a text (a chat, an object) and for an invalid
    prompt; this one for a prompt file that is missing or malformed, or a placeholder that is not the name of a column.
    """
    if config.prompt_file is not None:
        name, template = f"prompt_file={config.prompt_file!r}", read_prompt_file(config.prompt_file)
    else:
        name, template = "prompt_template", config.prompt_template
    if template is None:
        return lambda row: _own_prompt(row, config)
    if isinstance(template, list) and config.system_prompt:
        raise UserError(f"{name} has its own messages; leave system_prompt out, or put it into the file")
    if isinstance(template, str) and (config.apply_chat_template or config.system_prompt):
        template = [{"role": "user", "content": template}]
    used = dict.fromkeys(column for text in _texts(template) for column in _placeholders(name, text))
    system = [{"role": "system", "content": config.system_prompt}] if config.system_prompt else []

    def build(row: Row) -> Prompt:
        for column in used:
            if column not in row:
                raise UserError(
                    f"{name} uses column {column!r}, but the row has {', '.join(row)} ({{{{ and }}}} stand for braces)"
                )
            if row[column] is None or row[column] != row[column]:
                raise UserError(f"{name} uses column {column!r}, which is empty here")
            if not has_text(row[column]):
                raise UserError(
                    f"{name} uses column {column!r}, which is a {type(row[column]).__name__} here; it can be text, a "
                    "number, a date or a list of numbers (chat messages go in the column 'prompt', without template)"
                )
        try:
            if isinstance(template, str):
                prompt = _fill(template, (), row)
            else:
                prompt = [*system, *({**m, "content": _fill(m["content"], (), row)} for m in template)]
        except (ValueError, TypeError, LookupError) as error:
            raise UserError(f"{name} cannot be filled: {one_line(error)}") from None
        return check_prompt(prompt)

    return build


def has_text(value: object) -> bool:
    """Whether a value reads as text in a prompt, rather than as Python's notation of an object."""
    if isinstance(value, list):
        return all(isinstance(item, numbers.Number) for item in value)
    return isinstance(value, (str, numbers.Number, datetime.date, datetime.time))


def read_prompt_file(name: str) -> str | list[dict[str, str]]:
    """The text or the chat messages of a prompt file, or of a built-in one by its name; UserError if invalid."""
    path = PROMPTS.get(name) or user_path(name)
    if not path.is_file():
        raise UserError(
            f"prompt_file={name!r} is neither a file nor one of {', '.join(PROMPTS)}{nearest(name, PROMPTS)}"
        )
    if path.suffix not in (".yaml", ".yml"):
        try:
            return path.read_text(encoding="utf-8-sig").removesuffix("\n")
        except UnicodeDecodeError as error:
            raise UserError(f"prompt_file={name!r} is not UTF-8 text: {one_line(error)}") from None
    messages = read_yaml(path, f"prompt_file={name!r}")
    try:
        return check_prompt(messages if isinstance(messages, list) else None)
    except UserError:
        raise UserError(f"prompt_file={name!r} must hold a list of messages, each with a role and a content") from None


def check_prompt(prompt: object) -> Prompt:
    """Return `prompt` if it is valid text or chat messages; raise UserError otherwise."""
    texts = _texts(prompt)
    if not all(isinstance(text, str) for text in texts):
        raise UserError(f"a prompt must be text, or chat messages with a role and a content, got {prompt!r:.80}")
    try:
        "".join(texts).encode()
    except UnicodeEncodeError as error:
        raise UserError(f"the prompt is not valid Unicode: {one_line(error)}") from None
    return prompt


def _own_prompt(row: Row, config: GRPOConfig) -> Prompt:
    """The prompt of a row that has one, or that is in one of the forms of instruction data."""
    if is_alpaca(row):
        as_chat = config.apply_chat_template or bool(config.system_prompt)
        return check_prompt(alpaca_prompt(row, as_chat, config.system_prompt))
    if is_sharegpt(row):
        return check_prompt(sharegpt_prompt(row, config.system_prompt))
    if "prompt" in row and (config.system_prompt or config.apply_chat_template):
        name = "system_prompt" if config.system_prompt else "apply_chat_template"
        raise UserError(f"{name} requires prompt_template or prompt_file; a prompt column is used as it is")
    if "prompt" not in row:
        raise UserError(
            f"no column 'prompt' (it has {', '.join(row)}); set prompt_template, as in '{{question}}', or prompt_file "
            "(Alpaca's 'instruction' and ShareGPT's 'conversations' or 'messages' need neither)"
        )
    return check_prompt(row["prompt"])


def _texts(prompt: object) -> list[object]:
    """The roles and contents of a chat, or the text alone; [None] for anything else."""
    if isinstance(prompt, str):
        return [prompt]
    if isinstance(prompt, list) and prompt and all(isinstance(message, dict) for message in prompt):
        return [message.get(key) for message in prompt for key in ("role", "content")]
    return [None]


def _placeholders(name: str, text: str) -> list[str]:
    """The columns that a template uses."""
    try:
        found = [(column, spec) for _, column, spec, _ in string.Formatter().parse(text) if column is not None]
    except ValueError as error:
        raise UserError(f"{name} cannot be filled: {one_line(error)}; {{{{ and }}}} stand for braces") from None
    for column, spec in found:
        if "{" in spec or any(len(width) > 3 for width in re.findall(r"\d+", spec)):
            raise UserError(f"{name} cannot be filled: the width in {{{column}:{spec:.40}}} must be below 1000")
        if not column:
            raise UserError(f"{name} cannot be filled: {{}} names no column; {{{{ and }}}} stand for braces")
    return [column for column, _ in found]
