"""A run directory or an output in an object store (s3://, gs://, az://), by a mirror on this disk.

Files that this machine reads or writes are in the mirror, where they can be memory-mapped. An object appears
only when it is complete, so a shard is finished when the store lists it. A file of the mirror counts as a
copy of the object if size and time are equal, as with rsync. A store has no locks, and does not show which
processes are alive.
"""

import contextlib
import errno
import fnmatch
import functools
import hashlib
import json
import logging
import math
import os
import re
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path, PurePosixPath
from typing import Any, Final, NamedTuple, TypeVar

from scaledown.errors import OutputError, ScaleDownError, is_full_disk
from scaledown.run.atomic import atomic
from scaledown.run.storage import Storage
from scaledown.urls import detail, file_system, http_status, redacted, refused, state_of

log = logging.getLogger("scaledown")

Result = TypeVar("Result")

_PATIENCE_SECONDS: Final = 60.0
"""Seconds for which requests to a store that does not answer are repeated."""
_LISTED_SECONDS: Final = 1.0  # the most age of a listing; loops that wait ask the server no more often
_SMALL_BYTES: Final = 1 << 24
_DEPTH: Final = 3  # of a run directory's files
_OF_PROCESSES: Final = {"live", "locks"}  # folders of a run directory that are useful only on a disk
_THREADS: Final = 16
_OWN: Final = re.compile(r"-[0-9a-f]{8}\.")  # what `own` adds to a name
# Names of the time of writing, by the store's clock, in different file systems.
_TIMES: Final = ("LastModified", "mtime", "updated", "last_modified", "created")


def mirrored(url: str, cache: Path) -> Storage:
    """Return the folder of an object store, with its mirror on this disk.

    No request is sent before the first use.

    Args:
        url: The URL of the folder.
        cache: The folder of all mirrors; this one's name in it is a hash of the URL without its secrets.
    """
    return _Mirror(url.rstrip("/"), cache)


class _Entry(NamedTuple):
    """An object: its size in bytes, and when it was written, in seconds since 1970 by the store's clock."""

    size: int
    time: float

    @classmethod
    def of(cls, info: Mapping[str, Any]) -> "_Entry":
        found = next((info[name] for name in _TIMES if info.get(name)), 0.0)
        if isinstance(found, str):
            found = datetime.fromisoformat(found)
        return cls(int(info["size"]), found.timestamp() if isinstance(found, datetime) else float(found))

    def is_at(self, path: Path) -> bool:
        """Whether the file at `path` on this disk is a copy of the object."""
        with contextlib.suppress(FileNotFoundError):
            found = path.stat()
            return found.st_size == self.size and int(found.st_mtime) == int(self.time)
        return False


def _final(error: Exception) -> str:
    """Return the advice for an error that a retry cannot fix; empty for other errors."""
    if refused(error):
        return "access is refused ({}); check the bucket and the keys in the environment"
    status = http_status(error)
    mistaken = isinstance(status, int) and 400 <= status < 500 and status not in {408, 429}
    mistaken |= isinstance(error, ValueError) or type(error).__name__ == "ParamValidationError"
    return "{}; check the URL" if mistaken else ""


