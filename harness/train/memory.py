"""Running out of memory, told apart from other errors, and what to try next."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

import torch

from harness.errors import OutOfMemoryError


class _Batches(Protocol):
    @property
    def micro_batch(self) -> int: ...
    @property
    def accumulation(self) -> int: ...


# What allocators without an error class of their own say, in lower case: torch's on the CPU, C++'s,
# the CUDA driver's and its libraries'.
_SAID = (
    "can't allocate memory",
    "not enough memory: you tried to allocate",
    "std::bad_alloc",
    "cuda error: out of memory",
    "cuda out of memory",
    "status_alloc_failed",  # CUBLAS_, CUDNN_, CUSPARSE_, CUSOLVER_
)


@contextmanager
def memory_checked(
    engine: _Batches, allowed: Callable[[int], bool] = lambda size: True
) -> Iterator[None]:
    """Raises OutOfMemoryError for whatever the inside raises when memory ends, on CUDA or not.

    `allowed` says which sizes a forward pass may have.

    Nothing inside can be repeated: gradients were added and buffers half filled. The stage is
    started again, in a new process, with the smaller micro-batch.
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        share = engine.micro_batch * engine.accumulation
        smaller = smaller_micro_batch(share, engine.micro_batch, allowed)
        cause = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise OutOfMemoryError(engine.micro_batch, smaller, cause) from error


def _is_out_of_memory(error: BaseException) -> bool:
    """By class, or by text; never a collective's: its cause is another rank's to tell."""
    if isinstance(error, torch.distributed.DistError):
        return False
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    text = str(error).lower()
    return any(words in text for words in _SAID)


def smaller_micro_batch(
    share: int, micro_batch: int, allowed: Callable[[int], bool] = lambda size: True
) -> int | None:
    """The largest allowed divisor of a rank's share of the batch below `micro_batch`, if any."""
    sizes = range(micro_batch - 1, 0, -1)
    return next((size for size in sizes if share % size == 0 and allowed(size)), None)
