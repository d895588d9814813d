"""Corpus -> passages: KILT lines, JSONL, Parquet, CSV or text, read as a stream and cut into passages."""

import itertools
import json
import logging
import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import pyarrow as pa

from scaledown.config import PrepareConfig
from scaledown.data import files
from scaledown.errors import InputError, ModelError
from scaledown.models import ModelSource, hub_errors, loadable
from scaledown.progress import track
from scaledown.records import Article, Block, Passage, full_text
from scaledown.store import Stage

log = logging.getLogger("scaledown")

ID_KEYS: Final = ("id", "_id", "doc_id", "docid", "wikipedia_id", "kilt_id")
TITLE_KEYS: Final = ("title", "wikipedia_title")
TEXT_KEYS: Final = ("text", "contents", "content", "body")
SCHEMA: Final = pa.schema([(name, pa.large_string()) for name in Passage._fields])
ARTICLES_AT_ONCE: Final = 128

# A sentence ends at . ! ? … (and their full-width forms), with closing quotes or brackets, before white
# space. An abbreviation only adds a place where a passage may end; no text depends on it.
_SENTENCE_END: Final = re.compile(r"[.!?…]+[\"'”’»)\]]*\s+|[。！？]+[」』”’)]*\s*")


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


def sentences(text: str) -> list[tuple[int, int]]:
    """Character spans of the sentences of `text`; together they cover it without gaps."""
    ends = [match.end() for match in _SENTENCE_END.finditer(text)]
    if not ends or ends[-1] != len(text):
        ends.append(len(text))
    return list(itertools.pairwise([0, *ends]))


class _Span(NamedTuple):
    """A sentence, part of one, or a heading: where it stands in the article, and its number of tokens."""

    block: int
    start: int
    end: int
    tokens: int


