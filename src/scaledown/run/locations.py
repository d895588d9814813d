"""Where a path or URL leads that a flag names: to a folder here, or to one of an object store."""

from pathlib import Path
from typing import Final, NamedTuple

from scaledown.config.prepare import IndexConfig, PrepareConfig
from scaledown.errors import UsageError
from scaledown.run.object_store import mirrored
from scaledown.run.storage import Storage, cache_directory
from scaledown.urls import is_url, redacted

# Stores in which an object appears whole under its name, or not at all.
_SCHEMES: Final = ("s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "hf", "memory")


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
    if scheme not in _SCHEMES:
        raise UsageError(
            f"{redacted(name)}: {scheme}:// cannot hold it; use a local path, s3://, gs://, az:// "
            "or hf://buckets/"
        )
    parts = list(filter(None, rest.split("/")))
    on_hub = scheme == "hf"
    if on_hub and parts[:1] != ["buckets"]:
        raise UsageError(
            f"{redacted(name)}: each file would be a commit there; use a bucket, hf://buckets/OWNER/NAME/…, "
            "and `scaledown export --push_to_hub` for what is finished"
        )
    if len(parts) < (3 if on_hub else 1) or ".." in parts:
        raise UsageError(f"{redacted(name)}: name a bucket, and a folder in it")
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
