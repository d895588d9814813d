"""The rows of one file in each format: JSON lines, Parquet, Arrow, delimited text, TREC topics, plain text.

This module does not interpret columns. A malformed row keeps its line number and the reason.
"""

import csv
import html
import io
import json
import logging
import re
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple

import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from scaledown.data.input import delimited, files, first_bytes
from scaledown.data.input.delimited import Dialect
from scaledown.data.input.files import ReadingMeter, Row, Source
from scaledown.data.input.remote import Remote
from scaledown.errors import InputError

log = logging.getLogger("scaledown")

_NOT_FINITE: Final = re.compile(rb"\b(NaN|Infinity)\b")
_SURROGATE: Final = re.compile(rb"\\u[dD][89a-fA-F]")
_LARGEST_WHOLE_FLOAT: Final = 1 << 53  # from here on a float does not hold every whole number
_BATCH_ROWS: Final = 1024
_LONGEST_TOPIC: Final = 10_000  # lines
_TOPIC_START: Final = re.compile(
    r"\s*<top(?:ic)?(?=[\s>])(?:\s+(?:number|id|num)\s*=\s*[\"']([^\"']*)[\"'])?[^>]*>", re.I
)
_TOPIC_END: Final = re.compile(r"</top(ic)?>", re.I)
_FIELD: Final = re.compile(r"<(\w+)[^>]*>([^<]*)")
_TOPIC_LABEL: Final = re.compile(r"\s*(number|topic|title|description|narrative|domain|summary)\s*:", re.I)


def json_rows(path: Source, stream: io.BufferedReader) -> Iterator[Row]:
    """Yield the lines of a file of JSON lines, which are not parsed yet.

    Args:
        path: The file.
        stream: Its bytes, from `open_stream`.

    Raises:
        InputError: The file is one JSON array, or has a JSON value on several lines.
    """
    first = True
    for number, line in files.raw_lines(path, stream):
        if stripped := line.strip():
            if first and (stripped.startswith(b"[") or stripped == b"{"):
                held, program = (
                    ("one JSON array", ".[]") if stripped != b"{" else ("JSON of several lines", ".")
                )
                file, way = first_bytes.local_name(path)
                if files.is_compressed(stream):
                    file, way = file.with_suffix(""), f"{way}unpack it and "
                array, result = (shlex.quote(str(p)) for p in (file, file.with_suffix(".lines.jsonl")))
                raise InputError(
                    f"{path}: holds {held}; expected one record a line. "
                    f"{(way + 'convert it').capitalize()} with `jq -c '{program}' {array} > {result}`"
                )
            first = False
            for part in stripped.split(b"\r"):  # files with different line ends were joined
                if part.strip():
                    yield Row(str(path), number, part.strip())


def line_rows(path: Source, stream: io.BufferedReader, name: str) -> Iterator[Row]:
    """Yield the lines of a text that are not blank.

    Args:
        path: The file.
        stream: Its bytes, from `open_stream`.
        name: The column of the records that has the line.
    """
    for number, line in files.raw_lines(path, stream):
        for part in line.split(b"\r"):  # files with different line ends were joined
            if stripped := part.strip():
                yield Row(str(path), number, {name: stripped})


def article(path: Source, stream: io.BufferedReader) -> Iterator[Row]:
    """Yield a text as one row, with the name of its file as the title.

    Args:
        path: The file.
        stream: Its bytes, from `open_stream`.

    Raises:
        InputError: Compressed data is damaged.
    """
    try:
        text = stream.read()
    except OSError as error:
        raise files.damaged(path, 0, error) from error
    name = files.pure(path).stem.removesuffix(files.format_suffix(path))
    yield Row(str(path), 1, {"title": name, "text": text})


class ColumnFile(NamedTuple):
    """A file of columns."""

    names: list[str]
    """The names of its columns; a name may occur twice."""
    read: Callable[[Sequence[str]], Iterator[Row]]
    """Yields its rows, with the columns that are given."""


def batches(path: Source, kind: str, meter: ReadingMeter | None) -> ColumnFile:
    """Open a Parquet or Arrow file.

    Args:
        path: The file.
        kind: `first_bytes.PARQUET` or `ARROW`.
        meter: Receives the progress.

    Raises:
        InputError: The file is not complete.
    """
    return (_parquet if kind == first_bytes.PARQUET else _arrow)(path, meter)


