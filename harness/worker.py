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
import traceback
import uuid
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from harness import __version__, record, transfer
from harness.attempt import Status, Stop, is_finite, versions
from harness.errors import (
    EXIT_FAILED,
    EXIT_OK,
    EXIT_REQUEUE,
    EXIT_STORAGE,
    DataError,
    DivergedError,
    HarnessError,
    LeaseLostError,
    OutOfMemoryError,
    PreemptedError,
    StorageError,
    UserError,
    storage_error,
)
from harness.ledger import attempts, store
from harness.ledger.context import StageContext, StageResult, Whereabouts
from harness.ledger.environment import environment
from harness.ledger.files import read_json, write_json
from harness.ledger.lease import AttemptGuard, Lease, LeaseHeldError, this_host
from harness.ledger.tree import StageFolder, Tree
from harness.models.weight_files import guarded
from harness.study.stages import Execution, StageFile
from harness.study.starting import content_hash
from harness.train import loop
from harness.watchdog import Watchdog

EXIT_BUSY = 76
"""Another process owns the stage; nothing was done."""
EXIT_LOST_RANK = 77
"""Another rank is gone; what ended that one says why."""

_PATIENCE_S = 10.0
_TENSORBOARD = "HARNESS_TENSORBOARD"
_SLURM = ("SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID", "SLURM_RESTART_COUNT")


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
        _say(known)
        return EXIT_STORAGE
    except StorageError as error:  # even its end could not be written down
        _say(error)
        return EXIT_STORAGE


def _say(what: object) -> None:
    """Prints to the attempt's log, which may lie on the very disk that is full."""
    with contextlib.suppress(OSError):
        print(what, file=sys.stderr, flush=True)


def _run_stage(tree: Tree, folder: StageFolder, attempt: int) -> int:
    rank, ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    stop = Stop(folder)
    stage = _fitting(store.read_stage(folder), folder)
    torch.set_num_threads(stage.execution.threads)
    _limit_memory(stage.execution)
    if rank != 0:
        run = partial(_run_rank, tree, folder, stage, attempt, rank, ranks, stop)
        return _guarded(run, folder, attempt, stop)
    try:
        lease = Lease.acquire(folder.lease)
    except LeaseHeldError as error:
        print(error, file=sys.stderr)
        return EXIT_BUSY
    try:
        if (code := _too_late(tree, folder, stage, attempt)) is not None:
            return code
        lease.start_beating(each=stop.look)
        job = _RankZero(tree, folder, stage, attempt, ranks, lease, stop)
        return _guarded(job.run, folder, attempt, stop, job)
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


def _upstream_uids(tree: Tree, stage: StageFile) -> dict[str, str]:
    uids = {}
    for upstream in stage.config.upstream.values():
        kind = stage.upstream_kinds[upstream]
        result = read_json(tree.stage(kind, upstream).result)
        if result is None:
            raise UserError(f"{stage.id}: upstream stage {upstream} has no result; submit again")
        uids[upstream] = result["uid"]
    return uids


def _too_late(tree: Tree, folder: StageFolder, stage: StageFile, attempt: int) -> int | None:
    """The exit code of an attempt with nothing to do; None if there is something.

    A stage that another attempt finished, or has been given to, is not this one's to report on.
    """
    try:
        AttemptGuard(folder, attempt).guard()
    except LeaseLostError as error:
        _say(error)
        return EXIT_BUSY
    result = read_json(folder.result)
    if result is None or result["upstream_uids"] != _upstream_uids(tree, stage):
        return None
    _say(f"{stage.id} is done, by attempt {result['attempts']}")
    return EXIT_OK if result["attempts"] == attempt else EXIT_BUSY


def _upstream_weights(tree: Tree, stage: StageFile) -> Path | None:
    encoder = stage.config.upstream.get("encoder")
    if encoder:
        return tree.stage(stage.upstream_kinds[encoder], encoder).weights
    if not stage.config.weights:
        return None
    path = Path(stage.execution.weights_path)
    if content_hash(path) != stage.config.weights:
        raise UserError(
            f"{path}: the weights have changed since the study was planned; submit again"
        )
    return path


def _upstream_folders(tree: Tree, stage: StageFile) -> dict[str, Path]:
    kinds = stage.upstream_kinds
    return {role: tree.stage(kinds[s], s).path for role, s in stage.config.upstream.items()}


