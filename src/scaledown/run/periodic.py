"""What is done again and again in a thread while a block runs, and ends nothing when it fails."""

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator

log = logging.getLogger("scaledown")


@contextlib.contextmanager
def every(seconds: float, action: Callable[[], None], patience: float | None = None) -> Iterator[None]:
    """Do something every so many seconds; at the end wait for what is under way, so many at most."""
    stop = threading.Event()

    def repeat() -> None:
        while not stop.wait(seconds):
            _attempt(action)

    thread = threading.Thread(target=repeat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(patience)


@contextlib.contextmanager
def throughout(seconds: float, action: Callable[[], None]) -> Iterator[None]:
    """Do something at once, every so many seconds, and at the end."""
    _attempt(action)
    try:
        with every(seconds, action):
            yield
    finally:
        _attempt(action)


def _attempt(action: Callable[[], None]) -> None:
    try:
        action()
    except Exception:  # a full disk, a folder that is gone, no network: the work itself will tell
        log.debug("it failed, and is tried again", exc_info=True)
