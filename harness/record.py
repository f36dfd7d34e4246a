"""A sacred run around every attempt: config, host, git, captured scalars, result.

Sacred is the record of an attempt and never the source of truth: its file observer rewrites whole
files and cannot resume. Each attempt gets a run of its own, with an id that says which.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import uuid
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from harness.errors import UserError
from harness.ledger.context import StageResult
from harness.ledger.files import JsonlWriter
from harness.study.stages import StageFile

with warnings.catch_warnings():
    # sacred 0.8.7 imports pkg_resources, which announces its own end (setuptools is pinned below).
    warnings.filterwarnings("ignore", message="pkg_resources is deprecated")
    import sacred
    from sacred.observers import FileStorageObserver, RunObserver

# Workers log to their own files; sacred's capture keeps all of stdout in memory and rewrites it.
sacred.SETTINGS.CAPTURE_MODE = "no"  # type: ignore[attr-defined]  # an untyped munch

_MONGO_WAIT_MS = 10_000
_LATER = (
    *("heartbeat_event", "log_metrics", "artifact_event", "resource_event"),
    *("completed_event", "interrupted_event", "failed_event"),
)
"""What sacred calls of an observer after its start."""

LogScalar = Callable[[str, float, int], None]


def run_recorded(
    folder: Path,
    record_id: str,
    stage: StageFile,
    about: Mapping[str, Any],
    body: Callable[[LogScalar], StageResult],
) -> StageResult:
    """Runs `body` inside a sacred run `folder/record_id`; `about` holds git, topology, versions.

    With HARNESS_MONGO_URL set, a Mongo observer gets the same run. Errors of `body` come out as
    they are, after sacred has noted them.
    """
    experiment = sacred.Experiment(stage.kind, save_git_info=False)
    # Without a logger of its own sacred puts a handler on the root logger.
    experiment.logger = logging.getLogger("harness.sacred")  # type: ignore[assignment]
    files = FileStorageObserver(folder, copy_artifacts=False, copy_sources=False)
    experiment.observers.append(_tolerant(files))
    mongo = os.environ.get("HARNESS_MONGO_URL")
    if mongo and (observer := _mongo_observer(mongo)) is not None:
        experiment.observers.append(_tolerant(observer))
    config = stage.model_dump(mode="json", by_alias=True)
    experiment.add_config({"stage": config, "attempt": dict(about)})
    results: list[StageResult] = []

    def main(_run: Any) -> dict[str, float | None]:
        results.append(body(_run.log_scalar))
        return results[0].metrics

    experiment.main(main)
    experiment.run(options={"--id": _free_id(folder, record_id), "--loglevel": "WARNING"})
    return results[0]


def _mongo_observer(url: str) -> RunObserver | None:
    """None, and a line that says why, where it cannot be made: a record ends no training."""
    try:
        from pymongo.uri_parser import parse_uri  # which only its users install
        from sacred.observers import MongoObserver

        name = parse_uri(url)["database"] or "harness"
        made = MongoObserver(url=url, db_name=name, serverSelectionTimeoutMS=_MONGO_WAIT_MS)
        start = made.started_event

        def started_event(**about: Any) -> Any:
            # Run roots that share a database may hold the same stages.
            return start(**{**about, "_id": f"{about['_id']}-{uuid.uuid4().hex[:6]}"})

        made.started_event = started_event  # pyright: ignore[reportAttributeAccessIssue]
        kept = _Kept(made.log_metrics)
        made.log_metrics = kept.log_metrics  # pyright: ignore[reportAttributeAccessIssue]
        return made
    except Exception as error:  # a missing package, a URL that is none
        _say_lost("MongoObserver", error)
        return None


class _Kept:
    """Points of curves, kept until the database has taken them.

    Sacred drops an observer for good after its first error: a curve would end where the network
    failed for a moment.
    """

    def __init__(self, send: Callable[..., None]) -> None:
        self._send = send
        self._points: dict[str, dict[str, list[Any]]] = {}
        self._is_lost = False

    def log_metrics(self, metrics_by_name: Mapping[str, Any], info: dict[str, Any]) -> None:
        """In place of the observer's; raises nothing."""
        for name, new in metrics_by_name.items():
            own = self._points.setdefault(name, {})
            for column, values in new.items():
                own.setdefault(column, []).extend(values)
        for name in list(self._points):
            try:
                self._send({name: self._points[name]}, info)  # one by one: none is there twice
            except Exception as error:  # of a network, a database's driver
                if not self._is_lost:
                    with contextlib.suppress(OSError):
                        print(
                            f"MongoObserver: points are kept until later: {error}", file=sys.stderr
                        )
                self._is_lost = True
                return
            del self._points[name]
        self._is_lost = False


