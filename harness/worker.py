"""The process that runs one stage: takes the lease, opens the record, trains, writes the result.

Started once per rank, as `python -m harness.worker` by a scheduler or forked by the local pool.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import resource
import sys
import time
from functools import partial
from pathlib import Path

import torch

from harness import record
from harness.errors import (
    EXIT_BUSY,
    EXIT_FAILED,
    EXIT_OK,
    EXIT_STORAGE,
    LeaseLostError,
    StorageError,
    UpstreamGoneError,
    storage_error,
)
from harness.exits import guarded
from harness.ledger import attempts, store
from harness.ledger.context import StageContext, Whereabouts
from harness.ledger.files import read_json
from harness.ledger.lease import AttemptGuard, Lease, LeaseHeldError
from harness.ledger.tree import StageFolder, Tree
from harness.rank_zero import RankZero
from harness.stage_run import (
    call,
    say,
    tell,
    upstream_folders,
    upstream_uids,
    upstream_weights,
    write_environment,
)
from harness.stop import Stop
from harness.study.stages import Execution, StageFile
from harness.watchdog import limit_s

_POLL_S = 0.1


def run_stage(root: Path, kind: str, stage_id: str, attempt: int) -> int:
    """Runs one rank of one stage; returns the exit code."""
    tree = Tree(root)
    folder = tree.stage(kind, stage_id)
    try:
        return _run_stage(tree, folder, attempt)
    except OSError as error:
        known = storage_error(error, folder.path)
        if known is None:
            raise
        say(known)
        return EXIT_STORAGE
    except StorageError as error:  # even its end could not be written down
        say(error)
        return EXIT_STORAGE


def _run_stage(tree: Tree, folder: StageFolder, attempt: int) -> int:
    rank, ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    stop = Stop(folder)
    stage = _fitting(store.read_stage(folder), folder)
    torch.set_num_threads(stage.execution.threads)
    _limit_memory(stage.execution)
    if rank != 0:
        run = partial(_run_rank, tree, folder, stage, attempt, rank, ranks, stop)
        return guarded(run, folder, attempt, stop)
    try:
        lease = Lease.acquire(folder.lease)
    except LeaseHeldError as error:
        print(error, file=sys.stderr)
        return EXIT_BUSY
    try:
        if (code := _too_late(tree, folder, stage, attempt)) is not None:
            return code
        lease.start_beating(each=stop.look)
        job = RankZero(tree, folder, stage, attempt, ranks, lease, stop)
        return guarded(job.run, folder, attempt, stop, job)
    finally:
        with contextlib.suppress(OSError):  # read-only by now: the lease dies with its process
            lease.release()


def _fitting(stage: StageFile, folder: StageFolder) -> StageFile:
    """The stage with the micro-batch that an earlier attempt left the memory for, if it did."""
    execution, found = stage.execution, read_json(folder.memory)
    asked = {"ranks": execution.ranks, "micro_batch": execution.micro_batch}
    if found is None or found["asked"] != asked:
        return stage
    execution = execution.model_copy(update={"micro_batch": found["micro_batch"]})
    return stage.model_copy(update={"execution": execution})


def _limit_memory(execution: Execution) -> None:
    """On a CPU, `memory_gib` bounds the data of all ranks: it ends the stage, not the machine."""
    if execution.memory_gib is not None and execution.device == "cpu":
        limit = int(execution.memory_gib * 2**30 / execution.ranks)
        resource.setrlimit(
            resource.RLIMIT_DATA, (limit, resource.getrlimit(resource.RLIMIT_DATA)[1])
        )


def _too_late(tree: Tree, folder: StageFolder, stage: StageFile, attempt: int) -> int | None:
    """The exit code of an attempt with nothing to do; None if there is something.

    A stage that another attempt finished, or has been given to, is not this one's to report on.
    """
    try:
        AttemptGuard(folder, attempt).guard()
    except LeaseLostError as error:
        say(error)
        return EXIT_BUSY
    result = read_json(folder.result)
    try:
        if result is None or result["upstream_uids"] != upstream_uids(tree, stage):
            return None
    except UpstreamGoneError:
        return None
    say(f"{stage.id} is done, by attempt {result['attempts']}")
    return EXIT_OK if result["attempts"] == attempt else EXIT_BUSY


def _run_rank(
    tree: Tree,
    folder: StageFolder,
    stage: StageFile,
    attempt: int,
    rank: int,
    ranks: int,
    stop: Stop,
) -> int:
    stop.check_at_start()
    guard = AttemptGuard(folder, attempt).guard
    whereabouts = Whereabouts()
    guard()  # before it waits for the others, of whom rank 0 has nothing to do if this raises
    if os.environ.get("LOCAL_RANK") == "0":  # of the host's ranks the first
        write_environment(folder.attempt(attempt) / f"env.rank{rank}.json", guard)
    context = StageContext(
        rank=rank,
        ranks=ranks,
        folder=folder.path,
        root=tree.root,
        upstream_weights=upstream_weights(tree, stage),
        upstream=upstream_folders(tree, stage),
        metrics=record.NoRows(),
        report=lambda **_: whereabouts.move(),
        should_stop=lambda: stop.asked,
        check_lease=guard,
        whereabouts=whereabouts,
    )
    path = folder.attempt(attempt) / f"error.rank{rank}.json"
    patience_s = limit_s("setup", stage.execution.hang_after_s)
    deadline = time.monotonic() + patience_s
    while not attempts.has_begun(folder, attempt):
        # Until rank 0 owns the stage, what an earlier run has left may not be set aside yet.
        guard()
        stop.check_at_start()
        if time.monotonic() > deadline:
            message = f"rank {rank}: waited {patience_s:.0f} s for rank 0 to begin"
            say(message)
            tell(path, "failed", "hung", message)
            return EXIT_FAILED
        time.sleep(_POLL_S)
    call(stage, context, attempt, lambda message: tell(path, "failed", "hung", message))
    return EXIT_OK


def main(arguments: list[str] | None = None) -> int:
    """Entry point: `python -m harness.worker --root R --kind K --stage ID --attempt N`."""
    parser = argparse.ArgumentParser(prog="harness.worker")
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--kind", required=True)
    parser.add_argument("--stage", required=True)
    parser.add_argument("--attempt", type=int, required=True)
    given = parser.parse_args(arguments)
    return run_stage(given.root, given.kind, given.stage, given.attempt)


if __name__ == "__main__":
    sys.exit(main())
