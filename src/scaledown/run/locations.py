"""Where a path or URL leads that a flag names: to a folder here, or to one of an object store."""

from pathlib import Path
from typing import NamedTuple

from scaledown.config.prepare import IndexConfig, PrepareConfig
from scaledown.run.object_store import mirrored
from scaledown.run.storage import Storage, cache_directory
from scaledown.urls import check_store, is_url


class File(NamedTuple):
    """A file that a flag names: where it is here, and what keeps it."""

    path: Path
    storage: Storage

    def __str__(self) -> str:
        return self.storage.shown(self.path)

    @classmethod
    def at(cls, name: str, cache: str = "") -> "File":
        """The file that `name`, a path or a URL, names."""
        if not is_url(name):
            path = Path(name)
            return cls(path, Storage(path.parent))
        folder, _, own = name.rpartition("/")
        storage = storage_at(folder, cache)
        return cls(storage.root / own, storage)


def storage_at(name: str, cache: str = "") -> Storage:
    """What keeps the folder that `name`, a path or a URL, names; `cache` is where mirrors are.

    Raises `UsageError` for a URL whose store cannot hold it.
    """
    scheme, _, rest = name.partition("://")
    scheme = scheme.lower()
    if scheme in {"file", "local"} and rest:
        return Storage(Path(rest))
    if not is_url(name):
        return Storage(Path(name))
    check_store(name)
    return mirrored(f"{scheme}://{rest}", Path(cache).expanduser() if cache else cache_directory())


def output_of(config: PrepareConfig) -> File:
    """The training data that `config` names."""
    return File.at(config.output_file, config.cache_dir)


def run_of(config: PrepareConfig) -> Storage:
    """What keeps the stages of the run that `config` describes."""
    return storage_at(config.work_dir or config.output_file + ".work", config.cache_dir)


def index_of(config: IndexConfig) -> Storage:
    """What keeps the index, if `config.index_dir` names one."""
    return storage_at(config.index_dir, config.cache_dir)
