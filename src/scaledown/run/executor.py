"""Runs work elsewhere: a function over a stream in processes, or a whole run by workers that share it.

Workers run what the process that started them would run alone: a stage's shards go, by their leases, to
whoever is free. Where a worker runs (a process here, a task on Ray), no stage knows.
"""

import collections
import contextlib
import importlib
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Final, NamedTuple, Protocol, TypeVar, cast

from scaledown import errors
from scaledown.errors import InputError, NoRoomError, RunDirectoryError, ScaleDownError
from scaledown.gpus import only
from scaledown.run.leases import TRIES, Leases

log = logging.getLogger("scaledown")

_IDLE_SECONDS: Final = 30  # workers of a process that was killed end after as long
_LOOK_SECONDS: Final = 0.2
_EVERY_SECONDS: Final = 1.0
_LONG_SECONDS: Final = 600.0  # who lives so long did not die of starting
_FAILED: Final = 3  # exit status of a worker that failed with an error of ours, which it told

Item = TypeVar("Item")
Result = TypeVar("Result")


def cores() -> int:
    """The processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def threads_here() -> int:
    """The threads a computation of this process may use: `OMP_NUM_THREADS`, at most its processors."""
    given = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]
    return min(cores(), int(given)) if given.isdecimal() and int(given) else cores()


def in_order(function: Callable[[Item], Result], items: Iterable[Item], processes: int) -> Iterator[Result]:
    """`map(function, items)` by so many processes, a few items ahead of what was taken.

    `function` must be picklable and should be cheap to pickle.
    """
    if processes < 2:
        yield from map(function, items)
        return
    from loky import ProcessPoolExecutor  # unlike the standard one it needs no main-module guard

    quiet: dict[str, Any] = {"TOKENIZERS_PARALLELISM": "false"}
    executor = ProcessPoolExecutor(processes, timeout=_IDLE_SECONDS, env=quiet)
    pending: collections.deque[Any] = collections.deque()
    try:
        for item in items:
            pending.append(executor.submit(function, item))
            if len(pending) > 2 * processes:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        executor.shutdown(wait=True, kill_workers=True)


class Order(NamedTuple):
    """What a worker does: calls `target`, `module:function`, with settings and its own name."""

    target: str
    settings: Mapping[str, Any]
    worker: str
    folder: str = ""
    """Where relative paths begin; without it, where the worker is."""

    def carry_out(self) -> None:
        """Do it here. Raises `InputError` where this machine does not have the folder."""
        if self.folder:
            try:
                os.chdir(self.folder)
            except OSError as error:
                raise InputError(
                    f"{self.folder}: {socket.gethostname()} does not see it ({error.strerror}): workers need "
                    "the disk that the command was started on"
                ) from error
        module, _, name = self.target.partition(":")
        getattr(importlib.import_module(module), name)(self.settings, self.worker)


class Ending(NamedTuple):
    """How a worker ended: well, with an error that is the user's to know, or dead of `reason`."""

    well: bool
    reason: str = ""
    error: ScaleDownError | None = None

    @classmethod
    def told(cls, kind: str, message: str) -> "Ending":
        """With an error of ours, which came by its name."""
        error: ScaleDownError = getattr(errors, kind)(message)
        return cls(well=False, error=error)


class Worker(Protocol):
    """A worker at work."""

    def ended(self) -> Ending | None:
        """How it ended, or None while it works."""

    def kill(self) -> None:
        """End it at once."""


class Pool(Protocol):
    """Where workers run."""

    def start(self, order: Order, place: int) -> Worker:
        """Start a worker at one of the pool's places."""


def supervise(  # noqa: PLR0917
    pool: Pool,
    target: str,
    settings: Mapping[str, Any],
    count: int,
    leases: Sequence[Leases],
    task_timeout: float = 0.0,
    look: Callable[[], None] = lambda: None,
) -> None:
    """Let `count` workers carry out the same order until all have done so.

    In place of one that dies another begins; what it was at is counted in `leases`. One that is at a shard
    for more than `task_timeout` seconds is killed, if that is not 0. One whose device has no room for a model
    stops, and the others go on. `look` is called all the while. Raises what a worker raised on purpose, and
    `RunDirectoryError` when workers die without having begun anything.
    """
    ours = uuid.uuid4().hex[:4]  # another supervisor may be at the same run
    names = (f"worker-{number}-{ours}" for number in range(sys.maxsize))
    working: dict[int, tuple[str, Worker]] = {}
    begun: dict[str, float] = {}
    hung: set[str] = set()
    in_vain = 0
    clock = _Clock(task_timeout)

    def start(place: int) -> None:
        name = next(names)
        begun[name] = time.monotonic()
        working[place] = name, pool.start(Order(target, settings, name, str(Path.cwd())), place)

    try:
        for place in range(count):
            start(place)
        while working:
            late = clock.late(leases)
            for place, (name, worker) in list(working.items()):
                if (ending := worker.ended()) is None:
                    if name in late and name not in hung:
                        log.warning("%s is at %s for more than %g s: killed", name, late[name], task_timeout)
                        worker.kill()
                        hung.add(name)
                    continue
                del working[place]
                if isinstance(ending.error, NoRoomError) and working:  # its shard is free again
                    log.warning("%s stops, the others go on: %s", name, ending.error)
                    continue
                if ending.error:
                    raise ending.error
                if ending.well:
                    in_vain = 0
                    continue
                reason = f"hanging for {task_timeout:g} s" if name in hung else ending.reason
                was_at = [held for own in leases for held in own.died(name, reason)]
                log.warning("%s is dead (%s), was at %s: another goes on", name, reason, was_at or "nothing")
                lived = time.monotonic() - begun[name]
                in_vain = 0 if was_at or lived > _LONG_SECONDS else in_vain + 1
                if in_vain >= TRIES * count:
                    raise RunDirectoryError(
                        f"{in_vain} workers died before they began anything, the last of {reason}"
                    )
                start(place)
            look()
            time.sleep(_LOOK_SECONDS)
    finally:
        for _, worker in working.values():
            worker.kill()


