"""Two real ranks, one of which stands still: the stage ends and says which one it was."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from harness import watchdog
from harness.ledger import attempts, store
from harness.ledger.files import read_json
from harness.ledger.tree import Tree
from harness.study.cells import build_grid
from harness.study.schema import load_study
from tests.chaos.tiny_study import STUDY, environment, kill_all, start

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
        # Past its set-up, which may take ten minutes.
        while (
            not (found := list(root.glob("stages/wsp/*/attempts/1/rank1.json")))
            or not (json.loads(found[0].read_text())["step"])
        ):
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


@pytest.mark.long
def test_a_rank_that_waits_for_its_data_is_named_with_its_step(tmp_path: Path) -> None:
    file, tree = tmp_path / "tiny.yaml", Tree(tmp_path / "runs")
    file.write_text(HANGING)
    (stage,) = build_grid(load_study(file)).stages.values()
    folder = store.write_stage(tree, stage)
    attempts.begin(folder, folder.new_attempt(), {})
    command = [sys.executable, "-m", "tests.chaos.sleepy_worker", "--root", str(tree.root)]
    command += ["--kind", stage.kind, "--stage", stage.id, "--attempt", "1"]
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    about = {"WORLD_SIZE": "2", "LOCAL_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = [
        subprocess.Popen(
            command, env=environment(tree.root, RANK=str(k), LOCAL_RANK=str(k), **about)
        )
        for k in range(2)
    ]
    try:
        assert ranks[0].wait(240) == 1
        assert ranks[1].wait(60) != 0
    finally:
        kill_all(tree.root)
    status = read_json(folder.status) or {}
    assert (status["state"], status["reason"]) == ("failed", "hung")
    said = status["message"]
    assert re.match(r"rank 1 \(host .*\) stands at step 5 in 'data' since \d+ s", said), said
    assert said.endswith("rank 0 waits for it")
