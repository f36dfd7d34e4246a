"""The line to one host: its zygote, started here or over ssh, and what became of it."""

from __future__ import annotations

import json
import os
import queue
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.launch.machine import Device, Host

RECONNECT_S = 60.0
"""A host that was lost is left alone for so long."""
_RECONNECTS = 10
PING_S = 15.0
# A remote zygote hears nothing more when the network is cut: its sshd may take hours to notice.
_SILENCE_S = 90.0

# No questions (nobody is there to answer), and a dead connection is noticed after a minute. What
# the user's own ssh command says comes first, and the first value of an option counts.
_SSH_OPTIONS = (
    *("-o", "BatchMode=yes", "-o", "ConnectTimeout=20"),
    *("-o", "ServerAliveInterval=15", "-o", "ServerAliveCountMax=4"),
)

# These travel inside the connection; a command line could be read by anybody on the host.
_CARRIED = (
    *("HARNESS_", "DS_", "NCCL_", "GLOO_", "TORCH", "PYTORCH_", "CUDA_", "OMP_", "MKL_"),
    *("OPENBLAS_", "HF_", "TRANSFORMERS_", "TOKENIZERS_", "AWS_", "GOOGLE_", "FSSPEC_", "UCX_"),
)
_OF_THIS_HOST = ("HARNESS_HOST", "CUDA_VISIBLE_DEVICES", "CUDA_HOME", "CUDA_PATH")


@dataclass(frozen=True, kw_only=True)
class Start:
    """How zygotes are started: the same on every host."""

    device: Device
    logs: Path
    ssh: Sequence[str]
    """The ssh command up to the host's name."""
    worker: str
    """The module that runs a stage."""
    code: Path | None = None
    """Copy of the code that all of them run, those that are started again too; None: as it is."""
    fds: tuple[int, ...] = ()
    """Files that a zygote of this host is to hold open."""


