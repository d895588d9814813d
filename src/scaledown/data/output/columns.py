"""The columns of training records as Parquet has them: those of all records, whichever has them first."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import pyarrow as pa

from scaledown.data.input.training_files import entries, problems
from scaledown.data.logprobs import ARROW
from scaledown.errors import InputError
from scaledown.run.progress import track

_TEXTS: Final = pa.list_(pa.string())
_NEEDED: Final = {"query": pa.string(), "documents": _TEXTS, "answer": pa.string()}
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
    "answer_logprobs": ARROW,
}
_PLAIN: Final = {bool: pa.bool_(), float: pa.float64(), str: pa.string(), type(None): pa.null()}


class Columns:
    """Columns found so far: those of the guide and of `--columns` have fixed types, others grow to fit."""

    def __init__(self) -> None:
        self._own: dict[str, pa.DataType] = {}
        self._others: dict[str, pa.DataType] = {}

    def add(self, record: Mapping[str, Any]) -> str:
        """Take in the columns of a record; gives what does not fit those before it, empty where all does."""
        for name, value in record.items():
            if name in _NEEDED:
                continue
            fixed = _OPTIONAL.get(name)
            if fixed is not None:
                self._own[name] = fixed
                if name == "reranking_scores" or fixed in {pa.string(), ARROW}:
                    continue  # checked as a record; or written as text, whatever it is
            known = fixed if fixed is not None else self._others.get(name, pa.null())
            try:
                kind = _PLAIN.get(type(value)) or pa.array([value]).type
                joined = kind if kind == known else _joined(known, kind)
            except (pa.ArrowException, ValueError, TypeError, OverflowError):
                return f"{name} holds values of several kinds"
            if joined is None or (fixed is not None and joined != fixed):
                return f"{name} is {kind}, and {known} before"
            if fixed is None:
                self._others[name] = joined
        return ""

    @property
    def schema(self) -> pa.Schema:
        """The columns in the order of the guide, then as they came."""
        own = {name: kind for name, kind in _OPTIONAL.items() if name in self._own}
        return pa.schema(_NEEDED | own | self._others)


def _joined(one: pa.DataType, other: pa.DataType) -> pa.DataType | None:
    """The type that has the values of both; None where there is none."""
    both = [pa.schema([("", kind)]) for kind in (one, other)]
    try:
        return pa.unify_schemas(both, promote_options="permissive").field(0).type
    except pa.ArrowException:
        return None


def columns_of(paths: Sequence[Path]) -> pa.Schema:
    """The columns of all records of training files. Raises `InputError` where two do not fit."""
    columns = Columns()
    with track("columns", "records", None) as tracker:
        for path in paths:
            for entry in entries(path):
                record = entry.record  # one with other problems is for those who read it
                if isinstance(record, dict) and (problem := columns.add(record)) and not problems(record):
                    raise InputError(
                        f"{path}:{entry.line}: {problem}, which Parquet cannot hold in one column: mend it, "
                        "or write .json or .jsonl"
                    )
                tracker.advance()
    return columns.schema
