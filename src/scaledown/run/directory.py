"""The run directory: stages, what was read, who works in it, quarantine, manifest last."""

import contextlib
import hashlib
import json
import logging
import os
import socket
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from filelock import FileLock, Timeout

from scaledown.config.evaluate import SYSTEMS
from scaledown.config.shared import WHOLE, Part
from scaledown.errors import InputError, OutputError, RunDirectoryError
from scaledown.run.atomic import read_json, write_json
from scaledown.run.leases import Leases
from scaledown.run.storage import Storage

log = logging.getLogger("scaledown")

SCHEMA: Final = 2
STAGES: Final = (
    "synthetic",
    "queries",
    "passages",
    "vectors",
    "approximate",
    "candidates",
    "ranked",
    "answers",
    "second",
    "retried",
    "reviewed",
    "questions",
    "sentences",
    *SYSTEMS,
    *(f"{stage}_{system}" for stage in ("judged", "preferred") for system in SYSTEMS),
)
_OWN_NAMES: Final = {
    *STAGES,
    "removed",
    "index.json",
    "quarantine",
    "live",
    "locks",
    "manifest.json",
    "inputs.json",
    "plan.json",
    "engine.json",
    "report.html",
    "README.md",
}
_COMMON_NAMES: Final = {"manifest.json", "report.html", "README.md"}  # which alone are no run
ABSENT: Final = ".absent.json"
"""Ends the name of the file that says of a shard that it was given up."""
GIVEN_UP: Final = "-given-up"
"""Ends the name of the file in the quarantine that says why, for people."""