def _call(
    stage: StageFile, context: StageContext, attempt: int, on_hung: Callable[[str], None]
) -> StageResult:
    run = loop.train if stage.kind in ("mae", "wsp") else transfer.run
    watchdog = Watchdog(
        StageFolder(context.folder).attempt(attempt),
        context.rank,
        context.ranks,
        context.whereabouts,
        stage.execution.hang_after_s,
        on_hung,
        context.check_lease,
    )
    context.whereabouts.at = (0, "setup")
    watchdog.start()
    try:
        with guarded(context.check_lease):
            return run(stage, context)
    finally:
        watchdog.stop()


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
        _write_environment(folder.attempt(attempt) / f"env.rank{rank}.json")
    context = StageContext(
        rank=rank,
        ranks=ranks,
        folder=folder.path,
        root=tree.root,
        upstream_weights=_upstream_weights(tree, stage),
        upstream=_upstream_folders(tree, stage),
        metrics=record.NoRows(),
        report=lambda **_: whereabouts.move(),
        should_stop=lambda: stop.asked,
        check_lease=guard,
        whereabouts=whereabouts,
    )
    path = folder.attempt(attempt) / f"error.rank{rank}.json"
    _call(stage, context, attempt, lambda message: _tell(path, "failed", "hung", message))
    return EXIT_OK


def _write_environment(path: Path) -> None:
    write_json(path, {**environment("worker"), "versions": versions()})


def _tell(path: Path, state: str, reason: str, message: str) -> None:
    write_json(path, {"schema": 1, "state": state, "reason": reason, "message": message})


