"""What counts as standing still: ranks in threads of one process, whose end is only noted."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from harness import watchdog
from harness.ledger.context import Whereabouts
from harness.ledger.files import read_json
from harness.watchdog import Watchdog

pytestmark = pytest.mark.long

HANG_AFTER_S = 2.0


class Ranks:
    """Two ranks under watch; `said` is what either of them barked."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.said = folder / "stage/attempts/1", []
        self.at = [Whereabouts(), Whereabouts()]
        self.dogs = [
            Watchdog(self.folder, k, 2, at, HANG_AFTER_S, self.said.append, lambda: None)
            for k, at in enumerate(self.at)
        ]
        self._over = threading.Event()
        self._threads: list[threading.Thread] = []

    def start(self) -> None:
        for dog in self.dogs:
            dog.start()

    def each(self, act: Callable[[], Any]) -> threading.Event:
        """Does it again and again, until the event that comes back is set."""
        stop = threading.Event()

        def run() -> None:
            while not stop.wait(0.02) and not self._over.is_set():
                act()

        self._threads.append(threading.Thread(target=run))
        self._threads[-1].start()
        return stop

    def wait_until_stood(self, rank: int, seconds: float) -> None:
        """Until the rank says that it has stood for so long, or somebody barks."""
        while not self.said:
            row = read_json(self.folder / f"rank{rank}.json")
            if row is not None and row["stands_s"] > seconds:
                return
            time.sleep(0.05)

    def close(self) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()
        for dog in self.dogs:
            dog.stop()


@pytest.fixture
def ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Ranks]:
    monkeypatch.setattr(os, "_exit", lambda code: None)
    monkeypatch.setattr(watchdog.faulthandler, "dump_traceback", lambda **_: None)
    found = Ranks(tmp_path)
    yield found
    found.close()


def test_a_rank_may_wait_as_long_as_another_gets_on(ranks: Ranks) -> None:
    """As where ranks share out files, and one has more to do."""
    ranks.at[0].at, ranks.at[1].at = (0, "reduce"), (0, "compute")
    stop = ranks.each(ranks.at[1].move)
    ranks.start()
    ranks.wait_until_stood(0, 3 * HANG_AFTER_S)
    assert ranks.said == []
    stop.set()
    ranks.wait_until_stood(1, 1e9)
    assert "rank 1 (host " in ranks.said[0] and "'compute'" in ranks.said[0]


def test_a_checkpoint_that_grows_gets_on_and_one_that_does_not_hangs(ranks: Ranks) -> None:
    file = ranks.folder.parents[1] / "checkpoints/step_3.partial-00ff00/deepspeed/state.pt"
    file.parent.mkdir(parents=True)
    ranks.at[0].at = ranks.at[1].at = (3, "checkpoint")

    def grow() -> None:
        with file.open("ab") as out:
            out.write(b"x")

    stop = ranks.each(grow)
    ranks.start()
    began = time.monotonic()
    while time.monotonic() - began < 3 * HANG_AFTER_S and not ranks.said:
        time.sleep(0.1)
    assert ranks.said == []
    stop.set()
    ranks.wait_until_stood(1, 1e9)
    assert ranks.said[0] == "all 2 ranks stand at step 3 in 'checkpoint'"


def test_a_rank_that_is_through_is_not_taken_for_a_dead_one(ranks: Ranks) -> None:
    ranks.at[0].at = ranks.at[1].at = (7, "evaluate")
    ranks.start()
    ranks.wait_until_stood(1, 0.1)
    ranks.dogs[1].stop()
    ranks.wait_until_stood(0, 1e9)
    assert ranks.said[0].startswith("rank 0 (host ")


def test_set_up_has_ten_minutes_and_then_is_judged_too() -> None:
    def row(stands_s: float, beat: int) -> dict[str, Any]:
        return {"phase": "setup", "stands_s": stands_s, "beat": beat, "over": False}

    assert watchdog.somebody_moves({0: row(90, 1)}, {0: row(95, 2)}, 4)
    assert not watchdog.somebody_moves({0: row(695, 1)}, {0: row(700, 2)}, 4)
    assert watchdog.limit_s("setup", 1800) == watchdog.limit_s("compute", 1800) == 1800
