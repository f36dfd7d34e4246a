"""predictions.parquet: what was predicted for every test image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from harness.models.weight_files import write_atomically


def write_predictions(
    folder: Path,
    keys: Sequence[str],
    label_M: Tensor,
    pred_M: Tensor,
    extra: Mapping[str, Sequence[int]] | None = None,
) -> None:
    """Columns key, label, pred, and those of `extra`; class ids as integers."""
    # Here and not above: 0.2 s that only transfers need.
    import pyarrow
    from pyarrow import parquet

    table = pyarrow.table(
        {
            "key": pyarrow.array(keys).dictionary_encode(),
            "label": pyarrow.array(label_M.numpy()),
            "pred": pyarrow.array(pred_M.numpy()),
            **{name: pyarrow.array(values) for name, values in (extra or {}).items()},
        }
    )
    write_atomically(
        folder / "predictions.parquet",
        lambda path: parquet.write_table(table, path, compression="zstd"),
    )
