"""Submission to Slurm through submitit: arrays of stages that wait for one another in its queue.

All jobs of a study are submitted at once, each depending on those of its upstream stages, so the
study finishes by itself. A job that ends for a reason that passes puts itself back into the queue
(`harness.launch.job`); a caretaker job after all others submits again what no job could speak for.
The caretaker is submitted first, to start after a while, and is put behind the others at the end: a
submission that is killed on its way is finished by it.
"""

from __future__ import annotations

import math
import shlex
import shutil
import sys
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import submitit
from submitit.core.utils import FailedJobError, FailedSubmissionError

from harness.errors import UserError
from harness.launch import job, nodes, provenance, queue
from harness.launch.arrays import Array, plan_arrays
from harness.launch.policy import lost_on
from harness.launch.settings import Slurm
from harness.ledger import attempts
from harness.ledger.claim import claim, set_job, unclaim
from harness.ledger.files import write_json
from harness.ledger.lease import exclusive
from harness.ledger.states import ACTIVE, StageState
from harness.ledger.tree import Tree
from harness.study.schema import Retry
from harness.study.stages import StageFile

_FRESH_S = 600.0
"""What the queue said may be used again within a submission: see `queue.read_states`."""


@dataclass(frozen=True, kw_only=True)
class Submitted:
    """What a submission put into the queue."""

    jobs: dict[str, str]
    """Stage id -> job id."""
    arrays: int
    caretaker: str | None = None
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
    cancelled_too: bool = True,
) -> Submitted:
    """Submits what is missing of `stages` (in dependency order); claims each stage first.

    One submission at a time per run root. `cancelled_too`: also what was taken out of the queue
    (never what `harness cancel` holds). Raises UserError where sbatch refuses.
    """
    _check_command()
    _check_root(tree.root)
    stages = {k: _placed(s, profile) for k, s in stages.items()}
    with exclusive(tree.root / "slurm" / "submitting"):
        states = queue.read_states(tree, stages, max_age_s=_FRESH_S, is_submitting=True)
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
    if not wanted:
        return Submitted(jobs={}, arrays=0)
    token = f"{study}.{uuid.uuid4().hex[:10]}"
    job_ = _Submission(tree, study, stages, profile, token)
    owner = {"cluster": "slurm", **queue.identity(), "token": token}
    _describe(job_, retry)
    job_.watch()
    try:
        for stage_id in wanted:
            attempt = claim(tree, stages[stage_id], states[stage_id], owner)
            if attempt is not None:
                job_.claimed[stage_id] = attempt
        avoid = _places_to_avoid(job_)
        running = {
            s: str(v.status["job"])
            for s, v in states.items()
            if v.state in ACTIVE and v.status.get("job")
        }
        site = queue.max_array_size()
        limit = min(profile.max_array or site, site)
        arrays = plan_arrays([stages[s] for s in job_.claimed], limit, running, avoid)
        for number, array in enumerate(arrays):
            job_.put(number, array, avoid.get(array.stages[0], ()))
    except UserError as error:
        refused = str(error)
        caretaker = job_.finish(refused)
        if not job_.jobs:
            raise
    except BaseException:
        job_.finish("its submission broke off")
        raise
    else:
        refused = None
        caretaker = job_.finish(refused)
    left = len(job_.claimed) - len(job_.jobs)
    return Submitted(
        jobs=job_.jobs, arrays=len(job_.found), caretaker=caretaker, refused=refused, left=left
    )


def _describe(job_: _Submission, retry: Retry) -> None:
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
        "stages": {s: stage.kind for s, stage in job_.stages.items()},
    }
    provenance.keep_diff(job_.tree, git)
    write_json(job_.folder / "submission.json", about)


