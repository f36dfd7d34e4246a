"""A study whose number of ranks changes between attempts: the same samples, the same numbers."""

from __future__ import annotations

import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from harness.ledger.files import read_json, read_jsonl
from tests.chaos.tiny_study import STUDY, flaws, kill_all, start, undisturbed, with_its_images

ONLY_WSP = (
    STUDY.partition("  transfer:")[0]
    .replace("[random, mae]", "[random]")
    .replace("batch: 32", "batch: 60")
) + "resources: {checkpoint_every: 0.15, ranks: RANKS}\n"


def curve(root: Path) -> list[dict[str, Any]]:
    (path,) = root.glob("stages/wsp/*/metrics.jsonl")
    return [{k: v for k, v in row.items() if k != "wall_s"} for row in read_jsonl(path)]


def saved(root: Path) -> int:
    steps = [
        p.parent.name.partition("_")[2] for p in root.glob("stages/wsp/*/checkpoints/*/COMPLETE")
    ]
    return max((int(s) for s in steps if s.isdigit()), default=0)


def run_on(root: Path, file: Path, ranks: int, *, until: int | None) -> None:
    """`--submit` with so many ranks, stopped as by Ctrl-C after the checkpoint of a step."""
    file.write_text(ONLY_WSP.replace("RANKS", str(ranks)))
    process: subprocess.Popen[bytes] = start(root, file, HARNESS_CORES="3")
    if until is None:
        assert process.wait(900) == 0, (root.parent / "output.log").read_text()
        return
    while saved(root) <= until:
        assert process.poll() is None, (root.parent / "output.log").read_text()
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    assert process.wait(300) == 130


@pytest.mark.long
def test_two_then_one_then_three_ranks_train_as_one_does(tmp_path: Path) -> None:
    oracle, _ = undisturbed(tmp_path / "oracle", ONLY_WSP.replace("RANKS", "1"))
    root, file = with_its_images(oracle, tmp_path / "other" / "runs"), tmp_path / "tiny.yaml"
    try:
        run_on(root, file, 2, until=0)
        run_on(root, file, 1, until=saved(root))
        run_on(root, file, 3, until=None)
    finally:
        kill_all(root)
    attempts = [read_json(p) or {} for p in root.glob("stages/wsp/*/attempts/*/attempt.json")]
    by_number = sorted(attempts, key=lambda a: a["attempt"])
    assert [(a["ranks"], a["end"]) for a in by_number] == [
        *[(2, "preempted"), (1, "preempted")],
        (3, "done"),
    ]
    # Each goes on where the one before has saved.
    firsts = [a["first_step"] for a in by_number]
    assert firsts[0] == 0 and 0 < firsts[1] < firsts[2]
    assert flaws(root) == []
    for row, same in zip(curve(root), curve(oracle), strict=True):
        assert row == pytest.approx(same, rel=2e-4, abs=1e-5)
