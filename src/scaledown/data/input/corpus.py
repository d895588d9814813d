"""Corpus -> passages: KILT lines, JSONL, Parquet, CSV or text, read as a stream and cut into passages."""

import functools
import itertools
import json
import logging
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import pyarrow as pa
from tokenizers import Tokenizer

from scaledown.config.index import IndexConfig
from scaledown.data.input import files, tables, values
from scaledown.data.input.chunking import Chunker
from scaledown.data.input.rows import parse
from scaledown.data.input.seen import UniqueIds
from scaledown.errors import InputError, ModelError
from scaledown.models.sources import ModelSource
from scaledown.models.weights import loadable, loading
from scaledown.records import Article, Block, Passage, full_text
from scaledown.run.executor import cores, map_in_order
from scaledown.run.progress import track
from scaledown.run.stage import Stage
from scaledown.urls import without_query

log = logging.getLogger("scaledown")

RENAMED: Final = "ids_made_unique"
_PASSAGE_COLUMNS: Final = tuple((name, pa.large_string()) for name in Passage._fields)
ROWS_AT_ONCE: Final = 16
_BYTES_WORTH_A_PROCESS: Final = 1 << 25
_REJECTED_AT_ONCE: Final = 10_000


def bundled_corpus() -> Path:
    """The corpus that ships with the project: about 60 short articles in KILT's format."""
    package = Path(__file__).parents[2]
    inside = package / "examples" / "corpus.jsonl"
    return inside if inside.exists() else package.parents[1] / "examples" / "corpus.jsonl"


def parse_article(record: dict[str, Any], fallback_id: str, column: str = "") -> Article:
    """Read an article from a record of any supported shape.

    KILT's `text` is a list of paragraphs whose first is the title; `facebook/kilt_wikipedia` has
    `text.paragraph`; other corpora have `text` as a string with a paragraph on each line.

    Args:
        record: A record from `parse`.
        fallback_id: The id of an article whose record has none.
        column: The column of the text; if empty, it is found by its name.

    Raises:
        ValueError: The record is not an article; the message has the reason.
    """
    doc_id = values.id_of(record, tables.DOCUMENT_IDS) or fallback_id
    given = values.value_of(record, tables.TITLE_KEYS)
    title = values.as_text(given) if values.is_full(given) else ""
    if title is None:
        raise ValueError(f"the title is {type(given).__name__}, expected a string")
    text = values.column_of(record, column) if column else values.value_of(record, tables.TEXT_KEYS)
    if isinstance(text, dict):
        text = text.get("paragraph")
    if text is None:
        wanted = column or f"one of {', '.join(tables.TEXT_KEYS)}"
        raise ValueError(f"no text: expected {wanted}; the columns are {', '.join(map(str, record))}")
    paragraphs = text.splitlines() if isinstance(text, str) else text
    if not isinstance(paragraphs, list) or not all(isinstance(p, str) for p in paragraphs):
        raise ValueError("text must be a string or a list of strings")
    title = " ".join(title.split())
    if paragraphs and " ".join(paragraphs[0].split()) == title:
        paragraphs = paragraphs[1:]
    blocks = (parse_block(paragraph) for paragraph in paragraphs)
    return Article(doc_id, title, tuple(block for block in blocks if block.text))


def parse_block(paragraph: str) -> Block:
    """`Section::::History.:Variants.` is the heading `History: Variants`; `BULLET::::- x` the item `- x`."""
    text = paragraph.strip()
    if text.startswith("Section::::"):
        parts = text.removeprefix("Section::::").removesuffix(".").split(".:")
        return Block(": ".join(part.strip() for part in parts), is_heading=True)
    return Block(text.removeprefix("BULLET::::").strip())


class Cut(NamedTuple):
    """A batch of rows, cut into passages."""

    passages: pa.Table
    """Columns as in `Passage`, and tokens: lists of token ids."""
    pieces: list[int]
    """Number of passages of each article; together the rows of the table."""
    rejected: list[tuple[files.Row, str]]
    """Rows without an article, each with the reason."""
    rows: int
    """Number of rows in the batch."""