def zygote_environ(device: Device) -> dict[str, str]:
    """Variables a zygote needs before it imports torch."""
    env = {"PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "false", "DS_ACCELERATOR": device}
    # Pools of threads made at import do not survive a fork; workers set their own number.
    env |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    if device == "cpu":
        return env | {"CUDA_VISIBLE_DEVICES": ""}
    # Asking the driver library for GPUs would make CUDA unusable in forked workers.
    return env | {"PYTORCH_NVML_BASED_CUDA_CHECK": "1"}


def remote_environ(device: Device) -> dict[str, str]:
    """What a zygote on another host is told of this command's variables."""
    kept = {
        k: v for k, v in os.environ.items() if k.startswith(_CARRIED) and k not in _OF_THIS_HOST
    }
    return kept | zygote_environ(device)


def code_environ(code: Path | None) -> dict[str, str]:
    """Variables with which Python imports the copy, and not what lies in the current folder."""
    if code is None:
        return {}
    path = os.pathsep.join(filter(None, [str(code), os.environ.get("PYTHONPATH")]))
    return {"PYTHONPATH": path, "PYTHONSAFEPATH": "1"}


def remote_command(worker: str, code: Path | None = None) -> str:
    """A line for the remote shell, whichever it is: the same folder and Python as here."""
    # What must be set before Python starts.
    env = {k: v for k, v in os.environ.items() if k.startswith(("PYTHON", "LD_LIBRARY_PATH"))}
    env |= code_environ(code)
    env["PYTHONUNBUFFERED"] = "1"
    settings = [shlex.quote(f"{k}={v}") for k, v in sorted(env.items())]
    path = shlex.quote(f"PATH={Path(sys.executable).parent}")
    zygote = [sys.executable, "-m", "harness.launch.zygote", "--worker", worker, "--environ"]
    words = [*settings, f'{path}:"$PATH"', shlex.join([*zygote, "--silence", f"{_SILENCE_S:g}"])]
    return f"cd {shlex.quote(os.getcwd())} && exec env {' '.join(words)}"


class Link:
    """The pool's end of the line to one host. Messages go to the pool's inbox, (host, message);
    the last of a connection is None."""

    def __init__(
        self, host: Host, start: Start, inbox: queue.Queue[tuple[str, dict[str, Any] | None]]
    ) -> None:
        self.host, self.start, self.inbox = host, start, inbox
        name = f"pool.{host.name}.log" if host.remote else "pool.log"
        self.log = start.logs / name
        self.ready = False
        self.was_ready = False
        self.why: str | None = None
        """Why the host is away; None while it is not."""
        self.retry_at = 0.0
        self.failures = 0
        """How often in a row it was lost without a worker that ended in good order."""
        self.open()

    @property
    def is_up(self) -> bool:
        """True if stages may be placed here: requests to this host's own zygote can wait."""
        return self.why is None and (self.ready or not self.host.remote)

    @property
    def is_given_up(self) -> bool:
        """True if nobody will try to reach the host again."""
        if self.why is None:
            return False
        if self.host.remote:
            return self.failures > _RECONNECTS
        # What fails before it is ready fails again; later a stage, or a lack of memory, killed it.
        return not self.was_ready or self.failures > 1

    def open(self) -> None:
        """Starts the zygote; "ready" comes through the inbox."""
        self.ready, self.why = False, None
        self.log.parent.mkdir(parents=True, exist_ok=True)
        device, worker, code = self.start.device, self.start.worker, self.start.code
        if self.host.remote:
            ssh = [*self.start.ssh, *_SSH_OPTIONS, self.host.name]
            command, env = [*ssh, remote_command(worker, code)], None
        else:
            command = [sys.executable, "-m", "harness.launch.zygote", "--worker", worker]
            env = os.environ | zygote_environ(device) | code_environ(code)
        with open(self.log, "ab") as log:
            self._log_from = log.tell()
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=env,
                pass_fds=() if self.host.remote else self.start.fds,
                # Its own group: a Ctrl-C at the terminal is ours to pass on, in good order.
                start_new_session=True,
            )
        self._lock = threading.Lock()
        if self.host.remote:
            self.tell({"environ": remote_environ(device)})
        arguments = (self._process,)
        threading.Thread(target=self._listen, args=arguments, name="zygote", daemon=True).start()

    def _listen(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout is not None
        with process.stdout as lines:
            for line in lines:
                if line.startswith(b"{"):
                    self.inbox.put((self.host.name, json.loads(line)))
                    continue
                # A greeting of the remote shell's start-up files.
                with open(self.log, "ab") as log:
                    log.write(line)
        self.inbox.put((self.host.name, None))

    def tell(self, message: dict[str, Any]) -> None:
        """Sends a request. If nobody is there any more, the inbox says so."""
        assert self._process.stdin is not None
        with self._lock:
            try:
                self._process.stdin.write(json.dumps(message).encode() + b"\n")
                self._process.stdin.flush()
            except (BrokenPipeError, ValueError):  # ValueError: closed by us
                pass

    def lost(self, now: float) -> str:
        """Notes that the connection ended; returns why, in words."""
        self.hang_up()
        self.close(time.monotonic() + 10)
        code = self._process.returncode
        said = self.log.read_bytes()[self._log_from :].decode(errors="replace").strip()
        last = said.splitlines()[-1] if said else f"exit code {code}"
        what = f"host {self.host.name}" if self.host.remote else "the pool's process"
        how = "is gone" if self.ready else "did not start"
        self.why = f"{what} {how} ({last}); see {self.log}"
        self.ready = False
        self.failures += 1
        self.retry_at = now + (RECONNECT_S if self.host.remote else 0.0)
        return self.why

    def hang_up(self) -> None:
        """Closes our end: the zygote stops its workers, then ends."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.close()
        except BrokenPipeError:
            pass

    def close(self, deadline: float) -> None:
        """Waits for the zygote's end until `deadline` (monotonic), then kills our end of it."""
        try:
            self._process.wait(timeout=max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
