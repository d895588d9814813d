"""Input files as rows: JSON lines, Parquet, CSV, TSV, text; plain or compressed; streamed.

A malformed row is set aside with its line number and reason, never dropped silently.
"""

import csv
import io
import re
import shlex
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path, PurePath
from typing import Any, Final, NamedTuple, NoReturn
from urllib.parse import unquote, urlsplit

import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from scaledown.data.input import folders
from scaledown.data.input.remote import Remote, find
from scaledown.errors import InputError
from scaledown.urls import is_url

# bzip2: its three letters, a digit, and how a block begins (text may begin with the letters)
_MAGIC: Final = ((rb"\x1f\x8b", "gzip"), (rb"\x28\xb5\x2f\xfd", "zstd"), (rb"BZh[1-9]1AY&SY", "bz2"))
# Archives by their first bytes, and what unpacks them. An archive may itself be compressed.
_ARCHIVES: Final = (
    (rb".{257}ustar", "tar archive", "tar -xf"),
    (rb"PK\x03\x04|PK\x05\x06", "zip archive", "unzip"),
    (rb"\xfd7zXZ\x00", "xz file", "xz -dk"),
    (rb"7z\xbc\xaf\x27\x1c", "7z archive", "7z x"),
)
_CHUNK_BYTES: Final = 1 << 22
_MAX_LINE_BYTES: Final = 1 << 26

Source = Path | Remote


class Row(NamedTuple):
    """One row as read: `content` is a line of bytes, or a record with values that may still be bytes.

    `problem` says why it cannot be parsed, where reading showed that already.
    """

    source: str
    line: int
    content: bytes | dict[str, Any]
    problem: str = ""


class Intake:
    """Counts the rows of an input, keeps the rejected ones, and stops when too many are bad."""

    def __init__(self, name: str, max_bad_fraction: float, rows: int = 0, bad: int = 0) -> None:
        self.name = name
        self.rows = rows
        self.bad = bad
        self.rejected: list[dict[str, Any]] = []
        self._first = ""
        self._max_bad_fraction = max_bad_fraction

    def reject(self, row: Row, reason: str) -> None:
        """Set `row` aside, with the reason."""
        self.bad += 1
        content = row.content
        text = content.decode("utf-8", "backslashreplace") if isinstance(content, bytes) else repr(content)
        self.rejected.append(
            {"source": row.source, "line": row.line, "reason": reason, "content": text[:500]}
        )
        self._first = self._first or f"{row.source}, line {row.line}: {reason}"

    def take_rejected(self) -> list[dict[str, Any]]:
        """The rejected rows since the last call."""
        rejected, self.rejected = self.rejected, []
        return rejected

    def close(self) -> None:
        """At the end of the input: raise `InputError` when too many rows were bad."""
        if self.bad > self._max_bad_fraction * self.rows:
            example = f" ({self._first})" if self._first else ""
            raise InputError(
                f"{self.name}: {self.bad:,} of {self.rows:,} lines are malformed{example}, more than "
                f"--max_bad_fraction {self._max_bad_fraction:g} allows: mend them (quarantine/ in the run "
                "directory lists them) or raise the flag"
            )


def _pure(source: Source | PurePath) -> PurePath:
    return source.path if isinstance(source, Remote) else source


def inner_suffix(source: Source | PurePath) -> str:
    """The ending that names the format, without that of the compression: `a.jsonl.gz` -> `.jsonl`."""
    return folders.inner_suffix(_pure(source))


def locate(name: str, what: str) -> Source:
    """The file or folder that a path or URL names. Raises `InputError` when there is no input in it."""
    if not is_url(name):
        path = Path(name)
    elif name.lower().startswith("file://"):
        path = Path(unquote(urlsplit(name).path))
    else:
        remote = find(name, what)
        if remote.files is None:
            return remote
        files: dict[PurePath, Remote] = {file.path.relative_to(remote.path): file for file in remote.files}
        found = folders.chosen(files)
        folders.tell(what, remote, found.passed_over)
        if not found.files:
            _no_data(remote, what)
        inside = tuple(files[name] for name in found.files)
        return replace(remote, files=inside, passed_over=found.passed_over)
    input_files(path, what)
    return path


def sources(source: Source, what: str) -> Sequence[Source]:
    """The files behind what was located, sorted."""
    return source.files or [source] if isinstance(source, Remote) else input_files(source, what)


def input_files(path: Path, what: str) -> list[Path]:
    """The files behind a local file or folder, sorted. Raises `InputError` when there are none."""
    if not path.exists():
        raise InputError(f"{what} {path}: there is no such file; check the path")
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise InputError(f"{what} {str(path)!a}: the name is not valid Unicode; rename it") from None
    if path.is_file():
        return [path]
    found = folders.listed(path, what)
    folders.tell(what, path, found.passed_over)
    return [path / name for name in found.files] or _no_data(path, what)


