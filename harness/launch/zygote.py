"""A process that has torch, DeepSpeed and timm imported and forks workers on request.

Importing them takes about 8 s on two cores, a fork of a process that has them 0.04 s. Small cells
would otherwise spend more time importing than training. Each stage still runs in processes of its
own: a crash, a leak or a changed global in one cannot touch another.

Protocol: JSON lines. In: {"start": key, "args": [...], "env": {...}, "stdout": path, "stderr":
path, "group": pid or 0}, {"signal": pid, "number": n} (to the process group). Out: {"ready": s},
{"started": key, "pid": pid}, {"exited": pid, "code": c} (negative: ended by that signal).
When stdin closes, the command that started us is gone: workers are told to stop, then killed.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import os
import select
import signal
import sys
import time
from typing import Any

_WORKER = "harness.worker"
_GRACE_S = 20.0
_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Preloads, then serves requests from stdin until it closes."""
    out = os.dup(1)
    # Libraries print while they are imported; the protocol's channel is not theirs.
    os.dup2(2, 1)
    began = time.monotonic()
    importlib.import_module(_WORKER)
    _tell(out, {"ready": time.monotonic() - began})
    _serve(out)


def _tell(out: int, message: dict[str, Any]) -> None:
    # The reader may be gone; its closed stdin ends the loop in the next turn.
    with contextlib.suppress(BrokenPipeError):
        os.write(out, json.dumps(message).encode() + b"\n")


def _serve(out: int) -> None:
    wake_read, wake_write = os.pipe()
    os.set_blocking(wake_write, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
    # The terminal's Ctrl-C goes to the command, which stops the workers in good order.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    alive: set[int] = set()
    buffer = b""
    while True:
        ready, _, _ = select.select([0, wake_read], [], [])
        if wake_read in ready:
            os.read(wake_read, 4096)
            _reap(alive, out)
        if 0 not in ready:
            continue
        chunk = os.read(0, 65536)
        if not chunk:
            _end(alive)
            return
        buffer += chunk
        *lines, buffer = buffer.split(b"\n")
        for line in lines:
            _obey(json.loads(line), alive, out, (wake_read, wake_write))


def _obey(request: dict[str, Any], alive: set[int], out: int, pipes: tuple[int, int]) -> None:
    if "signal" in request:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(request["signal"], request["number"])
        return
    parent = os.getpid()
    pid = os.fork()
    if pid == 0:
        _become_worker(request, parent, (out, *pipes))
    # Both sides set the group, so that neither can be early.
    with contextlib.suppress(OSError):
        os.setpgid(pid, request.get("group") or pid)
    alive.add(pid)
    _tell(out, {"started": request["start"], "pid": pid})


def _become_worker(request: dict[str, Any], parent: int, close: tuple[int, ...]) -> None:
    code = 1
    try:
        with contextlib.suppress(OSError):
            os.setpgid(0, request.get("group") or 0)
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
        code = importlib.import_module(_WORKER).main(request["args"])
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
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


def _reap(alive: set[int], out: int) -> None:
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return
        alive.discard(pid)
        _tell(out, {"exited": pid, "code": os.waitstatus_to_exitcode(status)})


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
