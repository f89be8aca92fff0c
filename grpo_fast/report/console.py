"""A rich console that prints text from outside as plain text."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.segment import Segment
from rich.text import Text

from grpo_fast.errors import printable


class Terminal(Console):
    """A console that interprets no markup or emoji names and prints control characters as escapes.

    Column names, completions, file names and server replies reach the terminal, and none of them may control it.
    """

    def __init__(self, **options: Any):
        super().__init__(highlight=False, markup=False, emoji=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        # Escaped before rich measures it, so that the columns of a table are wide enough.
        return super().render_str(printable(text), **options)

    def render(self, *arguments: Any, **options: Any) -> Iterable[Segment]:
        for segment in super().render(*arguments, **options):
            # Rich marks its own control sequences.
            yield segment if segment.control else segment._replace(text=printable(segment.text))
