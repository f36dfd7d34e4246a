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
        # torch has no class of its own for what its CPU allocator does not get.
        if type(error) is RuntimeError and "can't allocate memory" not in str(error):
            raise
        share = engine.micro_batch * engine.accumulation
        smaller = smaller_micro_batch(share, engine.micro_batch, allowed)
        cause = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise OutOfMemoryError(engine.micro_batch, smaller, cause) from error


def smaller_micro_batch(
    share: int, micro_batch: int, allowed: Callable[[int], bool] = lambda size: True
) -> int | None:
    """The largest allowed divisor of a rank's share of the batch below `micro_batch`, if any."""
    sizes = range(micro_batch - 1, 0, -1)
    return next((size for size in sizes if share % size == 0 and allowed(size)), None)
