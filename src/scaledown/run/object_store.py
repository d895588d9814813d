"""Folders of object stores, mirrored here as far as they are read or written.

An object appears under its name when it is whole. A file here is known to be that of the store by size and
time, as rsync does; what the store does not have counts as not there.
"""

import contextlib
import errno
import fnmatch
import functools
import hashlib
import itertools
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

from scaledown.errors import OutputError, ScaleDownError
from scaledown.run.atomic import atomic
from scaledown.run.hub import HubBuckets
from scaledown.run.periodic import every
from scaledown.run.storage import Storage
from scaledown.urls import detail, file_system, redacted, refused, state_of, status_of

log = logging.getLogger("scaledown")

Result = TypeVar("Result")

_PATIENCE_SECONDS: Final = 60.0
_LISTED_SECONDS: Final = 1.0  # waiting loops ask the server no more often
_BEAT_SECONDS: Final = 10.0
_DEAD_SECONDS: Final = 60.0
_TELLING: Final = (".json", ".jsonl", ".held", ".death", ".progress")
_SMALL_BYTES: Final = 1 << 24
_DEPTH: Final = 3  # of a run directory's files
_AT_ONCE: Final = 16
_OWN: Final = re.compile(r"-[0-9a-f]{8}\.")  # what `own` adds to a name
_SLOW_SECONDS: Final = 10.0  # of a question: it waited for its turn, as those of others may, too
# By the store's clock, the surest first: an mtime on the Hub is by the clock of who wrote.
_TIMES: Final = ("LastModified", "uploaded_at", "mtime", "updated", "last_modified", "created")


def mirrored(url: str, cache: Path) -> Storage:
    """The folder of an object store behind `url`, mirrored below `cache`."""
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
        """Whether the file here is this one."""
        with contextlib.suppress(FileNotFoundError):
            found = path.stat()
            return found.st_size == self.size and int(found.st_mtime) == int(self.time)
        return False


def _final(error: Exception) -> str:
    """What to tell of an error that asking again does not change; empty of others."""
    if refused(error):
        return "access is refused ({}); check the bucket and the keys in the environment"
    status = status_of(error)
    mistaken = isinstance(status, int) and 400 <= status < 500 and status not in {408, 429}
    mistaken |= isinstance(error, ValueError) or type(error).__name__ == "ParamValidationError"
    return "{}; check the URL" if mistaken else ""


