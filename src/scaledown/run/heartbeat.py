"""Heartbeats: each process at work in a run directory writes its progress to a file, for `scaledown status`.

The file is in `live/`, beside the lock that the process holds while it is alive. It is removed when the
process ends without an error; the file of a killed process shows how far the run had come. These files are
never copied to an object store, since a lock means nothing on another machine.
"""

import contextlib
import json
import math
import os
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

from scaledown.run.atomic import read_json
from scaledown.run.directory import RunDirectory
from scaledown.run.periodic import throughout
from scaledown.run.progress import Tracker, at_work

SUPERVISOR: Final = "supervisor"
"""Name of a process that starts and watches workers, instead of a worker's name."""

_EVERY_SECONDS: Final = 1.0
_PROGRESS_ENDING: Final = ".progress"


class Work(NamedTuple):
    """The progress of a process in a stage, from its tracker."""

    stage: str
    """The stage's name."""
    unit: str
    """What is counted, in the plural."""
    done: int
    """Units done, also by earlier processes."""
    total: int | None
    """All units of the stage; None while it is not known."""
    guess: int
    """An estimate of the total while it is not known; 0 for none."""
    rate: float
    """Units per second of this process."""
    shards: tuple[int, int] | None
    """The shards whose rows `in_flight` counts: the first, and the one after the last."""
    in_flight: int
    """Units of `shards` that this process has done."""
    waiting: str = ""
    """What the process waits for; empty if it works."""

    @classmethod
    def parse(cls, content: Any) -> "Work | None":
        """Read it from a progress file.

        Args:
            content: The JSON value of one entry of `work`.

        Returns:
            The progress; None if the content is invalid or of another version.
        """
        if not isinstance(content, dict) or content.keys() != set(cls._fields):
            return None
        at, numbers = content["shards"], [content[name] for name in ("done", "guess", "rate", "in_flight")]
        shards = tuple(at) if isinstance(at, list) and [type(bound) for bound in at] == [int, int] else None
        valid = all(isinstance(number, int | float) and math.isfinite(number) for number in numbers)
        valid &= isinstance(content["stage"], str) and isinstance(content["total"], int | None)
        valid &= isinstance(content["waiting"], str)
        return cls(**{**content, "shards": shards}) if valid else None

    @classmethod
    def of(cls, tracker: Tracker) -> "Work":
        """Create it from the tracker of the stage."""
        at = (tracker.at.start, tracker.at.stop) if tracker.at else None
        shown = (tracker.unit, tracker.done, tracker.total, tracker.guess, tracker.rate())
        name = tracker.stage.name if tracker.stage else tracker.name
        return cls(name, *shown, at, tracker.in_flight, tracker.waiting)


class Process(NamedTuple):
    """A process in a run directory, and its progress."""

    worker: str
    """Its name if it is one of several workers, `SUPERVISOR`, or empty."""
    host: str
    """The name of its machine."""
    pid: int
    """Its number on this machine."""
    alive: bool | None
    """None if the file system has no locks."""
    time: float
    """When the progress was written, in seconds since 1970; 0 if it never was."""
    run: str
    """The path of the run directory on the process' machine."""
    stages: Mapping[str, str]
    """The folders of the stages that it has opened, by name, on its machine."""
    work: tuple[Work, ...]
    """Its progress in each stage that it works on."""


@contextlib.contextmanager
def publishing(place: Path, worker: str, *runs: RunDirectory) -> Iterator[None]:
    """Write the progress of this process to a file, every second while the block runs.

    Args:
        place: The path without suffix that `RunDirectory.claim` yields.
        worker: The name of this process among the workers; empty if it has none.
        runs: The directories whose stages it opens.
    """
    for path in place.parent.glob(f"*{_PROGRESS_ENDING}"):
        if not path.with_suffix(".json").exists():  # its process has ended
            path.unlink(missing_ok=True)
    path = place.with_suffix(_PROGRESS_ENDING)
    where = {"host": socket.gethostname(), "pid": os.getpid(), "run": str(runs[0].path.resolve())}

    def publish() -> None:
        stages = {name: str(folder.resolve()) for run in runs for name, folder in dict(run.opened).items()}
        work = [Work.of(tracker)._asdict() for tracker in at_work()]
        who = {"worker": SUPERVISOR if _supervises.is_set() else worker, **where}
        write_quickly(path, json.dumps({**who, "time": time.time(), "stages": stages, "work": work}))

    with throughout(_EVERY_SECONDS, publish):
        yield
    path.unlink(missing_ok=True)


_supervises: Final = threading.Event()


@contextlib.contextmanager
def supervising() -> Iterator[None]:
    """Show this process as the supervisor of workers while the block runs."""
    _supervises.set()
    try:
        yield
    finally:
        _supervises.clear()


def write_quickly(path: Path, text: str) -> None:
    """Write a file atomically, without waiting for the disk: only a power cut can damage it.

    Args:
        path: The file; its folder must exist.
        text: Its content.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8", errors="surrogateescape")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def processes(run: Path) -> list[Process]:
    """List the live processes of a run directory and those that were killed. Changes nothing.

    Args:
        run: The run directory.

    Raises:
        ValueError: A progress file has a time that is not finite.
    """
    live = run / "live"
    paths = sorted(
        {path.with_suffix("") for path in live.glob("*") if path.suffix in {".json", _PROGRESS_ENDING}}
    )
    return [process for path in paths if (process := _process(path, _holds(path.with_suffix(".lock"))))]


_FIELD_TYPES: Final = {
    **{"worker": str, "host": str, "pid": int, "run": str},
    **{"time": float, "stages": dict, "work": list},
}


def _process(place: Path, alive: bool | None) -> Process | None:
    note, progress = (read_json(place.with_suffix(ending)) for ending in (".json", _PROGRESS_ENDING))
    if not isinstance(note, dict) and not isinstance(progress, dict):
        return None  # it has just ended
    found: dict[str, Any] = {name: kind() for name, kind in _FIELD_TYPES.items()}
    for content in (note, progress):
        if isinstance(content, dict):
            found |= {
                name: content[name] for name, kind in _FIELD_TYPES.items() if type(content.get(name)) is kind
            }
    found["time"] = finite(found["time"])
    found["work"] = tuple(work for entry in found["work"] if (work := Work.parse(entry)))
    found["stages"] = {name: path for name, path in found["stages"].items() if isinstance(path, str)}
    return Process(alive=alive if note is not None else False, **found)


def finite(seconds: float) -> float:
    """Check seconds that were read from a file. Raises `ValueError` for infinity and NaN."""
    if not math.isfinite(seconds):
        raise ValueError(f"{seconds} seconds")
    return seconds


def _holds(lock: Path) -> bool | None:
    """Whether a process holds a lock; None if the file system has no locks."""
    try:
        import fcntl

        with lock.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # shared, and released at once
    except BlockingIOError:
        return True
    except FileNotFoundError:
        return False
    except (ImportError, OSError):
        return None
    return False
