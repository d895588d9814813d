"""A stage: which shards it has, and how one process or several together make those that are missing."""

import contextlib
import errno
import json
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import pyarrow as pa

from scaledown.errors import RunDirectoryError
from scaledown.run.atomic import atomic, write_json
from scaledown.run.directory import ABSENT, GIVEN_UP, RunDirectory, stage_fingerprint
from scaledown.run.leases import SHARD_TRIES
from scaledown.run.stage.settings import SETTINGS, keep_settings, why_new
from scaledown.run.stage.shard_file import read_rows, write_rows

log = logging.getLogger("scaledown")

_OUT_OF_RESOURCES: Final = {errno.EMFILE, errno.ENFILE, errno.ENOMEM}  # errors that are not due to the file
_WAIT_SECONDS: Final = 0.1
_LONGEST_WAIT_SECONDS: Final = 2.0  # many processes that wait would otherwise burden the disk


class StageResult(NamedTuple):
    """The record of a finished stage: rows of each shard, counts by name, seconds, measured values."""

    rows: list[int]
    counts: dict[str, int]
    seconds: float
    measured: dict[str, float] = {}  # noqa: RUF012 (never changed)


class Stage:
    """The shards of one stage under one set of settings.

    Args:
        run: The run directory.
        name: The stage's name, one of `STAGES`.
        settings: Everything that the shards depend on.
        sources: The stages that a shard is made from: it needs their shards of the same number. The first one
            decides how many shards there are.
        beside: Do not log that the run has stages of this name with other settings: it is expected.
    """

    def __init__(
        self,
        run: RunDirectory,
        name: str,
        settings: Mapping[str, Any],
        sources: "Sequence[Stage]" = (),
        *,
        beside: bool = False,
    ) -> None:
        self.name = name
        self.settings = dict(settings)
        self._sources = sources
        self._leased: set[str] = set()
        self.fingerprint = stage_fingerprint(name, settings)
        self.folder = run.path / name / self.fingerprint
        self.storage = run.storage
        self._run = run
        self._key = f"{name}-{self.fingerprint}"
        self._settings_kept = False
        stage = self.folder.parent
        if self.folder.exists():
            log.debug("%s: shards in %s are not made again: their settings are the same", name, self.folder)
        elif not beside and stage.exists() and any(stage.iterdir()):
            why = why_new(self.settings, stage)
            log.info("%s: made again, because %s; earlier results stay in %s", name, why, stage)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.at: range | None = None  # the shards that this process makes, or made last
        run.opened[name] = self.folder

    def path(self, shard: int) -> Path:
        """Return the path of a shard's file, which exists only when the shard is complete."""
        return self.folder / f"{shard:06d}.arrow"

    def has(self, shard: int) -> bool:
        """Whether the shard is finished."""
        return self.storage.exists(self.path(shard))

    def files(self) -> list[Path]:
        """List all files of the stage."""
        return self.storage.glob(self.folder, "*")

    def size(self, shard: int) -> int:
        """Return the size of a finished shard, in bytes."""
        return self.storage.size(self.path(shard))

    def done(self) -> StageResult | None:
        """Return the record of the finished stage; None while it is unfinished."""
        content = self.storage.read_json(self.folder / "done.json")
        try:
            return StageResult(**content) if content else None
        except TypeError:
            return None

    def finished(self) -> StageResult:
        """Return the record of the stage. Raises `RunDirectoryError` while it is unfinished."""
        result = self.done()
        if result is None:
            raise RunDirectoryError(
                f"{self.storage.shown(self.folder)} is unfinished: run the same command again"
            )
        return result

    def planned(self) -> list[int]:
        """Return the rows of each shard; while the stage is unfinished, those of its first source."""
        if (result := self.done()) is None and self._sources:
            return self._sources[0].planned()
        return (result or self.finished()).rows

    def missing(self) -> int:
        """Return the number of shards that are not made yet."""
        self.storage.refresh(self.folder)
        return sum(not self.has(shard) for shard in range(len(self.planned())))

    def made(self) -> list[int]:
        """Return the rows of each shard for `finish`; 0 for a shard that was given up."""
        given_up = set(self.lost())
        return [0 if shard in given_up else rows for shard, rows in enumerate(self.planned())]

    def write(self, shard: int, content: pa.Table, seconds: float = 0.0, left: float = 0.0) -> None:
        """Write a complete shard atomically, and its time to the journal.

        Args:
            shard: Its number.
            content: Its rows. In an object store an existing shard is kept: the first process counts.
            seconds: The time that it took.
            left: Number of shards of this size that follow; for the message about a full disk.
        """
        self._keep_settings()
        with atomic(self.path(shard), room=int((left + 1) * content.nbytes)) as temporary:
            write_rows(temporary, content)
        self.storage.publish(self.path(shard), once=True)
        self.note({"shard": shard, "seconds": round(seconds, 3), "rows": content.num_rows})
        for name in tuple(self._leased):
            self._run.leases.renew(name)

    def _keep_settings(self) -> None:
        """Write the settings beside the shards, for readers and for `why_new` of later runs."""
        if not self._settings_kept and not (self.folder / SETTINGS).exists():
            self.storage.publish(keep_settings(self.settings, self.folder), once=True)
        self._settings_kept = True

    def note(self, event: Mapping[str, Any]) -> None:
        """Append an event to the stage's journal: the seconds of a shard, or a halved batch."""
        path = self.folder / self.storage.own("journal.jsonl")
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(event) + "\n")
        self.storage.publish(path)

    @contextlib.contextmanager
    def noting(self, shard: int, count: Callable[[], int]) -> Iterator[None]:
        """Write to the journal how many batches were halved while the block ran, if any."""
        before = count()
        try:
            yield
        finally:
            if more := count() - before:
                self.note({"shard": shard, "halved": more})

    def journal(self) -> list[dict[str, Any]]:
        """Return the events in the journal, in order."""
        notes = []
        for path in self.storage.owned(self.folder / "journal.jsonl"):
            self.storage.fetch_log(path)
            for line in path.read_text(encoding="utf-8").splitlines():
                with contextlib.suppress(ValueError, RecursionError):  # a line cut short by a crash
                    if isinstance(event := json.loads(line), dict):
                        notes.append(event)
        return notes

    def table(self, shard: int, *, check: bool = False) -> pa.Table:
        """Return the rows of a shard, memory-mapped.

        Args:
            shard: Its number.
            check: Read the whole file and compare it with its checksum.

        Raises:
            RunDirectoryError: The shard is missing or damaged; in a store, after some seconds of attempts.
        """
        path = self.path(shard)
        check |= self.storage.fetch(path, once=True)
        pauses = iter(self.storage.pauses)
        while True:
            try:
                return read_rows(path, check=check)
            except (pa.ArrowException, OSError, ValueError) as error:
                if getattr(error, "errno", None) in _OUT_OF_RESOURCES:
                    raise
                self.storage.drop(path)  # otherwise the next fetch would keep the damaged copy
                if (pause := next(pauses, None)) is None:
                    # Another process may be making the file: the message does not say to delete it first.
                    raise RunDirectoryError(
                        f"{self.storage.shown(path)} is missing or damaged: run the same command again when "
                        "no other process works on this run; if it still fails then, delete the file and "
                        "done.json beside it"
                    ) from error
            time.sleep(pause)
            check |= self.storage.fetch(path)

    def tables(self) -> Iterator[pa.Table]:
        """Yield all shards of a finished stage in order."""
        for shard in range(len(self.finished().rows)):
            yield self.table(shard)

    def finish(
        self, rows: list[int], counts: Mapping[str, int], measured: Mapping[str, float] | None = None
    ) -> StageResult:
        """Mark the stage as complete.

        Args:
            rows: Rows of each shard.
            counts: The stage's counts, by name.
            measured: The stage's measured values, by name.

        Returns:
            The record, with the sums of seconds and halved batches in the journal.
        """
        journal = self.journal()
        halved = sum(int(event.get("halved", 0)) for event in journal)
        seconds = sum(float(event.get("seconds", 0)) for event in journal)
        recall = [float(event["recall"]) for event in journal if "recall" in event]
        given_up = len(self.lost())
        result = StageResult(
            rows,
            {
                **counts,
                **({"halved_batches": halved} if halved else {}),
                **({"given_up": given_up} if given_up else {}),
            },
            round(seconds, 2),
            {**(measured or {}), **({"recall": recall[-1]} if recall else {})},
        )
        write_json(self.folder / "done.json", result._asdict())
        self.storage.publish(self.folder / "done.json")
        return result

    def complete(
        self, shards: int, work: Callable[[int], pa.Table], *, nothing: Mapping[str, str] | None = None
    ) -> bool:
        """Make the missing shards of this process' part, shared with other processes on the same disk.

        Args:
            shards: How many shards the stage has.
            work: Makes the shard with the given number.
            nothing: Metadata of the empty shard that replaces a shard which was given up.

        Returns:
            Whether this stage and its sources have all shards. The shards of other parts may be missing.
        """
        return self.complete_together(shards, 1, lambda group: [work(group.start)], nothing=nothing)

    def complete_together(
        self,
        shards: int,
        at_once: int,
        work: Callable[[range], Iterable[pa.Table]],
        *,
        nothing: Mapping[str, str] | None = None,
    ) -> bool:
        """Like `complete`, also in its result, but several consecutive shards are made together.

        Args:
            shards: How many shards the stage has.
            at_once: The most shards to make together.
            work: Makes the shards with the given numbers, in order.
            nothing: As for `complete`.
        """
        mine = self._run.part.of(shards)
        # Groups begin at multiples: a process without a part, which makes the same shards, has them, too.
        firsts = range(mine.start - mine.start % at_once, mine.stop, at_once)
        groups = [range(max(first, mine.start), min(first + at_once, mine.stop)) for first in firsts]
        self._make_all(groups, shards, work)
        self.storage.refresh(self.folder)  # the last part to finish must see the shards of all parts
        self._stand_in(shards, lambda like, _: like.slice(0, 0).replace_schema_metadata(nothing))
        before = all(source.done() for source in self._sources)
        return before and all(map(self.has, range(shards)))

    def complete_behind(
        self,
        source: "Stage",
        work: Callable[[int], pa.Table],
        check: Callable[[], None],
        empty: Callable[[pa.Table, int], pa.Table],
    ) -> None:
        """Like `complete`, while `source` is being made: one shard for each shard of `source`.

        Args:
            source: The stage that comes before.
            work: Makes the shard with the given number.
            check: Called between shards and while waiting; raises an error if `source` cannot be finished.
            empty: Makes the shard that replaces a given-up one, from a complete shard and the number.
        """

        def alone(group: range) -> list[pa.Table]:
            return [work(group.start)]

        number = 0
        while source.done() is None:
            check()
            if source.has(number):
                if not self._settled(number):
                    self._make(range(number, number + 1), number + 1, alone)
                number += 1
            else:
                time.sleep(_WAIT_SECONDS)
        shards = len(source.finished().rows)
        self._make_all([range(number, number + 1) for number in range(shards)], shards, alone)
        self._stand_in(shards, empty)

    def _make_all(
        self, groups: list[range], shards: int, work: Callable[[range], Iterable[pa.Table]]
    ) -> None:
        """Make all groups, and wait for those that other processes make."""
        waited, pause = False, _WAIT_SECONDS
        while groups := [group for group in groups if not all(map(self._settled, group))]:
            made = [self._make(group, shards, work) for group in groups]
            if any(made):
                pause = _WAIT_SECONDS
                continue
            if not waited:
                log.info("%s: waiting for another process, which makes the last %s", self.name, len(groups))
            waited = True
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_WAIT_SECONDS)

    def _settled(self, shard: int) -> bool:
        """Whether the shard needs no more work: it exists, or was given up."""
        return self.has(shard) or self.absent(shard)

    def _make(self, group: range, shards: int, work: Callable[[range], Iterable[pa.Table]]) -> bool:
        """Make the shards of `group` if no other process does. Return whether any was made or given up."""
        name = f"{self._key}-{group.start:06d}" + (f"-{group.stop:06d}" if len(group) > 1 else "")
        with self._run.leases.hold(name) as mine:
            if not mine:
                return False
            if all(map(self._settled, group)):
                return True
            deaths = self._run.leases.deaths(name)
            lost = {n: source.name for n in group for source in self._sources if source.absent(n)}
            for shard, source in lost.items():
                self._mark(shard, f"given up in {source}")
            if len(group) > 1 and (deaths or any(map(self.absent, group))):
                made = []  # one shard is the cause: make each alone
                for shard in group:
                    if not self._settled(shard):
                        made.append(self._make(range(shard, shard + 1), shards, work))
                    self._run.leases.renew(name)
                return any(made)
            if len(deaths) >= SHARD_TRIES:
                self._give_up(group.start, deaths)
            if self._settled(group.start) and len(group) == 1:
                return True
            self.at = group
            self._keep_settings()
            started = time.perf_counter()
            for shard, content in zip(group, work(group), strict=True):
                if not self._settled(shard):
                    self.write(shard, content, time.perf_counter() - started, left=shards - shard - 1)
                    started = time.perf_counter()
                self._run.leases.renew(name)
        return True

    def _give_up(self, shard: int, deaths: list[str]) -> None:
        """Mark a shard as given up in this run, with the reason in the quarantine."""
        reason = f"{len(deaths)} workers died of it"
        log.warning("%s: shard %s is given up, %s, the last of %s", self.name, shard, reason, deaths[-1])
        self.quarantine(f"{shard:06d}{GIVEN_UP}", [{"shard": shard, "reason": reason, "deaths": deaths}])
        self._mark(shard, reason)

    def _mark(self, shard: int, reason: str) -> None:
        mark = self.folder / f"{shard:06d}{ABSENT}"
        write_json(mark, {"reason": reason, "part": [self._run.part.number, self._run.part.count]})
        self.storage.publish(mark)

    def absent(self, shard: int) -> bool:
        """Whether the shard was given up in this run."""
        return self.storage.exists(self.folder / f"{shard:06d}{ABSENT}")

    def lost(self) -> list[int]:
        """The shards that were given up in this run."""
        names = (mark.name.removesuffix(ABSENT) for mark in self.storage.glob(self.folder, f"*{ABSENT}"))
        return sorted(int(name) for name in names if name.isdecimal())

    def _stand_in(self, shards: int, empty: Callable[[pa.Table, int], pa.Table]) -> None:
        """Write an empty shard, with the columns of a complete one, for each shard that was given up."""
        if not (absent := self.lost()):
            return
        whole = next((shard for shard in range(shards) if shard not in absent and self.has(shard)), None)
        if whole is None and len(absent) == shards:
            raise RunDirectoryError(
                f"{self.name}: all of its shards were given up: see {self._run.quarantine} and the workers' "
                f"logs in {self._run.path / 'live'}"
            )
        for shard in absent:
            if whole is not None and not self.has(shard):
                self.write(shard, empty(self.table(whole), shard))

    @contextlib.contextmanager
    def lease(
        self, what: str, *, wait: bool = False, check: Callable[[], None] = lambda: None
    ) -> Iterator[bool]:
        """Hold a lease of this stage while the block runs. Each shard that is written renews it.

        Args:
            what: The name of the lease in this stage.
            wait: Wait while another process holds it; for this and the result see `Leases.hold`.
            check: Called while waiting; it may raise an error to stop waiting.

        Raises:
            RunDirectoryError: `SHARD_TRIES` workers that held it have died.
        """
        name = f"{self._key}-{what}"
        if len(deaths := self._run.leases.deaths(name)) >= SHARD_TRIES:
            raise RunDirectoryError(
                f"{self.name}: {len(deaths)} workers died of it, the last of {deaths[-1]}: see their logs in "
                f"{self._run.path / 'live'}"
            )
        with self._run.leases.hold(name, wait=wait, check=check) as mine:
            if mine:
                self._leased.add(name)
            try:
                yield mine
            finally:
                self._leased.discard(name)

    def quarantine(self, part: str, rejected: list[dict[str, Any]]) -> None:
        """Write rejected input with its reasons to the quarantine; `part` names its shard."""
        if not rejected:
            return
        path = self._run.quarantine / f"{self._key}-{part}.jsonl"
        with atomic(path) as temporary:
            lines = (json.dumps(row, ensure_ascii=False) for row in rejected)
            temporary.write_text("\n".join(lines) + "\n", encoding="utf-8", errors="surrogateescape")
        self.storage.publish(path)


def together(shards: int, most: int) -> int:
    """Return how many shards to make together: at most `most`, so that 8 workers have two groups each.

    It does not depend on the number of workers: more may start later, and all must form the same groups.
    """
    return max(1, min(most, shards // 16))