class _Mirror(Storage):
    """A folder of an object store; the mirror has the files that this machine has read or written."""

    in_bucket = True
    pauses = (0.5, 1.0, 2.0, 4.0)

    def __init__(self, url: str, cache: Path) -> None:
        digest = hashlib.sha256(redacted(url).encode(errors="surrogateescape")).hexdigest()[:16]
        super().__init__(cache / "runs" / digest)
        self._url = url
        self._name = uuid.uuid4().hex[:8]
        self._listings: dict[Path, tuple[float, dict[str, _Entry]]] = {}
        self._read: dict[Path, tuple[_Entry, Any]] = {}
        self._here: set[Path] = set()

    def __str__(self) -> str:
        return redacted(self._url)

    @functools.cached_property
    def _system(self) -> Any:
        return file_system(self._url, str(self))

    def _at(self, path: Path) -> str:
        return f"{self._url}/{path.relative_to(self.root).as_posix()}" if path != self.root else self._url

    def shown(self, path: Path) -> str:
        return redacted(self._at(path))

    def address(self, path: Path) -> str:
        return self.shown(path)

    def own(self, name: str) -> str:
        stem, dot, ending = name.partition(".")
        return f"{stem}-{self._name}{dot}{ending}"

    def logs(self, folder: Path, pattern: str) -> dict[Path, list[Path]]:
        found: dict[Path, list[Path]] = {}
        for path in sorted({*self.glob(folder, pattern), *folder.glob(pattern)}):
            found.setdefault(path.with_name(_OWN.sub(".", path.name, count=1)), []).append(path)
        return found

    def owned(self, path: Path) -> list[Path]:
        stem, _, ending = path.name.partition(".")
        return self.logs(path.parent, f"{stem}*.{ending}").get(path, [])

    # Requests

    def _ask(self, path: Path, question: Callable[[], Result]) -> Result:
        """Send a request, and repeat it for a minute while the store cannot be reached.

        Args:
            path: The file or folder of the request, for messages.
            question: Sends the request.

        Returns:
            The result of `question`.

        Raises:
            OutputError: The store refuses the request, or cannot be reached for a minute.
            FileNotFoundError: The store has no such object.
            FileExistsError: The object exists already.
        """
        pause, gone = 0.5, 0.0
        while True:
            try:
                return question()
            except (FileNotFoundError, FileExistsError, ScaleDownError):
                raise
            except Exception as error:
                if isinstance(error, OSError) and is_full_disk(error):  # the disk of the mirror
                    raise
                shown, reason = self.shown(path), detail(self._url, error)
                if advice := _final(error):
                    raise OutputError(f"{shown}: {advice.format(reason)}") from None
                now = time.monotonic()
                if not gone:
                    log.warning("%s: the store cannot be reached (%s): trying again", self, reason)
                gone = gone or now
                if now + pause > gone + _PATIENCE_SECONDS:
                    raise OutputError(
                        f"{shown}: the store cannot be reached ({reason}); finished work is kept: run the "
                        "same command again when it is back"
                    ) from None
                time.sleep(pause)
                pause = min(2 * pause, 10.0)

    def _list(self, folder: Path) -> list[Mapping[str, Any]]:
        def question() -> list[Mapping[str, Any]]:
            self._system.invalidate_cache()
            found: list[Mapping[str, Any]] = self._system.ls(self._at(folder), detail=True)
            return found

        try:
            return self._ask(folder, question)
        except FileNotFoundError:
            return []

    def _listing(self, folder: Path) -> dict[str, _Entry]:
        """List the objects in a folder by name. The listing may be `_LISTED_SECONDS` old."""
        asked, known = self._listings.get(folder, (-math.inf, {}))
        if (now := time.monotonic()) - asked >= _LISTED_SECONDS:
            infos = [info for info in self._list(folder) if info["type"] == "file"]
            known = {PurePosixPath(info["name"]).name: _Entry.of(info) for info in infos}
            self._listings[folder] = now, known
        return known

    def _entry(self, path: Path) -> _Entry | None:
        return self._listing(path.parent).get(path.name)

    def _info(self, path: Path) -> Mapping[str, Any] | None:
        """Return the store's current data about an object; None if there is no object."""

        def question() -> Mapping[str, Any]:
            self._system.invalidate_cache()
            found: Mapping[str, Any] = self._system.info(self._at(path))
            return found

        try:
            found = self._ask(path, question)
        except FileNotFoundError:
            return None
        return found if found["type"] == "file" else None

    def entries(self) -> list[str]:
        return [PurePosixPath(info["name"]).name for info in self._list(self.root)]

    def glob(self, folder: Path, pattern: str) -> list[Path]:
        if "/" not in pattern:
            return [folder / name for name in sorted(self._listing(folder)) if fnmatch.fnmatch(name, pattern)]
        depth = pattern.count("/") + 1
        inside = (name for name, _ in self._below(folder))
        return [folder / name for name in inside if len(name.parts) == depth and name.match(pattern)]

    def _below(self, folder: Path) -> list[tuple[PurePosixPath, _Entry]]:
        """List all objects below a folder, by their relative paths."""

        def question() -> Mapping[str, Mapping[str, Any]]:
            self._system.invalidate_cache()
            found: Mapping[str, Mapping[str, Any]] = self._system.find(self._at(folder), detail=True)
            return found

        root = self._system._strip_protocol(self._at(folder)).rstrip("/") + "/"
        try:
            found = self._ask(folder, question)
        except FileNotFoundError:
            return []
        # Others may write to the bucket: names that lead out of the mirror are left out.
        names = {
            PurePosixPath(name.removeprefix(root)): name for name in sorted(found) if name.startswith(root)
        }
        inside = (name for name in names if ".." not in name.parts and not name.is_absolute())
        return [(name, _Entry.of(found[names[name]])) for name in inside]

    @contextlib.contextmanager
    def outline(self) -> Iterator[Path]:
        found = [
            (name, entry)
            for name, entry in self._below(self.root)
            if len(name.parts) <= _DEPTH and name.parts[0] not in _OF_PROCESSES
        ]

        def content(name: PurePosixPath, entry: _Entry) -> bytes:
            small = name.suffix in {".json", ".jsonl"} and entry.size < _SMALL_BYTES
            with contextlib.suppress(FileNotFoundError):  # removed meanwhile
                return self._cat(self.root / name) if small and not name.match("*.part.jsonl") else b""
            return b""

        with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(_THREADS) as threads:
            contents = threads.map(content, *zip(*found, strict=True))
            for (name, entry), data in zip(found, contents, strict=True):
                path = Path(folder) / name
                with contextlib.suppress(OSError, ValueError):  # names that a disk does not allow
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(data)
                    os.utime(path, (entry.time, entry.time))
            yield Path(folder)

    def exists(self, path: Path) -> bool:
        return self._entry(path) is not None

    def refresh(self, folder: Path) -> None:
        self._listings.pop(folder, None)

    def size(self, path: Path) -> int:
        entry = self._entry(path)
        return entry.size if entry else 0

    def state(self, path: Path) -> str:
        info = self._info(path)
        return f"{info['size']} {state_of(info)}" if info else ""

    # Uploads and downloads

    def _put(self, path: Path, send: Callable[[], Any]) -> None:
        try:
            self._ask(path, send)
        except FileNotFoundError:
            raise OutputError(
                f"{self.shown(path)}: there is no such bucket: create it, or check the URL"
            ) from None

    def publish(self, path: Path, *, once: bool = False) -> None:
        size = path.stat().st_size  # before it is sent: a log may grow meanwhile
        try:
            self._put(path, lambda: self._send(path, once=once))
        except FileExistsError:  # another process was faster, or the response to our first attempt was lost
            if self._info(path) is not None:
                self.drop(path)
                self.refresh(path.parent)
                return
            self._put(path, lambda: self._send(path, once=False))  # the store refused it for another reason
        for last in (False, False, True):
            kept = self._note(path)
            if kept is None or kept.size >= size:
                return
            lost = f"{self.shown(path)}: the store keeps {kept.size:,} bytes of {size:,}"
            if last:
                raise OutputError(
                    f"{lost}; finished work is kept: check the store, and run the same command again"
                )
            log.warning("%s: sending it again", lost)
            size = path.stat().st_size
            self._put(path, lambda: self._send(path, once=False))

    def _send(self, path: Path, *, once: bool) -> None:
        if once:
            try:  # s3fs, gcsfs and adlfs send this as a condition of the write
                self._system.put_file(str(path), self._at(path), mode="create")
            except OSError as error:
                if error.errno == errno.EINVAL:  # s3fs, with some servers: the object exists
                    raise FileExistsError(self._at(path)) from None
                if error.errno != errno.ENOSYS:
                    raise
            except (TypeError, NotImplementedError):
                pass
            else:
                return
        self._system.put_file(str(path), self._at(path))  # the last write wins

    def _note(self, path: Path) -> _Entry | None:
        """Record that the file on this disk is a copy of the object.

        Returns the object; None if it is gone.
        """
        if (info := self._info(path)) is None:
            return None
        entry = _Entry.of(info)
        self._listing(path.parent)[path.name] = entry
        self._here.add(path)
        with contextlib.suppress(FileNotFoundError):
            os.utime(path, (entry.time, entry.time))
        return entry

    def check_writable(self, output: Path, flag: str = "--output_file") -> None:
        output.parent.mkdir(parents=True, exist_ok=True)
        probe = output.with_name(f".{output.name}.{self._name}.probe")
        self._put(output, lambda: self._system.pipe_file(self._at(probe), b"probe"))
        self._delete(probe)

    def fetch(self, path: Path, *, once: bool = False) -> bool:
        if once and path in self._here and path.exists():
            return False
        if (info := self._info(path)) is None:
            path.unlink(missing_ok=True)
            return False
        new = not _Entry.of(info).is_at(path)
        if new:
            try:
                with atomic(path, room=_Entry.of(info).size) as temporary:
                    self._ask(path, lambda: self._get(path, temporary))
            except FileNotFoundError:  # removed meanwhile
                path.unlink(missing_ok=True)
                return False
        self._here.add(path)
        return new

    def drop(self, path: Path) -> None:
        path.unlink(missing_ok=True)
        self._here.discard(path)

    def _get(self, path: Path, target: Path) -> None:
        entry = _Entry.of(self._info(path) or {"size": 0})
        self._system.get_file(self._at(path), str(target))
        if target.stat().st_size != entry.size:
            raise OSError("only a part arrived, or the object has changed meanwhile")
        os.utime(target, (entry.time, entry.time))

    def fetch_log(self, path: Path) -> None:
        info = self._info(path)
        if info and (not path.exists() or path.stat().st_size < info["size"]):
            self.fetch(path)

    def send_log(self, path: Path) -> None:
        with contextlib.suppress(FileNotFoundError):
            info = self._info(path)
            if path.stat().st_size > (info["size"] if info else 0):
                self.publish(path)

    def read_json(self, path: Path) -> Any:
        if (entry := self._entry(path)) is None:
            return None
        kept, content = self._read.get(path, (None, None))
        if kept != entry:
            content = None
            with contextlib.suppress(FileNotFoundError, ValueError, RecursionError):
                content = json.loads(self._cat(path).decode(errors="surrogateescape"))
            self._read[path] = entry, content
        return content

    def read(self, path: Path) -> bytes | None:
        try:
            return self._cat(path) if self.exists(path) else None
        except FileNotFoundError:
            return None

    def _cat(self, path: Path) -> bytes:
        content: bytes = self._ask(path, lambda: self._system.cat_file(self._at(path)))
        return content

    def remove(self, path: Path) -> None:
        self.drop(path)
        self._delete(path)

    def _delete(self, path: Path) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._ask(path, lambda: self._system.rm_file(self._at(path)))
        self.refresh(path.parent)
