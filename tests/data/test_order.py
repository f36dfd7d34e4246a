"""The order of samples: a permutation per epoch, the same however it is cut."""

from __future__ import annotations

import numpy as np
import pytest

from harness.data.hashing import fold, key_hash, mix, mix_int, unit
from harness.data.order import Stream


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
