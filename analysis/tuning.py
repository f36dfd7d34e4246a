"""What `harness tune` found: metric over rate, best rate over model size, a table of the best."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from numpy.typing import NDArray
from scipy import stats

from analysis import style
from analysis.panels import Figure, Panel
from analysis.tables import NONE, Table
from harness.ledger.files import read_json
from harness.ledger.tree import Tree

Array = NDArray[np.float64]

_WIDE = 100.0
"""A band that spans more than this factor would only tint the whole panel."""


@dataclass(frozen=True, kw_only=True)
class RateFit:
    """rate = scale * params**exponent. `reason` says why there is none."""

    reason: str = ""
    scale: float = math.nan
    exponent: float = math.nan
    ci95: tuple[float, float] = (math.nan, math.nan)
    """Interval of the exponent: Student's t, sizes - 2 degrees of freedom."""
    residual_sd: float = math.nan
    """Of the natural logarithm of the rate."""
    sizes: int = 0
    centre: float = math.nan
    spread: float = math.nan
    """Mean of ln params, and the sum of squares about it."""

    def predict(self, params: Array) -> Array:
        """The fitted rate."""
        return self.scale * params**self.exponent

    def band(self, params: Array) -> tuple[Array, Array]:
        """95 % confidence band of the line itself."""
        away = (np.log(params) - self.centre) ** 2 / self.spread
        half = _quantile(self.sizes) * self.residual_sd * np.sqrt(1 / self.sizes + away)
        return self.predict(params) * np.exp(-half), self.predict(params) * np.exp(half)


def fit_rate(params: Sequence[float] | Array, rates: Sequence[float] | Array) -> RateFit:
    """Least squares of ln rate on ln params, one best rate per size.

    The interval is that of the points' scatter about the line; with few sizes it is wide, and it
    should be. Refused on fewer than 3 distinct sizes, which cannot show any scatter.
    """
    u_P, v_P = np.log(np.asarray(params, float)), np.log(np.asarray(rates, float))
    distinct = len(np.unique(u_P))
    if distinct < 3:
        return RateFit(reason=f"{distinct} sizes; at least 3 needed", sizes=len(u_P))
    centre = float(u_P.mean())
    spread = float(((u_P - centre) ** 2).sum())
    exponent = float(((u_P - centre) * (v_P - v_P.mean())).sum() / spread)
    offset = float(v_P.mean() - exponent * centre)
    squares = float(((v_P - offset - exponent * u_P) ** 2).sum())
    sd = math.sqrt(squares / (len(u_P) - 2))
    half = _quantile(len(u_P)) * sd / math.sqrt(spread)
    return RateFit(
        scale=math.exp(offset),
        exponent=exponent,
        ci95=(exponent - half, exponent + half),
        residual_sd=sd,
        sizes=len(u_P),
        centre=centre,
        spread=spread,
    )


def _quantile(points: int) -> float:
    return float(stats.t.ppf(0.975, points - 2))


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """A search as frames. trials: a row per trial and field; best: a row per group and field."""

    facts: Mapping[str, Any]
    trials: pd.DataFrame
    best: pd.DataFrame


def load_tuning(root: Path, study: str) -> Tuning | None:
    """The study's search, None if there was none."""
    facts = read_json(Tree(root).tune(study, "json"))
    if facts is None:
        return None
    trials, best = [], []
    for group in facts["groups"]:
        match = group["match"]
        about = {
            "label": group["label"],
            "size": str(match.get("size", "all")),
            "init": str(match.get("init", "all")),
            "params": float(group["params"]),
        }
        for trial in group["trials"]:
            # A pruned trial is drawn at the last value it had; the page says so.
            last = list(trial["points"].values())[-1:] or [math.nan]
            value = trial["value"] if trial["value"] is not None else last[0]
            for key, setting in trial["set"].items():
                row = {"field": key, "setting": setting, "value": value}
                trials.append({**about, **row, "outcome": trial["outcome"]})
        for key, setting in (group["best"] or {"set": {}})["set"].items():
            at_edge = group["at_edge"].get(key, "")
            row = {"field": key, "setting": setting, "value": group["best"]["value"]}
            best.append({**about, **row, "at_edge": at_edge})
    columns = ["label", "size", "init", "params", "field", "setting", "value"]
    return Tuning(
        facts=facts,
        trials=pd.DataFrame(trials, columns=[*columns, "outcome"]),
        best=pd.DataFrame(best, columns=[*columns, "at_edge"]),
    )


