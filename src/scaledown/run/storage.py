"""The folder that holds a run directory or an output: on a disk, or in an object store behind a URL.

All code works on files on this disk: it publishes a file once that is whole, and fetches a file before it
reads it. For a folder on a disk both do nothing; for an object store see `object_store`.
"""

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from scaledown.run.atomic import check_writable, read_json


def cache_directory() -> Path:
    """The folder for downloads, converted weights and mirrors: `$SCALEDOWN_CACHE`, or the user's cache."""
    base = os.environ.get("SCALEDOWN_CACHE")
    if base:
        return Path(base)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "scaledown"


class Storage:
    """A folder on a disk."""

    in_bucket: bool = False
    """Whether it is in an object store, where no locks show who is at work."""
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
        """The name of a file that holds everywhere: an absolute path or a URL."""
        return str(path.resolve())

    def entries(self) -> list[str]:
        """The names of the files and folders in it."""
        return [entry.name for entry in self.root.iterdir()] if self.root.is_dir() else []

    def glob(self, folder: Path, pattern: str) -> list[Path]:
        """The files below `folder` that match, in order."""
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
        """A text that changes when the file does, known without reading it; empty where there is no file."""
        if not path.is_file():
            return ""
        found = path.stat()
        return f"{found.st_size} {found.st_mtime_ns}"

    def own(self, name: str) -> str:
        """The name of the file to which this process appends, where all processes append to `name`.

        An object cannot be appended to, so in a store each process has a file of its own.
        """
        return name

    def logs(self, folder: Path, pattern: str) -> dict[Path, list[Path]]:
        """The logs in `folder` that match, each with its `owned` files, published or not yet."""
        return {path: [path] for path in self.glob(folder, pattern)}

    def owned(self, path: Path) -> list[Path]:
        """The files that make up the log `path`: one of each process, under its `own` name."""
        return [path] if path.exists() else []

    def send_log(self, path: Path) -> None:
        """Publish a log if others do not have all of it."""

    def check_writable(self, output: Path, flag: str = "--output_file") -> None:
        """Raise `OutputError` if `output` cannot be written. Called before any work."""
        check_writable(output, flag)

    def publish(self, path: Path, *, once: bool = False) -> None:
        """Let others see a file that is whole.

        Args:
            path: The file.
            once: Keep an object that is already there, if the store can make this a condition of the write;
                otherwise the last write wins. The file is then dropped, and fetched when it is read.

        Raises:
            OutputError: The store refuses it, or cannot be reached.
        """

    def fetch(self, path: Path, *, once: bool = False) -> bool:
        """Copy the file to this disk as others see it; gives whether it was copied now.

        With `once` a copy that this process has made or checked is kept: the file never changes.
        """
        return False

    def drop(self, path: Path) -> None:
        """Remove the copy on this disk of a file in a store."""

    def fetch_log(self, path: Path) -> None:
        """Copy a log to this disk if others have more of it."""

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
        """A folder with all file names, and the contents of manifests, journals and other small files."""
        yield self.root

    def remove(self, path: Path) -> None:
        """Remove a file if it exists."""
        path.unlink(missing_ok=True)
