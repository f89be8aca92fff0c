"""Rows in the two forms of LLaMA-Factory's data, as a prompt and its reference answer.

Alpaca's rows have ``instruction``, ``input`` and ``output``, and may have ``system`` and ``history``. ShareGPT's have
``conversations`` (messages with ``from`` and ``value``) or ``messages`` (with ``role`` and ``content``), and may have
``system``.
"""

from __future__ import annotations

from typing import Any

from grpo_fast.errors import UserError, shown

# Names of roles in ShareGPT's messages, and the chat templates' names for them.
_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
# Columns whose content would be lost.
_UNUSED = ("tools", "images", "videos", "audios")


def is_alpaca(row: dict[str, Any]) -> bool:
    return "prompt" not in row and "instruction" in row


def is_sharegpt(row: dict[str, Any]) -> bool:
    return "prompt" not in row and not is_alpaca(row) and ("conversations" in row or "messages" in row)


def alpaca_prompt(row: dict[str, Any], as_chat: bool, system_prompt: str | None) -> str | list[dict[str, str]]:
    """The instruction, and the input below it if there is one; as a chat also the history and the system message.

    The row's own ``system`` takes precedence over `system_prompt`.

    Raises:
        UserError: there is no instruction, a column holds something else than text, or a row needs a chat.
    """
    _refuse_unused(row)
    instruction, more, system = (_text(row, name) for name in ("instruction", "input", "system"))
    if not instruction:
        raise UserError("column 'instruction' is empty")
    text = f"{instruction}\n{more}" if more else instruction
    history = row.get("history") or []
    if not as_chat and (system or history):
        name = "system" if system else "history"
        raise UserError(f"column {name!r} is part of a chat; set apply_chat_template: true")
    if not as_chat:
        return text
    if not all(isinstance(turn, (list, tuple)) and len(turn) == 2 for turn in history):
        raise UserError(f"column 'history' must be a list of pairs of texts, got {shown(history)}")
    turns = [(role, said) for turn in history for role, said in zip(("user", "assistant"), turn, strict=True)]
    return chat_of(system or system_prompt, [*turns, ("user", text)])


def sharegpt_prompt(row: dict[str, Any], system_prompt: str | None) -> list[dict[str, str]]:
    """The conversation up to the assistant's last message.

    The row's own system message takes precedence over `system_prompt`.

    Raises:
        UserError: a message has no role or text, has a role of tools, or the user says nothing.
    """
    _refuse_unused(row)
    turns = turns_of(row)
    if turns[-1][0] == "assistant":
        turns.pop()
    if not turns or turns[-1][0] != "user":
        raise UserError("the conversation has no message of the user before the assistant's last one")
    if turns[0][0] == "system":
        system_prompt = turns.pop(0)[1]
    return chat_of(_text(row, "system") or system_prompt, turns)


def reference_answer(row: dict[str, Any]) -> Any:
    """What the row gives as the right answer: Alpaca's output, or the assistant's last message; None without one."""
    if is_alpaca(row):
        return row.get("output")
    if is_sharegpt(row):
        role, text = turns_of(row)[-1]
        return text if role == "assistant" else None
    return None


def turns_of(row: dict[str, Any]) -> list[tuple[str, str]]:
    name = "conversations" if "conversations" in row else "messages"
    messages = row[name]
    if not isinstance(messages, list) or not messages or not all(isinstance(m, dict) for m in messages):
        raise UserError(f"column {name!r} must be a list of messages, got {shown(messages)}")
    turns = []
    for message in messages:
        role, text = message.get("from", message.get("role")), message.get("value", message.get("content"))
        if role not in _ROLES:
            raise UserError(f"a message in {name!r} is from {shown(role)}; it can be from {', '.join(_ROLES)}")
        if not isinstance(text, str):
            raise UserError(f"a message in {name!r} must have a text, got {shown(text)}")
        turns.append((_ROLES[role], text))
    return turns


def chat_of(system: str | None, turns: list[tuple[str, str]]) -> list[dict[str, str]]:
    first = [("system", system)] if system else []
    return [{"role": role, "content": text} for role, text in [*first, *turns]]


def _text(row: dict[str, Any], name: str) -> str | None:
    value = row.get(name)
    if value is not None and not isinstance(value, str):
        raise UserError(f"column {name!r} must be text, got {shown(value)}")
    return value


def _refuse_unused(row: dict[str, Any]) -> None:
    for name in _UNUSED:
        if row.get(name):
            raise UserError(f"column {name!r} cannot be used: prompts are text, without tools or media")
