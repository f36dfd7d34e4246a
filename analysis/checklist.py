"""The reporting checklist of a scaling study, filled in from what the study recorded.

Groups after Li et al. 2025, "(Mis)Fitting" (arXiv 2502.18969): hypothesis, training setup, data
collection, fitting, validation. What nothing on disk says stays empty, for the reader to see.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from analysis.diagnostics import entry
from analysis.laws import AXIS_LABELS
from analysis.load import axis_label
from analysis.sections import Analysis, Facts, Section
from analysis.style import short
from harness.units import format_seconds, format_si

_NO_FIT = "none: every fit was refused"
_RECIPE = ("batch", "lr", "schedule", "warmup", "weight_decay", "betas", "clip")


def checklist(a: Analysis) -> list[Section]:
    """Five groups of entries; an entry that cannot be filled is empty."""
    fits = [law.to_json() for law in a.laws]
    groups = (
        ("Hypothesis", _hypothesis(a, fits)),
        ("Training setup", _training(a)),
        ("Data collection", _collection(a, fits)),
        ("Fitting", _fitting(fits)),
        ("Validation", _validation(a, fits)),
    )
    facts = tuple(Facts(title=title, rows=tuple(rows.items())) for title, rows in groups)
    empty = sum(not value for group in facts for _, value in group.rows)
    total = sum(len(group.rows) for group in facts)
    intro = (
        "What a reader needs to judge or repeat a scaling study, in the five groups of (Mis)Fitting"
        " (arXiv 2502.18969), filled in from the study's files."
        f" Filled: {total - empty} of {total}."
    )
    return [Section(name="checklist", title="Reporting checklist", intro=intro, facts=facts)]


def _listed(values: Iterable[Any], most: int = 8) -> str:
    """Distinct values, in order."""
    found = list(dict.fromkeys(str(v) for v in values if v not in (None, "")))
    more = f" and {len(found) - most} more" if len(found) > most else ""
    return ", ".join(found[:most]) + more


def _span(values: Iterable[Any], digits: int = 3) -> str:
    """Smallest to largest of what is a number."""
    good = [float(v) for v in values if isinstance(v, (int, float)) and math.isfinite(v)]
    if not good:
        return ""
    low, high = f"{min(good):.{digits}g}", f"{max(good):.{digits}g}"
    return low if low == high else f"{low} to {high}"


def _joined(*parts: str) -> str:
    return "; ".join(part for part in parts if part)


# -- hypothesis -----------------------------------------------------------------------------


def _hypothesis(a: Analysis, fits: list[dict[str, Any]]) -> dict[str, str]:
    axes = [AXIS_LABELS.get(x, x) for x in dict.fromkeys(str(f["x"]) for f in fits if "x" in f)]
    held = _listed((f.get("held") for f in fits), 4)
    return {
        "Question": (a.data.question or "").strip(),
        "Form of the law": _listed((f.get("formula") for f in fits), 4),
        "What is predicted": _listed(f.get("y") for f in fits),
        "From what": _joined(", ".join(axes), f"each law along one, at {held}" if held else ""),
        "Parameters to fit": _listed(name for f in fits for name in f.get("params", {}))
        or (_NO_FIT if fits else ""),
        "Where the form comes from": _listed((f.get("source") for f in fits), 4),
    }


# -- training -------------------------------------------------------------------------------


def _training(a: Analysis) -> dict[str, str]:
    grid, data = a.data.grid, a.data
    sizes = grid.drop_duplicates("size").sort_values("params") if len(grid) else grid
    names = [f"{n} ({short(p)})" for n, p in zip(sizes["size"], sizes["params"], strict=True)]
    wsp = [s.result for s in data.stages.values() if s.kind == "wsp" and s.result]
    dataset = data.resolved.get("dataset") or {}
    study = data.resolved.get("study") or {}
    stages = study.get("stages") or {}
    images = sorted(grid["data"].unique()) if len(grid) else []
    passes = _span(r.get("passes") for r in wsp)
    flops: list[float] = grid["flops_pretrain"].tolist() if len(grid) else []
    spread = " to ".join(format_si(f(flops), "FLOPs") for f in (min, max)) if flops else ""
    code = _listed(a.origins.code, 4)
    overrides = study.get("overrides")
    axes: list[dict[str, Any]] = grid["axes"].tolist() if len(grid) else []

    def varied(name: str) -> str:
        values = [axis_label(own.get(name, "default")) for own in axes]
        return f"{name}: {_listed(values)}" if values else ""

    return {
        "Models": f"{len(names)} sizes: {_listed(names)}" if names else "",
        "How parameters are counted": "of the encoder; heads and the MAE decoder are left out",
        "Data": _joined(
            f"{dataset['name']}, {dataset.get('fingerprint', 'no fingerprint')}"
            if dataset.get("name")
            else "",
            f"distinct images: {_listed(axis_label(int(d)) for d in images)}" if images else "",
        ),
        "Repeated data": f"{passes} passes over the distinct images in WSP" if passes else "",
        "Compute": f"{spread} of pretraining a cell; counted, decoder and attention included, the"
        " MAE stage charged in full"
        if flops
        else "",
        "MAE recipe": _recipe(stages.get("mae")),
        "WSP recipe": _recipe(stages.get("wsp")),
        "What varies beside size and data": _joined(*map(varied, ("init", *data.varying))),
        "Values that differ by cell": "none" if overrides == [] else _listed(overrides or (), 4),
        "How hyperparameters were chosen": _chosen(a),
        "Seeds": f"{grid['seed'].nunique()} ({_listed(grid['seed'])})" if len(grid) else "",
        "Hardware and time": _joined(
            _listed(a.origins.devices, 4),
            f"{format_seconds(a.origins.seconds)} of process time" if a.origins.seconds else "",
        ),
        "Code": _joined(
            f"commit {code}" if code else "",
            *(f"{name} {_listed(v, 4)}" for name, v in a.origins.versions.items()),
        ),
    }


def _recipe(recipe: Mapping[str, Any] | None) -> str:
    if not recipe:
        return ""
    duration = [f"{v} {k}" for k, v in (recipe.get("duration") or {}).items() if v is not None]
    parts = [f"{name.replace('_', ' ')} {recipe[name]}" for name in _RECIPE if name in recipe]
    return ", ".join([*duration, *parts])


def _chosen(a: Analysis) -> str:
    if a.tuning is None:
        return ""
    facts = a.tuning.facts
    fields = _listed(key for g in facts["groups"] for key in (g["best"] or {"set": {}})["set"])
    return (
        f"searched: {fields}, {facts['trials_per_group']} trials for each of"
        f" {len(facts['groups'])} groups, by {facts['metric']}"
    )


# -- data collection ------------------------------------------------------------------------


def _collection(a: Analysis, fits: list[dict[str, Any]]) -> dict[str, str]:
    c = a.counts
    other = ((c.failed, "failed"), (c.diverged, "diverged"), (c.missing, "missing"))
    runs = [f"{c.done} of {c.expected} cells finished"]
    runs += [f"{number} {word}" for number, word in other if number]
    dropped = Counter(row["reason"] for f in fits for row in f.get("rows_dropped", ()))
    reasons = [f"{count} {reason}" for reason, count in dropped.most_common()]
    tested = [s.result["metrics"].get("n_test") for s in a.data.stages.values() if _has(s.result)]
    schedules = [
        (s or {}).get("schedule")
        for s in ((a.data.resolved.get("study") or {}).get("stages") or {}).values()
        if isinstance(s, Mapping)
    ]
    evaluations = a.data.finished_wsp.groupby("cell", observed=True).size()
    return {
        "Runs": ", ".join(runs) if c.expected else "",
        "Points of a run in a fit": "one, its final result; points along a curve enter no fit"
        if fits
        else "",
        "Learning-rate schedule": _joined(_listed(schedules), "only runs that reached its end")
        if _listed(schedules)
        else "",
        "Evaluations along WSP": _span(evaluations.tolist()),
        "Metrics": _listed((m.label for m in a.metrics), 12),
        "Size of the test sets": _span(tested, 6),
        "Rows left out of fits": _joined(*reasons) or ("none" if fits else ""),
        "Weights that are published": "",
    }


def _has(result: Mapping[str, Any]) -> bool:
    return isinstance(result.get("metrics"), Mapping)


# -- fitting --------------------------------------------------------------------------------


def _fitting(fits: list[dict[str, Any]]) -> dict[str, str]:
    done = [f for f in fits if f.get("params")]
    none = _NO_FIT if fits and not done else ""
    states = Counter(str(f["status"]).replace("_", " ") for f in fits)
    shares = [
        f["starts_at_best"] / f["starts"]
        for f in done
        if f.get("starts") and f.get("starts_at_best") is not None
    ]
    deltas = _listed(f"{f['delta']:g}" for f in done if f.get("delta"))
    rows = {
        "Objective": f"Huber loss on log residuals, summed; delta {deltas}" if deltas else "",
        "Algorithm": _listed((entry(f, "algorithm", "optimiser", "optimizer") for f in done), 3),
        "Starting points": _joined(
            _span(f.get("starts") for f in done),
            f"{min(shares):.0%} or more of them reach the best optimum" if shares else "",
        ),
        "Gradient norm at the optimum": _span(f.get("gradient_norm") for f in done),
        "Condition number": _span(entry(f, "condition_number", "condition") for f in done),
        "Rows of a fit": _span((f.get("rows_used") for f in done), 6),
        "Distinct values and span": _joined(
            _span(f.get("distinct_x") for f in done),
            f"{span} decades" if (span := _span(f.get("span_decades") for f in done)) else "",
        ),
        "Outcome": ", ".join(f"{count} {state}" for state, count in states.most_common()),
    }
    return {name: value or none for name, value in rows.items()}


# -- validation -----------------------------------------------------------------------------


def _validation(a: Analysis, fits: list[dict[str, Any]]) -> dict[str, str]:
    done = [f for f in fits if f.get("params")]
    held = [f["heldout"] for f in fits if "relative_error" in (f.get("heldout") or {})]
    errors = [abs(float(h["relative_error"])) for h in held]
    simple = [abs(float(v)) for h in held for v in (h.get("baselines") or {}).values()]
    boot = [f["bootstrap"] for f in done if isinstance(f.get("bootstrap"), Mapping)]
    forms = list(dict.fromkeys(str(f["law"]) for f in fits if "law" in f))
    seeds = a.data.grid["seed"].nunique() if len(a.data.grid) else 0
    own = a.tasks[a.tasks["low"].notna()] if len(a.tasks) else a.tasks
    return {
        "Extrapolation": f"largest x held out in {len(held)} of {len(fits)} fits; median error"
        f" {np.median(errors):.1%}, of simple baselines {np.median(simple):.1%}"
        if errors and simple
        else "",
        "Intervals": _joined(
            "95 % bootstrap percentiles" if boot else "",
            _listed((f"over {b['unit']}" for b in boot if b.get("unit")), 2),
            _listed((f"{b['draws']} draws" for b in boot if b.get("draws")), 2),
        ),
        "Noise between seeds": "not estimable: one seed"
        if seeds == 1
        else f"{seeds} seeds, shown as points and ranges"
        if seeds
        else "",
        "Noise of the test set": "bootstrap over test samples, table of transfer tasks"
        if len(own)
        else "",
        "Residuals": f"log RMSE {rmse}" if (rmse := _span(f.get("log_rmse") for f in done)) else "",
        "Other forms compared": _listed(forms) if len(forms) > 1 else "",
    }
