"""Learning-rate schedules against hand-computed points."""

import pytest

from harness.study.recipes import Duration, Optimization
from harness.train.schedule import lr_at

STEPS = 100


def recipe(**fields: object) -> Optimization:
    base: dict[str, object] = {"duration": Duration(steps=STEPS), "lr": 1.0, "warmup": 0.1}
    return Optimization.model_validate(base | fields)


@pytest.mark.parametrize("schedule", ["cosine", "constant", "wsd"])
def test_warmup_rises_linearly_and_reaches_the_peak_at_its_last_step(schedule: str) -> None:
    chosen = recipe(schedule=schedule)
    rates = [lr_at(chosen, step, STEPS) for step in range(10)]
    assert rates == pytest.approx([0.1 * (step + 1) for step in range(10)])


def test_cosine_starts_at_the_peak_is_half_way_in_the_middle_and_ends_near_the_minimum() -> None:
    chosen = recipe(lr_min=0.2)
    assert lr_at(chosen, 10, STEPS) == pytest.approx(1.0)
    assert lr_at(chosen, 55, STEPS) == pytest.approx(0.6)
    assert lr_at(chosen, 99, STEPS) == pytest.approx(0.2, abs=1e-3)
    assert lr_at(chosen, 99, STEPS) > 0.2


def test_constant_stays() -> None:
    assert {lr_at(recipe(schedule="constant"), step, STEPS) for step in range(10, 100)} == {1.0}


def test_wsd_stays_then_falls_linearly_over_the_cooldown() -> None:
    chosen = recipe(schedule="wsd", cooldown=0.2)
    assert {lr_at(chosen, step, STEPS) for step in range(10, 81)} == {1.0}
    assert lr_at(chosen, 90, STEPS) == pytest.approx(0.5)
    assert lr_at(chosen, 99, STEPS) == pytest.approx(0.05)


def test_lengths_in_samples_are_those_samples_whatever_the_run_is_long() -> None:
    chosen = recipe(schedule="wsd", batch=10, warmup={"samples": 50}, cooldown={"steps": 4})
    for steps in (10, 40):
        rates = [lr_at(chosen, step, steps) for step in range(steps)]
        assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
        assert set(rates[5 : steps - 3]) <= {1.0}
        assert rates[steps - 3 :] == pytest.approx([0.75, 0.5, 0.25])


def test_a_warmup_that_ends_within_a_step_reaches_the_peak_in_the_next() -> None:
    chosen = recipe(schedule="constant", batch=10, warmup={"samples": 25})
    assert [lr_at(chosen, step, 40) for step in range(4)] == pytest.approx([0.4, 0.8, 1.0, 1.0])


@pytest.mark.parametrize("schedule", ["cosine", "constant", "wsd"])
def test_without_warmup_the_first_step_has_the_peak(schedule: str) -> None:
    assert lr_at(recipe(schedule=schedule, warmup=0.0), 0, STEPS) == 1.0


@pytest.mark.parametrize("steps", [1, 2, 3, 7])
@pytest.mark.parametrize("schedule", ["cosine", "constant", "wsd"])
def test_every_step_of_a_short_run_has_a_positive_rate(schedule: str, steps: int) -> None:
    chosen = recipe(schedule=schedule, warmup=0.05)
    assert all(0 < lr_at(chosen, step, steps) <= 1 for step in range(steps))
