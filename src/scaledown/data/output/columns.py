"""The Parquet columns of training records: the union of the columns of all records."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import pyarrow as pa

from scaledown.data.input.training_files import entries, problems
from scaledown.data.logprobs import LOGPROBS_TYPE
from scaledown.errors import InputError
from scaledown.run.progress import track

_LIST_OF_TEXTS: Final = pa.list_(pa.string())
_NEEDED: Final = {"query": pa.string(), "documents": _LIST_OF_TEXTS, "answer": pa.string()}
_OPTIONAL: Final = {
    "reranking_scores": pa.list_(pa.float64()),
    "query_id": pa.string(),
    "finish_reason": pa.string(),
    "problem": pa.string(),
    "groundedness": pa.float64(),
    "prompt_tokens": pa.int64(),
    "answer_tokens": pa.int64(),
    "prompt_hash": pa.string(),
    "second_answer": pa.string(),
    "agreement": pa.float64(),
    "answer_logprobs": LOGPROBS_TYPE,
}
_PLAIN: Final = {bool: pa.bool_(), float: pa.float64(), str: pa.string(), type(None): pa.null()}


class Columns:
    """The columns of the records added so far.

    Columns of the guide and of `--columns` have fixed types. The type of another column is widened so that it
    holds all values.
    """

    def __init__(self) -> None:
        self._own: dict[str, pa.DataType] = {}
        self._others: dict[str, pa.DataType] = {}

    def add(self, record: Mapping[str, Any]) -> str:
        """Add the columns of a record.

        Args:
            record: The record.

        Returns:
            The first conflict with earlier records; empty if there is none.
        """
        for name, value in record.items():
            if name in _NEEDED:
                continue
            fixed = _OPTIONAL.get(name)
            if fixed is not None:
                self._own[name] = fixed
                if name == "reranking_scores" or fixed in {pa.string(), LOGPROBS_TYPE}:
                    continue  # scores are checked with the record; other values are written as text
            known = fixed if fixed is not None else self._others.get(name, pa.null())
            try:
                kind = _PLAIN.get(type(value)) or pa.array([value]).type
                joined = kind if kind == known else _joined(known, kind)
            except (pa.ArrowException, ValueError, TypeError, OverflowError):
                return f"{name} holds values of several types"
            if joined is None or (fixed is not None and joined != fixed):
                return f"{name} is {kind} here and {known} in earlier records"
            if fixed is None:
                self._others[name] = joined
        return ""

    @property
    def schema(self) -> pa.Schema:
        """The columns of the guide, then the others in the order they were added."""
        own = {name: kind for name, kind in _OPTIONAL.items() if name in self._own}
        return pa.schema(_NEEDED | own | self._others)


def _joined(one: pa.DataType, other: pa.DataType) -> pa.DataType | None:
    """A type that holds the values of both types; None if there is none."""
    both = [pa.schema([("", kind)]) for kind in (one, other)]
    try:
        return pa.unify_schemas(both, promote_options="permissive").field(0).type
    except pa.ArrowException:
        return None


def columns_of_files(paths: Sequence[Path]) -> pa.Schema:
    """Return the columns of all records of training files.

    Args:
        paths: The files.

    Raises:
        InputError: Two records have values that one column cannot hold.
    """
    columns = Columns()
    with track("columns", "records", None) as tracker:
        for path in paths:
            for entry in entries(path):
                record = entry.record  # the reader of records reports other problems
                if isinstance(record, dict) and (problem := columns.add(record)) and not problems(record):
                    raise InputError(
                        f"{path}:{entry.line}: {problem}, which Parquet cannot hold in one column: correct "
                        "it, or write .json or .jsonl"
                    )
                tracker.advance()
    return columns.schema
