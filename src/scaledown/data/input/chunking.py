"""Articles -> passages with their token ids: cut at sentence ends, never across articles, nothing lost."""

import itertools
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Final, NamedTuple, TypeAlias

import numpy as np
from tokenizers import Tokenizer

from scaledown.records import Article, Passage, full_text

# A sentence ends at . ! ? … (and their full-width forms), with closing quotes or brackets, before white
# space. An abbreviation only adds a place where a passage may end; no text depends on it.
_SENTENCE_END: Final = re.compile(r"[.!?…]+[\"'”’»)\]]*\s+|[。！？]+[」』”’)]*\s*")
# What BERT's tokenizers take for white space; str.split() knows more, so texts with _ODD are split by this.
_SPACE_SEPARATED: Final = re.compile(r"[^\t\n\r \xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]+")
_UNUSUAL_BREAK: Final = re.compile(r"[\x0b\x0c\x1c-\x1f\x85]")
_CACHED_WORDS: Final = 1 << 18
_LONGEST_CACHED: Final = 32  # characters; longer words rarely repeat
_MOST_CHARACTERS_A_TOKEN: Final = 64  # an unbroken string of a million characters can be a single [UNK]

TokenIds: TypeAlias = Sequence[int]


def sentence_spans(text: str) -> list[tuple[int, int]]:
    """Character spans of the sentences of `text`; together they cover it without gaps."""
    ends = [match.end() for match in _SENTENCE_END.finditer(text)]
    if not ends or ends[-1] != len(text):
        ends.append(len(text))
    return list(itertools.pairwise([0, *ends]))


class Words(dict[str, TokenIds]):
    """Caches the token ids of words, because a few words make up most of a text.

    Only for tokenizers whose tokens never cross white space (`splits_at_spaces`).
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__()
        self._tokenizer = tokenizer

    def __missing__(self, word: str) -> TokenIds:
        ids: TokenIds = tuple(self._tokenizer.encode(word, add_special_tokens=False).ids)
        if len(word) <= _LONGEST_CACHED and len(self) < _CACHED_WORDS:
            self[word] = ids
        return ids

    def ids(self, text: str) -> list[int]:
        """The token ids of a text, without special tokens."""
        words = _SPACE_SEPARATED.findall(text) if _UNUSUAL_BREAK.search(text) else text.split()
        return list(itertools.chain.from_iterable(map(self.__getitem__, words)))


def splits_at_spaces(tokenizer: Tokenizer) -> bool:
    """Whether the tokens of a text are the tokens of its words in order, as with BERT's word pieces."""
    state = json.loads(tokenizer.to_str())
    return (
        state["model"]["type"] == "WordPiece"
        and (state["normalizer"] or {}).get("type") == "BertNormalizer"
        and (state["pre_tokenizer"] or {}).get("type") == "BertPreTokenizer"
        and state["normalizer"]["clean_text"]
        and not any(re.search(r"\s", token["content"]) for token in state["added_tokens"])
    )


class Chunk(NamedTuple):
    """A passage's text before it has a name, and its token ids, title included."""

    text: str
    ids: TokenIds


class _Span(NamedTuple):
    """A sentence, part of one, or a heading: its position in the article, and its token ids."""

    block: int
    start: int
    end: int
    ids: TokenIds


