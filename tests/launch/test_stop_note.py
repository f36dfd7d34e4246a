"""A worker that somebody wants to end, from anywhere."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from harness.errors import EXIT_REQUEUE
from harness.ledger import attempts, store
from harness.ledger.claim import ask_to_stop
from harness.ledger.files import read_json
from harness.ledger.tree import StageFolder, Tree
from harness.stop import Stop
from harness.study.cells import build_grid
from harness.study.schema import load_study

pytestmark = pytest.mark.long

STUDY = """\
name: tiny
axes: {init: [random]}
defaults: {data: 500, size: d16x2, dataset: scenes-2k, image_size: 24}
stages:
  wsp: {duration: {steps: 400}, batch: 60}
resources: {checkpoint_every: 0.2}
"""


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
    assert attempt["first_step"] == 0
    assert attempt["last_step"] > 1


# USR2 is sent ahead of a time limit, TERM at it; preemption begins with TERM.
ENDS = {signal.SIGUSR2: "timeout", signal.SIGTERM: "preempted"}


@pytest.mark.parametrize("number", ENDS)
def test_a_worker_that_is_told_to_stop_saves_and_says_why(
    stage: StageFolder, number: signal.Signals
) -> None:
    process, end = worker(stage, 1), ENDS[number]
    wait_for_checkpoint(stage)
    process.send_signal(number)
    assert process.wait(timeout=60) == EXIT_REQUEUE
    status = read_json(stage.status) or {}
    assert (status["state"], status["reason"]) == (end, end)
    record = read_json(stage.attempt(1) / "attempt.json") or {}
    assert record["end"] == end
    assert record["last_checkpoint"] == record["last_step"] == attempts.progress_of(stage) > 0


def test_a_job_that_was_told_to_stop_while_it_began_does_not_begin(stage: StageFolder) -> None:
    """Signals are blocked while torch is imported, as `harness.launch.job` does it."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2})  # a new process inherits it
    try:
        process = worker(stage, 1)
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR2})
    process.send_signal(signal.SIGUSR2)
    assert process.wait(timeout=120) == EXIT_REQUEUE
    assert (read_json(stage.status) or {})["state"] == "timeout"
    assert not any(stage.checkpoints.glob("*/COMPLETE"))


@pytest.mark.parametrize("first", ENDS)
def test_of_two_signals_the_first_says_why(
    stage: StageFolder, own_signals: None, first: signal.Signals
) -> None:
    stop = Stop(stage)
    for number in (first, *ENDS):
        os.kill(os.getpid(), number)
    assert stop.asked and stop.end == (ENDS[first], ENDS[first])
