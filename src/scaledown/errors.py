"""All errors that a user can cause. Each message ends with the next step.

ScaleDownError            exit status 1
├── UsageError            exit status 2: the command line contradicts itself
├── InputError            queries, corpus or training data cannot be used
├── ModelError            a model cannot be found, read or run
│   └── NoRoomError       a device is too small for a model, or full
├── MissingExtraError     an optional dependency is not installed
├── OutputError           the output cannot be written
└── RunDirectoryError     the run directory is busy or belongs to other settings
"""

import contextlib
import errno
import importlib.metadata
import io
import logging
import os
import re
import shlex
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final, TypeVar

DISTRIBUTION: Final = "scaledown-rag"

Item = TypeVar("Item")
Done = TypeVar("Done")


class ScaleDownError(Exception):
    """The base of our errors. They are printed as one line, without a traceback."""

    exit_status = 1


class UsageError(ScaleDownError, ValueError):
    """Options contradict each other or are out of range."""

    exit_status = 2


class InputError(ScaleDownError):
    """Queries, corpus or training data are missing, empty or malformed."""


class ModelError(ScaleDownError):
    """A model is unknown, gated, not reachable, or of the wrong kind."""


class NoRoomError(ModelError):
    """A model, or one text with it, does not fit into the memory of a device, which others may use, too."""


class MissingExtraError(ScaleDownError):
    """A feature needs an optional dependency that is not installed."""


class OutputError(ScaleDownError):
    """An output cannot be written."""


class RunDirectoryError(ScaleDownError):
    """A run directory is in use with other settings, or a folder is not a run directory."""


def each_or_error(
    work: Callable[[Sequence[Item]], list[Done]], items: Sequence[Item]
) -> list[Done | InputError]:
    """Do work on items, with an error in the place of each item that fails.

    If a call fails, it is repeated with each half of the items.

    Args:
        work: Returns a result for each item; an `InputError` says that one of them cannot be used.
        items: The items; may be empty.

    Returns:
        A result or an error for each item, in order.
    """
    if not items:
        return []
    try:
        return [*work(items)]
    except InputError as error:
        if len(items) == 1:
            return [error]
    middle = len(items) // 2
    return each_or_error(work, items[:middle]) + each_or_error(work, items[middle:])


def install_command(extra: str) -> str:
    """Return the command that installs the packages of an extra, from the metadata of this installation.

    Args:
        extra: The extra's name in `pyproject.toml`.
    """
    try:
        needed = importlib.metadata.requires(DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:
        needed = []  # this is a checkout that is not installed
    own = re.compile(rf"""extra == ['"]{extra}['"]""")
    packages = [need.partition(";")[0].strip() for need in needed if own.search(need)]
    if not packages:
        return f"pip install -e '.[{extra}]' in a checkout"
    return shlex.join(["pip", "install", *packages])


def one_line(text: str, width: int = 1000) -> str:
    """Return text on one line without control characters, so that data cannot control a terminal.

    Args:
        text: Any text.
        width: The most characters; a longer text ends with an ellipsis.
    """
    text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return text if len(text) <= width else text[: width - 1] + "…"


def run_command(command: Callable[[], int], *, debug: bool, resumes: bool = False) -> int:
    """Run a command. Each error is printed as one line on standard error.

    Args:
        command: The work.
        debug: Whether exceptions are raised and not printed.
        resumes: Whether the same command continues an interrupted run; messages then say so.

    Returns:
        The exit status: 0 for success, 1 failure, 2 wrong usage, 130 interrupted, 143 terminated.
    """
    _open_closed_streams()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal may have ASCII only
    goes_on = "; finished work is kept, the same command continues from it" if resumes else ""
    try:
        with _terminate_like_interrupt():
            status = command()
            sys.stdout.flush()
            return status
    except BrokenPipeError:  # the reader has ended, as in `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt as error:
        print_last_message("interrupted" + goes_on)
        return 143 if isinstance(error, _Terminated) else 130
    except ScaleDownError as error:
        if debug:
            raise
        print_last_message(f"error: {one_line(str(error))}")
        return error.exit_status
    except Exception as error:
        if debug:
            raise
        if is_full_disk(error):
            message = f"no space left on the disk: free some{goes_on}"
        elif isinstance(error, OSError) and error.filename:
            message = f"{error.filename}: {error.strerror}: check that path and its permissions{goes_on}"
        else:
            where = f"in {_code_place(error)}; --debug shows more"
            message = f"{type(error).__name__}: {error} (unexpected, {where}{goes_on})"
        print_last_message(f"error: {one_line(message)}")
        return 1


def _code_place(error: Exception) -> str:
    """Return `file:line` of the innermost line of this package that the error came through.

    It is in the message, so that a run of days need not be repeated with --debug.
    """
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if Path(frame.filename).is_relative_to(Path(__file__).parent)]
    frame = (own or frames)[-1]
    return f"{Path(frame.filename).name}:{frame.lineno}"


def is_full_disk(error: BaseException) -> bool:
    """Whether a disk has no space left, or a user's quota is used up.

    Libraries in Rust, as safetensors, name the cause only in the message.
    """
    full = (errno.ENOSPC, errno.EDQUOT)
    return getattr(error, "errno", 0) in full or any(os.strerror(code) in str(error) for code in full)


def _open_closed_streams() -> None:
    """Open streams that were closed by `>&-` to /dev/null.

    Otherwise the next opened file would have the number of the stream.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # it gets the lowest free number, which is this one
    if sys.stdout is None:
        sys.stdout = os.fdopen(1, "w", closefd=False)
    if sys.stderr is None:
        sys.stderr = os.fdopen(2, "w", closefd=False)


def print_last_message(last_word: str) -> None:
    """Write a last message to standard error; with a structured log, as its last line.

    Args:
        last_word: The message; `error: ` at its beginning is left out of a structured log.
    """
    log = logging.getLogger("scaledown")
    if any(getattr(handler.formatter, "structured", False) for handler in log.handlers):
        log.error("%s", last_word.removeprefix("error: "))
    else:
        print(last_word, file=sys.stderr)


class _Terminated(KeyboardInterrupt):
    """SIGTERM. A batch queue sends it before it kills a process."""


@contextlib.contextmanager
def _terminate_like_interrupt() -> Iterator[None]:
    def stop(_signal: int, _frame: object) -> None:
        raise _Terminated

    try:
        before = signal.signal(signal.SIGTERM, stop)
    except ValueError:  # not in the main thread
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
