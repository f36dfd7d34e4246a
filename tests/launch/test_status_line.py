"""What `harness status` says of a stage that runs, from the files that its worker writes."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from harness import attempt
from harness.ledger import attempts, store
from harness.ledger.files import write_json
from harness.ledger.lease import Lease, this_host
from harness.ledger.tree import StageFolder, Tree
from harness.study.cells import Grid
from harness.study.stages import StageFile
from tests.conftest import Harness


class Worker:
    """The first stage of a study, in the hands of this process; only its clock is made up."""

    def __init__(self, tree: Tree, grid: Grid, monkeypatch: pytest.MonkeyPatch) -> None:
        self.stage: StageFile = next(s for s in grid.stages.values() if s.kind == "mae")
        self.folder: StageFolder = store.write_stage(tree, self.stage)
        self.leases: list[Lease] = []
        self.now = 1000.0
        clock = SimpleNamespace(monotonic=lambda: self.now, time=time.time)
        monkeypatch.setattr(attempt, "time", clock)
        monkeypatch.setattr(attempt, "_memory_gib", lambda: 2.5)

    def start(self, **about: Any) -> None:
        """A new attempt, as claims and `RankZero` begin it."""
        number = self.folder.new_attempt()
        attempts.begin(self.folder, number, {})
        claimed = {"schema": 1, "state": "submitted", "attempt": number, **about}
        write_json(self.folder.status, claimed)
        lease = Lease.acquire(self.folder.lease)
        self.leases.append(lease)
        self.status = attempt.Status(self.folder, self.stage, number, lease.guard)
        self.status.write("running")

    def train(self, seconds: float, step: int, **scalars: float | None) -> None:
        """Reports its progress after so many more seconds."""
        self.now += seconds
        batch = 128
        self.status.report(step=step, samples=step * batch, **scalars)

    def stop(self) -> None:
        for lease in self.leases:
            lease.release()
        self.leases.clear()


@pytest.fixture
def worker(tree: Tree, grid: Grid, monkeypatch: pytest.MonkeyPatch) -> Iterator[Worker]:
    store.register(tree, grid, [])
    made = Worker(tree, grid, monkeypatch)
    yield made
    made.stop()


@pytest.fixture
def shown(here: Harness, worker: Worker) -> Callable[[], str]:
    """The line of the stage, the only one that runs."""

    def look() -> str:
        lines = here("status", "small").stdout.splitlines()
        (own,) = [line for line in lines if line.startswith("  running ")]
        return own.rstrip()

    return look


@pytest.fixture
def read(here: Harness, worker: Worker) -> Callable[[], dict[str, Any]]:
    """The stage among those that run, of --json."""

    def look() -> dict[str, Any]:
        (study,) = json.loads(here("status", "small", "--json").stdout)["studies"]
        assert study["active"]
        (own,) = study["running"]
        return own

    return look


Shown = Callable[[], str]
Read = Callable[[], dict[str, Any]]


def test_a_stage_that_has_just_begun_is_only_said_to_run(
    worker: Worker, shown: Shown, read: Read
) -> None:
    worker.start()
    assert shown() == f"  running {worker.stage.id}  0%"
    own = read()
    assert (own["id"], own["state"], own["attempt"]) == (worker.stage.id, "running", 1)
    assert own["steps"] == worker.stage.config.steps
    unknown = ("step", "samples", "samples_per_s", "loss", "memory_gib", "eta_s", "last_failure")
    assert [own[key] for key in unknown] == [None] * len(unknown)


def test_a_running_stage_has_its_progress_rate_time_left_loss_and_memory(
    worker: Worker, shown: Shown, read: Read
) -> None:
    assert worker.stage.config.steps == 16
    worker.start()
    worker.train(0, 2, loss=1.5)
    worker.train(10, 4, loss=1.23456)
    # 2 steps of 128 samples in 10 s since the first report; 12 of 16 steps are left.
    assert shown() == (
        f"  running {worker.stage.id}  25%  25.6 samples/s  1 min 00 s left  loss 1.2346  2.5 GiB"
    )
    own = read()
    assert own["eta_s"] == pytest.approx(60)
    assert {k: own[k] for k in ("step", "samples", "samples_per_s", "loss", "memory_gib")} == {
        "step": 4,
        "samples": 512,
        "samples_per_s": 25.6,
        "loss": 1.23456,
        "memory_gib": 2.5,
    }


def test_a_later_attempt_is_numbered_and_says_what_ended_the_one_before(
    worker: Worker, shown: Shown, read: Read
) -> None:
    worker.start()
    attempts.close(worker.folder, 1, "failed", "hung", "rank 1 stood\x1b[2J still")
    worker.stop()
    worker.start()
    # It goes on from step 8: the rate is that of this attempt alone.
    worker.train(0, 8, loss=0.5)
    worker.train(4, 12, loss=0.25)
    assert shown() == (
        f"  running {worker.stage.id}  75%  128 samples/s  4 s left  loss 0.2500  2.5 GiB"
        r"  attempt 2  (attempt 1 ended: hung: rank 1 stood\x1b[2J still)"
    )
    own = read()
    assert own["attempt"] == 2
    said = {"reason": "hung", "message": "rank 1 stood\x1b[2J still"}
    assert own["last_failure"] == {"attempt": 1, **said}
    attempts.close(worker.folder, 2, "preempted", "preempted", "the node is wanted")
    worker.stop()
    worker.start()
    assert shown().endswith("attempt 3  (attempt 2 ended: preempted: the node is wanted)")


def test_an_attempt_that_had_nothing_to_do_or_went_well_is_no_failure(
    worker: Worker, shown: Shown, read: Read
) -> None:
    worker.start()
    attempts.close(worker.folder, 1, "failed", "data", "shard 3 is short")
    worker.stop()
    worker.start()
    attempts.note_end(worker.folder, 2, "busy", "another process owns the stage")
    worker.stop()
    worker.start()
    assert shown().endswith("attempt 3  (attempt 1 ended: data: shard 3 is short)")
    attempts.note_end(worker.folder, 3, "done", None)
    worker.stop()
    worker.start()  # since the user wanted it from scratch
    assert shown().endswith("attempt 4") and read()["last_failure"] is None


def test_of_a_stage_that_failed_the_line_counts_its_attempts(worker: Worker, here: Harness) -> None:
    worker.start()
    worker.stop()
    worker.start()
    attempts.close(worker.folder, 2, "failed", "code", "KeyError: 'x'")
    worker.stop()
    lines = here("status", "small").stdout.splitlines()
    assert f"  failed {worker.stage.id}  after 2 attempts: code: KeyError: 'x'" in lines


def test_a_loss_that_is_not_finite_is_not_shown_as_a_number(
    worker: Worker, shown: Shown, read: Read
) -> None:
    worker.start()
    worker.train(0, 2, loss=1.5)
    worker.train(10, 4, loss=float("nan"))
    assert "loss" not in shown() and "nan" not in shown()
    assert read()["loss"] is None


def test_of_a_job_the_line_has_its_number_and_node(worker: Worker, shown: Shown) -> None:
    # Slurm is not asked about what another user submitted.
    worker.start(cluster="slurm", job="77_3", user="somebody else")
    host = this_host().partition(":")[0]
    assert shown() == f"  running {worker.stage.id}  0%  job 77_3  on {host}"


def test_a_stage_whose_process_is_gone_does_not_run(worker: Worker, here: Harness) -> None:
    """With the same status.json as before: the lease tells."""
    worker.start()
    worker.train(0, 2, loss=1.5)
    worker.stop()
    lines = here("status", "small").stdout.splitlines()
    (own,) = [line for line in lines if line.startswith(f"  lost {worker.stage.id} ")]
    assert own.endswith("its process is gone without a word")
    (study,) = json.loads(here("status", "small", "--json").stdout)["studies"]
    assert (study["running"], study["active"]) == ([], False)


def test_of_a_worker_that_was_stopped_the_line_says_for_how_long_it_gave_no_sign(
    worker: Worker, shown: Shown, read: Read, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its process is there, so nobody takes the stage over: whoever stopped it is to be found."""
    worker.start()
    assert read()["stands_still_s"] is None
    at = time.time() - 600
    os.utime(worker.folder.lease, (at, at))
    assert shown().endswith(
        f"  (no sign of process {os.getpid()} for 10 min 00 s: stopped, or its disk hangs)"
    )
    assert read()["stands_still_s"] == pytest.approx(600, abs=60)
    # Of another host nothing is concluded: its clock, or the file server's, may be ten minutes off.
    with monkeypatch.context() as patch:
        patch.setenv("HARNESS_HOST", "elsewhere")
        assert read()["stands_still_s"] is None
