"""Progress on standard error: bars with rate and time left on a terminal, log lines elsewhere."""

import contextlib
import logging
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any, Final

from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

from scaledown.run.logs import console, style
from scaledown.run.stage import Stage

log = logging.getLogger("scaledown")

LINE_EVERY_SECONDS: Final = 15.0


class Tracker:
    """Counts finished work, and shows it.

    Args:
        name: The name to show.
        unit: What is counted, in the plural.
        total: All units; None if it is not known.
        done: Units that earlier processes have done.
        stage: The stage, if its progress is published.
    """

    def __init__(
        self, name: str, unit: str, total: int | None, done: int, stage: Stage | None = None
    ) -> None:
        self.name, self.unit, self.total = name, unit, total
        self.done = done
        self.stage = stage
        self.note = ""
        """Further facts to show: tokens per second, cost."""
        self.waiting = ""
        """What the work waits for; empty if it does not wait."""
        self.guess = 0
        """An estimate of the total while it is not known."""
        self.at: range | None = None
        """The shards whose units `in_flight` counts, whether they are on the disk yet or not."""
        self.in_flight = 0
        self._first = done
        self._rate: float | None = None
        self._started = self._spoke = time.monotonic()

    def advance(self, count: int = 1, fraction: float | None = None) -> None:
        """Add finished units.

        Args:
            count: Number of units.
            fraction: The share of the work done so far, 0 to 1. An unknown total is estimated from it.
        """
        self.done += count
        if self.total is None and fraction:
            self.guess = max(self.done, round(self.done / fraction))
        if self.stage:
            if self.stage.at != self.at:
                self.at, self.in_flight = self.stage.at, 0
            self.in_flight += count
        self._show()

    def skip(self, count: int) -> None:
        """Add `count` units that earlier processes have done; they do not count for the rate."""
        self._first += count
        self.advance(count)

    def wait(self, reason: str) -> None:
        """Show what the work waits for; empty when it continues."""
        if reason != self.waiting:
            self.waiting = reason
            self._show()

    def tell(self, done: int, total: int | None, rate: float, note: str) -> None:
        """Show the progress of all workers together.

        Args:
            done: Units that they have done.
            total: All units; None if it is not known.
            rate: Units per second of all of them.
            note: Further facts to show; may be empty.
        """
        self.done, self.total, self._rate, self.note = done, total, rate, note
        self._show()

    def _show(self) -> None:
        if time.monotonic() - self._spoke >= LINE_EVERY_SECONDS:
            self._spoke = time.monotonic()
            self.say()

    def say(self) -> None:
        """Log the progress."""
        log.info("%s", self.line(), extra={"fields": self.fields()})

    def counts(self) -> str:
        """Return `3,000/24,000 passages`; an estimated total has a `~` before it."""
        total = f"/{self.total:,}" if self.total is not None else f"/~{self.guess:,}" if self.guess else ""
        last = self.total if self.total is not None else self.guess or self.done
        return f"{self.done:,}{total} {self.unit if last != 1 else singular(self.unit)}"

    def rate(self) -> float:
        """Return units per second: of this process, or the value from `tell`."""
        if self._rate is not None:
            return self._rate
        return (self.done - self._first) / max(time.monotonic() - self._started, 1e-9)

    def line(self) -> str:
        """Return `retrieve: 3,000/24,000 passages, 85.1/s, 4 min left`."""
        rate = self.rate()
        text = f"{self.name}: {self.counts()}, {rate:,.1f}/s"
        if (left := self._left(rate)) is not None:
            text += f", {duration(left)} left"
        return ", ".join(filter(None, (text, self.note, self.waiting)))

    def fields(self) -> dict[str, Any]:
        """Return the same values for machines; the rate is per second, a total of None is not known."""
        rate = self.rate()
        left = self._left(rate)
        return {
            "stage": self.stage.name if self.stage else self.name,
            "unit": self.unit,
            "done": self.done,
            "total": self.total if self.total is not None else self.guess or None,
            "rate": round(rate, 3),
            "seconds_left": None if left is None else round(left, 1),
        }

    def _left(self, rate: float) -> float | None:
        left = (self.total or self.guess) - self.done
        return left / rate if left > 0 and rate > 0 else None


class _Bar(Tracker):
    """A tracker drawn by rich."""

    def __init__(  # noqa: PLR0917
        self, name: str, unit: str, total: int | None, done: int, stage: Stage | None, progress: Progress
    ) -> None:
        super().__init__(name, unit, total, done, stage)
        self._progress = progress
        self._task = progress.add_task(name, total=total, completed=done, rate="")

    def _show(self) -> None:
        self._progress.update(
            self._task,
            completed=self.done,
            total=self.total or self.guess or None,
            rate="  ".join(filter(None, (self.counts(), f"{self.rate():,.1f}/s", self.note, self.waiting))),
        )


_at_work: list[Tracker] = []


def no_progress(_: float) -> None:
    """A progress function that does nothing."""


def at_work() -> list[Tracker]:
    """Return the trackers of the stages that this process works on now."""
    return list(_at_work)


@contextlib.contextmanager
def track(
    name: str, unit: str, total: int | None, done: int = 0, stage: Stage | None = None
) -> Iterator[Tracker]:
    """Show the progress of some work while the block runs.

    Args:
        name: The name to show.
        unit: What is counted, in the plural.
        total: All units; None if it is not known.
        done: Units that an earlier run finished.
        stage: The stage. Its progress is also published for `scaledown status`.
    """
    with _shown_bar(name, unit, total, done, stage) as tracker:
        if stage:
            _at_work.append(tracker)
        try:
            yield tracker
        finally:
            if stage:
                _at_work.remove(tracker)


@contextlib.contextmanager
def tracked(stage: Stage, name: str, unit: str, rows: Sequence[int], each: int = 1) -> Iterator[Tracker]:
    """Show the progress of a stage, counting its finished shards first.

    Args:
        stage: The stage.
        name: The name to show.
        unit: What is counted, in the plural.
        rows: Rows of each shard.
        each: Units for each row.
    """
    done = sum(count for shard, count in enumerate(rows) if stage.has(shard))
    with track(name, unit, sum(rows) * each, done * each, stage) as tracker:
        yield tracker


@contextlib.contextmanager
def _shown_bar(name: str, unit: str, total: int | None, done: int, stage: Stage | None) -> Iterator[Tracker]:
    if console.is_terminal and style().form == "text":
        with _drawing() as progress:
            yield _Bar(name, unit, total, done, stage, progress)
        return
    tracker = Tracker(name, unit, total, done, stage)
    if done:
        log.info("%s: continues after %s", name, counted(done, unit))
    yield tracker
    tracker.say()


_drawn: list[Progress] = []
_drawing_lock: Final = threading.RLock()


@contextlib.contextmanager
def _drawing() -> Iterator[Progress]:
    """Yield the progress bars on the terminal; stages that run at the same time share them."""
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


def singular(unit: str) -> str:
    """Return `query` for `queries`, `passage` for `passages`."""
    if unit.endswith(("ies", "oes")):
        return f"{unit[:-3]}{'y' if unit.endswith('ies') else 'o'}"
    return unit.removesuffix("s")


def counted(number: int, unit: str) -> str:
    """Return a number with its unit, which is given in the plural: `1 query`, `2,000 queries`."""
    return f"{number:,} {unit if number != 1 else singular(unit)}"


def duration(seconds: float) -> str:
    """Format seconds: `3.2 s`, `4 min 10 s`, `25 min`, `2 h 05 min`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    if seconds < 599.5:
        return "{} min {:02d} s".format(*divmod(round(seconds), 60))
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
