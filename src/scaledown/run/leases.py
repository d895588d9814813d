"""Leases: at most one process makes a shard at a time. A note shows which process, and since when.

A lease is a locked file. The operating system releases the lock when the process ends, however it ends, so no
timeout is needed. Beside the lock is a note about its holder. A note without a lock is from a dead process;
the next holder turns it into a record of the death. So deaths are counted, and a shard that repeatedly ends
its worker is given up. Leases work between processes that share a disk; with an object store, between
processes of one machine, which share its mirror.
"""

import contextlib
import hashlib
import logging
import os
import socket
import time
from collections.abc import Callable, Collection, Iterator
from math import isfinite
from pathlib import Path
from typing import Any, Final, NamedTuple

from filelock import FileLock, Timeout

from scaledown.errors import ScaleDownError
from scaledown.run.atomic import read_json, write_json

log = logging.getLogger("scaledown")

SHARD_TRIES: Final = 3
"""Number of deaths of workers after which a shard is given up."""

_SHARD_DIGITS: Final = 6  # of a shard's number

_LOCK_WAIT_SECONDS: Final = 0.1
_DEATHS: Final = "deaths"
"""The folder with a file for each death; the file has the cause if the shard caused the death."""


class Held(NamedTuple):
    """A lease that a process holds, or held when it died."""

    name: str
    """The name of the lease."""
    worker: str
    """The name of its holder."""
    host: str
    """The holder's machine."""
    pid: int
    """The holder's number on this machine."""
    since: float
    """When it was taken or last renewed, in seconds since 1970."""

    @property
    def numbered(self) -> bool:
        """Whether it is for one shard or several shards, not for a whole stage."""
        return _numbered(self.name)

    @property
    def shards(self) -> int:
        """Number of its shards."""
        first, last = self.name.split("-")[-2:]
        return int(last) - int(first) if len(first) == len(last) == _SHARD_DIGITS and first.isdecimal() else 1


def _numbered(name: str) -> bool:
    _, dash, last = name.rpartition("-")
    return bool(dash) and last.isdecimal()


def _held(content: Any) -> Held | None:
    known = isinstance(content, dict) and content.keys() == set(Held._fields)
    held = Held(**content) if known else None
    valid = held and [type(value) for value in held] == [str, str, str, int, float] and isfinite(held.since)
    return held if valid else None


class Leases:
    """The leases of a run directory, used by one of its processes.

    Args:
        folder: The folder of the locks.
        worker: The name of this process in its notes.
    """

    def __init__(self, folder: Path, worker: str) -> None:
        self._folder = folder
        self._worker = worker

    @contextlib.contextmanager
    def hold(
        self, name: str, *, wait: bool = False, check: Callable[[], None] = lambda: None
    ) -> Iterator[bool]:
        """Hold a lease while the block runs.

        Args:
            name: The name of the lease.
            wait: Wait while another process holds it.
            check: Called while waiting; it may raise an error to stop waiting.

        Yields:
            Whether this process holds it.
        """
        self._folder.mkdir(exist_ok=True)
        lock = FileLock(self._folder / name)
        if not self._take(lock, name):
            if not wait:
                yield False
                return
            log.info("%s: waiting for another process", name.partition("-")[0])
            while not self._take(lock, name):
                check()
                time.sleep(_LOCK_WAIT_SECONDS)
        note = self._note(name)
        try:
            try:
                yield True
            except (KeyboardInterrupt, ScaleDownError):
                note.unlink(missing_ok=True)
                raise  # after any other error the note stays, and counts as a death at this work
            note.unlink(missing_ok=True)
        finally:
            lock.release()

    def _take(self, lock: FileLock, name: str) -> bool:
        """Take the lock and leave a note, unless another process holds the lock."""
        try:
            lock.acquire(timeout=0)
        except Timeout:
            return False
        self._bury(name, "it was killed")
        self._write(name)
        return True

    def renew(self, name: str) -> None:
        """Record progress for the lease `name`, which this process holds.

        For the lease of a whole stage this also clears the deaths so far.
        """
        self._write(name)
        if not _numbered(name):
            for path in (self._folder / _DEATHS).glob(f"{name}.*"):
                path.unlink(missing_ok=True)

    def _write(self, name: str) -> None:
        held = Held(name, self._worker, socket.gethostname(), os.getpid(), time.time())
        write_json(self._note(name), held._asdict())

    def held(self, worker: str = "") -> list[Held]:
        """List the leases of all workers, or of one worker; the worker may be dead.

        Args:
            worker: The name of the worker; empty for all.
        """
        found = []
        for path in sorted(self._folder.glob("*.held")):
            held = _held(read_json(path))
            if held and path == self._note(held.name) and worker in {"", held.worker}:
                found.append(held)
        return found

    def died(self, worker: str, reason: str) -> list[str]:
        """Record the death of a worker and its cause, which frees its leases.

        Args:
            worker: The name of the worker.
            reason: The cause, for messages.

        Returns:
            The names of the leases that it held, those for whole stages first.
        """
        names = []
        for held in sorted(self.held(worker), key=lambda held: held.numbered):
            lock = FileLock(self._folder / held.name)
            with (
                contextlib.suppress(Timeout),
                lock.acquire(timeout=0),
            ):  # otherwise another worker has taken it
                self._bury(held.name, reason, worker)
            names.append(held.name)
        return names

    def stopped(self, workers: Collection[str]) -> None:
        """Free the leases of workers that were killed on purpose: no shard is the cause of that."""
        for held in self.held():
            if held.worker not in workers:
                continue
            with contextlib.suppress(Timeout), FileLock(self._folder / held.name).acquire(timeout=1):
                if held in self.held(held.worker):  # otherwise another worker has taken it
                    self._note(held.name).unlink(missing_ok=True)

    def _bury(self, name: str, reason: str, worker: str = "") -> None:
        """Turn the note of a dead process into a record of its death. The caller holds the lock.

        If the process also held a lease for a shard, the death is attributed to that shard and not to `name`.
        If `worker` is given, the note must be from this worker.
        """
        note = self._note(name)
        if not note.exists():
            return
        held = _held(read_json(note))
        if worker and not (held and held.worker == worker):
            return
        blamed = held and (held.numbered or not any(own.numbered for own in self.held(held.worker)))
        # The file name has a hash of the note: if this process dies before it removes the note, the next one
        # writes the same file, and the death still counts once.
        death = self._folder / _DEATHS / f"{name}.{hashlib.sha256(note.read_bytes()).hexdigest()[:16]}.death"
        death.parent.mkdir(exist_ok=True)
        write_json(death, {"time": time.time(), "of": reason if blamed else None})
        note.unlink()

    def deaths(self, name: str) -> list[str]:
        """Return the causes of the deaths of workers that held a lease in this run.

        Args:
            name: The name of the lease; `*` matches any text.

        Returns:
            The causes, by time. Deaths attributed to another lease are left out.
        """
        found = map(read_json, (self._folder / _DEATHS).glob(f"{name}.*"))
        deaths = [(death.get("time"), death.get("of")) for death in found if isinstance(death, dict)]
        known = [(at, cause) for at, cause in deaths if isinstance(at, float) and isinstance(cause, str)]
        return [cause for _, cause in sorted(known)]

    def forget(self) -> None:
        """Remove all notes and deaths of earlier processes."""
        for folder, pattern in ((self._folder, "*.held"), (self._folder / _DEATHS, "*")):
            for path in folder.glob(pattern):
                path.unlink(missing_ok=True)

    def _note(self, name: str) -> Path:
        return self._folder / f"{name}.held"
