"""No slot is ever used twice, whole sets stay whole, nobody waits for ever: against brute force."""

from __future__ import annotations

import random
from collections import Counter
from fractions import Fraction

import pytest

from harness.launch.line import PATIENCE_S, Line
from harness.launch.machine import Device, Host, Machine
from harness.launch.placing import Need, Place, Slots
from harness.study.schema import Resources
from tests.launch.made import stage


def hosts(*sizes: int) -> tuple[Host, ...]:
    return tuple(
        Host(name=f"h{i}", slots=tuple(map(str, range(n))), remote=True)
        for i, n in enumerate(sizes)
    )


def need(ranks: int = 1, per_rank: int = 1, share: int = 1) -> Need:
    return Need(ranks=ranks, per_rank=per_rank, part=Fraction(1, share))


def used(running: list[tuple[Place, ...]]) -> Counter[tuple[str, str]]:
    """How much of each slot is in use, added up anew."""
    total: Counter[tuple[str, str]] = Counter()
    for places in running:
        for place in places:
            for slot in place.taken:
                total[place.host, slot] += place.part  # type: ignore[assignment]
    return total


def has_room(
    wanted: Need, all_hosts: tuple[Host, ...], up: set[str], running: list[tuple[Place, ...]]
) -> bool:
    """What the rules say, in other words than the code's."""
    taken = used(running)
    free = {h.name: [1 - taken[h.name, s] for s in h.slots] for h in all_hosts}
    if wanted.part < 1:
        return any(part >= wanted.part for h in up for part in free[h])
    if any(len(h.slots) >= wanted.slots for h in all_hosts):
        return any(free[h].count(1) >= wanted.slots for h in up)
    whole = [h for h in up if set(free[h]) == {1}]
    return sum(len(free[h]) // wanted.per_rank for h in whole) >= wanted.ranks


@pytest.mark.parametrize("seed", range(40))
def test_no_slot_is_overused_and_room_is_found_where_there_is_some(seed: int) -> None:
    rng = random.Random(seed)
    all_hosts = hosts(*rng.choices([1, 2, 3, 4, 8], k=rng.randint(1, 4)))
    machine = Machine(device="cuda", hosts=all_hosts)
    slots, running = Slots(all_hosts), []
    found_some, found_none = 0, 0
    for _ in range(300):
        if running and rng.random() < 0.45:
            slots.give_back(running.pop(rng.randrange(len(running))))
            continue
        if rng.random() < 0.4:
            wanted = need(share=rng.choice([2, 3, 4]))
        else:
            wanted = need(rng.randint(1, 9), rng.randint(1, 3))
        up = {h.name for h in all_hosts if rng.random() < 0.9}
        standing = {h.name for h in all_hosts}
        places = slots.find(wanted, up, standing)
        assert (places is not None) == has_room(wanted, all_hosts, up, running)
        if places is None:
            found_none += 1
            continue
        found_some += 1
        if wanted.part == 1 and len(places) > 1:
            # More than any host has: whole hosts, and nobody was on them.
            assert wanted.slots > max(len(h.slots) for h in all_hosts)
            before = used(running)
            for place in places:
                (host,) = (h for h in all_hosts if h.name == place.host)
                assert place.taken == host.slots
                assert not any(before[host.name, s] for s in host.slots)
        assert [r for p in places for r in p.ranks] == list(range(wanted.ranks))
        for place in places:
            assert place.host in up
            assert len(place.slots) == len(set(place.slots)) == len(place.ranks) * wanted.per_rank
            assert set(place.slots) <= set(place.taken)
        slots.take(places)
        running.append(places)
        assert max(used(running).values()) <= 1
        assert wanted.ranks <= machine.most_ranks(1)
    assert found_some > 20 and found_none > 5


def test_shared_stages_fill_one_gpu_before_the_next_and_whole_ones_avoid_it() -> None:
    slots = Slots(hosts(2))
    first = [slots.find(need(share=3), {"h0"}) for _ in range(1)]
    for _ in range(2):
        assert first[-1] is not None
        slots.take(first[-1])
        first.append(slots.find(need(share=3), {"h0"}))
    assert [p[0].slots for p in first if p] == [("0",)] * 3
    whole = slots.find(need(), {"h0"})
    assert whole is not None and whole[0].slots == ("1",)
    assert slots.find(need(2), {"h0"}) is None
    slots.take(first[-1] or ())
    fourth = slots.find(need(share=3), {"h0"})
    assert fourth is not None and fourth[0].slots == ("1",)


def test_a_small_stage_takes_the_fuller_host_so_that_a_large_one_fits() -> None:
    slots = Slots(hosts(4, 4))
    for _ in range(4):
        places = slots.find(need(), {"h0", "h1"})
        assert places is not None and places[0].host == "h0"
        slots.take(places)
    large = slots.find(need(4), {"h0", "h1"})
    assert large is not None and [p.host for p in large] == ["h1"]


def test_a_stage_waits_for_the_host_it_fits_on_rather_than_be_cut_in_two() -> None:
    slots = Slots(hosts(2, 2, 4))
    assert slots.find(need(4), {"h0", "h1"}, {"h0", "h1", "h2"}) is None
    cut = slots.find(need(4), {"h0", "h1"}, {"h0", "h1"})  # the large host is given up
    assert cut is not None and [list(p.ranks) for p in cut] == [[0, 1], [2, 3]]


@pytest.mark.parametrize(
    ("device", "execution", "expected"),
    [
        ("cuda", {"ranks": 2, "threads": 8}, need(2)),
        ("cpu", {"ranks": 2, "threads": 8}, need(2, 8)),
        ("cuda", {"share": 4}, need(share=4)),
        ("cpu", {"share": 4}, need()),
    ],
)
def test_a_rank_needs_a_gpu_or_its_threads(
    device: Device, execution: dict[str, int], expected: Need
) -> None:
    assert Need.of(stage("s", **execution).execution, device) == expected


def test_only_stages_of_one_rank_share() -> None:
    assert Resources(share=4).share == 4
    with pytest.raises(ValueError, match="share 4 with 2 ranks: only stages of one rank share"):
        Resources(share=4, ranks=2)


@pytest.mark.parametrize("seed", range(40))
def test_slots_are_kept_if_and_only_if_they_are_enough(seed: int) -> None:
    """Otherwise they would be kept for ever."""
    rng = random.Random(seed)
    all_hosts = hosts(*rng.choices([1, 2, 3, 4], k=3))
    slots, standing = Slots(all_hosts), {h.name for h in all_hosts}
    for _ in range(3):
        places = slots.find(need(share=2), standing)
        assert places is not None
        slots.take(places)
    for ranks, per_rank, share in ((1, 1, 3), *((r, t, 1) for r in range(1, 9) for t in (1, 2))):
        wanted = need(ranks, per_rank, share)
        up = {h.name for h in all_hosts if rng.random() < 0.8}
        kept = slots.reserve(wanted, up, standing)
        assert {host for host, _ in kept} <= up
        # On hosts of which nothing but the kept slots is free, and on hosts free throughout.
        others = {(h.name, s) for h in all_hosts for s in h.slots} - kept
        assert bool(kept) == (Slots(all_hosts).find(wanted, up, standing, others) is not None)
        assert bool(kept) == (Slots(all_hosts).find(wanted, up, standing) is not None)


# --- the line -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "large", "small"),
    [
        ((4,), need(4), need()),
        ((1,), need(), need(share=4)),
        ((2, 2), need(4), need()),
        ((2, 4), need(3), need()),
    ],
    ids=["whole host", "whole gpu", "two hosts", "one of two hosts"],
)
@pytest.mark.parametrize("seed", range(5))
def test_a_large_stage_gets_its_turn_among_endless_small_ones(
    sizes: tuple[int, ...], large: Need, small: Need, seed: int
) -> None:
    """The smaller ones come first in the order of importance: they pass for a minute only."""
    rng = random.Random(seed)
    slots, line, running = Slots(hosts(*sizes)), Line(), []
    up = {h.name for h in hosts(*sizes)}
    now = 0.0

    def place(name: str, wanted: Need) -> tuple[Place, ...] | None:
        line.ask(name)
        places = slots.find(wanted, up, up, line.barred(name))
        if places is None:
            line.refuse(name, wanted, now)
            return None
        line.leave(name)
        slots.take(places)
        running.append((now + rng.uniform(5, 50), places))
        return places

    number = 0
    while place(f"small-{number}", small):
        number += 1
    line.end_round(slots, up, up, now)
    line = Line()  # from here on, only `large` is ever refused first
    while now < 600:
        now += 0.5
        for end, places in [r for r in running if r[0] <= now]:
            running.remove((end, places))
            slots.give_back(places)
        if place("large", large):
            break
        while place(f"small-{number}", small):
            number += 1
        line.end_round(slots, up, up, now)
    # A minute of patience, and the longest of the small stages that ran then.
    assert now <= PATIENCE_S + 50 + 1


def test_a_stage_that_nobody_asks_for_any_more_leaves_the_line() -> None:
    slots, line = Slots(hosts(1)), Line()
    line.ask("large")
    line.refuse("large", need(), 0.0)
    line.end_round(slots, {"h0"}, {"h0"}, PATIENCE_S + 1)
    assert line.barred("small") == {("h0", "0")} and line.barred("large") == ()
    for _ in range(1000):  # rounds in which nothing was free: nobody was asked for
        line.end_round(slots, {"h0"}, {"h0"}, PATIENCE_S + 2)
    assert line.barred("small")
    for _ in range(200):
        line.ask("small")
        line.end_round(slots, {"h0"}, {"h0"}, PATIENCE_S + 2)
    assert line.barred("small") == ()
