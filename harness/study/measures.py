"""The numbers that stages are judged by, in the order of reports: name, label, unit, direction."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Measure:
    """One judged number of a kind of stage."""

    name: str
    """As in result.json; {} stands for a number, such as the shots of `acc1_{}shot`."""
    label: str
    """As shown; {} is that number."""
    unit: Literal["share", "nats"] = "share"
    """`share`: in 0..1, higher is better, shown in percent. `nats`: a loss, lower is better."""

    @property
    def is_share(self) -> bool:
        """Accuracies, recalls and precisions; they are better when higher."""
        return self.unit == "share"

    def number(self, name: str) -> int | None:
        """The number in a metric's name, 0 if the measure has none; None for another metric."""
        match = re.fullmatch(re.escape(self.name).replace(r"\{\}", r"(\d+)"), name)
        return None if match is None else int((match.groups() or ("0",))[0])


MEASURES: dict[str, tuple[Measure, ...]] = {
    "linear_probe": (Measure(name="acc1", label="linear probe top-1"),),
    "sgd_probe": (Measure(name="acc1", label="SGD probe top-1"),),
    "knn": (Measure(name="acc1", label="k-NN top-1"),),
    "few_shot": (Measure(name="acc1_{}shot", label="{}-shot top-1"),),
    "prompt_tuning": (Measure(name="acc1_{}shot", label="{}-shot prompt tuning top-1"),),
    "fine_tune": (Measure(name="acc1", label="fine-tuning top-1"),),
    "evaluate": (Measure(name="acc1", label="fine-tuned top-1"),),
    "zero_shot": (Measure(name="acc1", label="zero-shot top-1"),),
    "retrieval": (
        Measure(name="i2t_recall1", label="image-to-text recall@1"),
        Measure(name="t2i_recall1", label="text-to-image recall@1"),
    ),
    "detection": (
        Measure(name="box_ap", label="box AP"),
        Measure(name="mask_ap", label="mask AP"),
    ),
    "video": (Measure(name="acc1", label="video top-1"),),
    "wsp": (Measure(name="val_loss", label="WSP validation loss", unit="nats"),),
}
"""By kind. A metric that is not here is kept and listed, not judged."""
