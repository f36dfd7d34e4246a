"""The run tree as frames: states, torn files, numbers only where a stage is done."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from runtree import Spec, write_json, write_tree

from analysis.load import StudyData, axis_label, load
from analysis.metric_rows import read_rows
from harness.errors import NotFoundError


def test_unknown_study_lists_the_known_ones(tmp_path: Path) -> None:
    write_tree(tmp_path, Spec(name="first", sizes=["xs"], data=[1000], tasks=()))
    with pytest.raises(NotFoundError, match="first"):
        load(tmp_path, "frist")


def test_every_cell_is_kept_and_only_done_stages_have_numbers(holed: StudyData) -> None:
    assert len(holed.cells) == 64
    states = holed.cells["state"].value_counts().to_dict()
    assert states == {"done": 56, "failed": 2, "diverged": 2, "waiting": 2, "planned": 2}
    results = holed.results
    assert np.isfinite(results.loc[results["state"] == "done", "value"]).all()
    assert results.loc[results["state"] != "done", "value"].isna().all()
    blocked = results[(results["size"] == "l") & (results["data"] == 64_000)]
    blocked = blocked[(blocked["init"] == "mae") & (blocked["task"] == "probe")]
    assert set(blocked["state"]) == {"blocked"}


def test_failed_cell_says_why(holed: StudyData) -> None:
    failed = holed.cells[holed.cells["state"] == "failed"]
    assert set(failed["why"]) == {"linear_probe failed (data): as the test wants"}


def test_shared_mae_stage_has_one_curve_that_names_its_cells(holed: StudyData) -> None:
    mae = holed.curves[holed.curves["kind"] == "mae"]
    assert mae["stage"].nunique() == 8
    assert set(mae["cells"].str.split(";").map(len)) == {4}
    # Cells of several data sizes share it: it has none of its own.
    assert mae["data"].isna().all()
    assert (mae["size"].notna()).all()


def test_torn_last_line_and_broken_line_leave_the_others(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\nnot json\n[1]\n{"step": 2}\n{"step": 3, "lo')
    assert read_rows(path) == ([{"step": 1}, {"step": 2}], 2)
    assert read_rows(tmp_path / "none") == ([], 0)


def test_broken_lines_are_mentioned(tmp_path: Path) -> None:
    rows = write_tree(tmp_path, Spec(sizes=["xs"], data=[1000], seeds=[0], tasks=()))
    stage = rows[0]["stages"]["wsp"]
    with open(tmp_path / "stages" / "wsp" / stage / "metrics.jsonl", "a") as file:
        file.write("???\n")
    study = load(tmp_path, "made")
    assert len(study.notes) == 1 and "1 broken lines" in study.notes[0]


def test_unreadable_result_is_a_failed_stage(tmp_path: Path) -> None:
    rows = write_tree(tmp_path, Spec(sizes=["xs"], data=[1000], seeds=[0]))
    stage = rows[0]["stages"]["probe"]
    (tmp_path / "stages" / "linear_probe" / stage / "result.json").write_text("{")
    study = load(tmp_path, "made")
    assert sorted(study.cells["state"]) == ["done", "failed"]


def test_not_a_number_in_a_result_is_absent(tmp_path: Path) -> None:
    rows = write_tree(tmp_path, Spec(sizes=["xs"], data=[1000], seeds=[0]))
    path = tmp_path / "stages" / "linear_probe" / rows[0]["stages"]["probe"] / "result.json"
    result = json.loads(path.read_text())
    write_json(path, result | {"metrics": {"acc1": None}})
    results = load(tmp_path, "made").results
    row = results[(results["cell"] == rows[0]["id"]) & (results["task"] == "probe")]
    acc = row[row["metric"] == "acc1"].iloc[0]
    assert acc["state"] == "absent" and np.isnan(acc["value"])


def test_result_of_a_replaced_upstream_run_is_no_number(tmp_path: Path) -> None:
    rows = write_tree(tmp_path, Spec(sizes=["xs"], data=[1000], seeds=[0], inits=["mae"]))
    stages = rows[0]["stages"]
    path = tmp_path / "stages" / "wsp" / stages["wsp"] / "result.json"
    result = json.loads(path.read_text())
    write_json(path, result | {"upstream_uids": {stages["mae"]: "of-an-earlier-run"}})
    study = load(tmp_path, "made")
    wsp = study.results[study.results["task"] == "wsp"]
    assert set(wsp["state"]) == {"planned"}
    assert wsp["value"].isna().all()


def test_result_without_its_upstream_run_is_no_number(tmp_path: Path) -> None:
    rows = write_tree(tmp_path, Spec(sizes=["xs"], data=[1000], seeds=[0], inits=["random"]))
    (tmp_path / "stages" / "wsp" / rows[0]["stages"]["wsp"] / "result.json").unlink()
    write_json(
        tmp_path / "stages" / "wsp" / rows[0]["stages"]["wsp"] / "status.json",
        {"schema": 1, "state": "failed", "reason": "data", "message": None},
    )
    study = load(tmp_path, "made")
    assert study.results["value"].isna().all()
    assert set(study.results["state"]) == {"failed", "blocked"}


def test_axes_that_vary_make_the_variant(tmp_path: Path) -> None:
    extra: dict[str, Any] = {"wsp.lr": [1e-3, 3e-3], "wsp.clip": [1.0]}
    write_tree(tmp_path, Spec(sizes=["xs"], data=[1000], extra=extra, tasks=()))
    study = load(tmp_path, "made")
    assert study.varying == ("wsp.lr",)
    assert set(study.cells["variant"]) == {"wsp.lr = 0.001", "wsp.lr = 0.003"}


def test_included_cells_stand_apart_from_the_main_grid(tmp_path: Path) -> None:
    long = {"size": "xs", "data": 1000, "init": "random", "wsp.duration.samples": 64_000}
    spec = Spec(sizes=["xs"], include=[long | {"seed": s} for s in (0, 1)], tasks=())
    write_tree(tmp_path, spec)
    cells = load(tmp_path, "made").cells
    assert cells["variant"].value_counts().to_dict() == {
        "": 16,
        "wsp.duration.samples = 64k": 2,
    }
    assert cells["variant"].iloc[0] == ""


@pytest.mark.parametrize(
    ("value", "label"),
    [(16_000, "16k"), ({"samples": "16k"}, "16k samples"), ("x", "x"), (True, "True"), (0, "0")],
)
def test_axis_values_read_as_people_write_them(value: object, label: str) -> None:
    assert axis_label(value) == label
