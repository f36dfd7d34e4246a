"""What a report is made of: the analysis of a study, and sections that show parts of it.

A section is built by a function of one `Analysis`; `analysis.report.SECTIONS` lists those functions
in the order of the page. To add one: write `def worth(a: Analysis) -> list[Section]` in a module of
its own, and its name into that list. It returns no section where the study has nothing to show.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from analysis import gain, laws, provenance, tasks, tuning
from analysis.finding import Counts, count, sentences
from analysis.load import StudyData
from analysis.metrics import Metric, headline, metrics_of
from analysis.panels import Figure
from analysis.pictures import Strip
from analysis.scaling import Scaling, compute
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

    @property
    def inits(self) -> tuple[str, ...]:
        """Of the study file's own cells."""
        return tuple(dict.fromkeys(self.data.grid["init"])) if len(self.data.grid) else ()

    @cached_property
    def scaling(self) -> Scaling:
        """Laws over size and data and what follows from them: most of a report's time."""
        judged = [m for m in dict.fromkeys((self.loss, self.main)) if m is not None]
        return compute(self.data, self.metrics, judged, compares_mae=self.compares_mae)

    @property
    def compares_mae(self) -> bool:
        """Whether the study has cells with an MAE stage and cells with random weights."""
        return {gain.WITH, gain.WITHOUT} <= {*self.inits}


def analyse(data: StudyData, root: Path) -> Analysis:
    """Runs every analysis a report rests on."""
    metrics = metrics_of(data)
    main = headline(metrics)
    loss = next((m for m in metrics if m.kind == "wsp"), None)
    pairs = gain.paired(data, metrics)
    charged = gain.charged_curves(data)
    charged_runs = gain.charged_results(data, metrics)
    fitted = laws.fit_all(data, metrics)
    return Analysis(
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
    )
