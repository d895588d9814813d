"""Input behind a URL, read as a stream: http and https by `requests`, s3 and others by fsspec.

Secrets in a URL (a login, a signed query) are used to read and are never shown or stored.
"""

import contextlib
import functools
import hashlib
import io
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, Final, NoReturn
from urllib.parse import unquote

from scaledown.errors import InputError, ScaleDownError
from scaledown.urls import (
    HIDDEN,
    HIDDEN_QUERY,
    HTTP,
    LOGIN,
    detail,
    file_system,
    http_status,
    redacted,
    refused,
    state_of,
    without_query,
)

if TYPE_CHECKING:
    import requests

log = logging.getLogger("scaledown")

_TIMEOUT_SECONDS: Final = 60
_BUFFER_BYTES: Final = 1 << 20


@dataclass(frozen=True)
class Remote:
    """A file or folder at a URL. Its `state` changes when the server reports another version."""

    url: str = field(repr=False)
    label: str
    size: int | None = None
    state: str = ""
    content_type: str = field(default="", compare=False)
    """The media type that the server reports; empty if it reports none."""
    files: tuple["Remote", ...] | None = None
    passed_over: Mapping[str, str] = field(default_factory=dict, compare=False)
    """For a folder: the files that are not read, and why."""
    _system: Any = field(default=None, repr=False, compare=False)

    def __str__(self) -> str:
        return self.label

    @property
    def path(self) -> PurePosixPath:
        """The part of the URL that names the file."""
        name = without_query(self.label)
        return PurePosixPath(unquote(name) if HTTP.match(name) else name)

    def is_dir(self) -> bool:
        """Whether it is a folder."""
        return self.files is not None

    def identity(self) -> str:
        """Changes when the server reports another version of a file; the file is not read for this.

        Where it has a state, a renewed signature of the same URL changes nothing.
        """
        parts = []
        for file in self.files or (self,):
            if not file.state:
                _warn_once(str(self))
            address = file.label if file.state else LOGIN.sub("://", file.url, count=1)
            parts.append(f"{address} {file.size} {file.state}")
        return hashlib.sha256("\n".join(parts).encode(errors="surrogateescape")).hexdigest()

    def open(self) -> io.BufferedReader:
        """Open it for reading, in order or not. Every failure while reading is an `InputError`."""
        fetch = _Http(self) if HTTP.match(self.url) else _Opened(self)
        return io.BufferedReader(_Raw(self, fetch), _BUFFER_BYTES)


@functools.cache
def _warn_once(label: str) -> None:
    log.warning("%s: the server sends neither ETag nor time, so changes of the file are not noticed", label)


def find_remote(url: str, what: str) -> Remote:
    """Find the file or folder at a URL.

    Args:
        url: The URL.
        what: The flag that gave it, for messages.

    Raises:
        InputError: There is none, it cannot be reached, or the URL was stored without its secrets.
        MissingExtraError: The URL needs a package that is not installed.
    """
    label = redacted(url)
    if url == label and (url.endswith(HIDDEN_QUERY) or f"://{HIDDEN}@" in url):
        raise InputError(
            f"{what} {label}: was stored without its secrets; give the flag again with the complete URL"
        )
    shown = f"{what} {label}"
    if HTTP.match(url):
        if without_query(label).endswith("/") or without_query(label).count("/") < 3:
            raise InputError(f"{shown}: a folder cannot be listed over http; give the URL of one file")
        import requests

        with _failures(shown, url), requests.Session() as session, _get(session, url, {}) as response:
            headers = response.headers
            kind = headers.get("Content-Type", "").lower()
            return Remote(url, label, _content_length(headers), state_of(headers), kind)
    with _failures(shown, url):
        system = file_system(url, shown)
        info = system.info(url)
        if info["type"] != "directory":
            return Remote(url, label, info.get("size"), state_of(info), _system=system)
        root = system._strip_protocol(url).rstrip("/")
        base, shown_base = url.rstrip("/"), label.rstrip("/")
        found = [(name.removeprefix(root), info) for name, info in system.find(url, detail=True).items()]
        files = tuple(
            Remote(base + name, shown_base + name, info.get("size"), state_of(info), _system=system)
            for name, info in sorted(found, key=lambda item: item[0])
            if info["type"] == "file"
        )
        return Remote(url, label, files=files)


def _content_length(headers: Mapping[str, str]) -> int | None:
    length = headers.get("Content-Length", "")
    return int(length) if length.isdigit() else None


