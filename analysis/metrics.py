"""Which numbers of a study are judged, what they are called, and which way is better."""

from __future__ import annotations

import re
from dataclasses import dataclass

import pandas as pd

from analysis.load import StudyData

_KINDS = {"linear_probe": "linear probe", "few_shot": "few-shot", "fine_tune": "fine-tuning"}
_ORDER = ("linear_probe", "few_shot", "fine_tune", "wsp")


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One judged number of one task."""

    task: str
    kind: str
    name: str
    label: str
    """As shown, for example `linear probe top-1 (probe)`."""

    @property
    def is_accuracy(self) -> bool:
        """Accuracies are better when higher, losses when lower."""
        return self.kind != "wsp"

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
    """All judged metrics, transfers first, in the order linear probe, few-shot, fine-tuning."""
    found: list[Metric] = []
    results = study.results
    if not len(results):
        return found
    for (task, kind), group in results.groupby(["task", "kind"], sort=False):
        for name in dict.fromkeys(group["metric"]):
            label = _label(str(task), str(kind), str(name))
            if label:
                metric = Metric(task=str(task), kind=str(kind), name=str(name), label=label)
                found.append(metric)
    return sorted(found, key=lambda m: (_ORDER.index(m.kind), m.task, _shots(m.name)))


def headline(metrics: list[Metric]) -> Metric | None:
    """The metric the finding speaks of: linear probe, else most shots, fine-tuning, WSP loss."""
    if not metrics:
        return None
    first = metrics[0]
    same = [m for m in metrics if m.task == first.task]
    return same[-1] if first.kind == "few_shot" else first


def _shots(name: str) -> int:
    match = re.fullmatch(r"acc1_(\d+)shot", name)
    return int(match[1]) if match else 0


def _label(task: str, kind: str, name: str) -> str | None:
    if kind == "wsp":
        return "WSP validation loss" if name == "val_loss" else None
    if kind not in _KINDS or (name != "acc1" and not _shots(name)):
        return None
    what = f"{_shots(name)}-shot" if _shots(name) else _KINDS[kind]
    usual = {"linear_probe": ("probe", "linear_probe"), "few_shot": ("few_shot",)}
    usual["fine_tune"] = ("fine_tune",)
    suffix = "" if task in usual[kind] else f" ({task})"
    return f"{what} top-1{suffix}"
