"""Labels for a pointer: the parts of documents that an answer copies."""

import re
from collections.abc import Sequence
from typing import Final

from scaledown.data.teacher.review import WORD, content_words

Span = tuple[int, int]
"""First character and end of a piece of a text."""

_LEAST_SUPPORT: Final = 0.5  # share of an answer's content words that a supporting document has


def copied_spans(query: str, documents: Sequence[str], answer: str) -> list[list[Span]]:
    """Find the pieces of each document that the answer copies.

    If documents contain the whole answer, the pieces are its occurrences. Otherwise they are the answer's
    content words that are not in the query, in the documents with the most of these words, if such a document
    has at least half of them.

    Args:
        query: The question.
        documents: The texts of its documents.
        answer: The answer.

    Returns:
        For each document its pieces, in order; empty if the answer copies nothing from it.
    """
    whole = [occurrences(document, answer) for document in documents]
    if any(whole):
        return whole
    words = _content_words(answer) - _content_words(query)
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
    """Find the whole answer in a document, as complete words, in any case.

    An answer that is yes, no, a single letter, or has only function words is not searched for: such words
    occur in many documents by chance.

    Args:
        document: The document's text.
        answer: The answer; a final full stop does not count.

    Returns:
        The places of the answer, in order.
    """
    text = answer.strip().strip(".").strip()
    if not _content_words(text):
        return []
    # Not a part of another word ("Man" in "Spider-Man") or of another number ("1" in "1,000").
    pattern = re.compile(rf"(?<![\w-])(?<!\d[.,]){re.escape(text)}(?![\w-])(?![.,]\d)", re.IGNORECASE)
    return [match.span() for match in pattern.finditer(document)]


def _content_words(text: str) -> set[str]:
    """Return the content words of a text, without yes, no and single letters."""
    words = set(content_words(text)) - {"yes", "no"}
    return {word for word in words if not (len(word) == 1 and word.isascii() and word.isalpha())}
