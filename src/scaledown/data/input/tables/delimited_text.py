"""CSV and TSV: decides whether a text is a table; finds its delimiter, header and columns."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from scaledown.data.input import delimited, folders
from scaledown.data.input import rows as formats
from scaledown.data.input.delimited import FirstRecords
from scaledown.data.input.files import Source
from scaledown.data.input.tables.columns import check_doubled, check_rivals, no_main, number_of, places_of
from scaledown.data.input.tables.meaning import Meaning, Reading, ReadTable
from scaledown.data.input.tables.unnamed import NAME, main_column, may_be_names
from scaledown.data.input.tables.unnamed import places as places_of_parts
from scaledown.data.input.values import is_full
from scaledown.errors import InputError, one_line

_REGULAR_LINES: Final = 0.9  # if this share of the lines has the same number of columns, the text is a table
_ABOVE: Final = 10  # rows that are searched for names of columns if the first row has none


def read_delimited(  # noqa: PLR0917
    source: Source,
    stream: Any,
    text: str,
    suffix: str,
    meaning: Meaning,
    column: str,
    *,
    whole: bool,
    above: int,
) -> ReadTable | None:
    """Read a text as CSV or TSV, if its suffix, a header or tabs show that it is a table.

    Args:
        source: The file.
        stream: Its bytes, from `open_stream`.
        text: Its first lines, without the line that names the delimiter.
        suffix: The suffix of the format, with its dot.
        meaning: The parts.
        column: The column of the main part; if empty, it is found.
        whole: Whether `text` is the whole file.
        above: Lines at the start that are not in `text`.

    Returns:
        The table; None if the text is not a table.

    Raises:
        InputError: The columns of a table cannot be found.
    """
    is_table = suffix in folders.TABLES
    found = delimited.samples(text, whole=whole)
    if not is_table and not _looks_like_a_table(found, meaning, column):
        return None
    usual = "," if suffix == ".csv" else "\t"
    sample = _chosen_delimiter(found, usual, meaning, column)
    dialect, records = sample.dialect, sample.records
    if not records:
        return None
    parted = str(dialect) if sample.width > 1 else "one column"
    shown = f"{source}: {parted}"
    header = records[0] if _is_header(records[0], meaning, column) else None
    if header is None:
        _check_above(source, found, meaning)
    if header is not None:
        named = _named_columns(shown, header, meaning, column)
        columns = _of_header(shown, header, named, records[1:], meaning, column)
        needed, width = columns[meaning.main], len(header)
    else:
        places = _places_by_cells(shown, sample, meaning, column)
        columns = {part: f"column {place + 1}" for part, place in places.items()}
        needed, width = column or meaning.main, sample.width
        named = {
            needed if part == meaning.main else part: place
            for part, place in places.items()
            if part not in meaning.unread
        }
    reading = Reading(
        parted,
        columns,
        header is not None,
        guessed=header is None or dialect.delimiter != usual or not is_table,
    )
    wanted = formats.DelimitedColumns(named, needed, width, header, above)
    return ReadTable(reading, lambda: formats.delimited_rows(source, stream, dialect, wanted))


def may_be_a_table(text: str, meaning: Meaning, column: str) -> bool:
    """Whether the text may be a table: its first line has a tab, or a name of the main part.

    Args:
        text: The first lines of a file.
        meaning: The parts.
        column: The column of the main part, if a flag gives it; else empty.
    """
    first = first_line(text)
    main = {*meaning.parts[meaning.main], *([column.lower()] if column else [])}
    cells = (cell for delimiter in delimited.DELIMITERS for cell in first.split(delimiter))
    return "\t" in first or any(cell.strip(" \"'").lower() in main for cell in cells)


def _check_above(source: Source, found: Mapping[str, FirstRecords], meaning: Meaning) -> None:
    """Raise `InputError` if lines above the header would be read as rows."""
    sure = set(meaning.parts[meaning.main]) - set(meaning.rivals)
    for sample in found.values():
        for number, record in enumerate(sample.records[1:_ABOVE], 2):
            cells = [cell.strip() for cell in record]
            names = len(record) == sample.width > 1 and all(map(NAME.fullmatch, filter(None, cells)))
            if names and not sure.isdisjoint(_plain_names(cells)):
                raise InputError(
                    f"{source}: its row {number} ({', '.join(cells)}) looks like the names of columns; "
                    "delete the rows above it"
                )


def check_first_line(source: Source, text: str, meaning: Meaning) -> None:
    """Check that the first line does not name columns that the other lines do not have.

    Args:
        source: The file, for messages.
        text: Its first lines.
        meaning: The parts.

    Raises:
        InputError: It names such columns.
    """
    first = first_line(text)
    sure = set(meaning.parts[meaning.main]) - set(meaning.rivals)
    for delimiter, called in delimited.DELIMITERS.items():
        cells = [cell.strip() for cell in first.split(delimiter)]
        names = [cell.strip("\"'").lower() for cell in cells]
        short = all(map(NAME.fullmatch, names)) or all(re.fullmatch(r"(['\"]).*\1", cell) for cell in cells)
        if len(names) > 1 and short and not sure.isdisjoint(names):
            raise InputError(
                f"{source}: its first line has the columns {', '.join(names)}, {called}-separated, and other "
                "lines do not; correct its quotes"
            )


def _looks_like_a_table(found: Mapping[str, FirstRecords], meaning: Meaning, column: str) -> bool:
    """Whether a text has a header, or tabs in each line, although its ending is not that of a table."""
    for sample in found.values():
        first = sample.records[0] if sample.records else []
        sure = [name for name in _plain_names(first) if name in meaning.parts[meaning.main]]
        if len(first) == 1:
            sure = [name for name in sure if meaning.main == "question" and name not in meaning.rivals]
            sure = sure if len(sample.records) > 1 else []
        if meaning.main == "text" and sample.regular < _REGULAR_LINES:
            continue  # an article may begin with such a word
        if (sure or (len(first) > 1 and column.lower() in _plain_names(first))) and _is_header(
            first, meaning, column
        ):
            return True
    tabs = found["\t"]
    return tabs.regular == 1 and tabs.width > 1 and (meaning.main == "question" or len(tabs.records) > 1)


def _plain_names(cells: Sequence[str]) -> list[str]:
    return [cell.strip().lower() for cell in cells]


def _chosen_delimiter(
    found: Mapping[str, FirstRecords], usual: str, meaning: Meaning, column: str
) -> FirstRecords:
    """Choose the delimiter: with known column names, else with regular columns, else the usual one."""

    def sense(item: tuple[str, FirstRecords]) -> tuple[bool, bool, bool, bool, float, bool, int]:
        delimiter, sample = item
        header = bool(sample.records) and _is_header(sample.records[0], meaning, column)
        names = set(_plain_names(sample.records[0])) if sample.records else set()
        main = {*meaning.parts[meaning.main], *([column.lower()] if column else [])}
        regular = sample.regular >= _REGULAR_LINES and sample.width > 1
        codes = all(re.fullmatch(r"[\w.-]+", record[0].strip()) for record in sample.records)
        return (
            header and not names.isdisjoint(main),
            regular,
            regular and codes,
            delimiter == usual and regular,
            sample.regular,
            delimiter == usual,
            sample.width,
        )

    return max(found.items(), key=sense)[1]


def _is_header(cells: Sequence[str], meaning: Meaning, column: str) -> bool:
    """Whether the cells of the first line are names: one of them known, none of them a number."""
    names = _plain_names(cells)
    if column and column.lower() in names:
        return True
    numbers = any(re.fullmatch(r"[-+\d.,]+", name) for name in names)
    return not numbers and not meaning.known().isdisjoint(names)


def _named_columns(shown: str, header: Sequence[str], meaning: Meaning, column: str) -> dict[str, int]:
    """Return the index of each column whose name is known, and of the column that the flag names."""
    names = [name.strip() for name in header]
    flagged = places_of(column, names) if column else []
    check_doubled(shown, names, meaning, column)
    known = meaning.read()
    places: dict[str, int] = {}
    for place, name in enumerate(names):
        if place in flagged:
            places[column] = place
        elif name.lower() in known and names.count(name) == 1:
            places[name] = place
    if column not in places and (column or not _of_part(places, meaning, meaning.main)):
        raise no_main(shown, names, meaning, column)
    return places


def _of_part(names: Iterable[str], meaning: Meaning, part: str) -> list[str]:
    """Return the columns that may be a part; the clearest name comes first."""
    keys = meaning.parts[part]
    return sorted((name for name in names if name.lower() in keys), key=lambda name: keys.index(name.lower()))


def _of_header(  # noqa: PLR0917
    shown: str,
    header: Sequence[str],
    places: Mapping[str, int],
    records: Sequence[Sequence[str]],
    meaning: Meaning,
    column: str,
) -> dict[str, str]:
    """Find the column of each part by its name: the first with a cell that is not empty."""
    rows = [dict(zip((name.strip() for name in header), record, strict=False)) for record in records]
    columns = {}
    for part in meaning.parts:
        if part == meaning.main and column:
            columns[part] = column
        elif own := _of_part(dict.fromkeys(name.strip() for name in header), meaning, part):
            columns[part] = next(
                (name for name in own if any(is_full(row.get(name)) for row in rows)), own[0]
            )
    if not column:
        lower = [{name.lower(): cell for name, cell in row.items()} for row in rows]
        check_rivals(shown, lower, meaning, columns[meaning.main].lower())
    return columns


def _places_by_cells(shown: str, sample: FirstRecords, meaning: Meaning, column: str) -> dict[str, int]:
    """Find the places of the parts in a table without names, by the cells of the columns."""
    records, width = sample.records, sample.width
    first = [one_line(cell.strip(), 30) for cell in records[0]]
    number = number_of(column)
    if column and not number:
        raise no_main(shown, first, meaning, column)
    if number > width:
        raise InputError(f"{shown}, has {width} columns; {meaning.flag} {column} names none of them")
    if not number and may_be_names(records):
        if meaning.flag:
            place = main_column(_cells(records[1:], width), meaning.main)
            place = len(first) - 1 if place is None else place
            way = (
                f"give {meaning.flag} {first[place]} if it names columns, {meaning.flag} {place + 1} if it "
                "is a row"
            )
        else:
            way = f"write a first line that names a column {meaning.main}"
        raise InputError(f"{shown}, and its first line ({', '.join(first)}) may be a header or a row; {way}")
    cells = _cells(records, width)
    main = number - 1 if number else main_column(cells, meaning.main)
    if main is None:
        raise InputError(
            f"{shown}, no header, {width} columns ({', '.join(first)}): it is not clear which column is "
            f"the {meaning.main}; "
            + (
                f"give its number with {meaning.flag}, as {meaning.flag} {width}"
                if meaning.flag
                else f"write a first line that names a column {meaning.main}"
            )
        )
    return places_of_parts(cells, main, meaning.parts)


def _cells(records: Sequence[Sequence[str]], width: int) -> list[list[str]]:
    """Return the cells of each column that are not empty."""
    rows = [[cell.strip() for cell in record] for record in records if len(record) == width]
    return [[row[place] for row in rows if row[place]] for place in range(width)]


def first_line(text: str) -> str:
    """Return the first line that is not blank."""
    return text.strip().replace("\r", "\n").partition("\n")[0].strip()
