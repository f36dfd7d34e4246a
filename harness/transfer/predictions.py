"""predictions.parquet: what was predicted for every test image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from harness.transfer.samples import write_table


def write_predictions(
    folder: Path,
    keys: Sequence[str],
    label_M: Tensor,
    pred_M: Tensor,
    extra: Mapping[str, Sequence[int]] | None = None,
) -> None:
    """Columns key, label, pred, and those of `extra`; class ids as integers."""
    columns = {"key": list(keys), "label": label_M, "pred": pred_M, **(extra or {})}
    write_table(folder / "predictions.parquet", columns)