class _RankZero:
    """The rank that owns the lease and writes the stage's files."""

    def __init__(
        self,
        tree: Tree,
        folder: StageFolder,
        stage: StageFile,
        attempt: int,
        ranks: int,
        lease: Lease,
        stop: Stop,
    ) -> None:
        self.tree, self.folder, self.stage = tree, folder, stage
        self.attempt, self.ranks, self.lease, self.stop = attempt, ranks, lease, stop
        self.status = Status(folder, stage, attempt, lease.guard)
        self.rows: record.Rows | None = None
        self.began = time.time()

    def run(self) -> int:
        self.stop.check_at_start()
        uids = _upstream_uids(self.tree, self.stage)
        self._start_clean_if_stale(uids)
        self.status.write("running")
        self._write_attempt(None)
        _write_environment(self.folder.attempt(self.attempt) / "env.json")
        store.add_event(self.folder, "started", attempt=self.attempt, pid=os.getpid())
        record_id = f"{self.stage.id}-a{self.attempt}"
        git = read_json(self.folder.attempt(self.attempt) / "git.json")
        about = {**(read_json(self._attempt_file) or {}), "git": git}
        result = record.run_recorded(self.tree.sacred, record_id, self.stage, about, self._train)
        self.lease.check()
        self._write_result(result, uids)
        self.finish("done")
        return EXIT_OK

    def _start_clean_if_stale(self, uids: dict[str, str]) -> None:
        """Leftovers of an earlier upstream run, or of a finished run, are not this run's."""
        lineage = self.folder.path / "lineage.json"
        known = read_json(lineage)
        self.lease.check()
        if self.folder.result.exists() or (known is not None and known["upstream_uids"] != uids):
            store.set_aside(self.folder)
        write_json(lineage, {"schema": 1, "upstream_uids": uids})

    def _train(self, log_scalar: record.LogScalar) -> StageResult:
        events = self.tree.events / self.stage.id if os.environ.get(_TENSORBOARD) else None
        rows = record.Rows(self.folder.metrics, log_scalar, self.lease.guard, events)
        # Now, as a killed attempt gets to write nothing later.
        rows.on_start = lambda: self._write_attempt(None)
        self.rows = rows
        whereabouts = Whereabouts()

        def report(**about: Any) -> None:
            whereabouts.move()
            self.status.report(**about)

        context = StageContext(
            rank=0,
            ranks=self.ranks,
            folder=self.folder.path,
            root=self.tree.root,
            upstream_weights=_upstream_weights(self.tree, self.stage),
            upstream=_upstream_folders(self.tree, self.stage),
            metrics=self.rows,
            report=report,
            should_stop=lambda: self.stop.asked,
            check_lease=self.lease.guard,
            whereabouts=whereabouts,
        )
        try:
            return _call(self.stage, context, self.attempt, self._hung)
        finally:
            self.rows.close()

    def _hung(self, message: str) -> None:
        self.finish("failed", "hung", message)
        self.lease.release()

    def _write_result(self, result: StageResult, uids: dict[str, str]) -> None:
        total = time.time() - self.began
        threads = 1 if self.stage.execution.device == "cuda" else self.stage.execution.threads
        busy = result.wall_s.get("train", 0.0) + result.wall_s.get("eval", 0.0)
        metrics = {k: v if is_finite(v) else None for k, v in result.metrics.items()}
        config = self.stage.config
        write_json(
            self.folder.result,
            {
                "schema": 1,
                "uid": uuid.uuid4().hex,
                "stage": self.stage.id,
                "kind": self.stage.kind,
                "size": config.size,
                "metrics": metrics,
                "samples": result.samples,
                "steps": result.steps,
                "unique_images": config.images.images,
                # In passes over the unique images; with resampling an epoch has more samples.
                "epoch_samples": config.epoch_samples,
                "passes": result.samples / config.epoch_samples,
                "flops": result.flops,
                "wall_s": {**result.wall_s, "total": total, "harness": total - busy},
                "device": self.stage.execution.device,
                "processes": self.ranks * threads,
                "micro_batch": self.stage.execution.micro_batch,
                "attempts": self.attempt,
                "upstream_uids": uids,
                "harness_version": __version__,
            },
        )

    @property
    def _attempt_file(self) -> Path:
        return self.folder.attempt(self.attempt) / "attempt.json"

    def _write_attempt(
        self,
        ended: str | None,
        message: str | None = None,
        details: Mapping[str, Any] | None = None,
    ) -> None:
        before = read_json(self._attempt_file) or {}
        row = {
            **before,
            "schema": 1,
            "attempt": self.attempt,
            "host": this_host(),
            "pid": os.getpid(),
            "started": self.began,
            "ranks": self.ranks,
            "threads": self.stage.execution.threads,
            "device": self.stage.execution.device,
            "versions": {"harness": __version__, "torch": torch.__version__},
            "topology": self._topology(),
            "slurm": {name.lower(): os.environ[name] for name in _SLURM if name in os.environ},
            "gpus": _gpus(self.stage.execution),
            "first_step": self.rows.first_step if self.rows else None,
            "last_step": self.status.step,
            "first_samples": self._samples(self.rows.first_step if self.rows else None),
            "last_samples": self._samples(self.status.step),
            "last_checkpoint": attempts.last_checkpoint(self.folder),
            "end": ended,
            "message": message,
            "ended": time.time() if ended else None,
            **(details or {}),
        }
        write_json(self._attempt_file, row)

    def _samples(self, step: int | None) -> int | None:
        """Samples seen after a step; None where the stage has no steps."""
        config = self.stage.config
        return None if step is None or not config.steps else step * config.samples // config.steps

    def _topology(self) -> dict[str, Any]:
        folder = self.folder.attempt(self.attempt)
        rows = {k: read_json(folder / f"rank{k}.json") for k in range(self.ranks)}
        hosts = {str(k): row["host"] for k, row in rows.items() if row}  # as the watchdogs found
        nodes = self.stage.execution.nodes
        return {"ranks": self.ranks, "nodes": nodes, "hosts": {**hosts, "0": this_host()}}

    def finish(
        self,
        state: str,
        reason: str | None = None,
        message: str | None = None,
        details: Mapping[str, Any] | None = None,
    ) -> None:
        """Notes how the attempt ended. Nothing is written once the lease is lost."""
        self.lease.check()
        # A note's reason is in the user's words; the end is one of ours.
        end = state if state == "cancelled" else reason or state
        self._write_attempt(end, message, details)
        store.add_event(self.folder, state, attempt=self.attempt, reason=reason, message=message)
        self.status.write(state, reason, message)


