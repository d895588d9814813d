"""The HTTP interface: routes, keys and limits. The engine does the work."""

import asyncio
import hmac
import logging
import re
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Final

import orjson
from fastapi import FastAPI, Request, Response
from fastapi.responses import StreamingResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from scaledown.config.serve import ServeConfig
from scaledown.errors import UsageError, one_line
from scaledown.records import document_text
from scaledown.serving.engine import SHUTTING_DOWN, Engine
from scaledown.serving.jobs import End, Event, Job, Piece, Scores, Usage
from scaledown.serving.metrics import Metrics
from scaledown.serving.protocol import ChatRequest, Document, RequestError, RerankRequest, parsed
from scaledown.student.settings import ScaleDownConfig

log = logging.getLogger("scaledown")

_CHAT: Final = "/v1/chat/completions"
_RERANK: Final = "/v1/rerank"
_KEYLESS_PATH: Final = "/health"  # needs no key: load balancers have none
_AWAY: Final = 499  # nginx's status for a client that closed the connection
_LEFT: Final = "the client closed the connection"
_ID_HEADER: Final = "x-request-id"
_ID: Final = re.compile(r"[A-Za-z0-9._-]{1,64}")  # ids of clients that are accepted
_LOGGED: Final = (
    "request %s: %s %s %.3f s, prompt %s, answer %s, documents %s -> %s, "
    "cut documents %s, queries %s, tokens %s%s"
)
_RETRY_SECONDS: Final = 1
_UNBUFFERED: Final = {
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",
}  # proxies must not wait
_CONNECTION_SECONDS: Final = 0.5  # between two checks that the client is still connected


@dataclass(frozen=True)
class _Call:
    """A request as it arrived."""

    request: Request
    path: str
    identity: str
    """The client's X-Request-ID, else one of ours: the response and the log have it."""
    started: float = field(default_factory=time.perf_counter)


@dataclass
class _Waiting:
    """A request that the engine works on, as the event loop keeps it."""

    job: Job
    events: asyncio.Queue[Event]
    deadline: float
    looked: float = 0.0
    """Time of the last check that the client is still connected."""
    usage: Usage = field(default_factory=Usage)
    status: int = _AWAY
    """The HTTP status of a stream at its end; until it has another end, that of a client that has left."""
    reason: str = _LEFT


class _Stream(StreamingResponse):
    """Server-sent events. `ended` is called at their end, also if the client leaves before they begin."""

    def __init__(self, events: AsyncIterator[bytes], ended: Callable[[], None]) -> None:
        super().__init__(events, media_type="text/event-stream", headers=_UNBUFFERED)
        self._ended = ended

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._ended()


