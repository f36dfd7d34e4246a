"""One word for a cell, from the states of its stages."""

from __future__ import annotations

import functools

# The first of these that any stage of a cell is in is the state of the cell.
CELL_STATES = (
    "failed",
    "diverged",
    "blocked",
    "lost",
    "running",
    "submitted",
    "preempted",
    "timeout",
    "cancelled",
)
"""All states but planned, waiting and done."""


def cell_state(states: list[str]) -> str:
    """One word for a cell: done when all its stages are, else the worst thing that happened."""
    return _worst(tuple(states))


@functools.cache  # thousands of cells have a few dozen combinations
def _worst(states: tuple[str, ...]) -> str:
    if all(s == "done" for s in states):
        return "done"
    for state in CELL_STATES:
        if state in states:
            return state
    return "waiting" if "done" in states else "planned"