def _places_to_avoid(job_: _Submission) -> dict[str, tuple[str, ...]]:
    """Nodes that stages were lost on, if others can stand in."""
    found, profile = {}, job_.profile
    for stage_id, attempt in job_.claimed.items():
        if attempt > 1:  # most have never been tried
            stage = job_.stages[stage_id]
            lost = lost_on(attempts.read_attempts(job_.tree.stage(stage.kind, stage_id)))
            nodes_ = nodes.avoidable(
                lost, profile.partition, _nodes_of(stage, profile), profile.constraint
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
    code: Path = Path()

    @property
    def folder(self) -> Path:
        return self.tree.root / "slurm" / self.token

    def watch(self) -> None:
        """Submits the caretaker, to start after a while if nobody puts it behind jobs till then.

        Before the others also for sites that take only so many jobs (MaxSubmitJobs): it submits
        the rest when these are over.
        """
        try:
            self.caretaker = submit_caretaker(self.folder, self.profile, self.study, self.code)
        except UserError:
            self.caretaker = None  # the study goes without; the summary says so

    def put(self, number: int, array: Array, avoid: tuple[str, ...]) -> None:
        """Submits one array."""
        tasks = self.folder / f"tasks.{number}.json"
        rows = [{"kind": self.stages[s].kind, "stage": s} for s in array.stages]
        # Before sbatch: by this file a job is known whose number nobody could write down.
        write_json(tasks, {"schema": 1, "submission": str(self.folder), "tasks": rows})
        after = _numbered(array.after, self.found)
        first = self.stages[array.stages[0]]
        options = _options(first, self.profile, self.study, self.token, number, after)
        if avoid:
            options["exclude"] = ",".join(avoid)
        lines = _lines(self.tree, tasks, self.profile, self.code)
        ids = _sbatch(self.folder, tasks, options, len(rows), lines)
        self.found.append(ids)
        for stage_id, job_id in zip(array.stages, ids, strict=True):
            self.jobs[stage_id] = job_id
            set_job(self.tree, self.stages[stage_id], self.claimed[stage_id], job_id)
        queue.remember(ids)

    def drop(self, stages: Iterable[str], why: str) -> None:
        """Takes claims back."""
        for stage_id in stages:
            folder = self.tree.stage(self.stages[stage_id].kind, stage_id)
            unclaim(folder, self.claimed[stage_id], why)

    def finish(self, why: str | None) -> str | None:
        """Puts the caretaker behind the jobs, and takes back what is not in the queue.

        Returns the caretaker's job, if there is one.
        """
        if self.caretaker is not None and self.found:
            # Where this is refused it starts in a while, finds the jobs and waits for them then.
            queue.scontrol(
                "update",
                f"JobId={self.caretaker}",
                f"Dependency={_after(numbers[0] for numbers in self.found)}",
                "StartTime=now",
            )
        elif self.caretaker is not None:
            queue.cancel_jobs([self.caretaker])
            self.caretaker = None
        self.drop([s for s in self.claimed if s not in self.jobs], why or "")
        return self.caretaker


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


def _nodes_of(stage: StageFile, profile: Slurm) -> int:
    execution = stage.execution
    by_gpus = math.ceil(execution.ranks / profile.gpus_per_node) if profile.device == "cuda" else 1
    return max(execution.nodes, by_gpus)


def _options(
    stage: StageFile, profile: Slurm, study: str, token: str, number: int, after: str
) -> dict[str, Any]:
    """submitit's parameters for stages with the needs of this one."""
    execution = stage.execution
    on_gpu = profile.device == "cuda"
    nodes = _nodes_of(stage, profile)
    if execution.ranks % nodes:
        raise UserError(
            f"{stage.id}: {execution.ranks} ranks on {nodes} nodes of at most"
            f" {profile.gpus_per_node} GPUs do not divide; choose resources.ranks or nodes to fit"
        )
    per_node = execution.ranks // nodes
    options: dict[str, Any] = {
        **_site(profile),
        "job_name": f"{study}.{stage.kind}",
        "comment": queue.comment_of(token, number),
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


def _code_lines(code: Path) -> list[str]:
    """The copy of the code comes first, also where the job starts in somebody's checkout."""
    path = f"export PYTHONPATH={shlex.quote(str(code))}${{PYTHONPATH:+:$PYTHONPATH}}"
    return [path, "export PYTHONSAFEPATH=1"]


def _lines(tree: Tree, tasks: Path, profile: Slurm, code: Path) -> tuple[list[str], list[str]]:
    """Shell lines before and after srun."""
    python = shlex.quote(sys.executable)
    call = f"{python} -m harness.launch.job"
    file = shlex.quote(str(tasks))
    setup = [
        # The shell outlives the signals that stop its steps: it has to say how they ended.
        "trap : TERM USR2",
        f"export HARNESS_ROOT={shlex.quote(str(tree.root))}",
        *_code_lines(code),
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


def submit_caretaker(
    folder: Path, profile: Slurm, study: str, code: Path, after: Iterable[str] = ()
) -> str | None:
    """A job that tends the submission in `folder`, after a while and after these jobs; its id.

    None where the profile wants none. Raises UserError where sbatch refuses.
    """
    if not profile.caretaker:
        return None
    python = shlex.quote(sys.executable)
    options = {
        **_site(profile),
        "job_name": f"{study}.caretaker",
        "comment": f"caretaker.{folder.name}",
        "time": 30,
        "nodes": 1,
        "ntasks_per_node": 1,
        "cpus_per_task": 1,
        "use_srun": False,
    }
    options["additional_parameters"]["begin"] = f"now+{profile.caretaker_s}"
    if dependency := _after(after):
        options["dependency"] = dependency
    setup = [
        f"export HARNESS_ROOT={shlex.quote(str(folder.parent.parent))}",
        *_code_lines(code),
        *(f"export {k}={shlex.quote(v)}" for k, v in profile.env.items()),
        *profile.setup,
        f"{python} -m harness.launch.caretaker {shlex.quote(str(folder))}",
        "exit $?",
    ]
    # The lines above are the whole job: the shell ends before submitit's own command.
    return _sbatch(folder, folder / "submission.json", options, 1, (setup, []))[0]


def _after(jobs: Iterable[str]) -> str:
    """The dependency on the end of these jobs, whole arrays of them."""
    arrays = dict.fromkeys(job_id.partition("_")[0] for job_id in jobs)
    return "afterany:" + ":".join(arrays) if arrays else ""
