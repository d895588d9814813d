"""The status of a run as text: the table of `scaledown status`, and a supervisor's progress bars."""

import contextlib
import logging
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from scaledown.errors import one_line
from scaledown.run.progress import Tracker, duration, track
from scaledown.run.status import StageStatus, Status, WorkerStatus, status_of
from scaledown.urls import is_url

log = logging.getLogger("scaledown")

_EVERY_SECONDS: Final = 1.0


class Overview:
    """The progress of all workers together: a bar, or log lines, for each stage that is running."""

    def __init__(self, run: Path) -> None:
        self._run = run
        self._next = 0.0
        self._shown: dict[str, tuple[Tracker, contextlib.ExitStack]] = {}

    def look(self) -> None:
        """Show the progress, at most once a second."""
        if time.monotonic() < self._next:
            return
        try:
            stages = status_of(self._run).stages
        except Exception:  # the disk does not answer, a file is damaged: the run goes on
            log.debug("no status of %s", self._run, exc_info=True)
            stages = ()
        for stage in stages:
            self._show(stage)
        self._next = time.monotonic() + _EVERY_SECONDS

    def _show(self, stage: StageStatus) -> None:
        shown = self._shown.get(stage.name)
        if shown is None:
            if not stage.workers or stage.finished:
                return
            stack = contextlib.ExitStack()
            bar = stack.enter_context(track(stage.name, stage.unit, stage.rows_planned))
            shown = self._shown[stage.name] = bar, stack
        tracker, stack = shown
        tracker.guess = stage.rows_planned or 0
        total = None if stage.estimated else stage.rows_planned
        rate = tracker.rate() if stage.finished else stage.rate  # the last rate of all together
        tracker.tell(stage.done, total, rate, ", ".join(notes(stage)))
        if stage.finished:
            stack.close()
            del self._shown[stage.name]

    def close(self) -> None:
        """Remove all bars."""
        while self._shown:
            _, (_, stack) = self._shown.popitem()
            stack.close()


def notes(stage: StageStatus) -> list[str]:
    """Return further facts about a stage: its workers and its problems."""
    counted = [
        f"{count:,} {one if count == 1 else many}"
        for count, one, many in (
            (stage.workers, "worker", "workers"),
            (stage.deaths, "death", "deaths"),
            (stage.given_up, "shard given up", "shards given up"),
            (stage.quarantined, "row set aside", "rows set aside"),
        )
        if count
    ]
    return [*counted, one_line(stage.waiting, 200)] if stage.waiting else counted


def status_table(status: Status) -> str:
    """Format a status as a table: the state of the run, its stages, its workers."""
    lines = [f"{status.path}: {_run_state(status)}", ""]
    if status.stages:
        lines += _aligned_lines([_HEAD, *(_row(stage, status) for stage in status.stages)])
    else:
        lines.append("no stage has begun")
    if status.workers:
        lines += [
            "",
            *_aligned_lines(
                [("worker", "host", "process", "at", "since"), *map(_worker_cells, status.workers)]
            ),
        ]
    return "\n".join(lines)


_HEAD: Final = ("stage", "shards", "rows", "time", "rate", "left", "")


def _run_state(status: Status) -> str:
    if status.finished:
        when = datetime.fromtimestamp(status.finished_time or 0, UTC).astimezone()
        text = f"finished {when:%Y-%m-%d %H:%M}"
        if status.output and status.examples is not None:
            text += f", {status.examples:,} examples in {one_line(status.output)}"
        return text
    if status.workers:
        return "running"
    if is_url(status.path):
        return "unfinished (whether a process is at work cannot be seen in a bucket)"
    return "interrupted: the same command continues (or it waits for other parts of the run)"


def _row(stage: StageStatus, status: Status) -> tuple[str, ...]:
    several = sum(other.name == stage.name for other in status.stages) > 1
    planned = "" if stage.shards_planned is None or stage.finished else f"/{stage.shards_planned:,}"
    total = (
        ""
        if stage.rows_planned is None or stage.finished
        else f"/{'~' * stage.estimated}{stage.rows_planned:,}"
    )
    return (
        one_line(f"{stage.name} {stage.fingerprint}") if several else stage.name,
        f"{stage.shards:,}{planned}",
        f"{stage.done:,}{total} {stage.unit}",
        duration(stage.seconds),
        f"{stage.rate:,.1f}/s" if stage.rate else "",
        "done" if stage.finished else duration(stage.seconds_left) if stage.seconds_left else "",
        ", ".join(notes(stage)),
    )


def _worker_cells(worker: WorkerStatus) -> tuple[str, ...]:
    since = "" if worker.seconds_at is None else duration(worker.seconds_at)
    if worker.alive is None:
        silent = worker.silent_seconds
        since += f" (last seen {duration(silent)} ago)" if silent is not None else " (never seen)"
    return (
        one_line(worker.worker) or "process",
        one_line(worker.host),
        str(worker.pid),
        one_line(worker.at),
        since.strip(),
    )


def _aligned_lines(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
