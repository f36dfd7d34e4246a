"""Processes that make shards: started fresh, without torch, and gone when their parent is."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from multiprocessing.connection import wait as wait_for_sentinel
from typing import Any

from harness.data.pack_shard import Task, make_shard
from harness.errors import DataError

_POLL_S = 0.2
_counter: Any = None
_is_stopped: Any = None


class _Stopped(Exception):
    """Another shard failed, or the user gave up: this one is not needed."""


def make_all(tasks: Iterable[Task], workers: int, tick: Callable[[int], None]) -> None:
    """Makes all shards in `workers` processes; `tick` gets the number of items dealt with so far.

    Raises what a shard raises, and DataError if a process dies; what is finished stays.
    """
    if workers == 1:
        _make_here(tasks, tick)
        return
    # Not fork: the caller may hold threads of torch.
    context = multiprocessing.get_context("spawn")
    counter, is_stopped = context.Value("q", 0), context.Value("b", 0, lock=False)
    waiting = iter(tasks)
    with ProcessPoolExecutor(workers, context, _start, (counter, is_stopped)) as pool:
        try:
            # Few at a time: a task may hold the pixels of its images.
            running: set[Future[None]] = {
                pool.submit(_make, task) for task in islice(waiting, 2 * workers)
            }
            while running:
                done, running = wait(running, _POLL_S, FIRST_COMPLETED)
                for future in done:
                    future.result()
                running |= {pool.submit(_make, task) for task in islice(waiting, len(done))}
                tick(counter.value)
        except BrokenProcessPool:
            raise DataError(
                "a process that packed was killed, perhaps for want of memory; run the same command"
                f" again with --workers {max(1, workers // 2)}: finished shards are kept"
            ) from None
        finally:
            is_stopped.value = 1
            pool.shutdown(wait=True, cancel_futures=True)


def _make_here(tasks: Iterable[Task], tick: Callable[[int], None]) -> None:
    total = 0

    def count(num: int) -> None:
        nonlocal total
        total += num
        tick(total)

    for task in tasks:
        make_shard(task, count)


def _start(counter: Any, is_stopped: Any) -> None:
    global _counter, _is_stopped
    _counter, _is_stopped = counter, is_stopped
    # Control-C goes to every process of the terminal; the parent's answer to it is enough.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait_for_sentinel([parent.sentinel])
        os._exit(1)


def _make(task: Task) -> None:
    def tick(num: int) -> None:
        if _is_stopped.value:
            raise _Stopped
        with _counter.get_lock():
            _counter.value += num

    make_shard(task, tick)