def _parquet(path: Source, meter: ReadingMeter | None) -> ColumnFile:
    try:
        raw = path.open() if isinstance(path, Remote) else pa.OSFile(str(path))
        file = pq.ParquetFile(raw)
    except (pa.ArrowException, OSError) as error:
        raise _not_whole(path, "Parquet", error) from error
    total = max(1, file.metadata.num_rows)

    def read(columns: Sequence[str]) -> Iterator[Row]:
        number = 0
        if meter:
            meter.watch(path, lambda: number / total)
        try:
            with raw:
                for batch in file.iter_batches(batch_size=_BATCH_ROWS, columns=list(columns)):
                    for record in batch.to_pylist():
                        number += 1
                        yield Row(str(path), number, record)
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise _not_whole(path, "Parquet", error) from error

    return ColumnFile(file.schema_arrow.names, read)


def _arrow(path: Source, meter: ReadingMeter | None) -> ColumnFile:
    """An Arrow file (Feather 2), or a stream of batches, as `datasets` saves them."""
    try:
        raw = path.open() if isinstance(path, Remote) else pa.OSFile(str(path))
        magic = raw.read(6)
        raw.seek(0)
        if magic == b"ARROW1":
            file = pa.ipc.open_file(raw)
            schema, found = file.schema, (file.get_batch(n) for n in range(file.num_record_batches))
        else:
            stream = pa.ipc.open_stream(raw)
            schema, found = stream.schema, iter(stream)
    except (pa.ArrowException, OSError) as error:
        raise _not_whole(path, "Arrow", error) from error

    def read(columns: Sequence[str]) -> Iterator[Row]:
        number = 0
        if meter:
            size = max(1, files.size_of(path))
            meter.watch(path, lambda: 1.0 if raw.closed else raw.tell() / size)
        try:
            with raw:
                for batch in found:
                    for record in batch.select(list(columns)).to_pylist():
                        number += 1
                        yield Row(str(path), number, record)
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise _not_whole(path, "Arrow", error) from error

    return ColumnFile(schema.names, read)


def _not_whole(path: Source, kind: str, error: Exception) -> InputError:
    return InputError(f"{path}: is not a whole {kind} file ({error}); fetch or write it again")


class DelimitedColumns(NamedTuple):
    """The columns of a delimited text that are read."""

    names: Mapping[str, int]
    """Names in the records, and the places of their columns."""
    needed: str
    """The name of the column that each row must have."""
    width: int
    """Number of columns."""
    header: Sequence[str] | None
    """The cells of the header; None if there is none."""
    above: int = 0
    """Lines above the header that are not rows."""


def delimited_rows(
    path: Source, stream: io.BufferedReader, dialect: Dialect, columns: DelimitedColumns
) -> Iterator[Row]:
    """Yield the rows of a delimited text after its header.

    A row with the wrong number of columns or a quote that is not closed has a `problem`.

    Args:
        path: The file.
        stream: Its bytes, from `open_stream`.
        dialect: The dialect.
        columns: The columns that are read.

    Raises:
        InputError: The header cannot be read, or the file has lines with only NUL bytes.
    """
    found = _plain_records(path, stream, dialect) if not dialect.quote else _quoted(path, stream, dialect)
    least = columns.width if not dialect.quote else columns.names[columns.needed] + 1
    first = True
    for number, line, fields in found:
        if number <= columns.above:
            continue
        if first and columns.header is not None:
            if isinstance(fields, csv.Error):
                raise InputError(f"{path}: the header cannot be read ({fields}); correct its quotes")
            first = False
            continue
        problem = ""
        if isinstance(fields, csv.Error):
            problem = f"a quote is not closed properly ({fields})"
        elif columns.header is not None and fields == columns.header:
            log.warning("%s:%s: repeats the header; left out", path, number)
            continue
        elif any(cell.strip() for cell in fields[columns.width :]) or len(fields) < least:
            problem = f"has {len(fields)} columns, expected {columns.width}"
        if problem or isinstance(fields, csv.Error):
            yield Row(str(path), number, line.encode("utf-8", "surrogateescape").strip(), problem)
        elif any(cell.strip() for cell in fields):
            cells = {name: fields[place] for name, place in columns.names.items() if place < len(fields)}
            yield Row(str(path), number, cells)


