"""Text for people: a console of a known width, and text from outside made safe to show on it."""

from __future__ import annotations

import os
import re
import sys

from rich.console import Console
from rich.text import Text

from overlay.vocabulary import ABSENT, APPLY, DRIFTED, INEFFECTIVE, INERT, LANDED, NOT_SEEN, OFF, REFUSED

#: A pipe has no width of its own.
PIPE_COLUMNS = 120

COLOURS = {
    APPLY: "green",
    LANDED: "cyan",
    ABSENT: "dim",
    OFF: "dim",
    NOT_SEEN: "dim",
    INERT: "yellow",
    DRIFTED: "bold red",
    INEFFECTIVE: "bold red",
    REFUSED: "bold red",
}


class _Console(Console):
    def on_broken_pipe(self) -> None:
        raise BrokenPipeError  # rich would leave with status 1, which has a meaning here


def console() -> Console:
    """The console on stdout. COLUMNS counts where it is a width; rich would take any number."""
    columns = os.environ.get("COLUMNS", "")
    if not re.fullmatch("0*[1-9][0-9]{0,4}", columns, re.ASCII):
        columns = ""
        os.environ.pop("COLUMNS", None)
    own_width = sys.stdout.isatty() or columns
    return _Console(width=None if own_width else PIPE_COLUMNS, highlight=False, markup=False)


def visible(text: str) -> str:
    """`text` with whatever could move a cursor, ring a bell or fail to be encoded written as an escape."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


def verdict_text(state: str) -> Text:
    """A verdict in its colour."""
    return Text(visible(state), style=COLOURS.get(state, ""))
