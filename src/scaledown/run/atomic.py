"""Atomic files: a file is complete or does not exist, however the process ends."""

import contextlib
import json
import os
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from scaledown.errors import OutputError, is_full_disk


@contextlib.contextmanager
def atomic(path: Path, room: int = 0) -> Iterator[Path]:
    """Yield a temporary path beside `path`. After the block it is synced to the disk and renamed to `path`.

    The folder is made if it is not there.

    Args:
        path: The file to write.
        room: Free bytes to ask for in the message about a full disk.

    Raises:
        OutputError: The disk is full.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{uuid.uuid4().hex[:6]}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
    except OSError as error:
        if is_full_disk(error):
            needed = f"about {max(room, 1 << 20) / 1e6:,.0f} MB" if room else "some"
            raise OutputError(
                f"no space left while writing {path}: free {needed} and run the same command again, "
                "it continues from here"
            ) from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(output: Path) -> Iterator[Path]:
    """Yield a path at which the block makes a folder. After the block it takes the place of `output`.

    The path is in a temporary folder beside `output`, which is deleted with all else that is in it. If the
    block raises an error, `output` is as before.

    Args:
        output: The folder to write. An existing folder is replaced as a whole.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.", suffix=".tmp") as folder:
        new, before = Path(folder) / "new", Path(folder) / "before"
        yield new
        if output.exists():
            output.replace(before)
        try:
            new.replace(output)
        except BaseException:
            if before.exists() and not output.exists():
                before.replace(output)
            raise


def write_json(path: Path, content: Any) -> None:
    """Write `content` atomically, indented.

    Args:
        path: The file; its folder is made if it is not there.
        content: JSON values.

    Raises:
        OutputError: The disk is full.
    """
    with atomic(path) as temporary:
        text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        temporary.write_text(text, encoding="utf-8", errors="surrogateescape")  # file names may be any bytes


def read_json(path: Path) -> Any:
    """Return the content of a JSON file; None if there is no file or it is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8", errors="surrogateescape"))
    except (FileNotFoundError, ValueError, RecursionError):
        return None


def check_writable(output: Path, flag: str = "--output_file") -> None:
    """Check before any work that an output can be written.

    No folder is made for it: a command that fails later leaves none behind.

    Args:
        output: The file.
        flag: The flag that names it, for messages.

    Raises:
        OutputError: The file cannot be written, or it is a folder, a device or a pipe.
    """
    try:
        output = output.resolve() if output.is_symlink() else output
    except (OSError, RuntimeError) as error:  # RuntimeError before Python 3.13
        raise OutputError(f"{flag} {output} is a link to itself: delete it") from error
    if output.is_dir():
        raise OutputError(f"{flag} {output} is a folder: name a file in it")
    if output.exists() and not output.is_file():
        raise OutputError(f"{flag} {output} is a device or pipe, which cannot be replaced: name a file")
    try:
        folder = next(parent for parent in output.parents if parent.exists())
        probe = folder / f".{output.name}.{os.getpid()}.probe"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise OutputError(f"{flag} {output} cannot be written ({error.strerror}): choose another") from error


def as_json(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a JSON file with this content gives back. A value that JSON has not is its text."""
    read: dict[str, Any] = json.loads(json.dumps(content, default=str))
    return read
