"""What clients send and get: the shapes of OpenAI's chat completions and of Jina's and Cohere's reranking."""

from typing import Annotated, Any, Final, Literal, NoReturn, TypeVar

import orjson
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from scaledown.errors import ScaleDownError, one_line


class RequestError(ScaleDownError):
    """A request that is refused or failed, with its HTTP status."""

    def __init__(self, message: str, status: int = 400, *, param: str = "", kind: str = "") -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.kind = kind or ("invalid_request_error" if status < 500 else "server_error")

    def told(self) -> dict[str, Any]:
        """The body of the response, in OpenAI's shape."""
        return {
            "error": {
                "message": one_line(str(self)),
                "type": self.kind,
                "param": self.param or None,
                "code": self.status,
            }
        }


class _Shape(BaseModel):
    """Unknown fields are ignored, as vLLM does; types are not bent."""

    model_config = ConfigDict(extra="ignore", strict=True)


class Document(_Shape):
    """A document of a request."""

    text: str
    title: str = ""


class _TextPart(_Shape):
    type: Literal["text"]
    text: str


class Message(_Shape):
    """A turn of a chat."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[_TextPart] | None = None

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

    messages: Annotated[list[Message], Field(min_length=1)]
    model: str = ""
    documents: list[str | Document] | None = None
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
    stop: _Stop | Annotated[list[_Stop], Field(max_length=4)] | None = None

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
        """Texts that end an answer, and are no part of it."""
        given = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return tuple(text for text in given if text)


class RerankRequest(_Shape):
    """A body of `/v1/rerank`."""

    query: str
    documents: list[str | Document]
    model: str = ""
    top_n: Annotated[int, Field(ge=1)] | None = None
    return_documents: bool = False


# Fields of OpenAI's and vLLM's that change the answer and are not served: the values that ask for nothing.
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

Request = TypeVar("Request", ChatRequest, RerankRequest)


def parsed(body: bytes, kind: type[Request]) -> Request:
    """A request from the bytes of its body. Raises `RequestError` that names the field."""
    try:
        content = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise RequestError(f"the body is no JSON: {error}") from None
    if not isinstance(content, dict):
        raise RequestError("the body must be a JSON object")
    if kind is ChatRequest:
        for name, idle in _UNSUPPORTED.items():
            if content.get(name) is not None and not any(_same(content[name], one) for one in idle):
                raise RequestError(f"{name} is not supported here: leave it out", param=name)
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        _refuse(error)


def _same(value: object, other: object) -> bool:
    """Equal, where a truth value is no number."""
    return value == other and isinstance(value, bool) == isinstance(other, bool)


def _refuse(error: ValidationError) -> NoReturn:
    # Of a union each branch has an error, with its name in the place: the one that got furthest says most.
    first = max(error.errors(include_url=False, include_input=False), key=lambda one: len(one["loc"]))
    place = [str(part) for part in first["loc"] if isinstance(part, int) or str(part).islower()]
    place = [part for part in place if part not in {"str", "list", "constrained-str"}]
    param = ".".join(place)
    message = first["msg"][:1].lower() + first["msg"][1:]
    raise RequestError(f"{param or 'the body'}: {message}", param=param)
