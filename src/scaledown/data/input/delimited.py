"""Delimited text (CSV, TSV): its dialect found from its first lines, its records read as a stream."""

import contextlib
import csv
import io
import itertools
import re
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Final, NamedTuple

DELIMITERS: Final = {"\t": "tab", ",": "comma", ";": "semicolon", "|": "bar"}
_MOST_CHARACTERS: Final = 1 << 24  # in a record; the reader takes several times as much
_NO_DELIMITER: Final = "\x1f"  # a delimiter that no text has: one column
_AGREEING_RECORDS: Final = 0.9  # if this share of records agrees, the other records are mistakes
_QUOTED: Final = re.compile(r'"(?:[^"]|"")*"')
_NUMBER_CELL: Final = re.compile(r"\s*[-+]?[\d.,]*\d\s*")
_CLOSED: Final = r'(?:^|{delimiter} *)"(?:[^"]|"")*"(?= *(?:{delimiter}|[\r\n]|\Z))'
DECLARED: Final = re.compile(r"\"?sep=([\t,;|])\"?[ \t,;|]*(?:\r\n?|\n)", re.IGNORECASE)
"""The line in which Excel names the delimiter; it is not a row."""


class Dialect(NamedTuple):
    """How a line is split into columns. Without a quote character, quotes are text, as in TREC's TSV."""

    delimiter: str
    """One character."""
    quote: str = ""
    """The quote character; empty for a text without quoting."""
    escape: str = ""
    """The character before a quote in a quoted cell; empty if such quotes are doubled."""
    quoted: frozenset[int] = frozenset()
    """Indices of columns whose cells are all in quotes, in a text without quoting, as in DPR's passages."""

    def __str__(self) -> str:
        return f"{DELIMITERS[self.delimiter]}-separated" if self.delimiter in DELIMITERS else "one column"

    def split(self, line: str) -> list[str]:
        """Split a line of a text without quoting. Cells of `quoted` columns lose their quotes."""
        cells = enumerate(line.split(self.delimiter))
        return [unquoted(cell, always=place in self.quoted) for place, cell in cells]

    def reader(self, lines: Iterable[str], *, spaces: bool = False) -> "Iterator[list[str]]":
        """Read the records in some lines.

        Args:
            lines: The lines with their ends.
            spaces: Keep the spaces before a field; with tabs as the delimiter they are always kept.

        Returns:
            The fields of each record. The iterator raises `csv.Error` at a quote that is not closed.
        """
        csv.field_size_limit(_MOST_CHARACTERS)
        return csv.reader(
            lines,
            delimiter=self.delimiter,
            quoting=csv.QUOTE_MINIMAL if self.quote else csv.QUOTE_NONE,
            quotechar=self.quote or None,
            doublequote=not self.escape,
            escapechar=self.escape or None,
            skipinitialspace=self.delimiter != "\t" and not spaces,
            strict=True,
        )


class FirstRecords(NamedTuple):
    """The first records of a file, read in a dialect."""

    dialect: Dialect
    """The dialect."""
    records: list[list[str]]
    """The fields of each record."""
    regular: float
    """The share of records that have as many fields as most, 0..1; 0 where a quote is not closed."""
    unclosed: int = 0
    """Lines with a quote that is not closed."""

    @property
    def width(self) -> int:
        """The most frequent number of fields in a record."""
        return _width(self.records)


def _width(records: Sequence[Sequence[str]]) -> int:
    widths = Counter(map(len, records))
    return max(widths, key=lambda width: (widths[width], width), default=0)


def samples(text: str, *, whole: bool) -> dict[str, FirstRecords]:
    """Read the first lines of a file with each delimiter, in the dialect that fits best.

    Args:
        text: The first lines.
        whole: Whether the text is the whole file. Otherwise its last record may be cut, and is left out.

    Returns:
        The records by delimiter.
    """
    lines = [line.lstrip("\ufeff") for line in _lines_with_ends(text)]
    return {
        delimiter: _best_dialect(lines, delimiter, whole=whole) for delimiter in (*DELIMITERS, _NO_DELIMITER)
    }


def _lines_with_ends(text: str) -> list[str]:
    """The lines of a text with their ends; `str.splitlines` knows more ends than a file has."""
    return re.findall(r"[^\r\n]*(?:\r\n|\r|\n)|[^\r\n]+\Z", text)


def _best_dialect(lines: Sequence[str], delimiter: str, *, whole: bool) -> FirstRecords:
    """The sample in the dialect that fits.

    A dialect is certain if the records, written in it, give the same text, and if this needs its quotes.
    Otherwise TSV has no quoting, unless its columns are regular only with it. Other text has doubled quotes,
    as Python and Excel write them, or a backslash before quotes, as MySQL and pandas' `escapechar` do.
    """
    kinds = [Dialect(delimiter, quote, escape) for escape in ("", "\\") for quote in "\"'"]
    found = [_sample(lines, kind, whole=whole) for kind in kinds]
    text = "".join(lines)
    plain = _unquoted_sample(text, delimiter, whole=whole)
    if len(plain.records) == 1 and not whole:
        return plain
    sure = []
    for one in found:
        joined = delimiter == "\t" and plain.regular == 1 and len(one.records) < len(plain.records)
        fits = one.regular >= found[0].regular and (not joined or text.startswith(one.dialect.quote))
        if one.regular and fits and _would_write(one, text):
            sure.append(one)
    if sure:
        return max(sure, key=lambda one: len(one.records))
    if delimiter == "\t" and plain.regular == 1:
        return plain
    likely = [plain, found[0]] if delimiter == "\t" else [*found, plain]
    closed = len(re.findall(_CLOSED.format(delimiter=re.escape(delimiter)), text, re.MULTILINE))
    if delimiter != "\t" and 0 < closed >= found[0].unclosed:  # quotes that are not closed are mistakes
        likely = found
    return max(likely, key=lambda one: min(one.regular, _AGREEING_RECORDS))


