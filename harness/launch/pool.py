"""The pool: places stages on cores or GPUs of its hosts and hears how they end."""

from __future__ import annotations

import ipaddress
import queue
import signal
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness.errors import HarnessError
from harness.launch.gpu_locks import GpuLocks
from harness.launch.hosts import PING_S, Link, Start
from harness.launch.line import Line
from harness.launch.machine import Machine
from harness.launch.placing import Need, Place, Slot, Slots
from harness.ledger.tree import Tree
from harness.study.stages import StageFile

_GRACE_S = 25.0
"""After a remote host was lost: its zygote gives workers 20 s."""


@dataclass
class Running:
    """One attempt in progress."""

    stage: StageFile
    attempt: int
    places: tuple[Place, ...]
    pids: list[int] = field(default_factory=list)
    codes: dict[int, int] = field(default_factory=dict)
    """Exit code by rank, of the ranks that ended; in the order in which they did."""
    is_forked: bool = False
    """False while the port where its ranks will meet is not open yet."""
    asked_to_stop: bool = False
    gone: str | None = None
    """Why a host took this attempt with it; None if none did."""
    lost_on: str | None = None
    """That host."""

    @property
    def name(self) -> str:
        """Of the process groups on the hosts, and of the port where the ranks meet."""
        return f"{self.stage.id}#{self.attempt}"

    @property
    def ranks(self) -> int:
        """Processes in all."""
        return self.stage.execution.ranks

    @property
    def hosts(self) -> list[str]:
        """Names of the hosts it runs on, that of rank 0 first."""
        return [place.host for place in self.places]


@dataclass(frozen=True, kw_only=True)
class Ended:
    """An attempt whose every process is gone. `code` is the first that was not 0."""

    running: Running
    code: int
    gone: str | None = None
    """Set if a host was lost, not the stage's own fault: which, and what is known of it."""


