"""Downstream error from pretraining loss: recovery, coverage under binomial noise, refusals."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from runtree import Spec, Truth

from analysis import panels, task_laws
from analysis.chained import chain
from analysis.loss_to_error import fit_loss_to_error
from analysis.metrics import metrics_of
from analysis.plain import plain
from tests.analysis.conftest import Make

CHANCE = 0.9
TRUE = {"c": 0.08, "k": 2.2, "L0": 2.4}
LOSS = np.linspace(1.4, 3.4, 24)


def curve(loss: np.ndarray) -> np.ndarray:
    share = 1 / (1 + np.exp(-TRUE["k"] * (loss - TRUE["L0"])))
    return TRUE["c"] + (CHANCE - TRUE["c"]) * share


def measured(num: int, seed: int, loss: np.ndarray = LOSS, run_sd: float = 0.0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    share = np.clip(curve(loss) + run_sd * rng.standard_normal(loss.shape), 0, 1)
    return rng.binomial(num, share) / num


def test_the_noise_free_curve_is_recovered() -> None:
    found = fit_loss_to_error(LOSS, curve(LOSS), chance=CHANCE, bootstrap=0)
    assert found.status == "converged"
    assert found.params == pytest.approx(TRUE, rel=1e-6)


@pytest.mark.slow
def test_intervals_hold_the_truth_at_the_nominal_rate_under_binomial_noise() -> None:
    inside = {name: 0 for name in TRUE}
    band, studies, num = 0, 200, 1000
    for seed in range(studies):
        found = fit_loss_to_error(
            LOSS,
            measured(num, seed),
            chance=CHANCE,
            num_tests=np.full(len(LOSS), num),
            bootstrap=100,
            seed=seed,
        )
        for name, (low, high) in found.ci95.items():
            inside[name] += low <= TRUE[name] <= high
        ends = found.band(np.array([1.8]))
        assert ends is not None
        band += bool(ends[0][0] <= curve(np.array([1.8]))[0] <= ends[1][0])
    # Three standard errors of 95 % over 200 studies are 4.6 points.
    for name, hits in {**inside, "band": band}.items():
        assert 0.90 <= hits / studies <= 0.996, (name, hits)


def test_scatter_of_the_test_set_alone_is_called_the_noise_floor() -> None:
    tests = np.full(len(LOSS), 500.0)
    found = fit_loss_to_error(LOSS, measured(500, 3), chance=CHANCE, num_tests=tests, bootstrap=0)
    expected = np.sqrt((curve(LOSS) * (1 - curve(LOSS)) / 500).mean())
    assert found.noise_sd == pytest.approx(expected, rel=0.02)
    assert found.residual_sd == pytest.approx(expected, rel=0.4)
    assert found.verdict.startswith("predictable from the loss to the noise floor")


def test_runs_that_differ_beyond_the_test_set_are_seen() -> None:
    loss = np.linspace(1.4, 3.4, 200)
    error = measured(5000, 4, loss, run_sd=0.03)
    found = fit_loss_to_error(
        loss, error, chance=CHANCE, num_tests=np.full(200, 5000.0), bootstrap=0
    )
    assert found.run_sd == pytest.approx(0.03, rel=0.15)
    assert found.verdict.startswith("not fully predictable")


def test_without_test_sizes_there_is_no_noise_floor() -> None:
    found = fit_loss_to_error(LOSS, measured(500, 3), chance=CHANCE, bootstrap=0)
    assert found.status == "converged" and found.noise_sd is None and found.noise_p is None
    assert "no noise floor" in found.verdict


@pytest.mark.parametrize(
    ("loss", "error", "reason"),
    [
        (LOSS[:4], curve(LOSS[:4]), "too few points (4); at least 5 needed"),
        (np.repeat([1.4, 2.4, 3.4], 4), curve(np.repeat([1.4, 2.4, 3.4], 4)), "3 distinct losses"),
        (LOSS, 1.0 - curve(LOSS), "no monotone law"),
        (LOSS, np.full(24, np.nan), "not finite"),
        (LOSS, curve(LOSS) + 1, "outside 0 to 1"),
    ],
)
def test_what_cannot_show_a_curve_is_refused(
    loss: np.ndarray, error: np.ndarray, reason: str
) -> None:
    found = fit_loss_to_error(loss, error, chance=CHANCE, bootstrap=0)
    assert found.status == "refused" and not found.params
    assert reason in found.reason


def test_a_span_of_losses_within_the_noise_is_refused() -> None:
    loss = np.linspace(2.40, 2.44, 24)
    error = measured(400, 8, loss)
    order = np.argsort(error)  # monotone by luck, or by choice
    found = fit_loss_to_error(
        loss,
        error[order][np.argsort(np.argsort(loss))],
        chance=CHANCE,
        bootstrap=0,
        num_tests=np.full(24, 400.0),
    )
    assert found.status == "refused" and "span of the loss too small" in found.reason


# -- chained --------------------------------------------------------------------------------


def sizes() -> tuple[np.ndarray, np.ndarray]:
    n, d = np.meshgrid([1e4, 4e4, 1.6e5, 6.4e5, 2.56e6], [1e3, 4e3, 1.6e4, 6.4e4])
    return np.repeat(n.ravel(), 2), np.repeat(d.ravel(), 2)


def test_the_noise_free_chain_predicts_the_largest_size() -> None:
    n, d = sizes()
    loss = 1.2 + 20 * n**-0.35 + 30 * d**-0.45
    found = chain(n, d, loss, curve(loss), chance=CHANCE, bootstrap=0)
    assert found.status == "predicted" and found.rows == 8
    assert found.extrapolation_factor == pytest.approx(4)
    assert found.loss_error == pytest.approx(0, abs=1e-6)
    assert found.chained_rmse == pytest.approx(0, abs=1e-5)
    assert found.last_value_rmse is not None and found.last_value_rmse > 1e-3


def test_the_chain_says_which_stage_is_wrong() -> None:
    n, d = sizes()
    loss = 1.2 + 20 * n**-0.35 + 30 * d**-0.45
    error = curve(loss)
    largest = n == n.max()
    # The loss falls as predicted; the task gets worse by 5 points at the largest size.
    found = chain(n, d, loss, error + 0.05 * largest, chance=CHANCE, bootstrap=0)
    assert found.loss_error == pytest.approx(0, abs=1e-6)
    assert found.curve_error == pytest.approx(-0.05, abs=1e-4)
    assert found.chained_error == pytest.approx(-0.05, abs=1e-4)


@pytest.mark.slow
def test_prediction_intervals_of_the_chain_hold_held_out_rows() -> None:
    n, d = sizes()
    rng = np.random.default_rng(0)
    inside = rows = 0
    for seed in range(12):
        true = 1.2 + 20 * n**-0.35 + 30 * d**-0.45
        loss = true * np.exp(0.003 * rng.standard_normal(len(n)))
        error = rng.binomial(1000, curve(loss)) / 1000
        found = chain(
            n,
            d,
            loss,
            error,
            chance=CHANCE,
            num_tests=np.full(len(n), 1000.0),
            groups=[str(i) for i in range(len(n))],
            bootstrap=100,
            seed=seed,
            delta=0.1,
        )
        assert found.rows_inside is not None and found.chained_interval is not None
        inside, rows = inside + found.rows_inside, rows + found.rows
    assert 0.88 <= inside / rows <= 1.0  # 96 rows, correlated within a study


def test_a_chain_without_enough_sizes_is_refused_with_the_stage_named() -> None:
    n, d = sizes()
    small = n <= 1.6e5
    n, d = n[small], d[small]
    loss = 1.2 + 20 * n**-0.35 + 30 * d**-0.45
    found = chain(n, d, loss, curve(loss), chance=CHANCE, bootstrap=0)
    assert found.status == "refused"
    assert "stage 1: 2 distinct N; at least 3 needed" in found.reason


# -- a study --------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_study_has_a_law_per_metric_and_init(make: Make) -> None:
    truth = Truth(noise=0.002)
    study = make(Spec(sizes=("xs", "s", "m", "l", "xl"), tasks=("probe",), truth=truth))
    laws = task_laws.task_laws(study, metrics_of(study), bootstrap=40)
    assert {(law.metric, law.init) for law in laws} == {
        ("probe.acc1", "random"),
        ("probe.acc1", "mae"),
    }
    for law in laws:
        assert law.num_tests is not None and set(law.num_tests) == {2000.0}
        assert len(law.cells) == 5 * 4 * 2
        assert plain(law.to_json())["curve"]["rows_used"] == 40
    shown = task_laws.table(laws)
    assert shown is not None and len(shown.rows) == 2
    assert all(len(row) == len(shown.header) for row in shown.rows)
    drawn = task_laws.figure(laws)
    assert drawn is not None and len(drawn.panels) == 1
    assert "<svg" in panels.panel_svg(panels.render(drawn)[0], "p")


@pytest.mark.slow
def test_unfinished_cells_are_listed_and_not_used(holed: object, make: Make) -> None:
    laws = task_laws.task_laws(holed, metrics_of(holed), bootstrap=0)  # type: ignore[arg-type]
    law = next(x for x in laws if x.init == "mae" and x.task == "probe")
    assert law.dropped and {state for _, state in law.dropped} >= {"blocked"}
    assert len(law.cells) + len(law.dropped) == 32


def test_a_refused_law_is_shown_with_its_reason_and_no_number(make: Make) -> None:
    study = make(Spec(sizes=("xs", "s"), data=(1_000,), seeds=(0,), tasks=("probe",)))
    laws = task_laws.task_laws(study, metrics_of(study), bootstrap=0)
    shown = task_laws.table([replace(law) for law in laws])
    assert shown is not None
    assert all("refused: too few points (2)" in row[-1] for row in shown.rows)
