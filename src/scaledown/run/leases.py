"""Who is at what: one process at a time makes a shard, and all can see which, and since when.

A lease is a locked file, which ends with its process, however that ends. What a dead process held is beside
it, for whoever supervises: work that ends its worker again and again is given up. In an object store, where
nothing can be locked, that note is the lease between machines: its holder is dead when it is not renewed.
"""

import contextlib
import hashlib
import json
import logging
import os
import socket
import time
from collections.abc import Callable, Iterator
from math import isfinite
from pathlib import Path
from typing import Any, Final, NamedTuple

from filelock import FileLock, Timeout

from scaledown.errors import ScaleDownError
from scaledown.run.atomic import write_json
from scaledown.run.storage import Storage

log = logging.getLogger("scaledown")

TRIES: Final = 3
"""So many workers may die of a shard; then it is given up."""

_DIGITS: Final = 6  # of a shard's number

_WAIT_SECONDS: Final = 0.1
_DEATHS: Final = "deaths"
"""The folder with a file about each death, which says of what, if of this."""


class Held(NamedTuple):
    """What a process is at, and since when: seconds since 1970."""

    name: str
    worker: str
    host: str
    pid: int
    since: float

    @property
    def numbered(self) -> bool:
        """Whether it is a shard, or several, and not all of a stage."""
        return _numbered(self.name)

    @property
    def shards(self) -> int:
        """How many shards are made together."""
        first, last = self.name.split("-")[-2:]
        return int(last) - int(first) if len(first) == len(last) == _DIGITS and first.isdecimal() else 1


def _numbered(name: str) -> bool:
    _, dash, last = name.rpartition("-")
    return bool(dash) and last.isdecimal()


def _held(content: Any) -> Held | None:
    known = isinstance(content, dict) and content.keys() == set(Held._fields)
    held = Held(**content) if known else None
    sound = held and [type(value) for value in held] == [str, str, str, int, float] and isfinite(held.since)
    return held if sound else None


def _parsed(note: bytes) -> Held | None:
    with contextlib.suppress(ValueError, RecursionError):
        return _held(json.loads(note))
    return None


class Leases:
    """The leases of a run directory, as one of its processes sees them."""

    def __init__(self, folder: Path, worker: str, storage: Storage | None = None) -> None:
        self._folder = folder
        self._worker = worker
        self._storage = storage or Storage(folder)

    @contextlib.contextmanager
    def hold(
        self, name: str, *, wait: bool = False, check: Callable[[], None] = lambda: None
    ) -> Iterator[bool]:
        """Hold `name` against other processes; gives False when another holds it. Ends with the process.

        With `wait` until it is free; `check` is called meanwhile and may raise.
        """
        self._folder.mkdir(exist_ok=True)
        lock = FileLock(self._folder / name)
        if not self._take(lock, name):
            if not wait:
                yield False
                return
            log.info("%s: waiting for the process that is at it", name.partition("-")[0])
            while not self._take(lock, name):
                check()
                time.sleep(_WAIT_SECONDS)
        note = self._note(name)
        try:
            try:
                with self._storage.keeping(note):
                    yield True
            except (KeyboardInterrupt, ScaleDownError):
                self._storage.give_back(note)
                raise  # and for whatever else went wrong the work may be to blame
            self._storage.give_back(note)
        finally:
            lock.release()

    def _take(self, lock: FileLock, name: str) -> bool:
        """Take the lock and leave a note, unless another process here or elsewhere is at it."""
        try:
            lock.acquire(timeout=0)
        except Timeout:
            return False
        note = self._note(name)
        if not self._storage.taken(note):
            left = self._storage.read(note)
            # Asked again: if it is dead now, what was read is its own, and not of one who was quicker.
            if not self._storage.taken(note) and self._bury(name, left, "it was killed"):
                self._write(name)
                if self._storage.take(note):
                    return True
                note.unlink()
        lock.release()
        return False

    def renew(self, name: str) -> None:
        """Say that work on `name`, which this process holds, gets on.

        Of all of a stage, that clears it of earlier deaths.
        """
        self._write(name)
        self._storage.publish(self._note(name))
        if not _numbered(name):
            for path in self._storage.glob(self._folder / _DEATHS, f"{name}.*"):
                self._storage.remove(path)

    def _write(self, name: str) -> None:
        held = Held(name, self._worker, socket.gethostname(), os.getpid(), time.time())
        write_json(self._note(name), held._asdict())

    def held(self, worker: str = "") -> list[Held]:
        """What is being made, by all or by one worker, which may have died of it."""
        found = []
        for path in self._storage.glob(self._folder, "*.held"):
            held = _held(self._storage.read_json(path))
            if held and path == self._note(held.name) and worker in {"", held.worker}:
                found.append(held)
        return found

    def died(self, worker: str, reason: str) -> list[str]:
        """Say that a worker is dead, and of what; gives what it was at, for the next to take."""
        names = []
        for held in sorted(self.held(worker), key=lambda held: held.numbered):
            lock = FileLock(self._folder / held.name)
            with contextlib.suppress(Timeout), lock.acquire(timeout=0):  # else another has taken it
                left = self._storage.read(self._note(held.name))
                if left and (found := _parsed(left)) and found.worker == worker:
                    self._bury(held.name, left, reason)
            names.append(held.name)
        return names

    def _bury(self, name: str, left: bytes | None, reason: str) -> bool:
        """Remove what a dead process `left` as its note, and count its death once, whoever else finds it.

        One that was at a shard, too, died of that. Gives False where another came before.
        """
        if left is None:
            return True
        held = _parsed(left)
        blamed = held and (held.numbered or not any(own.numbered for own in self.held(held.worker)))
        told: dict[str, Any] = {"time": time.time(), "of": reason if blamed else None}
        sign = left
        while True:  # whoever writes down the death first removes the note; should it die, too, the next
            death = self._folder / _DEATHS / f"{name}.{hashlib.sha256(sign).hexdigest()[:16]}.death"
            if self._storage.taken(death):
                return False
            death.parent.mkdir(parents=True, exist_ok=True)
            write_json(death, told)
            if self._storage.take(death):
                break
            death.unlink()
            earlier = self._storage.read(death)
            if earlier is None or self._storage.taken(death):
                return False
            sign += earlier
            told["of"] = None  # which is written down already
        if self._storage.read(self._note(name)) != left:
            return False
        self._storage.remove(self._note(name))
        return True

    def deaths(self, name: str) -> list[str]:
        """What the workers died of, one after the other, that were at `name` (a pattern) in this run."""
        paths = self._storage.glob(self._folder / _DEATHS, f"{name}.*")
        found = [death for path in paths if isinstance(death := self._storage.read_json(path), dict)]
        told = [(death.get("time"), death.get("of")) for death in found]
        return [
            of
            for _, of in sorted((at, of) for at, of in told if isinstance(at, float) and isinstance(of, str))
        ]

    def forget(self) -> None:
        """Begin anew: what earlier processes held and died of counts no more."""
        for folder, pattern in ((self._folder, "*.held"), (self._folder / _DEATHS, "*")):
            for path in self._storage.glob(folder, pattern):
                self._storage.remove(path)

    def _note(self, name: str) -> Path:
        return self._folder / f"{name}.held"
