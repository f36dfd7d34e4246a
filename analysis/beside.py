"""Independent computations side by side, in forked processes."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

MOST = 4
"""Processes: each holds a copy of what it changes."""

_waiting: list[Callable[[], Any]] = []


@contextlib.contextmanager
def forked(
    functions: Sequence[Callable[[], Any]], *, worth_it: int = 2, chunk: int = 1
) -> Iterator[Callable[[], Iterator[Any]]]:
    """A function that calls all of these and gives their results, in their order.

    From `worth_it` functions on and with several cores, processes call them, forked where this is
    entered: a fork has closures and frames that a pickle cannot hold or copies at length; results
    must pickle. Start threads after that, not before. An error of a function is raised where its
    result would come.
    """
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else 1
    if cores == 1 or len(functions) < worth_it or multiprocessing.current_process().daemon:
        yield lambda: (function() for function in functions)
        return
    assert not _waiting, "one set of functions at a time"
    _waiting.extend(functions)
    try:
        with multiprocessing.get_context("fork").Pool(min(cores, MOST)) as pool:
            yield lambda: pool.imap(_call, range(len(functions)), chunksize=chunk)
    finally:
        _waiting.clear()


def _call(number: int) -> Any:
    return _waiting[number]()
