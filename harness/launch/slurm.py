"""Submission to Slurm through submitit: arrays of stages that wait for one another in its queue.

All jobs of a study are submitted at once, each depending on those of its upstream stages, so the
study finishes by itself. A job that ends for a reason that passes puts itself back into the queue
(`harness.launch.job`); a caretaker job after all others submits again what no job could speak for.
The caretaker is submitted first, to start after a while, and is put behind the others at the end: a
submission that is killed on its way is finished by it.
"""

from __future__ import annotations

import shutil
import sys
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from harness.errors import HarnessError, UserError
from harness.launch import batch, nodes, provenance, queue
from harness.launch.arrays import Array, plan_arrays
from harness.launch.policy import lost_on
from harness.launch.settings import Slurm
from harness.ledger import attempts, store
from harness.ledger.claim import claim, set_job, unclaim
from harness.ledger.files import write_json
from harness.ledger.lease import exclusive
from harness.ledger.states import ACTIVE, TOKEN, StageState
from harness.ledger.tree import Tree
from harness.study.again import renewed
from harness.study.schema import Retry
from harness.study.stages import Execution, StageFile

_FRESH_S = 600.0
"""What the queue said may be used again within a submission: see `queue.read_states`."""
_PART = 1000
"""Stages that are claimed at a time, at least: or as many as four arrays of the site hold."""
_FULL = 3
"""Arrays in a row that sbatch refuses: it takes no more."""
_MOST_REFUSALS = 100
"""Caretakers in a row that sbatch takes nothing else from: a day, at their pace."""


@dataclass(frozen=True, kw_only=True)
class Submitted:
    """What a submission put into the queue."""

    jobs: dict[str, str]
    """Stage id -> job id."""
    arrays: int
    caretaker: str | None = None
    no_caretaker: str | None = None
    """Why there is none, where sbatch refused it."""
    refused: str | None = None
    """Why sbatch took no more, if it took some."""
    left: int = 0
    """Stages that it did not take."""


# --- submission ----------------------------------------------------------------------------


def submit(
    tree: Tree,
    study: str,
    stages: Mapping[str, StageFile],
    profile: Slurm,
    retry: Retry,
    *,
    refusals: int | None = None,
) -> Submitted:
    """Submits what is missing of `stages` (in dependency order); claims each stage first.

    One submission at a time per run root. What was taken out of the queue is submitted again too
    (never what `harness cancel` holds), but not by a caretaker. `refusals`: how often sbatch took
    nothing from caretakers in a row, if this is one. Raises UserError where it takes nothing now;
    of caretakers a next one stays in the queue for some time, to try again.
    """
    _check_command()
    _check_root(tree.root)
    stages = _placed(tree, stages, profile)
    with exclusive(tree.root / "slurm" / "submitting"):
        states = queue.read_states(tree, stages, max_age_s=_FRESH_S, is_submitting=True)
        states = numbered(tree, stages, states)
        cancelled = {s for s, v in states.items() if v.state == "cancelled"}
        skip = set() if refusals is None else cancelled
        wanted = _startable(stages, states, skip)
        misfits = _misfits([stages[s] for s in wanted], profile)
        if misfits and refusals is None:  # before anything is written
            raise UserError(*misfits.values())
        if misfits:  # of a caretaker the others go on
            print(*misfits.values(), sep="\n", file=sys.stderr)
            wanted = _startable(stages, states, skip | misfits.keys())
        return _submit(tree, study, stages, states, wanted, profile, retry, refusals)


def _misfits(stages: Iterable[StageFile], profile: Slurm) -> dict[str, str]:
    """Stages that a profile has no nodes for, and why."""
    asked: dict[int, str | None] = {}
    found = {}
    for stage in stages:
        key = id(stage.execution)
        if key not in asked:
            try:
                batch.options_of(stage, profile, "", "", 0, "")
                asked[key] = None
            except UserError as error:
                asked[key] = str(error)
        why = asked[key]
        if why is not None:
            found[stage.id] = why
    return found


