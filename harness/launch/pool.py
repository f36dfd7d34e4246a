"""The local pool: places stages on cores or GPUs of this machine and hears how they end."""

from __future__ import annotations

import json
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
from dataclasses import dataclass, field
from typing import Any

from harness.errors import HarnessError
from harness.launch.machine import Machine
from harness.ledger.tree import Tree
from harness.study.stages import StageFile


@dataclass
class Running:
    """One attempt in progress."""

    stage: StageFile
    attempt: int
    slots: tuple[str, ...]
    pids: list[int] = field(default_factory=list)
    codes: dict[int, int] = field(default_factory=dict)
    asked_to_stop: bool = False

    @property
    def group(self) -> int:
        """Process group of all ranks: the pid of rank 0."""
        return self.pids[0]


@dataclass(frozen=True, kw_only=True)
class Ended:
    """An attempt whose every process is gone. `code` is the first that was not 0."""

    running: Running
    code: int


class Pool:
    """Slots of one machine. `start` places a stage, `poll` returns the attempts that ended."""

    def __init__(self, machine: Machine, tree: Tree) -> None:
        self.machine = machine
        self.tree = tree
        self.free = list(machine.slots)
        self.running: dict[str, Running] = {}
        self._by_pid: dict[int, Running] = {}
        self._messages: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self._process = self._start_zygote()
        threading.Thread(target=self._listen, name="zygote", daemon=True).start()
        self.ready_s: float | None = None

    def _start_zygote(self) -> subprocess.Popen[bytes]:
        env = {**os.environ, "PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "false"}
        # Pools of threads made at import do not survive a fork; workers set their own number.
        env |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        if self.machine.device == "cpu":
            env |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
        else:
            # Asking the driver library for GPUs would make CUDA unusable in forked workers.
            env |= {"PYTORCH_NVML_BASED_CUDA_CHECK": "1", "DS_ACCELERATOR": "cuda"}
        self.log = self.tree.root / "logs" / "pool.log"
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with open(self.log, "ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "harness.launch.zygote"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=env,
                # Its own group: a Ctrl-C at the terminal is ours to pass on, in good order.
                start_new_session=True,
            )

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._messages.put(json.loads(line))
        self._messages.put(None)

    def _tell(self, message: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(message).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._gone() from None

    def _gone(self) -> HarnessError:
        code = self._process.wait(timeout=10)
        return HarnessError(f"the pool's process ended (code {code}); see {self.log}")

    def fits(self, stage: StageFile) -> bool:
        """True if the free slots are enough for the stage."""
        return self.needs(stage) <= len(self.free)

    def needs(self, stage: StageFile) -> int:
        """Slots of a stage: one GPU a rank, or one core a thread."""
        execution = stage.execution
        per_rank = 1 if self.machine.device == "cuda" else execution.threads
        return execution.ranks * per_rank

    def start(self, stage: StageFile, attempt: int) -> Running:
        """Starts all ranks of a stage on free slots."""
        count = self.needs(stage)
        slots = tuple(self.free[:count])
        del self.free[:count]
        running = Running(stage=stage, attempt=attempt, slots=slots)
        self.running[stage.id] = running
        port = _free_port() if stage.execution.ranks > 1 else None
        for rank in range(stage.execution.ranks):
            pid = self._fork(running, rank, port)
            running.pids.append(pid)
            self._by_pid[pid] = running
        return running

    def _fork(self, running: Running, rank: int, port: int | None) -> int:
        stage, ranks = running.stage, running.stage.execution.ranks
        folder = self.tree.stage(stage.kind, stage.id)
        logs = folder.attempt(running.attempt)
        suffix = f".rank{rank}" if rank else ""
        env = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(ranks),
            "LOCAL_SIZE": str(ranks),
            "HARNESS_ROOT": str(self.tree.root),
            "HARNESS_STAGE": stage.id,
            "HARNESS_ATTEMPT": str(running.attempt),
            "HARNESS_RUN_DIR": str(folder.path),
        }
        if port is not None:
            env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        if self.machine.device == "cuda":
            env["CUDA_VISIBLE_DEVICES"] = ",".join(running.slots)
        arguments = ["--root", str(self.tree.root), "--kind", stage.kind, "--stage", stage.id]
        self._tell(
            {
                "start": f"{stage.id}#{rank}",
                "args": [*arguments, "--attempt", str(running.attempt)],
                "env": env,
                "stdout": str(logs / f"stdout{suffix}.log"),
                "stderr": str(logs / f"stderr{suffix}.log"),
                "group": running.pids[0] if running.pids else 0,
            }
        )
        return self._await_pid(f"{stage.id}#{rank}")

    def _await_pid(self, key: str) -> int:
        """Waits for the answer to a start; other messages are kept for `poll`."""
        kept: list[dict[str, Any]] = []
        try:
            while True:
                message = self._messages.get(timeout=300)
                if message is None:
                    raise self._gone()
                if message.get("started") == key:
                    return int(message["pid"])
                kept.append(message)
        except queue.Empty:
            raise HarnessError(f"the pool's process does not answer; see {self.log}") from None
        finally:
            for message in kept:
                self._messages.put(message)

    def poll(self, wait_s: float) -> list[Ended]:
        """Attempts that ended, waiting at most `wait_s` for the first."""
        ended: list[Ended] = []
        while True:
            try:
                message = self._messages.get(timeout=0 if ended else wait_s)
            except queue.Empty:
                return ended
            if message is None:
                raise self._gone()
            if "ready" in message:
                self.ready_s = float(message["ready"])
            if "exited" in message:
                done = self._exited(int(message["exited"]), int(message["code"]))
                if done is not None:
                    ended.append(done)

    def _exited(self, pid: int, code: int) -> Ended | None:
        running = self._by_pid.pop(pid)
        running.codes[pid] = code
        if code != 0 and len(running.codes) < len(running.pids):
            # The others would wait for the lost rank in a collective; the first cause counts.
            self._signal(running, signal.SIGTERM if running.asked_to_stop else signal.SIGKILL)
        if len(running.codes) < len(running.pids):
            return None
        del self.running[running.stage.id]
        self.free = sorted([*self.free, *running.slots], key=self.machine.slots.index)
        first_bad = next((c for c in running.codes.values() if c != 0), 0)
        return Ended(running=running, code=first_bad)

    def stop(self, running: Running, *, kill: bool = False) -> None:
        """Asks an attempt to save and end, or ends it."""
        running.asked_to_stop = True
        self._signal(running, signal.SIGKILL if kill else signal.SIGTERM)

    def _signal(self, running: Running, number: int) -> None:
        self._tell({"signal": running.group, "number": int(number)})

    def close(self) -> None:
        """Ends the pool; workers still running are told to stop."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.close()
        except BrokenPipeError:
            pass
        try:
            self._process.wait(timeout=40)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
