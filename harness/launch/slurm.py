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
from dataclasses import dataclass
from pathlib import Path

from harness.errors import UserError
from harness.launch import batch, commands, nodes, provenance, queue
from harness.launch.arrays import plan_arrays
from harness.launch.policy import lost_on
from harness.launch.settings import Slurm
from harness.launch.submission import Submission
from harness.ledger import attempts, store
from harness.ledger.claim import set_job
from harness.ledger.files import write_json
from harness.ledger.lease import exclusive
from harness.ledger.states import ACTIVE, TOKEN, StageState
from harness.ledger.tree import Tree
from harness.study.again import renewed
from harness.study.schema import Retry
from harness.study.stages import Execution, StageFile

_FRESH_S = 600.0
"""What the queue said may be used again within a submission: see `queue.read_states`."""
_PART, _MOST_PART = 1000, 4000
"""Stages that are claimed at a time: as many as four arrays of the site hold, within these."""
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
    code: provenance.Code | None = None,
) -> Submitted:
    """Submits what is missing of `stages` (in dependency order); claims each stage first.

    One submission at a time per run root. What was taken out of the queue is submitted again too
    (never what `harness cancel` holds), but not by a caretaker. `refusals`: how often sbatch took
    nothing from caretakers in a row, if this is one. `code`: what stages run; as it is now by
    default. Raises UserError where sbatch takes nothing now; of caretakers a next one stays in the
    queue for some time, to try again.
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
            raise UserError(*dict.fromkeys(misfits.values()))
        if misfits:  # of a caretaker the others go on
            print(*dict.fromkeys(misfits.values()), sep="\n", file=sys.stderr)
            wanted = _startable(stages, states, skip | misfits.keys())
        if not wanted:
            return Submitted(jobs={}, arrays=0)
        job_ = Submission(tree, study, stages, profile, f"{study}.{uuid.uuid4().hex[:10]}")
        tries = 0 if refusals is None else refusals + 1
        _describe(job_, retry, tries, code or provenance.code_now(tree))
        return _submit(job_, states, wanted, tries)


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
    if not status.get("job") or queue.has_left(status):
        return False  # of a worker that lives on without its job; behind that Slurm starts nothing
    return state.state in ACTIVE and commands.is_of_this_site(status)


def _submit(
    job_: Submission, states: Mapping[str, StageState], wanted: Sequence[str], tries: int
) -> Submitted:
    stages = job_.stages
    owner = {"cluster": "slurm", **commands.identity(), "token": job_.token}
    for stage_id in wanted:  # by these files the caretaker knows what there is to do
        store.write_stage(job_.tree, stages[stage_id])
    site = commands.max_array_size()
    limit = min(job_.profile.max_array or site, site)
    try:
        job_.watch()
        running = {s: str(v.status["job"]) for s, v in states.items() if _is_job(v)}
        # Part by part: of a submission of thousands that is killed on its way (the caretaker has
        # half an hour) what was put into the queue stays there, and the next one goes on.
        for part in _parts(wanted, min(max(_PART, 4 * limit), _MOST_PART)):
            claimed = [s for s in part if job_.may_run(s) and job_.take(s, states[s], owner)]
            avoid = _places_to_avoid(job_, claimed)
            known = {**running, **job_.jobs}
            job_.put_all(plan_arrays([stages[s] for s in claimed], limit, known, avoid), avoid)
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


def _describe(job_: Submission, retry: Retry, refusals: int, code: provenance.Code) -> None:
    """Writes down what the jobs need."""
    job_.code = code.path
    about = {
        "schema": 1,
        "study": job_.study,
        "token": job_.token,
        "code": str(code.path),
        "git": {"sha": code.git.sha, "name": code.git.name},
        "profile": job_.profile.model_dump(mode="json"),
        "retry": retry.model_dump(mode="json"),
        "refusals": refusals,
        "stages": {s: stage.kind for s, stage in job_.stages.items()},
    }
    provenance.keep_diff(job_.tree, code.git)
    write_json(job_.folder / "submission.json", about)


def _places_to_avoid(job_: Submission, stages: Iterable[str]) -> dict[str, tuple[str, ...]]:
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


def _check_command() -> None:
    for name in ("sbatch", "srun"):
        if shutil.which(name) is None:
            raise UserError(
                f"cluster slurm: no `{name}` on this host; submit from a login node, or choose"
                " another --cluster"
            )
    commands.check_config()


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
