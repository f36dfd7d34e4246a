"""Metric rows of many files at once: the fast and the line-wise way agree on odd files too."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from runtree import Spec, Truth, write_tree

from analysis import curves, metric_rows
from analysis.load import load
from analysis.metric_rows import MetricRows, read_many
from harness.ledger import cell_rows
from harness.ledger.tree import Tree
from harness.metric_columns import write_columns

GOOD = '{"step": 1, "loss": 2.5}\n{"step": 2, "loss": null, "val_loss": 1e-3}\n'
ODD = {
    "torn": GOOD + '{"step": 3, "lo',
    "torn at once": '{"step": 3, "lo',
    "empty": "",
    "no row": "\n\n",
    "broken": GOOD + "not json\n" + GOOD,
    "list": GOOD + "[1]\n",
    "bare number": "7\n" + GOOD,
    "blank lines": "\n" + GOOD + "  \n\n" + GOOD,
    "two in a line and a blank one": '{"step": 1} {"step": 2}\n\n' + GOOD,
    "windows": GOOD.replace("\n", "\r\n"),
    "nested": GOOD + '{"step": 3, "loss": {"a": 1}}\n',
    "words": GOOD + '{"step": 3, "loss": "1.5", "note": "2020-01-01"}\n',
    "truth values": GOOD + '{"step": true, "flag": false}\n',
    "not finite": GOOD + '{"step": 3, "loss": NaN, "val_loss": -Infinity}\n',
    "huge": GOOD + '{"step": 123456789012345678901234567890, "loss": 1e999}\n',
    "whole and not": '{"step": 1, "odd": 1}\n{"step": 2, "odd": 1.5}\n{"step": 3, "odd": -0}\n',
    "same key twice": GOOD + '{"step": 3, "step": 4}\n',
    "odd key": GOOD + '{"st\\u0065p": 5, "l\\"oss{": 1, "": 2}\n',
    "not utf-8": GOOD.encode() + b'{"step": 3, "\xff": 1}\n' + GOOD.encode(),
    "no newline but one brace": '{"step": 1,\n"loss": 2}\n',
    "digits": '{"step": 1, "loss": 0.1234567890123456789, "lr": 4.9e-324, "flops": 1.8e308}\n',
}


def write(folder: Path, files: list[str | bytes]) -> list[Path]:
    paths = [folder / f"{i}.jsonl" for i in range(len(files))]
    for path, text in zip(paths, files, strict=True):
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return paths


def assert_same(one: MetricRows, two: MetricRows) -> None:
    assert one.columns.keys() == two.columns.keys()
    for name, values in one.columns.items():
        np.testing.assert_array_equal(values, two.columns[name], err_msg=name)
    np.testing.assert_array_equal(one.counts, two.counts)
    np.testing.assert_array_equal(one.broken, two.broken)


@pytest.mark.parametrize("name", ODD)
def test_fast_and_slow_agree_on_odd_files(tmp_path: Path, name: str) -> None:
    paths = write(tmp_path, [GOOD, ODD[name], GOOD])
    paths.insert(1, tmp_path / "none.jsonl")
    found = read_many(paths)
    assert_same(found, read_many(paths, fast=False))
    # An odd file takes nothing from its neighbours.
    assert found.counts[0] == found.counts[3] == 2 and found.counts[1] == 0
    assert found.columns["loss"][0] == found.columns["loss"][-2] == 2.5


def test_broken_lines_are_counted_by_file_and_a_torn_end_is_not(tmp_path: Path) -> None:
    paths = write(tmp_path, [ODD["broken"], ODD["torn"], ODD["list"]])
    found = read_many(paths)
    assert found.broken.tolist() == [1, 0, 1]
    assert found.counts.tolist() == [4, 2, 2]


def test_numbers_are_those_of_python(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    values = [float(v) for v in rng.standard_normal(2000) * 10.0 ** rng.integers(-300, 300, 2000)]
    rows = [json.dumps({"step": i, "loss": v}) + "\n" for i, v in enumerate(values)]
    found = read_many(write(tmp_path, ["".join(rows)]))
    assert found.columns["loss"].tolist() == values


def test_usual_files_take_the_fast_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(text: bytes) -> MetricRows:
        raise AssertionError(f"read line by line: {text[:80]!r}")

    monkeypatch.setattr(metric_rows, "_parse_slowly", refuse)
    write_tree(tmp_path, Spec(sizes=["xs", "s"], seeds=[0]))
    assert len(load(tmp_path, "made").curves)


def test_many_batches_are_one_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files: list[str | bytes] = [ODD[name] for name in ODD] * 3
    paths = write(tmp_path, files)
    whole = read_many(paths)
    monkeypatch.setattr(metric_rows, "_BATCH_BYTES", 300)
    assert_same(read_many(paths), whole)


def test_copies_in_columns_are_read_in_their_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    long = [
        "".join(json.dumps({"step": i, "loss": float(v)}) + "\n" for i, v in enumerate(values))
        for values in rng.standard_normal((4, 250))
    ]
    files: list[str | bytes] = [long[0], GOOD, long[1], ODD["broken"], long[2], long[3]]
    paths = []
    for i, text in enumerate(files):
        (tmp_path / str(i)).mkdir()
        paths += write(tmp_path / str(i), [text])
        write_columns(paths[-1])
    assert [p.with_name("metrics.arrow").exists() for p in paths] == [1, 0, 1, 0, 1, 1]
    slow = read_many(paths, fast=False)
    assert_same(read_many(paths), slow)
    # And no text is read where there is a copy.
    monkeypatch.setattr(metric_rows, "_whole_lines", lambda path: b"")
    assert read_many(paths).counts.tolist() == [250, 0, 250, 0, 250, 250]


def test_curves_of_a_study_do_not_depend_on_the_way(tmp_path: Path) -> None:
    spec = Spec(truth=Truth(noise=0.01), evals=100, seeds=[0])
    rows = write_tree(tmp_path, spec)
    path = tmp_path / "stages" / "wsp" / rows[0]["stages"]["wsp"] / "metrics.jsonl"
    path.write_text("broken\n" + path.read_text() + '{"step": 1')
    study = load(tmp_path, "made")
    notes: list[str] = []
    cells = cell_rows.read_cells(Tree(tmp_path), "made")
    slow = curves.curves_frame(cells, study.cells, study.stages, notes, fast=False)
    pd.testing.assert_frame_equal(study.curves, slow)
    assert notes == list(study.notes) and len(notes) == 1
    # And both are what the files say.
    for stage in list(study.stages.values())[::7]:
        own = slow[slow["stage"] == stage.id]
        lines = [] if not stage.folder.metrics.exists() else stage.folder.metrics.read_text()
        wanted = [json.loads(x) for x in str(lines).splitlines() if x.endswith("}")]
        if stage.folder.metrics != path:
            assert own["val_loss"].tolist() == [w["val_loss"] for w in wanted]


def test_finished_curves_are_those_of_a_plain_join(tmp_path: Path) -> None:
    spec = Spec(
        truth=Truth(noise=0.01),
        state_of=lambda axes, role: "failed" if axes["size"] == "s" else "done",
    )
    write_tree(tmp_path, spec)
    study = load(tmp_path, "made")
    frame = study.curves.astype({"cells": str})
    rows = frame[(frame["kind"] == "wsp") & (frame["state"] == "done")]
    rows = rows.dropna(subset=["val_loss", "samples"])[["cells", "samples", "val_loss"]]
    rows = rows.assign(cell=rows["cells"].str.split(";")).explode("cell")
    wanted = rows.merge(study.grid, on="cell").sort_values(["cell", "samples"])
    found = study.finished_wsp
    assert len(found) == len(wanted) > 0
    for name in ("cell", "samples", "val_loss", "pair", "size", "params", "data", "init", "seed"):
        assert found[name].tolist() == wanted[name].tolist(), name


def test_rows_of_a_curve_come_by_samples_whatever_the_order_in_the_file(tmp_path: Path) -> None:
    rows = write_tree(tmp_path, Spec(sizes=["xs"], data=[1000], seeds=[0], tasks=()))
    path = tmp_path / "stages" / "wsp" / rows[0]["stages"]["wsp"] / "metrics.jsonl"
    path.write_text("".join(reversed(path.read_text().splitlines(keepends=True))))
    found = load(tmp_path, "made").finished_wsp
    own: Any = found[found["cell"] == rows[0]["id"]]["samples"]
    assert own.is_monotonic_increasing and len(own) == 8 and math.isfinite(own.iloc[0])
