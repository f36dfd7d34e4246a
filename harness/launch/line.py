"""Who is first in line for room: small stages pass a large one, but not for ever."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

from harness.launch.placing import Need, Slot, Slots

PATIENCE_S = 60.0
_ROUNDS = 100


@dataclass
class _First:
    stage_id: str
    need: Need
    since: float
    kept: set[Slot] = field(default_factory=set)
    missed: int = 0


class Line:
    """The stage that was refused first. After a minute, slots that come free are kept for it.

    Without it, a stage that needs four GPUs could wait as long as there are stages that need one.
    One stage at a time is first in line, until it starts: whatever runs on its slots ends some
    time, so it waits for one generation of stages at most.
    """

    def __init__(self) -> None:
        self._first: _First | None = None
        self._asked: set[str] = set()

    def barred(self, stage_id: str) -> Collection[Slot]:
        """Slots that this stage may not have."""
        first = self._first
        return () if first is None or first.stage_id == stage_id else first.kept

    def ask(self, stage_id: str) -> None:
        """Notes that somebody wants to run the stage."""
        self._asked.add(stage_id)

    def refuse(self, stage_id: str, need: Need, now: float) -> None:
        """There is no room for the stage: it is first in line, if nobody is."""
        if self._first is None:
            self._first = _First(stage_id=stage_id, need=need, since=now)

    def leave(self, stage_id: str) -> None:
        """The stage has started."""
        if self._first is not None and self._first.stage_id == stage_id:
            self._first = None

    def forget_slots(self) -> None:
        """The hosts have changed: other slots may be the right ones."""
        if self._first is not None:
            self._first.kept = set()

    def end_round(
        self, slots: Slots, up: Collection[str], standing: Collection[str], now: float
    ) -> None:
        """After stages were asked for, in order of importance: keeps slots for the first."""
        first, asked = self._first, self._asked
        self._asked = set()
        if first is None or not asked:
            return
        # A round may end before the stage's turn comes, when nothing is free. If it goes on, the
        # stage is not wanted any more: done elsewhere, or cancelled.
        first.missed = 0 if first.stage_id in asked else first.missed + 1
        if first.missed > _ROUNDS:
            self._first = None
        elif now - first.since > PATIENCE_S and not first.kept:
            first.kept = slots.reserve(first.need, up, standing)
