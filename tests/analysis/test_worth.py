"""What an initialization is worth: the changed parameter is found, multipliers are true."""

from __future__ import annotations

import numpy as np
import pytest

from analysis.arms import Arm, arms
from analysis.which_parameter import which_parameter
from analysis.worth import worth

TRUTH = {"E": 1.0, "A": 60.0, "alpha": 0.4, "B": 80.0, "beta": 0.35}
SIZES, IMAGES = np.geomspace(2e3, 2e5, 5), np.geomspace(1e3, 1e5, 5)


def two_arms(change: dict[str, float], noise: float = 0.004, seed: int = 0) -> tuple[Arm, Arm]:
    rng = np.random.default_rng(seed)
    rows = []
    for n in SIZES:
        for d in IMAGES:
            for repeat in range(2):
                for init in ("random", "mae"):
                    p = {**TRUTH, **(change if init == "mae" else {})}
                    y = p["E"] + p["A"] / n ** p["alpha"] + p["B"] / d ** p["beta"]
                    pair = f"{n} {d} {repeat}"
                    about = {"params": n, "data": d, "init": init, "pair": pair}
                    y *= np.exp(noise * rng.normal())
                    rows.append({**about, "y": y, "cell": f"{pair} {init}"})
    return arms(rows, "mae", "random")


FLOPS = {(float(n), float(d)): (6 * n * d, 6 * n * 3e4) for n in SIZES for d in IMAGES}


@pytest.mark.parametrize(
    ("name", "value"),
    [("E", 0.95), ("A", 54.0), ("alpha", 0.42), ("B", 65.0), ("beta", 0.37)],
)
def test_the_parameter_that_was_changed_is_found(name: str, value: float) -> None:
    found = which_parameter(*two_arms({name: value}), delta=1e-3, bootstrap=100)
    assert found.changed == (name,)
    row = next(r for r in found.rows if r.changes == (name,))
    truth = value - TRUTH[name] if name in ("alpha", "beta") else np.log(value / TRUTH[name])
    low, high = row.ci95[name]
    assert row.values[name] == pytest.approx(truth, abs=high - low)
    # What does not see a pair is predicted as well as the noise allows.
    assert row.cv_log_rmse == pytest.approx(0.004, rel=0.15)


@pytest.mark.long
def test_the_interval_of_a_change_holds_the_truth_at_the_nominal_rate() -> None:
    inside = 0
    for seed in range(30):
        found = which_parameter(
            *two_arms({"B": 65.0}, seed=seed), delta=1e-3, bootstrap=100, seed=seed
        )
        low, high = next(r for r in found.rows if r.changes == ("B",)).ci95["B"]
        inside += low <= np.log(65 / 80) <= high
    # 28.5 expected; a binomial of 30 at 0.95 is below 25 once in 300 times.
    assert inside >= 25


def test_two_changed_parameters_are_not_called_one() -> None:
    found = which_parameter(*two_arms({"E": 0.9, "beta": 0.4}), delta=1e-3, bootstrap=0)
    assert found.changed == ()
    assert "more than one parameter" in found.verdict


@pytest.mark.long
def test_no_change_is_called_none_at_the_nominal_rate() -> None:
    verdicts = [
        which_parameter(*two_arms({}, seed=seed), delta=1e-3, bootstrap=0).verdict
        for seed in range(12)
    ]
    # Six tests each: at most a few of twelve studies see what is not there.
    assert sum(v.startswith("no change") for v in verdicts) >= 7


def test_a_change_too_small_to_place_is_said_to_be_so() -> None:
    found = which_parameter(*two_arms({"E": 0.985}, noise=0.008), delta=1e-3, bootstrap=0)
    assert found.changed == () or "cannot tell" in found.verdict or found.changed == ("E",)
    assert all(0 <= row.p_against_none <= 1 for row in found.rows)


def test_a_data_shift_multiplies_the_data_everywhere() -> None:
    random, mae = two_arms({"B": 65.0})
    found = worth(random, mae, FLOPS, delta=1e-3, bootstrap=200)
    assert found.status == "answered"
    true = (80 / 65) ** (1 / 0.35)
    inside = 0
    rows = [r for r in found.rows if r.d < IMAGES[-1]]
    for row in rows:
        low, high = row.multiplier_ci95
        inside += low <= true <= high
        assert row.multiplier == pytest.approx(true, rel=0.06)
        assert row.transferred == pytest.approx((row.multiplier - 1) * row.d)
        # The MAE stage in full, WSP of both at 6 N D.
        cost = (row.effective_d * 6 * row.n) / (6 * row.n * row.d + 6 * row.n * 3e4)
        assert row.flops_multiplier == pytest.approx(cost, rel=1e-6)
        assert not row.ossified
    assert inside >= 0.7 * len(rows)


def test_beyond_the_random_arm_there_is_no_number() -> None:
    found = worth(*two_arms({"B": 65.0}), FLOPS, delta=1e-3, bootstrap=0)
    last = [r for r in found.rows if r.d == IMAGES[-1]]
    assert last and all(np.isnan(r.multiplier) for r in last)
    assert all("beyond the random arm's range" in r.why for r in last)


def test_an_initialization_that_holds_a_model_back_is_flagged() -> None:
    found = worth(*two_arms({"B": 100.0}), FLOPS, delta=1e-3, bootstrap=200)
    rows = [r for r in found.rows if not r.why]
    assert rows and all(r.transferred < 0 for r in rows)
    assert sum(r.ossified for r in rows) > 0.8 * len(rows)


def test_arms_that_identify_no_law_are_refused() -> None:
    random, mae = two_arms({})
    few = random.n < SIZES[2]
    short = Arm(
        n=random.n[few],
        d=random.d[few],
        y=random.y[few],
        units=tuple(np.array(random.units)[few]),
        pairs=tuple(np.array(random.pairs)[few]),
    )
    assert "2 distinct N" in which_parameter(short, mae, delta=1e-3).reason
    assert "2 distinct N" in worth(short, mae, FLOPS, delta=1e-3).reason
