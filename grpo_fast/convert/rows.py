"""What a table of another trainer's fields consists of."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple

from grpo_fast.errors import shown

# Their fields by name, of which a function may read any.
Theirs = dict[str, Any]


class NoCounterpart(Exception):
    """A value that cannot be expressed here; the message says what to do, or is empty for what the row says."""


class Row(NamedTuple):
    """Some of their fields, ours in their place, and the difference, in Markdown, as the documents print it.

    `make` returns our fields for theirs, none where there is nothing to set; it raises `NoCounterpart`. Without it, the
    value is taken over under our name; a row without `ours` has no counterpart.
    """

    theirs: tuple[str, ...]
    ours: tuple[str, ...]
    difference: str = ""
    make: Callable[[Theirs], dict[str, Any]] | None = None

    def explanation(self) -> str:
        """The difference as plain text."""
        return re.sub(r"\[(.*?)\]\(.*?\)", r"\1", self.difference).replace("`", "")

    def advice(self) -> str:
        """What to do, as plain text."""
        text = self.explanation()
        if self.ours:
            return f"set {', '.join(self.ours)}{f' ({text})' if text else ''}"
        return text or "leave it out"


class Trainer(NamedTuple):
    """Another trainer.

    Attributes:
        title: how messages name it.
        known_by: fields of which at least one is in its files, and in nobody else's.
        rows: its fields that have another name or another meaning here; those with our name are taken over.
        not_needed: fields that change no result or have nothing to act on here, which are left out. One that ends in a
            full stop stands for all that begin with it.
        defaults: what it does where a file says nothing and our default differs, as fields of ours.
    """

    title: str
    known_by: tuple[str, ...]
    rows: tuple[Row, ...]
    not_needed: tuple[str, ...]
    defaults: Callable[[Theirs], dict[str, Any]]


def choice(field: str, values: dict[Any, dict[str, Any]], advice: str = "") -> Callable[[Theirs], dict[str, Any]]:
    """Our fields for each value of their `field`; other values have no counterpart."""

    def make(theirs: Theirs) -> dict[str, Any]:
        if theirs[field] not in values:
            raise NoCounterpart(advice or f"{shown(theirs[field])} has no counterpart; there is {', '.join(values)}")
        return values[theirs[field]]

    return make


def fixed(field: str, value: Any, advice: str) -> Callable[[Theirs], dict[str, Any]]:
    """Nothing to set where their `field` has the value that always holds here."""

    def make(theirs: Theirs) -> dict[str, Any]:
        if theirs[field] != value:
            raise NoCounterpart(advice)
        return {}

    return make