def fingerprint(settings: Mapping[str, Any]) -> str:
    """16 hex digits that change when any of `settings` does."""
    text = json.dumps(settings, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()[:16]


def stage_fingerprint(name: str, settings: Mapping[str, Any]) -> str:
    """The name of the folder that a stage with these settings has."""
    return fingerprint({"schema": SCHEMA, "stage": name, **settings})


class RunDirectory:
    """`<output>.work/`: stages, inputs seen, live processes, manifest."""

    def __init__(self, place: Path | Storage, part: Part = WHOLE, worker: str = "") -> None:
        self.storage = storage = Storage(place) if isinstance(place, Path) else place
        self.path = path = storage.root
        self.part = part
        self.opened: dict[str, Path] = {}
        """The folders of the stages that this process has opened, by their names."""
        worker = worker or f"{socket.gethostname()}-{os.getpid()}"
        self.leases = Leases(path / "locks", worker, storage)
        if path.exists() and not path.is_dir():
            raise RunDirectoryError(f"{path} is a file: choose another --work_dir")
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"cannot create the run directory {path} ({error.strerror})") from error
        names = {name for name in storage.entries() if not name.startswith(".")}  # .DS_Store, .nfs*, .*.tmp
        foreign = names - _OWN_NAMES or (names if names <= _COMMON_NAMES else set())
        if foreign:
            raise RunDirectoryError(
                f"{storage} holds other things ({', '.join(sorted(foreign)[:3])}): "
                "choose an empty or new --work_dir"
            )

    @property
    def quarantine(self) -> Path:
        """Rejected input, as JSON lines with reasons."""
        return self.path / "quarantine"

    @property
    def manifest(self) -> Path:
        """Everything about the finished run."""
        return self.path / "manifest.json"

    @property
    def report(self) -> Path:
        """The finished run to look at."""
        return self.path / "report.html"

    @property
    def card(self) -> Path:
        """The dataset card."""
        return self.path / "README.md"

    @contextlib.contextmanager
    def claim(self, request: str) -> Iterator[Path]:
        """Enter the directory as a live process; gives the path that its files in live/ begin with.

        Processes with the same settings (`request`) help each other; raises `RunDirectoryError` when a
        live one has other settings. A process that died, however it died, holds nothing.
        """
        live = self.path / "live"
        live.mkdir(exist_ok=True)
        name = f"{os.getpid()}-{uuid.uuid4().hex[:8]}"
        note, lock = live / f"{name}.json", live / f"{name}.lock"
        mine = FileLock(lock)
        doors = Leases(live, name, self.storage)
        with FileLock(live / "entrance.lock"), doors.hold("entrance", wait=True):
            doors.renew("entrance")  # who died of it does not matter
            others = [other for other in self.storage.glob(live, "*.json") if self._lives(other)]
            for told in map(self.storage.read_json, others):  # none: that process is just leaving
                if isinstance(told, dict) and told.get("request") != request:
                    raise RunDirectoryError(
                        f"{self.storage} is in use by a live run with other settings (process "
                        f"{told.get('pid')} on {told.get('host')}): wait for it, stop it, or choose "
                        "another --work_dir"
                    )
            if not others:
                self._begin()
            mine.acquire()
            write_json(note, {"request": request, "pid": os.getpid(), "host": socket.gethostname()})
            self.storage.publish(note)
        try:
            with self.storage.keeping(note):
                yield live / name
        finally:
            self.storage.remove(note)
            lock.unlink(missing_ok=True)
            mine.release()

    def _lives(self, note: Path) -> bool:
        """Whether the process that left a note lives; else forget it."""
        path = note.with_suffix(".lock")
        lock = FileLock(path, timeout=0)
        if path.exists():  # of this machine
            try:
                lock.acquire()
            except Timeout:
                return True
        elif self.storage.taken(note):
            return True
        self.storage.remove(note)
        path.unlink(missing_ok=True)
        lock.release()
        return False

    def _begin(self) -> None:
        """As the only process: forget what others left half written, and try again what they gave up.

        A part tries again only what it gave up itself.
        """
        for half_written in self.path.rglob(".*.tmp*"):
            half_written.unlink(missing_ok=True)
        self.leases.forget()
        for mark in self.storage.glob(self.path, f"*/*/*{ABSENT}"):
            told = self.storage.read_json(mark)
            number, count = told.get("part", (0, 0)) if isinstance(told, dict) else (0, 0)
            if count == self.part.count and number != self.part.number:
                continue
            shard, folder = mark.name.removesuffix(ABSENT), mark.parent
            for path in (folder / "done.json", folder / f"{shard}.arrow", mark):
                self.storage.remove(path)
        marks = {self._why(mark) for mark in self.storage.glob(self.path, f"*/*/*{ABSENT}")}
        for why in self.storage.glob(self.quarantine, f"*{GIVEN_UP}.jsonl"):
            if why not in marks:
                self.storage.remove(why)

    def _why(self, mark: Path) -> Path:
        """The file in the quarantine that says why a shard was given up, if it was so at first hand."""
        shard, folder = mark.name.removesuffix(ABSENT), mark.parent
        return self.quarantine / f"{folder.parent.name}-{folder.name}-{shard}{GIVEN_UP}.jsonl"

    def given_up(self, *, own: bool = False) -> int:
        """How many shards of the stages opened here are the death of each worker; `own`: of this part."""
        count = 0
        for folder in self.opened.values():
            self.storage.refresh(folder)
            for mark in self.storage.glob(folder, f"*{ABSENT}"):
                told = self.storage.read_json(mark)
                mine = isinstance(told, dict) and told.get("part") == [self.part.number, self.part.count]
                count += (mine or not own) and self.storage.exists(self._why(mark))
        return count

    def content_hash(self, path: Path, files: Sequence[Path] = ()) -> str:
        """SHA-256 over a file, or over a folder's `files`; remembered while size and time stay.

        Without `files` over all but what training leaves beside a model: hidden files and checkpoints.
        """
        content = read_json(self.path / "inputs.json")
        seen: dict[str, Any] = content if isinstance(content, dict) else {}
        if path.is_dir() and not files:
            inside = ((file.relative_to(path).as_posix(), file) for file in sorted(path.rglob("*")))
            files = [
                file for name, file in inside if file.is_file() and not name.startswith((".", "checkpoint-"))
            ]
        files = files or [path]
        parts = []
        changed = False
        for file in files:
            state = file.stat()
            key = str(file.resolve())
            known = seen.get(key)
            if not known or (known["size"], known["mtime_ns"]) != (state.st_size, state.st_mtime_ns):
                known = {"size": state.st_size, "mtime_ns": state.st_mtime_ns, "sha256": _sha256(file)}
                seen[key] = known
                changed = True
            name = file.relative_to(path).as_posix() if path.is_dir() else ""
            parts.append(f"{name}:{known['sha256']}")
        if changed:
            (self.path / "live").mkdir(exist_ok=True)
            with FileLock(self.path / "live" / "entrance.lock"):  # who enters clears what is half written
                write_json(self.path / "inputs.json", seen)
        return hashlib.sha256("\n".join(parts).encode(errors="surrogateescape")).hexdigest()


def _sha256(path: Path) -> str:
    if (size := path.stat().st_size) > 1 << 30:
        log.info("reading %s once, %.0f GB, to know it again", path, size / 1e9)
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
