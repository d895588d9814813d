"""Corpus -> passages: KILT lines, JSONL, Parquet, CSV or text, read as a stream and cut into passages."""

import itertools
import json
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa

from scaledown.config import PrepareConfig
from scaledown.data import files
from scaledown.data.chunking import Chunker
from scaledown.errors import InputError, ModelError
from scaledown.models import ModelSource, loadable, loading
from scaledown.progress import track
from scaledown.records import Article, Block, Passage
from scaledown.store import Stage

log = logging.getLogger("scaledown")

ID_KEYS: Final = ("id", "_id", "doc_id", "docid", "wikipedia_id", "kilt_id")
TITLE_KEYS: Final = ("title", "wikipedia_title")
TEXT_KEYS: Final = ("text", "contents", "content", "body")
SCHEMA: Final = pa.schema([(name, pa.large_string()) for name in Passage._fields])
ARTICLES_AT_ONCE: Final = 16
_REJECTED_AT_ONCE: Final = 10_000


def sample_corpus() -> Path:
    """The corpus that ships with the project: about 60 short articles in KILT's format."""
    package = Path(__file__).parents[1]
    inside = package / "examples" / "corpus.jsonl"
    return inside if inside.exists() else package.parents[1] / "examples" / "corpus.jsonl"


def parse_article(record: dict[str, Any], fallback_id: str) -> Article:
    """An article from a record of any supported shape. Raises `ValueError` with the reason.

    KILT's `text` is a list of paragraphs whose first is the title; `facebook/kilt_wikipedia` has
    `text.paragraph`; other corpora have `text` as a string, its paragraphs on lines of their own.
    """
    doc_id = next((record[key] for key in ID_KEYS if record.get(key) not in (None, "")), fallback_id)
    title = next((record[key] for key in TITLE_KEYS if record.get(key)), "")
    text = next((record[key] for key in TEXT_KEYS if record.get(key) is not None), None)
    if not isinstance(doc_id, str | int):
        raise ValueError(f"the id is {type(doc_id).__name__}, expected a string or number")
    if not isinstance(title, str):
        raise ValueError(f"the title is {type(title).__name__}, expected a string")
    if isinstance(text, dict):
        text = text.get("paragraph")
    if text is None:
        raise ValueError(f"no text: expected one of {', '.join(TEXT_KEYS)}")
    paragraphs = text.splitlines() if isinstance(text, str) else text
    if not isinstance(paragraphs, list) or not all(isinstance(p, str) for p in paragraphs):
        raise ValueError("text must be a string or a list of strings")
    title = " ".join(title.split())
    if paragraphs and " ".join(paragraphs[0].split()) == title:
        paragraphs = paragraphs[1:]
    blocks = (parse_block(paragraph) for paragraph in paragraphs)
    return Article(str(doc_id), title, tuple(block for block in blocks if block.text))


def parse_block(paragraph: str) -> Block:
    """`Section::::History.:Variants.` is the heading `History: Variants`; `BULLET::::- x` the item `- x`."""
    text = paragraph.strip()
    if text.startswith("Section::::"):
        parts = text.removeprefix("Section::::").removesuffix(".").split(".:")
        return Block(": ".join(part.strip() for part in parts), is_heading=True)
    return Block(text.removeprefix("BULLET::::").strip())


def build_passages(stage: Stage, config: PrepareConfig, corpus: Path, retriever: ModelSource) -> None:
    """Cut the corpus into shards of about `passages_per_shard` passages, each of whole articles.

    Continues after the last whole shard. Raises `InputError` for a corpus that cannot be used.
    """
    if done := stage.done():
        files.Intake("the corpus", config.max_bad_fraction, done.counts["lines"], done.counts["bad"]).close()
        return
    with stage.lease("all", wait=True):
        if stage.done():
            return
        tokenizer = _tokenizer(retriever, config) if config.passages == "tokens" else None
        chunker = Chunker(tokenizer, config.passages, config.passage_tokens)
        rows: list[int] = []
        counts = {"lines": 0, "articles": 0, "passages": 0, "bad": 0, "empty": 0}
        while stage.has(len(rows)):
            table = stage.table(len(rows))
            rows.append(table.num_rows)
            counts = json.loads(table.schema.metadata[b"counts"])
        started = time.perf_counter()
        meter = files.Meter(files.input_files(corpus, "--corpus_path"))
        limit = config.max_corpus_size
        with track("passages", "passages", None, counts["passages"]) as tracker:
            for passages, now, rejected in _shards(corpus, meter, config, chunker, counts):
                counts = now
                stage.quarantine(f"{counts['lines']:012d}", rejected)
                if not passages:
                    continue
                columns = [list(column) for column in zip(*passages, strict=True)]
                metadata = {"counts": json.dumps(counts)}
                stage.write(
                    len(rows),
                    pa.table(columns, schema=SCHEMA.with_metadata(metadata)),
                    time.perf_counter() - started,
                )
                read = meter.fraction()
                tracker.advance(len(passages), max(read, counts["articles"] / limit) if limit else read)
                rows.append(len(passages))
                started = time.perf_counter()
        if not counts["passages"]:
            raise InputError(
                f"{corpus}: no article with text among {counts['lines']:,} lines; expected KILT lines, or "
                "id, title and text in each record"
            )
        stage.finish(rows, counts)


