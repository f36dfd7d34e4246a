"""Python imports this by itself where the folder is in PYTHONPATH: a process dies inside a write.

TEST_DIE_AT says which write, TEST_DIE_AFTER at which one of a process; TEST_DIE_MARK is a file that
the one that dies creates first, so that only one does.
"""

import os
import signal
from pathlib import Path
from typing import Any

_at, _after = os.environ.get("TEST_DIE_AT"), int(os.environ.get("TEST_DIE_AFTER", "1"))
_seen = 0


def _is_due(moment: str) -> bool:
    global _seen
    if moment != _at:
        return False
    _seen += 1
    if _seen != _after:
        return False
    try:
        os.close(os.open(os.environ["TEST_DIE_MARK"], os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


if _at == "row":
    from harness.ledger import files

    def _append(self: Any, row: Any, whole: Any = files.JsonlWriter.append) -> None:
        if self.path.name == "metrics.jsonl" and _is_due("row"):
            text = files.jsonl([row])
            with open(self.path, "ab", buffering=0) as file:
                file.write(text[: len(text) // 2])
            _die()
        whole(self, row)

    files.JsonlWriter.append = _append

_replace = os.replace


def _dying(source: Any, target: Any, **about: Any) -> None:
    name = Path(os.fspath(source)).name
    is_checkpoint = ".partial-" in name
    if (is_checkpoint and _is_due("checkpoint")) or (".tmp." in name and _is_due("file")):
        _die()
    _replace(source, target, **about)
    if is_checkpoint and _is_due("checkpoint mark"):
        _die()


os.replace = _dying
