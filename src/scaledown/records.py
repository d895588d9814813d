"""The records that flow through the pipeline, and the dictionaries of the Python API."""

from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple, NotRequired, TypedDict

from scaledown.errors import InputError

_TITLE_CHARACTERS: Final = 200  # a longer first line is no title


class Query(NamedTuple):
    """A question, with the identifier it had in its source or its line number."""

    query_id: str
    text: str


class Block(NamedTuple):
    """A paragraph, list item or heading of an article."""

    text: str
    is_heading: bool = False


class Article(NamedTuple):
    """One entry of a corpus: its paragraphs in reading order, headings as `Block`s of their own."""

    doc_id: str
    title: str
    blocks: tuple[Block, ...]


class Passage(NamedTuple):
    """What is retrieved: a piece of one article. `passage_id` is `<doc_id>_<n>`."""

    passage_id: str
    doc_id: str
    title: str
    text: str


class Logprobs(TypedDict):
    """A teacher's log probabilities of an answer of T tokens; the token that ended it is not among them.

    They are natural logarithms of what the model itself gives, before any temperature. Behind a server
    tokens have no ids, and with ids `top_tokens` would say nothing more: one of both is None.
    """

    tokens: list[str]
    """[T]: the text of each; joined and stripped, they are the answer."""
    token_ids: list[int] | None
    """[T], of the teacher's tokenizer."""
    top_tokens: list[list[str]] | None
    """[T, K]: the likeliest tokens in the place of each, best first, as the server writes them."""
    top_ids: list[list[int]] | None
    """[T, K]: the same as ids."""
    top_logprobs: list[list[float]]
    """[T, K]: their log probabilities, with four decimals."""


class Answer(NamedTuple):
    """What the teacher wrote; `finish_reason` is `stop`, or `length` where it ran into its limit.

    A server's other words for an end are kept as they are.
    """

    text: str
    finish_reason: str
    prompt_tokens: int
    answer_tokens: int
    dropped_tokens: int
    """Document tokens left out so that the prompt fits the teacher's context."""
    answer_logprobs: Logprobs | None = None
    """Where they were asked for and the engine gave those of this answer."""
    left_out: int = 0
    """Characters of thoughts and chat markers that were written around it."""
    model: str = ""
    """The name under which a server answered, where that is another than it was asked for by."""


class DocumentDict(TypedDict):
    """A document as the guide's Python API takes it. `id` is optional."""

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
    """One training record: the format of the guide, exactly."""

    query: str
    documents: list[str]
    answer: str
    reranking_scores: NotRequired[list[float]]


def full_text(title: str, text: str) -> str:
    """The passage as every model and the output see it: its title on a line of its own, then its text."""
    return f"{title}\n{text}" if title else text


def title_of(text: str) -> str:
    """The title that `full_text` wrote, what passages of one article share; empty where there is none."""
    first, _, rest = text.partition("\n")
    return first if rest and len(first) <= _TITLE_CHARACTERS else ""


def document_text(document: object) -> str:
    """The text of a document given as a string or as `{"title", "text"}`. Raises `InputError`."""
    if isinstance(document, str):
        return document
    if not isinstance(document, Mapping) or not isinstance(document.get("text"), str):
        raise InputError("a document is neither a string nor a dictionary with a text: mend it")
    return full_text(str(document.get("title") or ""), document["text"])


def check_records(records: Sequence[QueryWithDocuments]) -> None:
    """Raise `InputError` naming the first record that lacks a query or documents of a known shape."""
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
