"""What the MAE stage buys: paired gains, equal FLOPs, refusals."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
from runtree import SIZES, Spec, Truth

from analysis import gain
from analysis.curves import reaches, read_off
from analysis.load import StudyData
from analysis.metrics import headline, metrics_of
from tests.analysis.conftest import Make


def _of(rows: pd.DataFrame, **want: Any) -> pd.Series:
    for name, value in want.items():
        rows = rows[rows[name] == value]
    assert len(rows) == 1
    return rows.iloc[0]


def test_paired_gains_are_those_of_the_law(make: Make) -> None:
    truth = Truth()
    study = make(Spec(truth=truth))
    pairs = gain.paired(study, metrics_of(study))
    for size, images in (("xs", 1_000), ("l", 64_000)):
        row = _of(pairs, metric="probe.acc1", size=size, data=images, seed=1)
        ends = [truth.accuracy(SIZES[size], images, i) for i in ("mae", "random")]
        assert row["gain"] == pytest.approx(ends[0] - ends[1], rel=1e-12)
        row = _of(pairs, metric="wsp.val_loss", size=size, data=images, seed=0)
        ends = [truth.loss(SIZES[size], images, i) for i in ("mae", "random")]
        assert row["gain"] == pytest.approx(ends[1] - ends[0], rel=1e-12)


def test_pair_without_one_side_has_no_gain_and_a_reason(holed: StudyData) -> None:
    pairs = gain.paired(holed, metrics_of(holed))
    row = _of(pairs, metric="probe.acc1", size="xs", data=4_000, seed=0)
    assert np.isnan(row["gain"]) and row["why"] == "random: failed"
    row = _of(pairs, metric="probe.acc1", size="l", data=64_000, seed=0)
    assert np.isnan(row["gain"]) and row["why"] == "mae: blocked"
    points = gain.by_point(pairs[pairs["metric"] == "probe.acc1"])
    assert int((points["seeds"] == 0).sum()) == 3


def test_trend_recovers_slopes_in_decades() -> None:
    grid = [(n, d) for n in (1e3, 1e4, 1e5) for d in (1e3, 1e4, 1e5)]
    points = pd.DataFrame(grid, columns=["params", "data"]).assign(variant="")
    noise = np.random.default_rng(0).normal(0, 1e-4, 9)
    points["mean"] = 0.1 - 0.02 * np.log10(points["params"]) + noise
    found = gain.trend(points)
    assert found["params"]["slope"] == pytest.approx(-0.02, abs=5e-4)
    low, high = found["data"]["interval"]
    assert low < 0 < high


def test_trend_says_what_does_not_vary() -> None:
    points = pd.DataFrame({"params": [1e3] * 4, "data": [1e3, 1e4, 1e5, 1e6], "variant": ""})
    found = gain.trend(points.assign(mean=[0.1, 0.225, 0.35, 0.475]))
    assert "reason" in found["params"]
    assert found["data"]["slope"] == pytest.approx(0.125)


# -- equal total FLOPs ------------------------------------------------------------------------


def _loss_at(final: float, part: float) -> float:
    return final * (1 + 0.5 * (1 - part) ** 2)


def test_equal_flops_charge_the_whole_mae_stage(make: Make) -> None:
    truth = Truth()
    study = make(Spec(truth=truth, sizes=["xs"], data=[1_000], seeds=[0], evals=2000))
    row = gain.charged_curves(study).iloc[0]
    # MAE costs 2 and WSP 6 FLOPs a parameter and sample, for as many samples: one third.
    assert row["flops_mae_stage"] == pytest.approx(row["flops_random"] / 3)
    mae, random = (truth.loss(SIZES["xs"], 1_000, i) for i in ("mae", "random"))
    assert row["gain"] == pytest.approx(random - _loss_at(mae, 2 / 3), abs=1e-3)
    share = 1 - np.sqrt(2 * (random / mae - 1))
    assert row["share"] == pytest.approx(share, abs=1e-3)
    assert row["ratio"] == pytest.approx(1 / 3 + share, abs=1e-3)


def test_no_comparison_where_mae_alone_exceeds_the_budget(make: Make) -> None:
    study = make(Spec(sizes=["xs"], data=[1_000], seeds=[0], mae_samples=64_000))
    row = gain.charged_curves(study).iloc[0]
    assert np.isnan(row["gain"])
    assert row["why"] == "the MAE stage alone costs more than random's whole budget"
    # The other direction is still answered: dearer by more than the MAE stage.
    assert row["ratio"] > 4 / 3


def test_harmful_mae_never_reaches_the_random_loss(make: Make) -> None:
    study = make(Spec(truth=Truth(mae_factor=1.2), sizes=["xs"], data=[1_000], seeds=[0]))
    row = gain.charged_curves(study).iloc[0]
    assert np.isnan(row["ratio"]) and row["why_ratio"].startswith("never reaches")
    assert row["gain"] < 0


def test_unfinished_runs_are_in_no_comparison(holed: StudyData) -> None:
    rows = gain.charged_curves(holed)
    row = _of(rows, size="l", data=64_000, seed=0)
    assert np.isnan(row["gain"]) and row["why"] == "no finished WSP curve: mae"


def test_longer_random_runs_are_interpolated_and_never_extrapolated(make: Make) -> None:
    lengths = [4_000, 8_000, 16_000, 32_000]
    extra = {"wsp.duration.samples": lengths}
    study = make(
        Spec(extra=extra, sizes=["s"], data=[4_000], seeds=[0], mae_samples=24_000, tasks=())
    )
    metrics = metrics_of(study)
    rows = gain.charged_results(study, metrics).set_index("flops").sort_index()
    # MAE costs as much as 8k samples of WSP: the MAE run of 8k equals the random run of 16k.
    truth = Truth()
    random = truth.loss(SIZES["s"], 4_000, "random") + 200 / 16_000
    mae = truth.loss(SIZES["s"], 4_000, "mae") + 200 / 8_000
    assert rows.iloc[1]["gain"] == pytest.approx(random - mae, rel=1e-9)
    assert np.isnan(rows.iloc[3]["gain"])
    assert "both sides" in rows.iloc[3]["why"]


def test_longer_random_runs_beside_the_grid_are_compared_where_they_are(make: Make) -> None:
    long = {"size": "s", "data": 4_000, "init": "random", "seed": 0}
    study = make(
        Spec(
            sizes=["s"],
            data=[1_000, 4_000],
            seeds=[0],
            mae_samples=24_000,
            tasks=(),
            include=[long | {"wsp.duration.samples": 64_000}],
        )
    )
    metrics = metrics_of(study)
    rows = gain.charged_results(study, metrics)
    assert rows["data"].tolist() == [4_000] and rows["variant"].tolist() == [""]
    # MAE costs as much as 8k samples of WSP: 24k samples in all, between 16k and 64k.
    truth = Truth()
    share = np.log(24 / 16) / np.log(64 / 16)
    random = truth.loss(SIZES["s"], 4_000, "random") + share * 200 / 64_000
    mae = truth.loss(SIZES["s"], 4_000, "mae")
    assert rows["gain"].iloc[0] == pytest.approx(random - mae, rel=1e-9)
    # Cells that were asked for in one init only are no pair.
    assert len(gain.paired(study, metrics)) == len(gain.charged_curves(study)) == 2


def test_without_a_duration_axis_finished_runs_are_not_compared(holed: StudyData) -> None:
    assert len(gain.charged_results(holed, metrics_of(holed))) == 0


# -- curves and effective data ----------------------------------------------------------------


def test_read_off_stays_inside() -> None:
    x, y = np.array([1.0, 2.0]), np.array([10.0, 20.0])
    assert read_off(x, y, 1.5) == 15.0
    assert read_off(x, y, 0.99) is None and read_off(x, y, 2.01) is None


@pytest.mark.parametrize(
    ("y", "target", "expected"),
    [
        ([4.0, 3.0, 2.0], 2.5, (2.5, False)),
        ([4.0, 2.0, 3.0, 1.0], 2.5, (3.25, False)),  # the first dip is lost again
        ([4.0, 3.0, 2.0], 5.0, (1.0, True)),
        ([4.0, 3.0, 2.0], 1.0, None),
        ([], 1.0, None),
    ],
)
def test_reaching_means_staying(y: list[float], target: float, expected: object) -> None:
    x = np.arange(1.0, len(y) + 1)
    assert reaches(x, np.array(y), target) == expected


def test_data_multiplier_of_a_law(make: Make) -> None:
    # Without a params term, MAE divides the tail by 2, which random gets from 4 times the data.
    truth = Truth(params_scale=0.0, data_exponent=0.5, mae_factor=0.5)
    data = [1_000 * 2**i for i in range(7)]
    study = make(Spec(truth=truth, data=data, sizes=["s"], seeds=[0], tasks=()))
    metrics = metrics_of(study)
    rows = gain.data_multiplier(gain.paired(study, metrics), metrics).set_index("data")
    assert rows.loc[1_000, "multiplier"] == pytest.approx(4.0, rel=1e-9)
    assert np.isnan(float(rows.loc[64_000, "multiplier"]))
    assert rows.loc[32_000, "why"] == "beyond random's range: more than 2x"


def test_data_multiplier_is_not_identified_where_data_do_not_help(make: Make) -> None:
    study = make(Spec(truth=Truth(data_scale=-5.0), sizes=["s"], seeds=[0], tasks=()))
    metrics = metrics_of(study)
    rows = gain.data_multiplier(gain.paired(study, metrics), metrics)
    assert rows["multiplier"].isna().all()
    assert set(rows["why"]) == {"more images do not help random init here: not identified"}


def test_headline_is_the_linear_probe_then_most_shots(make: Make) -> None:
    study = make(Spec(sizes=["xs"], data=[1000], seeds=[0]))
    metrics = metrics_of(study)
    main = headline(metrics)
    assert main is not None and main.key == "probe.acc1"
    main = headline([m for m in metrics if m.kind != "linear_probe"])
    assert main is not None and main.key == "few_shot.acc1_10shot"