class Server:
    """The routes of one model."""

    def __init__(
        self, engine: Engine, model: ScaleDownConfig, name: str, config: ServeConfig, key: str
    ) -> None:
        self._engine = engine
        self._model = model
        self._name = name
        self._config = config
        self._key = key.encode()
        self._metrics = Metrics(engine)
        self._started = int(time.time())

    def app(self) -> FastAPI:
        """Return the application. It has no documentation pages, since they load scripts from other sites."""
        app = FastAPI(title="ScaleDown", docs_url=None, redoc_url=None, openapi_url=None)
        routes = (
            ("POST", _CHAT, self._chat),
            ("POST", _RERANK, self._rerank),
            ("GET", "/v1/models", self._models),
            ("GET", "/metrics", self._metrics_text),
            ("GET", _KEYLESS_PATH, self._health),
        )
        for method, path, route in routes:
            app.add_api_route(path, self._guarded(path, route), methods=[method])
        app.add_exception_handler(HTTPException, _not_found)
        return app

    def _guarded(
        self, path: str, route: Callable[[_Call], Awaitable[Response]]
    ) -> Callable[[Request], Awaitable[Response]]:
        """Wrap a route: it checks the key, and returns errors in OpenAI's format."""

        async def guarded(request: Request) -> Response:
            call = _Call(request, path, _identity(request))
            try:
                if path != _KEYLESS_PATH:
                    self._check_key(request)
                response = await route(call)
            except (Exception, asyncio.CancelledError) as error:
                failure = _failure(call, error)
                response = _json_response(failure.body(), failure.status)
                if failure.status in {429, 503}:
                    response.headers["Retry-After"] = str(_RETRY_SECONDS)
                if failure.status == 401:
                    response.headers["WWW-Authenticate"] = "Bearer"
                self._done(call, failure.status, reason=one_line(str(failure)))
            response.headers[_ID_HEADER] = call.identity
            return response

        return guarded

    def _check_key(self, request: Request) -> None:
        if not self._key:
            return
        kind, _, given = request.headers.get("authorization", "").partition(" ")
        if kind.lower() != "bearer" or not hmac.compare_digest(given.encode("latin-1").strip(), self._key):
            raise RequestError(
                "the key is missing or wrong: send it as Authorization: Bearer KEY",
                401,
                kind="authentication_error",
            )

    def _done(self, call: _Call, status: int, usage: Usage | None = None, reason: str = "") -> None:
        seconds = time.perf_counter() - call.started
        usage = usage or Usage()
        self._metrics.done(call.path, status, seconds, usage)
        if call.path in {_CHAT, _RERANK}:
            words = f": {reason}" if reason else ""
            log.info(_LOGGED, call.identity, call.path, status, seconds, *usage, words)

    # Routes.

    async def _health(self, _: _Call) -> Response:
        failed = self._engine.failed
        return _json_response({"status": failed or "ok"}, 503 if failed else 200)

    async def _metrics_text(self, _: _Call) -> Response:
        return Response(self._metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def _models(self, _: _Call) -> Response:
        model = {"id": self._name, "object": "model", "created": self._started, "owned_by": "scaledown"}
        return _json_response({"object": "list", "data": [model]})

    async def _chat(self, call: _Call) -> Response:
        asked = parsed(await self._body(call.request), ChatRequest)
        waiting = self._submit(call, self._chat_job(asked))
        head = {"id": f"chatcmpl-{call.identity}", "created": int(time.time()), "model": self._name}
        if asked.stream:
            first = await self._next(call, waiting)  # an error before the first text gets its own status
            with_usage = bool(asked.stream_options and asked.stream_options.include_usage)
            events = self._streamed(call, waiting, first, head, with_usage=with_usage)
            return _Stream(events, lambda: self._ended(call, waiting))
        text, reason = "", "stop"
        while True:
            event = await self._next(call, waiting)
            if isinstance(event, Piece):
                self._first(text, call)
                text += event.text
            elif isinstance(event, End):
                reason, waiting.usage = event.reason, event.usage
                break
        self._log_texts(call, waiting.job, text)
        self._done(call, 200, waiting.usage)
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": text},
            "logprobs": None,
            "finish_reason": reason,
        }
        return _json_response(
            {**head, "object": "chat.completion", "choices": [choice], "usage": _usage(waiting.usage)}
        )

    async def _streamed(
        self, call: _Call, waiting: _Waiting, event: Event, head: dict[str, Any], *, with_usage: bool
    ) -> AsyncIterator[bytes]:
        """Yield an answer as server-sent events; its first `event` has already arrived."""

        def chunk(delta: dict[str, Any], reason: str | None = None) -> bytes:
            choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
            extra = {"usage": None} if with_usage else {}
            return _event({**head, "object": "chat.completion.chunk", "choices": [choice], **extra})

        text = ""
        try:
            yield chunk({"role": "assistant", "content": ""})
            while not isinstance(event, End):
                if isinstance(event, Piece):
                    self._first(text, call)
                    text += event.text
                    yield chunk({"content": event.text})
                event = await self._next(call, waiting)
            waiting.usage, waiting.status, waiting.reason = event.usage, 200, ""
            yield chunk({}, event.reason)
            if with_usage:
                last = {"object": "chat.completion.chunk", "choices": [], "usage": _usage(event.usage)}
                yield _event({**head, **last})
            yield b"data: [DONE]\n\n"
            self._log_texts(call, waiting.job, text)
        except Exception as error:  # the response has begun, so the error is its last event
            failure = _failure(call, error)
            waiting.status, waiting.reason = failure.status, one_line(str(failure))
            yield _event(failure.body())

    def _ended(self, call: _Call, waiting: _Waiting) -> None:
        """End a stream."""
        waiting.job.cancelled = True
        self._done(call, waiting.status, waiting.usage, waiting.reason)

    async def _rerank(self, call: _Call) -> Response:
        asked = parsed(await self._body(call.request), RerankRequest)
        if not self._model.ranks:
            raise RequestError("this model does not rank documents: train one with --enable_reranking")
        if not asked.documents:
            raise RequestError("documents: give at least one", param="documents")
        job = self._job(asked.query.strip(), asked.documents)
        job.ranks, job.rate = True, self._model.compression_rate
        waiting = self._submit(call, job)
        event = await self._next(call, waiting)
        if not isinstance(event, Scores):
            raise RequestError("the model returned no scores", 500)
        waiting.usage = event.usage
        order = sorted(range(len(job.documents)), key=lambda place: -event.relevance[place])
        results = [
            {"index": place, "relevance_score": event.relevance[place]}
            | ({"document": {"text": job.documents[place]}} if asked.return_documents else {})
            for place in order[: asked.top_n]
        ]
        self._done(call, 200, waiting.usage)
        return _json_response(
            {
                "id": f"rerank-{call.identity}",
                "model": self._name,
                "results": results,
                "usage": {"total_tokens": event.usage.document_tokens},
            }
        )

    # Shared by the routes.

    async def _body(self, request: Request) -> bytes:
        """Read the body. Reading stops where the body is longer than `--max_body`, which is an error."""
        most = self._config.max_body
        too_long = RequestError(f"the body is longer than {most:,} bytes: send less", 413)
        with suppress(ValueError):
            if int(request.headers.get("content-length", "0")) > most:
                raise too_long
        body = bytearray()
        try:
            async with asyncio.timeout(self._config.request_timeout):
                async for part in request.stream():
                    body += part
                    if len(body) > most:
                        raise too_long
        except TimeoutError:
            raise RequestError("the body did not arrive in time", 408) from None
        return bytes(body)

    def _chat_job(self, asked: ChatRequest) -> Job:
        config, model = self._config, self._model
        query = asked.query
        new_tokens = asked.max_completion_tokens or asked.max_tokens or config.default_new_tokens
        if new_tokens > config.max_new_tokens:
            raise RequestError(
                f"max_tokens: at most {config.max_new_tokens:,} here", param="max_completion_tokens"
            )
        job = self._job(query, asked.documents or [])
        job.rate = asked.compression_rate or config.compression_rate or model.compression_rate
        job.budget = asked.budget or config.budget
        try:
            model.check_rate(job.rate)
            model.check_budget(job.budget)
        except UsageError as error:
            raise RequestError(str(error).removeprefix("--")) from None
        job.system, job.compressed, job.stops = asked.system, asked.compressed, asked.stops
        job.max_new_tokens, job.seed = new_tokens, asked.seed
        job.temperature = asked.temperature or 0.0
        job.top_p = 1.0 if asked.top_p is None else asked.top_p
        return job

    def _job(self, query: str, documents: list[str | Document]) -> Job:
        config = self._config
        if not query:
            raise RequestError("there is no question: the query, or the last message of the user, is empty")
        if len(documents) > config.max_documents:
            raise RequestError(f"documents: at most {config.max_documents:,} here", param="documents")
        texts = [
            own if isinstance(own, str) else document_text({"title": own.title, "text": own.text})
            for own in documents
        ]
        for place, text in enumerate(texts):
            if not text.strip():
                raise RequestError(f"documents.{place}: is empty: leave it out", param=f"documents.{place}")
            if len(text) > config.max_document_characters:
                raise RequestError(
                    f"documents.{place}: at most {config.max_document_characters:,} characters here",
                    param=f"documents.{place}",
                )
        return Job(query, texts, lambda _: None)

    def _submit(self, call: _Call, job: Job) -> _Waiting:
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[Event] = asyncio.Queue()

        def send(event: Event) -> None:
            with suppress(RuntimeError):  # the event loop has ended: no client waits any more
                loop.call_soon_threadsafe(events.put_nowait, event)

        job.identity, job.send = call.identity, send
        self._engine.submit(job)
        return _Waiting(job, events, loop.time() + self._config.request_timeout)

    async def _next(self, call: _Call, waiting: _Waiting) -> Event:
        """Wait for the engine's next event.

        Raises:
            RequestError: The engine failed, or the time is up.
            ClientDisconnect: The client closed the connection.
        """
        try:
            event = await self._event(call.request, waiting)
        except BaseException:
            waiting.job.cancelled = True
            raise
        if isinstance(event, RequestError):
            raise event
        return event

    @staticmethod
    async def _event(request: Request, waiting: _Waiting) -> Event:
        loop = asyncio.get_running_loop()
        while (left := waiting.deadline - loop.time()) > 0:
            if loop.time() - waiting.looked >= _CONNECTION_SECONDS:
                waiting.looked = loop.time()
                if await request.is_disconnected():
                    raise ClientDisconnect
            with suppress(TimeoutError):
                return await asyncio.wait_for(waiting.events.get(), min(left, _CONNECTION_SECONDS))
        raise RequestError("the answer took too long: ask for less, or try again", 504)

    def _first(self, text: str, call: _Call) -> None:
        if not text:
            self._metrics.first(time.perf_counter() - call.started)

    def _log_texts(self, call: _Call, job: Job, answer: str) -> None:
        if self._config.log_texts:
            log.info("request %s: query %r, answer %r", call.identity, job.query, answer)