def _would_write(sample: FirstRecords, text: str) -> bool:
    """Whether a writer in this dialect reproduces the text, and needs quotes or escapes to do so."""
    delimiter, quote, escape, _ = sample.dialect
    if not re.search(rf"\\[{quote}{re.escape(delimiter)}\r\n]" if escape else quote, text):
        return False
    try:
        read = list(
            itertools.islice(sample.dialect.reader(_lines_with_ends(text), spaces=True), len(sample.records))
        )
    except csv.Error:
        return False
    end = next(iter(re.findall(r"\r\n|\r|\n", text)), "\n")
    text = text if text.endswith(("\r", "\n")) else text + end
    numbers = [
        [_WrittenNumber(cell) if _NUMBER_CELL.fullmatch(cell) else cell for cell in record] for record in read
    ]
    ways: list[tuple[Any, Sequence[Sequence[Any]]]]
    ways = [(csv.QUOTE_MINIMAL, read), (csv.QUOTE_ALL, read), (csv.QUOTE_NONNUMERIC, numbers)]
    for quoting, rows in [*ways, *([(csv.QUOTE_NONE, read)] if escape else [])]:
        written = io.StringIO()
        writer = csv.writer(
            written,
            delimiter=delimiter,
            quotechar=quote,
            escapechar=escape or None,
            doublequote=not escape,
            quoting=quoting,
            lineterminator=end,
        )
        with contextlib.suppress(csv.Error):
            writer.writerows(rows)
            if text.startswith(written.getvalue()):
                return True
    return False


class _WrittenNumber(float):
    """A number that is written as it was read."""

    def __new__(cls, text: str) -> "_WrittenNumber":
        number = super().__new__(cls, 0)
        number.text = text
        return number

    text: str

    def __str__(self) -> str:
        return self.text


def _sample(lines: Sequence[str], dialect: Dialect, *, whole: bool) -> FirstRecords:
    found: list[list[str]] = []
    unclosed = 0
    for _, _, fields in records(enumerate(lines, 1), dialect):
        if not isinstance(fields, csv.Error):
            found.append(fields)
        elif not whole and "unexpected end" in str(fields):  # the text is cut within a quote
            break
        else:
            unclosed += 1
    else:
        if not whole and len(found) > 1:
            found.pop()
    return _sample_of_records(dialect, found, unclosed)


def _sample_of_records(dialect: Dialect, found: list[list[str]], unclosed: int = 0) -> FirstRecords:
    width = _width(found)
    regular = sum(len(record) == width for record in found) / max(1, len(found) + unclosed)
    return FirstRecords(dialect, found, regular, unclosed)


def _unquoted_sample(text: str, delimiter: str, *, whole: bool) -> FirstRecords:
    """The sample of a text without quoting, its lines as `files.raw_lines` has them."""
    lines = [line for line in text.split("\n" if "\n" in text else "\r") if line.strip()]
    lines = [line.removesuffix("\r") for line in (lines if whole or len(lines) < 2 else lines[:-1])]
    columns: Counter[int] = Counter()
    for line in lines[1:]:  # the first may have names
        columns.update(place for place, cell in enumerate(line.split(delimiter)) if _QUOTED.fullmatch(cell))
    throughout = (place for place, count in columns.items() if count == len(lines) - 1 > 1)
    dialect = Dialect(delimiter, quoted=frozenset(throughout))
    return _sample_of_records(dialect, [dialect.split(line) for line in lines])


def records(
    lines: Iterable[tuple[int, str]], dialect: Dialect
) -> Iterator[tuple[int, str, list[str] | csv.Error]]:
    """Read records in a dialect with quoting.

    If a quote is not closed, only its line is lost: the lines that were searched for the closing quote are
    read again.

    Args:
        lines: Numbered lines with their ends.
        dialect: The dialect.

    Yields:
        Number and text of the line on which a record begins, and its fields; an error if its quote is not
        closed.
    """
    left = iter(lines)
    again: deque[tuple[int, str]] = deque()
    taken: list[tuple[int, str]] = []

    def take() -> Iterator[str]:
        while line := again.popleft() if again else next(left, None):
            taken.append(line)
            yield line[1]

    reader = dialect.reader(take())
    while True:
        taken.clear()
        fields: list[str] | csv.Error | None
        try:
            fields = next(reader, None)
        except csv.Error as error:
            fields = error
            again.extendleft(reversed(taken[1:]))
            reader = dialect.reader(take())
        if fields is None:
            return
        if fields:
            yield *taken[0], fields


def unquoted(cell: str, *, always: bool) -> str:
    """Return a cell of a table without quoting. Quotes around it are removed if it has doubled quotes inside.

    Args:
        cell: The cell.
        always: Remove quotes around the cell also if there are no doubled quotes inside it.
    """
    if cell[:1] == '"' and (always or '""' in cell[1:-1]) and _QUOTED.fullmatch(cell):
        return cell[1:-1].replace('""', '"')
    return cell
