"""What Slurm says of nodes: whether one was lost under an attempt, and whether others can stand in.

`ExcNodeList` is taken for a job that is pending only, and a job that excludes every node that
could run it waits for ever: nodes are avoided only where enough others of their kind are up.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from harness.launch import commands

_USABLE = ("idle", "mixed", "allocated", "completing", "planned", "reserved")
_DOWN = ("DOWN", "FAIL", "NOT_RESPONDING", "POWERED_DOWN", "REBOOT", "UNKNOWN", "FUTURE")
_TOLERANCE_S = 5.0
"""Slurm computes the time of a boot anew at each registration."""


def of_job() -> list[str]:
    """Nodes of the job around us, by Slurm's names; the first of them first."""
    listed = os.environ.get("SLURM_JOB_NODELIST", "")
    own = os.environ.get("SLURMD_NODENAME")
    found = (commands.scontrol("show", "hostnames", listed) or "").split() if listed else []
    return found or ([own] if own else [])


def lost_of(record: Mapping[str, Any]) -> list[str] | None:
    """Nodes of an attempt that were lost while it ran; None if Slurm does not answer.

    A node that is up and was not started since did not end it: somebody put the job back.
    """
    names = record.get("nodes") or [n for n in [record.get("node")] if n]
    since = float(record.get("job_started") or 0.0)
    found: list[str] = []
    for name in names:
        about = commands.words(commands.scontrol("show", "node", name))
        if not about:
            return None
        state = about.get("State", "UNKNOWN")
        started = [_time(about.get(k)) for k in ("BootTime", "SlurmdStartTime")]
        is_down = any(word in state for word in _DOWN) or "*" in state
        if is_down or any(t is not None and t > since + _TOLERANCE_S for t in started):
            found.append(name)
    return found


def _time(text: str | None) -> float | None:
    try:
        return datetime.fromisoformat(text or "").timestamp()
    except ValueError:  # "None", "Unknown"
        return None


def avoidable(
    names: Iterable[str], partition: str | None, count: int, constraint: str | None = None
) -> tuple[str, ...]:
    """Those of `names` to exclude from a job of `count` nodes; none if too few could stand in.

    Stand-ins are usable nodes of the partition with the same GRES and, where features matter,
    the same features.
    """
    names = sorted(set(names))
    if not names:
        return ()
    found = nodes_of(partition)
    kinds = {n.kind(constraint) for n in found or [] if n.name in names}
    fit = [n for n in found or [] if n.is_usable and n.name not in names]
    return tuple(names) if sum(n.kind(constraint) in kinds for n in fit) >= count else ()


@dataclass(frozen=True, kw_only=True)
class Node:
    """A line of sinfo."""

    name: str
    is_usable: bool
    gres: str
    features: str

    def kind(self, constraint: str | None) -> tuple[str, str]:
        """What nodes that stand in for each other have in common."""
        return self.gres, self.features if constraint else ""


def nodes_of(partition: str | None) -> list[Node] | None:
    """Nodes of a partition, or of the default one; None if Slurm does not answer."""
    text = commands.run("sinfo", "-h", "-N", "-o", "%N|%P|%T|%G|%f")
    return None if text is None else parse(text, partition)


def parse(text: str, partition: str | None) -> list[Node]:
    """Lines of sinfo, of one or several (`a,b`) partitions; the default is the one with a star."""
    found: dict[str, Node] = {}
    wanted = None if partition is None else partition.split(",")
    for line in text.splitlines():
        name, where, state, gres, features = (line.split("|") + [""] * 5)[:5]
        if where.endswith("*") if wanted is None else where.rstrip("*") in wanted:
            usable = state in _USABLE
            found[name] = Node(name=name, is_usable=usable, gres=gres, features=features)
    return list(found.values())


def put_back(job: str, avoid: Sequence[str]) -> bool:
    """Puts our own running job back into the queue, without those nodes; True if Slurm did.

    In this order: Slurm changes the nodes of pending jobs only. The TERM that a requeue sends to
    all processes of the job must not end this one in between.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if commands.scontrol("requeue", job) is None:
        return False
    excluded = f"ExcNodeList={','.join(avoid)}"
    for _ in range(5 if avoid else 0):
        if commands.scontrol("update", f"JobId={job}", excluded) is not None:
            break
        time.sleep(0.5)
    return True
