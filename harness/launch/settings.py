"""Where stages run, by name: the user's profiles, and those that need no file.

    ~/.config/harness/settings.yaml (HARNESS_SETTINGS names another)
        cluster: lab                  # the default of --cluster
        root: /shared/me/runs         # the default of --root
        profiles:
          lab: {kind: slurm, partition: gpu, account: vision, gpus_per_node: 8, time: 24h}

What is said nearer counts: this file, then HARNESS_CLUSTER and HARNESS_ROOT, then the flag.
"""

from __future__ import annotations

import difflib
import os
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError, field_validator

from harness.errors import UserError
from harness.launch.machine import Device
from harness.launch.settings_file import settings_path
from harness.study import source
from harness.study.recipes import Count, Frozen, Positive
from harness.study.schema import Seconds, problems_of

_OURS = frozenset(
    """
    array comment dependency error job-name open-mode output signal
    nodes ntasks ntasks-per-node
    clusters parsable quiet test-only wait wrap
    """.split()
)
"""Options of sbatch by which jobs are known, followed and stopped; of a stage's ranks; and those by
which sbatch would answer otherwise, or ask other clusters than squeue does."""


class Local(Frozen):
    """This machine."""

    kind: Literal["local"] = "local"


class Hosts(Frozen):
    """Machines without a scheduler, reached over ssh, with a shared folder."""

    kind: Literal["hosts"]
    hostfile: Path
    """As DeepSpeed reads it: a line a host, `worker-1 slots=8`."""
    device: Device = "cuda"
    ssh: list[str] = ["ssh"]
    """The ssh command up to the host's name."""


class Slurm(Frozen):
    """A Slurm cluster, submitted to from any of its hosts that has sbatch."""

    kind: Literal["slurm"] = "slurm"
    device: Device = "cuda"
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    time: Seconds = 86400.0
    """Time limit of a job where the study's `resources` give none."""
    gpus_per_node: Count = 8
    """Ranks of a stage that one node takes; more become several nodes."""
    gpu_option: Literal["gpus_per_node", "gres", "none"] = "gpus_per_node"
    """How GPUs are asked for: older sites want `--gres=gpu:N`."""
    cpus_per_gpu: Count = 8
    memory_gib_per_gpu: Positive | None = None
    """Asked for where `resources.memory_gib` gives none; the site's default otherwise."""
    signal_s: Annotated[int, Field(ge=10, le=3600)] = 120
    """A stage is told so long before its time limit, and saves a checkpoint."""
    requeue: bool = True
    """Whether jobs may be started again under their own number."""
    caretaker: bool = True
    """A small job after all others submits again what a lost node or a time limit left."""
    caretaker_s: Annotated[int, Field(ge=1, le=86400)] = 900
    """It starts so long after a submission that was killed before all of its jobs were queued."""
    max_array: Count | None = None
    """Tasks of one job array; the site's own limit by default."""
    parallel: Count | None = None
    """Tasks of one array that run at a time."""
    setup: list[str] = []
    """Shell lines before a stage: `module load cuda`."""
    env: dict[str, str] = {}
    sbatch: dict[str, str | int | bool] = {}
    """Any further sbatch option, by its long name."""

    @field_validator("sbatch")
    @classmethod
    def _not_ours(cls, sbatch: dict[str, str | int | bool]) -> dict[str, str | int | bool]:
        bad = sorted(_OURS & {key.replace("_", "-") for key in sbatch})
        if bad:
            raise ValueError(f"{', '.join(bad)}: the harness sets this itself; remove it")
        export = str(sbatch.get("export", "ALL"))
        if export.split(",")[0] != "ALL":
            raise ValueError(
                f"export: {export}: ranks need what the batch script sets; write ALL, or"
                " ALL,NAME=value, or use `env`"
            )
        return sbatch


Profile = Annotated[Local | Hosts | Slurm, Field(discriminator="kind")]


class Settings(Frozen):
    """The user's file."""

    cluster: str | None = None
    root: Path | None = None
    profiles: dict[str, Profile] = {}


def load_settings() -> Settings:
    """The user's settings; empty without a file. Raises UserError with file:line."""
    path = settings_path()
    if not path.exists():
        if os.environ.get("HARNESS_SETTINGS"):
            raise UserError(f"HARNESS_SETTINGS={path}: no such file")
        return Settings()
    found = source.load(path)
    try:
        return Settings.model_validate(found.data)
    except ValidationError as error:
        raise UserError(*problems_of(error, Settings, found)) from None


def find_profile(name: str | None) -> tuple[str, Local | Hosts | Slurm]:
    """The profile of a flag, of HARNESS_CLUSTER, of the settings, or `local`: name and content.

    Raises UserError for a name nobody has, with those there are.
    """
    settings = load_settings()
    wanted = name or os.environ.get("HARNESS_CLUSTER") or settings.cluster or "local"
    known = {"local": Local(), "slurm": Slurm(), **settings.profiles}
    if wanted not in known:
        near = difflib.get_close_matches(wanted, known, n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"known: {', '.join(known)}"
        raise UserError(f"no cluster '{wanted}' in {settings_path()}; {hint}")
    return wanted, known[wanted]
