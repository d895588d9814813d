"""The folder of a run directory or an output: on a disk, or in an object store.

All code works on files on this disk: it publishes a file when it is complete, and fetches a file before
reading it. For a folder on a disk both do nothing; for an object store see `object_store`.
"""

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from scaledown.run.atomic import check_writable, read_json


def cache_directory() -> Path:
    """Return the folder for downloads, converted weights, mirrors: `$SCALEDOWN_CACHE` or the user's cache."""
    base = os.environ.get("SCALEDOWN_CACHE")
    if base:
        return Path(base)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "scaledown"


class Storage:
    """A folder on a disk.

    For a folder in an object store, each method that sends a request raises `OutputError` if the store
    refuses it or cannot be reached for a minute.

    Args:
        root: The folder; the mirror of a folder in a store.
    """

    in_bucket: bool = False
    """Whether it is in an object store, which has no locks."""
    pauses: Sequence[float] = ()
    """Seconds before each further attempt to read a file that is damaged or not there yet."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def __str__(self) -> str:
        return str(self.root)

    def shown(self, path: Path) -> str:
        """The name of a file in messages."""
        return str(path)

    def address(self, path: Path) -> str:
        """Return a name that identifies the file from everywhere: an absolute path or a URL."""
        return str(path.resolve())

    def entries(self) -> list[str]:
        """The names of the files and folders in it."""
        return [entry.name for entry in self.root.iterdir()] if self.root.is_dir() else []

    def glob(self, folder: Path, pattern: str) -> list[Path]:
        """List the files below a folder that match a pattern, in order.

        Args:
            folder: A folder in this one.
            pattern: A path relative to `folder`; `*` matches any text without a slash.
        """
        return sorted(folder.glob(pattern))

    def exists(self, path: Path) -> bool:
        """Whether the file exists; in a store, as listed at most a second ago."""
        return path.exists()

    def refresh(self, folder: Path) -> None:
        """List the folder again for the next question about it."""

    def size(self, path: Path) -> int:
        """The size of a file in bytes."""
        return path.stat().st_size

    def state(self, path: Path) -> str:
        """Return a text that changes when the file changes, without reading it; empty if there is no file."""
        if not path.is_file():
            return ""
        found = path.stat()
        return f"{found.st_size} {found.st_mtime_ns}"

    def own(self, name: str) -> str:
        """Return the name of this process' file for a log to which all processes append.

        An object cannot be appended to: in a store each process has its own file.

        Args:
            name: The name of the log.
        """
        return name

    def logs(self, folder: Path, pattern: str) -> dict[Path, list[Path]]:
        """Return the logs in a folder, each with its `owned` files, published or not.

        Args:
            folder: A folder in this one.
            pattern: A file name in which `*` matches any text.

        Returns:
            The files of each log, by the path of the log.
        """
        return {path: [path] for path in self.glob(folder, pattern)}

    def owned(self, path: Path) -> list[Path]:
        """Return the files of the log `path`: one of each process, under its `own` name."""
        return [path] if path.exists() else []

    def send_log(self, path: Path) -> None:
        """Publish a log if the store has less of it."""

    def check_writable(self, output: Path, flag: str = "--output_file") -> None:
        """Check before any work that an output can be written.

        Args:
            output: The file.
            flag: The flag that names it, for messages.

        Raises:
            OutputError: It cannot be written.
        """
        check_writable(output, flag)

    def publish(self, path: Path, *, once: bool = False) -> None:
        """Make a complete file visible to others.

        Args:
            path: The file.
            once: Keep an existing object, if the store supports conditional writes; otherwise the last write
                wins. If an object is kept, the file here is dropped, and fetched when it is read.

        Raises:
            OutputError: The store refuses the file, or cannot be reached.
        """

    def fetch(self, path: Path, *, once: bool = False) -> bool:
        """Copy the published file to this disk; for a folder on a disk this does nothing.

        Args:
            path: The file.
            once: The file never changes: a copy that this process has made or checked is kept.

        Returns:
            Whether the file was copied now.
        """
        return False

    def drop(self, path: Path) -> None:
        """Remove this disk's copy of a file in a store."""

    def fetch_log(self, path: Path) -> None:
        """Copy a log to this disk if the store has more of it."""

    def read_json(self, path: Path) -> Any:
        """The content of a JSON file, or None if there is no file or it is not JSON."""
        return read_json(path)

    def read(self, path: Path) -> bytes | None:
        """The content of a small file as it is now, or None if there is no file."""
        try:
            return path.read_bytes()
        except FileNotFoundError:
            return None

    @contextlib.contextmanager
    def outline(self) -> Iterator[Path]:
        """Yield a folder with all file names, and the contents of manifests, journals, other small files."""
        yield self.root

    def remove(self, path: Path) -> None:
        """Remove a file if it exists."""
        path.unlink(missing_ok=True)
