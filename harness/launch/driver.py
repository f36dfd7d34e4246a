"""Runs what is missing of a study: places ready stages, turns ends into states, retries."""

from __future__ import annotations

import signal
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import FrameType

from harness.errors import EXIT_BUSY, UserError
from harness.launch import ends, provenance, queue
from harness.launch.machine import Machine, slots_per_rank
from harness.launch.modes import Mode
from harness.launch.policy import lost_on
from harness.launch.pool import Ended, Pool
from harness.launch.progress import Feed, Orders, Progress, Summary, Summed
from harness.ledger import attempts
from harness.ledger.claim import claim, complete, is_untold, start_over
from harness.ledger.files import read_json, write_json
from harness.ledger.lease import Silence, exclusive
from harness.ledger.states import ACTIVE, StageState, graph_of
from harness.ledger.tree import Tree
from harness.study.again import renewed
from harness.study.cells import Grid
from harness.study.cost import Speeds, pace, running_left
from harness.study.schema import Retry
from harness.study.stages import Execution, StageFile

_POLL_S = 0.5
_REREAD_S = 10.0
_QUEUE_S = 30.0
"""What a scheduler said is good for so long: its queue serves many."""
# A driver that only waits takes at most a fiftieth of a core, however many stages it looks over: a
# hundredth to read their files, as much for the rest.
_IDLE = 100
_LONGEST_WAIT_S = 10.0
_STOP_GRACE_S = 60.0


@dataclass
class _Job:
    stage: StageFile
    priority: float


def reset(
    tree: Tree,
    stages: Mapping[str, StageFile],
    states: Mapping[str, StageState],
    mode: Mode,
    retry: Retry,
) -> None:
    """Modes retry and force make failed, or all, stages runnable again.

    In every mode that is true of what failed for want of disk space, which was not the stage's
    fault, and of what the table grants another try.
    """
    for stage_id, state in states.items():
        folder = tree.stage(stages[stage_id].kind, stage_id)
        has_failed = state.state in ("failed", "diverged")
        if state.state in ACTIVE or not (has_failed or (mode == "force" and folder.path.exists())):
            continue
        if mode == "force" or (has_failed and (mode == "retry" or state.reason == "storage")):
            keep = mode == "cached" or state.held
            start_over(folder, state, mode, from_scratch=mode == "force", keep_note=keep)
        else:
            ends.reconsider(folder, retry)