def _get(session: "requests.Session", url: str, headers: Mapping[str, str]) -> "requests.Response":
    """Send a GET and do not read the body yet. HEAD would fail: many signed URLs allow only GET."""
    identity = {"Accept-Encoding": "identity"}  # so that positions and sizes refer to the file itself
    response = session.get(url, headers={**identity, **headers}, stream=True, timeout=_TIMEOUT_SECONDS)
    if not response.ok:
        response.close()
    response.raise_for_status()
    return response


def _changed(source: Remote) -> InputError:
    return InputError(f"{source}: changed while it was read; run the same command again")


class _Http:
    """A file over http: one request if it is read in order; else one request for each piece."""

    def __init__(self, source: Remote) -> None:
        import requests

        self._source = source
        self._session = requests.Session()
        self._response: requests.Response | None = None
        self._next = 0

    def __call__(self, start: int, length: int) -> bytes:
        if start == self._next:
            if self._response is None:
                self._response = self._get({})
            data: bytes = self._response.raw.read(length)
            self._next += len(data)
            return data
        with self._get({"Range": f"bytes={start}-{start + length - 1}"}) as response:
            if response.status_code != 206:
                raise InputError(
                    f"{self._source}: the server cannot send parts of files, which Parquet needs; "
                    "download the file and give its path"
                )
            piece: bytes = response.raw.read(length)
            return piece

    def _get(self, headers: Mapping[str, str]) -> "requests.Response":
        response = _get(self._session, self._source.url, headers)
        if state_of(response.headers) != self._source.state:
            response.close()
            raise _changed(self._source)
        return response

    def close(self) -> None:
        if self._response:
            self._response.close()
        self._session.close()


class _Opened:
    """A file that fsspec opened."""

    def __init__(self, source: Remote) -> None:
        with _failures(str(source), source.url):
            source._system.invalidate_cache()
            if state_of(source._system.info(source.url)) != source.state:
                raise _changed(source)
            self._file = source._system.open(source.url, "rb")
        self.close: Callable[[], None] = self._file.close

    def __call__(self, start: int, length: int) -> bytes:
        self._file.seek(start)
        data: bytes = self._file.read(length)
        return data


class _Raw(io.RawIOBase):
    """Makes a remote file a Python file object. If it ends before the known size, that is an error."""

    def __init__(self, source: Remote, fetch: _Http | _Opened) -> None:
        self._source = source
        self._fetch = fetch
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        if whence == io.SEEK_END and self._source.size is None:
            raise InputError(
                f"{self._source}: the server does not send the size, which Parquet needs; "
                "download the file and give its path"
            )
        self._at = offset + {io.SEEK_CUR: self._at, io.SEEK_END: self._source.size or 0}.get(whence, 0)
        return self._at

    def readinto(self, buffer: Any) -> int:
        size = self._source.size
        wanted = len(buffer) if size is None else min(len(buffer), size - self._at)
        if wanted <= 0:
            return 0
        with _failures(str(self._source), self._source.url, self._at):
            data = self._fetch(self._at, wanted)
            if not data and size is not None:
                raise EOFError(f"the file has {size:,} bytes")
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)

    def close(self) -> None:
        if not self.closed:
            self._fetch.close()
        super().close()


@contextlib.contextmanager
def _failures(shown: str, url: str, read: int | None = None) -> Iterator[None]:
    """Turn every failure of a file system into an `InputError` that does not show the secrets of `url`.

    `read` is how many bytes came before it. The cause is left out: its text, and its cause's, may have them.
    """
    try:
        yield
    except ScaleDownError:
        raise
    except Exception as error:
        _fail(shown, url, read, error)


def _fail(shown: str, url: str, read: int | None, error: Exception) -> NoReturn:
    told = http_status(error)
    if isinstance(error, FileNotFoundError) or told in {404, 410}:
        problem = "there is no such file; check the URL"
    elif refused(error):
        keys = "the login or signature in it" if HTTP.match(url) else "the keys in the environment"
        problem = f"access is refused; check the URL and {keys}"
    elif isinstance(told, int):
        problem = f"the server answers HTTP {told}; try again later"
    elif read is not None:
        problem = (
            f"the connection broke after {read:,} bytes ({detail(url, error)}); run the same command again, "
            "it continues"
        )
    elif "NameResolutionError" in str(error):
        problem = "the host is not found; check the URL"
    else:
        problem = f"cannot be reached ({detail(url, error)}); check the URL and the network"
    raise InputError(f"{shown}: {problem}") from None
