"""Find the storage for the path or URL of a flag: a folder on a disk, or in an object store."""

from pathlib import Path
from typing import NamedTuple

from scaledown.config.index import IndexConfig
from scaledown.config.prepare import PrepareConfig
from scaledown.run.object_store import mirrored
from scaledown.run.storage import Storage, cache_directory
from scaledown.urls import check_store, is_url, local


class File(NamedTuple):
    """The file that a flag names."""

    path: Path
    """Its path on this disk; for a file in a store, the path in the mirror."""
    storage: Storage
    """The folder that it is in."""

    def __str__(self) -> str:
        return self.storage.shown(self.path)

    @classmethod
    def at(cls, name: str, cache: str = "") -> "File":
        """Return the file that a flag names.

        Args:
            name: A path or a URL.
            cache: The folder of mirrors; if empty, the one in `cache_directory`.

        Raises:
            UsageError: The URL cannot be written to, or does not name a folder.
        """
        if not is_url(name := local(name)):
            path = Path(name)
            return cls(path, Storage(path.parent))
        folder, _, own = name.rpartition("/")
        storage = storage_at(folder, cache)
        return cls(storage.root / own, storage)


def storage_at(name: str, cache: str = "") -> Storage:
    """Return the storage of a folder.

    Args:
        name: A path or a URL.
        cache: The folder of mirrors; if empty, the one in `cache_directory`.

    Raises:
        UsageError: The URL cannot be written to, or does not name a folder.
    """
    name = local(name)
    if not is_url(name):
        return Storage(Path(name))
    check_store(name)
    scheme, _, rest = name.partition("://")
    return mirrored(f"{scheme.lower()}://{rest}", Path(cache).expanduser() if cache else cache_directory())


def output_of(config: PrepareConfig) -> File:
    """Return the file of the training data."""
    return File.at(config.output_file, config.cache_dir)


def run_of(config: PrepareConfig) -> Storage:
    """Return the storage of the run directory."""
    return storage_at(config.work_dir or config.output_file + ".work", config.cache_dir)


def index_of(config: IndexConfig) -> Storage:
    """Return the storage of the index directory `config.index_dir`."""
    return storage_at(config.index_dir, config.cache_dir)
