"""Batches of views for training and evaluation, read ahead by threads.

Every batch is a function of its step alone, so the stream is the same wherever it starts, however
many threads read it and over however many ranks it is shared out.
"""

# Shapes: B images of one rank's share, S side of a view in pixels, K labels in all.

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from harness.data.augment import view
from harness.data.dataset import Split
from harness.data.order import order
from harness.study.recipes import Augmentation

MAX_THREADS = 16


@dataclass(frozen=True)
class Batch:
    """Images of consecutive positions, with their labels."""

    images: Tensor
    """uint8 [B, 3, S, S]."""
    label_ids: Tensor
    """int64 [K]: hashtags of image i are label_ids[label_offsets[i]:label_offsets[i + 1]]."""
    label_offsets: Tensor
    """int64 [B + 1]."""
    class_ids: Tensor
    """int64 [B]; -1 where there is none."""
    first_position: int
    """Position of the first image in the stream of all ranks."""


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
    augment: Augmentation,
    prefetch: int = 2,
) -> Generator[Batch, None, None]:
    """Rank `rank`'s share of steps [start_step, start_step + num_steps).

    Step s covers positions [s * batch, (s + 1) * batch) of the endless stream of epochs over
    `subset`; each rank takes a contiguous share. Errors of the reading threads are raised here;
    closing the generator ends them.
    """
    if batch % ranks:
        raise ValueError(f"batch {batch} is not a multiple of {ranks} ranks")
    share = batch // ranks
    num = len(subset)
    split.prepare()

    def read(step: int) -> Batch:
        first = step * batch + rank * share
        indices = subset[order(seed, num, first, share)]
        epochs = np.arange(first, first + share) // num
        images = np.empty((share, image_size, image_size, 3), dtype=np.uint8)
        for place, (index, epoch) in enumerate(zip(indices.tolist(), epochs.tolist(), strict=True)):
            key = (seed, epoch, int(split.key_hashes[index]))
            images[place] = view(
                split.decode(index), image_size, key, augment.crop_scale, augment.flip
            )
        return _labelled(split, indices, images, first)

    return _ahead(read, range(start_step, start_step + num_steps), _threads(split, ranks), prefetch)


def eval_batches(
    split: Split, indices: np.ndarray, *, batch: int, image_size: int
) -> Generator[Batch, None, None]:
    """Whole images squashed to `image_size`, in the order of `indices`; the last may be short."""
    split.prepare()

    def read(first: int) -> Batch:
        chosen = indices[first : first + batch]
        images = np.empty((len(chosen), image_size, image_size, 3), dtype=np.uint8)
        for place, index in enumerate(chosen.tolist()):
            images[place] = view(split.decode(index), image_size, None)
        return _labelled(split, chosen, images, first)

    return _ahead(read, range(0, len(indices), batch), _threads(split, 1), 2)


def _threads(split: Split, ranks: int) -> int:
    # Cached pixels cost less than threads contending for the interpreter; decoding runs outside it.
    return 1 if split.prepare() else max(1, min(MAX_THREADS, (os.cpu_count() or 1) // ranks))


def _ahead(
    read: Callable[[int], Batch], steps: range, threads: int, prefetch: int
) -> Generator[Batch, None, None]:
    pool = ThreadPoolExecutor(threads, thread_name_prefix="data")
    waiting: deque[Future[Batch]] = deque()
    try:
        for step in steps:
            waiting.append(pool.submit(read, step))
            if len(waiting) >= prefetch + threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _labelled(split: Split, indices: np.ndarray, images: np.ndarray, first: int) -> Batch:
    starts, stops = split.label_offsets[indices], split.label_offsets[indices + 1]
    offsets = np.zeros(len(indices) + 1, dtype=np.int64)
    np.cumsum(stops - starts, out=offsets[1:])
    # Row of label_ids for every label of the batch: its image's start plus its place there.
    rows = np.arange(offsets[-1]) + np.repeat(starts - offsets[:-1], stops - starts)
    return Batch(
        images=torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2))),
        label_ids=torch.from_numpy(split.label_ids[rows].astype(np.int64)),
        label_offsets=torch.from_numpy(offsets),
        class_ids=torch.from_numpy(split.class_ids[indices]),
        first_position=first,
    )