def numbered(
    tree: Tree, stages: Mapping[str, StageFile], states: Mapping[str, StageState]
) -> dict[str, StageState]:
    """The states, with the numbers of jobs whose submission was killed before it noted them.

    Others are to depend on such a job. The caller holds the lock of submissions.
    """
    found = dict(states)
    tokens = {
        str(v.status[TOKEN])
        for v in states.values()
        if v.state in ACTIVE and v.status.get(TOKEN) and not v.status.get("job")
    }
    for token in tokens:
        for stage_id, job_id in queue.numbers(tree, token).items():
            own = found.get(stage_id)
            if own is not None and own.status.get(TOKEN) == token and not own.status.get("job"):
                set_job(tree, stages[stage_id], int(own.status["attempt"]), job_id)
                found[stage_id] = own._replace(status={**own.status, "job": job_id})
    return found


def _startable(
    stages: Mapping[str, StageFile], states: Mapping[str, StageState], skip: set[str]
) -> list[str]:
    """What nobody runs, with every upstream stage done, under way or in this list too."""
    found: list[str] = []
    for stage_id, stage in stages.items():
        upstream = [u for u in stage.config.upstream.values() if u in states]
        ready = all(_is_sure(states[u]) or u in found for u in upstream)
        idle = not states[stage_id].is_over and states[stage_id].state not in ACTIVE
        if ready and idle and stage_id not in skip:
            found.append(stage_id)
    return found


def _is_sure(upstream: StageState) -> bool:
    """Done, or a job that another can wait for: one that runs elsewhere is none."""
    return upstream.state == "done" or _is_job(upstream)


def _is_job(state: StageState) -> bool:
    """True for a stage that is one of this cluster's jobs now."""
    status = state.status
    return state.state in ACTIVE and bool(status.get("job")) and queue.is_of_this_site(status)


def _submit(
    tree: Tree,
    study: str,
    stages: Mapping[str, StageFile],
    states: Mapping[str, StageState],
    wanted: Sequence[str],
    profile: Slurm,
    retry: Retry,
    refusals: int | None,
) -> Submitted:
    if not wanted:
        return Submitted(jobs={}, arrays=0)
    token = f"{study}.{uuid.uuid4().hex[:10]}"
    job_ = _Submission(tree, study, stages, profile, token)
    owner = {"cluster": "slurm", **queue.identity(), "token": token}
    tries = 0 if refusals is None else refusals + 1
    _describe(job_, retry, tries)
    for stage_id in wanted:  # by these files the caretaker knows what there is to do
        store.write_stage(tree, stages[stage_id])
    site = queue.max_array_size()
    limit = min(profile.max_array or site, site)
    try:
        job_.watch()
        running = {s: str(v.status["job"]) for s, v in states.items() if _is_job(v)}
        # Part by part: of a submission of thousands that is killed on its way (the caretaker has
        # half an hour) what was put into the queue stays there, and the next one goes on.
        for part in _parts(wanted, max(_PART, 4 * limit)):
            claimed = [s for s in part if job_.may_run(s) and job_.take(s, states[s], owner)]
            avoid = _places_to_avoid(job_, claimed)
            known = {**running, **job_.jobs}
            job_.put_all(plan_arrays([stages[s] for s in claimed], limit, known, avoid), avoid)
            if job_.is_full:
                break
    except BaseException:
        job_.finish("its submission broke off")
        raise
    refused = str(job_.refusals[0]) if job_.refusals else None
    job_.finish(refused, keep_caretaker=0 < tries <= _MOST_REFUSALS)
    if job_.refusals and not job_.jobs and job_.caretaker is None:
        raise job_.refusals[0]
    return Submitted(
        jobs=job_.jobs,
        arrays=len(job_.found),
        caretaker=job_.caretaker,
        no_caretaker=job_.no_caretaker,
        refused=refused,
        left=len(wanted) - job_.gone - len(job_.jobs),
    )


def _parts(stages: Sequence[str], size: int) -> Iterator[Sequence[str]]:
    for start in range(0, len(stages), size):
        yield stages[start : start + size]


def _describe(job_: _Submission, retry: Retry, refusals: int) -> None:
    """Writes down what the jobs need, beside a copy of the code that they run."""
    git = provenance.git_state()
    job_.code = provenance.snapshot(job_.tree, git)
    about = {
        "schema": 1,
        "study": job_.study,
        "token": job_.token,
        "code": str(job_.code),
        "git": {"sha": git.sha, "name": git.name},
        "profile": job_.profile.model_dump(mode="json"),
        "retry": retry.model_dump(mode="json"),
        "refusals": refusals,
        "stages": {s: stage.kind for s, stage in job_.stages.items()},
    }
    provenance.keep_diff(job_.tree, git)
    write_json(job_.folder / "submission.json", about)


