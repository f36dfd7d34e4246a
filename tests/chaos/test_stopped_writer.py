"""A process that is stopped while it writes, and continued when it owns nothing more."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from harness import record
from harness.errors import LeaseLostError
from harness.ledger import attempts, store
from harness.ledger import lease as leases
from harness.ledger.context import StageResult
from harness.ledger.files import jsonl, read_json, write_json
from harness.ledger.lease import Lease
from harness.ledger.tree import StageFolder, Tree
from harness.metric_columns import WORTH_IT
from harness.rank_zero import RankZero
from harness.stop import Stop
from harness.study.cells import build_grid
from harness.study.schema import load_study

pytestmark = pytest.mark.long

WRITER = """
import os, signal, sys
from pathlib import Path
import torch
from safetensors.torch import save_file
from harness.errors import LeaseLostError
from harness.ledger.lease import Lease
from harness.models.weight_files import guarded, write_atomically

folder = Path(sys.argv[1])
lease = Lease.acquire(folder / "lease")

def write(path):
    lease.guard()
    save_file({"w": torch.ones(3)}, path)
    os.kill(os.getpid(), signal.SIGSTOP)

try:
    with guarded(lease.guard):
        write_atomically(folder / "weights.safetensors", write)
except LeaseLostError:
    sys.exit(76)
"""


RANK_ZERO = """
import os, signal, sys
from pathlib import Path
from harness.stop import Stop
from harness.errors import LeaseLostError
from harness.ledger.context import StageResult
from harness.ledger.lease import Lease
from harness.ledger.store import read_stage
from harness.ledger.tree import StageFolder, Tree
from harness.rank_zero import RankZero

folder, file = StageFolder(Path(sys.argv[1])), sys.argv[2]
lease, fsync = Lease.acquire(folder.lease), os.fsync
stage = read_stage(folder)
job = RankZero(Tree(folder.path.parents[2]), folder, stage, 1, 1, lease, Stop(folder))
done = StageResult(metrics={}, steps=1, samples=1, flops=1.0, wall_s={})
lease.guard()

def stopped(descriptor):
    fsync(descriptor)
    if os.readlink(f"/proc/self/fd/{descriptor}").endswith(f".{file}"):
        os.kill(os.getpid(), signal.SIGSTOP)

os.fsync = stopped
try:
    job._start_clean_if_stale({})
    job.status.write("running")
    job._write_result(done, {})
    job.finish("done")
except LeaseLostError:
    sys.exit(76)
lease.release()
"""


def stop_and_go_on(writer: subprocess.Popen[bytes], lease: Path, is_taken: bool) -> None:
    """Waits until the writer has stopped itself; meanwhile another process owns the stage."""
    try:
        _, status = os.waitpid(writer.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status)
        if is_taken:
            write_json(lease, {**(read_json(lease) or {}), "token": "another"})
        time.sleep(1.2)  # longer than a look at the lease counts
        while writer.poll() is None:  # it stops at every write of that file
            os.kill(writer.pid, signal.SIGCONT)
            time.sleep(0.05)
        assert writer.returncode == (76 if is_taken else 0)
    finally:
        writer.kill()
        writer.wait()


@pytest.mark.parametrize("is_taken", [True, False])
def test_a_writer_continued_after_a_takeover_names_no_file(tmp_path: Path, is_taken: bool) -> None:
    weights = tmp_path / "weights.safetensors"
    weights.write_bytes(b"of the new owner")
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)])
    stop_and_go_on(writer, tmp_path / "lease", is_taken)
    assert (weights.read_bytes() == b"of the new owner") == is_taken
    assert not list(tmp_path.glob(".tmp.*"))


@pytest.fixture
def folder(tmp_path: Path, study_file: Callable[..., Path]) -> StageFolder:
    """Of a stage whose first attempt is about to start."""
    stage = next(iter(build_grid(load_study(study_file())).stages.values()))
    folder = store.write_stage(Tree(tmp_path / "runs"), stage)
    attempts.begin(folder, folder.new_attempt(), {})
    return folder


def content(folder: StageFolder) -> dict[str, bytes]:
    files = (p for p in folder.path.rglob("*") if p.is_file() and p != folder.lease)
    return {str(p.relative_to(folder.path)): p.read_bytes() for p in files}


@pytest.mark.parametrize(
    ("name", "is_taken"), [("status.json", True), ("result.json", True), ("result.json", False)]
)
def test_rank_zero_continued_inside_fsync_replaces_no_file_of_its_successor(
    folder: StageFolder, name: str, is_taken: bool
) -> None:
    writer = subprocess.Popen([sys.executable, "-c", RANK_ZERO, str(folder.path), name])
    stop_and_go_on(writer, folder.lease, is_taken)
    after = content(folder)
    assert (name not in after) == is_taken
    assert not any(".tmp." in name for name in after)
    assert ("events.jsonl" not in after) == is_taken


@pytest.mark.parametrize("name", ["lineage.json", "attempt.json", "env.json", "metrics.arrow"])
def test_whatever_rank_zero_writes_is_its_successors_once_the_lease_is_lost(
    folder: StageFolder, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder.metrics.write_bytes(jsonl({"step": step, "loss": 1.0} for step in range(WORTH_IT)))
    lease, fsync = Lease.acquire(folder.lease), os.fsync
    stop = SimpleNamespace(check_at_start=lambda: None)
    tree = Tree(folder.path.parents[2])
    job = RankZero(tree, folder, store.read_stage(folder), 1, 1, lease, cast(Stop, stop))
    done = StageResult(metrics={}, steps=1, samples=1, flops=1.0, wall_s={})
    monkeypatch.setattr(record, "run_recorded", lambda *_: done)
    at_loss: list[dict[str, bytes]] = []

    def stopped(descriptor: int) -> None:
        fsync(descriptor)
        temporary = os.readlink(f"/proc/self/fd/{descriptor}")
        if temporary.endswith(f".{name}") and not at_loss:
            at_loss.append(content(folder))
            write_json(folder.lease, {**(read_json(folder.lease) or {}), "token": "another"})
            now = leases._clock()
            monkeypatch.setattr(leases, "_clock", lambda: now + 2)

    monkeypatch.setattr(os, "fsync", stopped)
    with pytest.raises(LeaseLostError):
        job.run()
    (before,) = at_loss
    assert content(folder) == {k: v for k, v in before.items() if ".tmp." not in k}
