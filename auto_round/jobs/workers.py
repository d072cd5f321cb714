"""Many pieces of work at once, a bounded number under way: threads, for torch releases the interpreter lock."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


def cores() -> int:
    """Processor cores that this process may use."""
    # A container may have fewer than the machine.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_threads(
    function: Callable[[Item], Result],
    items: Iterable[Item],
    *,
    workers: int,
    upcoming: Callable[[Item], None] | None = None,
    size: Callable[[Item], int] = lambda _: 0,
    room: int = 0,
) -> Iterator[Result]:
    """The results of `function` as they come, `workers` at a time; `items` are taken as workers become free.

    upcoming: called with each item when it is next but for those that fill the workers. The first error stops the
    taking of items, waits for what is under way, and is raised.
    size, room: items under way have no more than `room` together; one that is larger is alone with those of size 0.
    """
    waiting = iter(items)
    queue: deque[Item] = deque()
    running: dict[Future[Result], int] = {}

    def fits(item: Item) -> bool:
        return not (own := size(item)) or not (taken := sum(running.values())) or own + taken <= room

    def fill() -> None:
        # As many again as are under way: enough to read ahead, few enough to fit the cache of the system.
        while len(queue) < 2 * workers:
            item = next(waiting, None)
            if item is None:
                return
            if upcoming is not None:
                upcoming(item)
            queue.append(item)

    with _one_thread_each(), ThreadPoolExecutor(workers, "auto-round", initializer=_alone) as pool:
        fill()
        while queue or running:
            while queue and len(running) < workers and fits(queue[0]):
                item = queue.popleft()
                running[pool.submit(function, item)] = size(item)
            fill()
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                del running[future]
                yield future.result()


# OpenMP keeps the number per thread, so each worker has to be told itself.
def _alone() -> None:
    torch.set_num_threads(1)


@contextmanager
def _one_thread_each() -> Iterator[None]:
    """Inside, an operation uses the thread that calls it and no others: the workers fill the cores already."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
