"""Which slots a stage gets: arithmetic on what is free, no processes.

- A stage that fits on one host gets whole slots of one host: the one it fills up most.
- A stage larger than any host gets whole hosts, none of them partly used.
- A stage with `share: N` gets 1/N of one GPU, of the fullest that has room: others stay whole.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from fractions import Fraction

from harness.launch.machine import Device, Host, slots_per_rank
from harness.study.stages import Execution

Slot = tuple[str, str]
"""Host and slot."""

_WHOLE = Fraction(1)


@dataclass(frozen=True, kw_only=True)
class Need:
    """What a stage asks for."""

    ranks: int
    per_rank: int
    """Slots of one rank."""
    part: Fraction = _WHOLE
    """How much of its slot; less than 1 only for one rank on one GPU."""

    @classmethod
    def of(cls, execution: Execution, device: Device) -> Need:
        """Need of a stage on this kind of device. On CPU nothing is shared."""
        part = Fraction(1, execution.share) if device == "cuda" else _WHOLE
        per_rank = slots_per_rank(device, execution.threads)
        return cls(ranks=execution.ranks, per_rank=per_rank, part=part)

    @property
    def slots(self) -> int:
        """Whole slots of all ranks."""
        return self.ranks * self.per_rank


@dataclass(frozen=True, kw_only=True)
class Place:
    """Ranks of one stage on one host."""

    host: str
    ranks: range
    """Numbers among all ranks of the stage."""
    slots: tuple[str, ...]
    """What the ranks use."""
    taken: tuple[str, ...]
    """What nobody else may use: also the rest of the host, if the stage has whole hosts."""
    part: Fraction = _WHOLE


class Slots:
    """What is free on which host."""

    def __init__(self, hosts: Iterable[Host]) -> None:
        self._free = {h.name: dict.fromkeys(h.slots, _WHOLE) for h in hosts}

    def free(self, up: Collection[str], barred: Collection[Slot] = ()) -> list[Slot]:
        """Slots with room on the hosts that are `up`, without the `barred` ones."""
        return [
            (host, slot)
            for host, slots in self._free.items()
            if host in up
            for slot, free in slots.items()
            if free and (host, slot) not in barred
        ]

    def take(self, places: Iterable[Place]) -> None:
        """Marks places as used."""
        self._change(places, -1)

    def give_back(self, places: Iterable[Place]) -> None:
        """Marks places as free again."""
        self._change(places, 1)

    def _change(self, places: Iterable[Place], sign: int) -> None:
        for place in places:
            for slot in place.taken:
                free = self._free[place.host][slot] + sign * place.part
                assert 0 <= free <= 1, f"{place.host} {slot}: {free} of it would be free"
                self._free[place.host][slot] = free

    def find(
        self,
        need: Need,
        up: Collection[str],
        standing: Collection[str] | None = None,
        barred: Collection[Slot] = (),
    ) -> tuple[Place, ...] | None:
        """Places for a stage on the hosts that are `up`, or None if there is no room now.

        Whether it is larger than any host is judged by those `standing`: it rather waits for a
        host that will be back. `barred` slots are kept for another stage.
        """
        if need.part < 1:
            return self._part(need, up, barred)
        room = {h: self._whole(h, barred) for h in self._free if h in up}
        if self._is_for_one_host(need.slots, standing or up):
            enough = [h for h, slots in room.items() if len(slots) >= need.slots]
            if not enough:
                return None
            host = min(enough, key=lambda h: len(room[h]))
            slots = tuple(room[host][: need.slots])
            return (Place(host=host, ranks=range(need.ranks), slots=slots, taken=slots),)
        whole = [h for h, slots in room.items() if len(slots) == len(self._free[h])]
        return self._on_whole_hosts(need, whole)

    def _part(
        self, need: Need, up: Collection[str], barred: Collection[Slot]
    ) -> tuple[Place, ...] | None:
        room = [s for s in self.free(up, barred) if self._free[s[0]][s[1]] >= need.part]
        if not room:
            return None
        host, slot = min(room, key=lambda s: self._free[s[0]][s[1]])
        one = (slot,)
        return (Place(host=host, ranks=range(1), slots=one, taken=one, part=need.part),)

    def _whole(self, host: str, barred: Collection[Slot]) -> list[str]:
        slots = self._free[host].items()
        return [s for s, free in slots if free == 1 and (host, s) not in barred]

    def _on_whole_hosts(self, need: Need, hosts: list[str]) -> tuple[Place, ...] | None:
        """Ranks filled into hosts, the larger ones first: as few hosts as can be."""
        places: list[Place] = []
        placed = 0
        for host in sorted(hosts, key=lambda h: -len(self._free[h])):
            slots = tuple(self._free[host])
            ranks = min(len(slots) // need.per_rank, need.ranks - placed)
            if ranks:
                used = slots[: ranks * need.per_rank]
                own = range(placed, placed + ranks)
                places.append(Place(host=host, ranks=own, slots=used, taken=slots))
                placed += ranks
        return tuple(places) if placed == need.ranks else None

    def reserve(self, need: Need, up: Collection[str], standing: Collection[str]) -> set[Slot]:
        """Slots to keep for a stage that has no room now: those that lack the least.

        None if it cannot run on the hosts that are `up`, free as they may be.
        """
        lacking = {
            h: sorted(self._free[h].items(), key=lambda item: -item[1])
            for h in self._free
            if h in up
        }
        count = 1 if need.part < 1 else need.slots
        if self._is_for_one_host(count, standing):
            large = [h for h, slots in lacking.items() if len(slots) >= count]
            if not large:
                return set()
            host = max(large, key=lambda h: sum(free for _, free in lacking[h][:count]))
            return {(host, slot) for slot, _ in lacking[host][:count]}
        kept: set[Slot] = set()
        ranks = 0
        for host in sorted(lacking, key=lambda h: -sum(free for _, free in lacking[h])):
            if ranks < need.ranks and len(lacking[host]) >= need.per_rank:
                kept |= {(host, slot) for slot, _ in lacking[host]}
                ranks += len(lacking[host]) // need.per_rank
        return kept if ranks >= need.ranks else set()

    def _is_for_one_host(self, count: int, standing: Collection[str]) -> bool:
        return count <= max((len(self._free[h]) for h in standing), default=0)
