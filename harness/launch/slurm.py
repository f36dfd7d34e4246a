"""Submission to Slurm through submitit: arrays of stages that wait for one another in its queue.

All jobs of a study are submitted at once, each depending on those of its upstream stages, so the
study finishes by itself. A job that ends for a reason that passes puts itself back into the queue
(`harness.launch.job`); a caretaker job after all others submits again what no job could speak for.
"""

from __future__ import annotations

import math
import shlex
import shutil
import sys
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import submitit
from submitit.core.utils import FailedJobError, FailedSubmissionError

from harness.errors import UserError
from harness.launch import job, provenance, queue
from harness.launch.settings import Slurm
from harness.ledger.claim import claim, set_job
from harness.ledger.files import write_json
from harness.ledger.lease import exclusive
from harness.ledger.states import ACTIVE, StageState
from harness.ledger.tree import Tree
from harness.study.schema import Retry
from harness.study.stages import StageFile


@dataclass(frozen=True, kw_only=True)
class Array:
    """Stages of one job array, in the order of its tasks."""

    stages: tuple[str, ...]
    after: str = ""
    """A dependency between arrays, before they have numbers: `aftercorr:3,afterok:1_4` names
    array 3 of this plan, and task 4 of array 1."""


@dataclass(frozen=True, kw_only=True)
class Submitted:
    """What a submission put into the queue."""

    jobs: dict[str, str]
    """Stage id -> job id."""
    arrays: int
    caretaker: str | None = None


# --- which arrays, and what they wait for --------------------------------------------------


def plan_arrays(
    todo: Sequence[StageFile], limit: int, running: Mapping[str, str] | None = None
) -> list[Array]:
    """Cuts stages (in dependency order) into arrays of equal needs, at most `limit` tasks each.

    Tasks of one array have equal resources. Where each waits for the task of equal number of one
    earlier array, one `aftercorr` says so for all; other stages with one and the same set of
    upstream stages share an array behind `afterok`. `running` maps upstream stages that are not
    in `todo` to their jobs.
    """
    ids = {s.id for s in todo}
    fan_out: dict[str, int] = {}
    level: dict[str, int] = {}
    for stage in todo:
        upstream = [u for u in stage.config.upstream.values() if u in ids]
        level[stage.id] = 1 + max((level[u] for u in upstream), default=-1)
        for u in upstream:
            fan_out[u] = fan_out.get(u, 0) + 1
    plan = _Plan(limit, running or {})
    for depth in range(max(level.values(), default=-1) + 1):
        groups: dict[tuple[Any, ...], list[StageFile]] = {}
        for stage in todo:
            if level[stage.id] == depth:
                groups.setdefault(_needs(stage), []).append(stage)
        for group in groups.values():
            # Many dependants first: theirs then form arrays that start at task 0 too.
            plan.add(sorted(group, key=lambda s: -fan_out.get(s.id, 0)))
    return plan.arrays


def _needs(stage: StageFile) -> tuple[Any, ...]:
    e = stage.execution
    return (stage.kind, e.ranks, e.nodes, e.threads, e.memory_gib, e.time_s)