def _say_lost(name: str, error: Exception) -> None:
    _say(f"no record by {name}: {error}")


def _say(line: str) -> None:
    with contextlib.suppress(OSError):
        print(line, file=sys.stderr)


def _tolerant(observer: RunObserver) -> RunObserver:
    """The observer, ending no training by its own failure to start.

    Sacred catches what an observer raises later, but not that.
    """
    start = observer.started_event

    def started_event(**about: Any) -> Any:
        try:
            return start(**about)
        except Exception as error:  # of a disk, a network, a database's driver
            _say_lost(type(observer).__name__, error)
            for name in _LATER:  # of a run that it has never heard of
                setattr(observer, name, lambda *_, **__: None)
            return about["_id"]

    observer.started_event = started_event  # pyright: ignore[reportAttributeAccessIssue]
    return observer


def _free_id(folder: Path, record_id: str) -> str:
    """`record_id`, or it with a number: a stage folder that was removed starts again at attempt 1,
    and the record of its first life stays.
    """
    unique, life = record_id, 1
    while (folder / unique).exists():
        life += 1
        unique = f"{record_id}.{life}"
    return unique


class Rows:
    """metrics.jsonl, mirrored into the sacred run as scalars."""

    def __init__(
        self,
        path: Path,
        log_scalar: LogScalar,
        guard: Callable[[], None],
        events: Path | None = None,
    ) -> None:
        """`guard` is called before every write, and raises where there must be none. `events` is
        a folder for TensorBoard's files. Raises UserError if its package is missing.
        """
        self.writer = JsonlWriter(path, guard)
        self.log_scalar, self.guard = log_scalar, guard
        self.events = _Events(events) if events is not None else None
        self.first_step: int | None = None
        """Where the attempt went on from; None where nobody said."""
        self.on_start: Callable[[], None] = lambda: None
        """Called once that is known."""

    def append(self, row: Mapping[str, float | int | None]) -> None:
        """Writes a row; each number in it becomes a scalar of the sacred run."""
        self.guard()
        self.writer.append(row)
        for name, value in row.items():
            if value is not None and name not in ("step", "samples", "wall_s"):
                self.log_scalar(name, float(value), int(row["step"] or 0))
                if self.events is not None:
                    self.events.add(name, float(value), int(row["step"] or 0))

    def rewind(self, step: int) -> None:
        """Drops the rows after `step`."""
        self.guard()
        self.first_step = step
        self.writer.rewind(step)
        if self.events is not None:
            self.events.first_step = step
        self.on_start()

    def sync(self) -> None:
        """Before a checkpoint or a result says that the rows are there."""
        self.writer.sync()

    def close(self) -> None:
        """Ends what is written beside the rows."""
        if self.events is not None:
            self.events.close()


class _Events:
    """Scalars for TensorBoard: one run a stage, whose curves go on where an attempt goes on."""

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter  # slow, and of few users
        except ImportError:
            raise UserError(
                "HARNESS_TENSORBOARD is set, but TensorBoard is not installed; unset it, or"
                " pip install 'vision-scaling-harness[tensorboard]'"
            ) from None
        self.folder, self.first_step = folder, 0
        self._new, self._writer, self._is_lost = SummaryWriter, None, False

    def add(self, name: str, value: float, step: int) -> None:
        """One point. What goes wrong is said once: the rows are the truth."""
        if self._is_lost:
            return
        try:
            if self._writer is None:
                # The last attempt may have come further than the checkpoint of this one.
                self._writer = self._new(str(self.folder), purge_step=self.first_step + 1)
            self._writer.add_scalar(name, value, step)
        except Exception as error:  # of a disk, or of the thread that writes to it
            self._is_lost = True
            _say(f"no more TensorBoard events: {error}")

    def close(self) -> None:
        """Writes what is left."""
        if self._writer is not None:
            with contextlib.suppress(Exception):
                self._writer.close()


class NoRows:
    """The rows of ranks other than 0."""

    def append(self, row: Mapping[str, float | int | None]) -> None:
        """Ranks other than 0 write nothing."""

    def rewind(self, step: int) -> None:
        """Ranks other than 0 write nothing."""

    def sync(self) -> None:
        """Ranks other than 0 write nothing."""
