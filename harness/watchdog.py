"""Notices that a stage stands still, and says which rank the others wait for.

Every rank keeps where it is in memory; a thread of its own writes that to
attempts/<n>/rank<k>.json. A stage hangs when none of its ranks gets on: one that waits for the
others may wait as long as one of them does. Nobody compares clocks of two hosts: a file is stale
if it has not changed while we looked, and how long a rank stands is its own word.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from harness.errors import EXIT_FAILED, LeaseLostError, UserError
from harness.ledger.context import Whereabouts
from harness.ledger.files import read_json, write_json
from harness.ledger.lease import this_host

PHASES = ("setup", "data", "compute", "reduce", "evaluate", "checkpoint")
"""Parts of a step, in their order."""

_WRITE_EVERY_S = 5.0
_LOOKS = 3
_SETUP_S = 600.0
"""Set-up (reading indexes, making data, compiling) has no steps that could be looked at."""


class Watchdog:
    """Ends this process with `on_hung(message)` once the stage has stood for `hang_after_s`."""

    def __init__(
        self,
        folder: Path,
        rank: int,
        ranks: int,
        whereabouts: Whereabouts,
        hang_after_s: float,
        on_hung: Callable[[str], None],
        guard: Callable[[], None],
    ) -> None:
        """`folder` is the attempt's; `guard` raises where this process must write nothing more."""
        self.guard = guard
        self.folder, self.rank, self.ranks = folder, rank, ranks
        self.whereabouts, self.hang_after_s, self.on_hung = whereabouts, hang_after_s, on_hung
        self.every_s = min(_WRITE_EVERY_S, hang_after_s / 4)
        self._since = time.monotonic()
        self._last: tuple[Any, ...] | None = None
        self._beat = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    def start(self) -> None:
        """Begins to watch, in a thread."""
        self._thread.start()

    def stop(self) -> None:
        """Watches no more: the stage's code is through."""
        self._stop.set()
        self._thread.join()
        if self._beat:
            # The others, if they are not, must not take the silence for a dead rank.
            with contextlib.suppress(LeaseLostError, UserError, OSError):
                self._write((0, "setup"), 0.0, over=True)

    def _run(self) -> None:
        while not self._stop.wait(self.every_s):
            try:
                if self._stands() and (message := self._look()) is not None:
                    self._bark(message)
            except LeaseLostError:
                return  # the main thread finds it out as well
            except (UserError, OSError) as error:
                print(f"watchdog: {error}", file=sys.stderr)  # a full disk is for others to report

    def _stands(self) -> bool:
        now = self.whereabouts.at
        sign = (now, self.whereabouts.moves, self._saved(now))
        if sign != self._last:
            self._last, self._since = sign, time.monotonic()
        self._beat += 1
        if now is None:
            self._write((0, "setup"), 0.0)
            return False
        stands_s = time.monotonic() - self._since
        self._write(now, stands_s)
        return stands_s > limit_s(now[1], self.hang_after_s)

    def _write(self, at: tuple[int, str], stands_s: float, *, over: bool = False) -> None:
        self.guard()
        write_json(
            self.folder / f"rank{self.rank}.json",
            {
                **{"schema": 1, "rank": self.rank, "host": this_host(), "pid": os.getpid()},
                **{"step": at[0], "phase": at[1], "stands_s": stands_s, "beat": self._beat},
                "over": over,
            },
            self.guard,
        )

    def _saved(self, now: tuple[int, str] | None) -> int:
        """Bytes of the checkpoint that is being written: nothing else tells that it gets on."""
        if now is None or now[1] != "checkpoint":
            return 0
        found = 0
        for path in self.folder.parents[1].glob("checkpoints/*.partial*/**/*"):
            with contextlib.suppress(OSError):  # it has its name by now
                found += path.stat().st_size
        return found

    def _look(self) -> str | None:
        """Who holds the stage up, after a few looks; None if it has moved meanwhile."""
        first = self._rows()
        for _ in range(_LOOKS):
            if self._stop.wait(self.every_s) or not self._stands():
                return None
        last = self._rows()
        if somebody_moves(first, last, self.hang_after_s):
            return None
        return verdict(first, last, self.ranks, self.every_s * _LOOKS)

    def _rows(self) -> dict[int, dict[str, Any]]:
        rows = {k: read_json(self.folder / f"rank{k}.json") for k in range(self.ranks)}
        return {k: row for k, row in rows.items() if row is not None}

    def _bark(self, message: str) -> None:
        print(f"hung: {message}", file=sys.stderr, flush=True)
        faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
        if self.rank != 0:
            # For rank 0 to tell it, if it can: the first process that ends takes the others along.
            self._stop.wait(2 * self.every_s)
        try:
            self.on_hung(message)
        finally:
            os._exit(EXIT_FAILED)  # the main thread stands in a call that nothing else ends


def limit_s(phase: str, hang_after_s: float) -> float:
    """How long a rank may stand in a part before it hangs."""
    return max(hang_after_s, _SETUP_S) if phase == "setup" else hang_after_s


def somebody_moves(
    first: Mapping[int, Mapping[str, Any]],
    last: Mapping[int, Mapping[str, Any]],
    hang_after_s: float,
) -> bool:
    """True if a rank that shows signs of life has not stood for too long: others wait for it."""
    return any(
        k in first
        and first[k]["beat"] != row["beat"]
        and not row.get("over")
        and row["stands_s"] <= limit_s(row["phase"], hang_after_s)
        for k, row in last.items()
    )


def verdict(
    first: Mapping[int, Mapping[str, Any]],
    last: Mapping[int, Mapping[str, Any]],
    ranks: int,
    looked_s: float,
) -> str:
    """The rank without a sign of life between two looks, or else the one that is furthest behind.

    Rows of attempts/<n>/rank<k>.json by rank; `looked_s` is the time between the looks.
    """
    missing = [k for k in range(ranks) if k not in last]
    last = {k: row for k, row in last.items() if not row.get("over")}
    if missing:
        return f"rank {missing[0]} has never begun; {_others(missing[0], ranks)}"
    silent = [k for k in last if k in first and first[k]["beat"] == last[k]["beat"]]
    places = {k: (row["step"], PHASES.index(row["phase"])) for k, row in last.items()}
    behind = min(silent or places, key=lambda k: places[k])
    row = last[behind]
    host = str(row["host"]).partition(":")[0]
    where = f"rank {behind} (host {host}) stands at step {row['step']} in '{row['phase']}'"
    if silent:
        return f"{where} without a sign of life for {looked_s:.0f} s; {_others(behind, ranks)}"
    if ranks > 1 and len(places) == ranks and len(set(places.values())) == 1:
        return f"all {ranks} ranks stand at step {row['step']} in '{row['phase']}'"
    return f"{where} since {row['stands_s']:.0f} s; {_others(behind, ranks)}"


def _others(rank: int, ranks: int) -> str:
    others = [str(k) for k in range(ranks) if k != rank]
    if not others:
        return "it is the only rank"
    many = len(others) > 1
    return f"rank{'s' if many else ''} {', '.join(others)} {'wait' if many else 'waits'} for it"