@dataclass
class _Plan:
    limit: int
    running: Mapping[str, str]
    arrays: list[Array] = field(default_factory=list)
    place: dict[str, tuple[int, int]] = field(default_factory=dict)

    def add(self, group: list[StageFile]) -> None:
        """Arrays for stages of equal needs whose upstream stages all have theirs."""
        rest: dict[tuple[str, ...], list[str]] = {}
        rows: dict[int, dict[int, list[str]]] = {}
        for stage in group:
            upstream = list(dict.fromkeys(stage.config.upstream.values()))
            planned = [u for u in upstream if u in self.place]
            waits = tuple(f"job:{self.running[u]}" for u in upstream if u in self.running)
            if len(planned) == 1 and not waits and len(self._array_of(planned[0]).stages) > 1:
                array, task = self.place[planned[0]]
                rows.setdefault(array, {}).setdefault(task, []).append(stage.id)
            else:
                tasks = (self._task(u) for u in planned)
                rest.setdefault((*tasks, *waits), []).append(stage.id)
        for array, by_task in rows.items():
            while self._is_prefix(by_task):
                layer = [by_task[t].pop(0) for t in range(len(by_task))]
                self._put(layer, f"aftercorr:{array}")
                by_task = {t: found for t, found in by_task.items() if found}
            for task, found in by_task.items():
                rest.setdefault((f"{array}_{task}",), []).extend(found)
        for after, found in rest.items():
            for start in range(0, len(found), self.limit):
                self._put(
                    found[start : start + self.limit], ",".join(f"afterok:{a}" for a in after)
                )

    def _array_of(self, stage: str) -> Array:
        return self.arrays[self.place[stage][0]]

    def _task(self, stage: str) -> str:
        array, task = self.place[stage]
        return f"{array}_{task}"

    def _is_prefix(self, by_task: dict[int, list[str]]) -> bool:
        return len(by_task) > 1 and set(by_task) == set(range(len(by_task)))

    def _put(self, stages: list[str], after: str) -> None:
        for task, stage in enumerate(stages):
            self.place[stage] = (len(self.arrays), task)
        self.arrays.append(Array(stages=tuple(stages), after=after))


# --- submission ----------------------------------------------------------------------------


def submit(
    tree: Tree,
    study: str,
    stages: Mapping[str, StageFile],
    profile: Slurm,
    retry: Retry,
    *,
    cancelled_too: bool = True,
) -> Submitted:
    """Submits what is missing of `stages` (in dependency order); claims each stage first.

    One submission at a time per run root. `cancelled_too`: also what was taken out of the queue
    (never what `harness cancel` holds). Raises UserError where sbatch refuses.
    """
    _check_command()
    stages = {k: _placed(s, profile) for k, s in stages.items()}
    with exclusive(tree.root / "slurm" / "submitting"):
        states = queue.read_states(tree, stages)
        skip = set() if cancelled_too else {s for s, v in states.items() if v.state == "cancelled"}
        wanted = _startable(stages, states, skip)
        return _submit(tree, study, stages, states, wanted, profile, retry)


def _startable(
    stages: Mapping[str, StageFile], states: Mapping[str, StageState], skip: set[str]
) -> list[str]:
    """What nobody runs, with every upstream stage done, under way or in this list too."""
    found: list[str] = []
    for stage_id, stage in stages.items():
        upstream = [u for u in stage.config.upstream.values() if u in states]
        ready = all(states[u].state in ("done", *ACTIVE) or u in found for u in upstream)
        idle = not states[stage_id].is_over and states[stage_id].state not in ACTIVE
        if ready and idle and stage_id not in skip:
            found.append(stage_id)
    return found