def build_passages(
    stage: Stage,
    config: IndexConfig,
    corpus: Sequence[files.Source],
    retriever: ModelSource,
    check: Callable[[], None] = lambda: None,
) -> None:
    """Cut the corpus into shards of about `passages_per_shard` passages, each of whole articles.

    Several processes parse, cut and tokenise rows, at most one for each core. Continues after the last
    complete shard.

    Args:
        stage: The stage of passages.
        config: The settings.
        corpus: Files and folders, in order.
        retriever: The model whose tokenizer counts tokens.
        check: Called between batches; it may raise an error to stop the work.

    Raises:
        InputError: The corpus has no article with text, or too many malformed rows.
        ModelError: The model has no fast tokenizer.
    """
    if done := stage.done():
        files.Intake("the corpus", config.max_bad_fraction, done.counts["lines"], done.counts["bad"]).close()
        return
    with stage.lease("all", wait=True, check=check):
        if stage.done():
            return
        rows: list[int] = []
        counts = {"lines": 0, "articles": 0, "passages": 0, "bad": 0, "empty": 0}
        ids = UniqueIds()
        while stage.has(len(rows)):
            table = stage.table(len(rows))
            for doc_id, _ in itertools.groupby(table.column("doc_id").to_pylist()):
                ids.own(doc_id)
            rows.append(table.num_rows)
            counts = json.loads(table.schema.metadata[b"counts"])
        started = time.perf_counter()
        meter = files.ReadingMeter(files.every(corpus, "--corpus_path"))
        shown = ", ".join(map(str, corpus))
        limit = config.max_corpus_size
        with track("passages", "passages", None, counts["passages"], stage) as tracker:
            for passages, now, rejected in _shards(corpus, meter, config, retriever, counts, ids, check):
                stage.quarantine(f"{now['lines']:012d}", rejected)
                if not passages.num_rows:
                    counts = now
                    continue
                read = meter.fraction()
                share = max(read, now["articles"] / limit) if limit else read
                left = (now["passages"] / share - now["passages"]) / passages.num_rows if share else 0
                metadata = {"counts": json.dumps(now)}
                stage.write(
                    len(rows), passages.replace_schema_metadata(metadata), time.perf_counter() - started, left
                )
                counts = now
                tracker.advance(passages.num_rows, share)
                rows.append(passages.num_rows)
                started = time.perf_counter()
        if not counts["passages"]:
            raise InputError(
                f"{shown}: no article with text among {counts['lines']:,} lines; expected KILT lines, or "
                "id, title and text in each record"
            )
        if renamed := counts.get(RENAMED, 0):
            log.warning("%s: %s articles have the id of another: told apart by #2 …", shown, f"{renamed:,}")
        stage.finish(rows, counts)