def _identity(request: Request) -> str:
    """Return the client's id of a request if it is short and plain, else a new one."""
    given = request.headers.get(_ID_HEADER, "")
    return given if _ID.fullmatch(given) else uuid.uuid4().hex


def _failure(call: _Call, error: BaseException) -> RequestError:
    """Return the error that the client gets; only the log has the details."""
    if isinstance(error, RequestError):
        return error
    if isinstance(error, ClientDisconnect):
        return RequestError(_LEFT, _AWAY)
    if isinstance(error, asyncio.CancelledError):  # uvicorn waits no longer
        return RequestError(SHUTTING_DOWN, 503)
    log.error("request %s failed", call.identity, exc_info=error)
    return RequestError("the server failed on this request", 500)


def _usage(usage: Usage) -> dict[str, Any]:
    """Usage in OpenAI's format, with counts of the compression."""
    return {
        "prompt_tokens": usage.prompt,
        "completion_tokens": usage.completion,
        "total_tokens": usage.prompt + usage.completion,
        "compression": {
            "document_tokens": usage.document_tokens,
            "embeddings": usage.embeddings,
            "cut_documents": usage.cut_documents,
            "cut_queries": usage.cut_queries,
            "cut_tokens": usage.cut_tokens,
        },
    }


def _event(content: dict[str, Any]) -> bytes:
    return b"data: " + orjson.dumps(content) + b"\n\n"


def _json_response(content: dict[str, Any], status: int = 200) -> Response:
    return Response(orjson.dumps(content), status, media_type="application/json")


async def _not_found(request: Request, error: Exception) -> Response:
    """Paths and methods that are not served, in OpenAI's error format."""
    status = getattr(error, "status_code", 500)
    served = f"POST {_CHAT}, POST {_RERANK}, GET /v1/models, GET /metrics, GET {_KEYLESS_PATH}"
    words = {404: f"there is no such path: the server has {served}", 405: "this path has another method"}
    response = _json_response(RequestError(words.get(status, str(error)), status).body(), status)
    response.headers[_ID_HEADER] = _identity(request)
    return response