def _submit(
    tree: Tree,
    study: str,
    stages: Mapping[str, StageFile],
    states: Mapping[str, StageState],
    wanted: Sequence[str],
    profile: Slurm,
    retry: Retry,
) -> Submitted:
    token = f"{study}.{uuid.uuid4().hex[:10]}"
    folder = tree.root / "slurm" / token
    claimed: dict[str, int] = {}
    for stage_id in wanted:
        owner = {"cluster": "slurm", "token": token}
        attempt = claim(tree, stages[stage_id], states[stage_id], owner)
        if attempt is not None:
            claimed[stage_id] = attempt
    if not claimed:
        return Submitted(jobs={}, arrays=0)
    git = provenance.git_state()
    code = provenance.snapshot(tree, git)
    running = {
        s: str(v.status["job"])
        for s, v in states.items()
        if v.state in ACTIVE and "job" in v.status
    }
    site = queue.max_array_size()
    limit = min(profile.max_array or site, site)
    arrays = plan_arrays([stages[s] for s in claimed], limit, running)
    about = {
        "schema": 1,
        "study": study,
        "token": token,
        "code": str(code),
        "git": {"sha": git.sha, "name": git.name},
        "profile": profile.model_dump(mode="json"),
        "retry": retry.model_dump(mode="json"),
        "stages": {s: stage.kind for s, stage in stages.items()},
    }
    provenance.keep_diff(tree, git)
    write_json(folder / "submission.json", about)
    found: list[list[str]] = []
    for number, array in enumerate(arrays):
        tasks = folder / f"tasks.{number}.json"
        rows = [{"kind": stages[s].kind, "stage": s} for s in array.stages]
        write_json(tasks, {"schema": 1, "submission": str(folder), "tasks": rows})
        first = stages[array.stages[0]]
        options = _options(first, profile, study, token, code, _numbered(array.after, found))
        found.append(_sbatch(folder, tasks, options, len(rows), _lines(tree, tasks, profile, code)))
        for stage_id, number_ in zip(array.stages, found[-1], strict=True):
            set_job(tree, stages[stage_id], claimed[stage_id], number_)
    jobs = {
        s: j
        for a, numbers in zip(arrays, found, strict=True)
        for s, j in zip(a.stages, numbers, strict=True)
    }
    caretaker = _caretaker(tree, folder, profile, study, token, code, found)
    return Submitted(jobs=jobs, arrays=len(arrays), caretaker=caretaker)


def _check_command() -> None:
    for name in ("sbatch", "srun"):
        if shutil.which(name) is None:
            raise UserError(
                f"cluster slurm: no `{name}` on this host; submit from a login node, or choose"
                " another --cluster"
            )


def _placed(stage: StageFile, profile: Slurm) -> StageFile:
    execution = stage.execution.model_copy(update={"device": profile.device})
    return stage.model_copy(update={"execution": execution})


def _numbered(after: str, found: list[list[str]]) -> str:
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


def _options(
    stage: StageFile, profile: Slurm, study: str, token: str, code: Path, after: str
) -> dict[str, Any]:
    """submitit's parameters for stages with the needs of this one."""
    execution = stage.execution
    on_gpu = profile.device == "cuda"
    nodes = max(
        execution.nodes, math.ceil(execution.ranks / profile.gpus_per_node) if on_gpu else 1
    )
    if execution.ranks % nodes:
        raise UserError(
            f"{stage.id}: {execution.ranks} ranks on {nodes} nodes of at most"
            f" {profile.gpus_per_node} GPUs do not divide; choose resources.ranks or nodes to fit"
        )
    per_node = execution.ranks // nodes
    options: dict[str, Any] = {
        **_site(profile),
        "job_name": f"{study}.{stage.kind}",
        "comment": token,
        "time": math.ceil((execution.time_s or profile.time) / 60),
        "nodes": nodes,
        "ntasks_per_node": per_node,
        "cpus_per_task": max(execution.threads, profile.cpus_per_gpu if on_gpu else 1),
        "signal_delay_s": profile.signal_s,
        # A dead rank must not leave the others waiting in a collective, paid for.
        "srun_args": ["--kill-on-bad-exit=1"],
    }
    more = options["additional_parameters"]
    if on_gpu and profile.gpu_option == "gpus_per_node":
        options["gpus_per_node"] = per_node
    elif on_gpu and profile.gpu_option == "gres":
        options["gres"] = f"gpu:{per_node}"
    if execution.memory_gib is not None:
        more["mem"] = f"{math.ceil(execution.memory_gib / nodes * 1024)}M"
    elif profile.memory_gib_per_gpu is not None and on_gpu:
        more["mem"] = f"{math.ceil(profile.memory_gib_per_gpu * per_node * 1024)}M"
    if after:
        options["dependency"] = after
        # Behind a stage that failed for good nothing can run; its jobs need not wait for ever.
        more["kill-on-invalid-dep"] = "yes"
    if profile.parallel is not None:
        options["array_parallelism"] = profile.parallel
    else:
        options["array_parallelism"] = 100_000
    return options


