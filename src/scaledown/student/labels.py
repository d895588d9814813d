"""Which parts of documents an answer copies: what a pointer learns to pick."""

import re
from collections.abc import Sequence
from typing import Final

from scaledown.data.teacher.review import WORD, content_words

Span = tuple[int, int]
"""Where a piece of a text begins and ends, in characters."""

_LEAST_SUPPORT: Final = 0.5  # share of an answer's content words that a supporting document has


def copied_spans(query: str, documents: Sequence[str], answer: str) -> list[list[Span]]:
    """For each document the pieces that the answer copies, in order; empty where it copies nothing.

    Where documents hold the whole answer, these are its occurrences. Else they are the answer's content words
    that the query does not have, in the documents that have the most of them, if that is at least half.
    """
    whole = [occurrences(document, answer) for document in documents]
    if any(whole):
        return whole
    words = _content(answer) - _content(query)
    found = [
        [match.span() for match in WORD.finditer(document) if match.group().lower() in words]
        for document in documents
    ]
    support = [
        len({document[begin:end].lower() for begin, end in spans})
        for document, spans in zip(documents, found, strict=True)
    ]
    most = max(support, default=0)
    if not words or most < _LEAST_SUPPORT * len(words):
        return [[] for _ in documents]
    return [spans if own == most else [] for own, spans in zip(support, found, strict=True)]


def occurrences(document: str, answer: str) -> list[Span]:
    """Where a document has the whole answer as words of its own, whatever the case.

    Nowhere, if the answer is yes or no, a single letter, or has function words only: these are in many a
    document by chance.
    """
    text = answer.strip().strip(".").strip()
    if not _content(text):
        return []
    # Neither a part of another word ("Man" of "Spider-Man") nor of another number ("1" of "1,000").
    pattern = re.compile(rf"(?<![\w-])(?<!\d[.,]){re.escape(text)}(?![\w-])(?![.,]\d)", re.IGNORECASE)
    return [match.span() for match in pattern.finditer(document)]


def _content(text: str) -> set[str]:
    """Words that say something by themselves."""
    words = set(content_words(text)) - {"yes", "no"}
    return {word for word in words if not (len(word) == 1 and word.isascii() and word.isalpha())}
