"""The child of test_detection.py's test over two ranks: one detection stage on objects.

Usage: detection_jobs.py OUT, with RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT set.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import small_detector
import tiny

from harness import transfer
from harness.ledger.context import StageResult

IMAGES = 60


def train(root: Path, folder: Path, **surroundings: Any) -> StageResult:
    """Six steps of eight images, four a forward pass whatever the number of ranks."""
    recipe = small_detector.recipe(6, batch=8, score=0.01)
    stage = small_detector.stage(recipe, images=IMAGES, micro_batch=4)
    context = replace(tiny.context(folder, **surroundings), root=root)
    return transfer.run(stage, context)


def main(out: Path) -> None:
    """One stage over all ranks."""
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    rows = tiny.Rows()
    train(out, out / "both", metrics=rows, rank=rank, ranks=ranks)
    (out / f"rows_{rank}.json").write_text(json.dumps(rows.timeless()))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
