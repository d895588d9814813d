"""Runs a function over a stream, in order: here, or in processes of its own."""

import collections
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final, TypeVar

_IDLE_SECONDS: Final = 30  # workers of a process that was killed end after as long

Item = TypeVar("Item")
Result = TypeVar("Result")


def cores() -> int:
    """The processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_order(function: Callable[[Item], Result], items: Iterable[Item], processes: int) -> Iterator[Result]:
    """`map(function, items)` by so many processes, a few items ahead of what was taken.

    `function` must be picklable and should be cheap to pickle.
    """
    if processes < 2:
        yield from map(function, items)
        return
    from loky import ProcessPoolExecutor  # unlike the standard one it needs no main-module guard

    quiet: dict[str, Any] = {"TOKENIZERS_PARALLELISM": "false"}
    executor = ProcessPoolExecutor(processes, timeout=_IDLE_SECONDS, env=quiet)
    pending: collections.deque[Any] = collections.deque()
    try:
        for item in items:
            pending.append(executor.submit(function, item))
            if len(pending) > 2 * processes:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        executor.shutdown(wait=True, kill_workers=True)