def passed_over(source: Source, what: str) -> dict[str, str]:
    """What of a folder is not read, with the reasons; nothing of a file."""
    if isinstance(source, Remote):
        return dict(source.passed_over)
    return folders.listed(source, what).passed_over if source.is_dir() else {}


def _no_data(folder: Source, what: str) -> NoReturn:
    raise InputError(f"{what} {folder}: the folder holds none of {', '.join(sorted(folders.KNOWN))}")


class Meter:
    """How far reading `paths`, one after the other, has come."""

    def __init__(self, paths: Sequence[Source]) -> None:
        self.paths = paths
        self._sizes = {path: size_of(path) for path in paths}
        self.size = sum(self._sizes.values())
        self._total = max(1, self.size)
        self._before = 0
        self._size = 0
        self._share: Callable[[], float] = float

    def watch(self, path: Source, share: Callable[[], float]) -> None:
        """From now on `path` is read, and `share` tells how much of it was, 0..1."""
        self._before += self._size
        self._size, self._share = self._sizes[path], share

    def fraction(self) -> float:
        """The share of all bytes that was read, 0..1."""
        return (self._before + self._share() * self._size) / self._total


def size_of(source: Source) -> int:
    """Bytes of a file as it lies there; 0 where a server does not tell."""
    return source.size or 0 if isinstance(source, Remote) else source.stat().st_size


def open_stream(path: Source, meter: Meter | None = None) -> io.BufferedReader:
    """The bytes of a file, decompressed when its first bytes say so; `InputError` where they are no text."""
    raw: Any
    try:
        if isinstance(path, Remote):
            raw = path.open()
            head = raw.peek(16)
        else:
            with path.open("rb") as file:
                head = file.read(16)
            raw = pa.OSFile(str(path))
        compression = next((name for magic, name in _MAGIC if re.match(magic, head)), None)
        if meter:
            size = max(1, size_of(path))
            meter.watch(path, lambda: 1.0 if raw.closed else raw.tell() / size)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error}); check that path") from error
    stream = io.BufferedReader(pa.CompressedInputStream(raw, compression) if compression else raw)
    try:
        _check_text(path, stream.peek(512)[:512])
    except OSError as error:
        raise _damaged(path, 0, error) from error
    return stream


def _fetched(source: Source) -> tuple[Path, str]:
    """What a file is called on this machine, once it was fetched, and the words for doing that."""
    return (Path(source.path.name), "fetch it and ") if isinstance(source, Remote) else (source, "")


def _check_text(source: Source, head: bytes) -> None:
    """Refuse archives and UTF-16 by the first bytes of a file, saying how to convert them."""
    path, fetch = _fetched(source)
    quoted = shlex.quote(str(path))
    for magic, kind, command in _ARCHIVES:
        if re.match(magic, head, re.DOTALL):
            raise InputError(
                f"{source}: is a {kind}; {fetch}unpack it (`{command} {quoted}`) and give what was in it"
            )
    encoding = "UTF-16" if head.startswith((b"\xff\xfe", b"\xfe\xff")) else ""
    for name, high in (("UTF-16LE", head[1::2]), ("UTF-16BE", head[::2])):
        if high.count(0) * 2 > len(high):  # without a mark, Latin text shows by its NULs
            encoding = encoding or name
    if encoding:
        converted = shlex.quote(str(path.with_name(f"{path.stem}.utf8{path.suffix}")))
        raise InputError(
            f"{source}: is UTF-16; {fetch}convert it: `iconv -f {encoding} -t UTF-8 {quoted} > {converted}`"
        )


def _damaged(path: Source, line: int, error: OSError) -> InputError:
    return InputError(
        f"{path}: the compressed data is cut short or damaged after line {line:,} ({error}); "
        + ("put a whole file there" if isinstance(path, Remote) else "fetch the file again")
    )


def lines(path: Source, meter: Meter | None = None) -> Iterator[tuple[int, bytes]]:
    """Numbered non-blank lines. Raises `InputError` where compressed data ends early."""
    number = 0
    rest = b""
    with open_stream(path, meter) as stream:
        while True:
            try:
                chunk = stream.read(_CHUNK_BYTES)
            except OSError as error:
                raise _damaged(path, number, error) from error
            pieces = (rest + chunk).split(b"\n")
            rest = pieces.pop() if chunk else b""
            for piece in pieces:
                number += 1
                line = piece.strip()
                if line:
                    yield number, line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
            if not chunk:
                return
            if len(rest) > _MAX_LINE_BYTES:
                raise InputError(
                    f"{path}: line {number + 1:,} is longer than {_MAX_LINE_BYTES >> 20} MB; "
                    "expected one record a line"
                )