class Chunker:
    """Cuts articles into passages. `tokenizer` is a fast transformers tokenizer.

    With `mode="tokens"`, title and text of a passage have at most `limit` tokens together; passages end
    at sentence ends where the text has them, begin with a paragraph where they can, keep a heading with what
    follows it, and never span articles. No text is lost.
    """

    def __init__(self, tokenizer: Any, mode: str, limit: int) -> None:
        self._tokenizer = tokenizer
        self._mode = mode
        self._limit = limit

    def passages(self, articles: Sequence[Article]) -> list[list[Passage]]:
        """The passages of each article, in reading order."""
        if self._mode != "tokens":
            return [_number(article, article.title, _whole(article, self._mode)) for article in articles]
        titles = [self._carried_title(article.title) for article in articles]
        offsets = iter(self._offsets([block.text for article in articles for block in article.blocks]))
        pieces: list[list[str]] = []
        for article, title in zip(articles, titles, strict=True):
            spans = [next(offsets) for _ in article.blocks]
            pieces.append(self._pack(article, spans, self._limit - self._count([title])[0]))
        self._split_overlong(titles, pieces)
        return [
            _number(article, title, texts)
            for article, title, texts in zip(articles, titles, pieces, strict=True)
        ]

    def _count(self, texts: list[str]) -> list[int]:
        if not texts:
            return []
        encoded = self._tokenizer(
            texts, add_special_tokens=False, return_attention_mask=False, truncation=False, padding=False
        )
        return [len(ids) for ids in encoded["input_ids"]]

    def _offsets(self, texts: list[str]) -> list[np.ndarray[Any, Any]]:
        if not texts:
            return []
        encoded = self._tokenizer(
            texts,
            add_special_tokens=False,
            return_attention_mask=False,
            return_offsets_mapping=True,
            truncation=False,
            padding=False,
        )
        return [
            np.array([start for start, _ in spans], dtype=np.int64) for spans in encoded["offset_mapping"]
        ]

    def _carried_title(self, title: str) -> str:
        """The title, shortened where it would take more than half of the passage."""
        words = title.split()
        while words and self._count([" ".join(words)])[0] > self._limit // 2:
            words = words[: max(1, len(words) * 3 // 4)] if len(words) > 1 else []
        return " ".join(words)

    def _pack(self, article: Article, offsets: list[np.ndarray[Any, Any]], budget: int) -> list[str]:
        """Fill passages in reading order; a paragraph that does not fit whole begins a passage of its own."""
        texts: list[str] = []
        current: list[_Span] = []
        size = 0

        def flush() -> None:
            nonlocal current, size
            if current:
                texts.append(_text(article, current))
            current, size = [], 0

        for paragraph in _paragraphs(article, offsets, budget):
            tokens = sum(span.tokens for group in paragraph for span in group)
            if size + tokens > budget and size >= budget // 4:  # a scrap of a passage is not worth it
                flush()
            for group in paragraph:
                more = sum(span.tokens for span in group)
                if size + more > budget:
                    flush()
                current += group
                size += more
        flush()
        return texts

    def _split_overlong(self, titles: list[str], pieces: list[list[str]]) -> None:
        """Count the finished passages and halve any that is too long after all.

        Tokens can merge or part differently once the text is cut: never with word pieces cut between
        words, seldom elsewhere.
        """
        todo = [(a, p) for a, texts in enumerate(pieces) for p in range(len(texts))]
        counts = self._count([full_text(titles[a], pieces[a][p]) for a, p in todo])
        for (article, piece), count in reversed(list(zip(todo, counts, strict=True))):
            if count > self._limit:
                pieces[article][piece : piece + 1] = self._halve(titles[article], pieces[article][piece])

    def _halve(self, title: str, text: str) -> list[str]:
        if self._count([full_text(title, text)])[0] <= self._limit or len(text) < 2:
            return [text]
        middle = len(text) // 2
        space = text.rfind(" ", 1, middle)
        cut = space if space > 0 else middle
        halves = (text[:cut].strip(), text[cut:].strip())
        return [part for half in halves if half for part in self._halve(title, half)]


def _paragraphs(
    article: Article, offsets: list[np.ndarray[Any, Any]], budget: int
) -> Iterator[list[list[_Span]]]:
    """Each paragraph as groups of spans that stay together: a sentence, with the headings before it."""
    headings: list[_Span] = []
    for number, (block, starts) in enumerate(zip(article.blocks, offsets, strict=True)):
        spans = [
            _Span(number, *piece)
            for start, end in ([(0, len(block.text))] if block.is_heading else sentences(block.text))
            for piece in _cut_sentence(block.text, start, end, _between(starts, start, end), budget)
        ]
        if block.is_heading:
            headings += spans
            continue
        together = sum(span.tokens for span in [*headings, spans[0]]) <= budget
        groups = [[*headings, spans[0]]] if together else [*([span] for span in headings), [spans[0]]]
        yield groups + [[span] for span in spans[1:]]
        headings = []
    if headings:
        yield [[span] for span in headings]


def _between(starts: np.ndarray[Any, Any], start: int, end: int) -> np.ndarray[Any, Any]:
    low, high = np.searchsorted(starts, (start, end))
    return starts[low:high]


def _cut_sentence(
    text: str, start: int, end: int, tokens: np.ndarray[Any, Any], budget: int
) -> Iterator[tuple[int, int, int]]:
    """Spans of at most `budget` tokens, cut before a word where there is one. Yields (start, end, tokens)."""
    first = 0
    while len(tokens) - first > budget:
        last = first + budget
        for back in range(last, first + budget // 2, -1):
            if text[tokens[back] - 1].isspace():
                last = back
                break
        yield start, int(tokens[last]), last - first
        start, first = int(tokens[last]), last
    yield start, end, len(tokens) - first


def _text(article: Article, spans: list[_Span]) -> str:
    parts = []
    for number, group in itertools.groupby(spans, key=lambda span: span.block):
        members = list(group)
        parts.append(article.blocks[number].text[members[0].start : members[-1].end].strip())
    return "\n".join(part for part in parts if part)


def _whole(article: Article, mode: str) -> list[str]:
    if mode == "article":
        return ["\n".join(block.text for block in article.blocks)] if article.blocks else []
    texts: list[str] = []
    headings: list[str] = []
    for block in article.blocks:
        headings.append(block.text)
        if not block.is_heading:
            texts.append("\n".join(headings))
            headings = []
    return [*texts, "\n".join(headings)] if headings else texts


def _number(article: Article, title: str, texts: list[str]) -> list[Passage]:
    return [
        Passage(f"{article.doc_id}_{number}", article.doc_id, title, text)
        for number, text in enumerate(texts)
    ]


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
        paths = files.input_files(corpus, "--corpus_path")
        chunker = Chunker(_tokenizer(retriever), config.passages, config.passage_tokens)
        rows: list[int] = []
        counts = {"lines": 0, "articles": 0, "passages": 0, "bad": 0, "empty": 0}
        while stage.has(len(rows)):
            table = stage.table(len(rows))
            rows.append(table.num_rows)
            counts = json.loads(table.schema.metadata[b"counts"])
        started = time.perf_counter()
        with track("passages", "passages", None, counts["passages"]) as tracker:
            for passages, now, rejected in _shards(paths, config, chunker, counts):
                counts = now
                stage.quarantine(f"{len(rows):06d}", rejected)
                if not passages:
                    continue
                columns = [list(column) for column in zip(*passages, strict=True)]
                metadata = {"counts": json.dumps(counts)}
                stage.write(
                    len(rows),
                    pa.table(columns, schema=SCHEMA.with_metadata(metadata)),
                    time.perf_counter() - started,
                )
                tracker.advance(len(passages))
                rows.append(len(passages))
                started = time.perf_counter()
        if not counts["passages"]:
            raise InputError(
                f"{corpus}: no article with text among {counts['rows']:,} lines; expected KILT lines, or "
                "id, title and text in each record"
            )
        stage.finish(rows, counts)


def _shards(
    paths: list[Path], config: PrepareConfig, chunker: Chunker, counts: dict[str, int]
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

    every = itertools.chain.from_iterable(files.rows(path) for path in paths)
    rows = itertools.islice(every, counts["lines"], None)  # skipped rows are not even parsed
    while True:
        # Batches are cut by rows read, so that a run that continues makes the same ones.
        batch: list[Article] = []
        read = 0
        for row in rows:
            intake.rows += 1
            read += 1
            try:
                article = parse_article(files.parse(row), f"{Path(row.source).stem}-{row.line}")
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
        if ended:
            intake.close()
        if ended or len(passages) >= config.passages_per_shard:
            yield passages, state(), intake.take_rejected()
            passages = []
        if ended:
            return


def _tokenizer(source: ModelSource) -> Any:
    from transformers import AutoTokenizer

    name, pinned = loadable(source)
    with hub_errors(source.name):
        tokenizer = AutoTokenizer.from_pretrained(name, **pinned)
    if not tokenizer.is_fast:
        raise ModelError(f"model {source.name}: has no fast tokenizer, which --passages tokens needs")
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
