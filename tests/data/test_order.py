"""The order of samples: a permutation per epoch, the same however it is cut."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from harness.data.hashing import fold, key_hash, mix, mix_int, unit
from harness.data.loader import sample_rows
from harness.data.order import ONE, Stream


def order(seed: int, num: int, start: int, count: int) -> np.ndarray:
    """The order of a set of one window."""
    rows = np.broadcast_to(np.uint32(0), num) if num > 10**8 else np.arange(num, dtype=np.uint32)
    return Stream(rows, np.array([0, num]), num, seed).at(start, count).rows


def splitmix64(state: int) -> int:
    """The generator's first output for `state`, as in the paper."""
    mask = (1 << 64) - 1
    z = (state + 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return z ^ (z >> 31)


def test_mix_is_splitmix64() -> None:
    # 0xE220A8397B1DCDAF is the well-known first output of splitmix64 seeded with 0.
    assert mix_int(0) == 0xE220A8397B1DCDAF
    values = [0, 1, 2**63, 2**64 - 1, 123456789]
    mixed = mix(np.array(values, dtype=np.uint64))
    assert mixed.tolist() == [splitmix64(v) for v in values] == [mix_int(v) for v in values]


def test_hashes_do_not_change_between_versions() -> None:
    # Written down once: subsets, orders and crops of every past run hang on these.
    assert key_hash("train-000000000") == 0x7211F33B754BACE5
    assert fold(0, 1, 2) == 0x5DEF8C1F8A9E3322 != fold(0, 2, 1)
    assert 0 <= unit(np.array([2**64 - 1], dtype=np.uint64))[0] < 1


@pytest.mark.parametrize("num", [1, 2, 3, 7, 64, 100, 1000, 4097])
def test_each_epoch_visits_every_sample_once(num: int) -> None:
    both = order(seed=3, num=num, start=0, count=2 * num)
    assert sorted(both[:num]) == list(range(num))
    assert sorted(both[num:]) == list(range(num))
    if num >= 64:
        assert (both[:num] != both[num:]).any()
        assert (both[:num] != np.arange(num)).any()


def test_any_slice_equals_the_same_part_of_the_whole() -> None:
    whole = order(seed=5, num=97, start=0, count=500)
    rng = np.random.default_rng(0)
    for start in rng.integers(0, 450, 30):
        count = int(rng.integers(0, 50))
        part = order(seed=5, num=97, start=int(start), count=count)
        np.testing.assert_array_equal(part, whole[start : start + count])


def test_seeds_give_different_orders_and_positions_are_spread_evenly() -> None:
    assert (order(0, 1000, 0, 1000) != order(1, 1000, 0, 1000)).any()
    # Mean sample at each fifth of an epoch over 200 seeds: 499.5 +- 4.5 standard errors.
    firsts = np.array([order(seed, 1000, 0, 5) for seed in range(400)])
    assert np.abs(firsts.mean(axis=0) - 499.5).max() < 4.5 * 288.7 / 20


def test_far_positions_cost_no_more_than_near_ones() -> None:
    far = order(seed=0, num=3_000_000_000, start=7 * 3_000_000_000 - 5, count=10)
    assert len(set(far.tolist())) == 10 and far.min() >= 0 and far.max() < 3_000_000_000


def test_an_order_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one sample"):
        order(seed=0, num=0, start=0, count=1)


# --- sets of more than one window ---------------------------------------------------------------

SHARDS = np.array([0, 40, 41, 141, 200, 200, 337])  # one of a single sample, one empty
WINDOW = 50


def windowed(num: int = 337, seed: int = 3, **changes: Any) -> Stream:
    by_hash = np.argsort(mix(np.arange(337, dtype=np.uint64))).astype(np.uint32)
    return Stream(by_hash, SHARDS, num, seed, window=WINDOW, **changes)


@pytest.mark.parametrize("num", [337, 200, 51])
def test_each_epoch_of_windows_visits_the_subset_once(num: int) -> None:
    stream = windowed(num)
    members = set(np.argsort(mix(np.arange(337, dtype=np.uint64)))[:num].tolist())
    found = stream.at(0, 3 * num)
    for epoch in range(3):
        rows = found.rows[epoch * num : (epoch + 1) * num]
        assert len(rows) == len(set(rows.tolist())) and set(rows.tolist()) == members
        assert (found.epochs[epoch * num : (epoch + 1) * num] == epoch).all()
    assert (found.rows[:num] != found.rows[num : 2 * num]).any()
    assert not found.repeats.any()


def _stretches(order: tuple[int, ...]) -> list[np.ndarray]:
    rows = np.concatenate([np.arange(SHARDS[s], SHARDS[s + 1]) for s in order])
    return [rows[first : first + WINDOW] for first in range(0, 337, WINDOW)]


def test_a_window_is_the_next_stretch_of_the_permuted_shards() -> None:
    rows = windowed().at(0, 337).rows
    windows = [rows[first : first + WINDOW] for first in range(0, 337, WINDOW)]
    cut_alike = [
        order
        for order in itertools.permutations(range(6))
        if all(
            set(window.tolist()) == set(part.tolist())
            for window, part in zip(windows, _stretches(order), strict=True)
        )
    ]
    assert cut_alike, "no order of the shards explains the windows"
    # Inside a window the samples are shuffled.
    assert any((np.sort(window) != window).any() for window in windows)


def test_any_slice_of_windows_equals_the_same_part_of_the_whole() -> None:
    stream = windowed(200)
    whole = stream.at(0, 900)
    rng = np.random.default_rng(1)
    for start in rng.integers(0, 800, 40):
        count = int(rng.integers(1, 100))
        part = windowed(200).at(int(start), count)
        np.testing.assert_array_equal(part.rows, whole.rows[start : start + count])
        np.testing.assert_array_equal(part.epochs, whole.epochs[start : start + count])


def test_few_shards_are_open_at_a_time_and_each_is_read_once() -> None:
    bounds = np.arange(0, 100_001, 500)
    stream = Stream(np.zeros(100_000, np.uint32), bounds, 100_000, seed=0, window=4000)
    shards = stream.at(0, 100_000).rows // 500
    for first in range(0, 100_000, 4000):
        assert len(set(shards[first : first + 4000].tolist())) == 8
    last_seen = {int(s): place for place, s in enumerate(shards)}
    first_seen = {int(s): 99_999 - place for place, s in enumerate(shards[::-1])}
    assert all(last_seen[s] - first_seen[s] < 4000 for s in range(200))


def test_one_window_does_not_know_how_shards_are_cut() -> None:
    by_hash = np.argsort(mix(np.arange(337, dtype=np.uint64))).astype(np.uint32)
    one, other = (Stream(by_hash, np.array(b), 337, 3) for b in ([0, 337], [0, 10, 300, 337]))
    np.testing.assert_array_equal(one.at(0, 1000).rows, other.at(0, 1000).rows)


# --- resampling -----------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [50, 10_000])
def test_an_epoch_shows_each_image_its_expected_count_rounded_down_or_up(window: int) -> None:
    rng = np.random.default_rng(0)
    wanted = rng.integers(ONE, 5 * ONE, 120).astype(np.uint64)
    wanted[0] += np.uint64(-int(wanted.sum()) % ONE)
    by_hash = rng.permutation(337)[:337].astype(np.uint32)
    stream = Stream(by_hash, SHARDS, 120, seed=1, repeats=wanted, window=window)
    total = int(wanted.sum()) // ONE
    assert stream.num_samples == total and stream.num_unique == 120
    counts = np.zeros((40, 337))
    for epoch in range(40):
        found = stream.at(epoch * total, total)
        counts[epoch] = np.bincount(found.rows, minlength=337)
        # The repeats of an image are numbered 0, 1, 2 ...
        pairs = set(zip(found.rows.tolist(), found.repeats.tolist(), strict=True))
        assert pairs == {(r, k) for r in range(337) for k in range(int(counts[epoch][r]))}
    exact = np.zeros(337)
    exact[by_hash[:120]] = wanted / ONE
    assert (counts >= np.floor(exact)).all() and (counts <= np.ceil(exact)).all()
    # 4.5 standard errors of a coin of any bias, 40 times.
    assert np.abs(counts.mean(axis=0) - exact).max() < 4.5 * 0.5 / np.sqrt(40)


def test_counts_are_exact_on_average_over_all_offsets(monkeypatch: pytest.MonkeyPatch) -> None:
    sixteenth = ONE // 16
    wanted = np.array([16, 23, 40, 17, 16], dtype=np.uint64) * np.uint64(sixteenth)
    rows = np.arange(5, dtype=np.uint32)
    counts = np.zeros(5)
    for k in range(16):
        monkeypatch.setattr(Stream, "_offset", lambda self, epoch, k=k: k * sixteenth)
        stream = Stream(rows, np.array([0, 5]), 5, seed=0, repeats=wanted)
        counts += np.bincount(stream.at(0, 7).rows, minlength=5)
    assert counts.tolist() == [16, 23, 40, 17, 16]


# --- the same stream however it is read ---------------------------------------------------------


@pytest.mark.parametrize("ranks, threads", [(1, 1), (1, 3), (2, 2), (5, 1), (7, 4)])
def test_ranks_and_threads_read_the_same_stream(ranks: int, threads: int) -> None:
    stream = windowed(200)
    read = sample_rows(stream, 13, 700, ranks=ranks, threads=threads)
    np.testing.assert_array_equal(read, stream.at(13, 700).rows)


@pytest.mark.slow
def test_no_mismatch_over_a_million_positions() -> None:
    """Two epochs of 10 windows and 77 shards, resumed at random positions by all kinds of crews."""
    num = 500_000
    by_hash = np.argsort(mix(np.arange(num, dtype=np.uint64))).astype(np.uint32)
    bounds = np.concatenate([[0], np.sort(mix(np.arange(76, dtype=np.uint64)) % num), [num]])
    whole = Stream(by_hash, bounds.astype(np.int64), num, seed=9).at(0, 1_000_000)
    assert sorted(whole.rows[:num].tolist()) == list(range(num))
    rng = np.random.default_rng(2)
    crews = [(1, 1), (1, 2), (2, 1), (3, 2), (4, 4), (8, 1), (16, 2)]
    cuts = [0, *sorted(rng.integers(1, 1_000_000, len(crews) - 1).tolist()), 1_000_000]
    for (ranks, threads), (start, stop) in zip(crews, itertools.pairwise(cuts), strict=True):
        stream = Stream(by_hash, bounds.astype(np.int64), num, seed=9)
        rows = sample_rows(stream, start, stop - start, ranks=ranks, threads=threads, share=64)
        np.testing.assert_array_equal(rows, whole.rows[start:stop])
