"""Rank 0 of a stage: it owns the lease and writes the stage's files."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from harness import __version__, record
from harness.attempt import Status, is_finite
from harness.errors import EXIT_OK
from harness.ledger import attempts, store
from harness.ledger.context import StageContext, StageResult, Whereabouts
from harness.ledger.files import read_json, write_json
from harness.ledger.lease import Lease, this_host
from harness.ledger.tree import StageFolder, Tree
from harness.metric_columns import write_columns
from harness.stage_run import (
    call,
    upstream_folders,
    upstream_uids,
    upstream_weights,
    write_environment,
)
from harness.stop import Stop
from harness.study.stages import Execution, StageFile

_TENSORBOARD = "HARNESS_TENSORBOARD"
_SLURM = ("SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID", "SLURM_RESTART_COUNT")


class RankZero:
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
        """The whole stage; the exit code."""
        self.stop.check_at_start()
        uids = upstream_uids(self.tree, self.stage)
        self._start_clean_if_stale(uids)
        self.status.write("running")
        self._write_attempt(None)
        write_environment(self.folder.attempt(self.attempt) / "env.json", self.lease.guard)
        self._add_event("started", pid=os.getpid())
        record_id = f"{self.stage.id}-a{self.attempt}"
        git = read_json(self.folder.attempt(self.attempt) / "git.json")
        about = {**(read_json(self._attempt_file) or {}), "git": git}
        result = record.run_recorded(self.tree.sacred, record_id, self.stage, about, self._train)
        self.lease.check()
        if self.rows is not None:
            self.rows.sync()
        write_columns(self.folder.metrics, self.lease.guard)
        self._write_result(result, uids)
        self.finish("done")
        return EXIT_OK

    def _start_clean_if_stale(self, uids: dict[str, str]) -> None:
        """Leftovers of an earlier upstream run, or of a finished run, are not this run's."""
        known = read_json(self.folder.lineage)
        self.lease.check()
        if self.folder.result.exists() or (known is not None and known["upstream_uids"] != uids):
            store.set_aside(self.folder, self.lease.guard)
            # Earlier tries say nothing of this run, and nothing of theirs is there to go on from.
            self._add_event("begun anew", by="upstream", attempt=self.attempt - 1)
            row = {**(read_json(self._attempt_file) or {}), "progress": 0}
            write_json(self._attempt_file, row, self.lease.guard)
        content = {"schema": 1, "attempt": self.attempt, "upstream_uids": uids}
        write_json(self.folder.lineage, content, self.lease.check)

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
            upstream_weights=upstream_weights(self.tree, self.stage),
            upstream=upstream_folders(self.tree, self.stage),
            metrics=self.rows,
            report=report,
            should_stop=lambda: self.stop.asked,
            check_lease=self.lease.guard,
            whereabouts=whereabouts,
        )
        try:
            return call(self.stage, context, self.attempt, self._hung)
        finally:
            self.rows.close()

    def _hung(self, message: str) -> None:
        self.finish("failed", "hung", message)
        self.lease.release()

    def _write_result(self, result: StageResult, uids: dict[str, str]) -> None:
        total = result.earlier_s + time.time() - self.began
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
            self.lease.check,
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
        write_json(self._attempt_file, row, self.lease.guard)

    def _add_event(self, event: str, **fields: Any) -> None:
        about = {"attempt": self.attempt, **fields}
        store.add_event(self.folder, event, guard=self.lease.guard, **about)

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
        self._add_event(state, reason=reason, message=message)
        self.status.write(state, reason, message)
        if state == "done":  # a note that came too late would hold a later run
            self.folder.stop.unlink(missing_ok=True)


def _gpus(execution: Execution) -> list[str]:
    """Names of the GPUs that this rank sees."""
    if execution.device != "cuda":
        return []
    return [torch.cuda.get_device_name(k) for k in range(torch.cuda.device_count())]
