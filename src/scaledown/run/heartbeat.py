"""The progress of each process at work in a run directory, in a file of its own, for those who look on.

The file is in `live/`, beside the lock that the process holds while it is alive. It is removed when the
process ends well; what a killed process leaves shows how far the run had come. All of it stays on the disk
(of a run in an object store: in the mirror), since locks show nothing from another machine.
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
"""The name, in place of a worker's, of a process that starts and watches workers."""

_EVERY_SECONDS: Final = 1.0
_ENDING: Final = ".progress"


class Work(NamedTuple):
    """The work of a process in a stage, as its tracker has it; `rate` is rows a second."""

    stage: str
    unit: str
    done: int
    total: int | None
    guess: int
    rate: float
    shards: tuple[int, int] | None
    """First and past the last: the shards that `in_flight` counts rows of."""
    in_flight: int
    waiting: str = ""
    """What it waits for, if it does."""

    @classmethod
    def parse(cls, content: Any) -> "Work | None":
        """From a progress file; None for anything else, as of another version."""
        if not isinstance(content, dict) or content.keys() != set(cls._fields):
            return None
        at, numbers = content["shards"], [content[name] for name in ("done", "guess", "rate", "in_flight")]
        shards = tuple(at) if isinstance(at, list) and [type(own) for own in at] == [int, int] else None
        sound = all(isinstance(number, int | float) and math.isfinite(number) for number in numbers)
        sound &= isinstance(content["stage"], str) and isinstance(content["total"], int | None)
        sound &= isinstance(content["waiting"], str)
        return cls(**{**content, "shards": shards}) if sound else None

    @classmethod
    def of(cls, tracker: Tracker) -> "Work":
        """From the tracker of the stage."""
        at = (tracker.at.start, tracker.at.stop) if tracker.at else None
        shown = (tracker.unit, tracker.done, tracker.total, tracker.guess, tracker.rate())
        name = tracker.stage.name if tracker.stage else tracker.name
        return cls(name, *shown, at, tracker.in_flight, tracker.waiting)


class Process(NamedTuple):
    """A process in a run directory: its name, where it runs, and its progress at `time`."""

    worker: str
    host: str
    pid: int
    alive: bool | None
    """None where the file system has no locks."""
    time: float
    run: str
    """The path of the run directory on its machine."""
    stages: Mapping[str, str]
    """The folders of the stages it has opened, on its machine."""
    work: tuple[Work, ...]


@contextlib.contextmanager
def publishing(place: Path, worker: str, *runs: RunDirectory) -> Iterator[None]:
    """Write the progress of this process to a file, every second while the block runs.

    Args:
        place: The path, without ending, that `RunDirectory.claim` gives.
        worker: The name of this process among the workers; empty if it has none.
        runs: The directories whose stages it opens.
    """
    for path in place.parent.glob(f"*{_ENDING}"):
        if not path.with_suffix(".json").exists():  # its process has ended
            path.unlink(missing_ok=True)
    path = place.with_suffix(_ENDING)
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
    """Show this process as the one that starts and watches workers, while the block runs."""
    _supervises.set()
    try:
        yield
    finally:
        _supervises.clear()


def write_quickly(path: Path, text: str) -> None:
    """Write a file without waiting for the disk: after a power cut it may be damaged, else it is whole."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8", errors="surrogateescape")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def processes(run: Path) -> list[Process]:
    """The processes in a run directory, and what is left of those that were killed. Changes nothing."""
    live = run / "live"
    paths = sorted({path.with_suffix("") for path in live.glob("*") if path.suffix in {".json", _ENDING}})
    return [process for path in paths if (process := _process(path, _holds(path.with_suffix(".lock"))))]


_KINDS: Final = {
    **{"worker": str, "host": str, "pid": int, "run": str},
    **{"time": float, "stages": dict, "work": list},
}


def _process(place: Path, alive: bool | None) -> Process | None:
    note, progress = (read_json(place.with_suffix(ending)) for ending in (".json", _ENDING))
    if not isinstance(note, dict) and not isinstance(progress, dict):
        return None  # it has just left
    found: dict[str, Any] = {name: kind() for name, kind in _KINDS.items()}
    for own in (note, progress):
        if isinstance(own, dict):
            found |= {name: own[name] for name, kind in _KINDS.items() if type(own.get(name)) is kind}
    found["time"] = finite(found["time"])
    found["work"] = tuple(work for content in found["work"] if (work := Work.parse(content)))
    found["stages"] = {name: path for name, path in found["stages"].items() if isinstance(path, str)}
    return Process(alive=alive if note is not None else False, **found)


def finite(seconds: float) -> float:
    """Seconds from a file, which anybody may have written. Raises `ValueError` for infinity and NaN."""
    if not math.isfinite(seconds):
        raise ValueError(f"{seconds} seconds")
    return seconds


def _holds(lock: Path) -> bool | None:
    """Whether a process holds a lock; None where the file system has no locks."""
    try:
        import fcntl

        with lock.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # shared, and given back at once
    except BlockingIOError:
        return True
    except FileNotFoundError:
        return False
    except (ImportError, OSError):
        return None
    return False
