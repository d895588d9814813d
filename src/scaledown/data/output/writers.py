"""Writes training records as the guide's JSON, JSON lines or Parquet, in one step."""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from scaledown.data.input.corpus import PassageTable
from scaledown.data.input.training_files import (
    OutputFormat,
    output_format,
    read_json_lines,
    read_json_list,
    read_parquet,
)
from scaledown.data.output.columns import Columns
from scaledown.data.reranker.api import scaled
from scaledown.errors import OutputError
from scaledown.records import Example, full_text
from scaledown.run.atomic import atomic
from scaledown.run.stage import Stage

_ROW_GROUP: Final = 1000


def examples(
    answers: Stage, passages: Stage, score_scale: str | None, columns: Sequence[str] = ()
) -> Iterator[Example]:
    """The training records of a finished run, in the order of the queries.

    Args:
        answers: The stage of answers.
        passages: The stage of passages.
        score_scale: raw or sigmoid; None for records without `reranking_scores`.
        columns: Columns of the answers to add to the records.

    Yields:
        Training records.
    """
    for table in answers.tables():
        texts = PassageTable(passages)
        for record in table.to_pylist():
            found = [texts[row] for row in record["rows"]]
            example: Example = {
                "query": record["query"],
                "documents": [full_text(passage.title, passage.text) for passage in found],
                "answer": record["text"],
            }
            if score_scale:
                example["reranking_scores"] = [
                    scaled(score, score_scale) for score in record["reranking_scores"]
                ]
            extra = {name: record[name] for name in columns}
            yield {**example, **extra}  # type: ignore[typeddict-item]


def write_examples(path: Path, records: Iterable[Mapping[str, Any]], columns: pa.Schema | None = None) -> int:
    """Write training records in one step, in the format of the path's suffix.

    Args:
        path: The file to write. A symbolic link is kept, and its target is written.
        records: The records.
        columns: The columns of a Parquet file. Without them, the columns of the first 1,000 records are used,
            and other records must not have more.

    Returns:
        The number of records.

    Raises:
        OutputError: Parquet cannot hold a value.
    """
    with atomic(path.resolve()) as temporary:
        return output_format(path).write(temporary, records, columns)


def _write_json(path: Path, records: Iterable[Mapping[str, Any]], schema: pa.Schema | None) -> int:
    count = 0
    with path.open("wb") as file:
        file.write(b"[\n")
        for record in records:
            text = orjson.dumps(record, option=orjson.OPT_INDENT_2)
            file.write(b",\n  " if count else b"  ")
            file.write(text.replace(b"\n", b"\n  "))
            count += 1
        file.write(b"\n]\n")
    return count


def _write_json_lines(path: Path, records: Iterable[Mapping[str, Any]], schema: pa.Schema | None) -> int:
    count = 0
    with path.open("wb") as file:
        for record in records:
            file.write(orjson.dumps(record, option=orjson.OPT_APPEND_NEWLINE))
            count += 1
    return count


def _write_parquet(path: Path, records: Iterable[Mapping[str, Any]], schema: pa.Schema | None) -> int:
    source = iter(records)
    block = list(itertools.islice(source, _ROW_GROUP))
    schema = schema or _record_columns(block)
    count = 0
    try:
        with pq.ParquetWriter(path, schema, compression="zstd") as writer:
            while block:
                rows = [_fitted(record, schema) for record in block]
                writer.write_table(pa.Table.from_pylist(rows, schema=schema))
                count += len(block)
                block = list(itertools.islice(source, _ROW_GROUP))
    except pa.ArrowException as error:
        raise OutputError(
            f"Parquet cannot hold a record after the first {count:,} ({error}): write .json or .jsonl"
        ) from error
    return count


def _record_columns(records: Sequence[Mapping[str, Any]]) -> pa.Schema:
    columns = Columns()
    for record in records:
        if problem := columns.add(record):
            raise OutputError(f"{problem}, which Parquet cannot hold in one column: write .json or .jsonl")
    return columns.schema


def _fitted(record: Mapping[str, Any], schema: pa.Schema) -> dict[str, Any]:
    """A record with strings in all string columns. Raises `OutputError` for a column not in the schema."""
    fitted = dict(record)
    for name, value in record.items():
        if name not in schema.names:
            raise OutputError(
                f"column {name} is in some records, but not in the first {_ROW_GROUP:,}: write .jsonl"
            )
        if pa.types.is_string(schema.field(name).type) and not isinstance(value, str | None):
            fitted[name] = str(value)
    return fitted


JSON_FORMAT: Final = OutputFormat(_write_json, read_json_list)
JSONL_FORMAT: Final = OutputFormat(_write_json_lines, read_json_lines)
PARQUET_FORMAT: Final = OutputFormat(_write_parquet, read_parquet, needs_columns=True, builder="parquet")
