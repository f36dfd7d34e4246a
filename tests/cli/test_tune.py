"""Hyper-parameter search: the spaces people write, and what the search makes of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution

from harness.errors import UserError
from harness.tune import parse_space, search


def test_spaces_are_read_as_written() -> None:
    assert parse_space("wsp.lr=1e-4..1e-2:log") == (
        "wsp.lr",
        FloatDistribution(1e-4, 1e-2, log=True),
    )
    assert parse_space("mae.mask_ratio=0.5..0.9") == ("mae.mask_ratio", FloatDistribution(0.5, 0.9))
    assert parse_space("wsp.batch=64|128") == ("wsp.batch", CategoricalDistribution(["64", "128"]))


@pytest.mark.parametrize(
    "text", ["wsp.lr", "lr=1..2", "wsp.lr=3", "wsp.lr=2..1", "wsp.lr=0..1:log", "wsp.lr=1e..2"]
)
def test_other_spaces_are_errors_that_show_the_text(text: str) -> None:
    with pytest.raises(UserError, match=text.split("=")[0]):
        parse_space(text)


def test_search_comes_near_the_minimum_and_goes_on(tmp_path: Path) -> None:
    seen: list[float] = []

    def run(round_: Sequence[dict[str, Any]]) -> list[float | None]:
        values = [float(trial["wsp.lr"]) for trial in round_]
        seen.extend(values)
        # One in three gives no number, as a diverged run does.
        return [None if v > 0.7 else (v - 0.3) ** 2 for v in values]

    def more(trials: int) -> float:
        return search(
            tmp_path / "tune" / "study.journal",
            "cell",
            {"wsp.lr": FloatDistribution(0.0, 1.0)},
            maximize=False,
            trials=trials,
            parallel=2,
            seed=0,
            run=run,
        ).values["wsp.lr"]

    more(15)
    assert len(seen) == 15 and any(v > 0.7 for v in seen)
    assert more(25) == pytest.approx(0.3, abs=0.03)
    assert len(seen) == len(set(seen)) == 40


def test_more_is_better_when_asked(tmp_path: Path) -> None:
    best = search(
        tmp_path / "j",
        "cell",
        {"wsp.batch": CategoricalDistribution(["64", "128"])},
        maximize=True,
        trials=6,
        parallel=3,
        seed=0,
        run=lambda round_: [float(trial["wsp.batch"]) for trial in round_],
    )
    assert best.values == {"wsp.batch": "128"} and best.metric == 128 and best.finished == 6


def test_no_number_at_all_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="none of 3 trials gave a number"):
        search(
            tmp_path / "j",
            "cell",
            {"wsp.lr": FloatDistribution(0.0, 1.0)},
            maximize=False,
            trials=3,
            parallel=2,
            seed=0,
            run=lambda round_: [None] * len(round_),
        )
