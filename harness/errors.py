"""The errors of the project, each with the exit code the command line turns it into.

A user's mistake is a UserError: one line that says what was found, what was expected and what
to do. Everything else that is not one of these is a bug and keeps its traceback.
"""

from __future__ import annotations

import errno
import math
import os

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_NOT_FOUND = 4
EXIT_INTERRUPTED = 130  # As shells say it of Ctrl-C.
EXIT_STORAGE = 74  # EX_IOERR: the disk did not take the worker's files, its last word included.
EXIT_REQUEUE = 75  # EX_TEMPFAIL: the worker stopped in good order and asks to be run again.
EXIT_BUSY = 76  # Of a worker: another process owns the stage; nothing was done.
EXIT_LOST_RANK = 77  # Of a worker: another rank is gone; what ended that one says why.


class HarnessError(Exception):
    """Base of all errors the project raises on purpose."""

    exit_code = EXIT_FAILED


class UserError(HarnessError):
    """Something the user wrote cannot be used; one or several problems, a line each."""

    exit_code = EXIT_USAGE

    def __init__(self, *problems: str) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


class StorageError(UserError):
    """A file cannot be written, or not even read: no space, no right to, or the disk is gone."""

    def __init__(self, path: object, error: OSError | str) -> None:
        number = error.errno if isinstance(error, OSError) else None
        why = error if isinstance(error, str) else error.strerror or type(error).__name__
        todo = _STORAGE_ADVICE.get(number or 0, "see that the file system takes files")
        what = "written" if number is None or number in (*_FULL, errno.EROFS) else "used"
        super().__init__(f"{path}: cannot be {what}: {why}; {todo}, then give the command again")


_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_OF_SERVERS = (errno.ETIMEDOUT, errno.ENOTCONN, errno.ESHUTDOWN, errno.EHOSTDOWN)
"""Errors of files on a server that is away, and of sockets."""
_BROKEN = "see that the disk, or the server of its files, works"
_STORAGE_ADVICE = {
    errno.ENOSPC: "free space",
    errno.EDQUOT: "free space",
    errno.EFBIG: "free space",
    errno.EACCES: "chmod it or take another folder",
    errno.EPERM: "chmod it or take another folder",
    errno.EROFS: "mount it writable or take another folder",
    **dict.fromkeys((errno.EIO, errno.ESTALE, errno.EREMOTEIO), _BROKEN),
    **dict.fromkeys(_OF_SERVERS, _BROKEN),
}


def storage_error(error: BaseException, path: object = None) -> StorageError | None:
    """The StorageError that an error of any library amounts to; None if it is something else.

    Writers in other languages (torch, safetensors, arrow) raise errors of their own, where only
    the text tells. An OSError without a file name counts only where no socket raises such a one.
    """
    if isinstance(error, StorageError):
        return error
    if isinstance(error, OSError) and error.errno in _STORAGE_ADVICE:
        place = error.filename or (None if error.errno in _OF_SERVERS else path)
        if place is not None or error.errno in _FULL:
            return StorageError(place or "a file", error)
    text = str(error).strip().partition("\n")[0]
    words = ["PytorchStreamWriter failed", *map(os.strerror, _FULL), os.strerror(errno.EROFS)]
    if any(word.lower() in text.lower() for word in words):
        return StorageError(path or "a file", text)
    return None


class UpstreamGoneError(UserError):
    """What a stage starts from was removed, or is run again, since somebody said it was there."""


class NotFoundError(UserError):
    """A name the user gave (study, cell, stage, file) does not exist."""

    exit_code = EXIT_NOT_FOUND


class DataError(HarnessError):
    """A shard or sample cannot be read; the message names the shard and the byte offset."""


class DivergedError(HarnessError):
    """The loss, or the norm of its gradient, became non-finite. A result, not a crash."""

    def __init__(
        self, step: int, samples: int, loss: float, norm: float | None = None, name: str = "loss"
    ) -> None:
        """`loss`: the training loss, or what else `name` says, such as a held-out one."""
        what = f"gradient norm became {norm}" if math.isfinite(loss) else f"{name} became {loss}"
        super().__init__(f"{what} at step {step} ({samples} samples seen)")
        self.step = step
        self.samples = samples
        self.loss = loss
        self.norm = norm
        """Norm of the gradient before clipping; None where none is measured."""
        self.places: list[int] = []
        """Places in the step's batch of the images whose forward pass gave no finite loss."""
        self.keys: list[str] = []
        """Samples of the forward passes that gave no finite loss; of the whole step where all
        losses were finite and the gradient was not."""


class OutOfMemoryError(HarnessError):
    """A training step does not fit into memory with this micro-batch."""

    def __init__(self, micro_batch: int, smaller: int | None, cause: str) -> None:
        advice = (
            f"next: {smaller}"
            if smaller
            else "no smaller one will do; use more ranks, activation_checkpointing or zero:"
            " zero3_offload"
        )
        super().__init__(f"out of memory with micro_batch {micro_batch}; {advice} ({cause})")
        self.micro_batch = micro_batch
        self.smaller = smaller
        """The largest smaller one that divides a rank's share of the batch and that the recipe
        allows; None if there is none."""


class LeaseLostError(HarnessError):
    """Another process owns the stage now; this one must write nothing more."""


class PreemptedError(HarnessError):
    """The worker was asked to stop, saved a checkpoint and can go on later."""

    exit_code = EXIT_REQUEUE
