"""Running out of memory, told apart from other errors, and what to try next."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import torch

from harness.errors import OutOfMemoryError


class _Batches(Protocol):
    @property
    def micro_batch(self) -> int: ...
    @property
    def accumulation(self) -> int: ...


@contextmanager
def memory_checked(engine: _Batches) -> Iterator[None]:
    """Raises OutOfMemoryError for whatever the inside raises when memory ends, on CUDA or not.

    Nothing inside can be repeated: gradients were added and buffers half filled. The stage is
    started again, in a new process, with the smaller micro-batch.
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        # torch has no class of its own for what its CPU allocator does not get.
        if type(error) is RuntimeError and "can't allocate memory" not in str(error):
            raise
        smaller = smaller_micro_batch(engine.micro_batch * engine.accumulation, engine.micro_batch)
        cause = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise OutOfMemoryError(engine.micro_batch, smaller, cause) from error


def smaller_micro_batch(share: int, micro_batch: int) -> int | None:
    """The largest divisor of a rank's share of the batch that is less than `micro_batch`."""
    found = [size for size in range(1, micro_batch) if share % size == 0]
    return found[-1] if found else None
