"""A tiny packed dataset for tests of the loop: 16 pixels, colours that tell the class, and noise.

A stage of a dozen steps on it takes a fraction of a second.
"""

from __future__ import annotations

import atexit
import functools
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from harness import transfer
from harness.data.dataset import Dataset, open_dataset
from harness.data.index import build_index, shard_entry, write_index
from harness.data.png import encode_png
from harness.data.shards import Sample, list_shard, write_shard
from harness.ledger.context import StageContext, StageResult
from harness.ledger.files import write_json
from harness.study.datasets import DatasetMeta
from harness.study.protocols.common import Features, OnFeatures
from harness.study.recipes import Model, Optimization
from harness.study.stages import Execution, Images, Recipe, StageConfig, StageFile

NUM_HASHTAGS, NUM_CLASSES, SIZE = 12, 5, 16
COUNTS = {"pretrain": 256, "val": 50, "train": 200, "test": 120}
HASHTAGS = [f"#{letter}" for letter in "abcdefghijkl"]
CLASSES = list("abcde")


@functools.cache
def folder() -> Path:
    """The dataset's folder; written once per process, removed at its end."""
    top = Path(tempfile.mkdtemp(prefix="tiny-"))
    atexit.register(shutil.rmtree, top, ignore_errors=True)
    shards, indexes = {}, {}
    for split in COUNTS:
        path = top / split / "000000.tar"
        write_shard(path, _samples(split))
        listed = list_shard(path)
        shards[split] = [shard_entry(path, top, len(listed))]
        index = build_index([listed], shards[split], HASHTAGS, CLASSES)
        indexes[split] = write_index(top, split, index, shards)
    meta = DatasetMeta(
        name="tiny",
        fingerprint="tiny",
        image_size=SIZE,
        hashtags=HASHTAGS,
        classes=CLASSES,
        splits=COUNTS,
        shards=shards,
        indexes=indexes,
    )
    write_json(top / "dataset.json", meta.model_dump(mode="json", by_alias=True))
    return top


def _samples(split: str) -> Iterator[Sample]:
    rng = np.random.default_rng(len(split))
    class_ids = rng.integers(0, NUM_CLASSES, COUNTS[split])
    colour = np.random.default_rng(9).integers(0, 130, (NUM_CLASSES, SIZE // 8, SIZE // 8, 3))
    colour = colour.repeat(8, 1).repeat(8, 2)
    for place, class_id in enumerate(class_ids.tolist()):
        noise = rng.integers(0, 120, (SIZE, SIZE, 3))
        tags = [HASHTAGS[(class_id + 5 * k) % NUM_HASHTAGS] for k in range(rng.integers(1, 4))]
        yield Sample(
            key=f"{split}-{place:05d}",
            image=encode_png((noise + colour[class_id]).astype(np.uint8)),
            image_type="png",
            hashtags=tags,
            class_id=class_id,
        )


def opened(root: Path) -> Dataset:
    """The dataset, with its cache below `root`."""
    return open_dataset(str(folder()), root)


MODEL = Model(width=32, depth=2, heads=2, patch=4, image_size=SIZE)


def stage(recipe: Recipe, *, images: int = 200, seed: int = 0, **execution: Any) -> StageFile:
    """A stage file; the number of steps is that of the recipe's duration."""
    kind = getattr(recipe, "kind", None) or recipe.protocol
    steps = int(recipe.duration.amount) if isinstance(recipe, Optimization) else 0
    config = StageConfig(
        kind=kind,
        size="d32x2",
        model=MODEL,
        images=Images(
            dataset="tiny",
            fingerprint="tiny",
            split="pretrain" if kind in ("mae", "wsp") else "train",
            images=images,
        ),
        num_classes={"mae": 0, "wsp": NUM_HASHTAGS}.get(kind, NUM_CLASSES),
        recipe=recipe,
        steps=steps,
        seed=seed,
    )
    return StageFile(
        id=f"{kind}-test",
        kind=kind,
        name=kind,
        config=config,
        params=1,
        flops=1e6,
        execution=Execution(dataset_path=str(folder()), **execution),
    )


def judge(stage_file: StageFile, surroundings: StageContext) -> StageResult:
    """Runs a transfer stage, and before it the features it needs, as a study would."""
    recipe = stage_file.config.recipe
    if isinstance(recipe, OnFeatures):
        passed = Features(pool=recipe.pool, resize=recipe.resize)
        images, seed = stage_file.config.images.images, stage_file.config.seed
        before = surroundings.folder / "before"
        before.mkdir(exist_ok=True)
        own = stage(passed, images=images, seed=seed, device=stage_file.execution.device)
        transfer.run(own, replace(surroundings, folder=before))
        surroundings = replace(surroundings, upstream={"features": before}, upstream_weights=None)
    return transfer.run(stage_file, surroundings)


def without_key_bias(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights for a comparison to rounding: the attention keys' biases are set to zero.

    Softmax ignores them, so their true gradient is zero and AdamW scales mere rounding up to a
    full step: two right implementations may disagree there.
    """
    result = {name: value.clone() for name, value in tensors.items()}
    for name, value in result.items():
        if name.endswith("attn.qkv.bias"):
            third = len(value) // 3
            value[third : 2 * third] = 0
    return result


def assert_same_to_rounding(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> None:
    """Equal weights after a few steps of AdamW, which were summed up in another order.

    AdamW divides by the gradient's own size: where that is near zero, rounding moves single
    weights by a noticeable part of a step. On average nothing moves.
    """
    assert one.keys() == other.keys()
    one, other = without_key_bias(one), without_key_bias(other)
    for name, value in one.items():
        difference = (value - other[name]).abs()
        assert difference.max() < 5e-5, name
        assert difference.mean() < 1e-6, name


class Rows:
    """Metric rows in memory."""

    def __init__(self, broken_at: int | None = None) -> None:
        self.rows: list[dict[str, Any]] = []
        self.synced = 0
        self.broken_at = broken_at

    def append(self, row: Any) -> None:
        if row["step"] == self.broken_at:
            raise ConnectionError("the process dies here")
        self.rows.append(dict(row))

    def rewind(self, step: int) -> None:
        self.rows = [row for row in self.rows if row["step"] <= step]

    def sync(self) -> None:
        self.synced = len(self.rows)

    def timeless(self) -> list[dict[str, Any]]:
        """The rows without wall_s, the one column that may differ between equal runs."""
        return [{k: v for k, v in row.items() if k != "wall_s"} for row in self.rows]


class StopAfter:
    """should_stop that says yes from its n-th call on."""

    def __init__(self, calls: int) -> None:
        self.calls = calls

    def __call__(self) -> bool:
        self.calls -= 1
        return self.calls <= 0


def context(
    stage_folder: Path,
    *,
    metrics: Rows | None = None,
    upstream: Path | None = None,
    should_stop: Any = lambda: False,
    rank: int = 0,
    ranks: int = 1,
) -> StageContext:
    """The surroundings of a stage, without ledger."""
    stage_folder.mkdir(parents=True, exist_ok=True)
    return StageContext(
        rank=rank,
        ranks=ranks,
        folder=stage_folder,
        root=stage_folder,
        upstream_weights=upstream,
        metrics=metrics or Rows(),
        report=lambda **scalars: None,
        should_stop=should_stop,
        check_lease=lambda: None,
    )