def _guarded(
    run: Callable[[], int],
    folder: StageFolder,
    attempt: int,
    stop: Stop,
    job: _RankZero | None = None,
) -> int:
    """Runs and turns every way to end into a state, a reason and an exit code."""
    try:
        return run()
    except LeaseLostError as error:
        print(error, file=sys.stderr)
        return EXIT_BUSY
    except PreemptedError as error:
        code = _end(folder, attempt, job, *stop.end, error, EXIT_REQUEUE)
        return _after_rank_zero(code, folder, job)
    except DivergedError as error:
        code = _end(folder, attempt, job, "diverged", "diverged", error, EXIT_FAILED)
        return _after_rank_zero(code, folder, job)
    except DataError as error:
        return _end(folder, attempt, job, "failed", "data", error, EXIT_FAILED)
    except StorageError as error:
        return _end(folder, attempt, job, "failed", "storage", error, EXIT_STORAGE)
    except UserError as error:
        return _end(folder, attempt, job, "failed", "config", error, EXIT_FAILED)
    except OutOfMemoryError as error:
        return _out_of_memory(folder, attempt, job, error)
    except torch.OutOfMemoryError as error:  # outside of a step, where a smaller one is no help
        return _end(folder, attempt, job, "failed", "too_large", error, EXIT_FAILED)
    except HarnessError as error:
        return _end(folder, attempt, job, "failed", "code", error, EXIT_FAILED)
    except Exception as error:
        if _is_lost_rank(error):
            _say(f"lost another rank: {error}")
            return EXIT_LOST_RANK
        disk = storage_error(error, folder.path)
        if disk is not None:
            return _end(folder, attempt, job, "failed", "storage", disk, EXIT_STORAGE)
        # The one place where everything is caught: the process ends here, and its reason must
        # reach the status file; the traceback goes to the attempt's stderr.log.
        traceback.print_exc()
        return _end(folder, attempt, job, "failed", "code", error, EXIT_FAILED)


def _after_rank_zero(code: int, folder: StageFolder, job: _RankZero | None) -> int:
    """The code, once rank 0 is through: an end that all ranks see is its to tell, and the first
    process that is gone takes the others with it."""
    deadline = time.monotonic() + _PATIENCE_S
    while job is None and folder.lease.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    return code


def _is_lost_rank(error: Exception) -> bool:
    """True if a collective failed: the cause is another rank's, and whoever sees that one says
    it."""
    is_gloo = isinstance(error, RuntimeError) and "gloo/transport" in str(error)
    return is_gloo or isinstance(error, torch.distributed.DistError)


def _out_of_memory(
    folder: StageFolder, attempt: int, job: _RankZero | None, error: OutOfMemoryError
) -> int:
    """Leaves the next micro-batch to try in the stage's folder; any rank may find out first."""
    stage = store.read_stage(folder)
    if error.smaller is None:
        return _end(folder, attempt, job, "failed", "too_large", error, EXIT_FAILED)
    asked = {"ranks": stage.execution.ranks, "micro_batch": stage.execution.micro_batch}
    row = {"schema": 1, "asked": asked, "micro_batch": error.smaller, "failed": error.micro_batch}
    try:
        (job.lease.check if job else AttemptGuard(folder, attempt).guard)()
    except LeaseLostError as lost:
        _say(lost)
        return EXIT_BUSY
    write_json(folder.memory, row)
    return _end(folder, attempt, job, "failed", "oom", error, EXIT_FAILED)


def _end(
    folder: StageFolder,
    attempt: int,
    job: _RankZero | None,
    state: str,
    reason: str,
    error: BaseException,
    code: int,
) -> int:
    lines = str(error).strip().splitlines()
    message = lines[0] if lines else type(error).__name__
    if reason == "code":
        message = f"{type(error).__name__}: {message}"
    _say(f"{state} ({reason}): {message}")
    if job is not None:
        try:
            job.finish(state, reason, message, _details(error))
        except LeaseLostError as lost:
            print(lost, file=sys.stderr)
            return EXIT_BUSY
    else:
        rank = os.environ.get("RANK", "0")
        # In the folder of its own attempt, which no later one touches.
        path = folder.attempt(attempt) / f"error.rank{rank}.json"
        _tell(path, state, reason, f"rank {rank}: {message}")
    return code


def _gpus(execution: Execution) -> list[str]:
    """Names of the GPUs that this rank sees."""
    if execution.device != "cuda":
        return []
    return [torch.cuda.get_device_name(k) for k in range(torch.cuda.device_count())]


def _details(error: BaseException) -> dict[str, Any]:
    """What the record of an attempt holds beyond the message."""
    if not isinstance(error, DivergedError):
        return {}
    about = {
        "step": error.step,
        "samples": error.samples,
        "loss": error.loss if is_finite(error.loss) else str(error.loss),
        "grad_norm": error.norm if error.norm is None or is_finite(error.norm) else str(error.norm),
        "keys": error.keys,
    }
    return {"diverged": about}


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
