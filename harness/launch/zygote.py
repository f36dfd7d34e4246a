"""A process that has torch, DeepSpeed and timm imported and forks workers on request.

Importing them takes about 8 s on two cores, a fork of a process that has them 0.04 s. Small cells
would otherwise spend more time importing than training. Each stage still runs in processes of its
own: a crash, a leak or a changed global in one cannot touch another.

Protocol: JSON lines. In:
  {"environ": {...}}                     variables to set before the imports; first, if at all
  {"listen": key, "everywhere": bool}    opens the port at which the ranks of a stage will meet
  {"start": key, "group": name, "args": [...], "env": {...}, "stdout": path, "stderr": path,
   "listener": key or null}              forks a worker; rank 0 inherits the open port
  {"forget": key}                        closes a port that nobody will use
  {"signal": name, "number": n}          to all processes of a group
  {"ping": n}                            somebody is there
Out: {"ready": s}, {"listening": key, "port": n, "address": text}, {"started": key, "pid": pid},
{"exited": key, "code": c} (negative: ended by that signal).
When stdin closes, or stays silent for longer than `--silence` seconds, the command that started us
is gone: workers are told to stop, then killed.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import importlib
import json
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Iterator
from typing import Any

from harness.errors import EXIT_STORAGE, storage_error

_GRACE_S = 20.0
_PR_SET_PDEATHSIG = 1

LISTENER = "HARNESS_RENDEZVOUS_FD"
"""Names the open port that rank 0 inherits; `harness.train.engine` reads it."""


def main() -> None:
    """Preloads, then serves requests from stdin until it closes."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--silence", type=float, help="end after so many seconds without a word")
    parser.add_argument("--environ", action="store_true", help="read variables from stdin first")
    parser.add_argument("--worker", default="harness.worker", help="the module that runs a stage")
    options = parser.parse_args()
    out = os.dup(1)
    # Libraries print while they are imported; the protocol's channel is not theirs.
    os.dup2(2, 1)
    began = time.monotonic()
    requests = _Requests(options.silence)
    if options.environ:
        os.environ.update(requests.first()["environ"])
    importlib.import_module(options.worker)
    _tell(out, {"ready": time.monotonic() - began})
    _Zygote(out, requests, options.worker).serve()


def _tell(out: int, message: dict[str, Any]) -> None:
    # The reader may be gone; its closed stdin ends the loop in the next turn.
    with contextlib.suppress(BrokenPipeError):
        os.write(out, json.dumps(message).encode() + b"\n")


class _Requests:
    """Lines of stdin."""

    def __init__(self, silence_s: float | None) -> None:
        self.silence_s = silence_s
        self.over = False
        self._buffer = b""

    def first(self) -> dict[str, Any]:
        """The first line, byte by byte: what follows it stays in the pipe."""
        line = b""
        while not line.endswith(b"\n"):
            byte = os.read(0, 1)
            if not byte:
                sys.exit("the command that started this process is gone")
            line += byte
        return json.loads(line)

    def read(self, wake: int) -> Iterator[dict[str, Any]]:
        """Waits for requests or for `wake`; `over` says that there will be no more."""
        ready, _, _ = select.select([0, wake], [], [], self.silence_s)
        if 0 in ready:
            chunk = os.read(0, 65536)
            self.over = not chunk
            *lines, self._buffer = (self._buffer + chunk).split(b"\n")
            yield from map(json.loads, lines)
        self.over = self.over or not ready


