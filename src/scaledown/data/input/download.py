"""Training data behind a URL, fetched into the cache: training and evaluation go over it more than once."""

import logging
import os
from pathlib import Path
from typing import Final

from filelock import FileLock

from scaledown.config.options import OUTPUT_SUFFIXES
from scaledown.data.input.files import locate
from scaledown.data.input.remote import Remote
from scaledown.errors import InputError, OutputError
from scaledown.run.atomic import atomic
from scaledown.run.progress import track
from scaledown.run.storage import cache_directory
from scaledown.urls import check_exists, is_url

log = logging.getLogger("scaledown")

_PIECE_BYTES: Final = 1 << 22


def fetched(name: str, flag: str) -> Path:
    """Return the file of training data at a path or URL; a file at a URL is downloaded into the cache.

    It is downloaded again when its server reports another size, ETag or time, or reports none of them.

    Args:
        name: A path or a URL.
        flag: The flag that gave it, for messages.

    Raises:
        InputError: The file cannot be read, or is not training data by its suffix.
        OutputError: The cache cannot be written.
    """
    if not is_url(name):
        check_exists(name, flag)
        return Path(name)
    source = locate(name, flag)
    if not isinstance(source, Remote):
        return source
    if source.is_dir():
        raise InputError(f"{flag} {source}: is a folder; name a file in it")
    if source.path.suffix not in OUTPUT_SUFFIXES:
        raise InputError(f"{flag} {source}: training data ends in {', '.join(OUTPUT_SUFFIXES)}")
    known = bool(source.state) and source.size is not None
    if not known and int(os.environ.get("WORLD_SIZE", "1")) > 1:  # each process might get another
        raise InputError(
            f"{flag} {source}: the server sends no size, ETag or time; download the file and give its path"
        )
    path = cache_directory() / "files" / source.identity()[:16] / f"data{source.path.suffix}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_name(".lock")):
            if not known or not path.exists():
                _fetch(source, path)
                if locate(name, flag) != source:
                    path.unlink()
                    raise InputError(
                        f"{flag} {source}: changed while it was read; run the same command again"
                    )
    except OSError as error:
        raise OutputError(f"{path} cannot be written ({error.strerror}): set SCALEDOWN_CACHE") from error
    return path


def _fetch(source: Remote, path: Path) -> None:
    size = source.size or 0
    log.info("fetching %s into %s", source, path.parent)
    with (
        track("fetch", "kB", size // 1000 or None) as tracker,
        atomic(path, room=size) as temporary,
        source.open() as content,
        temporary.open("wb") as file,
    ):
        whole = 0
        while piece := content.read(_PIECE_BYTES):
            file.write(piece)
            tracker.advance((whole + len(piece)) // 1000 - whole // 1000)
            whole += len(piece)