class _Clock:
    """How long each worker is at what it is at, by this machine's clock."""

    def __init__(self, limit: float) -> None:
        self._limit = limit
        self._seen: dict[tuple[str, str], tuple[float, float]] = {}
        self._next = 0.0

    def late(self, leases: Sequence[Leases]) -> dict[str, str]:
        """What each worker is at that is at it for longer than the limit. Looks once a second."""
        if not self._limit or time.monotonic() < self._next:
            return {}
        self._next = time.monotonic() + _EVERY_SECONDS
        found = {}
        seen: dict[tuple[str, str], tuple[float, float]] = {}
        for held in (held for own in leases for held in own.held()):
            if not held.numbered and not held.name.endswith("-all"):  # which say when they get on
                continue
            key = held.worker, held.name
            renewed, first = self._seen.get(key, (held.since, time.monotonic()))
            seen[key] = (renewed, first) if renewed == held.since else (held.since, time.monotonic())
            if time.monotonic() - seen[key][1] > self._limit * held.shards:
                found[held.worker] = held.name
        self._seen = seen
        return found


class LocalPool:
    """Processes on this machine, each with its share of the cores, and with GPUs of its own."""

    def __init__(self, workers: int, logs: Path, gpus_each: int = 0) -> None:
        self._workers, self._logs, self._gpus_each = workers, logs, gpus_each

    def start(self, order: Order, place: int) -> "_Process":
        """Start a process; what it says goes to a file of `logs`."""
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        environment.setdefault("OMP_NUM_THREADS", str(max(1, cores() // self._workers)))
        if self._gpus_each:
            own = range(place * self._gpus_each, (place + 1) * self._gpus_each)
            environment |= only(environment, own)
        return _Process(order, self._logs / f"{order.worker}.log", environment)


class _Process:
    """A worker in a process, which ends with this one: it reads a pipe that ends then."""

    def __init__(self, order: Order, said: Path, environment: Mapping[str, str]) -> None:
        self._said = said
        said.parent.mkdir(exist_ok=True)
        with said.open("wb") as file:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "scaledown.run.executor"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                env=dict(environment),
                start_new_session=True,  # Ctrl-C is for the supervisor
            )
        self._orders, self._told = cast(
            "tuple[IO[bytes], IO[bytes]]", (self._process.stdin, self._process.stdout)
        )
        with contextlib.suppress(BrokenPipeError):  # it died already: `ended` says how
            self._orders.write(json.dumps(order._asdict()).encode() + b"\n")
            self._orders.flush()

    def ended(self) -> Ending | None:
        if (status := self._process.poll()) is None:
            return None
        _end_group(self._process.pid)  # whom it started may hold the pipe
        told = b"" if self._told.closed else self._told.read()
        self._close()
        if status == 0:
            return Ending(well=True)
        if status == _FAILED and told:
            return Ending.told(*json.loads(told))
        if status < 0:
            known = -status in set(signal.Signals)
            return Ending(well=False, reason=signal.Signals(-status).name if known else f"signal {-status}")
        lines = self._said.read_text(encoding="utf-8", errors="replace").splitlines() or [
            f"exit status {status}"
        ]
        return Ending(well=False, reason=errors.one_line(lines[-1], 200))

    def kill(self) -> None:
        _end_group(self._process.pid)
        self._process.kill()
        self._process.wait()
        self._close()

    def _close(self) -> None:
        with contextlib.suppress(BrokenPipeError):
            self._orders.close()
        self._told.close()


def _end_group(leader: int) -> None:
    """End a worker and all that it started; its session began with it."""
    if hasattr(os, "killpg"):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(leader, signal.SIGKILL)


def main() -> int:
    """A worker's process: carries out the order on standard input, and ends when that does."""
    order = Order(**json.loads(sys.stdin.readline()))
    told = os.dup(1)
    os.dup2(2, 1)  # what libraries print goes to the log

    def end_with_supervisor() -> None:
        sys.stdin.read()
        _end_group(os.getpid())
        os._exit(1)

    threading.Thread(target=end_with_supervisor, daemon=True).start()
    try:
        order.carry_out()
    except ScaleDownError as error:
        os.write(told, json.dumps([type(error).__name__, str(error)]).encode())
        return _FAILED
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
