"""A worker that was stopped, lost its lease and goes on: it must not write another byte."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from harness.ledger import store
from harness.ledger.claim import ask_to_stop
from harness.ledger.files import read_json, read_jsonl
from harness.ledger.tree import StageFolder, Tree
from harness.study.cells import build_grid
from harness.study.schema import load_study

pytestmark = pytest.mark.slow

STUDY = """\
name: tiny
axes: {init: [random]}
defaults: {data: 500, size: d16x2, dataset: scenes-2k, image_size: 24}
stages:
  wsp: {duration: {steps: 400}, batch: 60}
resources: {checkpoint_every: 0.2}
"""
EXIT_BUSY = 76


@pytest.fixture
def stage(tmp_path: Path) -> StageFolder:
    """A stage that nobody has run yet."""
    file = tmp_path / "tiny.yaml"
    file.write_text(STUDY)
    (planned,) = build_grid(load_study(file)).stages.values()
    return store.write_stage(Tree(tmp_path / "runs"), planned)


def worker(folder: StageFolder, attempt: int, **env: str) -> subprocess.Popen[bytes]:
    """A worker process of the stage, as a scheduler starts it."""
    folder.attempt(attempt).mkdir(parents=True)
    root = folder.path.parents[2]
    words = ["--root", root, "--kind", folder.path.parent.name, "--stage", folder.path.name]
    given = {"HARNESS_ATTEMPT": str(attempt), "HARNESS_LEASE_EXPIRY_S": "3", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "harness.worker", *map(str, words), "--attempt", str(attempt)],
        env=os.environ | {"DS_ACCELERATOR": "cpu"} | given | env,
        stderr=open(folder.attempt(attempt) / "stderr.log", "wb"),
    )


def wait_for_checkpoint(folder: StageFolder) -> None:
    deadline = time.monotonic() + 120
    while not any(folder.checkpoints.glob("*/COMPLETE")):
        assert time.monotonic() < deadline, "no checkpoint"
        time.sleep(0.02)


def contents(folder: Path) -> dict[str, str]:
    """Every file below, by a hash of what is in it."""
    files = (p for p in folder.rglob("*") if p.is_file())
    return {str(p): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def test_a_worker_that_lost_its_lease_while_stopped_writes_nothing_more(
    stage: StageFolder,
) -> None:
    old = worker(stage, 1, HARNESS_HOST="old")
    wait_for_checkpoint(stage)
    old.send_signal(signal.SIGSTOP)
    try:
        # Nobody on another host can ask for the process: only the silent heartbeat tells.
        new = worker(stage, 2, HARNESS_HOST="new")
        assert new.wait(timeout=300) == 0
        result = read_json(stage.result)
        assert result is not None and result["attempts"] == 2
        before = contents(stage.path)
    finally:
        old.send_signal(signal.SIGCONT)
    assert old.wait(timeout=60) == EXIT_BUSY
    log = str(stage.attempt(1) / "stderr.log")
    after = contents(stage.path)
    assert b"lost the lease" in Path(log).read_bytes()
    assert {k: v for k, v in after.items() if k != log} == {
        k: v for k, v in before.items() if k != log
    }
    steps = [r["step"] for r in read_jsonl(stage.metrics)]
    assert steps == sorted(set(steps))


def test_a_worker_obeys_a_note_to_stop_wherever_it_runs(stage: StageFolder) -> None:
    process = worker(stage, 1)
    wait_for_checkpoint(stage)
    ask_to_stop(stage, "cancelled by a test")
    assert process.wait(timeout=60) != 0
    status = read_json(stage.status) or {}
    assert (status["state"], status["reason"]) == ("cancelled", "cancelled by a test")
    assert not stage.lease.exists()
    attempt = read_json(stage.attempt(1) / "attempt.json") or {}
    assert attempt["end"] == "cancelled"
    assert attempt["first_step"] == 1
    assert attempt["last_step"] > 1