class Pool:
    """Slots of some hosts. `start` places a stage, `poll` returns the attempts that ended."""

    def __init__(
        self,
        machine: Machine,
        tree: Tree,
        *,
        ssh: Sequence[str] = ("ssh",),
        worker: str = "harness.worker",
        code: Path | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Starts a zygote on every host at once; `ssh` reaches those that are not this one.

        `code` is a copy of this package that they import.
        """
        self.machine, self.tree, self._clock = machine, tree, clock
        self.running: dict[str, Running] = {}
        self.ready_s: float | None = None
        """How long the first host took to import what workers need."""
        self._slots = Slots(machine.hosts)
        self._by_name: dict[str, Running] = {}
        self._inbox: queue.Queue[tuple[str, dict[str, Any] | None]] = queue.Queue()
        self._line = Line()
        self._asked: dict[str, StageFile] = {}
        self._refused: set[tuple[Need, bool, frozenset[str]]] = set()
        self._avoid: dict[str, frozenset[str]] = {}
        self._locks = GpuLocks(machine)
        self._elsewhere: set[Slot] = set()
        """GPUs that another command was found to use."""
        self._leaving: list[tuple[float, Running, Iterable[int]]] = []
        """Ranks on lost hosts, and when they are surely over."""
        start = Start(
            device=machine.device,
            logs=tree.root / "logs",
            ssh=tuple(ssh),
            worker=worker,
            code=code,
            fds=tuple(self._locks.fds),
        )
        self._links = {h.name: Link(h, start, self._inbox) for h in machine.hosts}
        self._closed = threading.Event()
        if any(h.remote for h in machine.hosts):
            threading.Thread(target=self._ping, name="ping", daemon=True).start()

    def _ping(self) -> None:
        while not self._closed.wait(PING_S):
            for link in self._links.values():
                if link.ready:
                    link.tell({"ping": 1})

    # -- room ---------------------------------------------------------------------------------

    @property
    def _up(self) -> set[str]:
        return {name for name, link in self._links.items() if link.is_up}

    @property
    def _standing(self) -> set[str]:
        return {name for name, link in self._links.items() if not link.is_given_up}

    @property
    def free(self) -> list[Slot]:
        """Slots with room, on the hosts that are there."""
        return self._slots.free(self._up)

    @property
    def away(self) -> dict[str, str]:
        """Hosts that were lost or never reached, and why."""
        return {name: link.why for name, link in self._links.items() if link.why is not None}

    def needs(self, stage: StageFile) -> float:
        """Slots of a stage: one GPU a rank, or one core a thread; a part of one if it shares."""
        need = self._need(stage)
        return float(need.slots * need.part)

    @property
    def elsewhere(self) -> list[str]:
        """GPUs that another command uses."""
        return sorted(slot for _, slot in self._elsewhere)

    def fits(self, stage: StageFile, avoid: Iterable[str] = ()) -> bool:
        """True if there is room for the stage now. To be asked in the order of importance.

        Hosts to `avoid` are taken only where the others could never run the stage.

        A stage that does not fit lets others pass, but not for ever: the first one refused is
        first in line, and after a minute slots are kept free for it as they become so.
        """
        self._asked[stage.id] = stage
        self._avoid[stage.id] = frozenset(avoid)
        self._line.ask(stage.id)
        # Until the next `poll` room only shrinks. Thousands of stages may wait, of a few kinds.
        key = (self._need(stage), bool(self._line.barred(stage.id)), self._avoid[stage.id])
        if key in self._refused or self._find(stage) is None:
            self._refused.add(key)
            self._line.refuse(stage.id, key[0], self._clock())
            return False
        return True

    def _need(self, stage: StageFile) -> Need:
        return Need.of(stage.execution, self.machine.device)

    def _find(self, stage: StageFile) -> tuple[Place, ...] | None:
        """Places for the stage, with the locks of their GPUs taken; None if there is no room."""
        need, up, standing = self._need(stage), self._up, self._standing
        avoid = self._avoid.get(stage.id, frozenset())
        if avoid & standing:
            others = [h for h in self.machine.hosts if h.name in standing - avoid]
            if Slots(others).find(need, standing - avoid) is not None:
                up, standing = up - avoid, standing - avoid
        while True:
            barred = {*self._line.barred(stage.id), *self._elsewhere}
            places = self._slots.find(need, up, standing, barred)
            if places is None:
                return None
            wanted = [(p.host, s) for p in places if not self._is_remote(p.host) for s in p.taken]
            busy = self._locks.take(slot for _, slot in wanted)
            if not busy:
                return places
            self._elsewhere |= {(host, slot) for host, slot in wanted if slot in busy}

    def _is_remote(self, host: str) -> bool:
        return self._links[host].host.remote

    # -- starting -----------------------------------------------------------------------------

    def start(self, stage: StageFile, attempt: int) -> Running:
        """Starts all ranks of a stage on free slots; the stage must fit."""
        places = self._find(stage)
        assert places is not None, f"{stage.id}: no room; ask `fits` first"
        self._slots.take(places)
        self._line.leave(stage.id)
        running = Running(stage=stage, attempt=attempt, places=places)
        self.running[stage.id] = self._by_name[running.name] = running
        if stage.execution.ranks > 1:
            # The port is open before anybody is told its number; rank 0 inherits it.
            request = {"listen": running.name, "everywhere": len(places) > 1}
            self._links[places[0].host].tell(request)
        else:
            self._fork(running, {})
        return running

    def _fork(self, running: Running, meeting: dict[str, str]) -> None:
        running.is_forked = True
        stage = running.stage
        folder = self.tree.stage(stage.kind, stage.id)
        logs = folder.attempt(running.attempt)
        root, attempt = str(self.tree.root), str(running.attempt)
        arguments = ["--root", root, "--kind", stage.kind, "--stage", stage.id]
        for place in running.places:
            env = {
                "WORLD_SIZE": str(stage.execution.ranks),
                "LOCAL_SIZE": str(len(place.ranks)),
                "HARNESS_ROOT": root,
                "HARNESS_STAGE": stage.id,
                "HARNESS_ATTEMPT": attempt,
                "HARNESS_RUN_DIR": str(folder.path),
                **meeting,
            }
            if self.machine.device == "cuda":
                env["CUDA_VISIBLE_DEVICES"] = ",".join(place.slots)
            for local_rank, rank in enumerate(place.ranks):
                suffix = f".rank{rank}" if rank else ""
                request = {
                    "start": f"{running.name}#{rank}",
                    "group": running.name,
                    "args": [*arguments, "--attempt", attempt],
                    "env": env | {"RANK": str(rank), "LOCAL_RANK": str(local_rank)},
                    "stdout": str(logs / f"stdout{suffix}.log"),
                    "stderr": str(logs / f"stderr{suffix}.log"),
                    "listener": None if rank else running.name,
                }
                self._links[place.host].tell(request)

    # -- hearing ------------------------------------------------------------------------------

    def poll(self, wait_s: float) -> list[Ended]:
        """Attempts that ended, waiting at most `wait_s` for the first, or for a host to be ready.

        Raises HarnessError if nothing runs and no host is left for what was asked for.
        """
        self._check_that_something_can_run()
        self._line.end_round(self._slots, self._up, self._standing, self._clock())
        self._asked, self._refused = {}, set()
        self._elsewhere = set()
        self._locks.keep({s for r in self.running.values() for p in r.places for s in p.taken})
        for link in self._links.values():
            if link.why is not None and not link.is_given_up and self._clock() >= link.retry_at:
                link.open()
        ended = self._due()
        news = False
        deadline = time.monotonic() + wait_s
        while True:
            left = 0.0 if ended or news else max(0.0, deadline - time.monotonic())
            try:
                host, message = self._inbox.get(timeout=left) if left else self._inbox.get_nowait()
            except queue.Empty:
                return ended
            link = self._links[host]
            if message is None:
                self._lost(link)
                ended += self._due()
                news = True
            elif "ready" in message:
                link.ready = link.was_ready = news = True
                self.ready_s = self.ready_s or float(message["ready"])
            elif "listening" in message:
                ended += self._meet(link, message)
            else:
                ended += self._hear(link, message)

    def _meet(self, link: Link, message: dict[str, Any]) -> list[Ended]:
        """The port where the ranks of a stage meet is open: starts them."""
        name = message["listening"]
        running = self._by_name.get(name)
        if running is None or running.asked_to_stop:
            link.tell({"forget": name})
            if running is None:
                return []
            return self._exited(running, range(running.ranks), -signal.SIGTERM)
        on_one_host = len(running.places) == 1
        address = (
            "127.0.0.1" if on_one_host else meeting_address(link.host.name, message["address"])
        )
        self._fork(running, {"MASTER_ADDR": address, "MASTER_PORT": str(message["port"])})
        return []

    def _hear(self, link: Link, message: dict[str, Any]) -> list[Ended]:
        """A worker started or ended."""
        key = str(message.get("started") or message["exited"])
        name, _, rank = key.rpartition("#")
        running = self._by_name.get(name)
        if running is None:
            return []  # it was counted as lost
        if "started" in message:
            running.pids.append(int(message["pid"]))
            return []
        link.failures = 0
        return self._exited(running, [int(rank)], int(message["code"]))

    def _lost(self, link: Link) -> None:
        """A host is gone, and so is every attempt with a rank on it: other ranks are killed.

        A remote zygote that lost us, not its power, stops its workers in good order first. Only
        then is the attempt over: its checkpoint is whole, and its lease is free.
        """
        why = link.lost(self._clock())
        self._line.forget_slots()
        for running in self.running.values():
            ranks = [r for p in running.places if p.host == link.host.name for r in p.ranks]
            if not ranks:
                continue
            running.gone = running.gone or why
            running.lost_on = running.lost_on or link.host.name
            grace = _GRACE_S if link.host.remote and running.is_forked else 0.0
            lost = ranks if running.is_forked else range(running.ranks)
            self._leaving.append((self._clock() + grace, running, lost))
            self._signal(running, signal.SIGKILL)

    def _due(self) -> list[Ended]:
        """Attempts on lost hosts whose time is up."""
        due = [leaving for leaving in self._leaving if leaving[0] <= self._clock()]
        self._leaving = [leaving for leaving in self._leaving if leaving not in due]
        return [
            e for _, running, ranks in due for e in self._exited(running, ranks, -signal.SIGKILL)
        ]

    def _exited(self, running: Running, ranks: Iterable[int], code: int) -> list[Ended]:
        for rank in ranks:
            running.codes.setdefault(rank, code)
        if len(running.codes) < running.ranks:
            if code != 0:
                # The others would wait for the lost rank in a collective; the first cause counts.
                stop = running.asked_to_stop
                self._signal(running, signal.SIGTERM if stop else signal.SIGKILL)
            return []
        del self.running[running.stage.id], self._by_name[running.name]
        self._slots.give_back(running.places)
        first_bad = next((c for c in running.codes.values() if c != 0), 0)
        return [Ended(running=running, code=first_bad, gone=running.gone)]

    def _check_that_something_can_run(self) -> None:
        if self.running or not self.away:
            return
        links = self._links.values()
        never = all(link.why is not None and not link.was_ready for link in links)
        left = [h for h in self.machine.hosts if h.name in self._standing]
        empty = Slots(left)
        hopeless = [
            stage.id
            for stage in self._asked.values()
            if empty.find(self._need(stage), self._standing) is None
        ]
        if never or not left or (hopeless and len(hopeless) == len(self._asked)):
            what = f"no host is left that could run {hopeless[0]}: " if left and hopeless else ""
            raise HarnessError(what + "; ".join(self.away.values()))

    # -- stopping -----------------------------------------------------------------------------

    def stop(self, running: Running, *, kill: bool = False) -> None:
        """Asks an attempt to save and end, or ends it."""
        running.asked_to_stop = True
        self._signal(running, signal.SIGKILL if kill else signal.SIGTERM)

    def _signal(self, running: Running, number: int) -> None:
        for host in running.hosts:
            self._links[host].tell({"signal": running.name, "number": int(number)})

    def close(self) -> None:
        """Ends the pool; workers still running are told to stop."""
        self._closed.set()
        for link in self._links.values():
            link.hang_up()
        deadline = time.monotonic() + 40
        for link in self._links.values():
            link.close(deadline)
        self._locks.close()


def meeting_address(host: str, reached_at: str) -> str:
    """Where other hosts reach this one: where ssh did, if that is no address of its own only."""
    name = host.rpartition("@")[2]
    try:
        own = ipaddress.ip_address(reached_at).is_loopback
    except ValueError:  # not over ssh, or not an address
        own = True
    return name if own else reached_at
