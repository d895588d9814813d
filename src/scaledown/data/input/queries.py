"""Where queries come from: files, MS MARCO, QA datasets, or the teacher itself."""

import itertools
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import pyarrow as pa

from scaledown.config.prepare import PrepareConfig
from scaledown.data.input import files, tables, values
from scaledown.data.input.corpus import RENAMED
from scaledown.data.input.query_sources import named_dataset
from scaledown.data.input.rows import parse
from scaledown.data.input.seen import UniqueIds
from scaledown.errors import InputError
from scaledown.models.hub import hub_errors
from scaledown.records import Query
from scaledown.run.atomic import atomic
from scaledown.run.stage import Stage
from scaledown.run.storage import cache_directory
from scaledown.text import has_content, question_key

log = logging.getLogger("scaledown")

QUERY_SCHEMA: Final = pa.schema([("query_id", pa.large_string()), ("query", pa.large_string())])
MS_MARCO_QUERIES: Final = 6_980
UNREAD: Final = "evaluation_rows_unread"


def query_files(config: PrepareConfig, *, fetch: bool = True) -> list[files.Source]:
    """Return the files from which queries are read.

    Args:
        config: The run's settings.
        fetch: Download MS MARCO's queries if they are wanted; otherwise their file is left out.

    Raises:
        InputError: A file does not exist, or the download fails.
    """
    flag = "--queries_file"
    paths = [path for name in config.queries_file for path in files.sources(files.locate(name, flag), flag)]
    if config.download_ms_marco and fetch:
        paths.append(ms_marco(config.ms_marco_url))
    if config.query_dataset and Path(config.query_dataset).is_file():
        paths.append(Path(config.query_dataset))
    return paths


def ms_marco(url: str) -> Path:
    """Download MS MARCO's dev queries (`queries.dev.small.tsv`, 6,980 lines) once, and check them.

    Args:
        url: The address of the file.

    Returns:
        The file in the cache.

    Raises:
        InputError: The download fails, or the file is not this one.
    """
    import requests

    path = cache_directory() / "msmarco" / "queries.dev.small.tsv"
    by_hand = (
        "get queries.dev.small.tsv from the MS MARCO passage ranking page and pass it as "
        "--queries_file queries.dev.small.tsv, or give another --ms_marco_url"
    )
    if path.exists() and not _ms_marco_problem(path):
        return path
    log.info("downloading the MS MARCO dev queries from %s", url)
    with atomic(path) as temporary:
        try:
            with requests.get(url, stream=True, timeout=60) as response:
                response.raise_for_status()
                with temporary.open("wb") as file:
                    for chunk in response.iter_content(1 << 20):
                        file.write(chunk)
        except requests.RequestException as error:
            reason = type(error).__name__ if error.response is None else f"HTTP {error.response.status_code}"
            raise InputError(f"MS MARCO queries: download from {url} failed ({reason}); {by_hand}") from error
        if problem := _ms_marco_problem(temporary):
            raise InputError(f"MS MARCO queries: {url} gave a file with {problem}; {by_hand}")
    return path


def _ms_marco_problem(path: Path) -> str:
    """Return what is wrong with a file of MS MARCO dev queries; empty if it is correct."""
    try:
        columns = [len(line.split(b"\t")) for _, line in files.lines(path)]
    except InputError as error:
        return str(error)
    if len(columns) != MS_MARCO_QUERIES:
        return f"{len(columns):,} lines instead of {MS_MARCO_QUERIES:,}"
    return "" if set(columns) == {2} else "lines that are not qid<TAB>query"


LeftOut = Callable[[Sequence[str]], Sequence[dict[str, Any] | None]]
"""Returns for each query why it is left out, or None if it is kept. Gets the queries in order."""


def collect_queries(
    stage: Stage,
    config: PrepareConfig,
    synthetic: Stage | None,
    left_out: LeftOut | None = None,
    unread: Mapping[str, int] = MappingProxyType({}),
) -> None:
    """Read all queries into shards of `queries_per_shard`.

    Args:
        stage: The stage of queries: columns `query_id` and `query`.
        config: The run's settings.
        synthetic: The stage of questions that the teacher wrote; None to read files and datasets.
        left_out: Returns for each query why it is left out, or None if it is kept. Queries that are left out
            go to the quarantine and are counted by their `problem`.
        unread: Has the number of rows of evaluation files without a question as `unread`, after `left_out`
            was called.

    Raises:
        InputError: There is no query, all are left out, or there are too many malformed rows.
    """
    if done := stage.done():
        rows_read = sum(done.counts.get(name, 0) for name in ("queries", "bad", *_EXCLUSION_COUNTS.values()))
        files.Intake("the queries", config.max_bad_fraction, rows_read, done.counts["bad"]).close()
        return
    with stage.lease("all", wait=True):
        if stage.done():
            return
        intake = files.Intake("the queries", config.max_bad_fraction)
        if synthetic is None:
            given = itertools.chain(from_files(config, intake), from_dataset(config, intake))
        else:
            given = itertools.chain(_finished_questions(synthetic, config.num_synthetic_queries))
        ids = UniqueIds()
        source: Iterator[Query] = (
            query._replace(query_id=ids.own(query.query_id or f"q{number}"))
            for number, query in enumerate(given, 1)
        )
        counts: Counter[str] = Counter()
        if left_out:
            source = _kept(source, left_out, stage, counts)
        rows: list[int] = []
        started = time.perf_counter()
        while queries := list(itertools.islice(source, config.queries_per_shard)):
            columns = [list(column) for column in zip(*queries, strict=True)]
            stage.write(len(rows), pa.table(columns, schema=QUERY_SCHEMA), time.perf_counter() - started)
            rows.append(len(queries))
            started = time.perf_counter()
        stage.quarantine("all", intake.rejected)
        intake.close()
        if not rows and counts:
            raise InputError(
                f"all {counts.total():,} queries are left out: quarantine/ in the run directory says what "
                "each matches; give others, or other --decontaminate files"
            )
        if not rows:
            raise InputError("there are no queries in what was given: expected one query a line")
        named = {_EXCLUSION_COUNTS[problem]: count for problem, count in sorted(counts.items())}
        if ids.renamed:
            log.warning("%s queries have the id of another: told apart by #2, #3 …", f"{ids.renamed:,}")
            named[RENAMED] = ids.renamed
        if unread.get("unread"):
            named[UNREAD] = unread["unread"]
        stage.finish(rows, {"queries": sum(rows), "bad": intake.bad, **named})


