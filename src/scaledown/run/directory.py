"""The run directory: stages, hashes of inputs, live processes, quarantine, and the final manifest."""

import contextlib
import hashlib
import json
import logging
import os
import re
import socket
import uuid
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from filelock import FileLock, Timeout

from scaledown.config.evaluate import SYSTEMS
from scaledown.config.shared import WHOLE, QueryPart
from scaledown.devices.choice import dtype_to_run, is_slow_in_bfloat16
from scaledown.errors import InputError, OutputError, RunDirectoryError, one_line
from scaledown.run.atomic import read_json, write_json
from scaledown.run.leases import Leases
from scaledown.run.storage import Storage

log = logging.getLogger("scaledown")

RUN_LAYOUT: Final = 2
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
    *(f"dtype-{kind}.json" for kind in ("cpu", "cuda", "mps")),
    "report.html",
    "README.md",
}
_COMMON_NAMES: Final = {"manifest.json", "report.html", "README.md"}  # these alone are not a run
ABSENT: Final = ".absent.json"
"""Suffix of the file that marks a shard as given up."""
GIVEN_UP: Final = "-given-up"
"""Suffix of the file in the quarantine that has the reason."""
_START: Final = ".start"
"""Suffix of the note that a process leaves in a bucket while it works."""


FINGERPRINT: Final = re.compile(r"[0-9a-f]{16}")
"""The result of `fingerprint`."""


