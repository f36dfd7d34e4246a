"""What is written beside the rows ends no training and shows no step twice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

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
