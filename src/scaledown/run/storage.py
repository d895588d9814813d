"""Where a run directory or an output is kept: in a folder here, or in an object store behind a URL.

Every room reads and writes files here, publishes what is whole, and fetches what others published before it
reads. For a folder here both are nothing to do; for one of a store see `mirror`.
"""

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from scaledown.run.atomic import check_writable, read_json


def cache_directory() -> Path:
    """Where downloads, converted weights and mirrors stay: `$SCALEDOWN_CACHE`, or the user's cache folder."""
    base = os.environ.get("SCALEDOWN_CACHE")
    if base:
        return Path(base)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "scaledown"


class Storage:
    """A folder here."""

    pauses: Sequence[float] = ()
    """Seconds before each further look at a file that seems to be damaged or not there yet."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def __str__(self) -> str:
        return str(self.root)

    def shown(self, path: Path) -> str:
        """How messages call a file."""
        return str(path)

    def address(self, path: Path) -> str:
        """What names a file from anywhere."""
        return str(path.resolve())

    def entries(self) -> list[str]:
        """What is in it, at the top."""
        return [entry.name for entry in self.root.iterdir()] if self.root.is_dir() else []

    def glob(self, folder: Path, pattern: str) -> list[Path]:
        """The files below `folder` that match, in order."""
        return sorted(folder.glob(pattern))

    def exists(self, path: Path) -> bool:
        """Whether there is such a file; of a store, a second ago."""
        return path.exists()

    def refresh(self, folder: Path) -> None:
        """Look at a folder anew before the next question about it."""

    def size(self, path: Path) -> int:
        """Its size in bytes."""
        return path.stat().st_size

    def state(self, path: Path) -> str:
        """What changes with a file, known without reading it; empty where there is none."""
        if not path.is_file():
            return ""
        found = path.stat()
        return f"{found.st_size} {found.st_mtime_ns}"

    def own(self, name: str) -> str:
        """The name under which this process appends to what all append to."""
        return name

    def logs(self, folder: Path, pattern: str) -> dict[Path, list[Path]]:
        """What grows in `folder` and matches, each with its `owned` files, seen by others or not yet."""
        return {path: [path] for path in self.glob(folder, pattern)}

    def owned(self, path: Path) -> list[Path]:
        """The files to which processes append, each by its `own` name, what belongs to `path`."""
        return [path] if path.exists() else []

    def send_log(self, path: Path) -> None:
        """Let others see all of a file that only grows."""

    def check_writable(self, output: Path, flag: str = "--output_file") -> None:
        """Find out before any work whether `output` can be written. Raises `OutputError`."""
        check_writable(output, flag)

    def publish(self, path: Path) -> None:
        """Let others see a file that is whole."""

    def fetch(self, path: Path, *, once: bool = False) -> bool:
        """Have the file here as others see it; gives whether it came just now.

        With `once` one that came before is not asked for again: it never changes.
        """
        return False

    def drop(self, path: Path) -> None:
        """Forget the copy that is here of a file in a store."""

    def fetch_log(self, path: Path) -> None:
        """Have all of a file here that only grows."""

    def read_json(self, path: Path) -> Any:
        """The content of a JSON file, or None where there is none or it is not JSON."""
        return read_json(path)

    def read(self, path: Path) -> bytes | None:
        """The content of a small file as it is now, or None where there is none."""
        try:
            return path.read_bytes()
        except FileNotFoundError:
            return None

    @contextlib.contextmanager
    def outline(self) -> Iterator[Path]:
        """A folder to look at: the names of all files, and what is in the small ones that tell of a run."""
        yield self.root

    def remove(self, path: Path) -> None:
        """Remove a file, if it is there."""
        path.unlink(missing_ok=True)

    # Among processes here locked files say who is at what; these are for those of other machines.

    def taken(self, note: Path) -> bool:
        """Whether a process of another machine, heard of within a minute, left `note`."""
        return False

    def take(self, note: Path) -> bool:
        """Publish `note` where there is none; gives False when another was quicker."""
        return True

    def give_back(self, note: Path) -> None:
        """Remove `note`, which this process left, unless another has taken its place."""
        self.remove(note)

    @contextlib.contextmanager
    def keeping(self, note: Path) -> Iterator[None]:
        """Let others hear all the while of the process that left `note`."""
        yield