def fits(tuning: Tuning) -> dict[tuple[str, str], RateFit]:
    """(field, init) -> the law of the best rate over model size, for every learning rate."""
    rates = tuning.best[tuning.best["field"].str.endswith(".lr")]
    return {
        (str(field), str(init)): fit_rate(g["params"].to_numpy(), g["setting"].to_numpy(float))
        for (field, init), g in rates.groupby(["field", "init"], sort=True)  # type: ignore[misc]
    }


# -- figures --------------------------------------------------------------------------------


def figures(tuning: Tuning) -> list[Figure]:
    """A figure per learning rate: metric over rate for each size, best rate over model size."""
    found = []
    laws = fits(tuning)
    for field in dict.fromkeys(key for key, _ in laws):
        trials = tuning.trials[tuning.trials["field"] == field]
        best = tuning.best[tuning.best["field"] == field]
        # Frames are sorted by size, so the panels grow from left to right.
        sizes = trials.sort_values("params")["size"].unique()
        panels = [_trial_panel(trials[trials["size"] == s], str(s), field, tuning) for s in sizes]
        own = {init: law for (key, init), law in laws.items() if key == field}
        panels.append(_best_panel(best, field, own))
        found.append(
            Figure(
                name=f"learning-rates-{field.replace('.', '-')}",
                title=f"Learning rates: {field}",
                caption=_caption(tuning, own),
                panels=tuple(panels),
                columns=4 if len(panels) > 4 else len(panels),
                inits=tuple(sorted(own)),
            )
        )
    return found


def _caption(tuning: Tuning, laws: Mapping[str, RateFit]) -> str:
    used = ", ".join(f"{style.init_label(k)} {n}" for k, n in tuning.facts["budget_used"].items())
    words = "; ".join(f"{style.init_label(i)}: {law_words(law)}" for i, law in laws.items())
    return (
        "Filled: finished trials; hollow: pruned ones, at their last value. Diverged trials have"
        " no value and are counted in the table. Ringed: the best. Trials used:"
        f" {used}. Last panel: the best rate of each size, with a power law of the encoder's"
        " parameters and its 95 % confidence band (Student's t; the scatter of the best trials"
        " about the line; not drawn where it spans"
        f" more than a factor of {_WIDE:.0f}). {words}."
    )


def law_words(law: RateFit) -> str:
    """The law in one line."""
    if law.reason:
        return f"no fit, {law.reason}"
    low, high = law.ci95
    return f"exponent {law.exponent:+.2f} (95 % interval {low:+.2f} to {high:+.2f})"


def _trial_panel(rows: pd.DataFrame, size: str, field: str, tuning: Tuning) -> Panel:
    seen = rows[np.isfinite(rows["value"].to_numpy(float))]
    best = tuning.best[(tuning.best["field"] == field) & (tuning.best["size"] == size)]

    def draw(ax: Axes) -> None:
        _rate_axis(ax, rows["setting"].to_numpy(float))
        for init, own in seen.groupby("init", sort=True):
            tone, mark = style.colour(str(init)), style.mark(str(init))
            done = own[own["outcome"] == "finished"].sort_values("setting")
            pruned = own[own["outcome"] != "finished"]
            sns.lineplot(x=done["setting"], y=done["value"], ax=ax, color=tone, lw=0.9, alpha=0.6)
            ax.plot(done["setting"], done["value"], mark, color=tone, ms=5, ls="none")
            ax.plot(pruned["setting"], pruned["value"], mark, mfc="none", mec=tone, ms=5, ls="none")
        for _, b in best.iterrows():
            tone = style.colour(str(b["init"]))
            ax.plot(b["setting"], b["value"], "o", mfc="none", mec=tone, ms=11, mew=1.1)
        ax.set_xlabel(field)
        ax.set_ylabel(str(tuning.facts["metric"]))

    words = "; ".join(
        f"{style.init_label(str(b['init']))} best at {b['setting']:.3g} with {b['value']:.4g}"
        for _, b in best.iterrows()
    )
    alt = f"{tuning.facts['metric']} of trials against {field}, size {size}. {words}."
    return Panel(title=size, alt=alt, draw=draw, width=3.9, height=3.3)


