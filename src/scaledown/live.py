"""What the processes of a run tell each other while they work: each one's word, in a file of its own.

A word lies in `live/` beside the lock that its process holds as long as it lives. It is never waited for on
the disk, and goes with a process that ends well; what a killed one leaves says how far the run had come.
"""

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

from scaledown.atomic import read_json
from scaledown.progress import Tracker, at_work
from scaledown.pulse import every, throughout
from scaledown.store import RunDirectory

SUPERVISOR: Final = "supervisor"
"""The worker's name of a process that only looks after others."""

_EVERY_SECONDS: Final = 1.0
_SEND_SECONDS: Final = 10.0  # where others see it only when it is sent
_SILENT_SECONDS: Final = 120.0  # after so long none is thought to live where no lock tells
_ENDING: Final = ".progress"


class Work(NamedTuple):
    """What a process is at in a stage: its tracker; `rate` is a second's."""

    stage: str
    unit: str
    done: int
    total: int | None
    guess: int
    rate: float
    shards: tuple[int, int] | None
    """From and to: what `in_flight` is about."""
    in_flight: int

    @classmethod
    def of(cls, tracker: Tracker) -> "Work":
        """As the tracker shows it."""
        at = (tracker.at.start, tracker.at.stop) if tracker.at else None
        shown = (tracker.unit, tracker.done, tracker.total, tracker.guess, tracker.rate())
        name = tracker.stage.name if tracker.stage else tracker.name
        return cls(name, *shown, at, tracker.in_flight)


class Process(NamedTuple):
    """A process in a run directory: who and where it is, its last word and when that was."""

    worker: str
    host: str
    pid: int
    alive: bool | None
    """None where the file system does not say."""
    time: float
    stages: Mapping[str, str]
    """The folders of the stages it has opened."""
    work: tuple[Work, ...]


@contextlib.contextmanager
def publishing(place: Path, worker: str, *runs: RunDirectory) -> Iterator[None]:
    """Publish what this process is at, in files that begin with `place`, which `RunDirectory.claim` gives.

    `runs` are the directories whose stages it opens.
    """
    storage = runs[0].storage
    for path in storage.glob(place.parent, f"*{_ENDING}"):
        if not storage.exists(path.with_suffix(".json")):  # of a process that is no more
            storage.remove(path)
    path = place.with_suffix(_ENDING)
    where = {"host": socket.gethostname(), "pid": os.getpid()}

    def publish() -> None:
        stages = {name: str(folder.resolve()) for run in runs for name, folder in dict(run.opened).items()}
        work = [Work.of(tracker)._asdict() for tracker in at_work()]
        who = {"worker": SUPERVISOR if _supervises.is_set() else worker, **where}
        write_quickly(path, json.dumps({**who, "time": time.time(), "stages": stages, "work": work}))

    def send() -> None:
        storage.publish(path)

    with throughout(_EVERY_SECONDS, publish), every(_SEND_SECONDS, send):
        yield
    storage.remove(path)


_supervises: Final = threading.Event()


@contextlib.contextmanager
def supervising() -> Iterator[None]:
    """Publish meanwhile that this process only looks after others."""
    _supervises.set()
    try:
        yield
    finally:
        _supervises.clear()


def write_quickly(path: Path, text: str) -> None:
    """Write a file that is whole or as it was; after a power cut it may be neither."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8", errors="surrogateescape")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def processes(run: Path, *, elsewhere: bool = False) -> list[Process]:
    """The processes in a run directory, and what is left of those that were killed. Changes nothing.

    `elsewhere`: the directory is an outline of one whose locks cannot be seen; then the last word tells.
    """
    live = run / "live"
    paths = sorted({path.with_suffix("") for path in live.glob("*") if path.suffix in {".json", _ENDING}})
    return [process for path in paths if (process := _process(path, elsewhere))]


def _process(place: Path, elsewhere: bool) -> Process | None:
    note, word = (read_json(place.with_suffix(ending)) for ending in (".json", _ENDING))
    if not isinstance(note, dict) and not isinstance(word, dict):
        return None  # it has just left
    told: dict[str, Any] = {"worker": "", "host": "", "pid": 0, "time": 0.0, "stages": {}, "work": []}
    told |= {key: value for own in (note, word) if own for key, value in own.items() if key in told}
    alive = note is not None and _holds(place.with_suffix(".lock"))
    if note is not None and elsewhere:
        beat = place.with_suffix(".json").stat().st_mtime  # it is written again and again
        alive = None if time.time() - beat < _SILENT_SECONDS else False
    with contextlib.suppress(TypeError):  # written by another version
        told["work"] = tuple(Work(**work) for work in told["work"])
        return Process(alive=alive, **told)
    return None


def _holds(lock: Path) -> bool | None:
    """Whether a process holds a lock; None where the file system does not tell."""
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
