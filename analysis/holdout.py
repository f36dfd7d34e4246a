"""Prediction of what was not fitted: the largest sizes left out, against simple baselines.

An error on the fitted rows says nothing about extrapolation; forms are compared by what they
predict (Alabdulmohsin et al. 2022, arXiv 2209.06640, sec. 5).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from analysis.fit import DELTA, Fit, fit, form_of
from analysis.forms import Array, Form


def largest_out(form: Form, inputs: Mapping[str, Any]) -> Array:
    """Rows to fit: those whose first input (x, N) is at most half of the largest; bool (P,).

    One size of a grid is the largest; of sizes that vary freely, all that are about as large.
    """
    first = np.asarray(inputs[form.inputs[0]], float)
    return first <= 0.5 * first.max(initial=0.0)


def held_out(
    law: str | Form,
    inputs: Mapping[str, Any],
    y: Array,
    train: Array | None = None,
    *,
    groups: Sequence[Any] | None = None,
    delta: float = DELTA,
    bootstrap: int = 400,
    seed: int = 0,
    chance: float | None = None,
    fitted: Fit | None = None,
) -> dict[str, Any]:
    """Fits the rows in `train` (default: `largest_out`) and predicts the rest.

    `log_rmse` is over the held-out rows, with the 95 % interval over bootstrap draws of the fit;
    `relative_error` is geometric mean predicted over geometric mean observed, minus 1. The same
    for the baselines: the nearest fitted row (`last_value`) and a straight line in logarithms
    (`log_log_line`). `fitted` may bring the fit of the train rows.
    """
    form = form_of(law, chance) if isinstance(law, str) else law
    y = np.asarray(y, float)
    columns = {n: np.asarray(inputs[n], float) for n in form.inputs}
    train = largest_out(form, columns) if train is None else np.asarray(train, bool)
    first = columns[form.inputs[0]]
    out: dict[str, Any] = {
        "input": form.inputs[0],
        "rows_held_out": int((~train).sum()),
        "rows_fitted": int(train.sum()),
    }
    if not (~train).any() or not train.any():
        return {**out, "status": "refused", "reason": "nothing to hold out, or nothing left to fit"}
    out["x"] = float(first[~train].max())
    out["extrapolation_factor"] = float(first[~train].max() / first[train].max())
    inside = {n: c[train] for n, c in columns.items()}
    outside = {n: c[~train] for n, c in columns.items()}
    found = fitted
    if found is None:
        names = None if groups is None else [g for g, t in zip(groups, train, strict=True) if t]
        found = fit(
            form, inside, y[train], groups=names, delta=delta, bootstrap=bootstrap, seed=seed
        )
    if not found.params or found.inner is None:
        reason = f"without the held-out rows: {found.reason}"
        return {**out, "status": "refused", "reason": reason}
    seen = np.log(y[~train])
    wanted = np.log(found.predict(outside))
    draws = None if found.inner_draws is None else np.log(found.draws_at(outside))
    nearest, line = _baselines(inside, np.log(y[train]), outside)
    return {
        **out,
        "status": found.status,
        "reason": found.reason,
        "observed": math.exp(seen.mean()),
        "predicted": math.exp(wanted.mean()),
        "relative_error": math.expm1((wanted - seen).mean()),
        "interval": _percentiles(None if draws is None else np.exp(draws.mean(axis=1))),
        "log_rmse": _rmse(wanted - seen),
        "log_rmse_interval": _percentiles(
            None if draws is None else np.sqrt(((draws - seen) ** 2).mean(axis=1))
        ),
        "rows_inside_band": _inside(draws, seen),
        "baselines": {
            "last_value": math.expm1((nearest - seen).mean()),
            "log_log_line": math.expm1((line - seen).mean()),
        },
        "baselines_log_rmse": {
            "last_value": _rmse(nearest - seen),
            "log_log_line": _rmse(line - seen),
        },
        "params": found.params,
    }


def compare(
    laws: Sequence[str],
    inputs: Mapping[str, Any],
    y: Array,
    train: Array | None = None,
    *,
    groups: Sequence[Any] | None = None,
    delta: float = DELTA,
    bootstrap: int = 200,
    seed: int = 0,
    chance: float | None = None,
    known: Mapping[str, dict[str, Any]] | None = None,
) -> list[dict[str, Any]]:
    """Forms by held-out error, best first; refused ones last, with their reason.

    Every form predicts the same rows from the same rows. `known` may bring what `held_out` found
    of a law already.
    """
    rows = []
    for law in laws:
        form = form_of(law, chance)
        found = (known or {}).get(law) or held_out(
            form,
            inputs,
            y,
            train,
            groups=groups,
            delta=delta,
            bootstrap=bootstrap,
            seed=seed,
        )
        rows.append({"law": law, "formula": form.formula, "parameters": form.size, **found})
    return sorted(rows, key=lambda r: r.get("log_rmse", math.inf))


def _baselines(
    inside: Mapping[str, Array], ln_y_P: Array, outside: Mapping[str, Array]
) -> tuple[Array, Array]:
    """ln y of the nearest fitted row in log inputs (mean of equals), and of a plane in logs."""
    known = np.log(np.stack(list(inside.values()), axis=1))
    asked = np.log(np.stack(list(outside.values()), axis=1))
    nearest = nearest_mean(known, ln_y_P, asked)
    ones = np.ones((len(known), 1))
    solved, *_ = np.linalg.lstsq(np.concatenate([ones, known], axis=1), ln_y_P, rcond=None)
    return nearest, solved[0] + asked @ solved[1:]


def nearest_mean(known_PI: Array, value_P: Array, asked_QI: Array) -> Array:
    """Mean value of the known rows nearest to each asked point, (Q,): by the sum of distances
    along the inputs, rows as near as the nearest included.
    """
    # Many rows share their inputs (seeds), so distances are those of points.
    points_GI, place_P = np.unique(known_PI, axis=0, return_inverse=True)
    asked_HI, place_Q = np.unique(asked_QI, axis=0, return_inverse=True)
    far_HG = np.abs(asked_HI[:, None] - points_GI[None]).sum(axis=2)
    near_HG = far_HG <= far_HG.min(axis=1, keepdims=True) * (1 + 1e-9) + 1e-12
    rows_G = np.bincount(place_P.ravel())
    sums_G = np.bincount(place_P.ravel(), weights=value_P)
    return ((near_HG @ sums_G) / (near_HG @ rows_G))[place_Q.ravel()]


def _rmse(difference: Array) -> float:
    return float(np.sqrt(np.mean(difference**2)))


def _percentiles(values: Array | None) -> list[float] | None:
    if values is None or len(values) < 20:
        return None
    low, high = np.percentile(values, [2.5, 97.5])
    return [float(low), float(high)]


def _inside(draws: Array | None, seen: Array) -> int | None:
    """Held-out rows inside the fit's own band, which leaves out the rows' noise."""
    if draws is None or len(draws) < 20:
        return None
    low, high = np.percentile(draws, [2.5, 97.5], axis=0)
    return int(((low <= seen) & (seen <= high)).sum())
