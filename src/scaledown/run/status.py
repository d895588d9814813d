"""The status of a run, read from its directory at any time, also while it is running. Changes nothing there.

The rows of a stage are those in complete shards, plus those that live processes have done of incomplete
shards. The work of a dead process on an incomplete shard does not count. In an object store live processes
are not known: there only complete shards count.
"""

import contextlib
import functools
import json
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Final, NamedTuple

from scaledown.errors import InputError, one_line
from scaledown.run.atomic import read_json
from scaledown.run.directory import ABSENT, STAGES, stage_fingerprint
from scaledown.run.heartbeat import Process, Work, finite, processes
from scaledown.run.leases import Held, Leases
from scaledown.run.locations import storage_at
from scaledown.urls import redacted

# Stages that are not made shard by shard from another stage. For other stages see `_source`.
_OWN_SHARDS: Final = ("synthetic", "queries", "passages", "approximate", "questions")
_UNITS: Final = {"synthetic": "questions", "approximate": "passages"}


class StageStatus(NamedTuple):
    """The status of a stage. Rows are queries or passages, see `unit`; None is not known."""

    name: str
    """The stage's name, one of `STAGES`."""
    fingerprint: str
    """The name of its folder."""
    unit: str
    """What a row is, in the plural."""
    shards: int
    """Complete shards."""
    shards_planned: int | None
    """All shards that it will have."""
    rows: int
    """Rows in complete shards."""
    rows_in_progress: int
    """Rows of incomplete shards that live processes have done."""
    rows_planned: int | None
    """All rows that it will have."""
    estimated: bool
    """Whether `rows_planned` is an estimate."""
    seconds: float
    """The time that its complete shards took, summed over processes."""
    rate: float
    """Rows per second of all processes that work on it; without any, the mean of its complete shards."""
    seconds_left: float | None
    """An estimate, while processes work on it."""
    workers: int
    """Processes that work on it."""
    deaths: int
    """Deaths of workers at it in this run."""
    given_up: int
    """Shards that were given up in this run."""
    quarantined: int
    """Rows left out with a reason."""
    finished: bool
    """Whether it has all its shards."""
    waiting: str = ""
    """What one of its processes waits for; empty if none waits."""

    @property
    def done(self) -> int:
        """Rows in complete and incomplete shards."""
        return self.rows + self.rows_in_progress


class WorkerStatus(NamedTuple):
    """A process in the run directory."""

    worker: str
    """Its name if it is one of several workers, `supervisor`, or empty."""
    host: str
    """The name of its machine."""
    pid: int
    """Its number on this machine."""
    at: str
    """The leases that it holds: stage and shard, separated by commas. Empty if it holds none."""
    seconds_at: float | None
    """Seconds since it took or renewed the oldest of them; None if it holds none."""
    silent_seconds: float | None
    """Seconds since its progress was last written."""
    alive: bool | None
    """None if the file system has no locks; `silent_seconds` is then the only hint."""


class Status(NamedTuple):
    """The status of a run."""

    path: str
    """The run directory, as a path or a URL."""
    finished: bool
    """Whether all of its stages are finished."""
    finished_time: float | None
    """Seconds since 1970."""
    output: str
    """The path of the output; empty while the run is unfinished."""
    examples: int | None
    """Number of records in the output; None while the run is unfinished."""
    stages: tuple[StageStatus, ...]
    """Its stages, in order."""
    workers: tuple[WorkerStatus, ...]
    """Its live processes."""

    def as_json(self) -> dict[str, Any]:
        """Return it as JSON values."""
        stages, workers = ([row._asdict() for row in rows] for rows in (self.stages, self.workers))
        return {**self._asdict(), "stages": stages, "workers": workers}


def status_at(name: str) -> Status:
    """Return the current status of a run.

    Args:
        name: The run directory, an index directory, or the output; a path or a URL.

    Raises:
        InputError: There is no run, or it was written by another version.
    """
    for place in (name, f"{name.rstrip('/')}.work"):
        storage = storage_at(place)
        if not {*STAGES, "live", "manifest.json"}.isdisjoint(storage.entries()):
            with storage.outline() as run:
                try:
                    return status_of(run, elsewhere=storage.in_bucket)._replace(path=str(storage))
                except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
                    raise InputError(
                        f"{storage}: this run was not written by this version "
                        f"({type(error).__name__}: {one_line(str(error), 80)})"
                    ) from error
    if (Path(name) / "config.json").exists():
        raise InputError(
            f"{name}: this looks like a model, not like a run: scaledown evaluate --model {name} "
            "measures its answers"
        )
    raise InputError(
        f"{redacted(name)}: there is no run directory; give what --work_dir or --index_dir named, or the "
        "--output_file of a run"
    )


