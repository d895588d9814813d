"""What the processes of a run tell each other while they work: each one's word, in a file of its own.

A word lies in `live/` beside the lock that its process holds as long as it lives. It is never waited for on
the disk, and goes with a process that ends well; what a killed one leaves says how far the run had come.
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

from scaledown.errors import OutputError
from scaledown.run.atomic import read_json
from scaledown.run.directory import RunDirectory
from scaledown.run.periodic import every, throughout
from scaledown.run.progress import Tracker, at_work

SUPERVISOR: Final = "supervisor"
"""The worker's name of a process that only looks after others."""

_EVERY_SECONDS: Final = 1.0
_SEND_SECONDS: Final = 10.0  # where others see it only when it is sent
_SILENT_SECONDS: Final = 120.0  # after so long none is thought to live where no lock tells
_PATIENCE_SECONDS: Final = 600.0
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
    waiting: str = ""
    """For what it waits, if it does."""

    @classmethod
    def told(cls, content: Any) -> "Work | None":
        """As a word has it; None for what is none, or of another version."""
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
        """As the tracker shows it."""
        at = (tracker.at.start, tracker.at.stop) if tracker.at else None
        shown = (tracker.unit, tracker.done, tracker.total, tracker.guess, tracker.rate())
        name = tracker.stage.name if tracker.stage else tracker.name
        return cls(name, *shown, at, tracker.in_flight, tracker.waiting)


class Process(NamedTuple):
    """A process in a run directory: who and where it is, its last word and when that was."""

    worker: str
    host: str
    pid: int
    alive: bool | None
    """None where the file system does not say."""
    time: float
    run: str
    """The run directory, as it sees it."""
    stages: Mapping[str, str]
    """The folders of the stages it has opened, as it sees them."""
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
    where = {"host": socket.gethostname(), "pid": os.getpid(), "run": str(storage.root.resolve())}

    def publish() -> None:
        stages = {name: str(folder.resolve()) for run in runs for name, folder in dict(run.opened).items()}
        work = [Work.of(tracker)._asdict() for tracker in at_work()]
        who = {"worker": SUPERVISOR if _supervises.is_set() else worker, **where}
        write_quickly(path, json.dumps({**who, "time": time.time(), "stages": stages, "work": work}))

    def send() -> None:
        storage.publish(path)

    with throughout(_EVERY_SECONDS, publish), every(_SEND_SECONDS, send, patience=_SEND_SECONDS):
        yield
    with contextlib.suppress(OutputError):
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


def processes(run: Path, *, outlined: bool = False) -> list[Process]:
    """The processes in a run directory, and what is left of those that were killed. Changes nothing.

    Of one that is `outlined`, locks cannot be seen: there the last word tells, which is sent again and again.
    """
    live = run / "live"
    paths = sorted({path.with_suffix("") for path in live.glob("*") if path.suffix in {".json", _ENDING}})
    if not outlined:
        return [process for path in paths if (process := _process(path, _holds(path.with_suffix(".lock"))))]
    beats = {path: note.stat().st_mtime for path in paths if (note := path.with_suffix(".json")).exists()}
    # By the store's clock, and by this machine's with some patience: they need not agree.
    lately = max([*beats.values(), time.time() - _PATIENCE_SECONDS]) - _SILENT_SECONDS
    silent = {path for path in paths if beats.get(path, 0.0) < lately}
    return [process for path in paths if (process := _process(path, False if path in silent else None))]


_KINDS: Final = {
    **{"worker": str, "host": str, "pid": int, "run": str},
    **{"time": float, "stages": dict, "work": list},
}


def _process(place: Path, alive: bool | None) -> Process | None:
    note, word = (read_json(place.with_suffix(ending)) for ending in (".json", _ENDING))
    if not isinstance(note, dict) and not isinstance(word, dict):
        return None  # it has just left, or never was
    told: dict[str, Any] = {name: kind() for name, kind in _KINDS.items()}
    for own in (note, word):
        if isinstance(own, dict):
            told |= {name: own[name] for name, kind in _KINDS.items() if type(own.get(name)) is kind}
    told["time"] = finite(told["time"])
    told["work"] = tuple(work for content in told["work"] if (work := Work.told(content)))
    told["stages"] = {name: path for name, path in told["stages"].items() if isinstance(path, str)}
    return Process(alive=alive if note is not None else False, **told)


def finite(seconds: float) -> float:
    """Seconds as told. Raises `ValueError` for what is no such number: anybody may have written it."""
    if not math.isfinite(seconds):
        raise ValueError(f"{seconds} seconds")
    return seconds


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
