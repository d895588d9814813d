"""The names that columns may have, and the record of how a file is read."""

from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Final, NamedTuple

from scaledown.data.input.files import Row

# The id of a passage comes before the id of its document.
DOCUMENT_IDS: Final = ("id", "_id", "pid", "doc_id", "docid", "docno", "wikipedia_id", "kilt_id")
QUERY_IDS: Final = ("query_id", "qid", "question_id", "questionid", "id", "_id")
TITLE_KEYS: Final = ("title", "wikipedia_title")
TEXT_KEYS: Final = ("text", "contents", "content", "body", "passage", "segment")
QUERY_KEYS: Final = (
    *(
        "query",
        "question",
        "queries",
        "questions",
        "ambiguous_question",
        "user_input",
        "input",
        "body",
        "text",
    ),
)
ANSWER_KEYS: Final[tuple[tuple[str, ...], ...]] = (
    ("ground_truth", "ground_truths"),  # first: beside these columns, `answer` is a model's answer
    (
        *("answers", "answer", "answer_aliases", "possible_answers", "golden_answers", "exact_answer"),
        *("output", "qa_pairs"),
    ),
    ("label", "labels"),
)
PASSAGE_KEYS: Final = (
    *("passages", "passage", "context", "documents", "positive_passages", "snippets"),
    *("contexts", "reference_contexts"),
)
MANY_KEYS: Final = ("data", "paragraphs", "qas", "questions")
"""Names of lists of questions in one record, as in SQuAD, MRQA, TriviaQA and BioASQ."""


class Meaning(NamedTuple):
    """The parts that a command reads from a table."""

    main: str
    """The part that each row must have."""
    parts: Mapping[str, tuple[str, ...]]
    """The names that the column of each part may have, in lower case, the most likely first."""
    flag: str
    """The flag that names the column of the main part; empty if there is none."""
    rivals: Mapping[str, tuple[str, ...]] = MappingProxyType({})
    """Names that may have another meaning, each with the columns beside which they do."""
    unread: tuple[str, ...] = ()
    """Parts that are not read; they help to find the other parts."""

    def known(self) -> set[str]:
        """Return all names that a column may have."""
        return {name for names in self.parts.values() for name in names}

    def read(self) -> set[str]:
        """Return the names of the columns that are read."""
        return {name for part, names in self.parts.items() if part not in self.unread for name in names}


_RIVALS: Final = {
    "text": ("title", "contents", "content", "passage", "documents", "context"),
    "body": ("title",),  # the question in BioASQ; in other data the text under a title
}
_ASKED: Final[Mapping[str, tuple[str, ...]]] = {
    "id": QUERY_IDS,
    "question": QUERY_KEYS,
    "answers": (*(name for names in ANSWER_KEYS for name in names), "reference"),
    "passages": PASSAGE_KEYS,
}
CORPUS: Final = Meaning(
    "text", {"id": DOCUMENT_IDS, "title": TITLE_KEYS, "text": TEXT_KEYS}, flag="--text_column"
)
QUERIES: Final = Meaning("question", _ASKED, "--query_column", _RIVALS, unread=("answers", "passages"))
EXAMPLE: Final = '{"question": "Who wrote Emma?", "answers": ["Jane Austen"]}'
"""A line of a file of right answers."""
GOLD: Final = Meaning("question", _ASKED, "", _RIVALS)


class Reading(NamedTuple):
    """How a file is read."""

    format: str
    """The format in words; empty for an article or an empty file."""
    columns: Mapping[str, str]
    """The column of each part, by the part."""
    header: bool | None
    """Whether there is a line of names; None where the format needs none."""
    guessed: bool
    """Whether this was found from the content alone, not from the file's ending or the names of columns."""

    def __str__(self) -> str:
        words = [self.format]
        if self.header is not None:
            words.append("header" if self.header else "no header")
        return ", ".join([*words, *(f"{part} = {column}" for part, column in self.columns.items())])


class ReadTable(NamedTuple):
    """How a file is read, and its rows."""

    reading: Reading
    rows: Callable[[], Iterator[Row]]
