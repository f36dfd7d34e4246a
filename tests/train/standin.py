"""A tiny data set in memory with the interface of harness.data, for tests of the loop."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

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
        labels = [
            self.label_ids[self.label_offsets[i] : self.label_offsets[i + 1]] for i in index
        ]
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
