"""The finding says what the numbers say, and no more."""

from __future__ import annotations

import re

import pytest
from runtree import SIZES, Spec, Truth

from analysis import gain, laws
from analysis.finding import Counts, amount, count, paragraph
from analysis.load import StudyData
from analysis.metrics import Metric, headline, metrics_of
from tests.analysis.conftest import Make, holes


def find(study: StudyData) -> str:
    """The paragraph, as the report makes it."""
    metrics = metrics_of(study)
    return paragraph(
        study,
        headline(metrics),
        gain.paired(study, metrics),
        gain.charged_curves(study),
        gain.charged_results(study, metrics),
        laws.fit_all(study, metrics, bootstrap=40),
    )


def test_a_gain_is_called_one_with_its_interval(make: Make) -> None:
    text = find(make(Spec(truth=Truth(noise=0.005), tasks=("probe",))))
    assert text.startswith("All 64 cells are finished (2 seeds).")
    assert "the MAE stage improved linear probe top-1 by" in text
    assert "shrinks with model parameters" in text
    assert "agree on its sign at all of the 16 repeated grid points; the mean gain" in text
    # The mean gain and the two resolved trends, each with both seeds.
    assert text.count(" with seed ") == 6
    sizes = re.search(r"in points: xs \+([\d.]+), s \+([\d.]+), m \+([\d.]+), l \+([\d.]+)\.", text)
    assert sizes, text
    gains = [float(g) for g in sizes.groups()]
    truth = Truth()
    for size, found in zip(("xs", "l"), (gains[0], gains[-1]), strict=True):
        expected = [
            truth.accuracy(SIZES[size], d, "mae") - truth.accuracy(SIZES[size], d, "random")
            for d in (1_000, 4_000, 16_000, 64_000)
        ]
        assert found == pytest.approx(100 * sum(expected) / 4, abs=0.5)
    assert "shrinks with pretraining images" in text


def test_no_effect_is_called_unresolved(make: Make) -> None:
    text = find(make(Spec(truth=Truth(mae_factor=1.0, noise=0.02), tasks=("probe",))))
    assert "no effect of the MAE stage on linear probe top-1 is resolved" in text
    assert "improved" not in text and "worsened" not in text


def test_harm_is_called_harm(make: Make) -> None:
    text = find(make(Spec(truth=Truth(mae_factor=1.3, noise=0.002), tasks=("probe",))))
    assert "the MAE stage worsened linear probe top-1" in text
    assert "In none of 32 pairs does the MAE cell come down" in text


def test_partial_study_says_so_first(holed: StudyData) -> None:
    text = find(holed)
    assert text.startswith(
        "Partial: 56 of 64 cells are finished (2 failed, 2 diverged, 4 missing)."
    )
    assert count(holed) == Counts(expected=64, done=56, failed=2, diverged=2, missing=4)


@pytest.mark.parametrize("init", ["random", "mae"])
def test_one_init_makes_no_comparison(make: Make, init: str) -> None:
    text = find(make(Spec(inits=[init], sizes=["xs"], tasks=("probe",))))
    assert f"one initialization ({init}), so it cannot say what MAE buys" in text
    assert "gain" not in text


def test_nothing_done_finds_nothing(make: Make) -> None:
    text = find(make(Spec(sizes=["xs"], state_of=lambda axes, role: "planned")))
    assert text.startswith("Partial: 0 of 16 cells are finished (16 missing).")
    assert "there is no finding" in text


def test_one_grid_point_has_no_interval(make: Make) -> None:
    text = find(make(Spec(sizes=["xs"], data=[1_000], seeds=[0], tasks=("probe",))))
    assert "one seed: no statement about chance" in text
    assert "too few for an interval" in text


def test_mae_dearer_than_the_budget_is_said(make: Make) -> None:
    text = find(make(Spec(sizes=["xs"], mae_samples=64_000, tasks=())))
    assert "the MAE stage alone costs more than the random cell's whole budget" in text


def test_equal_compute_of_finished_runs_is_reported(make: Make) -> None:
    spec = Spec(
        extra={"wsp.duration.samples": [4_000, 8_000, 16_000, 32_000]},
        sizes=["xs", "s"],
        data=[1_000, 4_000],
        tasks=("probe",),
        state_of=holes,
    )
    text = find(make(spec))
    assert "Among finished runs of equal total training FLOPs, MAE stage charged in full" in text


def test_unidentified_laws_get_no_exponent(make: Make) -> None:
    text = find(make(Spec(sizes=["xs", "s"], data=[1_000, 4_000], tasks=("probe",))))
    assert "A power law over model parameters is not identified for random and MAE init." in text
    assert "Exponents" not in text


def test_an_exponent_whose_interval_reaches_the_search_limit_is_not_one(make: Make) -> None:
    # Four sizes, errors that differ by noise only: whatever alpha comes out, nothing fixed it.
    flat = Truth(params_scale=0.0, noise=0.02)
    text = find(make(Spec(truth=flat, data=[64_000], tasks=("probe",))))
    assert "A power law over model parameters is not identified" in text


def test_an_exponent_that_the_runs_fix_is_told_with_its_interval(make: Make) -> None:
    steep = Truth(params_scale=200.0, noise=0.002)
    text = find(make(Spec(truth=steep, sizes=list(SIZES), data=[64_000], tasks=("probe",))))
    assert "Exponents of linear probe top-1 error over model parameters: random 0." in text


@pytest.mark.parametrize("value", [-0.0004, 0.0, 0.0004])
def test_no_minus_before_a_zero(value: float) -> None:
    probe = Metric(task="probe", kind="linear_probe", name="acc1", label="probe")
    assert amount(value, probe) == "+0.0 points"