def _rate_axis(ax: Axes, rates: Array) -> None:
    """Log x axis with ticks at 1 and 3 of each decade: trials lie anywhere."""
    ax.set_xscale("log")
    low, high = float(rates.min()) / 1.3, float(rates.max()) * 1.3
    ax.set_xlim(low, high)
    step = (1, 3) if high / low < 1e3 else (1,)
    ticks = [m * 10.0**k for k in range(-12, 13) for m in step if low <= m * 10.0**k <= high]
    ax.xaxis.set_major_locator(style.FixedLocator(ticks))
    ax.xaxis.set_major_formatter(style.FixedFormatter([f"{t:.0e}" for t in ticks]))
    ax.xaxis.set_minor_locator(style.NullLocator())


def _best_panel(best: pd.DataFrame, field: str, laws: Mapping[str, RateFit]) -> Panel:
    def draw(ax: Axes) -> None:
        style.log_x(ax, list(best["params"]))
        style.log_y(ax, best["setting"].to_numpy(float))
        for init, own in best.groupby("init", sort=True):
            tone, law = style.colour(str(init)), laws[str(init)]
            ax.plot(own["params"], own["setting"], style.mark(str(init)), color=tone, ms=6)
            if law.reason:
                continue
            line = np.geomspace(own["params"].min(), own["params"].max(), 60)
            low, high = law.band(line)
            if (high / low).max() < _WIDE:
                ax.fill_between(line, low, high, color=tone, alpha=0.14, lw=0)
            ax.plot(line, law.predict(line), color=tone)
        ax.set_xlabel("model parameters")
        ax.set_ylabel(f"best {field}")

    words = "; ".join(f"{style.init_label(i)}: {law_words(law)}" for i, law in laws.items())
    return Panel(
        title="best rate over model size",
        alt=f"Best {field} against model parameters. {words}.",
        draw=draw,
        width=3.9,
        height=3.3,
    )


# -- the table ------------------------------------------------------------------------------


def table(tuning: Tuning) -> Table:
    """The best trial of each group, and what its budget went to."""
    rows = []
    for group in tuning.facts["groups"]:
        best, counts = group["best"], group["counts"]
        values = "; ".join(f"{k} = {v}" for k, v in best["set"].items()) if best else NONE
        edge = "; ".join(f"{k}: {end} end" for k, end in group["at_edge"].items()) or "inside"
        numbers = [str(counts.get(k, 0)) for k in ("finished", "pruned", "diverged", "open")]
        value = f"{best['value']:.4g}" if best else NONE
        rows.append((group["label"], values, value, edge if best else NONE, *numbers))
    facts = tuning.facts
    at = ", ".join(f"{k} {v}" for k, v in facts["at"].items())
    return Table(
        name="tuning",
        title="Tuned values",
        note=f"Best of {facts['trials_per_group']} trials per group by {facts['metric']}"
        f"{', at ' + at if at else ''}. One run each: neighbours differ by chance too. A best"
        " value at the end of its range means that the range was too narrow.",
        header=(
            *("group", "best", facts["metric"], "in its range"),
            *("finished", "pruned", "diverged", "open"),
        ),
        rows=tuple(rows),
        numeric=frozenset({2, 4, 5, 6, 7}),
        wide=frozenset({1}),
    )
