"""A real Slurm on one machine: munged, slurmctld, two slurmd, with files of their own.

Needs root and Debian's slurm-wlm and munge. Nothing of the system's own configuration is touched,
and `stop` leaves no process behind.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

_CONFIG = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ctld_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# A job is put back only when the credentials of its last start are void.
AuthInfo=socket={munge},cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0,sched_min_interval=0
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ProctrackType=proctrack/pgid
TaskPlugin=task/none
MpiDefault=none
ReturnToService=2
KillWait=15
MinJobAge=30
SlurmdTimeout=20
SlurmctldTimeout=20
InactiveLimit=0
MaxArraySize=9
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
NodeName={node1} NodeAddr=127.0.0.1 NodeHostname={host} Port={port1} CPUs=2 State=UNKNOWN
NodeName={node2} NodeAddr=127.0.0.1 NodeHostname={host} Port={port2} CPUs=2 State=UNKNOWN
PartitionName=work Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1
PartitionName=cheap Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=CANCEL
PartitionName=alone Nodes={node1} MaxTime=INFINITE State=UP PriorityTier=1
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""

PATIENCE_S = 900.0
"""Longer than anything here takes: where cores are shared a job needs a minute to begin."""
_PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scontrol")


def missing() -> str | None:
    """Why there can be no cluster here, or None."""
    if os.geteuid() != 0:
        return "a test cluster needs root"
    path = f"{os.environ['PATH']}:/usr/sbin"
    gone = [p for p in _PROGRAMS if shutil.which(p, path=path) is None]
    return f"not installed: {', '.join(gone)} (Debian: slurm-wlm munge)" if gone else None


def free_port() -> int:
    """A port that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Cluster:
    """Two nodes of two CPUs; `env` makes commands speak to it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        folder.mkdir(parents=True, exist_ok=True)
        # munged wants folders that nobody else may write into, all the way up.
        self._munge = Path("/run") / f"munge-test-{os.getpid()}"
        self._munge.mkdir(mode=0o755)
        # Names of its own: what is killed on a node of this cluster is of no other.
        self.nodes = (f"n{os.getpid()}a", f"n{os.getpid()}b")
        config = _CONFIG.format(
            node1=self.nodes[0],
            node2=self.nodes[1],
            folder=folder,
            munge=self._munge / "socket",
            host=socket.gethostname().partition(".")[0],
            ctld_port=free_port(),
            port1=free_port(),
            port2=free_port(),
        )
        (folder / "slurm.conf").write_text(config)
        (folder / "cgroup.conf").write_text("CgroupAutomount=no\n")
        (folder / "state").mkdir(exist_ok=True)
        self.env = {"SLURM_CONF": str(folder / "slurm.conf")}
        self._start()

    def _start(self) -> None:
        key, socket_ = self._munge / "key", self._munge / "socket"
        key.write_bytes(os.urandom(128))
        for path in (key, self._munge):
            shutil.chown(path, "munge", "munge")
        key.chmod(0o400)
        self._munge.chmod(0o755)
        named = {"key-file": key, "socket": socket_, "pid-file": self._munge / "pid"}
        named |= {"log-file": self._munge / "log", "seed-file": self._munge / "seed"}
        options = [f"--{k}={v}" for k, v in named.items()]
        self._spawn("munged", ["munged", "--foreground", "--force", *options], user="munge")
        self._wait(lambda: socket_.exists(), "munged")
        self._spawn("slurmctld", ["slurmctld", "-D", "-f", self.env["SLURM_CONF"]])
        for node in self.nodes:
            self.start_node(node)
        self._wait(lambda: self.command("sinfo", "-h", "-o", "%t %D").strip() == "idle 2", "nodes")

    def start_node(self, node: str) -> None:
        """Starts the daemon of a node."""
        self._spawn(node, ["slurmd", "-D", "-N", node, "-f", self.env["SLURM_CONF"]])

    def wait_state(self, node: str, state: str) -> None:
        """Waits until Slurm has noticed what became of a node."""
        command = ("sinfo", "-h", "-n", node, "-o", "%t")
        self._wait(lambda: self.command(*command).strip().startswith(state), f"{node}: {state}")

    def kill_node(self, node: str) -> None:
        """Takes the power from a node: its daemon and every step of every job on it."""
        process = self._running.pop(node)
        process.kill()
        process.wait()
        for pid in _descendants_on(node):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def _spawn(self, name: str, command: list[str], user: str | None = None) -> None:
        env = {**os.environ, **self.env, "PATH": f"{os.environ['PATH']}:/usr/sbin"}
        log = open(self.folder / f"{name}.out", "ab")
        self._running[name] = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=env, user=user
        )

    def _wait(self, is_true: Callable[[], bool], what: str, seconds: float = PATIENCE_S) -> None:
        deadline = time.monotonic() + seconds
        while not is_true():
            assert time.monotonic() < deadline, f"{what} did not come up; see {self.folder}"
            time.sleep(0.2)

    def command(self, *words: str, check: bool = False) -> str:
        """What a Slurm command prints."""
        env = {**os.environ, **self.env}
        done = subprocess.run(words, capture_output=True, text=True, env=env, check=check)
        return done.stdout

    def queue(self) -> list[str]:
        """Ids of jobs that are not over."""
        return self.command("squeue", "--array", "--noheader", "--format", "%i").split()

    def wait_empty(self, seconds: float = PATIENCE_S) -> None:
        """Waits until no job is left."""
        self._wait(lambda: not self.queue(), f"an empty queue: {self.queue()}", seconds)

    def stop(self) -> None:
        """Ends jobs and daemons."""
        self.command("scancel", "--user=root")
        deadline = time.monotonic() + 30
        while self.queue() and time.monotonic() < deadline:
            time.sleep(0.3)
        for process in reversed(self._running.values()):
            process.terminate()
        for process in self._running.values():
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for pid in [p for node in self.nodes for p in _descendants_on(node)]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        shutil.rmtree(self._munge, ignore_errors=True)


def _descendants_on(node: str) -> list[int]:
    """Processes of jobs on a node: they know its name."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            environ = (path / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if f"SLURMD_NODENAME={node}".encode() in environ:
            found.append(int(path.name))
    # Steps first, whose environment says nothing: one that sees its processes die would tell the
    # controller so, and the node would not be lost but its job have ended.
    steps = {p for p in map(_parent, found) if _command(p).startswith(b"slurmstepd")}
    return [*sorted(steps), *(p for p in found if p not in steps)]


def _parent(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
    except OSError:
        return 0


def _command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""
