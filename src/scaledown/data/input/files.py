"""Input files: where they are, their bytes without compression, and their lines, read as a stream."""

import contextlib
import io
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path, PurePath
from typing import Any, Final, NamedTuple, NoReturn

from scaledown.data.input import first_bytes, folders
from scaledown.data.input.remote import Remote, find_remote
from scaledown.errors import InputError
from scaledown.urls import check_exists, is_url, local

_CHUNK_BYTES: Final = 1 << 22
_MAX_LINE_BYTES: Final = 1 << 26
HEAD_BYTES: Final = 1 << 18
"""How much of the start of a file can be looked at without reading it twice."""
_BYTE_ORDER_MARK: Final = b"\xef\xbb\xbf"
_LONGEST_WINDOW: Final = 31  # of zstd, as a power of 2: what `zstd --ultra --long=31` writes

Source = Path | Remote


class Row(NamedTuple):
    """A row as it was read."""

    source: str
    """The file, for messages."""
    line: int
    """The number of its line or record, from 1."""
    content: bytes | dict[str, Any]
    """A line of bytes, or a record whose values may still be bytes."""
    problem: str = ""
    """Why it cannot be parsed, if this was found while it was read."""


class Intake:
    """Counts the rows of an input, keeps the rejected ones, and raises an error if too many are bad.

    Args:
        name: What the rows are, for messages.
        max_bad_fraction: The largest share of bad rows, 0 to 1.
        rows: Rows that an earlier run has read.
        bad: Rows that an earlier run has rejected.
    """

    def __init__(self, name: str, max_bad_fraction: float, rows: int = 0, bad: int = 0) -> None:
        self.name = name
        self.rows = rows
        self.bad = bad
        self.rejected: list[dict[str, Any]] = []
        self._first = ""
        self._max_bad_fraction = max_bad_fraction

    def reject(self, row: Row, reason: str) -> None:
        """Count a bad row, and keep it for the quarantine.

        Args:
            row: The row.
            reason: Why it cannot be used.
        """
        self.bad += 1
        content = row.content
        text = content.decode("utf-8", "backslashreplace") if isinstance(content, bytes) else repr(content)
        self.rejected.append(
            {"source": row.source, "line": row.line, "reason": reason, "content": text[:500]}
        )
        self._first = self._first or f"{row.source}, line {row.line}: {reason}"

    def take_rejected(self) -> list[dict[str, Any]]:
        """Return the rows rejected since the last call."""
        rejected, self.rejected = self.rejected, []
        return rejected

    def close(self) -> None:
        """At the end of the input: raise `InputError` when too many rows were bad."""
        if self.bad > self._max_bad_fraction * self.rows:
            example = f" ({self._first})" if self._first else ""
            raise InputError(
                f"{self.name}: {self.bad:,} of {self.rows:,} lines are malformed{example}, more than "
                f"--max_bad_fraction {self._max_bad_fraction:g} allows: correct them (quarantine/ in the run "
                "directory lists them) or raise the flag"
            )


def pure(source: Source | PurePath) -> PurePath:
    """Return the path of a file, or the path part of its URL."""
    return source.path if isinstance(source, Remote) else source


def format_suffix(source: Source | PurePath) -> str:
    """The ending that names the format, without that of the compression: `a.jsonl.gz` -> `.jsonl`."""
    return folders.inner_suffix(pure(source))


def locate(name: str, what: str) -> Source:
    """Find the file or folder at a path or URL.

    Args:
        name: A path or a URL.
        what: The flag that gave it, for messages. It also decides which files of a folder are read.

    Raises:
        InputError: There is no such file, it is a stream, or the folder has no file that is read.
        MissingExtraError: The URL needs a package that is not installed.
    """
    check_stream(name, what)
    if not is_url(local(name)):
        path = Path(local(name))
    else:
        remote = find_remote(name, what)
        if remote.files is None:
            return remote
        files: dict[PurePath, Remote] = {file.path.relative_to(remote.path): file for file in remote.files}
        found = folders.chosen(files, what)
        folders.log_unread_files(what, remote, found.passed_over)
        if not found.files:
            _no_data(remote, what)
        inside = tuple(files[name] for name in found.files)
        return replace(remote, files=inside, passed_over=found.passed_over)
    input_files(path, what)
    return path


def check_stream(name: str, what: str) -> None:
    """Check that a name is not a stream whose content can be read only once, such as a pipe.

    Args:
        name: A path.
        what: The flag that gave it, for messages.

    Raises:
        InputError: It is a stream.
    """
    if name == "-" or name.startswith(("/dev/", "/proc/self/fd/")):
        raise _read_once(f"{what} {name}".strip())


