"""Collect Ctrl-C and SIGTERM, so that training can stop after a complete step."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType


@contextlib.contextmanager
def noticing_signals() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM in the yielded list; the second signal ends the process at once."""
    noticed: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield noticed
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def notice(number: int, _frame: FrameType | None) -> None:
        noticed.append(number)
        for each, handler in before.items():
            signal.signal(each, handler)

    for number in before:
        signal.signal(number, notice)
    try:
        yield noticed
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