_EXCLUSION_COUNTS: Final = {"contaminated": "contaminated", "duplicate": "duplicates"}
_LEFT_AT_ONCE: Final = 1 << 14


def _kept(queries: Iterator[Query], left_out: LeftOut, stage: Stage, counts: Counter[str]) -> Iterator[Query]:
    """Yield the queries that are kept; the others are counted and put into quarantine."""
    part = 0
    while block := list(itertools.islice(queries, _LEFT_AT_ONCE)):
        found = zip(block, left_out([query.text for query in block]), strict=True)
        left = []
        for query, why in found:
            if why is None:
                yield query
            else:
                left.append({"query_id": query.query_id, "query": query.text, **why})
                counts[why["problem"]] += 1
        stage.quarantine(f"left-out-{part:06d}", left)
        part += 1


def from_files(config: PrepareConfig, intake: files.Intake, *, fetch: bool = True) -> Iterator[Query]:
    """Yield the queries of the run's files.

    Args:
        config: The run's settings.
        intake: Counts rows, and receives malformed ones.
        fetch: Download MS MARCO's queries if they are wanted.

    Raises:
        InputError: A file cannot be read.
    """
    for path in query_files(config, fetch=fetch):
        yield from _from_records(
            tables.rows(path, tables.QUERIES, config.query_column), config.query_column, intake
        )


def _from_records(rows: Iterator[files.Row], column: str, intake: files.Intake) -> Iterator[Query]:
    for row in rows:
        intake.rows += 1
        try:
            yield _query(parse(row), column)
        except ValueError as error:
            intake.reject(row, str(error))


def _query(record: dict[str, Any], column: str) -> Query:
    """Return the query of a record, from `column` if it is given. Raises `ValueError`."""
    value = values.column_of(record, column) if column else values.value_of(record, tables.QUERY_KEYS)
    if isinstance(value, dict):
        value = value.get("text")
    text = values.as_text(value)
    if text is None and values.is_full(value):
        raise ValueError(f"the question is {type(value).__name__}, expected a string")
    if text is None or not text.strip():
        names = ", ".join(map(str, record)) or "none"
        wanted = repr(column) if column else " or ".join(tables.QUERY_KEYS)
        raise ValueError(
            f"no question under {wanted}; the columns are {names}: name one with {tables.QUERIES.flag}"
        )
    if not has_content(text):
        raise ValueError("holds no letter, digit or symbol")
    return Query(values.id_of(record, tables.QUERY_IDS), " ".join(text.replace("\ufeff", "").split()))


def from_dataset(config: PrepareConfig, intake: files.Intake) -> Iterator[Query]:
    """Yield the queries of the dataset given by `--query_dataset`.

    Args:
        config: The run's settings. Nothing is yielded if `query_dataset` is empty or a file.
        intake: Counts rows, and receives malformed ones.

    Raises:
        InputError: A local dataset does not have the split, or there is no column of the question.
        ModelError: The dataset cannot be found or read.
    """
    if not config.query_dataset or Path(config.query_dataset).is_file():
        return
    name, source, revision = named_dataset(config.query_dataset)
    with hub_errors(name, "dataset"):
        data: Any = source.load(config.query_split, revision)
        column = config.query_column or source.column
        columns = getattr(data, "column_names", None) or ()
        if column and column.partition(".")[0] in columns:
            ids = [key for key in tables.QUERY_IDS if key in columns]
            data = data.select_columns(list(dict.fromkeys([column.partition(".")[0], *ids])))
        rows = (files.Row(name, number, record) for number, record in enumerate(data, 1))
        yield from _from_records(tables.of_records(name, rows, tables.QUERIES, column), column, intake)


def dataset_size(config: PrepareConfig) -> int | None:
    """Return the number of rows of `--query_dataset`, or None if its source does not report it."""
    _, source, revision = named_dataset(config.query_dataset)
    return source.size(config.query_split, revision)


def _finished_questions(stage: Stage, wanted: int) -> list[Query]:
    """The first `wanted` different questions of a finished stage."""
    different: dict[str, str] = {}
    for table in stage.tables():
        for question in table.column("question").to_pylist():
            if question:
                different.setdefault(question_key(question), question)
    return [Query("", question) for question in itertools.islice(different.values(), wanted)]