def _shards(  # noqa: PLR0917
    corpus: Sequence[files.Source],
    meter: files.ReadingMeter,
    config: IndexConfig,
    retriever: ModelSource,
    counts: dict[str, int],
    ids: UniqueIds,
    check: Callable[[], None],
) -> Iterator[tuple[pa.Table, dict[str, int], list[dict[str, Any]]]]:
    """Yield the passages of each shard, the counts after it, and rejected rows; a table may be empty."""
    intake = files.Intake("the corpus", config.max_bad_fraction, counts["lines"], counts["bad"])
    articles, empty, total = counts["articles"], counts["empty"], counts["passages"]
    before = counts.get(RENAMED, 0) - ids.renamed
    limit = config.max_corpus_size
    waiting: list[pa.Table] = []
    nothing = pa.schema(_PASSAGE_COLUMNS).empty_table()

    def state() -> dict[str, int]:
        renamed = {RENAMED: before + ids.renamed} if before + ids.renamed else {}
        return {
            "lines": intake.rows,
            "articles": articles,
            "passages": total,
            "bad": intake.bad,
            "empty": empty,
            **renamed,
        }

    def shard() -> pa.Table:
        table = pa.concat_tables(waiting) if waiting else nothing
        waiting.clear()
        return table

    every = itertools.chain.from_iterable(
        tables.rows(path, tables.CORPUS, config.text_column, meter) for path in meter.paths
    )
    rows = itertools.islice(every, counts["lines"], None)  # skipped rows are not parsed
    # Batches are cut by rows read, so that a run that continues makes the same ones.
    batches = iter(lambda: list(itertools.islice(rows, ROWS_AT_ONCE)), [])
    processes = cutting_processes(meter.size)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = Path(folder) / "tokenizer.json"
        load_retriever_tokenizer(retriever, config).save(str(tokenizer))
        cutter = _Cutter(tokenizer, config, files.folders_of(corpus))
        enough = bool(limit) and articles >= limit  # the earlier run ended just before it recorded this
        for cut in map_in_order(cutter, () if enough else batches, processes):
            check()
            table, pieces = cut.passages, cut.pieces
            if limit and articles + len(pieces) >= limit:
                pieces = pieces[: limit - articles]
                table = table.slice(0, sum(pieces))
            articles += len(pieces)
            empty += pieces.count(0)
            total += table.num_rows
            intake.rows += cut.rows
            for row, reason in cut.rejected:
                intake.reject(row, reason)
            waiting.append(_with_own_ids(table, pieces, ids))
            if limit and articles >= limit:
                break
            if sum(part.num_rows for part in waiting) >= config.passages_per_shard:
                yield shard(), state(), intake.take_rejected()
            elif len(intake.rejected) >= _REJECTED_AT_ONCE:
                yield nothing, state(), intake.take_rejected()
    yield shard(), state(), intake.take_rejected()
    intake.close()


def _with_own_ids(table: pa.Table, pieces: list[int], ids: UniqueIds) -> pa.Table:
    """Return the passages of articles, with an id of its own for each article."""
    given = table.column("doc_id").to_pylist()
    places = [place for place, count in zip(np.cumsum([0, *pieces]), pieces, strict=False) if count]
    own = [ids.own(given[place]) for place in places]
    if own == [given[place] for place in places]:
        return table
    every = [name for name, count in zip(own, filter(None, pieces), strict=True) for _ in range(count)]
    passages = zip(every, given, table.column("passage_id").to_pylist(), strict=True)
    named = [name + passage.removeprefix(old) for name, old, passage in passages]
    for column, own_names in (("doc_id", every), ("passage_id", named)):
        place = table.column_names.index(column)
        table = table.set_column(place, column, pa.array(own_names, pa.large_string()))
    return table


