"""Rows from schedules that are not over, pooled with finished ones: found out and refused.

A learning rate that has not come down yet holds the loss up. Curves read before the end of a
cosine bend the law (Hoffmann et al. 2022, arXiv 2203.15556, appendix B; Haegele et al. 2024, arXiv
2405.18392), and no amount of data mends it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from analysis import resample
from analysis.forms import Array, SumOfPowers
from analysis.joint import FACTOR, joint
from analysis.solve import Problem, minimise

_DRAWS = 200
_LEAST = 2e-3
"""Relative height of unfinished rows that matters: a loss of 0.2 % more."""


def unfinished(runs: Sequence[Any], progress: Array) -> Array:
    """Rows before the last of their run, by `progress` (samples, tokens, FLOPs); (P,) of bool."""
    last: dict[Any, float] = {}
    for run, at in zip(runs, progress, strict=True):
        last[run] = max(last.get(run, -np.inf), float(at))
    return np.array([at < last[run] * (1 - 1e-9) for run, at in zip(runs, progress, strict=True)])


def why_mixed(
    form: SumOfPowers,
    inputs: Mapping[str, Any],
    y: Array,
    runs: Sequence[Any],
    marked: Array,
    *,
    delta: float,
    seed: int = 0,
) -> str | None:
    """Why marked (unfinished) rows cannot be pooled with the rest; None if they may be.

    The law is fitted with a constant factor on the marked rows. Its 99 % bootstrap interval over
    runs must not exclude 1, unless the factor is below 0.2 %.
    """
    marked = np.asarray(marked, bool)
    # Too few of either kind: a factor would only follow the noise of one run.
    if min(marked.sum(), (~marked).sum()) < form.size + 1:
        return None
    log_IP = np.log(np.stack([np.asarray(inputs[n], float) for n in form.inputs]))
    centre = log_IP.mean(axis=1)
    both = joint(form, (FACTOR,), marked, centre)
    problem = Problem(form=both, u_IP=log_IP - centre[:, None], ln_y_P=np.log(y), delta=delta)
    ones = np.ones((1, len(y)))
    starts = both.starts(problem.u_IP, y)
    solved = minimise(problem, starts, ones, reweighted=30, newton=40)
    best = solved.theta_BK[int(np.argmin(solved.objective_B))]
    none = np.zeros((0, both.size))
    drawn = resample.refit(problem, best, none, ones[0], runs, _DRAWS, seed)
    if len(drawn.theta_BK) < 100:
        return None
    low, high = np.quantile(drawn.theta_BK[:, -1], [0.005, 0.995])
    height = float(best[-1])
    if abs(height) < _LEAST or low <= 0 <= high:
        return None
    way = "above" if height > 0 else "below"
    return (
        f"mixed schedules: {int(marked.sum())} rows are from runs that had not ended and lie"
        f" {abs(np.expm1(height)):.1%} {way} the {int((~marked).sum())} rows at the end of theirs"
        f" (99 % interval {np.expm1(low):+.1%} to {np.expm1(high):+.1%}); fit one kind at a time"
    )