class _Mirror(Storage):
    """A folder of an object store, as far as it was read or written here."""

    pauses = (0.5, 1.0, 2.0, 4.0)

    def __init__(self, url: str, cache: Path) -> None:
        digest = hashlib.sha256(redacted(url).encode(errors="surrogateescape")).hexdigest()[:16]
        super().__init__(cache / "runs" / digest)
        self._url = url
        self._on_hub = url.lower().startswith("hf:")
        self._name = uuid.uuid4().hex[:8]
        self._listings: dict[Path, tuple[float, dict[str, _Entry]]] = {}
        self._read: dict[Path, tuple[_Entry, Any]] = {}
        self._here: set[Path] = set()
        self._ahead: float | None = None  # the store's clock, against ours
        self._away = -_DEAD_SECONDS  # when it last was out of reach

    def __str__(self) -> str:
        return redacted(self._url)

    @functools.cached_property
    def _system(self) -> Any:
        return HubBuckets() if self._on_hub else file_system(self._url, str(self))

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

    # Asking

    def _ask(self, path: Path, question: Callable[[], Result]) -> Result:
        """Ask the store, for a minute while it is out of reach. Raises `OutputError`.

        `FileNotFoundError` and `FileExistsError` are answers, and come through.
        """
        pause, gone = 0.5, 0.0
        while True:
            asked = time.monotonic()
            try:
                answer = question()
            except (FileNotFoundError, FileExistsError, ScaleDownError):
                raise
            except Exception as error:
                if isinstance(error, OSError) and error.errno == errno.ENOSPC:  # of the mirror
                    raise
                shown, said = self.shown(path), detail(self._url, error)
                if advice := _final(error):
                    raise OutputError(f"{shown}: {advice.format(said)}") from None
                self._away = time.monotonic()
                if not gone:
                    log.warning("%s: the store cannot be reached (%s): trying again", self, said)
                gone = gone or self._away
                if self._away + pause > gone + _PATIENCE_SECONDS:
                    raise OutputError(
                        f"{shown}: the store cannot be reached ({said}); finished work is kept: run the same "
                        "command again when it is back"
                    ) from None
                time.sleep(pause)
                pause = min(2 * pause, 10.0)
            else:
                if time.monotonic() - asked > _SLOW_SECONDS:
                    self._away = time.monotonic()
                return answer

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
        """The objects in a folder, by their names, as they were at most a second ago."""
        asked, known = self._listings.get(folder, (-math.inf, {}))
        fresh = _LISTED_SECONDS * (10 if self._on_hub else 1)  # there questions are counted
        if (now := time.monotonic()) - asked >= fresh:
            infos = [info for info in self._list(folder) if info["type"] == "file"]
            known = {PurePosixPath(info["name"]).name: _Entry.of(info) for info in infos}
            self._listings[folder] = now, known
        return known

    def _entry(self, path: Path) -> _Entry | None:
        return self._listing(path.parent).get(path.name)

    def _info(self, path: Path) -> Mapping[str, Any] | None:
        """What the store says of an object now."""

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
        """All objects below a folder, by what follows its name."""

        def question() -> Mapping[str, Mapping[str, Any]]:
            self._system.invalidate_cache()
            found: Mapping[str, Mapping[str, Any]] = self._system.find(self._at(folder), detail=True)
            return found

        root = self._system._strip_protocol(self._at(folder)).rstrip("/") + "/"
        try:
            found = self._ask(folder, question)
        except FileNotFoundError:
            return []
        # Anyone may have put anything into a bucket: no name from there leads out of the mirror.
        names = {
            PurePosixPath(name.removeprefix(root)): name for name in sorted(found) if name.startswith(root)
        }
        inside = (name for name in names if ".." not in name.parts and not name.is_absolute())
        return [(name, _Entry.of(found[names[name]])) for name in inside]

    @contextlib.contextmanager
    def outline(self) -> Iterator[Path]:
        found = [(name, entry) for name, entry in self._below(self.root) if len(name.parts) <= _DEPTH]

        def content(name: PurePosixPath, entry: _Entry) -> bytes:
            told = name.suffix in _TELLING and not name.match("*.part.jsonl") and entry.size < _SMALL_BYTES
            with contextlib.suppress(FileNotFoundError):  # gone meanwhile
                return self._cat(self.root / name) if told else b""
            return b""

        with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(_AT_ONCE) as threads:
            contents = threads.map(content, *zip(*found, strict=True))
            for (name, entry), told in zip(found, contents, strict=True):
                path = Path(folder) / name
                with contextlib.suppress(OSError, ValueError):  # names that no folder here can have
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(told)
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

    # Sending and getting

    def _put(self, path: Path, send: Callable[[], Any]) -> None:
        try:
            self._ask(path, send)
        except FileNotFoundError:
            unseen = " and HF_TOKEN" if self._on_hub else ""  # a private one is missing for others
            raise OutputError(
                f"{self.shown(path)}: there is no such bucket: create it, or check the URL{unseen}"
            ) from None

    def publish(self, path: Path) -> None:
        for last in (False, False, True):
            size = path.stat().st_size
            self._put(path, lambda: self._system.put_file(str(path), self._at(path)))
            kept = self._note(path)
            if kept is None or kept.size >= size or self._on_hub:  # which tells of what was there before
                return
            lost = f"{self.shown(path)}: the store keeps {kept.size:,} bytes of {size:,}"
            if last:
                raise OutputError(
                    f"{lost}; finished work is kept: check the store, and run the same command again"
                )
            log.warning("%s: sending it again", lost)

    def _note(self, path: Path) -> _Entry | None:
        """Keep in mind what was just published, and what time it is there; gives it, if it is there."""
        entry = None
        if info := self._info(path):
            entry = _Entry.of(info)
            if not entry.time:
                raise OutputError(f"{self}: does not tell times; use s3://, gs:// or az://")
            self._ahead = entry.time - time.monotonic()
            self._listing(path.parent)[path.name] = entry
            self._here.add(path)
            with contextlib.suppress(FileNotFoundError):
                os.utime(path, (entry.time, entry.time))
        return entry

    def check_writable(self, output: Path, flag: str = "--output_file") -> None:
        output.parent.mkdir(parents=True, exist_ok=True)
        probe = output.with_name(f".{output.name}.{self._name}.probe")
        self._put(output, lambda: self._system.pipe_file(self._at(probe), b"probe"))
        self._note(probe)
        self._delete(probe)

    def fetch(self, path: Path, *, once: bool = False) -> bool:
        if once and path in self._here and path.exists():
            return False
        if (info := self._info(path)) is None:
            path.unlink(missing_ok=True)
            return False
        new = not _Entry.of(info).is_at(path)
        if new:
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                with atomic(path, room=_Entry.of(info).size) as temporary:
                    self._ask(path, lambda: self._get(path, temporary))
            except FileNotFoundError:  # removed since it was asked about
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
            raise OSError("it came in part, or was changed meanwhile")
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
        self._listings.pop(path.parent, None)

    # Who is at what. An object tells that its process lives by being written again and again; how long ago
    # that was is told by the store's clock, so that no clocks need agree.

    def taken(self, note: Path) -> bool:
        if (entry := self._entry(note)) is None:
            return False
        if self._is_ours(note):  # where no lock is on it: it is dead
            return False
        if self._recent(entry):
            return True
        now = self._info(note)  # another may have taken it since the folder was listed
        return now is not None and self._recent(_Entry.of(now))

    def _is_ours(self, note: Path) -> bool:
        """Whether a note there is that of this machine, but for what beats add."""
        with contextlib.suppress(FileNotFoundError):
            return note.read_bytes().rstrip() == self._cat(note).rstrip()
        return False

    def _recent(self, entry: _Entry) -> bool:
        if time.monotonic() - self._away < _DEAD_SECONDS:  # the network was away: others may live, too
            return True
        if self._ahead is None:
            self.check_writable(self.root / "clock")
        return time.monotonic() + (self._ahead or 0.0) - entry.time < _DEAD_SECONDS

    def take(self, note: Path) -> bool:
        content = note.read_bytes()

        def send() -> None:
            try:
                self._system.pipe_file(self._at(note), content, mode="create")
            except OSError as error:
                if error.errno != errno.EINVAL:  # "precondition failed", as s3fs says it of some servers
                    raise
            except (TypeError, NotImplementedError):  # no such mode: who wrote last has it
                self._system.pipe_file(self._at(note), content)

        with contextlib.suppress(FileExistsError):  # perhaps by an attempt of ours whose answer was lost
            self._put(note, send)
        self._listings.clear()  # what another finished before is seen
        try:
            return self._cat(note) == content
        except FileNotFoundError:
            return False

    def give_back(self, note: Path) -> None:
        if self._is_ours(note):
            self._delete(note)
        note.unlink(missing_ok=True)

    @contextlib.contextmanager
    def keeping(self, note: Path) -> Iterator[None]:
        beats = itertools.count()

        def beat() -> None:  # each is another object, should a store not tell a new time of an equal one
            self._system.pipe_file(self._at(note), note.read_bytes() + b" " * (next(beats) % 2 + 1))

        # Waits for one that is under way: it would bring back a note that was removed.
        with every(_BEAT_SECONDS, beat, patience=_DEAD_SECONDS):
            yield
