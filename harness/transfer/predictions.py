"""predictions.parquet: what was predicted for every test image; and what follows from it."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from harness.ledger.context import StageContext, StageResult
from harness.study.stages import StageFile
from harness.transfer.samples import write_samples, write_table


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


def judge(
    ctx: StageContext, keys: Sequence[str], label_M: Tensor, pred_M: Tensor
) -> dict[str, float | None]:
    """acc1 and n_test; leaves predictions.parquet and samples.parquet."""
    right_M = (pred_M == label_M).double()
    ctx.check_lease()
    write_predictions(ctx.folder, keys, label_M, pred_M)
    write_samples(ctx.folder, {"acc1": (keys, right_M)})
    return {"acc1": right_M.mean().item(), "n_test": float(len(label_M))}


def solved(stage: StageFile, metrics: dict[str, float | None], started: float) -> StageResult:
    """The result of a stage without training steps that began at `started`."""
    return StageResult(
        metrics=metrics,
        steps=0,
        samples=0,
        flops=stage.flops,
        wall_s={
            "setup": 0.0,
            "train": time.perf_counter() - started,
            "eval": 0.0,
            "checkpoint": 0.0,
        },
    )
