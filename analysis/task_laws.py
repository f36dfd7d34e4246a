"""Laws of transfer tasks in two stages: sizes -> pretraining loss -> downstream error.

Stage 1 is L(N, D) of Hoffmann et al. 2022 (arXiv 2203.15556, eq. 2), stage 2 the curve of
`analysis.loss_to_error`; chained, they predict a task from sizes alone (Gadre et al. 2024, arXiv
2403.08540; Bhagia et al. 2024, arXiv 2412.04403). What the chain is worth is its error at the
largest sizes, which neither stage was fitted on, beside the errors of the stages alone.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from analysis import style
from analysis.chained import ChainError, chain
from analysis.fit import Fit, fit
from analysis.forms import CHINCHILLA, Array
from analysis.holdout import largest_out
from analysis.load import StudyData
from analysis.loss_to_error import LossToError, fit_loss_to_error
from analysis.metrics import Metric
from analysis.panels import Figure, Panel
from analysis.surface import ROW_ORDER, Surface, draws_for
from analysis.tables import NONE, Table
from harness.ledger.files import read_json

LOSS = ("wsp", "val_loss")
"""Kind of stage and metric that stage 1 predicts."""
BINOMIAL_KINDS = frozenset(
    {
        *("linear_probe", "sgd_probe", "knn", "few_shot", "prompt_tuning", "fine_tune"),
        *("evaluate", "zero_shot", "retrieval", "video"),
    }
)
"""Judged by a mean over test samples that are right or wrong; average precision is none."""


@dataclass(frozen=True, kw_only=True)
class TaskLaw:
    """Both stages for one metric and one init, and what their chain predicted."""

    metric: str
    label: str
    task: str
    init: str
    variant: str
    chance_from: str
    loss_law: Fit
    curve: LossToError
    chain: ChainError
    loss: Array
    error: Array
    num_tests: Array | None
    cells: tuple[str, ...]
    dropped: tuple[tuple[str, str], ...]
    """(cell, reason) of rows without both numbers."""

    def to_json(self) -> dict[str, Any]:
        """Everything but the rows."""
        return {
            "law": "task",
            **{k: getattr(self, k) for k in ("metric", "task", "init", "variant", "chance_from")},
            "loss_law": self.loss_law.to_json(),
            "curve": self.curve.to_json(),
            "chain": dict(self.chain.__dict__),
            "cells_used": list(self.cells),
            "rows_dropped": [{"cell": c, "reason": r} for c, r in self.dropped],
        }


# -- a study --------------------------------------------------------------------------------


def task_laws(
    study: StudyData,
    metrics: Sequence[Metric],
    *,
    bootstrap: int = 400,
    seed: int = 0,
    inits: Collection[str] | None = None,
    known: Surface | None = None,
) -> list[TaskLaw]:
    """Both stages for every accuracy of the study, by init; refused ones with their reason.

    `inits`: of these alone. `known`: the surface of the loss, whose fits are taken over for tasks
    of the very same cells.
    """
    results = study.grid_results
    is_loss = (results["kind"] == LOSS[0]) & (results["metric"] == LOSS[1])
    losses = results[is_loss].drop_duplicates("cell").set_index("cell")["value"]
    laws = _LossLaws(seed=seed, known={} if known is None else _fits_of(known))
    found = []
    for metric in metrics:
        if not metric.is_accuracy:
            continue
        rows = metric.rows(results).drop_duplicates("cell")
        for (variant, init), group in rows.groupby(["variant", "init"], sort=False):  # type: ignore[misc]
            if inits is not None and init not in inits:
                continue
            about = {"variant": str(variant), "init": str(init)}
            found.append(_law(study, metric, group, losses, about, laws, bootstrap))
    return found


def in_order(study: StudyData, metrics: Sequence[Metric], laws: Iterable[TaskLaw]) -> list[TaskLaw]:
    """Laws as `task_laws` gives them: by metric, then as variants and inits come in the study."""
    results = study.grid_results
    pairs = dict.fromkeys(zip(results["variant"], results["init"], strict=True))
    place = {(str(variant), str(init)): i for i, (variant, init) in enumerate(pairs)}
    number = {metric.key: i for i, metric in enumerate(metrics)}
    return sorted(laws, key=lambda law: (number[law.metric], place[law.variant, law.init]))


def _fits_of(surface: Surface) -> dict[tuple[str, ...], Fit]:
    """Its fits by the cells they rest on, in their order."""
    cells = surface.rows["cell"].to_numpy(str)
    found = {tuple(map(str, cells)): surface.fit}
    if surface.inner_fit is not None:
        kept = largest_out(CHINCHILLA, {"N": surface.rows["params"]})
        found[tuple(map(str, cells[kept]))] = surface.inner_fit
    return found


@dataclass(frozen=True, kw_only=True)
class _LossLaws:
    """Stage 1 by the cells it was fitted on: tasks of the same cells share it."""

    seed: int
    known: dict[tuple[str, ...], Fit] = field(default_factory=dict)

    def of(self, cells: Array, n: Array, d: Array, loss: Array, draws: int) -> Fit:
        key = tuple(map(str, cells))
        if key not in self.known:
            options: dict[str, Any] = {"bootstrap": draws, "seed": self.seed}
            self.known[key] = fit(CHINCHILLA, {"N": n, "D": d}, loss, groups=key, **options)
        return self.known[key]


def _law(
    study: StudyData,
    metric: Metric,
    rows: pd.DataFrame,
    losses: pd.Series,
    about: dict[str, str],
    laws: _LossLaws,
    bootstrap: int,
) -> TaskLaw:
    rows = rows.sort_values(list(ROW_ORDER))
    loss = losses.reindex(rows["cell"]).to_numpy(float)
    error = metric.error(rows["value"]).to_numpy(float)
    good = np.isfinite(loss) & np.isfinite(error)
    dropped = [
        (str(cell), str(state) if not np.isfinite(e) else "no pretraining loss")
        for cell, state, e, g in zip(rows["cell"], rows["state"], error, good, strict=True)
        if not g
    ]
    used, loss, error = rows[good], loss[good], error[good]
    chance, chance_from = _chance(study, used)
    tests = _num_tests(study, metric, used)
    n, d = used["params"].to_numpy(float), used["data"].to_numpy(float)
    cells = used["cell"].to_numpy(str)
    options: dict[str, Any] = {"chance": chance, "num_tests": tests}
    draws = draws_for(len(n), bootstrap)
    options |= {"bootstrap": draws, "seed": laws.seed}
    held = ChainError(status="refused", reason="no finished rows")
    if len(n):
        kept = np.asarray(largest_out(CHINCHILLA, {"N": n}), dtype=bool)
        known = laws.of(cells[kept], n[kept], d[kept], loss[kept], draws)
        held = chain(n, d, loss, error, train=kept, loss_law=known, **options)
    return TaskLaw(
        metric=metric.key,
        label=metric.error_label,
        task=metric.task,
        chance_from=chance_from,
        loss_law=laws.of(cells, n, d, loss, draws),
        curve=fit_loss_to_error(loss, error, **options),
        chain=held,
        loss=loss,
        error=error,
        num_tests=tests,
        cells=tuple(map(str, cells)),
        dropped=tuple(dropped),
        **about,
    )


def _chance(study: StudyData, rows: pd.DataFrame) -> tuple[float, str]:
    """Error of guessing among the classes of the task's head; 1, the largest there is, if unknown.

    Retrieval guesses among as many candidates as there are test samples: next to 1.
    """
    for stage in rows["stage"]:
        facts = study.stages[str(stage)]
        config = (read_json(facts.folder.stage) or {}).get("config") or {}
        classes = int(config.get("num_classes") or 0)
        if classes > 1:
            return 1.0 - 1.0 / classes, f"{classes} classes"
        break
    return 1.0, "number of classes unknown: the largest error there is"


def _num_tests(study: StudyData, metric: Metric, rows: pd.DataFrame) -> Array | None:
    """Test samples of every row, as its result says; None where that is not known, or no mean."""
    if metric.kind not in BINOMIAL_KINDS or not len(rows):
        return None
    found = [study.stages[str(s)].result.get("metrics", {}).get("n_test") for s in rows["stage"]]
    numbers = np.array([np.nan if v is None else float(v) for v in found])
    return numbers if (numbers >= 1).all() else None


# -- shown ----------------------------------------------------------------------------------


def table(laws: Sequence[TaskLaw]) -> Table | None:
    """A row per metric and init: the curve, its scatter beside the noise, the errors held out."""
    if not laws:
        return None
    rows = []
    for law in laws:
        curve, held = law.curve, law.chain
        floor = _with_interval(curve, "c", 100.0)
        rows.append(
            (
                law.label,
                style.init_label(law.init) + (f", {law.variant}" if law.variant else ""),
                str(curve.rows_used),
                floor,
                _points(curve.noise_sd),
                _points(curve.residual_sd),
                NONE if held.loss_error is None else f"{100 * held.loss_error:+.1f} %",
                _points(held.curve_error, signed=True),
                _points(held.chained_error, signed=True) + _span(held.chained_interval),
                _points(held.last_value_rmse),
                NONE if held.rows_inside is None else f"{held.rows_inside} of {held.rows}",
                _words(law),
            )
        )
    return Table(
        name="task-laws",
        title="Tasks predicted from the pretraining loss",
        note="Errors in percentage points. Noise: the binomial standard deviation of the test set"
        " (an upper bound, since all rows are judged on the same samples; few-shot numbers average"
        " several splits). Scatter: of rows about the curve from loss to error. Predicted minus"
        " observed at the largest sizes, which were not fitted: loss from sizes, error from the"
        " observed loss, and both chained, with the 95 % interval of both fits. Last value: root"
        " mean square error of taking over the nearest fitted row.",
        header=(
            *("error", "init", "rows", "floor c", "noise", "scatter", "loss alone"),
            *("curve alone", "chained", "last value", "rows inside", "says"),
        ),
        rows=tuple(rows),
        numeric=frozenset(range(2, 11)),
        wide=frozenset({11}),
    )


def _points(value: float | None, signed: bool = False) -> str:
    if value is None:
        return NONE
    return f"{100 * value:+.2f}" if signed else f"{100 * value:.2f}"


def _span(interval: tuple[float, float] | None) -> str:
    return "" if interval is None else f" [{100 * interval[0]:+.2f} to {100 * interval[1]:+.2f}]"


def _with_interval(curve: LossToError, name: str, scale: float) -> str:
    if name not in curve.params:
        return NONE
    text = f"{scale * curve.params[name]:.1f}"
    if name in curve.ci95:
        low, high = curve.ci95[name]
        text += f" [{scale * low:.1f} to {scale * high:.1f}]"
    return text


def _words(law: TaskLaw) -> str:
    if law.curve.status == "refused":
        return f"refused: {law.curve.reason}"
    parts = [law.curve.verdict]
    if law.chain.status == "refused":
        parts.append(f"chain refused: {law.chain.reason}")
    return "; ".join(parts)


def figure(laws: Sequence[TaskLaw]) -> Figure | None:
    """A panel per metric: error over pretraining loss, every init, test noise as bars."""
    shown = [law for law in laws if len(law.loss) and not law.variant]
    if not shown:
        return None
    panels = []
    for key in dict.fromkeys(law.metric for law in shown):
        own = [law for law in shown if law.metric == key]
        panels.append(
            Panel(
                title=own[0].label,
                alt="; ".join(f"{style.init_label(law.init)}: {_words(law)}" for law in own),
                draw=lambda ax, own=own: _draw(ax, own),
            )
        )
    return Figure(
        name="task-laws",
        title="Downstream error over pretraining loss",
        caption="Points: runs; bars: 95 % of the test set's binomial noise. Lines: the fitted"
        " curve between a floor and chance, with its 95 % band; none where the fit was refused.",
        panels=tuple(panels),
        inits=tuple(dict.fromkeys(law.init for law in shown)),
    )


def _draw(ax: Axes, laws: Sequence[TaskLaw]) -> None:
    for law in laws:
        tone = style.colour(law.init)
        error = 100 * law.error
        if law.num_tests is not None:
            half = 196 * np.sqrt(law.error * (1 - law.error) / law.num_tests)
            ax.vlines(law.loss, error - half, error + half, color=tone, lw=0.8, alpha=0.6)
        ax.plot(law.loss, error, style.mark(law.init), color=tone, ms=4, ls="none")
        if law.curve.theta is None:
            continue
        line = np.linspace(law.loss.min(), law.loss.max(), 80)
        band = law.curve.band(line)
        if band is not None:
            ax.fill_between(line, 100 * band[0], 100 * band[1], color=tone, alpha=0.14, lw=0)
        ax.plot(line, 100 * law.curve.predict(line), color=tone)
    ax.set_xlabel("WSP validation loss")
    ax.set_ylabel("error, percent")