def _site(profile: Slurm) -> dict[str, Any]:
    named = {k: getattr(profile, k) for k in ("partition", "account", "qos", "constraint")}
    more: dict[str, Any] = {("requeue" if profile.requeue else "no-requeue"): True}
    return {
        **{k: v for k, v in named.items() if v is not None},
        "additional_parameters": {**more, **profile.sbatch},
    }


def _lines(tree: Tree, tasks: Path, profile: Slurm, code: Path) -> tuple[list[str], list[str]]:
    """Shell lines before and after srun."""
    python = shlex.quote(sys.executable)
    call = f"{python} -m harness.launch.job"
    file = shlex.quote(str(tasks))
    setup = [
        # The shell outlives the signals that stop its steps: it has to say how they ended.
        "trap : TERM USR2",
        f"export HARNESS_ROOT={shlex.quote(str(tree.root))}",
        f"export PYTHONPATH={shlex.quote(str(code))}${{PYTHONPATH:+:$PYTHONPATH}}",
        # Or the folder of the submission, if that is a checkout, would come before the copy.
        "export PYTHONSAFEPATH=1",
        # Since 22.05 srun no longer takes this from sbatch.
        'export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-1}"',
        f"export DS_ACCELERATOR={profile.device}",
        *(f"export {k}={shlex.quote(v)}" for k, v in profile.env.items()),
        *profile.setup,
        f'exports="$({call} begin {file})"; code=$?',
        f"if [ $code = {job.NOTHING_TO_DO} ]; then exit 0; fi",
        "if [ $code != 0 ]; then exit $code; fi",
        'eval "$exports"',
    ]
    return setup, [f"code=$?; {call} end {file} --code $code", "exit $?"]


def _sbatch(
    folder: Path,
    tasks: Path,
    options: Mapping[str, Any],
    count: int,
    lines: tuple[list[str], list[str]],
) -> list[str]:
    """Submits one array; the job ids of its tasks."""
    with queue.outside_of_a_job():
        executor = submitit.SlurmExecutor(folder=folder / "jobs")
        executor.update_parameters(**options, setup=lines[0], teardown=lines[1])
        try:
            with executor.batch():
                found = [executor.submit(job.run_rank, str(tasks)) for _ in range(count)]
        except (FailedJobError, FailedSubmissionError) as error:
            last = str(error).strip().splitlines()[-1]
            raise UserError(f"sbatch refused: {last}; see the profile's options") from None
    return [str(j.job_id) for j in found]


def _caretaker(
    tree: Tree,
    folder: Path,
    profile: Slurm,
    study: str,
    token: str,
    code: Path,
    found: list[list[str]],
) -> str | None:
    if not profile.caretaker:
        return None
    arrays = dict.fromkeys(numbers[0].partition("_")[0] for numbers in found)
    python = shlex.quote(sys.executable)
    options = {
        **_site(profile),
        "job_name": f"{study}.caretaker",
        "comment": f"caretaker.{token}",
        "time": 30,
        "nodes": 1,
        "ntasks_per_node": 1,
        "cpus_per_task": 1,
        "dependency": "afterany:" + ":".join(arrays),
        "use_srun": False,
    }
    setup = [
        f"export HARNESS_ROOT={shlex.quote(str(tree.root))}",
        f"export PYTHONPATH={shlex.quote(str(code))}${{PYTHONPATH:+:$PYTHONPATH}}",
        "export PYTHONSAFEPATH=1",
        *(f"export {k}={shlex.quote(v)}" for k, v in profile.env.items()),
        *profile.setup,
        f"{python} -m harness.launch.caretaker {shlex.quote(str(folder))}",
        "exit $?",
    ]
    # The lines above are the whole job: the shell ends before submitit's own command.
    return _sbatch(folder, folder / "submission.json", options, 1, (setup, []))[0]
