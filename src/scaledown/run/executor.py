"""Work in other processes: a function over a stream of items, or a whole run that workers share.

Workers run the same code as a single process. On a shared disk, leases give each shard to a free worker. With
an object store, where machines do not share a disk, each worker makes a fixed part. A stage does not know
whether its worker is a process on this machine or a task on Ray.
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
from scaledown.devices.gpus import only
from scaledown.errors import InputError, NoRoomError, RunDirectoryError, ScaleDownError
from scaledown.run.leases import SHARD_TRIES, Leases

log = logging.getLogger("scaledown")

_IDLE_SECONDS: Final = 30  # if this process is killed, processes of `map_in_order` end after this time
_POLL_SECONDS: Final = 0.2
_EVERY_SECONDS: Final = 1.0
_LONG_LIFE_SECONDS: Final = 600.0  # a worker that lived longer did not fail at its start
_FAILED_STATUS: Final = 3  # exit status of a worker that ended with a `ScaleDownError`

Item = TypeVar("Item")
Result = TypeVar("Result")


def cores() -> int:
    """Return the number of processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def threads_here() -> int:
    """Return the threads that this process may use: `OMP_NUM_THREADS`, but not more than its processors."""
    given = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]
    return min(cores(), int(given)) if given.isdecimal() and int(given) else cores()


def map_in_order(
    function: Callable[[Item], Result], items: Iterable[Item], processes: int
) -> Iterator[Result]:
    """Yield `map(function, items)` in order, computed by several processes a few items ahead.

    Args:
        function: It must be picklable, and cheap to pickle: each item is sent with it.
        items: They are read as they are needed, up to twice the number of processes ahead.
        processes: Number of processes. With 0 or 1 the work is done in this process.

    Yields:
        The results, in the order of `items`. An error of `function` is raised here.
    """
    if processes < 2:
        yield from map(function, items)
        return
    from loky import ProcessPoolExecutor  # the standard library's pool needs a main-module guard

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
    """An order for a worker: a function to call, with its arguments."""

    target: str
    """The function, as `module:function`."""
    settings: Mapping[str, Any]
    """Its first argument."""
    worker: str
    """Its second argument, the worker's name."""
    folder: str = ""
    """The folder for relative paths; if empty, the worker's working directory."""

    def carry_out(self) -> None:
        """Call the target in this process.

        Raises:
            InputError: This machine does not have the folder.
        """
        if self.folder:
            try:
                os.chdir(self.folder)
            except OSError as error:
                raise InputError(
                    f"{self.folder}: {socket.gethostname()} does not have it ({error.strerror}): workers "
                    "need the disk that the command was started on"
                ) from error
        module, _, name = self.target.partition(":")
        getattr(importlib.import_module(module), name)(self.settings, self.worker)


class Ending(NamedTuple):
    """How a worker ended."""

    well: bool
    """Whether it finished without an error."""
    reason: str = ""
    """The cause of its death: a signal, or the last line of its log. Empty if it did not die."""
    error: ScaleDownError | None = None
    """The error for the user that it ended with."""

    @classmethod
    def failed(cls, kind: str, message: str) -> "Ending":
        """Create the ending of a worker that raised one of our errors.

        Args:
            kind: The name of its class in `scaledown.errors`.
            message: Its message.
        """
        error: ScaleDownError = getattr(errors, kind)(message)
        return cls(well=False, error=error)


class Worker(Protocol):
    """A worker that has been started."""

    def ended(self) -> Ending | None:
        """Return how it ended; None while it works."""

    def kill(self) -> None:
        """Kill it at once."""


class Pool(Protocol):
    """The machines or processes that run workers."""

    def start(self, order: Order, place: int) -> Worker:
        """Start a worker.

        Args:
            order: What the worker does.
            place: Its number, from 0, which decides its GPUs. A replacement has the same number.
        """


def supervise(  # noqa: PLR0917
    pool: Pool,
    target: str,
    settings: Mapping[str, Any],
    count: int,
    leases: Sequence[Leases],
    task_timeout: float = 0.0,
    look: Callable[[], None] = lambda: None,
) -> None:
    """Run `count` workers with the same order until all have finished.

    A worker that dies is replaced. A worker stops if its device has no room for a model; the others continue.

    Args:
        pool: Starts the workers.
        target: The function that they call, `module:function`.
        settings: Its settings.
        count: Number of workers.
        leases: The leases of the directories that all workers share; they count the deaths of each shard.
            Without leases the workers do not share a disk: each makes a part, given by `shard` in its
            settings.
        task_timeout: A worker that needs longer for a shard is killed; in seconds, 0 for no limit.
        look: Called several times a second.

    Raises:
        ScaleDownError: A worker ended with this error.
        RunDirectoryError: Too many workers died in a row without visible progress.
    """
    suffix = uuid.uuid4().hex[:4]  # another process may start workers for the same run
    names = (f"worker-{number}-{suffix}" for number in range(sys.maxsize))
    working: dict[int, tuple[str, Worker]] = {}
    begun: dict[str, float] = {}
    hung: set[str] = set()
    in_vain = 0
    clock = _Clock(task_timeout)

    def start(place: int) -> None:
        name = next(names)
        begun[name] = time.monotonic()
        own = settings if leases else {**settings, "shard": f"{place}/{count}"}
        working[place] = name, pool.start(Order(target, own, name, str(Path.cwd())), place)

    try:
        for place in range(count):
            start(place)
        while working:
            late = clock.late(leases)
            for place, (name, worker) in list(working.items()):
                if (ending := worker.ended()) is None:
                    if name in late and name not in hung:
                        log.warning("%s needs more than %g s for %s: killed", name, task_timeout, late[name])
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
                held = [lease for own in leases for lease in own.died(name, reason)]
                log.warning("%s is dead (%s), it held %s: replaced", name, reason, held or "no lease")
                lived = time.monotonic() - begun[name]
                in_vain = 0 if held or (leases and lived > _LONG_LIFE_SECONDS) else in_vain + 1
                if in_vain >= SHARD_TRIES * count:
                    raise RunDirectoryError(
                        f"{in_vain} workers died"
                        + (" before they began anything" if leases else "")
                        + f", the last of {reason}; finished work is kept: run the same command again"
                    )
                start(place)
            look()
            time.sleep(_POLL_SECONDS)
    finally:
        for _, worker in working.values():
            worker.kill()
        for own in leases:
            own.stopped([name for name, _ in working.values()])