def cutting_processes(size: int) -> int:
    """Return the number of processes that cut a corpus of `size` bytes."""
    return min(cores(), 1 + size // _BYTES_WORTH_A_PROCESS)


@dataclass(frozen=True)
class _Cutter:
    """Cuts batches of rows. It is small, since it is sent with each batch; each process makes one chunker."""

    tokenizer: Path
    config: IndexConfig
    folders: tuple[str, ...]

    def __call__(self, rows: list[files.Row]) -> Cut:
        chunker = _chunker(self.tokenizer, self.config.passages, self.config.passage_tokens)
        return cut_rows(rows, chunker, self.folders, self.config.text_column)


@functools.lru_cache(maxsize=1)
def _chunker(tokenizer: Path, mode: str, limit: int) -> Chunker:
    return Chunker(Tokenizer.from_file(str(tokenizer)), mode, limit)


def cut_rows(
    rows: list[files.Row], chunker: Chunker, folders: Sequence[str] = (), text_column: str = ""
) -> Cut:
    """Parse rows and cut their articles into passages.

    Args:
        rows: Rows from `tables.rows`.
        chunker: Cuts articles.
        folders: The folders of the corpus; an article without an id is named by its path in one of them.
        text_column: The column of the text; if empty, it is found by its name.
    """
    articles: list[Article] = []
    rejected: list[tuple[files.Row, str]] = []
    for row in rows:
        try:
            record = parse(row)
            articles.append(parse_article(record, _article_id(folders, row), text_column))
        except ValueError as error:
            rejected.append((row, str(error)))
    cut = chunker.passages(articles)
    every = [piece for pieces in cut for piece in pieces]
    columns: list[Any] = list(zip(*(passage for passage, _ in every), strict=True)) or [()] * 4
    lengths = np.array([0, *(len(ids) for _, ids in every)])
    flat = np.fromiter(
        itertools.chain.from_iterable(ids for _, ids in every), chunker.token_type, lengths.sum()
    )
    tokens = pa.LargeListArray.from_arrays(np.cumsum(lengths), pa.array(flat))
    arrays = [*(pa.array(column, pa.large_string()) for column in columns), tokens]
    return Cut(
        pa.Table.from_arrays(arrays, schema=pa.schema([*_PASSAGE_COLUMNS, ("tokens", tokens.type)])),
        [len(pieces) for pieces in cut],
        rejected,
        len(rows),
    )


def _article_id(folders: Sequence[str], row: files.Row) -> str:
    """An id for an article without one: its file within the corpus, and its line unless it fills the file."""
    path = Path(without_query(row.source))
    folder = next((one for one in folders if path.is_relative_to(one)), None)
    name = path.relative_to(folder).as_posix() if folder else path.name
    return f"{name}:{row.line}" if isinstance(row.content, bytes) or row.line > 1 else name


def load_retriever_tokenizer(source: ModelSource, config: IndexConfig) -> Tokenizer:
    """Load the retriever's tokenizer, without truncation or padding.

    Args:
        source: The model.
        config: The settings. There is a warning if `passage_tokens` is above the model's limit.

    Raises:
        ModelError: The tokenizer cannot be loaded, or is not a fast one.
    """
    from transformers import AutoTokenizer

    name, pinned = loadable(source)
    with loading(source):
        tokenizer = AutoTokenizer.from_pretrained(name, **pinned)
    if not tokenizer.is_fast:
        raise ModelError(f"model {source.name}: has no fast tokenizer, which cutting passages needs")
    if (
        config.passages == "tokens"
        and config.passage_tokens + tokenizer.num_special_tokens_to_add() > tokenizer.model_max_length
    ):
        log.warning(
            "--passage_tokens %s is above the %s tokens that %s reads: it will not see the ends of passages",
            config.passage_tokens,
            tokenizer.model_max_length,
            source.name,
        )
    return plain(tokenizer)


def plain(tokenizer: Any) -> Tokenizer:
    """Return the tokenizer inside a fast one, without truncation or padding."""
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_truncation()
    backend.no_padding()
    return backend


class PassageTable:
    """The passages of a finished stage by row number. Shards are memory-mapped when a row of them is read.

    Args:
        stage: The finished stage of passages, or the joined one of an index.
    """

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self._ends = np.cumsum(stage.finished().rows)
        self._tables: dict[int, pa.Table] = {}

    def __len__(self) -> int:
        return int(self._ends[-1])

    def same(self, rows: "np.ndarray[Any, Any]") -> dict[int, int]:
        """Find passages with the same text and title.

        Args:
            rows: Ascending row numbers, int64.

        Returns:
            For each of `rows`, the first row among them with the same text and title.
        """
        first: dict[str, int] = {}
        found = {}
        shards = np.searchsorted(self._ends, rows, side="right")
        for shard in np.unique(shards).tolist():
            own = rows[shards == shard]
            table = self._shard(shard).select(["title", "text"]).take(own - self._start(shard))
            for row, one in zip(own.tolist(), table.to_pylist(), strict=True):
                found[row] = first.setdefault(full_text(**one), row)
        return found

    def __getitem__(self, row: int) -> Passage:
        shard = int(np.searchsorted(self._ends, row, side="right"))
        table, local = self._shard(shard), row - self._start(shard)
        return Passage(*(table.column(name)[local].as_py() for name in Passage._fields))

    def _shard(self, shard: int) -> pa.Table:
        if shard not in self._tables:
            self._tables[shard] = self._stage.table(shard)
        return self._tables[shard]

    def _start(self, shard: int) -> int:
        return int(self._ends[shard - 1]) if shard else 0
