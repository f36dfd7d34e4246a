"""The section of transfer tasks: values, intervals over test samples, paired differences."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from runtree import Spec, write_tree

from analysis import report, tasks
from analysis.load import StudyData, load
from analysis.metrics import metrics_of
from tests.analysis.conftest import Make

NUM = 4000
SPEC = Spec(sizes=("xs", "l"), data=(1_000, 64_000), seeds=(0, 1), tasks=("probe", "fine_tune"))


def write_samples(study: StudyData, task: str) -> dict[str, np.ndarray]:
    """0 or 1 for every test image of every stage; hard images are hard for all encoders.

    Returns init -> chance of each image at the largest point, and sets the results to the means.
    """
    hard = np.random.default_rng(5).normal(size=NUM) * 2.5
    keys = [f"test-{i:06d}" for i in range(NUM)]
    chances = {}
    results = study.results[study.results["metric"] == "acc1"]
    for _, row in results[results["task"] == task].iterrows():
        skill = {"mae": 1.3, "random": 1.0}[row["init"]]
        chance = 1 / (1 + np.exp(-(skill - hard)))
        rng = np.random.default_rng([row["seed"], len(row["init"])])
        right = (rng.random(NUM) < chance).astype(float)
        chances[str(row["init"])] = chance
        folder = study.stages[str(row["stage"])].folder.path
        rows = pd.DataFrame({"metric": "acc1", "key": keys, "value": right})
        rows.sample(frac=1, random_state=1).to_parquet(folder / "samples.parquet")
        text = (folder / "result.json").read_text()
        old = f'"acc1": {row["value"]}'
        assert old in text
        (folder / "result.json").write_text(text.replace(old, f'"acc1": {right.mean()}'))
    return chances


@pytest.fixture
def measured(tmp_path: Path) -> tuple[pd.DataFrame, dict[str, np.ndarray]]:
    root = tmp_path / "runs"
    write_tree(root, SPEC)
    chances = write_samples(load(root, SPEC.name), "probe")
    study = load(root, SPEC.name)
    return tasks.measure(study, metrics_of(study)), chances


def row_of(frame: pd.DataFrame, task: str, init: str) -> pd.Series:
    return frame[(frame["task"] == task) & (frame["init"] == init)].iloc[0]


def test_only_the_largest_point_of_the_grid_is_shown(
    measured: tuple[pd.DataFrame, dict[str, np.ndarray]],
) -> None:
    frame, _ = measured
    assert set(frame["size"]) == {"l"} and set(frame["data"]) == {64_000}
    assert len(frame) == 2 * 3  # tasks x (mae, random, difference)


def test_intervals_are_those_of_the_central_limit_theorem(
    measured: tuple[pd.DataFrame, dict[str, np.ndarray]],
) -> None:
    frame, chances = measured
    for init, chance in chances.items():
        row = row_of(frame, "probe", init)
        # Of the mean of two independent draws an image, and of the choice of images.
        variance = chance.var() + (chance * (1 - chance)).mean() / 2
        half = 1.96 * math.sqrt(variance / NUM)
        assert row["high"] - row["low"] == pytest.approx(2 * half, rel=0.08)
        assert row["low"] < row["value"] < row["high"]
        assert row["samples"] == NUM and row["seeds"] == 2


def test_a_paired_difference_is_tighter_than_two_numbers_side_by_side(
    measured: tuple[pd.DataFrame, dict[str, np.ndarray]],
) -> None:
    frame, chances = measured
    both = [row_of(frame, "probe", init) for init in ("mae", "random")]
    difference = row_of(frame, "probe", tasks.DIFFERENCE)
    assert difference["value"] == pytest.approx(both[0]["value"] - both[1]["value"])
    unpaired = math.hypot(*(row["high"] - row["low"] for row in both))
    noise = sum((c * (1 - c)).mean() / 2 for c in chances.values())
    spread = (chances["mae"] - chances["random"]).var()
    expected = 2 * 1.96 * math.sqrt((noise + spread) / NUM)
    assert difference["high"] - difference["low"] == pytest.approx(expected, rel=0.08)
    assert difference["high"] - difference["low"] < 0.8 * unpaired


def test_a_stage_without_samples_has_a_value_and_no_interval(
    measured: tuple[pd.DataFrame, dict[str, np.ndarray]],
) -> None:
    frame, _ = measured
    row = row_of(frame, "fine_tune", "mae")
    assert math.isfinite(row["value"]) and math.isnan(row["low"]) and row["samples"] == 0


def test_replicates_are_paired_by_their_number(tmp_path: Path) -> None:
    root = tmp_path / "runs"
    write_tree(root, SPEC)
    study = load(root, SPEC.name)
    shared = np.random.default_rng(0).normal(0, 0.05, 200)
    for _, row in study.results[study.results["task"] == "probe"].iterrows():
        own = np.random.default_rng(row["seed"] + 2 * len(row["init"])).normal(0, 0.002, 200)
        rows = {"metric": "acc1", "replicate": range(200), "value": row["value"] + shared + own}
        folder = study.stages[str(row["stage"])].folder.path
        pd.DataFrame(rows).to_parquet(folder / "replicates.parquet")
    frame = tasks.measure(study, metrics_of(study))
    own, pair = row_of(frame, "probe", "mae"), row_of(frame, "probe", tasks.DIFFERENCE)
    assert own["high"] - own["low"] == pytest.approx(2 * 1.96 * 0.05, rel=0.15)
    assert pair["high"] - pair["low"] == pytest.approx(2 * 1.96 * 0.002, rel=0.2)


def test_other_test_samples_make_no_pair(tmp_path: Path) -> None:
    root = tmp_path / "runs"
    write_tree(root, SPEC)
    study = load(root, SPEC.name)
    for _, row in study.results[study.results["task"] == "probe"].iterrows():
        keys = [f"{row['init']}-{i}" for i in range(50)]
        rows = {"metric": "acc1", "key": keys, "value": np.arange(50) % 2}
        folder = study.stages[str(row["stage"])].folder.path
        pd.DataFrame(rows).to_parquet(folder / "samples.parquet")
    frame = tasks.measure(study, metrics_of(study))
    assert math.isfinite(row_of(frame, "probe", "mae")["low"])
    assert math.isnan(row_of(frame, "probe", tasks.DIFFERENCE)["low"])


def test_a_missing_side_is_shown_by_its_state(make: Make) -> None:
    def state(axes: dict[str, object], role: str) -> str:
        return "diverged" if axes["init"] == "mae" and role == "wsp" else "done"

    study = make(Spec(sizes=("xs",), data=(1_000,), seeds=(0,), state_of=state))
    frame = tasks.measure(study, metrics_of(study))
    shown = tasks.table(study, frame)
    assert shown is not None
    place = shown.header.index("MAE init")
    assert {row[place] for row in shown.rows} == {"blocked"}
    assert {row[shown.header.index("MAE - random, paired")] for row in shown.rows} == {"no pair"}


def test_the_report_has_table_and_figure_of_the_tasks(tmp_path: Path) -> None:
    root = tmp_path / "runs"
    write_tree(root, SPEC)
    write_samples(load(root, SPEC.name), "probe")
    result = report.build(root, SPEC.name, tmp_path / "out")
    page = result.index.read_text()
    assert 'id="tasks"' in page and 'id="table-tasks"' in page
    frame = pd.read_csv(result.index.parent / "tasks.csv")
    shown = frame[(frame["task"] == "probe") & (frame["init"] == "mae")].iloc[0]
    text = f"{100 * shown['value']:.1f} [{100 * shown['low']:.1f} to {100 * shown['high']:.1f}]"
    assert text in page
    assert (result.index.parent / "figures" / "tasks.png").is_file()