class Driver:
    """One `--submit`: owns the pool and the order of things. The files are the truth."""

    def __init__(
        self,
        grid: Grid,
        tree: Tree,
        machine: Machine,
        speeds: Speeds,
        watch: Callable[[Progress], None] = lambda _: None,
        feed: Feed | None = None,
        ssh: Sequence[str] = ("ssh",),
        *,
        fail_fast: bool = False,
    ) -> None:
        self.grid, self.tree, self.machine, self.speeds = grid, tree, machine, speeds
        self.watch, self.feed, self.ssh = watch, feed, ssh
        self.retry: Retry = grid.loaded.study.retry
        self._is_writing = False
        self._executions: dict[int, tuple[Execution, Execution]] = {}
        self.stages = {k: self._placed(s) for k, s in grid.stages.items()}
        self._graph = graph_of(self.stages)
        self.interrupted = False
        self.fail_fast, self._failed_fast = fail_fast, False
        self._kill = False
        self._ran: list[str] = []
        self._external: set[str] = set()
        self._silence = Silence()
        self._cancelled: dict[str, str] = {}
        self.live: dict[str, dict[str, object]] = {}
        self._summed: Summed | None = None
        self._pace: dict[str, float] = {}
        self._began: dict[tuple[str, int], float] = {}
        self._ordered: tuple[dict[str, StageState], dict[str, _Job]] | None = None
        self._costs: dict[str, float] = {}
        """Stage id -> seconds of slots, by measured speeds alone."""

    def _placed(self, stage: StageFile) -> StageFile:
        # Thousands of stages have a few ways to run; each is kept, and with it its id().
        known = self._executions.get(id(stage.execution))
        if known is None:
            execution = stage.execution.model_copy(update={"device": self.machine.device})
            execution = provenance.kept(self.tree, execution) if self._is_writing else execution
            known = self._executions[id(stage.execution)] = (stage.execution, execution)
        return renewed(stage, {"execution": known[1]})

    def _keep_configs(self) -> None:
        self._is_writing = True
        if any(known[1].zero_config for known in self._executions.values()):
            self._executions.clear()
            self.stages = {k: self._placed(s) for k, s in self.grid.stages.items()}
            self._graph = graph_of(self.stages)

    def _read_states(self) -> dict[str, StageState]:
        # Some may have been submitted to Slurm: their jobs are left alone, or are over.
        return queue.read_graph(self.tree, self._graph, max_age_s=_QUEUE_S, may_wait=False)

    def run(self, mode: Mode) -> Summary:
        """Runs all that is missing and can run; returns when nothing is left to wait for."""
        started = time.monotonic()
        self._check_slots()
        states = self._read_states()
        if mode != "read-only":
            self._keep_configs()
            reset(self.tree, self.stages, states, mode, self.retry)
            states = self._read_states()
        for stage_id, state in states.items() if mode != "read-only" else ():
            folder = self.tree.stage(self.stages[stage_id].kind, stage_id)
            if is_untold(folder, state):
                complete(folder)
        todo = self._todo(states)
        if (not todo and self.feed is None) or mode == "read-only":
            return self._summary(states, started)
        self.git = provenance.git_state()
        stops = (signal.SIGINT, signal.SIGTERM)
        old_handlers = {n: signal.signal(n, self._interrupt) for n in stops}
        code = provenance.snapshot(self.tree, self.git)
        pool = Pool(self.machine, self.tree, ssh=self.ssh, code=code)
        try:
            self._loop(pool, todo, started)
        finally:
            pool.close()
            for number, handler in old_handlers.items():
                signal.signal(number, handler)
        return self._summary(self._read_states(), started)

    # -- before -------------------------------------------------------------------------------

    def _check_slots(self) -> None:
        have = len(self.machine.slots)
        what = "GPUs" if self.machine.device == "cuda" else "cores"
        for stage in self.stages.values():
            execution = stage.execution
            need = execution.ranks * slots_per_rank(self.machine.device, execution.threads)
            most = self.machine.most_ranks(execution.threads)
            if execution.ranks > most:
                room = f"{have}" if need > have else f"{have} on hosts that hold {most} ranks"
                raise UserError(
                    f"{stage.id} needs {need} {what} ({execution.ranks} ranks); this machine has"
                    f" {room}; lower `resources`, or submit on a larger machine"
                )

    def _todo(self, states: dict[str, StageState]) -> dict[str, _Job]:
        """Jobs by stage id; those on the longest remaining path first."""
        dependants: dict[str, list[str]] = {}
        for stage in self.stages.values():
            for upstream in stage.config.upstream.values():
                dependants.setdefault(upstream, []).append(stage.id)
        below: dict[str, float] = {}
        for stage in reversed(list(self.stages.values())):
            tail = max((below[d] for d in dependants.get(stage.id, [])), default=0.0)
            below[stage.id] = self.speeds.seconds(stage) + tail
        wanted = [s for s, state in states.items() if not state.is_over]
        return {s: _Job(self.stages[s], below[s]) for s in wanted}

    # -- the loop -----------------------------------------------------------------------------

    def _loop(self, pool: Pool, todo: dict[str, _Job], started: float) -> None:
        stop_at: float | None = None
        states: dict[str, StageState] = {}
        read_at, changed, read_cost = 0.0, True, 0.0
        while True:
            began = time.process_time()
            # Every stage's files are read when something ended here, and now and then for what
            # other submissions do; in between only the progress of running stages is.
            is_reading = changed or time.monotonic() - read_at > max(_REREAD_S, _IDLE * read_cost)
            if is_reading:
                states = self._read_states()
                read_at, changed = time.monotonic(), False
            if self.feed is not None and not self.interrupted:
                # Again after new stages: some may be done already, and their end is news too.
                while self._obey(self.feed(states, pool.running), pool, todo):
                    states = self._read_states()
            if is_reading:
                self._take_up(states, todo)
            ordered = self._in_order(states, todo)
            if not self.interrupted:
                changed = self._place(pool, ordered, states)
            self._tell(states, pool, started)
            active = pool.running or (self._external_alive(states) and not self.interrupted)
            is_waiting = len(ordered) > sum(s in ordered for s in pool.running)
            if not active and (self.interrupted or not is_waiting):
                return
            if self.interrupted:
                stop_at = stop_at or time.monotonic() + _STOP_GRACE_S
                self._stop_all(pool, kill=self._kill or time.monotonic() > stop_at)
            cost = time.process_time() - began
            if is_reading:
                read_cost, cost = cost, 0.0
            for ended in pool.poll(min(max(_POLL_S, _IDLE * cost), _LONGEST_WAIT_S)):
                self._ended(ended, todo)
                changed = True

    def _obey(self, orders: Orders, pool: Pool, todo: dict[str, _Job]) -> bool:
        """Takes in new stages and stops unwanted ones; True if there are new ones."""
        for stage_id, why in orders.cancel.items():
            if stage_id in pool.running and stage_id not in self._cancelled:
                self._cancelled[stage_id] = why
                pool.stop(pool.running[stage_id])
        new = {k: self._placed(s) for k, s in orders.add.items() if k not in self.stages}
        if new:
            self.stages |= new
            self._graph = graph_of(self.stages)
            self._check_slots()
            jobs = self._todo(self._read_states())
            todo |= {k: job for k, job in jobs.items() if k in new}
        return bool(new)

    def _take_up(self, states: dict[str, StageState], todo: dict[str, _Job]) -> None:
        """Takes in what others wait for and was done when this began: it is to run again since."""
        while True:
            waiting = [s for s in todo if states[s].state == "waiting"]
            upstream = {u for s in waiting for u in self.stages[s].config.upstream.values()}
            new = {u: states[u] for u in upstream if u in states and u not in todo}
            found = self._todo({u: state for u, state in new.items() if not state.is_over})
            if not found:
                return
            todo |= found
            self._ordered = None

    def _in_order(self, states: dict[str, StageState], todo: dict[str, _Job]) -> dict[str, _Job]:
        """Jobs that run or may still run, best first: neither done, failed nor blocked."""
        if self._ordered is None or self._ordered[0] is not states:
            open_ = [(s, job) for s, job in todo.items() if not states[s].is_over]
            self._ordered = (states, dict(sorted(open_, key=lambda pair: -pair[1].priority)))
        return self._ordered[1]

    def _external_alive(self, states: dict[str, StageState]) -> bool:
        self._external = {s for s in self._external if states[s].state in ACTIVE}
        return bool(self._external)

    def _place(self, pool: Pool, ordered: dict[str, _Job], states: dict[str, StageState]) -> bool:
        """Starts what is ready and fits; True if another submission was quicker somewhere."""
        was_late = False
        for job in ordered.values():
            if not pool.free:
                break
            if job.stage.id in pool.running:
                continue
            state = states[job.stage.id]
            if state.state in ACTIVE and not self._is_silent(job.stage):
                self._external.add(job.stage.id)
                continue
            if state.state == "waiting" or not pool.fits(job.stage, self._avoid(job.stage, state)):
                # A stage too large for the free slots lets smaller ones pass; it is first in line
                # again whenever a slot comes free.
                continue
            attempt = claim(self.tree, job.stage, state, {"cluster": self.machine.name})
            if attempt is None:
                self._external.add(job.stage.id)
                was_late = True
                continue
            self._silence.forget(job.stage.id)
            folder = self.tree.stage(job.stage.kind, job.stage.id)
            provenance.write_attempt(folder.attempt(attempt), self.git, self.tree)
            pool.start(job.stage, attempt)
        return was_late

    def _avoid(self, stage: StageFile, state: StageState) -> tuple[str, ...]:
        """Hosts that took an attempt at the stage with them."""
        if not state.status.get("attempt") or len(self.machine.hosts) == 1:
            return ()
        return lost_on(attempts.read_attempts(self.tree.stage(stage.kind, stage.id)))

    def _is_silent(self, stage: StageFile) -> bool:
        """True if the owner, on a host that nobody here can ask, has not been heard of for long."""
        folder = self.tree.stage(stage.kind, stage.id)
        return self._silence.is_over(stage.id, folder)

    def _ended(self, ended: Ended, todo: dict[str, _Job]) -> None:
        """Turns the end of an attempt into a state where the worker could not, and retries."""
        stage, attempt = ended.running.stage, ended.running.attempt
        folder = self.tree.stage(stage.kind, stage.id)
        if ended.code == EXIT_BUSY:
            # A living lease says who runs it; our claim must not hide that.
            with exclusive(folder.claim):
                attempts.end_busy(folder, attempt)
            self._external.add(stage.id)
            return
        self._ran.append(stage.id)
        if (read_json(folder.result) or {}).get("attempts") == attempt:
            if ended.code != 0:
                complete(folder)  # it was killed between its result and the word of it
            return
        if ended.running.lost_on is not None:  # by the name that the pool has for it
            path = folder.attempt(attempt) / "attempt.json"
            write_json(path, {**(read_json(path) or {}), "node": ended.running.lost_on})
        asked = ended.running.asked_to_stop
        why = self._cancelled.pop(stage.id, None)
        with exclusive(folder.claim):
            status = ends.settle(folder, attempt, ended.code, asked_to_stop=asked, gone=ended.gone)
            if self.interrupted and why is None:
                return
            decision = ends.conclude(folder, attempt, status, self.retry, why)
        state = (read_json(folder.status) or {}).get("state")
        if not decision.again and state == "cancelled":
            todo.pop(stage.id, None)
        if self.fail_fast and not decision.again and state == "failed":
            # Running stages save and end, as after Ctrl-C.
            self.interrupted = self._failed_fast = True

    # -- stopping, telling --------------------------------------------------------------------

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        self._kill = self.interrupted
        self.interrupted = True

    def _stop_all(self, pool: Pool, *, kill: bool) -> None:
        for running in pool.running.values():
            if kill or not running.asked_to_stop:
                pool.stop(running, kill=kill)

    def _tell(self, states: dict[str, StageState], pool: Pool, started: float) -> None:
        # Thousands of stages are summed up when their files were read, not twice a second.
        if self._summed is None or self._summed.states is not states:
            self._pace = self._measured_pace(states)
            self._summed = Summed.of(states, {s: self._cost(s, pool) for s in self.stages})
        counts, left, longest = Counter(self._summed.counts), self._summed.left, 0.0
        for stage_id, running in pool.running.items():
            stage = running.stage
            counts[states[stage_id].state] -= 1
            counts["running"] += 1
            status = read_json(self.tree.stage(stage.kind, stage_id).status) or {}
            self.live[stage_id] = status
            began = self._began.setdefault((stage_id, running.attempt), time.monotonic())
            if not states[stage_id].is_over:
                cost, need = self._cost(stage_id, pool), pool.needs(stage)
                rest = running_left(cost / need, time.monotonic() - began, status)
                left += rest * need - cost
                longest = max(longest, rest)
        self.watch(
            Progress(
                total=len(states),
                counts={k: n for k, n in counts.items() if n > 0},
                bad=self._summed.bad,
                running=list(pool.running.values()),
                live={k: v for k, v in self.live.items() if k in pool.running},
                seconds_left=max(longest, left / len(self.machine.slots)),
                started=started,
                interrupted=self.interrupted,
                elsewhere=pool.elsewhere,
            )
        )

    def _cost(self, stage_id: str, pool: Pool) -> float:
        """Estimated seconds of slots, at the pace of what ended in this submission."""
        stage = self.stages[stage_id]
        known = self._costs.get(stage_id)
        if known is None:
            known = self._costs[stage_id] = self.speeds.seconds(stage) * pool.needs(stage)
        return known * self._pace.get(stage.kind, self._pace.get("", 1.0))

    def _measured_pace(self, states: dict[str, StageState]) -> dict[str, float]:
        done = {s: states[s].result for s in self._ran if s in states}
        return pace(
            (self.stages[s].kind, result["wall_s"]["total"], self.speeds.seconds(self.stages[s]))
            for s, result in done.items()
            if result and "total" in result.get("wall_s", {})
        )

    def _summary(self, states: dict[str, StageState], started: float) -> Summary:
        own = {s: v for s, v in states.items() if v.state in ("failed", "diverged")}
        return Summary(
            ran=self._ran,
            done=[s for s, v in states.items() if v.state == "done"],
            failed={s: f"{v.state}: {v.message or v.reason}" for s, v in own.items()},
            blocked=[s for s, v in states.items() if v.state == "blocked"],
            left=[s for s, v in states.items() if not v.is_over],
            held=[s for s, v in states.items() if v.held],
            interrupted=self.interrupted and not self._failed_fast,
            wall_s=time.monotonic() - started,
        )