def fingerprint(settings: Mapping[str, Any]) -> str:
    """Compute the fingerprint of settings.

    Args:
        settings: JSON values; any other value counts as its text. The order of names does not matter.

    Returns:
        16 hex digits, of a SHA-256.
    """
    text = json.dumps(settings, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()[:16]


def stage_fingerprint(name: str, settings: Mapping[str, Any]) -> str:
    """Return the name of the folder of a stage with these settings.

    Args:
        name: The stage's name, one of `STAGES`.
        settings: Everything that its shards depend on.

    Returns:
        16 hex digits. They also depend on `RUN_LAYOUT`, the version of the shards' form.
    """
    return fingerprint({"schema": RUN_LAYOUT, "stage": name, **settings})


class RunDirectory:
    """`<output>.work/`: stages, hashes of inputs, live processes, manifest.

    Args:
        place: The folder, or a storage.
        part: The part of the queries that this process makes.
        worker: The name of this process if another process started it as one of several workers.

    Raises:
        RunDirectoryError: The folder holds something else.
        OutputError: The folder cannot be created.
    """

    def __init__(self, place: Path | Storage, part: QueryPart = WHOLE, worker: str = "") -> None:
        self.storage = storage = Storage(place) if isinstance(place, Path) else place
        self.path = path = storage.root
        self.part = part
        self.opened: dict[str, Path] = {}
        """The folders of the stages that this process has opened, by name."""
        self._is_worker = bool(worker)
        self.leases = Leases(path / "locks", worker or f"{socket.gethostname()}-{os.getpid()}")
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
        """The folder of rejected input, as JSON lines with reasons."""
        return self.path / "quarantine"

    @property
    def manifest(self) -> Path:
        """The record of the finished run."""
        return self.path / "manifest.json"

    @property
    def report(self) -> Path:
        """The page about the finished run."""
        return self.path / "report.html"

    @property
    def card(self) -> Path:
        """The dataset card."""
        return self.path / "README.md"

    @contextlib.contextmanager
    def claim(self, request: str, *, finished: bool = False) -> Iterator[Path]:
        """Register this process as a live process of the directory while the block runs.

        Processes with the same settings share the work. Each holds a lock, which shows other processes on the
        same disk that it is alive. In a bucket there are no locks between machines: a process leaves a note
        there, and warns about the notes of others.

        Args:
            request: A fingerprint of the settings.
            finished: Nothing is left to make here, so other processes do not matter.

        Yields:
            The path of this process' files in live/, without suffix.

        Raises:
            RunDirectoryError: A live process has other settings.
        """
        live = self.path / "live"
        live.mkdir(exist_ok=True)
        name = f"{os.getpid()}-{uuid.uuid4().hex[:8]}"
        note, lock = live / f"{name}.json", live / f"{name}.lock"
        mine = FileLock(lock)
        who = {"request": request, "pid": os.getpid(), "host": socket.gethostname()}
        with FileLock(live / "entrance.lock"):
            others = [other for other in sorted(live.glob("*.json")) if _lives(other)]
            for other in map(read_json, others):  # None: that process is about to end
                if isinstance(other, dict) and other.get("request") != request:
                    raise RunDirectoryError(
                        f"{self.storage} is in use by a live run with other settings (process "
                        f"{other.get('pid')} on {other.get('host')}): wait for it, stop it, or choose "
                        "another --work_dir"
                    )
            if not others:
                self._begin()
            mine.acquire()
            write_json(note, who)
        alone = not others and not self._is_worker and not finished
        start = self._announce(who) if self.storage.in_bucket and alone else None
        try:
            yield live / name
        finally:
            note.unlink(missing_ok=True)
            lock.unlink(missing_ok=True)
            mine.release()
        with contextlib.suppress(OutputError):  # the work is done
            if start and self._is_ours(start):  # after an error the note stays, to warn the next process
                self.storage.remove(start)

    def _announce(self, who: Mapping[str, Any]) -> Path:
        """Warn about other processes that may work in this bucket, and leave a note about this one."""
        start = self.path / "live" / f"{self.part.number}-of-{self.part.count}{_START}"
        for path in self.storage.glob(start.parent, f"*{_START}"):
            other = self.storage.read_json(path)
            if not isinstance(other, dict) or self._is_ours(path):
                continue
            match other.get("part"):
                case [number, self.part.count] if number != self.part.number:
                    if other.get("request") != who["request"]:  # otherwise it is expected
                        log.warning(
                            "%s: part %s/%s (process %s on %s) has other settings, models or inputs, so this "
                            "run stays incomplete: give all parts the same command and the same models. If "
                            "that part has ended, ignore this.",
                            *(self.storage, number, self.part.count, other.get("pid")),
                            one_line(str(other.get("host")), 80),
                        )
                    continue
            log.warning(
                "%s: another process may be at work (process %s on %s, since %s)%s. A bucket does not show "
                "whether it still is. If so, both make the same shards: stop one, or give each its --shard. "
                "If not, ignore this.",
                *(self.storage, other.get("pid"), one_line(str(other.get("host")), 80)),
                one_line(str(other.get("since")), 40),
                "" if other.get("request") == who["request"] else ", with other settings",
            )
        since = datetime.now(UTC).isoformat(timespec="seconds")
        write_json(start, {**who, "part": [self.part.number, self.part.count], "since": since})
        self.storage.publish(start)
        return start

    def _is_ours(self, note: Path) -> bool:
        """Whether a process on this machine left a note in the bucket."""
        return note.exists() and self.storage.read(note) == note.read_bytes()

    def _begin(self) -> None:
        """As the only live process, remove incomplete files of earlier ones, and retry shards they gave up.

        A part retries only the shards that it gave up itself. A worker retries none: the process that started
        it does so.
        """
        for half_written in self.path.rglob(".*.tmp*"):
            half_written.unlink(missing_ok=True)
        self.leases.forget()
        if self._is_worker:
            return
        for mark in self.storage.glob(self.path, f"*/*/*{ABSENT}"):
            content = self.storage.read_json(mark)
            number, count = content.get("part", (0, 0)) if isinstance(content, dict) else (0, 0)
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
        """Return the path in the quarantine for the reason why a shard was given up.

        The file exists if this shard ended its workers, and not only a shard that it is made from.
        """
        shard, folder = mark.name.removesuffix(ABSENT), mark.parent
        return self.quarantine / f"{folder.parent.name}-{folder.name}-{shard}{GIVEN_UP}.jsonl"

    def given_up(self, *, own: bool = False) -> int:
        """Count the shards that were given up in the stages opened here.

        A shard that is missing only because one of its sources was given up does not count.

        Args:
            own: Count only the shards that this part gave up.

        Returns:
            The number of shards.
        """
        count = 0
        for folder in self.opened.values():
            self.storage.refresh(folder)
            for mark in self.storage.glob(folder, f"*{ABSENT}"):
                content = self.storage.read_json(mark)
                part = content.get("part") if isinstance(content, dict) else None
                mine = part == [self.part.number, self.part.count]
                count += (mine or not own) and self.storage.exists(self._why(mark))
        return count

    def dtype(self, asked: str, device: str) -> str:
        """Return the dtype in which all processes that work here, on any machine, run models.

        Shards of two dtypes do not belong together. So the first process decides for each kind of device what
        `auto` means, and later ones keep it, though their processor might choose another.

        Args:
            asked: The value of `--dtype`.
            device: cpu, cuda, cuda:N or mps.

        Returns:
            `asked`, or what `auto` means here.
        """
        if asked != "auto":
            return asked
        path = self.path / f"dtype-{device.partition(':')[0]}.json"
        (self.path / "live").mkdir(exist_ok=True)
        with FileLock(self.path / "live" / "entrance.lock"):
            kept = self.storage.read_json(path)
            if not isinstance(kept, str):
                kept = str(dtype_to_run(asked, device)).removeprefix("torch.")
                write_json(path, kept)
                self.storage.publish(path, once=True)
                in_bucket = self.storage.read_json(path)  # perhaps that of another machine
                kept = in_bucket if isinstance(in_bucket, str) else kept
        if kept == "bfloat16" and is_slow_in_bfloat16(device):
            log.warning(
                "%s: bfloat16 was chosen where it is fast. Here it is very slow: --dtype float32 is faster, "
                "but makes the results of models again",
                self.storage,
            )
        return kept

    def content_hash(self, path: Path, files: Sequence[Path] = ()) -> str:
        """Compute the SHA-256 of a file or a folder. It is cached until size or time of a file changes.

        Args:
            path: The file or the folder.
            files: The files of the folder to hash. Without it, all files except hidden ones and checkpoints,
                which training leaves beside a model.

        Returns:
            64 hex digits.

        Raises:
            InputError: A file cannot be read.
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
            with FileLock(self.path / "live" / "entrance.lock"):  # `_begin` removes half-written files
                write_json(self.path / "inputs.json", seen)
        return hashlib.sha256("\n".join(parts).encode(errors="surrogateescape")).hexdigest()


def _lives(note: Path) -> bool:
    """Whether the process that left a note in live/ is alive. The files of a dead process are removed."""
    path = note.with_suffix(".lock")
    lock = FileLock(path, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        return True
    note.unlink(missing_ok=True)
    path.unlink(missing_ok=True)
    lock.release()
    return False


def _sha256(path: Path) -> str:
    if (size := path.stat().st_size) > 1 << 30:
        log.info("hashing %s, %.0f GB, once", path, size / 1e9)
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