class _Zygote:
    def __init__(self, out: int, requests: _Requests, worker: str) -> None:
        self.out, self.requests, self.worker = out, requests, worker
        self.alive: dict[int, tuple[str, str]] = {}
        """Pid -> key and group of a worker."""
        self.groups: dict[str, int] = {}
        """Name -> process group: the pid of the group's first worker. Only while one is alive:
        the number may mean other processes afterwards."""
        self.listeners: dict[str, socket.socket] = {}
        self.wake_read, self.wake_write = os.pipe()

    def serve(self) -> None:
        os.set_blocking(self.wake_write, False)
        os.set_blocking(self.wake_read, False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(self.wake_write, warn_on_full_buffer=False)
        # The terminal's Ctrl-C goes to the command, which stops the workers in good order.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        while not self.requests.over:
            for request in self.requests.read(self.wake_read):
                self._obey(request)
            with contextlib.suppress(BlockingIOError):
                os.read(self.wake_read, 4096)
                self._reap()
        _end(set(self.alive))

    def _obey(self, request: dict[str, Any]) -> None:
        if "start" in request:
            self._start(request)
        elif "signal" in request:
            with contextlib.suppress(ProcessLookupError, KeyError):
                os.killpg(self.groups[request["signal"]], request["number"])
        elif "listen" in request:
            self._listen(request["listen"], request["everywhere"])
        elif "forget" in request:
            listener = self.listeners.pop(request["forget"], None)
            if listener is not None:
                listener.close()

    def _listen(self, key: str, everywhere: bool) -> None:
        """Opens a port of the system's choice and keeps it open: nobody else can have it."""
        if everywhere and socket.has_dualstack_ipv6():
            listener = socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
        else:
            listener = socket.create_server(("" if everywhere else "127.0.0.1", 0))
        self.listeners[key] = listener
        # The address at which ssh reached this host: others of the list reach it there as well.
        reached = os.environ.get("SSH_CONNECTION", "").split()
        address = reached[2] if len(reached) == 4 else ""
        port = listener.getsockname()[1]
        _tell(self.out, {"listening": key, "port": port, "address": address})

    def _start(self, request: dict[str, Any]) -> None:
        key, name = request["start"], request["group"]
        listener = self.listeners.pop(request["listener"] or "", None)
        others = [s.fileno() for s in self.listeners.values()]
        group, parent = self.groups.get(name, 0), os.getpid()
        # A worker that is told to stop before it listens is to hear it then.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        pid = os.fork()
        if pid == 0:
            if listener is not None:
                request["env"][LISTENER] = str(listener.detach())
            close = (self.out, self.wake_read, self.wake_write, *others)
            _become_worker(self.worker, request, group, parent, close)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
        if listener is not None:
            listener.close()
        # Both sides set the group, so that neither can be early.
        with contextlib.suppress(OSError):
            os.setpgid(pid, group or pid)
        self.groups.setdefault(name, pid)
        self.alive[pid] = (key, name)
        _tell(self.out, {"started": key, "pid": pid})

    def _reap(self) -> None:
        while self.alive:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return
            if pid not in self.alive:
                continue
            key, name = self.alive.pop(pid)
            if name not in {group for _, group in self.alive.values()}:
                del self.groups[name]
            _tell(self.out, {"exited": key, "code": os.waitstatus_to_exitcode(status)})


def _become_worker(
    worker: str, request: dict[str, Any], group: int, parent: int, close: tuple[int, ...]
) -> None:
    code = 1
    try:
        with contextlib.suppress(OSError):
            os.setpgid(0, group)
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGCHLD, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)
        _die_with(parent)
        for fd in close:
            os.close(fd)
        for fd, path, flags in (
            (0, os.devnull, os.O_RDONLY),
            (1, request["stdout"], os.O_WRONLY | os.O_CREAT | os.O_APPEND),
            (2, request["stderr"], os.O_WRONLY | os.O_CREAT | os.O_APPEND),
        ):
            opened = os.open(path, flags, 0o644)
            os.dup2(opened, fd)
            os.close(opened)
        os.environ.update(request["env"])
        code = importlib.import_module(worker).main(request["args"])
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        if storage_error(error) is not None:  # no room for its log
            code = EXIT_STORAGE
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        # No interpreter shutdown: exit handlers of the parent's libraries are not ours to run.
        os._exit(code)


def _die_with(parent: int) -> None:
    """Asks the kernel to end this process when the zygote dies, however it dies (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)


def _end(alive: set[int]) -> None:
    """TERM to every worker, a while to save, then KILL."""
    deadline = time.monotonic() + _GRACE_S
    number: int = signal.SIGTERM
    while alive:
        for pid in list(alive):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        number = 0  # told once; from now on only ask whether it is still there
        while alive and time.monotonic() < deadline:
            with contextlib.suppress(ChildProcessError):
                pid, _ = os.waitpid(-1, os.WNOHANG)
                alive.discard(pid)
            time.sleep(0.05)
        number, deadline = signal.SIGKILL, time.monotonic() + 1.0


if __name__ == "__main__":
    main()