def _read_once(shown: str) -> InputError:
    return InputError(
        f"{shown}: is a stream that can be read only once, and a run reads its input again to know it and to "
        "continue; write it to a file and give that"
    )


def sources(source: Source, what: str) -> Sequence[Source]:
    """Return the files of an input.

    Args:
        source: A file or folder from `locate`.
        what: The flag that gave it.

    Returns:
        The files that are read, sorted.

    Raises:
        InputError: A local file or folder has no input any more.
    """
    return source.files or [source] if isinstance(source, Remote) else input_files(source, what)


def every(given: Sequence[Source], what: str) -> list[Source]:
    """Return the files of several inputs.

    Args:
        given: Files and folders from `locate`.
        what: The flag that gave them.

    Returns:
        The files in the given order, each once.
    """
    return list(dict.fromkeys(file for source in given for file in sources(source, what)))


def folders_of(given: Sequence[Source]) -> tuple[str, ...]:
    """Return the sources that are folders."""
    return tuple(str(source) for source in given if source.is_dir())


def input_files(path: Path, what: str) -> list[Path]:
    """Return the files of a local file or folder.

    Args:
        path: The file or folder.
        what: The flag that gave it.

    Returns:
        The files that are read, sorted.

    Raises:
        InputError: There are none, or a name is not valid Unicode.
    """
    check_exists(str(path), what)
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise InputError(f"{what} {str(path)!a}: the name is not valid Unicode; rename it") from None
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise _read_once(f"{what} {path}")
    found = folders.list_folder(path, what)
    folders.log_unread_files(what, path, found.passed_over)
    return [path / name for name in found.files] or _no_data(path, what)


def passed_over(source: Source, what: str) -> dict[str, str]:
    """Return the files of a folder that are not read.

    Args:
        source: A file or folder from `locate`.
        what: The flag that gave it.

    Returns:
        The reason for each file, by its path in the folder; empty for a file.
    """
    if isinstance(source, Remote):
        return dict(source.passed_over)
    return folders.list_folder(source, what).passed_over if source.is_dir() else {}


def _no_data(folder: Source, what: str) -> NoReturn:
    raise InputError(f"{what} {folder}: the folder holds none of {', '.join(sorted(folders.KNOWN))}")


class ReadingMeter:
    """Measures the progress of reading files one after the other.

    Args:
        paths: The files.
    """

    def __init__(self, paths: Sequence[Source]) -> None:
        self.paths = paths
        self._sizes = {path: size_of(path) for path in paths}
        self.size = sum(self._sizes.values())
        self._total = max(1, self.size)
        self._before = 0
        self._size = 0
        self._path: Source | None = None
        self._share: Callable[[], float] = float

    def watch(self, path: Source, share: Callable[[], float]) -> None:
        """Begin to measure a file. It is called by the reader of the file.

        Args:
            path: The file.
            share: Returns the share of it that has been read, 0 to 1.
        """
        if path != self._path:
            self._before += self._size
        self._path, self._size, self._share = path, self._sizes[path], share

    def fraction(self) -> float:
        """Return the share of all bytes that has been read, 0..1."""
        return (self._before + self._share() * self._size) / self._total


def size_of(source: Source) -> int:
    """Return the stored size of a file in bytes; 0 if the server does not report it."""
    return source.size or 0 if isinstance(source, Remote) else source.stat().st_size


def open_stream(path: Source, meter: ReadingMeter | None = None) -> io.BufferedReader:
    """Open a file for reading; it is decompressed if its first bytes are those of gzip, bzip2 or zstd.

    Args:
        path: The file.
        meter: Receives the progress.

    Returns:
        The bytes. The first `HEAD_BYTES` can be peeked at.

    Raises:
        InputError: The file cannot be read, or its first bytes show that it is not data.
    """
    raw: Any
    try:
        raw = path.open() if isinstance(path, Remote) else path.open("rb")
        kind = first_bytes.compression(raw.peek(first_bytes.SIZE))
        if meter:
            size = max(1, size_of(path))
            meter.watch(path, lambda: 1.0 if raw.closed else raw.tell() / size)
        filled: Any = _Filled(raw, _decompressor(raw, kind), kind)
        stream: io.BufferedReader = io.BufferedReader(filled, HEAD_BYTES)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error}); check that path") from error
    try:
        head = stream.peek()[: first_bytes.SIZE]
    except OSError as error:
        raise damaged(path, 0, error) from error
    first_bytes.check(path, head)
    if kind and (inner := first_bytes.compression(head)):
        raise InputError(f"{path}: is {inner} within {kind}; unpack it once and give that")
    return stream