def _places_to_avoid(job_: _Submission, stages: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Nodes that these stages were lost on, if others can stand in."""
    found, profile = {}, job_.profile
    for stage_id in stages:
        if job_.claimed[stage_id] > 1:  # most have never been tried
            stage = job_.stages[stage_id]
            lost = lost_on(attempts.read_attempts(job_.tree.stage(stage.kind, stage_id)))
            nodes_ = nodes.avoidable(
                lost, profile.partition, batch.nodes_of(stage, profile), profile.constraint
            )
            if nodes_:
                found[stage_id] = nodes_
    return found


@dataclass
class _Submission:
    """One submission while it is under way: what it claimed, and what of it is in the queue."""

    tree: Tree
    study: str
    stages: Mapping[str, StageFile]
    profile: Slurm
    token: str
    claimed: dict[str, int] = field(default_factory=dict)
    found: list[list[str]] = field(default_factory=list)
    """Job ids by array."""
    jobs: dict[str, str] = field(default_factory=dict)
    caretaker: str | None = None
    no_caretaker: str | None = None
    refusals: list[batch.RefusedError] = field(default_factory=list)
    is_full: bool = False
    """Whether sbatch took nothing any more."""
    gone: int = 0
    """Stages that others took meanwhile."""
    code: Path = Path()
    _number: int = 0
    _in_a_row: int = 0
    """Refusals."""
    _refused: set[str] = field(default_factory=set)
    """Stages that sbatch did not take, and those behind them."""

    @property
    def folder(self) -> Path:
        return self.tree.root / "slurm" / self.token

    def watch(self) -> None:
        """Submits the caretaker, to start after a while if nobody puts it behind jobs till then.

        Before the others also for sites that take only so many jobs (MaxSubmitJobs): it submits
        the rest when these are over.
        """
        try:
            self.caretaker = batch.submit_caretaker(
                self.folder, self.profile, self.study, self.code
            )
        except UserError as error:
            self.no_caretaker = str(error)  # the study goes without; the summary says so

    def may_run(self, stage_id: str) -> bool:
        """False behind a stage that was refused."""
        if self._refused.isdisjoint(self.stages[stage_id].config.upstream.values()):
            return True
        self._refused.add(stage_id)
        return False

    def take(self, stage_id: str, seen: StageState, owner: Mapping[str, str]) -> bool:
        """Claims a stage; False if somebody else was quicker."""
        attempt = claim(self.tree, self.stages[stage_id], seen, owner)
        if attempt is None:
            self.gone += 1
            return False
        self.claimed[stage_id] = attempt
        return True

    def put_all(self, arrays: Sequence[Array], avoid: Mapping[str, tuple[str, ...]]) -> None:
        """Submits the arrays of a plan. One that is refused for what it asks for does not hold up
        those that do not wait for it; the site's limit, after some, ends it."""
        ids: dict[int, list[str]] = {}
        for place, array in enumerate(arrays):
            # Of an array all wait for tasks of one other, or for the same ones.
            if not all([self.may_run(s) for s in array.stages]):
                self._refused.update(array.stages)
                continue
            try:
                ids[place] = self._put(array, avoid.get(array.stages[0], ()), ids)
                self._in_a_row = 0
            except batch.RefusedError as error:
                self.refusals.append(error)
                self._refused.update(array.stages)
                self._in_a_row += 1
                if self._in_a_row == _FULL:
                    self.is_full = True
                    return

    def _put(
        self, array: Array, avoid: tuple[str, ...], ids_of: Mapping[int, list[str]]
    ) -> list[str]:
        """Submits one array, of a plan whose earlier ones have these ids."""
        number, self._number = self._number, self._number + 1
        tasks = self.folder / f"tasks.{number}.json"
        rows = [{"kind": self.stages[s].kind, "stage": s} for s in array.stages]
        # Before sbatch: by this file a job is known whose number nobody could write down.
        write_json(tasks, {"schema": 1, "submission": str(self.folder), "tasks": rows})
        after = _numbered(array.after, ids_of)
        first = self.stages[array.stages[0]]
        options = batch.options_of(first, self.profile, self.study, self.token, number, after)
        if avoid:
            options["exclude"] = ",".join(avoid)
        lines = batch.lines_of(self.tree, tasks, self.profile, self.code)
        ids = batch.sbatch(self.folder, tasks, options, len(rows), lines)
        self.found.append(ids)
        self.jobs |= zip(array.stages, ids, strict=True)  # all, before anything can interrupt this
        for stage_id, job_id in zip(array.stages, ids, strict=True):
            set_job(self.tree, self.stages[stage_id], self.claimed[stage_id], job_id)
        queue.remember(ids)
        return ids

    def drop(self, stages: Iterable[str], why: str) -> None:
        """Takes claims back."""
        for stage_id in stages:
            folder = self.tree.stage(self.stages[stage_id].kind, stage_id)
            unclaim(folder, self.claimed[stage_id], why)

    def finish(self, why: str | None, *, keep_caretaker: bool = False) -> None:
        """Takes back what is not in the queue, and puts the caretaker behind what is.

        Without jobs it is taken back too, unless it shall be kept, to try again.
        """
        self.drop([s for s in self.claimed if s not in self.jobs], why or "")
        if self.caretaker is None and why is not None:  # sbatch may have been interrupted
            self.caretaker = next(iter(queue.caretakers(self.token)), None)
        if self.caretaker is not None:
            self.no_caretaker = None
        if self.caretaker is None:
            return
        if self.found:
            self._put_behind(self.caretaker)
        elif not keep_caretaker:
            # Slurm may answer no more; the caretaker finds nothing to do then.
            with suppress(HarnessError, OSError):
                queue.cancel_jobs([{"job": self.caretaker}])
            self.caretaker = None

    def _put_behind(self, caretaker: str) -> None:
        after = [numbers[0] for numbers in self.found]
        update = (
            "update",
            f"JobId={caretaker}",
            f"Dependency={batch.after_end(after)}",
            "StartTime=now",
        )
        if queue.scontrol(*update) is None and not queue.caretakers(self.token):
            # The submission took so long that the caretaker has given up waiting for it.
            with suppress(UserError):
                self.caretaker = batch.submit_caretaker(
                    self.folder, self.profile, self.study, self.code, after
                )


def _check_command() -> None:
    for name in ("sbatch", "srun"):
        if shutil.which(name) is None:
            raise UserError(
                f"cluster slurm: no `{name}` on this host; submit from a login node, or choose"
                " another --cluster"
            )


def _check_root(root: Path) -> None:
    """Slurm expands % in the names of logs, and a line break ends a line of a batch script."""
    bad = sorted({c for c in str(root) if c == "%" or not c.isprintable()})
    if bad:
        shown = ", ".join(ascii(c) for c in bad)
        raise UserError(
            f"run root {str(root)!a} has {shown} in its path, which Slurm takes for"
            " something else; choose another --root"
        )


def _placed(tree: Tree, stages: Mapping[str, StageFile], profile: Slurm) -> dict[str, StageFile]:
    """The stages on the cluster's device: those that run alike still have one `execution`."""
    known: dict[int, tuple[Execution, Execution]] = {}
    for stage in stages.values():
        if id(stage.execution) not in known:
            there = stage.execution.model_copy(update={"device": profile.device})
            known[id(stage.execution)] = (stage.execution, provenance.kept(tree, there))
    return {k: renewed(s, {"execution": known[id(s.execution)][1]}) for k, s in stages.items()}


def _numbered(after: str, found: Mapping[int, list[str]]) -> str:
    """A plan's dependency with the numbers of real jobs."""
    terms = []
    for term in filter(None, after.split(",")):
        how, _, what = term.partition(":")
        if what.startswith("job:"):
            terms.append(f"{how}:{what.removeprefix('job:')}")
        elif how == "aftercorr":
            terms.append(f"{how}:{found[int(what)][0].partition('_')[0]}")
        else:
            array, _, task = what.partition("_")
            terms.append(f"{how}:{found[int(array)][int(task)]}")
    return ",".join(terms)
