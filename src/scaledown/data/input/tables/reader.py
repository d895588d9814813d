"""Reads a file of rows: finds its format from its first bytes, ending and first lines, then its columns."""

import contextlib
import functools
import itertools
import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final

from scaledown.data.input import delimited, files, first_bytes, folders
from scaledown.data.input import rows as formats
from scaledown.data.input.files import ReadingMeter, Row, Source
from scaledown.data.input.tables.columns import check_doubled, find_columns, no_main
from scaledown.data.input.tables.delimited_text import (
    check_first_line,
    first_line,
    may_be_a_table,
    read_delimited,
)
from scaledown.data.input.tables.meaning import MANY_KEYS, Meaning, Reading, ReadTable
from scaledown.errors import InputError, one_line

log = logging.getLogger("scaledown")

READER_VERSION: Final = 1  # changes when delimited text is read in another way
_BEGINS: Final = re.compile(r"\s*(\[\s*[\[{]|[\[{]\s*[\r\n]\s*[\"\[{\]}])")
"""The start of a JSON value that has several lines."""
_SAMPLE_ROWS: Final = 200


def rows(
    source: Source, meaning: Meaning, column: str = "", meter: ReadingMeter | None = None
) -> Iterator[Row]:
    """Yield the rows of a file, with the columns that have a meaning. The log has one line about each file.

    Args:
        source: The file.
        meaning: The parts that are read: `CORPUS`, `QUERIES` or `GOLD`.
        column: The column of the main part, from the flag `meaning.flag`; if empty, it is found.
        meter: Receives the progress.

    Raises:
        InputError: The file has no known format, or it is not clear what its columns are.
    """
    with files.open_stream(source, meter) as stream:
        table = _found_table(source, stream, meaning, column, meter)
        if table.reading.format:
            _log_once(str(source), str(table.reading))
        yield from table.rows()


def version_of(sources: Iterable[Source]) -> dict[str, int]:
    """Return the version of the reader of tables, for the settings of a stage: rows depend on it.

    Args:
        sources: The files.

    Returns:
        The version, as `{"tables": number}`; empty if no file is CSV or TSV by its suffix.
    """
    tables = any(files.format_suffix(source) in folders.TABLES for source in sources)
    return {"tables": READER_VERSION} if tables else {}


def reading(source: Source, meaning: Meaning, column: str = "") -> Reading:
    """Find how a file is read.

    Args:
        source: The file.
        meaning: The parts that are read: `CORPUS`, `QUERIES` or `GOLD`.
        column: The column of the main part; if empty, it is found.

    Raises:
        InputError: The file has no known format, or it is not clear what its columns are.
    """
    with files.open_stream(source) as stream:
        return _found_table(source, stream, meaning, column, None).reading


@functools.cache
def _log_once(source: str, text: str) -> None:
    log.info("%s: %s", source, text)


def _found_table(  # noqa: PLR0911
    source: Source, stream: Any, meaning: Meaning, column: str, meter: ReadingMeter | None
) -> ReadTable:
    """Find the kind of a file from its first bytes, its ending and its first lines."""
    try:
        head = stream.peek()
    except OSError as error:
        raise files.damaged(source, 0, error) from error
    suffix = files.format_suffix(source)
    kind = first_bytes.binary_format(head)
    if kind == first_bytes.TOPICS:
        return _topics(source, stream, meaning, column)
    if kind or suffix == ".parquet":
        return _column_batches(source, stream, kind or first_bytes.PARQUET, meaning, column, meter)
    whole = len(head) < files.HEAD_BYTES
    text = head.rstrip(b"\0").decode("utf-8", "surrogateescape").lstrip("\ufeff")
    declared = delimited.DECLARED.match(text)
    if declared:
        suffix, text = ".tsv" if declared[1] == "\t" else ".csv", text[declared.end() :]
    if suffix in folders.LINES or _is_json(text, whole=whole) or _BEGINS.match(text):
        return _json_table(source, stream, text, meaning, column, certain=suffix in folders.LINES)
    is_table = suffix in folders.TABLES
    looked = text.strip() and (is_table or may_be_a_table(text, meaning, column))
    above = int(bool(declared))
    if looked and (
        found := read_delimited(source, stream, text, suffix, meaning, column, whole=whole, above=above)
    ):
        if not found.reading.header:
            check_first_line(source, text, meaning)
        return found
    check_first_line(source, text, meaning)
    if meaning.main != "text":
        reading = Reading("text, one question a line", {}, None, guessed=False)
        return ReadTable(reading, lambda: formats.line_rows(source, stream, column or meaning.main))
    if suffix in folders.TEXT:
        return ReadTable(Reading("", {}, None, guessed=False), lambda: formats.article(source, stream))
    if not text.strip():
        return ReadTable(Reading("", {}, None, guessed=False), lambda: iter(()))
    raise InputError(
        f"{source}: neither its ending nor its first line ({one_line(text.splitlines()[0], 60)}) says what "
        "it is; expected JSON lines, Parquet, Arrow, CSV or TSV, or the ending .txt for an article"
    )


