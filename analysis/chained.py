"""Sizes -> pretraining loss -> downstream error: what the chain of both laws predicts of the
largest sizes, which neither was fitted on, beside what each stage alone is off by.

Stage 1 is L(N, D) of Hoffmann et al. 2022 (arXiv 2203.15556, eq. 2), stage 2 the curve of
`analysis.loss_to_error`. Errors of both stages can cancel or add up in the chain, which is why all
three are given (as Bhagia et al. 2024, arXiv 2412.04403, do).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from analysis.fit import DELTA, Fit, fit
from analysis.forms import CHINCHILLA, Array
from analysis.holdout import largest_out, nearest_mean
from analysis.loss_to_error import LossToError, fit_loss_to_error, observed

Mask = NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class ChainError:
    """What the held-out rows came to, in shares of the test set (loss: relative)."""

    status: Literal["predicted", "refused"]
    reason: str = ""
    rows: int = 0
    rows_fitted: int = 0
    extrapolation_factor: float | None = None
    """Largest held-out N over the largest fitted one."""
    loss_error: float | None = None
    """Stage 1 alone: geometric mean predicted over observed loss, minus 1."""
    curve_error: float | None = None
    """Stage 2 alone, from the observed losses: mean predicted minus observed error."""
    chained_error: float | None = None
    """Stage 2 of stage 1: mean predicted minus observed error."""
    chained_interval: tuple[float, float] | None = None
    """95 % interval of the same, over draws of both stages."""
    curve_rmse: float | None = None
    chained_rmse: float | None = None
    last_value_rmse: float | None = None
    """Baseline: the error at the largest fitted N, at the nearest D."""
    noise_sd: float | None = None
    """Root mean square binomial standard deviation of the held-out rows."""
    rows_inside: int | None = None
    """Rows inside their own 95 % prediction interval: both laws, runs, test samples."""


def chain(
    n: Array,
    d: Array,
    loss: Array,
    error: Array,
    *,
    chance: float,
    num_tests: Array | None = None,
    groups: Sequence[Any] | None = None,
    train: Mask | None = None,
    delta: float = DELTA,
    bootstrap: int = 400,
    seed: int = 0,
    loss_law: Fit | None = None,
) -> ChainError:
    """Fits both stages to the rows in `train` (default: all but the largest N) and predicts the
    rest. Rows are runs, (P,) each: parameters, images, loss, error, number of test samples.
    `loss_law` may bring stage 1 of the train rows.
    """
    kept = np.asarray(largest_out(CHINCHILLA, {"N": n}) if train is None else train, dtype=bool)
    out = ~kept
    facts: dict[str, Any] = {"rows": int(out.sum()), "rows_fitted": int(kept.sum())}
    if not out.any() or not kept.any():
        return ChainError(status="refused", reason="nothing to hold out, or nothing left", **facts)
    names = None if groups is None else [g for g, k in zip(groups, kept, strict=True) if k]
    inputs = {"N": n[kept], "D": d[kept]}
    options: dict[str, Any] = {"bootstrap": bootstrap, "seed": seed}
    first = loss_law or fit(CHINCHILLA, inputs, loss[kept], groups=names, delta=delta, **options)
    tests = None if num_tests is None else num_tests[kept]
    second = fit_loss_to_error(loss[kept], error[kept], chance=chance, num_tests=tests, **options)
    for stage, found in (("stage 1", first), ("stage 2", second)):
        if not found.params or found.status == "refused":
            reason = f"without the held-out rows, {stage}: {found.reason}"
            return ChainError(status="refused", reason=reason, **facts)
    wanted = first.predict({"N": n[out], "D": d[out]})
    chained, curve = second.predict(wanted), second.predict(loss[out])
    seen, sizes = error[out], np.log(np.stack([n, d], axis=1))
    numbers: dict[str, Any] = {
        "extrapolation_factor": float(n[out].max() / n[kept].max()),
        "loss_error": float(np.expm1(np.log(wanted / loss[out]).mean())),
        "curve_error": float((curve - seen).mean()),
        "chained_error": float((chained - seen).mean()),
        "curve_rmse": _rms(curve - seen),
        "chained_rmse": _rms(chained - seen),
        "last_value_rmse": _rms(nearest_mean(sizes[kept], error[kept], sizes[out]) - seen),
    }
    held_tests = None if num_tests is None else num_tests[out]
    if held_tests is not None:
        numbers["noise_sd"] = float(np.sqrt((seen * (1 - seen) / held_tests).mean()))
    numbers |= _spread(first, second, {"N": n[out], "D": d[out]}, seen, held_tests, seed)
    return ChainError(status="predicted", **facts, **numbers)


def _spread(
    first: Fit,
    second: LossToError,
    outside: dict[str, Array],
    seen: Array,
    num_tests: Array | None,
    seed: int,
) -> dict[str, Any]:
    """Draws of both stages side by side: they are independent, each of its own rows' luck."""
    if first.inner_draws is None or second.draws is None or len(first.inner_draws) < 20:
        return {}
    rng = np.random.default_rng(seed + 1)
    losses = first.draws_at(outside)
    losses = losses[rng.integers(0, len(losses), len(second.draws))]
    curve = second.draws_at(losses)
    low, high = np.percentile((curve - seen).mean(axis=1), [2.5, 97.5])
    # A new run's loss scatters about the law, its error about the curve, its test set is finite.
    luck = np.exp((first.log_rmse or 0.0) * rng.standard_normal(losses.shape))
    run_var = (second.run_sd or 0.0) ** 2
    made = observed(second.draws_at(losses * luck), num_tests, run_var, rng)
    least, most = np.percentile(made, [2.5, 97.5], axis=0)
    return {
        "chained_interval": (float(low), float(high)),
        "rows_inside": int(((least <= seen) & (seen <= most)).sum()),
    }


def _rms(values: Array) -> float:
    return float(np.sqrt(np.mean(values**2)))
