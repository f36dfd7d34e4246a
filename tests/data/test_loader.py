"""Batches: one stream, wherever it starts and over however many ranks it is shared out."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
import torch

from harness.data import loader
from harness.data.augment import crop_of, view
from harness.data.dataset import Dataset, Split
from harness.errors import DataError
from harness.study.recipes import Augmentation

AUGMENT = Augmentation(crop_scale=(0.3, 1.0))


def batches(split: Split, **changes: Any) -> list[loader.Batch]:
    options: dict[str, Any] = {
        "batch": 32,
        "start_step": 0,
        "num_steps": 6,
        "rank": 0,
        "ranks": 1,
        "image_size": 24,
        "augment": AUGMENT,
    }
    return list(loader.train_batches(split, split.stream(100, 1), **(options | changes)))


def assert_equal(a: loader.Batch, b: loader.Batch) -> None:
    assert a.first_position == b.first_position
    for name in ("images", "label_ids", "label_offsets", "class_ids"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name


def test_a_resumed_stream_goes_on_with_the_same_bits(scenes: Dataset) -> None:
    split = scenes.split("pretrain")
    whole = batches(split)
    for start in (1, 4):
        rest = batches(split, start_step=start, num_steps=6 - start)
        for a, b in zip(whole[start:], rest, strict=True):
            assert_equal(a, b)


def test_ranks_share_each_batch_in_order(scenes: Dataset) -> None:
    split = scenes.split("pretrain")
    whole = batches(split)
    shares = [batches(split, rank=rank, ranks=4) for rank in range(4)]
    for step, batch in enumerate(whole):
        parts = [share[step] for share in shares]
        assert torch.equal(torch.cat([part.images for part in parts]), batch.images)
        assert torch.equal(torch.cat([part.label_ids for part in parts]), batch.label_ids)
        assert [part.first_position for part in parts] == [step * 32 + 8 * r for r in range(4)]


def test_labels_and_order_against_a_plain_loop(scenes: Dataset) -> None:
    split = scenes.split("pretrain")
    for step, batch in enumerate(batches(split)):
        indices = split.stream(100, 1).at(step * 32, 32).rows
        assert batch.images.shape == (32, 3, 24, 24) and batch.images.dtype == torch.uint8
        for place, index in enumerate(indices):
            start, stop = split.label_offsets[index], split.label_offsets[index + 1]
            own = slice(batch.label_offsets[place], batch.label_offsets[place + 1])
            assert batch.label_ids[own].tolist() == split.label_ids[start:stop].tolist()
            key = (1, (step * 32 + place) // 100, int(split.key_hashes[index]))
            seen = view(split.decode(index), 24, key, AUGMENT.crop_scale, AUGMENT.flip)
            assert torch.equal(batch.images[place].permute(1, 2, 0), torch.from_numpy(seen.copy()))


def test_views_of_one_image_differ_between_epochs_and_seeds(scenes: Dataset) -> None:
    image = scenes.split("val").decode(0)
    views = [
        view(image, 24, key, (0.3, 1.0), True)
        for key in ((0, 0, 5), (0, 1, 5), (1, 0, 5), (0, 0, 6))
    ]
    for a in range(4):
        for b in range(a):
            assert (views[a] != views[b]).any()
    np.testing.assert_array_equal(views[0], view(image, 24, (0, 0, 5), (0.3, 1.0), True))


def test_crops_cover_the_stated_areas_and_flip_half_the_time() -> None:
    areas, ratios, flips = [], [], []
    for state in range(4000):
        (left, top, right, bottom), flip = crop_of(state * 7919, 40, 32, (0.2, 0.5))
        assert 0 <= left < right <= 40 and 0 <= top < bottom <= 32
        areas.append((right - left) * (bottom - top) / (40 * 32))
        ratios.append((right - left) / (bottom - top))
        flips.append(flip)
    # Uniform on 0.2..0.5: mean 0.35, 4.5 standard errors of 0.087 / sqrt(4000) either way.
    assert abs(np.mean(areas) - 0.35) < 4.5 * 0.087 / 63 and min(areas) >= 0.2 - 1e-9
    assert abs(np.mean(np.log(ratios))) < 4.5 * 0.166 / 63
    assert 3 / 4 - 1e-9 <= min(ratios) and max(ratios) <= 4 / 3 + 1e-9
    assert abs(np.mean(flips) - 0.5) < 4.5 * 0.5 / 63


def test_evaluation_sees_whole_images_in_the_order_asked_for(scenes: Dataset) -> None:
    split = scenes.split("test")
    indices = np.array([5, 3, 70, 0, 9])
    read = list(loader.eval_batches(split, indices, batch=2, image_size=32))
    assert [len(batch.images) for batch in read] == [2, 2, 1]
    images = torch.cat([batch.images for batch in read]).permute(0, 2, 3, 1).numpy()
    np.testing.assert_array_equal(images, np.stack([split.decode(i) for i in indices]))
    assert torch.cat([b.class_ids for b in read]).tolist() == split.class_ids[indices].tolist()
    assert all(len(batch.label_ids) == 0 for batch in read)


def readers() -> int:
    """Reading threads that live; other tests may have left other threads."""
    return sum(thread.name.startswith("data") for thread in threading.enumerate())


def test_errors_reach_the_consumer_and_closing_ends_the_thread(
    scenes: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    split = scenes.split("pretrain")
    before = readers()
    stream = loader.train_batches(
        split,
        split.stream(600, 0),
        batch=8,
        start_step=0,
        num_steps=10_000,
        rank=0,
        ranks=1,
        image_size=24,
        augment=AUGMENT,
    )
    next(stream)
    assert readers() > before
    stream.close()
    assert readers() == before

    def broken(*_: object) -> None:
        raise DataError("shard.tar: byte 5: gone")

    monkeypatch.setattr(split, "draw", broken)
    with pytest.raises(DataError, match="byte 5"):
        batches(split)
    assert readers() == before