def _is_json(text: str, *, whole: bool) -> bool:
    """Whether the first line is a JSON object."""
    first = first_line(text)
    if not first.startswith("{") or (first == text.strip() and not whole):
        return first.startswith('{"')
    try:
        formats.parse(Row("", 1, first.strip().encode("utf-8", "surrogateescape")))
    except ValueError:
        return False
    return True


def _json_table(
    source: Source, stream: Any, text: str, meaning: Meaning, column: str, *, certain: bool
) -> ReadTable:
    seen = []
    for line in re.split(r"[\r\n]+", text.strip())[:_SAMPLE_ROWS]:
        try:
            seen.append(formats.parse(Row("", 1, line.strip().encode("utf-8", "surrogateescape"))))
        except ValueError:
            if not seen:  # it may be one value on many lines
                break
    columns = find_columns(str(source), seen, meaning, column)
    reading = Reading("JSON lines", columns, None, guessed=not certain)
    return ReadTable(reading, lambda: formats.json_rows(source, stream))


def _column_batches(  # noqa: PLR0917
    source: Source, stream: Any, kind: str, meaning: Meaning, column: str, meter: ReadingMeter | None
) -> ReadTable:
    if files.is_compressed(stream):
        raise InputError(f"{source}: is a {kind} file that was compressed again; unpack it and give that")
    found = formats.batches(source, kind, meter)
    wanted = (
        meaning.read()
        | set(MANY_KEYS)
        | ({column.lower(), column.lower().partition(".")[0]} if column else set())
    )
    check_doubled(str(source), found.names, meaning, column)
    used = [name for name in found.names if name.lower() in wanted and found.names.count(name) == 1]
    if not used:
        raise no_main(str(source), found.names, meaning, column)
    rivals = {name for names in meaning.rivals.values() for name in names}
    beside = [name for name in found.names if name.lower() in rivals and found.names.count(name) == 1]
    looked = list(dict.fromkeys([*used, *beside]))
    again = itertools.islice(formats.batches(source, kind, None).read(looked), _SAMPLE_ROWS)
    seen = []
    for row in again:
        with contextlib.suppress(ValueError):  # the line is rejected when it is read
            seen.append(formats.parse(row))
    columns = find_columns(str(source), seen, meaning, column, found.names)
    reading = Reading(kind, columns, None, guessed=files.format_suffix(source) not in folders.BATCHES)
    return ReadTable(reading, lambda: found.read(used))


def _topics(source: Source, stream: Any, meaning: Meaning, column: str) -> ReadTable:
    if meaning.main != "question":
        raise InputError(f"{source}: holds TREC topics, which are questions, no corpus; give the documents")

    def named(row: Row) -> Row:
        content: Mapping[str, Any] = row.content if isinstance(row.content, dict) else {}
        order = (column.lower(),) if column else ("query", "title", "question", "desc", "description")
        key = next((name for name in order if content.get(name)), "")
        if not key:
            seen = ", ".join(content) or "none"
            return row._replace(problem=f"has no {' or '.join(order)}; its tags are {seen}")
        number = next((content[name] for name in ("num", "number", "id") if name in content), "")
        return row._replace(content={"id": number, column or "question": content[key]})

    columns = {"id": "num", "question": column or "title"}
    reading = Reading(first_bytes.TOPICS, columns, None, guessed=True)
    return ReadTable(reading, lambda: map(named, formats.topic_rows(source, stream)))


def of_records(name: str, given: Iterator[Row], meaning: Meaning, column: str) -> Iterator[Row]:
    """Yield the records of a data set; the first ones show which columns it has.

    Args:
        name: The data set, for messages.
        given: Its rows.
        meaning: The parts that are read.
        column: The column of the main part; if empty, it is found.

    Raises:
        InputError: It has no column of the main part.
    """
    first = list(itertools.islice(given, _SAMPLE_ROWS))
    seen = [row.content for row in first if isinstance(row.content, dict)]
    lower = [{str(key).lower(): value for key, value in record.items()} for record in seen]
    columns = find_columns(name, lower, meaning, column)
    _log_once(name, str(Reading("records", columns, None, guessed=False)))
    return itertools.chain(first, given)
