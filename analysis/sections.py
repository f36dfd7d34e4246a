"""What a report is made of: the analysis of a study, and sections that show parts of it.

A section is built by a function of one `Analysis`; `analysis.report.SECTIONS` lists those functions
in the order of the page. To add one: write `def worth(a: Analysis) -> list[Section]` in a module of
its own, and its name into that list. It returns no section where the study has nothing to show.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from analysis import gain, laws, provenance, scaling, tasks, tuning
from analysis.finding import Counts, count, sentences
from analysis.load import StudyData
from analysis.metrics import Metric, headline, metrics_of
from analysis.panels import Figure
from analysis.pictures import Strip
from analysis.scaling import Scaling
from analysis.tables import Table


@dataclass(frozen=True, kw_only=True)
class Facts:
    """Names and values under a heading. An empty value is shown as not recorded."""

    title: str = ""
    rows: tuple[tuple[str, str], ...]


@dataclass(frozen=True, kw_only=True)
class Section:
    """One part of a report, the same for page and Markdown: shown in the order of its fields."""

    name: str
    """Its anchor, unique in the report: small letters, digits and hyphens."""
    title: str
    intro: str = ""
    figures: tuple[Figure, ...] = ()
    strips: tuple[Strip, ...] = ()
    tables: tuple[Table, ...] = ()
    facts: tuple[Facts, ...] = ()
    listing: str = ""
    """Text shown as it is, the study file for example."""
    frames: Mapping[str, tuple[str, pd.DataFrame]] = field(default_factory=dict)
    """Written beside the page as <key>.csv and <key>.parquet, if it has rows: (what, rows)."""
    files: Mapping[str, str] = field(default_factory=dict)
    """Text files written beside the page, by name."""
    numbers: Mapping[str, Any] = field(default_factory=dict)
    """Added to fits.json under their keys."""


@dataclass(frozen=True, kw_only=True)
class Analysis:
    """Everything that sections draw on, computed once."""

    data: StudyData
    metrics: list[Metric]
    main: Metric | None
    """The metric that the finding speaks of."""
    loss: Metric | None
    pairs: pd.DataFrame
    charged: pd.DataFrame
    charged_runs: pd.DataFrame
    worth: pd.DataFrame
    laws: list[laws.Law]
    tasks: pd.DataFrame
    tuning: tuning.Tuning | None
    origins: provenance.Origins
    finding: tuple[str, ...]
    """Its sentences."""
    counts: Counts

    wait_for_scaling: Callable[[], Scaling]

    @property
    def inits(self) -> tuple[str, ...]:
        """Of the study file's own cells."""
        return _inits(self.data)

    @property
    def scaling(self) -> Scaling:
        """Laws over size and data and what follows from them: most of a report's time."""
        return self.wait_for_scaling()

    @property
    def compares_mae(self) -> bool:
        """Whether the study has cells with an MAE stage and cells with random weights."""
        return _compares_mae(self.data)


@contextlib.contextmanager
def analysed(
    data: StudyData, root: Path, with_curves: Callable[[], None] = lambda: None
) -> Iterator[Analysis]:
    """Runs every analysis a report rests on; inside the context, the laws over size and data.

    `with_curves` is called as soon as the curves are read, which may take most of the time.
    """
    metrics = metrics_of(data)
    main = headline(metrics)
    loss = next((m for m in metrics if m.kind == "wsp"), None)
    judged = [m for m in dict.fromkeys((loss, main)) if m is not None]
    # What takes longest begins first; what reads the curves comes after that.
    with scaling.begun(data, metrics, judged, compares_mae=_compares_mae(data)) as wait:
        pairs = gain.paired(data, metrics)
        charged = gain.charged_curves(data)
        with_curves()
        charged_runs = gain.charged_results(data, metrics)
        fitted = laws.fit_all(data, metrics)
        yield Analysis(
            data=data,
            metrics=metrics,
            main=main,
            loss=loss,
            pairs=pairs,
            charged=charged,
            charged_runs=charged_runs,
            worth=gain.data_multiplier(pairs, metrics),
            laws=fitted,
            tasks=tasks.measure(data, metrics),
            tuning=tuning.load_tuning(root, data.name),
            origins=provenance.origins(data),
            finding=tuple(sentences(data, main, pairs, charged, charged_runs, fitted)),
            counts=count(data),
            wait_for_scaling=wait,
        )


def _inits(data: StudyData) -> tuple[str, ...]:
    return tuple(dict.fromkeys(data.grid["init"])) if len(data.grid) else ()


def _compares_mae(data: StudyData) -> bool:
    return {gain.WITH, gain.WITHOUT} <= {*_inits(data)}