def status_of(run: Path, *, elsewhere: bool = False) -> Status:
    """Return the current status of a run.

    Args:
        run: The run directory.
        elsewhere: `run` is an outline of a run in an object store: its paths do not exist on this disk.
    """
    everyone = processes(run)
    living = [process for process in everyone if process.alive is not False]
    content = read_json(run / "manifest.json")
    manifest = content if isinstance(content, dict) else {}
    opened = _opened(run, everyone, manifest, elsewhere=elsewhere)
    homes = {run, *(folder.parent.parent for _, folder in opened)}
    held = [one for home in homes for one in Leases(home / "locks", "").held()]
    stages: list[StageStatus] = []
    shards: dict[str, _Shards] = {}
    planned: dict[str, int | None] = {}
    for name, folder in opened:
        working = [work for process in living for work in process.work if work.stage == name]
        if name == "approximate" and not working:  # has no shards, and is never marked as finished
            continue
        shards[name] = _Shards.of(folder)
        source = None if name in _OWN_SHARDS else shards.get(_source(name))
        estimate = planned.get(_source(name)) if source else None
        stages.append(_stage_status(folder, shards[name], source, working, estimate or 0))
        planned[name] = stages[-1].rows_planned
    ended = _ended(run, manifest, stages, dict(opened))
    written = manifest.get("output", {}) if ended else {}
    return Status(
        str(run),
        ended is not None,
        ended,
        str(written.get("path", "")),
        examples if isinstance(examples := written.get("examples"), int) else None,
        tuple(stages),
        tuple(_worker_status(process, held) for process in living),
    )


def _ended(
    run: Path, manifest: Mapping[str, Any], stages: Sequence[StageStatus], folders: Mapping[str, Path]
) -> float | None:
    """Return when the run was finished, in seconds since 1970; None if it is unfinished."""
    if not all(stage.finished or not folders[stage.name].exists() for stage in stages):
        return None
    if made := manifest.get("stages"):
        same = all(name in folders and folders[name].name == one["fingerprint"] for name, one in made.items())
        return datetime.fromisoformat(manifest["finished"]).timestamp() if same else None
    if "vectors" in folders and not (run / "queries").exists():  # an index
        return (folders["vectors"] / "done.json").stat().st_mtime
    return None


class _Shards(NamedTuple):
    """A stage's shards: the complete ones, the known rows of each, the counts of the finished stage."""

    whole: frozenset[int]
    rows: Mapping[int, int]
    seconds: float
    counts: Mapping[str, int] | None

    @classmethod
    def of(cls, folder: Path) -> "_Shards":
        """Read them from the stage's folder."""
        names = (entry.name.removesuffix(".arrow") for entry in _entries(folder))
        whole = frozenset(int(name) for name in names if name.isdecimal())
        rows: dict[int, int] = {}
        seconds = 0.0
        for event in _journal(folder):
            seconds += finite(event.get("seconds", 0.0))
            if event.get("shard") in whole and "rows" in event:
                rows[event["shard"]] = event["rows"]
        if isinstance(done := read_json(folder / "done.json"), dict):
            every = frozenset(range(len(done["rows"])))  # also if the shards are in the parts of an index
            return cls(every, dict(enumerate(done["rows"])), done["seconds"], done["counts"])
        return cls(whole, rows, seconds, None)

    @property
    def finished(self) -> bool:
        """Whether the stage has all its shards."""
        return self.counts is not None


def _source(name: str) -> str:
    """Return the name of the stage that a stage is made from."""
    if name == "vectors":
        return "passages"
    return "queries" if STAGES.index(name) < STAGES.index("questions") else "questions"


def _opened(
    run: Path, everyone: list[Process], manifest: Mapping[str, Any], *, elsewhere: bool
) -> list[tuple[str, Path]]:
    """List the stages of the run, in order: those that its processes or the manifest name, or all folders.

    Stages in an index directory are searched there; for a run in an object store they are left out.
    """
    named: dict[str, Path] = {}
    for process in sorted(everyone, key=lambda process: process.time):
        for name, folder in process.stages.items():
            if name not in STAGES:
                continue
            own = run / name / Path(folder).name  # the path on this machine
            named[name] = own if own.exists() else Path(folder)
    if not named:
        index = (manifest.get("parameters") or {}).get("index_dir")
        for name, stage in (manifest.get("stages") or {}).items():
            if name not in STAGES or Path(stage["fingerprint"]).name != stage["fingerprint"]:
                raise ValueError(f"stage {name} of the manifest")  # a path out of the run directory
            own = run / name / stage["fingerprint"]
            if own.exists() or not index:
                named[name] = own
            elif not elsewhere:
                named[name] = Path(index) / name / stage["fingerprint"]
    if not named:
        named = _present(run)
    if named:
        return [(name, named[name]) for name in STAGES if name in named]
    return [(name, folder) for name in STAGES for folder in sorted((run / name).glob("*")) if folder.is_dir()]


