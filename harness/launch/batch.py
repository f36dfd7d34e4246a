"""Batch jobs through submitit: what sbatch is told of a stage, and the shell lines around it."""

from __future__ import annotations

import math
import shlex
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import submitit
from submitit.core.utils import FailedJobError, FailedSubmissionError

from harness.errors import EXIT_REQUEUE, UserError
from harness.launch import commands, job, queue
from harness.launch.settings import Slurm
from harness.ledger.tree import Tree
from harness.study.stages import StageFile

_PAUSE_S = 60


class RefusedError(UserError):
    """sbatch does not take a job: the site's limits, or an option that the site does not have."""


def nodes_of(stage: StageFile, profile: Slurm) -> int:
    """Nodes that a stage's ranks need."""
    execution = stage.execution
    by_gpus = math.ceil(execution.ranks / profile.gpus_per_node) if profile.device == "cuda" else 1
    return max(execution.nodes, by_gpus)


def options_of(
    stage: StageFile, profile: Slurm, study: str, token: str, number: int, after: str
) -> dict[str, Any]:
    """submitit's parameters for stages with the needs of this one."""
    execution = stage.execution
    on_gpu = profile.device == "cuda"
    nodes = nodes_of(stage, profile)
    if execution.ranks % nodes:
        most = f" of at most {profile.gpus_per_node} GPUs" if on_gpu else ""
        raise UserError(
            f"{stage.id}: {execution.ranks} ranks on {nodes} nodes{most} do not divide; choose"
            " resources.ranks or nodes to fit"
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
    wanted = {k: v for k, v in profile.sbatch.items() if v is not False}
    more: dict[str, Any] = {("requeue" if profile.requeue else "no-requeue"): True}
    return {
        **{k: v for k, v in named.items() if v is not None},
        "additional_parameters": {**more, **wanted},
    }


def _code_lines(code: Path) -> list[str]:
    """The copy of the code comes first, also where the job starts in somebody's checkout."""
    path = f"export PYTHONPATH={shlex.quote(str(code))}${{PYTHONPATH:+:$PYTHONPATH}}"
    # sbatch hands on the environment, and with it the submitting host's own name.
    return [path, "export PYTHONSAFEPATH=1", "unset HARNESS_HOST"]


def lines_of(tree: Tree, tasks: Path, profile: Slurm, code: Path) -> tuple[list[str], list[str]]:
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


class _Executor(submitit.SlurmExecutor):
    """submitit's, with a command of our own for srun.

    Its own reads a file that gets the job's number for a name only after sbatch has answered: a job
    that starts before that, or whose submission was killed there, would find none.
    """

    def __init__(self, folder: Path, tasks: Path) -> None:
        super().__init__(folder=folder)
        words = [sys.executable, "-u", "-m", "harness.launch.job", "rank", str(tasks)]
        self._command = shlex.join(words)

    @property
    def _submitit_command_str(self) -> str:
        return self._command


def sbatch(
    folder: Path,
    tasks: Path,
    options: Mapping[str, Any],
    count: int,
    lines: tuple[list[str], list[str]],
) -> list[str]:
    """Submits one array; the job ids of its tasks."""
    with commands.outside_of_a_job():
        executor = _Executor(folder / "jobs", tasks)
        executor.update_parameters(**options, setup=lines[0], teardown=lines[1])
        try:
            with executor.batch():
                found = [executor.submit(job.run_rank, str(tasks)) for _ in range(count)]
        except (FailedJobError, FailedSubmissionError) as error:
            last = str(error).strip().splitlines()[-1]
            raise RefusedError(f"sbatch refused: {last}; see the profile's options") from None
    return [str(j.job_id) for j in found]


def submit_caretaker(
    folder: Path, profile: Slurm, study: str, code: Path, after: Iterable[str] = ()
) -> str | None:
    """A job that tends the submission in `folder`, after a while and after these jobs; its id.

    None where the profile wants none. Raises RefusedError where sbatch does.
    """
    if not profile.caretaker:
        return None
    python = shlex.quote(sys.executable)
    options = {
        **_site(profile),
        "job_name": f"{study}.caretaker",
        "comment": queue.caretaker_comment(folder.name),
        "time": 30,
        "nodes": 1,
        "ntasks_per_node": 1,
        "cpus_per_task": 1,
        "use_srun": False,
    }
    more = options["additional_parameters"]
    dependency = after_end(after)
    # Behind jobs it need not wait longer: just not start again and again while one of them ends.
    wait_s = min(_PAUSE_S, profile.caretaker_s) if dependency else profile.caretaker_s
    more["begin"] = f"now+{wait_s}"
    # Where it can do nothing yet it puts itself back, and what others are held for is not its.
    for word in ("no-requeue", "hold"):
        more.pop(word, None)
    more["requeue"] = True
    if dependency:
        options["dependency"] = dependency
    setup = [
        f"export HARNESS_ROOT={shlex.quote(str(folder.parent.parent))}",
        *_code_lines(code),
        *(f"export {k}={shlex.quote(v)}" for k, v in profile.env.items()),
        *profile.setup,
        f"{python} -m harness.launch.caretaker {shlex.quote(str(folder))}; code=$?",
        # Whatever kept it from its work may keep this from being heard too.
        f"[ $code = {EXIT_REQUEUE} ] && for i in $(seq 20); do",
        'scontrol requeue "$SLURM_JOB_ID" && break; sleep 30; done',
        "exit $code",
    ]
    # The lines above are the whole job: the shell ends before submitit's own command.
    return sbatch(folder, folder / "submission.json", options, 1, (setup, []))[0]


def after_end(jobs: Iterable[str]) -> str:
    """The dependency on the end of these jobs, whole arrays of them."""
    arrays = dict.fromkeys(job_id.partition("_")[0] for job_id in jobs)
    return "afterany:" + ":".join(arrays) if arrays else ""
