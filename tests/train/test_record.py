"""What is written beside the rows ends no training and shows no step twice."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import mongomock
import mongomock.gridfs
import pymongo
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from harness import record
from harness.ledger.context import StageResult
from harness.study.recipes import Duration, WspRecipe
from tests import tiny


def rows(folder: Path) -> record.Rows:
    return record.Rows(folder / "metrics.jsonl", lambda *_: None, lambda: None, folder / "events")


def test_an_attempt_that_goes_on_from_before_leaves_no_step_twice(tmp_path: Path) -> None:
    first = rows(tmp_path)
    first.rewind(0)
    for step in range(1, 8):
        first.append({"step": step, "loss": float(step)})
    first.close()
    second = rows(tmp_path)
    second.rewind(5)
    for step in range(6, 11):
        second.append({"step": step, "loss": 10.0 * step})
    second.close()
    found = EventAccumulator(str(tmp_path / "events")).Reload().Scalars("loss")
    wanted = [(s, float(s)) for s in range(1, 6)] + [(s, 10.0 * s) for s in range(6, 11)]
    assert [(e.step, e.value) for e in found] == wanted


def test_where_an_attempt_goes_on_is_told_before_its_first_row(tmp_path: Path) -> None:
    told: list[int | None] = []
    own = rows(tmp_path)
    own.on_start = lambda: told.append(own.first_step)
    own.rewind(3)
    assert told == [3]


def test_events_that_cannot_be_written_are_said_once_and_the_rows_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "events").write_text("a file stands where the folder should")
    own = rows(tmp_path)
    own.rewind(0)
    for step in range(1, 4):
        own.append({"step": step, "loss": 1.0})
    own.close()
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3
    assert capsys.readouterr().err.count("no more TensorBoard events") == 1


def test_a_record_that_cannot_begin_ends_no_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "sacred").write_text("a file stands where the folder should")
    result = StageResult(metrics={"x": 1.0}, steps=1, samples=1, flops=1.0, wall_s={})

    def body(log_scalar: Any) -> StageResult:
        log_scalar("loss", 1.0, 1)
        return result

    stage = tiny.stage(WspRecipe(duration=Duration(steps=1), batch=4))
    assert record.run_recorded(tmp_path / "sacred", "a1", stage, {}, body) is result
    assert "no record by FileStorageObserver" in capsys.readouterr().err


def recorded(folder: Path) -> None:
    """A run with all observers, to its end."""
    result = StageResult(metrics={"x": 1.0}, steps=1, samples=1, flops=1.0, wall_s={})

    def body(log_scalar: Any) -> StageResult:
        log_scalar("loss", 1.0, 1)
        return result

    stage = tiny.stage(WspRecipe(duration=Duration(steps=1), batch=4))
    assert record.run_recorded(folder, "x-a1", stage, {}, body) is result


def test_without_pymongo_there_is_no_mongo_record_and_the_stage_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HARNESS_MONGO_URL", "mongodb://127.0.0.1:1")
    monkeypatch.setitem(sys.modules, "pymongo", None)
    recorded(tmp_path)
    assert capsys.readouterr().err.count("no record by MongoObserver") == 1
    assert (tmp_path / "x-a1" / "run.json").exists()


def test_a_database_that_cannot_be_reached_ends_no_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Client(dict[str, Any]):
        """As pymongo's: made without a word, and every request an error."""

        def __init__(self, url: str, **_: Any) -> None:
            self.url = url

        def __getitem__(self, name: str) -> Any:
            return {"runs": Refusing(), "metrics": Refusing()}

    class Refusing:
        def __getattr__(self, name: str) -> Any:
            raise ConnectionError("[Errno 111] Connection refused")

    pymongo, gridfs = ModuleType("pymongo"), ModuleType("gridfs")
    pymongo.MongoClient = Client  # type: ignore[attr-defined]
    gridfs.GridFS = lambda database: None  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pymongo", pymongo)
    monkeypatch.setitem(sys.modules, "gridfs", gridfs)
    monkeypatch.setenv("HARNESS_MONGO_URL", "mongodb://127.0.0.1:1")
    recorded(tmp_path)
    said = capsys.readouterr().err
    assert said.count("no record by MongoObserver") == 1
    assert "Traceback" not in said
    assert (tmp_path / "x-a1" / "run.json").exists()


def in_memory(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A database for every URL."""
    mongomock.gridfs.enable_gridfs_integration()
    client: Any = mongomock.MongoClient()
    monkeypatch.setattr(pymongo, "MongoClient", lambda *_, **__: client)
    return client


def test_a_mongo_record_has_config_curve_and_result_and_roots_may_share_a_database(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What Omniboard reads, from sacred's own observer and a database in memory."""
    client = in_memory(monkeypatch)
    monkeypatch.setenv("HARNESS_MONGO_URL", "mongodb://127.0.0.1:1")
    for root in ("one", "two"):  # the same attempt at the same stage
        recorded(tmp_path / root)
        assert (tmp_path / root / "x-a1" / "run.json").exists()
    runs, curves = client["harness"].runs, client["harness"].metrics
    assert runs.count_documents({}) == 2
    for run in runs.find():
        assert run["_id"].startswith("x-a1-") and run["status"] == "COMPLETED"
        assert run["result"] == {"x": 1.0}
        assert run["config"]["stage"]["config"]["recipe"]["batch"] == 4
        (curve,) = curves.find({"run_id": run["_id"]})
        assert (curve["name"], curve["steps"], curve["values"]) == ("loss", [1], [1.0])


def test_points_of_a_curve_wait_for_a_database_that_is_away_for_a_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    client = in_memory(monkeypatch)
    monkeypatch.setenv("HARNESS_MONGO_URL", "mongodb://127.0.0.1:1/studies?retryWrites=true")
    is_away, take = False, mongomock.Collection.update_one

    def update_one(self: Any, *about: Any, **more: Any) -> Any:
        if is_away and self.name == "metrics":
            raise pymongo.errors.ServerSelectionTimeoutError("no servers found yet")
        return take(self, *about, **more)

    monkeypatch.setattr(mongomock.Collection, "update_one", update_one)

    def body(log: record.LogScalar) -> StageResult:
        nonlocal is_away
        for step in range(6):
            is_away = step in (2, 3)
            log("loss", float(step), step)
            log("lr", 0.5, step)
            runs[0]._emit_heartbeat()
        return StageResult(metrics={"x": 1.0}, steps=6, samples=6, flops=1.0, wall_s={})

    # The record beats by itself, every ten seconds; here between any two steps.
    runs: list[Any] = []
    start = record.sacred.run.Run._emit_started

    def started(run: Any) -> None:
        runs.append(run)
        start(run)

    monkeypatch.setattr(record.sacred.run.Run, "_emit_started", started)
    stage = tiny.stage(WspRecipe(duration=Duration(steps=1), batch=4))
    record.run_recorded(tmp_path, "x-a1", stage, {}, body)
    curves = {c["name"]: c for c in client["studies"].metrics.find()}
    assert curves["loss"]["steps"] == [0, 1, 2, 3, 4, 5]
    assert curves["loss"]["values"] == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    assert curves["lr"]["steps"] == [0, 1, 2, 3, 4, 5]
    assert capsys.readouterr().err.count("points are kept until later: no servers found") == 1
