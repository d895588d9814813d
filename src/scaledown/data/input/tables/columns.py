"""Finds the column of each part by its name. If several fit, the error says how to choose."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

from scaledown.data.input.tables.meaning import EXAMPLE, MANY_KEYS, Meaning
from scaledown.data.input.values import has, is_full
from scaledown.errors import InputError, one_line

_COLUMNS_IN_MESSAGE: Final = 20  # columns in a message


def find_columns(
    shown: str,
    records: Sequence[Mapping[str, Any]],
    meaning: Meaning,
    column: str,
    names: Sequence[str] = (),
) -> dict[str, str]:
    """Find the column of each part in some records.

    Args:
        shown: The file or data set, for messages.
        records: The first records, with names in lower case.
        meaning: The parts.
        column: The column of the main part; if empty, it is found by its name.
        names: The names of all columns, for messages; if empty, those of the records.

    Returns:
        The name of the column, by the part.

    Raises:
        InputError: No record has the main part, or several columns may be it.
    """
    found: dict[str, str] = {}
    for part, keys in meaning.parts.items():
        if part == meaning.main and column:
            if not records or any(has(record, column) for record in records):
                found[part] = column
            continue
        full = {key for record in records for key in keys if is_full(record.get(key))}
        if key := next((key for key in keys if key in full), ""):
            found[part] = key
            if part == meaning.main:
                check_rivals(shown, records, meaning, key)
    seen = names or list(dict.fromkeys(str(name) for record in records for name in record))
    many = meaning.main == "question" and any(not set(MANY_KEYS).isdisjoint(record) for record in records)
    empty = any(key in record for record in records for key in meaning.parts[meaning.main])
    if records and meaning.main not in found and not many and (column or not empty):
        raise no_main(shown, seen, meaning, column)
    return found


def check_rivals(shown: str, records: Sequence[Mapping[str, Any]], meaning: Meaning, key: str) -> None:
    """Refuse a column as the question if another one may be the question: the file may be a corpus.

    Args:
        shown: The file or data set, for messages.
        records: The first records, with names in lower case.
        meaning: The parts; its `rivals` has the names in question.
        key: The column of the main part.

    Raises:
        InputError: Another column may be the question.
    """
    every = meaning.rivals.get(key, ())
    rivals = [name for name in every if any(is_full(record.get(name)) for record in records)]
    if rivals:
        raise InputError(
            f"{shown}: either of the columns {key} and {rivals[0]} may hold the question; "
            f"{_column_of_flag(meaning, key, 'question')}"
        )


def check_doubled(shown: str, names: Sequence[str], meaning: Meaning, column: str) -> None:
    """Refuse a column name that occurs several times, if a part is read from it.

    Args:
        shown: The file or data set, for messages.
        names: The names of all columns.
        meaning: The parts.
        column: The column of the main part, if a flag gives it; else empty.

    Raises:
        InputError: A part is read from a column whose name occurs several times.
    """
    for part, keys in meaning.parts.items():
        if part in meaning.unread:
            continue
        own = [name for key in keys for name in names if name.lower() == key]
        if part == meaning.main and column:
            own = [names[place] for place in places_of(column, names)]
        exact = [name for name in own if name.islower()] or own
        if exact and (many := names.count(exact[0])) > 1:
            raise InputError(
                f"{shown}: {many} columns are called {exact[0]}; the columns are {_listed(names)}; rename "
                "all but one"
            )


def no_main(shown: str, names: Sequence[str], meaning: Meaning, column: str) -> InputError:
    """Make the error for a table without the main part.

    Args:
        shown: The file or data set, for messages.
        names: The names of its columns.
        meaning: The parts.
        column: The column of the main part, if a flag gives it; else empty.
    """
    wanted = repr(column) if column else " or ".join(meaning.parts[meaning.main])
    return InputError(
        f"{shown}: no {meaning.main} under {wanted}; the columns are {_listed(names)}: "
        + (f"name one with {meaning.flag}" if meaning.flag else f"call one {meaning.main}, as in {EXAMPLE}")
    )


def _listed(names: Sequence[str]) -> str:
    shown = [one_line(name, 40) or "(no name)" for name in names[:_COLUMNS_IN_MESSAGE]]
    return ", ".join([*shown, *["…"] * (len(names) > _COLUMNS_IN_MESSAGE)]) or "none"


def _column_of_flag(meaning: Meaning, column: str, part: str) -> str:
    if meaning.flag:
        return f"name one with {meaning.flag}, as {meaning.flag} {column}"
    return f"call the right one {part}"


def places_of(column: str, names: Sequence[str]) -> list[int]:
    """Find the column that a flag gives.

    Args:
        column: A name, in any case, or a number from 1.
        names: The names of the columns.

    Returns:
        Indices of the columns with this name; empty if there is none.
    """
    exact = [place for place, name in enumerate(names) if name == column]
    found = exact or [place for place, name in enumerate(names) if name.lower() == column.lower()]
    if not found and (number := number_of(column)) and number <= len(names):
        return [number - 1]
    return found


def number_of(column: str) -> int:
    """Return the number if a flag gives one, as `2` or `column 2`; 0 if it gives a name."""
    number = re.fullmatch(r"(?:column )?([1-9]\d{0,3})", column)
    return int(number[1]) if number else 0
