"""Worker processes that prepare what the main process needs next."""

import ctypes
import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from mmvit.errors import UserError

Item = TypeVar("Item")
Result = TypeVar("Result")

AHEAD = 2  # items that each worker has before it
PR_SET_PDEATHSIG = 1  # of Linux' prctl: the signal that a process gets when its parent is gone


def default_workers(most: int = 8) -> int:
    """A worker for each core but one, shared by the processes that a launcher started on this machine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(most, max(0, cores // processes_here() - 1))


def processes_here() -> int:
    """The processes that a launcher started on this machine, 1 without one."""
    number = os.environ.get("LOCAL_WORLD_SIZE", "1")
    return max(1, int(number)) if number.isdecimal() else 1


def map_ahead(function: Callable[[Item], Result], items: Iterable[Item], workers: int) -> Iterator[Result]:
    """Yields `function(item)` for each of `items`, in order, from `workers` processes that are up to `AHEAD`
    items each ahead of what has been taken; with 0 workers from this process.

    Raises:
        UserError: when a worker is killed.
    """
    if workers == 0:
        yield from map(function, items)
        return
    pool = ProcessPoolExecutor(workers, initializer=become_worker)
    waiting: deque[Future[Result]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > AHEAD * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool:
        raise UserError(
            "a worker process was killed, often for lack of memory: use fewer --workers"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def become_worker() -> None:
    """Makes this process end with the main process, and leaves Ctrl-C to that."""
    end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def end_with_parent() -> None:
    """Has Linux kill this process when its parent is gone, for which it would wait for ever."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
