"""Texts for people: consoles, names and messages that tell the terminal nothing, colours."""

from __future__ import annotations

import re
import sys

from rich.console import Console
from rich.markup import escape

_COLOURS = {
    "done": "green",
    "running": "cyan",
    "submitted": "cyan",
    "failed": "red",
    "diverged": "magenta",
    "blocked": "red",
    "lost": "yellow",
    "preempted": "yellow",
    "timeout": "yellow",
    "cancelled": "yellow",
}


def console(*, error: bool = False) -> Console:
    """A console of the terminal's width; wide enough for whole rows when piped."""
    stream = sys.stderr if error else sys.stdout
    width = None if stream.isatty() else 160
    return Console(stderr=error, width=width, highlight=False)


def printable(text: str) -> str:
    """Without what a name or message from elsewhere could tell the terminal to do."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]", _escaped, text)


def one_line(text: str) -> str:
    """The same of a name, which is no place for tabs and lines either."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]", _escaped, text)


def _escaped(found: re.Match[str]) -> str:
    return ascii(found[0])[1:-1]


def plain(text: str) -> str:
    """Text that neither the terminal nor rich takes for anything else."""
    return escape(printable(text))


def state_text(state: str) -> str:
    """A state in its colour."""
    colour = _COLOURS.get(state)
    return f"[{colour}]{state}[/]" if colour else state
