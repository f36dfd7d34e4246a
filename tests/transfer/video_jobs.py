"""Video stages on few moving objects; also the child of test_video_task.py's test over two ranks.

Usage as a child: video_jobs.py ROOT OUT, with RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR,
MASTER_PORT set; `motion-64` is below ROOT.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import tiny

from harness import transfer
from harness.ledger.context import StageContext
from harness.study.protocols import Video
from harness.study.recipes import Duration, Model
from harness.study.stages import StageFile

MODEL = Model(width=32, depth=2, heads=2, patch=4, image_size=32)
RECIPE = Video(
    frames=4,
    stride=2,
    tube=2,
    inflation="mean",
    pool="mean",
    lr=3e-3,
    duration=Duration(steps=6),
    batch=8,
    layer_decay=0.9,
    temporal_views=2,
    spatial_views=1,
)


def stage(
    recipe: Video,
    dataset: str = "motion-64",
    *,
    classes: int = 8,
    model: Model = MODEL,
    num: int = 64,
    **execution: Any,
) -> StageFile:
    """A stage on `num` training clips of a dataset."""
    file = tiny.stage(recipe, images=num, **execution)
    config = file.config.model_copy(update={"num_classes": classes, "model": model})
    where = file.execution.model_copy(update={"dataset_path": dataset})
    return file.model_copy(update={"config": config, "execution": where})


def in_root(root: Path, folder: Path, **more: Any) -> StageContext:
    """The surroundings of a stage, datasets below `root`."""
    return replace(tiny.context(folder, **more), root=root)


def main(root: Path, out: Path) -> None:
    """One stage over all ranks."""
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    rows = tiny.Rows()
    context = in_root(root, out / "both", metrics=rows, rank=rank, ranks=ranks)
    # The dataset has fewer test clips than a set made anew would have.
    transfer.run(stage(RECIPE, str(root / "datasets" / "motion-64-v1")), context)
    (out / f"rows_{rank}.json").write_text(json.dumps(rows.timeless()))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
