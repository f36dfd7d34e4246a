"""Which cells and stages a command means: a filter such as `size=d64x4|d32x3`, or a name or id."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from harness.errors import NotFoundError, UserError
from harness.study.cell_states import CELL_STATES
from harness.study.cells import TUNE, Cell
from harness.study.expand import same
from harness.units import safe_name

STATES = ("planned", "waiting", *CELL_STATES, "done")


def parse_filter(text: str, what: str = "--only") -> dict[str, list[str]]:
    """'a=1|2,b=x' -> {'a': ['1', '2'], 'b': ['x']}. Raises UserError for other shapes.

    `what`: where the text was given, for messages.
    """
    rule: dict[str, list[str]] = {}
    for part in filter(None, (p.strip() for p in text.split(","))):
        key, equals, value = part.partition("=")
        if not equals or not key.strip() or not value.strip():
            raise UserError(f"{what} {text!r}: '{part}' is not axis=value[|value]")
        rule.setdefault(key.strip(), []).extend(v.strip() for v in value.split("|"))
    if not rule:
        raise UserError(f"{what} is empty; expected axis=value[|value],axis=value")
    return rule


def select(cells: list[Cell], text: str | None, what: str = "--only") -> list[Cell]:
    """The cells a filter matches. Raises NotFoundError if it matches none."""
    if text is None:
        return cells
    rule = parse_filter(text, what)
    known = {k for c in cells for k in c.axes}
    for key in rule:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"axes: {', '.join(sorted(known))}"
            raise UserError(f"{what}: no axis '{key}'; {hint}")
    found = [c for c in cells if all(_matches(c, k, v) for k, v in rule.items())]
    if not found:
        values = {k: sorted({str(c.axes.get(k)) for c in cells}) for k in rule}
        shown = "; ".join(f"{k} has {', '.join(v)}" for k, v in values.items())
        raise NotFoundError(f"{what} {text!r} matches no cell; {shown}")
    return found


def find_cell(cells: list[dict[str, Any]], text: str) -> dict[str, Any]:
    """The one cell row with this id, name, or unique beginning of either.

    Raises NotFoundError if there is none, UserError if there are several.
    """
    if not text.strip():
        raise UserError("the cell's name is empty; expected a name or the beginning of an id")
    exact = [c for c in cells if text in (c["id"], c["name"], *spellings(c["name"], c.get("tag")))]
    found = exact or [c for c in cells if c["id"].startswith(text)]
    if not found:
        near = difflib.get_close_matches(text, [c["name"] for c in cells], n=3)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise NotFoundError(f"no cell '{text}'{hint}")
    if len(found) > 1:
        shown = ", ".join(c["id"] for c in found[:4]) + (" ..." if len(found) > 4 else "")
        raise UserError(f"'{text}' means {len(found)} cells: {shown}; give more of the id")
    return found[0]


def spellings(name: str, tag: str | None) -> tuple[str, ...]:
    """What else an ablation's cell may be called: its tag as it was given, alone or in the name."""
    return (tag, name.removesuffix(safe_name(tag)) + tag) if tag and tag != TUNE else ()


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """What a selector means in one study."""

    cells: list[str]
    """Ids of the cells that it selects, be it for some of their stages."""
    stages: list[str]
    is_whole: bool = False
    """Whether it selects cells with all of their stages."""
    is_asked: bool = False
    """Whether it names the stages themselves: they do not merely come along with their cells."""


def choose(cells: Sequence[Cell], states: Mapping[str, str], word: str) -> Chosen:
    """What a selector means, in the order of the cells.

    A selector is the name, the id or the beginning of the id of cells or stages, or a filter
    `size=d64x4|d32x3,state=failed`: axes choose cells, `stage` (a role such as `wsp` or `probe`)
    and `state` choose among their stages. Raises NotFoundError if it means nothing.
    """
    if not word.strip():
        raise UserError("a selector is empty; expected a cell, a stage or a filter")
    found = _by_name(cells, word)  # names may have a = in them, as d16x2-1k-lr=0.001 has
    if not found.stages and "=" in word:
        found = _by_filter(cells, states, word)
    if not found.stages:
        near = difflib.get_close_matches(word, [c.name for c in cells], n=2)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise NotFoundError(f"{word!r} means no stage of the study{hint}")
    return found


def _by_name(cells: Sequence[Cell], word: str) -> Chosen:
    exact = [c for c in cells if word in (c.id, c.name, *spellings(c.name, c.tag))]
    if chosen := exact or [c for c in cells if c.id.startswith(word)]:
        stages = dict.fromkeys(s for c in chosen for s in c.stages.values())
        return Chosen(cells=[c.id for c in chosen], stages=list(stages), is_whole=True)
    stages = dict.fromkeys(s for c in cells for s in c.stages.values() if s.startswith(word))
    return Chosen(cells=[], stages=list(stages), is_asked=True)


def _by_filter(cells: Sequence[Cell], states: Mapping[str, str], word: str) -> Chosen:
    rule = parse_filter(word, "selector")
    roles, wanted = rule.pop("stage", None), rule.pop("state", None)
    axes = ",".join(f"{k}={'|'.join(v)}" for k, v in rule.items())
    for state in wanted or ():
        if state not in STATES:
            near = difflib.get_close_matches(state, STATES, n=1)
            hint = f"did you mean '{near[0]}'? " if near else ""
            raise UserError(f"{word!r}: no state '{state}'; {hint}states: {', '.join(STATES)}")
    chosen = select(list(cells), axes or None, "selector")
    known = {r for c in cells for r in c.stages}
    for role in roles or ():
        if role not in known:
            raise UserError(f"{word!r}: no stage '{role}'; stages: {', '.join(sorted(known))}")
    stages = dict.fromkeys(
        stage
        for cell in chosen
        for role, stage in cell.stages.items()
        if (roles is None or role in roles) and (wanted is None or states[stage] in wanted)
    )
    return Chosen(
        cells=[c.id for c in chosen],
        stages=list(stages),
        is_whole=roles is None and wanted is None,
        is_asked=roles is not None,
    )


def _matches(cell: Cell, key: str, wanted: list[str]) -> bool:
    if key == "data" and "full" in wanted and cell.is_full:
        return True
    return any(same(cell.axes.get(key), value) for value in wanted)
