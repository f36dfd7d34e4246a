"""A tiny data set in memory with the interface of harness.data, for tests of the loop.

Sixteen pixels, noise from a generator: a stage of a dozen steps takes a fraction of a second.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from harness.ledger.context import StageContext
from harness.study.recipes import (
    Execution,
    Images,
    Model,
    Optimization,
    Recipe,
    StageConfig,
    StageFile,
)

NUM_HASHTAGS, NUM_CLASSES, SIZE = 12, 5, 16


@dataclass
class Batch:
    """As harness.data.loader.Batch."""

    images: Tensor
    label_ids: Tensor
    label_offsets: Tensor
    class_ids: Tensor
    first_position: int


class Split:
    """Images whose colours tell the class; one to three hashtags."""

    def __init__(self, name: str, num_samples: int) -> None:
        rng = np.random.default_rng(len(name))
        self.name, self.num_samples = name, num_samples
        self.keys = [f"{name}-{i:05d}" for i in range(num_samples)]
        self.class_ids = rng.integers(0, NUM_CLASSES, num_samples)
        counts = rng.integers(1, 4, num_samples)
        self.label_offsets = np.concatenate([[0], counts.cumsum()]).astype(np.int64)
        self.label_ids = np.concatenate(
            [
                (c + np.arange(k) * 5) % NUM_HASHTAGS
                for c, k in zip(self.class_ids, counts, strict=True)
            ]
        ).astype(np.int32)
        noise = rng.integers(0, 120, (num_samples, 3, SIZE, SIZE))
        colour = np.random.default_rng(9).integers(0, 130, (NUM_CLASSES, 3, SIZE // 8, SIZE // 8))
        colour = colour.repeat(8, 2).repeat(8, 3)
        self.pixels = torch.from_numpy((noise + colour[self.class_ids]).astype(np.uint8))

    def subset(self, num: int) -> np.ndarray:
        """The first `num` of a fixed order."""
        return np.random.default_rng(0).permutation(self.num_samples)[:num]

    def batch(self, index: np.ndarray, first: int) -> Batch:
        """Rows `index`."""
        labels = [self.label_ids[self.label_offsets[i] : self.label_offsets[i + 1]] for i in index]
        offsets = np.concatenate([[0], np.cumsum([len(part) for part in labels])])
        return Batch(
            images=self.pixels[torch.from_numpy(index)],
            label_ids=torch.from_numpy(np.concatenate(labels).astype(np.int64)),
            label_offsets=torch.from_numpy(offsets.astype(np.int64)),
            class_ids=torch.from_numpy(self.class_ids[index].astype(np.int64)),
            first_position=first,
        )


class Dataset:
    """As harness.data.dataset.Dataset."""

    def __init__(self) -> None:
        self.splits = {
            "pretrain": Split("pretrain", 256),
            "val": Split("val", 50),
            "train": Split("train", 200),
            "test": Split("test", 120),
        }
        self.meta = SimpleNamespace(
            split_for=lambda role: role, classes=list("abcde"), image_size=SIZE
        )

    def split(self, name: str) -> Split:
        """One split."""
        return self.splits[name]


def open_dataset(spec: str, root: Any) -> Dataset:
    """The one data set there is."""
    return Dataset()


def train_batches(
    split: Split,
    subset: np.ndarray,
    *,
    seed: int,
    batch: int,
    start_step: int,
    num_steps: int,
    rank: int,
    ranks: int,
    image_size: int,
    augment: Any,
    prefetch: int = 2,
) -> Iterator[Batch]:
    """Epochs of seeded permutations; rank r reads the contiguous share r of each batch."""
    share = batch // ranks
    for step in range(start_step, start_step + num_steps):
        places = np.arange(step * batch + rank * share, step * batch + (rank + 1) * share)
        orders = {
            e: np.random.default_rng((seed, e)).permutation(len(subset))
            for e in set(places // len(subset))
        }
        index = np.array([subset[orders[p // len(subset)][p % len(subset)]] for p in places])
        yield split.batch(index, int(places[0]))


def eval_batches(
    split: Split, indices: np.ndarray, *, batch: int, image_size: int
) -> Iterator[Batch]:
    """In order."""
    for first in range(0, len(indices), batch):
        yield split.batch(indices[first : first + batch], first)


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
            dataset="stand-in",
            fingerprint="none",
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
        execution=Execution(dataset_path="stand-in", **execution),
    )


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


class Rows:
    """Metric rows in memory."""

    def __init__(self, broken_at: int | None = None) -> None:
        self.rows: list[dict[str, Any]] = []
        self.broken_at = broken_at

    def append(self, row: Any) -> None:
        if row["step"] == self.broken_at:
            raise ConnectionError("the process dies here")
        self.rows.append(dict(row))

    def rewind(self, step: int) -> None:
        self.rows = [row for row in self.rows if row["step"] <= step]

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
    folder: Path,
    *,
    metrics: Rows | None = None,
    upstream: Path | None = None,
    should_stop: Any = lambda: False,
    rank: int = 0,
    ranks: int = 1,
) -> StageContext:
    """The surroundings of a stage, without ledger."""
    folder.mkdir(parents=True, exist_ok=True)
    return StageContext(
        rank=rank,
        ranks=ranks,
        folder=folder,
        root=folder,
        upstream_weights=upstream,
        metrics=metrics or Rows(),
        report=lambda **scalars: None,
        should_stop=should_stop,
        check_lease=lambda: None,
    )


def install(patch: Any) -> None:
    """Put this data set in the place of harness.data; `patch` is setattr-like, by name."""
    patch("harness.train.loop.open_dataset", open_dataset)
    patch("harness.transfer.features.open_dataset", open_dataset)
    patch("harness.transfer.finetune.open_dataset", open_dataset)
    patch("harness.data.loader.train_batches", train_batches)
    patch("harness.data.loader.eval_batches", eval_batches)