class Chunker:
    """Cuts articles into passages and tokenises them. No text is lost, and no passage spans articles.

    Args:
        tokenizer: Counts tokens; None leaves the ids empty, if `mode` is not `tokens`.
        mode: `tokens`, `paragraph` or `article`. With `tokens` passages end at the end of a sentence if
            possible, begin with a paragraph if possible, and keep a heading with the text after it. The
            others make a passage of each paragraph or article.
        limit: With `tokens`, the most tokens of title and text of a passage together.
    """

    def __init__(self, tokenizer: Tokenizer | None, mode: str, limit: int) -> None:
        self._tokenizer = tokenizer
        self.token_type = np.uint16 if not tokenizer or tokenizer.get_vocab_size() <= 1 << 16 else np.uint32
        self._mode = mode
        self._limit = limit
        self._words = Words(tokenizer) if tokenizer and splits_at_spaces(tokenizer) else None
        self._exact = False  # whether the ids of a passage's parts are those of the passage

    def passages(self, articles: Sequence[Article]) -> list[list[tuple[Passage, TokenIds]]]:
        """Cut articles.

        Args:
            articles: The articles.

        Returns:
            For each article its passages in reading order, with their token ids, title included.
        """
        self._exact = self._words is not None and self._mode == "tokens"
        if self._mode == "tokens":
            titles = [self._carried_title(article.title) for article in articles]
            ids = iter(self._ids([block.text for article in articles for block in article.blocks]))
            packed = []
            for article, title in zip(articles, titles, strict=True):
                blocks = [next(ids) for _ in article.blocks]
                packed.append(self._pack(article, blocks, self._ids([title])[0]))
        else:
            titles = [article.title for article in articles]
            packed = [
                [Chunk(text, ()) for text in _whole_article(article, self._mode)] for article in articles
            ]
        if not self._exact:
            packed = self._tokenised(titles, packed)
        return [
            [
                (Passage(f"{article.doc_id}_{number}", article.doc_id, title, piece.text), piece.ids)
                for number, piece in enumerate(pieces)
            ]
            for article, title, pieces in zip(articles, titles, packed, strict=True)
        ]

    def _ids(self, texts: list[str]) -> list[TokenIds]:
        if self._words is not None:
            return [self._words.ids(text) for text in texts]
        if not self._tokenizer:
            return [()] * len(texts)
        encoded = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in encoded]

    def _carried_title(self, title: str) -> str:
        """The title, shortened if it would take more than half of the passage."""
        words = title.split()
        while words and len(self._ids([" ".join(words)])[0]) > self._limit // 2:
            words = words[: max(1, len(words) * 3 // 4)] if len(words) > 1 else []
        return " ".join(words)

    def _pack(self, article: Article, blocks: list[TokenIds], title: TokenIds) -> list[Chunk]:
        """Fill passages in reading order; a paragraph that does not fit whole begins a passage of its own."""
        budget = self._limit - len(title)
        pieces: list[Chunk] = []
        current: list[_Span] = []
        size = 0

        def flush() -> None:
            nonlocal current, size
            if text := _text_of_spans(article, current):  # a text of unusual spaces only is not a passage
                pieces.append(Chunk(text, [*title, *itertools.chain.from_iterable(s.ids for s in current)]))
            current, size = [], 0

        for paragraph in _paragraphs(article, blocks):
            tokens = sum(len(span.ids) for span in paragraph)
            if size + tokens > budget and size >= budget // 4:  # the rest would be too short to be a passage
                flush()
            length = sum(span.end for span in paragraph)
            whole = size + tokens <= budget and length <= budget * _MOST_CHARACTERS_A_TOKEN
            for group in [paragraph] if whole else self._groups(article, paragraph, budget):
                more = sum(len(span.ids) for span in group)
                if size + more > budget:
                    flush()
                current += group
                size += more
        flush()
        return pieces

    def _groups(self, article: Article, paragraph: list[_Span], budget: int) -> Iterator[list[_Span]]:
        """A paragraph as groups of spans that stay together: a sentence, with the headings before it."""
        *headings, body = paragraph
        text = article.blocks[body.block].text
        is_heading = article.blocks[body.block].is_heading
        parts = [body] if is_heading else self._spans(body.block, text, sentence_spans(text))
        first, *rest = [small for part in parts for small in self._cut(text, part, budget)]
        together = [*headings, first]
        if sum(len(span.ids) for span in together) <= budget:
            yield together
        else:
            for span in headings:
                for small in self._cut(article.blocks[span.block].text, span, budget):
                    yield [small]
            yield [first]
        for span in rest:
            yield [span]

    def _spans(self, block: int, text: str, places: Iterable[tuple[int, int]]) -> list[_Span]:
        places = list(places)
        ids = self._ids([text[start:end] for start, end in places])
        return [_Span(block, *place, own) for place, own in zip(places, ids, strict=True)]

    def _cut(self, text: str, span: _Span, budget: int) -> list[_Span]:
        """Parts of at most `budget` tokens: cut before words, and within those that are longer still."""
        if len(span.ids) <= budget and span.end - span.start <= budget * _MOST_CHARACTERS_A_TOKEN:
            return [span]
        middle = (span.start + span.end) // 2
        starts = [match.start() for match in _SPACE_SEPARATED.finditer(text, span.start, span.end)]
        ends = [*starts[1:], span.end]
        if len(starts) < 2:
            self._exact = False  # half of a word has other tokens than the word
            places = [(span.start, middle), (middle, span.end)]
            halves = self._spans(span.block, text, places)
            return [small for half in halves for small in self._cut(text, half, budget)]
        words = self._spans(span.block, text, zip([span.start, *starts[1:]], ends, strict=True))
        parts: list[_Span] = []
        for part in itertools.chain.from_iterable(self._cut(text, word, budget) for word in words):
            if parts and len(parts[-1].ids) + len(part.ids) <= budget:
                parts[-1] = parts[-1]._replace(end=part.end, ids=[*parts[-1].ids, *part.ids])
            else:
                parts.append(part)
        return parts

    def _tokenised(self, titles: list[str], packed: list[list[Chunk]]) -> list[list[Chunk]]:
        """Return the pieces with the ids of their whole text; a piece that is still too long is halved.

        If tokens can cross white space, the text of a piece may have other tokens than its parts.
        """
        texts = [
            full_text(t, piece.text) for t, pieces in zip(titles, packed, strict=True) for piece in pieces
        ]
        ids = iter(self._ids(texts))
        return [
            [small for piece in pieces for small in self._halved(title, piece.text, next(ids))]
            for title, pieces in zip(titles, packed, strict=True)
        ]

    def _halved(self, title: str, text: str, ids: TokenIds) -> list[Chunk]:
        short = len(ids) <= self._limit and len(text) <= self._limit * _MOST_CHARACTERS_A_TOKEN
        if self._mode != "tokens" or short or len(text) < 2:
            return [Chunk(text, ids)]
        middle = len(text) // 2
        space = text.rfind(" ", 1, middle)
        cut = space if space > 0 else middle
        halves = (text[:cut].strip(), text[cut:].strip())
        return [
            part
            for half in halves
            if half
            for part in self._halved(title, half, self._ids([full_text(title, half)])[0])
        ]


def _paragraphs(article: Article, blocks: list[TokenIds]) -> Iterator[list[_Span]]:
    """Each paragraph as one span, after the headings that stand before it."""
    spans: list[_Span] = []
    for number, (block, ids) in enumerate(zip(article.blocks, blocks, strict=True)):
        spans.append(_Span(number, 0, len(block.text), ids))
        if not block.is_heading:
            yield spans
            spans = []
    if spans:
        yield spans


def _text_of_spans(article: Article, spans: list[_Span]) -> str:
    parts = []
    for number, group in itertools.groupby(spans, key=lambda span: span.block):
        members = list(group)
        parts.append(article.blocks[number].text[members[0].start : members[-1].end].strip())
    return "\n".join(part for part in parts if part)


def _whole_article(article: Article, mode: str) -> list[str]:
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
