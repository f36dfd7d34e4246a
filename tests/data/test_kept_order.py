"""The order of a subset or a resampled set is sorted once; later runs map what was kept."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from harness.data.dataset import Dataset, open_dataset
from harness.data.kept_order import kept
from harness.data.order import ONE, Arrangement, Stream, arrange

NUM, SHARDS = 1000, np.array([0, 300, 301, 640, 1000])
BY_HASH = np.random.default_rng(0).permutation(NUM).astype(np.uint32)


def never() -> Arrangement:
    raise AssertionError("made again")


@pytest.mark.parametrize("num", [990, NUM])
@pytest.mark.parametrize("is_resampled", [False, True])
def test_a_kept_order_is_the_order(num: int, is_resampled: bool, tmp_path: Path) -> None:
    repeats = None
    if is_resampled:
        repeats = np.random.default_rng(1).integers(ONE, 3 * ONE, num).astype(np.uint64)
        repeats[0] += np.uint64(-int(repeats.sum()) % ONE)
    elif num == NUM:
        return  # nothing is sorted, nothing kept
    told = {"repeats": repeats, "window": 128}
    plain = Stream(BY_HASH, SHARDS, num, 5, **told)  # type: ignore[arg-type]
    made = kept(tmp_path, ["x", num], lambda: arrange(BY_HASH, SHARDS, num, repeats, 128))
    again = kept(tmp_path, ["x", num], never)
    for arrangement in (made, again):
        stream = Stream(BY_HASH, SHARDS, num, 5, window=128, arrangement=arrangement)
        assert stream.num_samples == plain.num_samples
        for start in (0, plain.num_samples - 50, 7 * plain.num_samples + 13):
            found, expected = stream.at(start, 300), plain.at(start, 300)
            np.testing.assert_array_equal(found.rows, expected.rows)
            np.testing.assert_array_equal(found.repeats, expected.repeats)


def test_another_set_or_number_is_kept_apart_and_a_torn_file_made_again(tmp_path: Path) -> None:
    for num in (700, 800):
        kept(tmp_path, ["x", num], lambda num=num: arrange(BY_HASH, SHARDS, num, None, 128))
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) == 2 and not list(tmp_path.glob(".tmp*"))
    for file in files:
        file.write_bytes(file.read_bytes()[:-9])
    found = kept(tmp_path, ["x", 700], lambda: arrange(BY_HASH, SHARDS, 700, None, 128))
    np.testing.assert_array_equal(found.rows, np.sort(BY_HASH[:700]))
    np.testing.assert_array_equal(kept(tmp_path, ["x", 700], never).rows, found.rows)


def test_where_nothing_can_be_written_it_is_made_every_time(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    found = kept(tmp_path / "file", "x", lambda: arrange(BY_HASH, SHARDS, 700, None, 128))
    np.testing.assert_array_equal(found.rows, np.sort(BY_HASH[:700]))


@pytest.mark.parametrize(("num", "resample"), [(594, None), (594, 1.5), (600, 2.0)])
def test_a_split_keeps_what_it_sorted(
    num: int,
    resample: float | None,
    scenes: Dataset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = scenes.split("pretrain").stream(num, 3, resample).at(100, 2000)
    monkeypatch.setattr("harness.data.dataset.ORDER_WINDOW", 128)
    for turn in range(2):
        split = open_dataset(scenes.location, tmp_path).split("pretrain")
        found = split.stream(num, 3, resample).at(100, 2000)
        np.testing.assert_array_equal(found.rows, expected.rows)
        np.testing.assert_array_equal(found.repeats, expected.repeats)
        if not turn:
            monkeypatch.setattr("harness.data.dataset.expected_counts", never)
            monkeypatch.setattr("harness.data.dataset.arrange", never)
    assert len(list(split.cache.glob("order/pretrain/*.safetensors"))) == 1
