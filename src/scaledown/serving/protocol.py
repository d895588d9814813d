"""Requests and errors in the formats of OpenAI's chat completions and of Jina's and Cohere's reranking."""

import difflib
import re
from collections.abc import Mapping, Set
from typing import Annotated, Any, Final, Literal, NoReturn, TypeVar

import orjson
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from scaledown.errors import ScaleDownError, one_line


class RequestError(ScaleDownError):
    """A request that was refused or failed.

    Args:
        message: The reason, for the client.
        status: The HTTP status.
        param: The field of the request that is wrong, for example `documents.0`; empty if it is none.
        kind: The kind of error in OpenAI's format; without it, it follows from the status.
    """

    def __init__(self, message: str, status: int = 400, *, param: str = "", kind: str = "") -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.kind = kind or ("invalid_request_error" if status < 500 else "server_error")

    def body(self) -> dict[str, Any]:
        """Return the body of the response, in OpenAI's format."""
        return {
            "error": {
                "message": one_line(str(self)),
                "type": self.kind,
                "param": self.param or None,
                "code": self.status,
            }
        }


class _Shape(BaseModel):
    """Unknown fields are ignored, as vLLM does; values of another type are refused, not converted.

    `parsed` refuses misspelt fields of the request and of its documents. A list is checked only up to its
    first wrong item (`fail_fast`): a body has room for millions.
    """

    model_config = ConfigDict(extra="ignore", strict=True)


class Document(_Shape):
    """A document of a request."""

    text: str
    title: str = ""


class _TextPart(_Shape):
    type: Literal["text"]
    text: str


class Message(_Shape):
    """A message of a chat."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | Annotated[list[_TextPart], Field(fail_fast=True)] | None = None

    @property
    def text(self) -> str:
        """The content, its parts joined."""
        if isinstance(self.content, list):
            return "\n".join(part.text for part in self.content)
        return self.content or ""


class _StreamOptions(_Shape):
    include_usage: bool = False


_Stop = Annotated[str, Field(max_length=1000)]


class ChatRequest(_Shape):
    """A body of `/v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)]
    model: str = ""
    documents: Annotated[list[str | Document], Field(fail_fast=True)] | None = None
    compressed: bool = True
    compression_rate: Annotated[int, Field(ge=0)] | None = None
    budget: Literal["each", "shared"] | None = None
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: int | None = None
    stop: _Stop | Annotated[list[_Stop], Field(max_length=4, fail_fast=True)] | None = None

    @property
    def query(self) -> str:
        """The last message of the user."""
        return next((turn.text for turn in reversed(self.messages) if turn.role == "user"), "").strip()

    @property
    def system(self) -> str:
        """The system messages, joined."""
        roles = {"system", "developer"}
        return "\n\n".join(turn.text for turn in self.messages if turn.role in roles).strip()

    @property
    def stops(self) -> tuple[str, ...]:
        """Texts that end an answer; they are not part of it."""
        given = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return tuple(text for text in given if text)


class RerankRequest(_Shape):
    """A body of `/v1/rerank`."""

    query: str
    documents: Annotated[list[str | Document], Field(fail_fast=True)]
    model: str = ""
    top_n: Annotated[int, Field(ge=1)] | None = None
    return_documents: bool = False


# Fields of OpenAI and vLLM that would change the answer and are not supported; their values without effect.
_UNSUPPORTED: Final[dict[str, tuple[Any, ...]]] = {
    "n": (1,),
    "best_of": (1,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "prompt_logprobs": (),
    "response_format": ({"type": "text"},),
    "logit_bias": ({},),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
    "top_k": (0, -1),
    "min_p": (0,),
    "modalities": (["text"],),
    "audio": (),
    "use_beam_search": (False,),
    "structured_outputs": (),
    "guided_json": (),
    "echo": (False,),
}

_SIMILARITY: Final = (
    0.85  # `document` is close to `documents` (0.94); `min_tokens` is not to `max_tokens` (0.80)
)
_CLOSE_SHORT: Final = 0.8  # `titel` and `Title` are close to `title` (0.80); `subtitle` is not (0.77)
_OTHERS: Final = frozenset({"models", "mode", "document_ids"})  # of other servers; none is a misspelt one
_FIELDS_COMPARED: Final = (
    50  # unknown fields, and first documents, that are compared: a request should cost little
)
_LONGEST_NAME: Final = 40  # characters of their names

Request = TypeVar("Request", ChatRequest, RerankRequest)


def parsed(body: bytes, kind: type[Request]) -> Request:
    """Parse and check the body of a request.

    Args:
        body: The bytes that the client sent.
        kind: The class of the request.

    Returns:
        The request.

    Raises:
        RequestError: The body is not such a request; the message names the field.
    """
    try:
        content = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise RequestError(f"the body is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise RequestError("the body must be a JSON object")
    if kind is ChatRequest:
        for name, allowed in _UNSUPPORTED.items():
            if content.get(name) is not None and not any(
                _is_equal(content[name], value) for value in allowed
            ):
                raise RequestError(f"{name} is not supported here: leave it out", param=name)
    _refuse_misspelt(
        content, kind.model_fields.keys() | (_UNSUPPORTED.keys() if kind is ChatRequest else set())
    )
    documents = content.get("documents")
    for number, document in enumerate(documents[:_FIELDS_COMPARED] if isinstance(documents, list) else ()):
        if isinstance(document, dict):
            _refuse_misspelt(document, Document.model_fields.keys(), f"documents.{number}.", _CLOSE_SHORT)
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        _refuse(error)


def _refuse_misspelt(
    content: Mapping[str, Any], known: Set[str], place: str = "", close: float = _SIMILARITY
) -> None:
    """Raise `RequestError` if the name of an unknown field is close to a known one that is not given."""
    unknown = [name for name, value in content.items() if value is not None and name not in known | _OTHERS]
    for name in unknown[:_FIELDS_COMPARED]:
        meant = difflib.get_close_matches(name[:_LONGEST_NAME], known - content.keys(), 1, close)
        if meant:
            raise RequestError(
                f"{place}{name} is not known here: did you mean {place}{meant[0]}?", param=f"{place}{name}"
            )


def _is_equal(value: object, other: object) -> bool:
    """Whether two values are equal, where True is not 1 and False is not 0."""
    return value == other and isinstance(value, bool) == isinstance(other, bool)


def _refuse(error: ValidationError) -> NoReturn:
    # For a union pydantic reports an error for each branch, with the branch's name in `loc`. The error with
    # the longest `loc` is of the branch that fitted best.
    first = max(error.errors(include_url=False, include_input=False), key=lambda found: len(found["loc"]))
    place = [str(part) for part in first["loc"] if isinstance(part, int) or str(part).islower()]
    place = [part for part in place if part not in {"str", "list", "constrained-str"}]
    param = ".".join(place)
    message = (first["msg"][:1].lower() + first["msg"][1:]).replace(" after validation", "")
    if re.fullmatch(r"documents\.\d+", param):
        message = "must be a text, or an object with text, and title if it has one"
    raise RequestError(f"{param or 'the body'}: {message}", param=param)
