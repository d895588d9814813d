"""The records of the pipeline, and the dictionaries of the Python API."""

from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple, NotRequired, TypedDict

from scaledown.errors import InputError

_TITLE_CHARACTERS: Final = 200  # a longer first line is not a title


class Query(NamedTuple):
    """A query, with its id in its source, or its line number if it has no id."""

    query_id: str
    text: str


class Block(NamedTuple):
    """A paragraph, list item or heading of an article."""

    text: str
    is_heading: bool = False


class Article(NamedTuple):
    """An entry of a corpus: its paragraphs, list items and headings, in reading order."""

    doc_id: str
    title: str
    blocks: tuple[Block, ...]


class Passage(NamedTuple):
    """A part of an article, the unit of retrieval. `passage_id` is `<doc_id>_<n>`."""

    passage_id: str
    doc_id: str
    title: str
    text: str


class Logprobs(TypedDict):
    """A teacher's log probabilities of an answer of T tokens, without the token that ended the answer.

    They are natural logarithms of the model's own probabilities, before any temperature. Either `top_ids` or
    `top_tokens` is None: servers send no ids, and with ids the texts are not needed.
    """

    tokens: list[str]
    """[T]: the text of each token; joined and stripped, the texts are the answer."""
    token_ids: list[int] | None
    """[T]: ids in the teacher's tokenizer."""
    top_tokens: list[list[str]] | None
    """[T, K]: the most probable tokens at each position, best first, as the server writes them."""
    top_ids: list[list[int]] | None
    """[T, K]: the ids of the most probable tokens at each position, best first."""
    top_logprobs: list[list[float]]
    """[T, K]: the log probabilities of the most probable tokens, with four decimals."""


class Answer(NamedTuple):
    """A teacher's answer. `finish_reason` is `stop`, or `length` if the answer reached the limit of tokens.

    Other finish reasons of a server are kept.
    """

    text: str
    finish_reason: str
    prompt_tokens: int
    answer_tokens: int
    dropped_tokens: int
    """Document tokens left out so that the prompt fits the teacher's context."""
    answer_logprobs: Logprobs | None = None
    """None if they were not requested, or if the engine did not return them."""
    left_out: int = 0
    """The number of characters of thoughts and chat markers around the answer, which are not part of it."""
    model: str = ""
    """The model that the server says it used, if this is not the requested name."""


class DocumentDict(TypedDict):
    """A document of the guide's Python API."""

    id: NotRequired[str]
    title: NotRequired[str]
    text: str


class RetrievedDict(DocumentDict):
    """A document returned by a retriever."""

    score: float


class QueryWithDocuments(TypedDict):
    """A query and its documents, as strings or as `{"title", "text"}`."""

    query: str
    documents: list[str] | list[DocumentDict]
    reranking_scores: NotRequired[list[float]]


class Example(TypedDict):
    """A training record, exactly in the format of the guide."""

    query: str
    documents: list[str]
    answer: str
    reranking_scores: NotRequired[list[float]]


def full_text(title: str, text: str) -> str:
    """A passage as all models read it and the output has it: the title on its own line, then the text."""
    return f"{title}\n{text}" if title else text


def title_of(text: str) -> str:
    """The title in a text that `full_text` wrote; "" if it has none."""
    first, _, rest = text.partition("\n")
    return first if rest and len(first) <= _TITLE_CHARACTERS else ""


def document_text(document: object) -> str:
    """The text of a document given as a string or as `{"title", "text"}`. Raises `InputError`."""
    if isinstance(document, str):
        return document
    if not isinstance(document, Mapping) or not isinstance(document.get("text"), str):
        raise InputError("a document is neither a string nor a dictionary with a text: correct it")
    return full_text(str(document.get("title") or ""), document["text"])


def check_records(records: Sequence[QueryWithDocuments]) -> None:
    """Raise `InputError` for the first record without a query or with documents of an unknown form."""
    for number, record in enumerate(records, 1):
        if not isinstance(record, dict):
            raise InputError(f"record {number}: is {type(record).__name__}, expected a dictionary")
        if not isinstance(record.get("query"), str) or not isinstance(record.get("documents"), list):
            raise InputError(f"record {number}: expected a query (string) and documents (list)")
        for document in record["documents"]:
            try:
                document_text(document)
            except InputError as error:
                raise InputError(f"record {number}: {error}") from None
