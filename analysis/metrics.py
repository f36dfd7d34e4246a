"""Which numbers of a study are judged, what they are called, and which way is better."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd

from analysis.load import StudyData
from harness.study.measures import MEASURES, Measure

_ORDER = tuple(MEASURES)


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One judged number of one task."""

    task: str
    kind: str
    name: str
    label: str
    """As shown, for example `linear probe top-1 (probe)`."""

    @property
    def measure(self) -> Measure:
        """What is known of it beforehand."""
        found = _measure(self.kind, self.name)
        assert found is not None, f"{self.kind} is not judged by {self.name}"
        return found

    @property
    def is_accuracy(self) -> bool:
        """Accuracies are better when higher, losses when lower."""
        return self.measure.is_share

    @property
    def key(self) -> str:
        """Unique within a study."""
        return f"{self.task}.{self.name}"

    @property
    def gain_unit(self) -> str:
        """Unit of a gain as printed."""
        return "points" if self.is_accuracy else "nats"

    @property
    def gain_scale(self) -> float:
        """From the metric's own unit to the printed one."""
        return 100.0 if self.is_accuracy else 1.0

    @property
    def error_label(self) -> str:
        """Name of what is fitted: lower is better."""
        return f"{self.label} error" if self.is_accuracy else self.label

    def rows(self, results: pd.DataFrame) -> pd.DataFrame:
        """Rows of this metric."""
        return results[(results["task"] == self.task) & (results["metric"] == self.name)]

    def error(self, value: pd.Series) -> pd.Series:
        """1 - accuracy, or the loss itself."""
        return 1.0 - value if self.is_accuracy else value


def metrics_of(study: StudyData) -> list[Metric]:
    """All judged metrics, in the order of `MEASURES`: transfers first."""
    found: list[Metric] = []
    results = study.results
    if not len(results):
        return found
    for (task, kind), group in results.groupby(["task", "kind"], sort=False):
        for name in dict.fromkeys(group["metric"]):
            measure = _measure(str(kind), str(name))
            if measure is not None:
                label = _label(str(task), str(kind), str(name), measure)
                about = {"task": str(task), "kind": str(kind), "name": str(name)}
                found.append(Metric(**about, label=label))
    return sorted(found, key=_order)


def headline(metrics: list[Metric]) -> Metric | None:
    """The metric the finding speaks of: linear probe, else most shots, fine-tuning, WSP loss."""
    if not metrics:
        return None
    first = metrics[0]
    same = [m for m in metrics if m.task == first.task]
    return same[-1] if first.kind in ("few_shot", "prompt_tuning") else first


def _measure(kind: str, name: str) -> Measure | None:
    return next((m for m in MEASURES.get(kind, ()) if m.number(name) is not None), None)


def _order(metric: Metric) -> tuple[int, str, int, int]:
    place = MEASURES[metric.kind].index(metric.measure)
    number = metric.measure.number(metric.name)
    return _ORDER.index(metric.kind), metric.task, place, number or 0


def _label(task: str, kind: str, name: str, measure: Measure) -> str:
    """With the task's name where that says more than the protocol's."""
    suffix = "" if task in (kind, "probe") else f" ({task})"
    return measure.label.format(measure.number(name)) + suffix