def _shards(
    corpus: Path, meter: files.Meter, config: PrepareConfig, chunker: Chunker, counts: dict[str, int]
) -> Iterator[tuple[list[Passage], dict[str, int], list[dict[str, Any]]]]:
    intake = files.Intake("the corpus", config.max_bad_fraction, counts["lines"], counts["bad"])
    articles, empty, total = counts["articles"], counts["empty"], counts["passages"]
    limit = config.max_corpus_size or None
    passages: list[Passage] = []

    def state() -> dict[str, int]:
        return {
            "lines": intake.rows,
            "articles": articles,
            "passages": total,
            "bad": intake.bad,
            "empty": empty,
        }

    every = itertools.chain.from_iterable(files.rows(path, meter) for path in meter.paths)
    rows = itertools.islice(every, counts["lines"], None)  # skipped rows are not even parsed
    while True:
        # Batches are cut by rows read, so that a run that continues makes the same ones.
        batch: list[Article] = []
        read = 0
        for row in () if limit and articles >= limit else rows:
            intake.rows += 1
            read += 1
            try:
                article = parse_article(files.parse(row), _name(corpus, row))
            except ValueError as error:
                intake.reject(row, str(error))
            else:
                articles += 1
                if article.blocks:
                    batch.append(article)
                else:
                    empty += 1
            if read == ARTICLES_AT_ONCE or (limit and articles >= limit):
                break
        for pieces in chunker.passages(batch):
            passages += pieces
            total += len(pieces)
        ended = read < ARTICLES_AT_ONCE or bool(limit and articles >= limit)
        if ended or len(passages) >= config.passages_per_shard:
            yield passages, state(), intake.take_rejected()
            passages = []
        elif len(intake.rejected) >= _REJECTED_AT_ONCE:
            yield [], state(), intake.take_rejected()
        if ended:
            intake.close()
            return


def _name(corpus: Path, row: files.Row) -> str:
    """An id for an article without one: its file within the corpus, and its line unless it fills the file."""
    path = Path(row.source)
    name = path.relative_to(corpus).as_posix() if corpus.is_dir() else path.name
    return f"{name}:{row.line}" if isinstance(row.content, bytes) or row.line > 1 else name


def _tokenizer(source: ModelSource, config: PrepareConfig) -> Any:
    from transformers import AutoTokenizer

    name, pinned = loadable(source)
    with loading(source):
        tokenizer = AutoTokenizer.from_pretrained(name, **pinned)
    if not tokenizer.is_fast:
        raise ModelError(f"model {source.name}: has no fast tokenizer, which --passages tokens needs")
    if config.passage_tokens + tokenizer.num_special_tokens_to_add() > tokenizer.model_max_length:
        log.warning(
            "--passage_tokens %s is above the %s tokens that %s reads: it will not see the ends of passages",
            config.passage_tokens,
            tokenizer.model_max_length,
            source.name,
        )
    tokenizer.model_max_length = 1 << 60  # no warnings about texts that are about to be cut
    return tokenizer


class PassageTable:
    """The passages of a finished stage by row number, memory-mapped: reading touches only what is asked."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self._ends = np.cumsum(stage.finished().rows)
        self._tables: dict[int, pa.Table] = {}

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, row: int) -> Passage:
        shard = int(np.searchsorted(self._ends, row, side="right"))
        if shard not in self._tables:
            self._tables[shard] = self._stage.table(shard)
        table = self._tables[shard]
        local = row - (int(self._ends[shard - 1]) if shard else 0)
        return Passage(*(table.column(name)[local].as_py() for name in Passage._fields))
