"""A terminal on which text from elsewhere stays text."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.segment import Segment
from rich.text import Text

from grpo_fast.errors import printable


class Terminal(Console):
    """A console that takes neither markup nor emoji names from a text, and shows control characters as escapes.

    Columns, completions, file names and answers of a server are printed, and none of them may command the terminal.
    """

    def __init__(self, **options: Any):
        super().__init__(highlight=False, markup=False, emoji=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        # Before its width is taken, for a table's columns.
        return super().render_str(printable(text), **options)

    def render(self, *arguments: Any, **options: Any) -> Iterable[Segment]:
        for segment in super().render(*arguments, **options):
            # Rich's own commands are marked as such.
            yield segment if segment.control else segment._replace(text=printable(segment.text))
