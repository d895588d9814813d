"""The stage `questions`: held-out records with their right answers."""

import itertools
import logging
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final, NamedTuple

import pyarrow as pa

from scaledown.data.input.gold import Gold
from scaledown.data.input.training_files import entries, unanswerable
from scaledown.errors import InputError
from scaledown.records import document_text, title_of
from scaledown.run.stage import Stage

log = logging.getLogger("scaledown")

_MESSAGES: Final = 5  # about unusable records; the others are counted
_QUESTION_COLUMNS: Final = pa.schema(
    {
        "query": pa.large_string(),
        "documents": pa.list_(pa.large_string()),
        "right": pa.list_(pa.large_string()),
        "article": pa.large_string(),
        "scores": pa.list_(pa.float64()),
    }
)


class Question(NamedTuple):
    """A question with its documents and right answers."""

    query: str
    documents: list[str]
    """Texts; a title is on the first line."""
    right: list[str]
    """Right answers, at least one."""
    article: str
    """The title of the first document, or the question itself. Questions on the same article are similar."""
    scores: list[float] | None
    """Relevance of each document by the teacher's reranker; None if the data has no scores."""


def collect_questions(
    stage: Stage, data: Path, load_gold: Callable[[], Gold] | None, *, limit: int, rows_per_shard: int
) -> None:
    """Keep the records of `data` that have a right answer.

    Args:
        stage: The stage to fill.
        data: A file of training records.
        load_gold: Loads right answers; without it the teacher's answers count as right.
        limit: Use only the first `limit` records; 0 for all.
        rows_per_shard: Questions in a shard.

    Raises:
        InputError: No record has a right answer.
    """
    if stage.done():
        return
    with stage.lease("all", wait=True):
        if stage.done():
            return
        counts = {"records": 0, "unusable": 0, "without_right_answer": 0}
        gold = load_gold() if load_gold else None
        source = _usable_questions(data, gold, limit, counts)
        rows: list[int] = []
        started = time.perf_counter()
        while block := list(itertools.islice(source, rows_per_shard)):
            columns = [list(column) for column in zip(*block, strict=True)]
            stage.write(len(rows), pa.table(columns, schema=_QUESTION_COLUMNS), time.perf_counter() - started)
            rows.append(len(block))
            started = time.perf_counter()
        if not counts["records"]:
            raise InputError(f"{data}: holds no records: make some with scaledown prepare")
        if not rows and counts["unusable"] == counts["records"]:
            raise InputError(f"{data}: no record can be asked: `scaledown validate {data}` says why")
        if not rows:
            way = "--gold FILE brings right answers"
            if gold is not None:
                way = "--gold is matched by the question's words: give the gold of these questions"
            raise InputError(f"{data}: none of {counts['records']:,} records has a right answer: {way}")
        stage.finish(rows, {"questions": sum(rows), **counts, **(gold.counts if gold else {})})


def _usable_questions(
    data: Path, gold: Gold | None, limit: int, counts: dict[str, int]
) -> Iterator[Question]:
    for entry in itertools.islice(entries(data), limit or None):
        counts["records"] += 1
        record = entry.record
        if wrong := unanswerable(entry):
            counts["unusable"] += 1
            if counts["unusable"] <= _MESSAGES:
                log.warning("%s:%s: %s; left out", data, entry.line, wrong)
            continue
        right = _right(record, gold)
        if not right:
            counts["without_right_answer"] += 1
            continue
        documents = [document_text(document) for document in record["documents"]]
        article = title_of(documents[0]) if documents else ""
        scores = _scores(record.get("reranking_scores"), len(documents))
        yield Question(record["query"], documents, right, article or record["query"], scores)


def _right(record: dict[str, object], gold: Gold | None) -> list[str]:
    """Return the right answers to a record. Values that are not valid text are left out."""
    if gold is not None:
        found = gold.answers(str(record["query"]))
    else:
        answer = record.get("answer")
        found = (answer,) if isinstance(answer, str) and answer.strip() else ()
    return [text for text in found if text.encode("utf-8", "ignore").decode() == text]


def _scores(given: object, documents: int) -> list[float] | None:
    """Return the scores if they are finite numbers, one for each document; else None."""
    if not isinstance(given, list) or len(given) != documents:
        return None
    valid = all(isinstance(score, int | float) and math.isfinite(score) for score in given)
    return [float(score) for score in given] if valid else None


def read_questions(stage: Stage, shard: int) -> list[Question]:
    """Return the questions of one shard.

    Args:
        stage: A stage that `collect_questions` has filled.
        shard: The number of the shard.
    """
    return [Question(**record) for record in stage.table(shard).to_pylist()]
