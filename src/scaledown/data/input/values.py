"""What is in a field of a record: whether it is there, as text, as an id, under which of some names."""

import math
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any


def is_full(value: Any) -> bool:
    """Whether a value is present: not null, not an empty text or list, and not NaN (a gap in a table)."""
    if isinstance(value, float):
        return not math.isnan(value)
    if isinstance(value, Decimal):
        return not value.is_nan()
    if isinstance(value, str):
        return bool(value.strip())
    return value is not None and value not in ([], {})


def value_of(record: Mapping[str, Any], keys: Sequence[str]) -> Any:
    """Return the first value under some names that is not empty.

    Args:
        record: The record.
        keys: The names, the most likely first.

    Returns:
        The value; if all are empty, an empty one, or None.
    """
    there = None
    for key in keys:
        value = record.get(key)
        if is_full(value):
            return value
        if there is None and value is not None and not isinstance(value, float | Decimal):
            there = value
    return there


def column_of(record: Mapping[str, Any], column: str) -> Any:
    """Return the value of the column that a flag gives; None if there is none.

    Args:
        record: The record.
        column: The name, in any case; dots reach into records.
    """
    for name in (column, column.lower()):
        if name in record:
            return record[name]
    value: Any = record
    for name in column.split("."):
        value = value.get(name, value.get(name.lower())) if isinstance(value, Mapping) else None
    return value


def has(record: Mapping[str, Any], column: str) -> bool:
    """Whether a record has the column of a flag, and something in it."""
    return is_full(column_of(record, column))


def as_text(value: Any) -> str | None:
    """Convert a value to a text.

    Args:
        value: A text, bytes or a number. A whole number in a float, as tables have it, is written without
            `.0`.

    Returns:
        The text; None for any other value.
    """
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return None
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if isinstance(value, float | Decimal):
        if not math.isfinite(value):
            return None
        return f"{int(value)}" if value == int(value) else f"{value}"
    return f"{value}" if isinstance(value, int) else None


def id_of(record: Mapping[str, Any], keys: Sequence[str]) -> str:
    """Return the id of a record; empty if it has none.

    Args:
        record: The record.
        keys: The names of columns with ids, the most likely first.

    Raises:
        ValueError: The id is not a text or number.
    """
    value = value_of(record, keys)
    if not is_full(value):
        return ""
    text = as_text(value)
    if text is None:
        raise ValueError(f"the id is {type(value).__name__}, expected a string or number")
    return text.strip()
