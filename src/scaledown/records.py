"""The records of the pipeline, and the dictionaries of the Python API."""

from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple, NotRequired, TypedDict

from scaledown.errors import InputError

_TITLE_CHARACTERS: Final = 200  # a longer first line is not a title


class Query(NamedTuple):
    """A question to answer."""

    query_id: str
    """Unique among the queries of a run: the id in the source, or `q` and the number of the query, from 1."""
    text: str
    """The question."""


class Block(NamedTuple):
    """A paragraph, list item or heading of an article."""

    text: str
    """The words of the block, without marks for its kind."""
    is_heading: bool = False


class Article(NamedTuple):
    """An entry of a corpus: its paragraphs, list items and headings, in reading order."""

    doc_id: str
    """Unique in the corpus."""
    title: str
    """Empty if the article has none."""
    blocks: tuple[Block, ...]


class Passage(NamedTuple):
    """A part of an article, the unit of retrieval."""

    passage_id: str
    """`<doc_id>_<n>`; n counts the passages of the article."""
    doc_id: str
    """The article that the passage is a part of."""
    title: str
    """The article's title; empty if it has none."""
    text: str
    """The passage without the title."""


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
    """A teacher's answer."""

    text: str
    """The answer alone."""
    finish_reason: str
    """`stop`, or `length` if the answer reached the limit of tokens. Other reasons of a server are kept."""
    prompt_tokens: int
    """Tokens of the prompt; estimated by the length if a server does not report them."""
    answer_tokens: int
    """Tokens that the teacher wrote; estimated by the length if a server does not report them."""
    dropped_tokens: int
    """Document tokens left out so that the prompt fits the teacher's context."""
    answer_logprobs: Logprobs | None = None
    """None if they were not requested, or if the engine did not return them."""
    left_out: int = 0
    """Characters of thoughts and chat markers around the answer, which are not part of it."""
    model: str = ""
    """The name of the model in the server's reply, if it is not the requested name; else empty."""


class DocumentDict(TypedDict):
    """A document of the guide's Python API."""

    id: NotRequired[str]
    """The document's id, if it has one."""
    title: NotRequired[str]
    """Empty or absent if the document has none."""
    text: str
    """The document without the title."""


class RetrievedDict(DocumentDict):
    """A document returned by a retriever."""

    score: float
    """Similarity to the query, the inner product of their vectors; higher is better."""


class QueryWithDocuments(TypedDict):
    """A query and its documents."""

    query: str
    """The question."""
    documents: list[str] | list[DocumentDict]
    """The documents, best first: strings, or `{"title", "text"}`."""
    reranking_scores: NotRequired[list[float]]
    """[documents]: relevance by the reranker; higher is better."""


class Example(TypedDict):
    """A training record, exactly in the format of the guide."""

    query: str
    """The question."""
    documents: list[str]
    """The documents that the teacher was given, best first. A title is on the first line."""
    answer: str
    """The teacher's answer."""
    reranking_scores: NotRequired[list[float]]
    """[documents]: relevance by the reranker; higher is better."""


def full_text(title: str, text: str) -> str:
    """Return a passage as all models read it and the output has it: the title on its own line, then the text.

    Args:
        title: The title; empty if there is none.
        text: The passage without the title.
    """
    return f"{title}\n{text}" if title else text


def title_of(text: str) -> str:
    """Return the title of a document.

    Args:
        text: The result of `full_text`.

    Returns:
        The first line if another line follows and it has at most 200 characters; else empty.
    """
    first, _, rest = text.partition("\n")
    return first if rest and len(first) <= _TITLE_CHARACTERS else ""


def document_text(document: object) -> str:
    """Return the text of a document.

    Args:
        document: A string, or a dictionary with `text` and, if it has one, `title`.

    Returns:
        The string itself; for a dictionary the result of `full_text`.

    Raises:
        InputError: The document is something else.
    """
    if isinstance(document, str):
        return document
    if not isinstance(document, Mapping) or not isinstance(document.get("text"), str):
        raise InputError("a document is neither a string nor a dictionary with a text: correct it")
    return full_text(str(document.get("title") or ""), document["text"])


def check_records(records: Sequence[QueryWithDocuments]) -> None:
    """Check that all records have a query and documents.

    Args:
        records: The records that a user gives.

    Raises:
        InputError: A record has no query, or documents of an unknown form; the message has its number, from
            1.
    """
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
