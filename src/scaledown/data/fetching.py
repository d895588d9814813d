"""Training data behind a URL, fetched into the cache: training and evaluation go over it more than once."""

import functools
import logging
from pathlib import Path
from typing import Final

from filelock import FileLock

from scaledown.atomic import atomic
from scaledown.data.files import locate
from scaledown.data.remote import Remote
from scaledown.errors import InputError, OutputError
from scaledown.options import is_url
from scaledown.progress import track
from scaledown.storage import cache_directory

log = logging.getLogger("scaledown")

_PIECE_BYTES: Final = 1 << 22


@functools.cache
def fetched(name: str, flag: str) -> Path:
    """The file that a path or URL names, which `flag` gave; one behind a URL lies in the cache.

    It is fetched again when its server names another size, ETag or time, or tells none of these. Raises
    `InputError` where it cannot be read.
    """
    if not is_url(name):
        return Path(name)
    source = locate(name, flag)
    if not isinstance(source, Remote):
        return source
    if source.is_dir():
        raise InputError(f"{flag} {source}: is a folder; name a file in it")
    path = cache_directory() / "files" / source.identity()[:16] / f"data{source.path.suffix}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_name(".lock")):
            if not path.exists() or not source.state:
                _fetch(source, path)
    except OSError as error:
        raise OutputError(f"{path} cannot be written ({error.strerror}): set SCALEDOWN_CACHE") from error
    return path


def _fetch(source: Remote, path: Path) -> None:
    size = source.size or 0
    log.info("fetching %s into %s", source, path.parent)
    with (
        track("fetch", "MB", size // 1_000_000 or None) as tracker,
        atomic(path, room=size) as temporary,
        source.open() as content,
        temporary.open("wb") as file,
    ):
        whole = 0
        while piece := content.read(_PIECE_BYTES):
            file.write(piece)
            tracker.advance((whole + len(piece)) // 1_000_000 - whole // 1_000_000)
            whole += len(piece)
