"""Lit stages on a few captions; also the child of test_lit.py's test over two ranks.

Usage as a child: lit_jobs.py OUT, with RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT set.
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
from harness.ledger.context import StageContext, StageResult
from harness.study.protocols import Lit, TextTower
from harness.study.protocols.common import Features
from harness.study.recipes import Duration, Model
from harness.study.stages import Recipe, StageFile

MODEL = Model(width=32, depth=2, heads=2, patch=8, image_size=32)
IMAGES = 192
RECIPE = Lit(
    duration=Duration(steps=8),
    batch=32,
    lr=3e-3,
    embed=24,
    text=TextTower(width=32, depth=1, heads=2),
)


def stage(recipe: Recipe, dataset: str = f"captions-{IMAGES}", **execution: Any) -> StageFile:
    """A stage on the built-in captions."""
    file = tiny.stage(recipe, **execution)
    images = file.config.images.model_copy(update={"images": IMAGES})
    config = file.config.model_copy(update={"model": MODEL, "images": images, "num_classes": 0})
    where = file.execution.model_copy(update={"dataset_path": dataset})
    return file.model_copy(update={"config": config, "execution": where})


def with_features(root: Path, context: StageContext) -> StageContext:
    """The context of a lit stage, its features made below `root` where they are not there yet."""
    folder = root / "features-stage"
    if context.rank == 0 and not folder.exists():
        transfer.run(stage(Features()), replace(tiny.context(folder), root=root))
    return replace(context, root=root, upstream={"features": folder})


def train(root: Path, folder: Path, recipe: Lit = RECIPE, **surroundings: Any) -> StageResult:
    """A lit stage in `folder`, by itself."""
    context = with_features(root, tiny.context(folder, **surroundings))
    return transfer.run(stage(recipe), context)


def main(out: Path) -> None:
    """One lit stage over all ranks; the features are there."""
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    rows = tiny.Rows()
    train(out, out / "both", metrics=rows, rank=rank, ranks=ranks)
    (out / f"rows_{rank}.json").write_text(json.dumps(rows.timeless()))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
