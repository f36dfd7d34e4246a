"""Batches of views for training and evaluation, read ahead by threads.

Every batch is a function of its step alone, so the stream is the same wherever it starts, however
many threads read it and over however many ranks it is shared out.
"""

# Shapes: B images of one rank's share, S side of a view in pixels, K labels in all.

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Generator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from harness.data.dataset import Split
from harness.data.order import Places, Stream
from harness.study.recipes import Augmentation

MAX_THREADS = 16
T = TypeVar("T")


@dataclass(frozen=True)
class Batch:
    """Images of consecutive positions, with their labels."""

    images: Tensor
    """uint8 [B, 3, S, S]; channels last in memory."""
    label_ids: Tensor
    """int64 [K]: hashtags of image i are label_ids[label_offsets[i]:label_offsets[i + 1]]."""
    label_offsets: Tensor
    """int64 [B + 1]."""
    class_ids: Tensor
    """int64 [B]; -1 where there is none."""
    first_position: int
    """Position of the first image in the stream of all ranks."""
    extra: Mapping[str, Tensor | list[Any]] = field(default_factory=dict)
    """What else a task needs of each image: B entries each."""


MakeBatch = Callable[[Places, int], Batch]
"""(places in the stream, position of the first) -> their batch."""


def train_batches(
    split: Split,
    stream: Stream,
    *,
    batch: int,
    start_step: int,
    num_steps: int,
    rank: int,
    ranks: int,
    image_size: int,
    augment: Augmentation,
    prefetch: int = 2,
    threads: int | None = None,
    pin: bool = False,
    make: MakeBatch | None = None,
) -> Generator[Batch, None, None]:
    """Rank `rank`'s share of steps [start_step, start_step + num_steps).

    Step s covers positions [s * batch, (s + 1) * batch) of the endless stream of epochs; each rank
    takes a contiguous share. `pin`: images in pinned memory, for a copy to CUDA that does not wait.
    `make`: draws a share's batch where it is more than images with their labels; threads call it
    side by side. Errors of the reading threads are raised here; closing the generator ends them.
    """
    if make is None:
        split.prepare()

    def read(first: int, share: int) -> Batch:
        places = stream.at(first, share)
        if make is not None:
            return make(places, first)
        keys = split.key_hashes[places.rows].tolist()
        images = _empty(share, image_size, pin)
        epochs, repeats = places.epochs.tolist(), places.repeats.tolist()
        for place, row in enumerate(places.rows.tolist()):
            key = (stream.seed, epochs[place], keys[place])
            if repeats[place]:  # an image shown again in one epoch is cropped anew
                key += (repeats[place],)
            split.draw(images[place : place + 1], row, key, augment.crop_scale, augment.flip)
        return labelled(split, places.rows, images, first)

    steps = range(start_step, start_step + num_steps)
    firsts = rank_shares(steps, batch, rank, ranks)
    return _ahead(
        lambda first: read(first, batch // ranks),
        firsts,
        threads or _threads(split, ranks, is_cached=make is None),
        prefetch,
    )


def sample_rows(
    stream: Stream, start: int, count: int, *, ranks: int, threads: int, share: int = 8
) -> np.ndarray:
    """int64 [count]: the rows at positions [start, start + count), read as training reads them.

    Each rank takes `share` samples of every step, through reading threads of its own; no image is
    decoded. What ranks and threads deliver is put together by position.
    """
    batch = share * ranks
    first_step, last_step = start // batch, -(-(start + count) // batch)
    found = np.empty((last_step - first_step) * batch, dtype=np.int64)
    for rank in range(ranks):
        firsts = rank_shares(range(first_step, last_step), batch, rank, ranks)

        def read(first: int) -> tuple[int, np.ndarray]:
            return first, stream.at(first, share).rows

        for first, rows in _ahead(read, firsts, threads, 2):
            place = first - first_step * batch
            found[place : place + len(rows)] = rows
    begin = start - first_step * batch
    return found[begin : begin + count]


def rank_shares(steps: range, batch: int, rank: int, ranks: int) -> range:
    """First position of a rank's contiguous share of each step's global batch."""
    if batch % ranks:
        raise ValueError(f"batch {batch} is not a multiple of {ranks} ranks")
    begin = rank * (batch // ranks)
    return range(steps.start * batch + begin, steps.stop * batch + begin, batch)


def eval_batches(
    split: Split,
    indices: np.ndarray,
    *,
    batch: int,
    image_size: int,
    make: MakeBatch | None = None,
) -> Generator[Batch, None, None]:
    """Whole images squashed to `image_size`, in the order of `indices`; the last may be short.

    `make`: draws a batch where it is something else, as in `train_batches`.
    """
    if make is None:
        split.prepare()

    def read(first: int) -> Batch:
        chosen = indices[first : first + batch]
        if make is not None:
            never = np.zeros(len(chosen), dtype=np.int64)
            return make(Places(chosen, never, never), first)
        images = _empty(len(chosen), image_size, pin=False)
        for place, row in enumerate(chosen.tolist()):
            split.draw(images[place : place + 1], row, None)
        return labelled(split, chosen, images, first)

    threads = _threads(split, 1, is_cached=make is None)
    return _ahead(read, range(0, len(indices), batch), threads, 2)


def _empty(num: int, side: int, pin: bool) -> Tensor:
    """One buffer for a batch: uint8 [B, 3, S, S], channels last, as decoders write them."""
    return torch.empty((num, side, side, 3), dtype=torch.uint8, pin_memory=pin).permute(0, 3, 1, 2)


def _threads(split: Split, ranks: int, is_cached: bool = True) -> int:
    # Cached pixels cost less than threads contending for the interpreter; decoding runs outside it.
    if is_cached and split.prepare():
        return 1
    return max(1, min(MAX_THREADS, (os.cpu_count() or 1) // ranks))


def _ahead(
    read: Callable[[int], T], steps: range, threads: int, prefetch: int
) -> Generator[T, None, None]:
    pool = ThreadPoolExecutor(threads, thread_name_prefix="data")
    waiting: deque[Future[T]] = deque()
    try:
        for step in steps:
            waiting.append(pool.submit(read, step))
            if len(waiting) >= prefetch + threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def labelled(split: Split, indices: np.ndarray, images: Tensor, first: int) -> Batch:
    """The images of rows `indices` with their labels; the first stands at position `first`."""
    starts, stops = split.label_offsets[indices], split.label_offsets[indices + 1]
    offsets = np.zeros(len(indices) + 1, dtype=np.int64)
    np.cumsum(stops - starts, out=offsets[1:])
    # Row of label_ids for every label of the batch: its image's start plus its place there.
    rows = np.arange(offsets[-1]) + np.repeat(starts - offsets[:-1], stops - starts)
    return Batch(
        images=images,
        label_ids=torch.from_numpy(split.label_ids[rows].astype(np.int64)),
        label_offsets=torch.from_numpy(offsets),
        class_ids=torch.from_numpy(split.class_ids[indices].astype(np.int64)),
        first_position=first,
    )