def rows(path: Source, meter: Meter | None = None) -> Iterator[Row]:
    """The records of one file, by its ending; an unknown ending is read as JSON lines."""
    suffix = inner_suffix(path)
    if suffix == ".parquet":
        yield from _parquet_rows(path, meter)
    elif suffix in {".csv", ".tsv"}:
        yield from _csv_rows(path, "," if suffix == ".csv" else "\t", meter)
    elif suffix in folders.TEXT:
        try:
            with open_stream(path, meter) as stream:
                content = {"title": _pure(path).stem.removesuffix(suffix), "text": stream.read()}
        except OSError as error:
            raise _damaged(path, 0, error) from error
        yield Row(str(path), 1, content)
    else:
        yield from _json_rows(path, meter)


def _json_rows(path: Source, meter: Meter | None) -> Iterator[Row]:
    first = True
    for number, line in lines(path, meter):
        if first and line.startswith(b"["):
            file, fetch = _fetched(path)
            array, result = (shlex.quote(str(p)) for p in (file, file.with_suffix(".lines.jsonl")))
            raise InputError(
                f"{path}: holds one JSON array; expected one record a line. "
                f"{(fetch + 'convert it').capitalize()} with `jq -c '.[]' {array} > {result}`"
            )
        first = False
        yield Row(str(path), number, line)


def _parquet_rows(path: Source, meter: Meter | None) -> Iterator[Row]:
    try:
        number = 0
        with path.open() if isinstance(path, Remote) else pa.OSFile(str(path)) as raw:
            file = pq.ParquetFile(raw)
            total = max(1, file.metadata.num_rows)
            if meter:
                meter.watch(path, lambda: number / total)
            for batch in file.iter_batches(batch_size=1024):
                for record in batch.to_pylist():
                    number += 1
                    yield Row(str(path), number, record)
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path}: is not a whole Parquet file ({error})") from error


def _csv_rows(path: Source, delimiter: str, meter: Meter | None) -> Iterator[Row]:
    with open_stream(path, meter) as stream:
        text = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="")
        header: list[str] | None = None
        number = 0
        try:
            for number, line, fields in _csv_records(text, delimiter):
                if isinstance(fields, csv.Error):
                    if header is None:
                        raise InputError(f"{path}: the header cannot be read ({fields}); mend its quotes")
                    content = line.encode("utf-8", "surrogateescape").strip()
                    yield Row(str(path), number, content, f"a quote is not closed properly ({fields})")
                elif header is None:
                    header = fields
                else:
                    record: dict[Any, Any] = dict(zip(header, fields, strict=False))
                    if len(fields) > len(header):
                        record[None] = fields[len(header) :]
                    yield Row(str(path), number, record)
        except OSError as error:
            raise _damaged(path, number, error) from error


def _csv_records(text: Iterable[str], delimiter: str) -> Iterator[tuple[int, str, list[str] | csv.Error]]:
    """Records with the number and text of the line they begin on.

    Where a quote is not closed, only its line is lost: those read in search of the end are read again.
    """
    csv.field_size_limit(_MAX_LINE_BYTES >> 2)  # the reader takes several times as much
    lines = enumerate(text, 1)
    again: deque[tuple[int, str]] = deque()
    taken: list[tuple[int, str]] = []

    def take() -> Iterator[str]:
        while line := again.popleft() if again else next(lines, None):
            taken.append(line)
            yield line[1]

    reader = csv.reader(take(), delimiter=delimiter, strict=True)
    while True:
        taken.clear()
        fields: list[str] | csv.Error | None
        try:
            fields = next(reader, None)
        except csv.Error as error:
            fields = error
            again.extendleft(reversed(taken[1:]))
            reader = csv.reader(take(), delimiter=delimiter, strict=True)
        if fields is None:
            return
        if fields:
            yield *taken[0], fields


def parse(row: Row) -> dict[str, Any]:
    """The record in a row, its names in lower case unless two would become one.

    Raises `ValueError` with the reason where it is malformed.
    """
    if row.problem:
        raise ValueError(row.problem)
    record = _record(row)
    lower = {name.lower(): value for name, value in record.items()}
    return lower if len(lower) == len(record) else record


def _record(row: Row) -> dict[str, Any]:
    if isinstance(row.content, bytes):
        try:
            record = orjson.loads(row.content)
        except orjson.JSONDecodeError as error:
            kind = "invalid UTF-8" if not _is_utf8(row.content) else "invalid JSON"
            raise ValueError(f"{kind} ({error})") from error
        if not isinstance(record, dict):
            raise ValueError(f"expected a JSON object, found {type(record).__name__}")
        return record
    record = {}
    for key, value in row.content.items():
        if key is None:
            raise ValueError("more fields than the header names")
        clean = value
        if isinstance(value, bytes):
            clean = _decode(value)
        elif isinstance(value, str) and not value.isascii():
            clean = _decode(value.encode("utf-8", "surrogateescape"))
        record[key] = clean
    return record


def _decode(content: bytes) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"invalid UTF-8 ({error.reason} at byte {error.start})") from error


def _is_utf8(content: bytes) -> bool:
    try:
        content.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True
