"""The columnar copy of metrics.jsonl says what that file says, or is not looked at."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from harness import metric_columns
from harness.ledger import store
from harness.ledger.tree import Tree
from harness.metric_columns import NAME, read_columns, write_columns
from harness.study.cells import build_grid
from harness.study.schema import load_study
from harness.train.loop import steps_between_rows

ROWS = [
    {"step": i, "loss": 2.5 / (i + 1), "val_loss": 1.0 + i if i % 3 == 0 else None}
    | ({"extra": 1e-300 * i} if i % 7 == 0 else {})
    for i in range(300)
]


def text_of(rows: list[dict[str, float]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.fixture
def metrics(tmp_path: Path) -> Path:
    path = tmp_path / "metrics.jsonl"
    path.write_text(text_of(ROWS))
    write_columns(path)
    return path


def same_times(path: Path, change: Callable[[], object]) -> None:
    stat = os.stat(path)
    change()
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def assert_is_the_text(path: Path) -> None:
    found = read_columns(path)
    assert found is not None
    columns, rows = found
    wanted = pd.DataFrame([json.loads(line) for line in path.read_text().splitlines()])
    assert rows == len(wanted) and list(columns) == list(wanted)
    for name, column in columns.items():
        np.testing.assert_array_equal(column, wanted[name].to_numpy(float), err_msg=name)


def test_columns_are_the_rows(metrics: Path) -> None:
    assert_is_the_text(metrics)
    # And others read the file without a line of ours.
    frame = pd.read_feather(metrics.with_name(NAME))
    assert frame["loss"].tolist() == [row["loss"] for row in ROWS]


def test_a_moved_tree_has_other_times_and_the_copy_still_counts(metrics: Path) -> None:
    os.utime(metrics, ns=(1, 1))
    assert_is_the_text(metrics)


@pytest.mark.parametrize("keeps_size", [True, False])
def test_a_copy_of_other_text_does_not_count(metrics: Path, keeps_size: bool) -> None:
    text = metrics.read_text()
    changed = text.replace('"loss": 2.5', '"loss": 9.5', 1) if keeps_size else text + text_of(ROWS)
    metrics.write_text(changed)
    os.utime(metrics, ns=(1, 1))
    assert (len(changed) == len(text)) is keeps_size
    assert read_columns(metrics) is None


def test_a_resumed_run_that_takes_rows_back_has_no_copy(metrics: Path) -> None:
    metrics.write_text(text_of(ROWS[:250]))
    assert read_columns(metrics) is None


@pytest.mark.parametrize(
    "text",
    [
        text_of(ROWS[:199]),
        text_of(ROWS) + '{"step": 300',
        text_of(ROWS) + "not json\n",
        text_of(ROWS) + '{"step": 300, "loss": "2.5"}\n',
        text_of(ROWS) + '{"step": true}\n',
        text_of(ROWS) + '{"step": {"a": 1}}\n',
        text_of(ROWS) + '{"step": ' + "9" * 400 + "}\n",
        text_of(ROWS) + "[1, 2]\n",
    ],
)
def test_what_is_short_or_odd_has_no_copy(tmp_path: Path, text: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(text)
    write_columns(path)
    assert not path.with_name(NAME).exists()


def test_a_damaged_copy_does_not_count(metrics: Path) -> None:
    copy, rng = metrics.with_name(NAME), random.Random(0)
    whole = copy.read_bytes()
    for _ in range(60):
        copy.write_bytes(whole[: rng.randrange(len(whole))])
        assert read_columns(metrics) is None
    for wrong in (b"", b"ARROW1", os.urandom(500), b"{}\n"):
        copy.write_bytes(wrong)
        assert read_columns(metrics) is None
    pd.DataFrame({"step": ["a"]}).to_feather(copy)
    assert read_columns(metrics) is None


def test_no_place_for_a_copy_is_no_error(metrics: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    metrics.with_name(NAME).unlink()

    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(metric_columns, "write_bytes", refuse)
    write_columns(metrics)
    assert read_columns(metrics) is None


def test_long_runs_have_a_row_every_hundred_steps_and_a_thousand_at_most() -> None:
    found = {steps: steps_between_rows(steps) for steps in (1, 49, 100, 4000, 5000, 20_000)}
    assert found == {1: 1, 49: 1, 100: 2, 4000: 80, 5000: 100, 20_000: 100}
    assert steps_between_rows(100_000) == 100 and steps_between_rows(3_000_000) == 3000


STUDY = """\
name: tiny
axes: {init: [random]}
defaults: {data: 500, size: d16x2, dataset: scenes-2k, image_size: 24}
stages:
  wsp: {duration: {steps: 12}, batch: 60}
"""
WORKER = "import sys; from harness import metric_columns, worker; metric_columns.WORTH_IT = 5;"
WORKER += "sys.exit(worker.main(sys.argv[1:]))"


@pytest.mark.slow
def test_a_worker_leaves_a_copy_of_what_it_wrote(tmp_path: Path) -> None:
    file = tmp_path / "tiny.yaml"
    file.write_text(STUDY)
    (planned,) = build_grid(load_study(file)).stages.values()
    folder = store.write_stage(Tree(tmp_path / "runs"), planned)
    folder.attempt(1).mkdir(parents=True)
    words = {"root": tmp_path / "runs", "kind": "wsp", "stage": planned.id, "attempt": 1}
    command = [sys.executable, "-c", WORKER, *(f"--{k}={v}" for k, v in words.items())]
    env = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    subprocess.run(command, env=env, check=True)
    assert folder.result.exists()
    assert_is_the_text(folder.metrics)
    columns, rows = read_columns(folder.metrics) or ({}, 0)
    assert rows == 12 and columns["step"].tolist() == list(range(1, 13))
