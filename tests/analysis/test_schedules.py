"""Rows of schedules that are not over are found among finished ones, and only then."""

from __future__ import annotations

import numpy as np
import pytest

from analysis.forms import CHINCHILLA
from analysis.schedules import unfinished, why_mixed

RUNS = np.repeat(np.arange(16), 5)


def checkpoints(height: float, seed: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Five checkpoints of 16 runs; those before the end lie `height` (of ln loss) above."""
    rng = np.random.default_rng(seed)
    share = np.tile([0.2, 0.4, 0.6, 0.8, 1.0], 16)
    n = np.exp(rng.uniform(np.log(4e7), np.log(1.6e10), 16))[RUNS]
    d = np.exp(rng.uniform(np.log(1e10), np.log(3e11), 16))[RUNS] * share
    noise = 0.003 * rng.normal(size=16)[RUNS] + 0.003 * rng.normal(size=80)
    y = (1.8 + 480 / n**0.35 + 2000 / d**0.36) * np.exp(noise + height * (share < 1))
    return {"N": n, "D": d}, y


def test_rows_before_the_end_of_their_run_are_unfinished() -> None:
    assert unfinished(["a", "a", "b", "b"], np.array([1.0, 2.0, 5.0, 3.0])).tolist() == [
        True,
        False,
        False,
        True,
    ]


@pytest.mark.parametrize("seed", range(3))
def test_rows_of_running_cosines_are_refused_beside_finished_ones(seed: int) -> None:
    inputs, y = checkpoints(0.02, seed)
    why = why_mixed(CHINCHILLA, inputs, y, list(RUNS), unfinished(RUNS, inputs["D"]), delta=1e-3)
    assert why is not None and why.startswith("mixed schedules: 64 rows")
    assert "above the 16 rows" in why


@pytest.mark.parametrize("seed", range(6))
def test_rows_of_a_constant_schedule_are_pooled(seed: int) -> None:
    inputs, y = checkpoints(0.0, seed)
    marked = unfinished(RUNS, inputs["D"])
    assert why_mixed(CHINCHILLA, inputs, y, list(RUNS), marked, delta=1e-3) is None
