"""What a person sees while it runs: a bar with rate and time left on a terminal, log lines elsewhere."""

import contextlib
import logging
import threading
import time
from collections.abc import Iterator
from typing import Final

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

log = logging.getLogger("scaledown")
console: Final = Console(stderr=True)

LINE_EVERY_SECONDS: Final = 15.0


def start_logging(level: str) -> None:
    """Send the package's log to standard error: styled on a terminal, plain lines otherwise."""
    handler: logging.Handler
    if console.is_terminal:
        handler = RichHandler(console=console, show_path=False, markup=False, log_time_format="%H:%M:%S")
        handler.setFormatter(logging.Formatter("%(message)s"))
    else:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    log.handlers[:] = [handler]
    log.setLevel(level.upper())
    log.propagate = False


class Tracker:
    """Counts work done. `total` of None means that nobody knows yet how much there is."""

    def __init__(self, name: str, unit: str, total: int | None, done: int) -> None:
        self.name, self.unit, self.total = name, unit, total
        self.done = done
        self.note = ""
        """What else is worth a look while it runs: tokens a second, cost."""
        self._first = done
        self._guess = 0
        self._started = self._spoke = time.monotonic()

    def advance(self, count: int = 1, fraction: float | None = None) -> None:
        """Say that `count` more are done; without a total, what `fraction` of the whole that makes."""
        self._add(count, fraction)
        if time.monotonic() - self._spoke >= LINE_EVERY_SECONDS:
            self._spoke = time.monotonic()
            log.info("%s", self.line())

    def skip(self, count: int) -> None:
        """Say that `count` more were done before this process: they do not count for the rate."""
        self._first += count
        self.advance(count)

    def _add(self, count: int, fraction: float | None) -> None:
        self.done += count
        if self.total is None and fraction:
            self._guess = max(self.done, round(self.done / fraction))

    def counts(self) -> str:
        """`3,000/24,000 passages`, with `~` before a total that is an estimate."""
        total = f"/{self.total:,}" if self.total is not None else f"/~{self._guess:,}" if self._guess else ""
        return f"{self.done:,}{total} {self.unit}"

    def rate(self) -> float:
        """How many a second, in this process."""
        return (self.done - self._first) / max(time.monotonic() - self._started, 1e-9)

    def line(self) -> str:
        """`retrieve: 3,000/24,000 passages, 85.1/s, 4 min left`."""
        text = f"{self.name}: {self.counts()}, {self.rate():,.1f}/s"
        left = (self.total or self._guess) - self.done
        if left > 0 and self.rate() > 0:
            text += f", {duration(left / self.rate())} left"
        return text + (f", {self.note}" if self.note else "")


class _Bar(Tracker):
    """A tracker drawn by rich."""

    def __init__(self, name: str, unit: str, total: int | None, done: int, progress: Progress) -> None:
        super().__init__(name, unit, total, done)
        self._progress = progress
        self._task = progress.add_task(name, total=total, completed=done, rate="")

    def advance(self, count: int = 1, fraction: float | None = None) -> None:
        self._add(count, fraction)
        self._progress.update(
            self._task,
            completed=self.done,
            total=self.total or self._guess or None,
            rate="  ".join(filter(None, (self.counts(), f"{self.rate():,.1f}/s", self.note))),
        )


@contextlib.contextmanager
def track(name: str, unit: str, total: int | None, done: int = 0) -> Iterator[Tracker]:
    """Show the progress of one stage; `done` were finished by an earlier run."""
    if not console.is_terminal:
        tracker = Tracker(name, unit, total, done)
        if done:
            log.info("%s: continues after %s %s", name, f"{done:,}", unit)
        yield tracker
        log.info("%s", tracker.line())
        return
    with _drawing() as progress:
        yield _Bar(name, unit, total, done, progress)


_drawn: list[Progress] = []
_drawing_lock: Final = threading.RLock()


@contextlib.contextmanager
def _drawing() -> Iterator[Progress]:
    """The bars on the terminal: stages that run at once share them."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description:<10}"),
        BarColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    with _drawing_lock:
        progress = _drawn[0] if _drawn else Progress(*columns, console=console)
        if not _drawn:
            progress.start()
        _drawn.append(progress)
    try:
        yield progress
    finally:
        with _drawing_lock:
            _drawn.pop()
            if not _drawn:
                progress.stop()


def duration(seconds: float) -> str:
    """Seconds as people say them: `3.2 s`, `4 min 10 s`, `25 min`, `2 h 05 min`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    if seconds < 599.5:
        return "{} min {:02d} s".format(*divmod(round(seconds), 60))
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
