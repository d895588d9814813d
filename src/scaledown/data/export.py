"""Training records to a file: the guide's JSON, JSON lines or Parquet; complete or not there at all."""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Final

import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from scaledown.atomic import atomic
from scaledown.data.corpus import PassageTable
from scaledown.data.logprobs import ARROW
from scaledown.data.reranker import scaled
from scaledown.errors import OutputError
from scaledown.records import Example, full_text
from scaledown.stage import Stage

_BLOCK = 1000
_EXTRA: Final = {
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


def examples(
    answers: Stage, passages: Stage, score_scale: str | None, columns: Sequence[str] = ()
) -> Iterator[Example]:
    """The training records of a finished run, in the order of the queries.

    `score_scale` is raw or sigmoid, or None for records without `reranking_scores`; `columns` of the answers
    come behind the others.
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


def write_examples(path: Path, records: Iterable[Example]) -> int:
    """Write `records` atomically in the format that the ending of `path` names; gives their number.

    A symbolic link stays one: what it points to is written.
    """
    with atomic(path.resolve()) as temporary:
        if path.suffix == ".parquet":
            return _write_parquet(temporary, records)
        if path.suffix == ".jsonl":
            return _write_json(temporary, records, opening=b"", between=b"\n", closing=b"\n", indent=False)
        return _write_json(temporary, records, opening=b"[\n", between=b",\n", closing=b"\n]\n", indent=True)


def _write_json(
    path: Path, records: Iterable[Example], *, opening: bytes, between: bytes, closing: bytes, indent: bool
) -> int:
    count = 0
    with path.open("wb") as file:
        file.write(opening)
        for record in records:
            if count:
                file.write(between)
            if indent:
                text = orjson.dumps(record, option=orjson.OPT_INDENT_2)
                file.write(b"  " + text.replace(b"\n", b"\n  "))
            else:
                file.write(orjson.dumps(record))
            count += 1
        file.write(closing if count or indent else b"")
    return count


def _write_parquet(path: Path, records: Iterable[Example]) -> int:
    source = iter(records)
    block = list(itertools.islice(source, _BLOCK))
    fields = [
        pa.field("query", pa.string()),
        pa.field("documents", pa.list_(pa.string())),
        pa.field("answer", pa.string()),
    ]
    if any("reranking_scores" in record for record in block):
        fields.append(pa.field("reranking_scores", pa.list_(pa.float64())))
    fields += [pa.field(name, kind) for name, kind in _EXTRA.items() if any(name in row for row in block)]
    schema = pa.schema(fields)
    count = 0
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        while block:
            _check_columns(block, schema)
            writer.write_table(pa.Table.from_pylist(block, schema=schema))
            count += len(block)
            block = list(itertools.islice(source, _BLOCK))
    return count


def _check_columns(block: list[Example], schema: pa.Schema) -> None:
    """Fit extra columns of other origin to the schema. Raises `OutputError` for one that came late."""
    for record in block:
        for name, kind in _EXTRA.items():
            value = record.get(name)
            if value is None:
                continue
            if name not in schema.names:
                raise OutputError(
                    f"column {name} is in some records only, and the first {_BLOCK:,} lack it: write .jsonl"
                )
            if pa.types.is_string(kind) and not isinstance(value, str):
                record[name] = str(value)  # type: ignore[literal-required]
