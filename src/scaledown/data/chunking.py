"""Articles -> passages: cut at sentence ends, never across articles, nothing lost."""

import itertools
import re
from collections.abc import Iterator, Sequence
from typing import Any, Final, NamedTuple

import numpy as np

from scaledown.records import Article, Passage, full_text

# A sentence ends at . ! ? … (and their full-width forms), with closing quotes or brackets, before white
# space. An abbreviation only adds a place where a passage may end; no text depends on it.
_SENTENCE_END: Final = re.compile(r"[.!?…]+[\"'”’»)\]]*\s+|[。！？]+[」』”’)]*\s*")


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
            if text := _text(article, current):  # exotic spaces alone are no passage
                texts.append(text)
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