class _Clock:
    """Measures how long each worker has held its lease without progress, by this machine's clock."""

    def __init__(self, limit: float) -> None:
        self._limit = limit
        self._seen: dict[tuple[str, str], tuple[float, float]] = {}
        self._next = 0.0

    def late(self, leases: Sequence[Leases]) -> dict[str, str]:
        """Return the leases that are held longer than the limit, by worker. Checks at most once a second."""
        if not self._limit or time.monotonic() < self._next:
            return {}
        self._next = time.monotonic() + _EVERY_SECONDS
        found = {}
        seen: dict[tuple[str, str], tuple[float, float]] = {}
        for held in (held for own in leases for held in own.held()):
            if not held.numbered and not held.name.endswith("-all"):  # only these are renewed
                continue
            key = held.worker, held.name
            renewed, first = self._seen.get(key, (held.since, time.monotonic()))
            seen[key] = (renewed, first) if renewed == held.since else (held.since, time.monotonic())
            if time.monotonic() - seen[key][1] > self._limit * held.shards:
                found[held.worker] = held.name
        self._seen = seen
        return found


class LocalPool:
    """A pool of processes on this machine; each has its share of the cores and its own GPUs.

    Args:
        workers: Number of workers, which share the cores.
        logs: The folder for their logs, one file for each worker.
        gpus_each: GPUs of each worker; with 0 a worker sees the same devices as this process.
    """

    def __init__(self, workers: int, logs: Path, gpus_each: int = 0) -> None:
        self._workers, self._logs, self._gpus_each = workers, logs, gpus_each

    def start(self, order: Order, place: int) -> "_Process":
        """Start a process; its output goes to `<worker>.log` in `logs`.

        Args:
            order: What the worker does.
            place: Its number, from 0: worker n has the n-th group of `gpus_each` GPUs.
        """
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        environment.setdefault("OMP_NUM_THREADS", str(max(1, cores() // self._workers)))
        if self._gpus_each:
            gpus = range(place * self._gpus_each, (place + 1) * self._gpus_each)
            environment |= only(environment, gpus)
        return _Process(order, self._logs / f"{order.worker}.log", environment)


class _Process:
    """A worker in a process. It ends with this process: it reads a pipe that closes then."""

    def __init__(self, order: Order, log_file: Path, environment: Mapping[str, str]) -> None:
        self._log_file = log_file
        log_file.parent.mkdir(exist_ok=True)
        with log_file.open("wb") as file:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "scaledown.run.executor"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                env=dict(environment),
                start_new_session=True,  # Ctrl-C is for the supervisor
            )
        self._orders, self._result = cast(
            "tuple[IO[bytes], IO[bytes]]", (self._process.stdin, self._process.stdout)
        )
        with contextlib.suppress(BrokenPipeError):  # it has died already; `ended` returns how
            self._orders.write(json.dumps(order._asdict()).encode() + b"\n")
            self._orders.flush()

    def ended(self) -> Ending | None:
        if (status := self._process.poll()) is None:
            return None
        _end_group(self._process.pid)  # a process that it started may hold the pipe
        sent = b"" if self._result.closed else self._result.read()
        self._close()
        if status == 0:
            return Ending(well=True)
        if status == _FAILED_STATUS and sent:
            return Ending.failed(*json.loads(sent))
        if status < 0:
            known = -status in set(signal.Signals)
            return Ending(well=False, reason=signal.Signals(-status).name if known else f"signal {-status}")
        lines = self._log_file.read_text(encoding="utf-8", errors="replace").splitlines() or [
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
        self._result.close()


def _end_group(leader: int) -> None:
    """Kill a worker and all processes that it started; they are in its session."""
    if hasattr(os, "killpg"):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(leader, signal.SIGKILL)


def main() -> int:
    """Run a worker: carry out the order from standard input, and end when standard input is closed."""
    order = Order(**json.loads(sys.stdin.readline()))
    result = os.dup(1)
    os.dup2(2, 1)  # output of libraries goes to the log

    def end_with_supervisor() -> None:
        sys.stdin.read()
        _end_group(os.getpid())
        os._exit(1)

    threading.Thread(target=end_with_supervisor, daemon=True).start()
    try:
        order.carry_out()
    except ScaleDownError as error:
        os.write(result, json.dumps([type(error).__name__, str(error)]).encode())
        return _FAILED_STATUS
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