def _decompressor(raw: Any, kind: str) -> Any:
    if kind == "gzip":
        import gzip

        return gzip.GzipFile(fileobj=raw)
    if kind == "bz2":
        import bz2

        return bz2.BZ2File(raw)
    if kind == "zstd":
        from backports import zstd

        return zstd.ZstdFile(raw, options={zstd.DecompressionParameter.window_log_max: _LONGEST_WINDOW})
    return raw


class _Filled(io.RawIOBase):
    """Fills each buffer, unless the data ends. Any error in compressed data is raised as `OSError`."""

    def __init__(self, raw: Any, inner: Any, kind: str) -> None:
        self._raw, self._inner, self.compression = raw, inner, kind

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return not self.compression

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return int(self._raw.seek(offset, whence))

    def readinto(self, buffer: Any) -> int:
        try:
            count = 0
            while count < len(buffer) and (data := self._inner.read(len(buffer) - count)):
                buffer[count : count + len(data)] = data
                count += len(data)
        except (InputError, OSError):
            raise
        except (EOFError, zlib.error, ValueError) as error:
            raise OSError(str(error)) from error
        except Exception as error:
            if self.compression != "zstd":  # this library has no error class of its own
                raise
            raise OSError(str(error)) from error
        return count

    def close(self) -> None:
        if not self.closed:
            with contextlib.suppress(OSError, ValueError):
                self._inner.close()
            self._raw.close()
        super().close()


def is_compressed(stream: io.BufferedReader) -> bool:
    """Whether the result of `open_stream` is decompressed while it is read."""
    return isinstance(stream.raw, _Filled) and bool(stream.raw.compression)


def damaged(path: Source, line: int, error: OSError) -> InputError:
    """Make the error for compressed data that ends early or is damaged.

    Args:
        path: The file.
        line: The last line that could be read.
        error: The error of the library.
    """
    return InputError(
        f"{path}: the compressed data is cut short or damaged after line {line:,} ({error}); "
        + ("put a whole file there" if isinstance(path, Remote) else "fetch the file again")
    )


def lines(path: Source, meter: ReadingMeter | None = None) -> Iterator[tuple[int, bytes]]:
    """Yield the lines of a file that are not blank, without white space around them.

    Args:
        path: The file.
        meter: Receives the progress.

    Yields:
        The number of a line, from 1, and the line.

    Raises:
        InputError: As for `open_stream` and `raw_lines`.
    """
    with open_stream(path, meter) as stream:
        for number, line in raw_lines(path, stream):
            if stripped := line.strip():
                yield number, stripped


def raw_lines(path: Source, stream: io.BufferedReader) -> Iterator[tuple[int, bytes]]:
    """Yield the lines of a file with the white space around them.

    A line ends with a line feed; if the start of the file has carriage returns and no line feeds, it ends
    with a carriage return. Byte order marks at the start of a line are removed.

    Args:
        path: The file, for messages.
        stream: Its bytes, from `open_stream`.

    Yields:
        The number of a line, from 1, and the line.

    Raises:
        InputError: Compressed data ends early, a line is too long, or a line has only NUL bytes.
    """
    number = 0
    rest = b""
    end = b""
    while True:
        try:
            chunk = stream.read(_CHUNK_BYTES)
        except OSError as error:
            raise damaged(path, number, error) from error
        end = end or (b"\r" if b"\r" in chunk and b"\n" not in chunk + stream.peek(1)[:1] else b"\n")
        pieces = (rest + chunk).split(end)
        rest = pieces.pop() if chunk else b""
        for piece in pieces:
            number += 1
            odd = piece[:3] == _BYTE_ORDER_MARK or piece[:1] == b"\0"
            yield number, _without_marks(path, number, piece) if odd else piece
        if not chunk:
            return
        if len(rest) > _MAX_LINE_BYTES:
            _without_marks(path, number + 1, rest[:HEAD_BYTES])
            raise InputError(
                f"{path}: line {number + 1:,} is longer than {_MAX_LINE_BYTES >> 20} MB; "
                "expected one record a line"
            )


def _without_marks(path: Source, number: int, line: bytes) -> bytes:
    """Remove the byte order marks before a line; each of several files that were joined may have one."""
    if line and not line.strip(b"\0"):
        raise InputError(
            f"{path}: holds NUL bytes alone from line {number:,} on: a download or copy that did not finish; "
            "fetch it again"
        )
    while line.startswith(_BYTE_ORDER_MARK):
        line = line.removeprefix(_BYTE_ORDER_MARK)
    return line