def _present(run: Path) -> dict[str, Path]:
    """Return the current stages of an index, if the directory holds exactly one index and no queries."""
    contents = (read_json(path) for path in (run / "vectors").glob("*/index.json"))
    found = [content for content in contents if isinstance(content, dict)]
    if len(found) != 1 or (run / "queries").exists():
        return {}
    names = [name for name in ("passages", "vectors") if isinstance(found[0].get(name), dict)]
    return {name: run / name / stage_fingerprint(name, found[0][name]) for name in names}


def _stage_status(
    folder: Path, own: _Shards, source: _Shards | None, working: list[Work], guess: int
) -> StageStatus:
    """Compute the status of a stage; `guess` estimates its rows while they are not known."""
    name = folder.parent.name
    planned = own.rows if own.finished else source.rows if source else {}
    known = own.finished or (source is not None and source.finished)
    unit = _UNITS.get(name) or (name if name in _OWN_SHARDS else _source(name))
    rows = sum((planned or own.rows).get(shard, 0) for shard in own.whole)
    total = sum(planned.values()) if known else None
    rate = 0.0
    flying: dict[tuple[int, ...], float] = {}
    if own.counts is not None:
        working = []
        rows = total = own.counts.get(unit, rows) if name in {*_OWN_SHARDS, "vectors"} else rows
    elif source:
        for work in working:
            share = sum(source.rows.values()) / work.total if work.total and known else 1.0
            rate += work.rate * share
            at = tuple(work.shards or (0, 0))
            theirs = (shard for shard in source.rows if at[0] <= shard < at[1] and shard not in own.whole)
            most = sum(source.rows[shard] for shard in theirs)
            flying[at] = max(flying.get(at, 0.0), min(work.in_flight * share, most))
    elif working:  # one process makes the whole stage, others wait
        work = max(working, key=lambda work: work.done)
        rows, rate, total, guess = work.done, work.rate, work.total, work.guess or guess
    if not working:
        rate = rows / own.seconds if own.seconds else 0.0
    in_flight = int(sum(flying.values()))
    left = max(0, (total or guess) - rows - in_flight)
    return StageStatus(
        name,
        folder.name,
        unit,
        len(own.whole),
        len(planned) if known else None,
        rows,
        in_flight,
        total if total is not None else guess or None,
        total is None and guess > 0,
        round(own.seconds, 2),
        rate,
        left / rate if left and rate and working else None,
        len(working),
        len(Leases(folder.parent.parent / "locks", "").deaths(f"{folder.parent.name}-{folder.name}-*")),
        sum(entry.name.endswith(ABSENT) for entry in _entries(folder)),
        sum(
            _line_count(path)
            for path in _beside(folder, "quarantine", ".jsonl")
            if "given-up" not in path.name
        ),
        own.finished,
        next((work.waiting for work in working if work.waiting), ""),
    )


def _worker_status(process: Process, held: list[Held]) -> WorkerStatus:
    own = [one for one in held if (one.host, one.pid) == (process.host, process.pid)]
    at = ", ".join(re.sub("-[0-9a-f]{16}-", " ", one.name) for one in own)
    now = time.time()
    return WorkerStatus(
        process.worker,
        process.host,
        process.pid,
        at,
        max(0.0, now - min(one.since for one in own)) if own else None,
        max(0.0, now - process.time) if process.time else None,
        process.alive,
    )


def _entries(folder: Path) -> list["os.DirEntry[str]"]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError:
        return []


def _beside(folder: Path, kind: str, ending: str) -> Iterator[Path]:
    """Yield the files about a stage in another folder of its run directory."""
    return (folder.parent.parent / kind).glob(f"{folder.parent.name}-{folder.name}-*{ending}")


def _journal(folder: Path) -> Iterator[dict[str, Any]]:
    for path in sorted(folder.glob("journal*.jsonl")):  # in an object store each process has its own
        with contextlib.suppress(OSError):
            for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
                with contextlib.suppress(ValueError, RecursionError):  # cut short by a crash
                    if isinstance(event := json.loads(line), dict):
                        yield event


def _line_count(path: Path) -> int:
    try:
        state = path.stat()
    except OSError:
        return 0
    return _count_lines(path, state.st_size, state.st_mtime_ns)


@functools.lru_cache(maxsize=4096)
def _count_lines(path: Path, _size: int, _changed: int) -> int:
    with path.open("rb") as file:
        return sum(block.count(b"\n") for block in iter(lambda: file.read(1 << 20), b""))
