"""Two real ranks, one of which stands still: the stage ends and says which one it was."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest

from harness import watchdog
from harness.ledger.files import read_json
from tests.chaos.tiny_study import STUDY, kill_all, start

HANGING = STUDY.partition("  transfer:")[0].replace("[random, mae]", "[random]").replace(
    "300", "100000"
) + ("resources: {ranks: 2, hang_after: 4, checkpoint_every: 1}\nretry: {hung: 0}\n")


def row(step: int, phase: str, beat: int, stands_s: float = 95.0) -> dict[str, object]:
    return {"host": "gpu-7:1", "step": step, "phase": phase, "beat": beat, "stands_s": stands_s}


def test_the_silent_rank_is_named_before_the_one_that_is_behind() -> None:
    first = {0: row(41, "data", 1), 1: row(41, "compute", 1), 2: row(40, "data", 1)}
    last = {0: row(41, "data", 2), 1: row(41, "compute", 1), 2: row(40, "data", 2)}
    said = watchdog.verdict(first, last, 3, 15)
    assert said == (
        "rank 1 (host gpu-7) stands at step 41 in 'compute' without a sign of life for 15 s;"
        " ranks 0, 2 wait for it"
    )


def test_of_living_ranks_the_one_furthest_behind_is_named() -> None:
    first = {k: row(41, "data" if k == 1 else "compute", 1) for k in range(4)}
    last = {k: {**v, "beat": 2} for k, v in first.items()}
    said = watchdog.verdict(first, last, 4, 15)
    assert said == (
        "rank 1 (host gpu-7) stands at step 41 in 'data' since 95 s; ranks 0, 2, 3 wait for it"
    )


@pytest.mark.long
def test_a_stopped_rank_is_named_by_the_other_and_the_cause_is_hung(tmp_path: Path) -> None:
    file, root = tmp_path / "tiny.yaml", tmp_path / "runs"
    file.write_text(HANGING)
    process = start(root, file)
    try:
        deadline = time.monotonic() + 200
        while not (found := list(root.glob("stages/wsp/*/attempts/1/rank1.json"))):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        os.kill(json.loads(found[0].read_text())["pid"], signal.SIGSTOP)
        assert process.wait(120) == 1
    finally:
        kill_all(root)
    attempt = found[0].parent
    status = read_json(attempt.parent.parent / "status.json") or {}
    assert (status["state"], status["reason"]) == ("failed", "hung")
    assert "rank 1 (host " in status["message"] and "rank 0 waits for it" in status["message"]
    assert (read_json(attempt / "attempt.json") or {})["end"] == "hung"
    assert "most recent call first" in (attempt / "stderr.log").read_text()
