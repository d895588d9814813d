"""Repeat an action in a thread while a block runs. An error of the action does not stop the block."""

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator

log = logging.getLogger("scaledown")


@contextlib.contextmanager
def throughout(seconds: float, action: Callable[[], None]) -> Iterator[None]:
    """Run an action at once, then regularly while the block runs, and once more at the end.

    Args:
        seconds: The time between two calls.
        action: It runs in a thread, except for the first and the last call. Its errors are only logged.
    """
    stop = threading.Event()

    def repeat() -> None:
        while not stop.wait(seconds):
            _attempt(action)

    _attempt(action)
    thread = threading.Thread(target=repeat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        _attempt(action)


def _attempt(action: Callable[[], None]) -> None:
    try:
        action()
    except Exception:  # a full disk, a deleted folder: the work itself will report it
        log.debug("failed, and is tried again", exc_info=True)
