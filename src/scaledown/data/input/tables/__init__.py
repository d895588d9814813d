"""The one reader of corpora, queries, right answers and evaluation sets.

The format, delimiter, header and columns of a file are found from its content. One log line for each file
says how it is read; what cannot be decided is refused, with the columns that were seen and the flag that
decides.
"""

from scaledown.data.input.tables.meaning import (
    ANSWER_KEYS,
    CORPUS,
    DOCUMENT_IDS,
    EXAMPLE,
    GOLD,
    MANY_KEYS,
    PASSAGE_KEYS,
    QUERIES,
    QUERY_IDS,
    QUERY_KEYS,
    TEXT_KEYS,
    TITLE_KEYS,
    Meaning,
    Reading,
)
from scaledown.data.input.tables.reader import of_records, reading, rows, version_of

__all__ = [
    "ANSWER_KEYS",
    "CORPUS",
    "DOCUMENT_IDS",
    "EXAMPLE",
    "GOLD",
    "MANY_KEYS",
    "PASSAGE_KEYS",
    "QUERIES",
    "QUERY_IDS",
    "QUERY_KEYS",
    "TEXT_KEYS",
    "TITLE_KEYS",
    "Meaning",
    "Reading",
    "of_records",
    "reading",
    "rows",
    "version_of",
]