def _plain_records(
    path: Source, stream: io.BufferedReader, dialect: Dialect
) -> Iterator[tuple[int, str, list[str]]]:
    """The records of a text without quoting: one on each line."""
    for number, raw in files.raw_lines(path, stream):
        line = raw.rstrip(b"\r").decode("utf-8", "surrogateescape")
        if line.strip():
            yield number, line, dialect.split(line)


def _quoted(
    path: Source, stream: io.BufferedReader, dialect: Dialect
) -> Iterator[tuple[int, str, list[str] | csv.Error]]:
    text = io.TextIOWrapper(stream, encoding="utf-8", errors="surrogateescape", newline="")
    numbered = ((number, line.lstrip("\ufeff")) for number, line in enumerate(text, 1))
    number = 0
    try:
        for number, line, fields in delimited.records(numbered, dialect):
            if line and not line.strip("\0\n"):
                raise InputError(
                    f"{path}: holds NUL bytes alone from line {number:,} on: a download or copy that did not "
                    "finish; fetch it again"
                )
            yield number, line, fields
    except OSError as error:
        raise files.damaged(path, number, error) from error


def topic_rows(path: Source, stream: io.BufferedReader) -> Iterator[Row]:
    """Yield TREC topics, old (`<num> Number: 301`) or XML (`<topic number="1">`), with a column for each tag.

    Args:
        path: The file.
        stream: Its bytes, from `open_stream`.
    """
    topic: list[str] = []
    begun = 0
    for number, raw in files.raw_lines(path, stream):
        line = raw.decode("utf-8", "surrogateescape")
        if _TOPIC_START.match(line):
            if topic:
                yield _topic(path, begun, topic)
            topic, begun = [], number
        if begun and len(topic) < _LONGEST_TOPIC:
            topic.append(line)
        if topic and _TOPIC_END.search(line):
            yield _topic(path, begun, topic)
            topic, begun = [], 0
    if topic:
        yield _topic(path, begun, topic)


def _topic(path: Source, number: int, lines: Sequence[str]) -> Row:
    text = "\n".join(lines)
    found: dict[str, Any] = {}
    if (start := _TOPIC_START.match(text)) and start[1]:
        found["num"] = start[1]
    for tag, value in _FIELD.findall(text):
        if said := html.unescape(_TOPIC_LABEL.sub("", value, count=1)).strip():
            found.setdefault(tag.lower(), said)
    return Row(str(path), number, found)


def parse(row: Row) -> dict[str, Any]:
    """Return the record of a row.

    Names are in lower case, unless two names would become one. Whole numbers keep all their digits.

    Args:
        row: The row.

    Raises:
        ValueError: The row is malformed; the message has the reason.
    """
    if row.problem:
        raise ValueError(row.problem)
    record = _record(row)
    lower = {name.lower(): value for name, value in record.items()}
    return lower if len(lower) == len(record) else record


def _record(row: Row) -> dict[str, Any]:
    if isinstance(row.content, bytes):
        record = _parsed_json(row.content)
        if not isinstance(record, dict):
            raise ValueError(f"expected a JSON object, found {type(record).__name__}")
        # orjson reads whole numbers of more than 64 bits as floats, which would change their digits.
        if any(type(value) is float and abs(value) >= _LARGEST_WHOLE_FLOAT for value in record.values()):
            record |= {name: value for name, value in json.loads(row.content).items() if type(value) is int}
        return record
    record = {}
    for key, value in row.content.items():
        clean = value
        if isinstance(value, bytes):
            clean = _decode(value)
        elif isinstance(value, str) and not value.isascii():
            clean = _decode(value.encode("utf-8", "surrogateescape"))
        record[key] = clean
    return record


def _parsed_json(content: bytes) -> Any:
    try:
        return orjson.loads(content)
    except orjson.JSONDecodeError as error:
        if _NOT_FINITE.search(content) and not _SURROGATE.search(content):
            try:  # as Python and pandas write NaN; it may be in a column that is not read
                return json.loads(content)
            except (ValueError, RecursionError):
                pass
        kind = "invalid UTF-8" if not _is_utf8(content) else "invalid JSON"
        raise ValueError(f"{kind} ({error})") from error


def _decode(content: bytes) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"invalid UTF-8 ({error.reason} at byte {error.start}): save it as UTF-8") from error


def _is_utf8(content: bytes) -> bool:
    try:
        content.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True
