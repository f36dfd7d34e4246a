"""Which frames, and which part of them, make a view of a clip."""

import numpy as np
import pytest

from harness.data import clips as clips_module
from harness.data.augment import view
from harness.data.clips import ClipSampler, augmented_clips, multi_view_clips
from harness.data.dataset import Split, open_dataset
from harness.data.order import ONE, Stream
from harness.data.video import read_frames
from harness.study.recipes import Augmentation

DENSE = ClipSampler(frames=4, stride=3)
SEGMENTS = ClipSampler(frames=4, stride=1, sampling="segments")


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> Split:
    return open_dataset("motion-40", tmp_path_factory.mktemp("root")).split("train")


def test_dense_clips_start_anywhere_and_keep_their_stride() -> None:
    starts = set()
    for key in range(200):
        chosen = DENSE.train(14, (5, key))
        assert np.diff(chosen).tolist() == [3, 3, 3] and chosen[-1] < 14
        starts.add(int(chosen[0]))
    assert starts == {0, 1, 2, 3, 4}
    assert DENSE.train(14, (5, 7)).tolist() == DENSE.train(14, (5, 7)).tolist()


def test_of_a_video_that_is_too_short_the_last_frame_is_taken_again() -> None:
    assert DENSE.train(5, (1,)).tolist() == [0, 3, 4, 4]
    assert DENSE.test(5, 2).tolist() == [[0, 3, 4, 4]] * 2
    assert SEGMENTS.test(2, 1).tolist() == [[0, 0, 1, 1]]
    assert DENSE.test(1, 1).tolist() == SEGMENTS.test(1, 1).tolist() == [[0, 0, 0, 0]]


def test_segments_have_one_frame_each() -> None:
    seen: list[set[int]] = [set() for _ in range(4)]
    for key in range(300):
        for place, frame in enumerate(SEGMENTS.train(20, (key,)).tolist()):
            seen[place].add(frame)
    assert seen == [set(range(5 * k, 5 * k + 5)) for k in range(4)]


def test_test_views_span_the_video_evenly() -> None:
    assert DENSE.test(30, 1).tolist() == [[10, 13, 16, 19]]
    views = DENSE.test(30, 5)
    assert views[:, 0].tolist() == [0, 5, 10, 15, 20] and views.max() == 29
    assert SEGMENTS.test(20, 1).tolist() == [[2, 7, 12, 17]]
    assert SEGMENTS.test(40, 2).tolist() == [[2, 12, 22, 32], [7, 17, 27, 37]]


def test_repeated_views_stand_side_by_side() -> None:
    by_hash, shard_rows = np.arange(10)[::-1].copy(), np.array([0, 10])
    plain = Stream(by_hash, shard_rows, 10, 3)
    twice = Stream(by_hash, shard_rows, 10, 3, views=3)
    single = plain.at(0, 25)
    for start, count in ((0, 75), (7, 11), (29, 1), (28, 4)):
        places = twice.at(start, count)
        of = np.arange(start, start + count)
        assert places.rows.tolist() == single.rows[of // 3].tolist()
        assert places.epochs.tolist() == single.epochs[of // 3].tolist()
        assert places.repeats.tolist() == (of % 3).tolist()


def test_repeats_of_repeats_are_told_apart() -> None:
    counts = np.array([3, 1], dtype=np.uint64) * ONE
    stream = Stream(np.arange(2), np.array([0, 2]), 2, 0, repeats=counts, views=2)
    places = stream.at(0, 8)
    shown = sorted(zip(places.rows.tolist(), places.repeats.tolist(), strict=True))
    assert shown == [(0, 0), (0, 1), (0, 2), (0, 3), (0, 4), (0, 5), (1, 0), (1, 1)]


def test_all_frames_of_a_clip_have_one_crop_and_flip_fixed_by_their_key(split: Split) -> None:
    sampler = ClipSampler(frames=3, stride=2)
    augment = Augmentation(crop_scale=(0.3, 0.8), flip=True)
    make = augmented_clips(split, sampler, 11, 24, augment)
    stream = split.stream(40, 11, views=2)
    batch = make(stream.at(76, 8), 76)  # over the end of an epoch
    assert batch.images.shape == (8, 3, 3, 24, 24) and batch.first_position == 76
    places = stream.at(76, 8)
    assert batch.class_ids.tolist() == split.class_ids[places.rows].tolist()
    for place, row in enumerate(places.rows.tolist()):
        key = (
            11,
            int(places.epochs[place]),
            int(split.key_hashes[row]),
            int(places.repeats[place]),
        )
        whole = read_frames(split, row, np.arange)
        for time, number in enumerate(sampler.train(8, key).tolist()):
            wanted = view(whole[number], 24, key, (0.3, 0.8), True)
            got = batch.images[place, time].permute(1, 2, 0).numpy()
            np.testing.assert_array_equal(got, wanted)
    assert not np.array_equal(batch.images[0], batch.images[1])  # the same clip, seen anew


def test_a_share_of_a_batch_is_that_part_of_the_whole(split: Split) -> None:
    make = augmented_clips(split, DENSE, 0, 32, Augmentation())
    stream = split.stream(40, 0, views=2)
    whole = make(stream.at(8, 8), 8).images
    parts = [make(stream.at(first, 4), first).images for first in (8, 12)]
    assert np.array_equal(whole, np.concatenate(parts))


def test_spatial_views_run_from_edge_to_edge(split: Split, monkeypatch: pytest.MonkeyPatch) -> None:
    wide = np.random.default_rng(0).integers(0, 256, (8, 16, 40, 3), dtype=np.uint8)
    monkeypatch.setattr(clips_module, "read_frames", lambda _, row, choose: wide[choose(8)])
    sampler = ClipSampler(frames=2, stride=1)
    places = split.stream(40, 0).at(0, 2)
    images = multi_view_clips(split, sampler, 16, 2, 3)(places, 0).images
    assert images.shape == (2, 6, 2, 3, 16, 16)
    for view_number, (start, left) in enumerate((s, x) for s in (0, 6) for x in (0, 12, 24)):
        for time in range(2):
            got = images[1, view_number, time].permute(1, 2, 0).numpy()
            np.testing.assert_array_equal(got, wide[start + time, :, left : left + 16])
    (centre,) = multi_view_clips(split, sampler, 16, 1, 1)(places, 0).images[0].numpy()
    np.testing.assert_array_equal(centre[0].transpose(1, 2, 0), wide[3, :, 12:28])
