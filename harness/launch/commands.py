"""Commands of Slurm: how they are run, and who we are where they are.

Nothing of the surrounding shell or job reaches them. A question is waited for for a minute.
"""

from __future__ import annotations

import os
import pwd
import subprocess
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from harness.errors import HarnessError, UserError

_TIMEOUT_S = 60


def identity() -> dict[str, str | None]:
    """User and cluster, for status.json: only about one's own jobs can one ask."""
    return {"user": user_name(), "site": site()}


def user_name() -> str:
    """The user we are, whatever the environment calls it."""
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:  # a container without an entry
        return str(os.getuid())


def site() -> str | None:
    """The cluster's name; None where nobody says it."""
    return _config().get("ClusterName")


def is_of_this_site(status: Mapping[str, Any]) -> bool:
    """Whether a job is of this host's cluster: elsewhere its number means another job."""
    return status.get("site") in (None, site())


_known_config: tuple[float, dict[str, str]] | None = None


def _config() -> dict[str, str]:
    global _known_config
    known = _known_config
    if known is None or (not known[1] and time.monotonic() - known[0] > _TIMEOUT_S):
        rows = (line.partition("=") for line in (scontrol("show", "config") or "").splitlines())
        found = {key.strip(): value.strip() for key, _, value in rows}
        known = _known_config = (time.monotonic(), found)  # that may have taken a minute
    return known[1]


def check_config() -> None:
    """Raises UserError if nobody says which cluster this is."""
    if not _config():
        raise UserError("`scontrol show config` does not answer on this host; try again later")


def cancel_jobs(statuses: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Takes jobs out of the queue; those that are over already are not an error.

    `statuses`: with the `job`, and the user and site if they are known, as in status.json.

    Returns those that it cannot reach from here: of another user or cluster (two clusters have jobs
    of the same number), or all where there is no `scancel`.
    """
    asked, me = list(statuses), user_name()
    is_own = [s.get("user") in (None, me) and is_of_this_site(s) for s in asked]
    own = [status for status, is_ours in zip(asked, is_own, strict=True) if is_ours]
    left = [status for status, is_ours in zip(asked, is_own, strict=True) if not is_ours]
    wanted = list(dict.fromkeys(str(status["job"]) for status in own))
    for start in range(0, len(wanted), 200):
        command = ["scancel", "--quiet", *wanted[start : start + 200]]
        try:
            done = subprocess.run(command, capture_output=True, text=True, env=scrubbed())
        except FileNotFoundError:
            return left + own
        if done.returncode != 0 and "Invalid job id" not in done.stderr:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise HarnessError(f"scancel: {last}")
    return left


def scontrol(*arguments: str) -> str | None:
    """What scontrol printed; None if it failed."""
    return run("scontrol", *arguments)


def run(*command: str) -> str | None:
    """What a command of Slurm printed; None if it failed or does not answer."""
    try:
        # A job's comment may be of any bytes.
        done = subprocess.run(
            command,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=_TIMEOUT_S,
            env=scrubbed(),
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def about_job(job: str) -> dict[str, str]:
    """What Slurm says of a job, by its own names; empty if it knows it no longer."""
    return words(scontrol("show", "job", job))


def words(text: str | None) -> dict[str, str]:
    """`A=1 B=2` as scontrol prints it."""
    return {k: v for k, _, v in (w.partition("=") for w in (text or "").split())}


def max_array_size() -> int:
    """Tasks that this site allows in one array (MaxArraySize is one more than the last index)."""
    size = _config().get("MaxArraySize", "")
    return max(1, int(size)) if size.isdigit() else 1000


def scrubbed(env: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment without what the surrounding job, or a shell's start file, set for Slurm.

    Inside an allocation, sbatch and srun take SLURM_* for options and hand them on: a nested job
    would get the CPUs, tasks and pickles of the outer one. A user's own SQUEUE_STATES would hide
    living jobs, SCANCEL_INTERACTIVE ask where nobody answers. SLURM_CONF says where the cluster is,
    SLURM_JWT who we are.
    """
    drop = ("SLURM_", "SBATCH_", "SRUN_", "PMI_", "PMIX_", "SLURMD_")
    drop += ("SQUEUE_", "SCANCEL_", "SINFO_", "SCONTROL_")
    kept = ("SLURM_CONF", "SLURM_JWT")
    source = os.environ if env is None else env
    return {k: v for k, v in source.items() if k in kept or not k.startswith(drop)}


@contextmanager
def outside_of_a_job() -> Iterator[None]:
    """Inside: os.environ is scrubbed, for libraries that start sbatch themselves."""
    before = dict(os.environ)
    os.environ.clear()
    os.environ.update(scrubbed(before))
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
