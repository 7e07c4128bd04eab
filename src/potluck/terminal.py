"""All that potluck shows to people is written here, and as it is: text is data, never markup.

rich would take ``[y/N]``, ``potluck[report]`` or the folder ``runs[/b]`` for style and ``:on:`` for a picture, and a
terminal obeys control characters. Names, paths and errors come from others: they keep their brackets and lose
what a terminal would obey. Style is given beside a text (`rich.text.Text`), not inside it.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

# Control characters but for line breaks and tabs, what turns the direction of writing, and halves of characters.
_OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


class _Console(Console):
    """A console from which only rich itself moves the cursor."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(harmless(segment.text), segment.style)


def results(**settings: Any) -> Console:
    """Where results go: standard output."""
    return _Console(markup=False, emoji=False, highlight=False, soft_wrap=True, **settings)


def progress() -> Console:
    """Where progress, warnings and errors go: standard error."""
    return results(stderr=True)


def harmless(text: str) -> str:
    """``text`` without what a terminal would obey rather than show; half a character is shown as unknown."""
    return _OBEYED.sub(lambda found: "\ufffd" if found[0] >= "\ud800" else "", text)


def table(*names: str, **settings: Any) -> Table:
    """A table that breaks what is too long for a column, and cuts nothing."""
    made = Table(**({"box": None, "pad_edge": False, "title_justify": "left"} | settings))
    for name in names:
        made.add_column(name, overflow="fold")
    return made


def labelled(console: Console, label: str, style: str, text: object) -> None:
    """A line that begins with a word in colour."""
    console.print(Text.assemble((f"{label}:", style), " ", str(text)))


def warn(warnings: Iterable[str], console: Console | None = None) -> None:
    """Say what is doubtful, on standard error if no console is named."""
    for text in warnings:
        labelled(console or progress(), "warning", "yellow", text)


def agreed(console: Console, question: str) -> bool:
    """Whether a person answers yes; anything else is no, and so is nobody there."""
    try:
        return console.input(Text(f"{question} [y/N] ")).strip().lower() in ("y", "yes")
    except EOFError:
        return False


@contextmanager
def telling(begin: str = "...") -> Iterator[Callable[[str], None]]:
    """Say on standard error how far slow work is: one line that changes on a terminal, else a line each time."""
    console = progress()
    with console.status(Text(begin)) as status:  # shows itself on terminals only
        yield lambda text: status.update(Text(text)) if console.is_terminal else console.print(text)


def write(text: str) -> None:
    """A text that is the result itself, on standard output: to the letter, but for what a terminal would obey."""
    print(harmless(text) if sys.stdout.isatty() else text, flush=True)


def write_json(result: Mapping[str, Any]) -> None:
    """A result as JSON, on standard output."""
    print(json.dumps(result, indent=2, default=str), flush=True)
