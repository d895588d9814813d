"""The server as clients see it: OpenAI's own client, streams, limits, keys, faults."""

import asyncio
import contextlib
import http.client
import json
import logging
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
import uvicorn
from pydantic import ValidationError
from transformers import AutoTokenizer, MistralConfig, MistralForCausalLM

from conftest import ROOT
from scaledown import cli
from scaledown.config.serve import ServeConfig, api_key
from scaledown.errors import UsageError
from scaledown.models.sources import resolve
from scaledown.serving.app import Server, _Stream
from scaledown.serving.engine import Engine
from scaledown.serving.protocol import ChatRequest, RerankRequest
from scaledown.serving.serve import _load_model, main
from scaledown.student.model import ScaleDownModel
from scaledown.student.settings import ScaleDownConfig
from tiny import pointer_student

KEY = "correct horse"
DOCUMENTS = [{"title": "Tides", "text": "The moon causes the tides."}, "A tower of iron is 300 metres tall."]
CHAT, RERANK = "/v1/chat/completions", "/v1/rerank"


@pytest.fixture(scope="module")
def model(models: dict[str, Path]) -> ScaleDownModel:
    made: ScaleDownModel = pointer_student(models["causal_lm"])
    return made


class Running:
    """A server in a thread of this process."""

    def __init__(self, model: ScaleDownModel, key: str = "", **settings: Any) -> None:
        config = ServeConfig(model="x", **{"batch_size": 8, **settings})
        self.engine = Engine(model, config)
        app = Server(self.engine, model.config, "tiny", config, key).app()
        self._uvicorn = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None, access_log=False))
        self.engine.start(lambda: setattr(self._uvicorn, "should_exit", True))
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()
        deadline = time.monotonic() + 30
        while not self._uvicorn.started and time.monotonic() < deadline:
            time.sleep(0.01)
        self.port: int = self._uvicorn.servers[0].sockets[0].getsockname()[1]

    def _serve(self) -> None:
        asyncio.run(self._uvicorn._serve())  # without signals, which belong to the main thread

    def stop(self) -> None:
        self._uvicorn.should_exit = True
        self._thread.join(30)
        self.engine.stop(10)

    def client(self, key: str = "none") -> openai.OpenAI:
        return openai.OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", api_key=key, max_retries=0)

    def ask(
        self, path: str, body: Any = None, method: str = "POST", headers: dict[str, str] | None = None
    ) -> tuple[int, Any, Any]:
        """Status, JSON and headers of a response."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        content = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        connection.request(method, path, content, {"Content-Type": "application/json", **(headers or {})})
        response = connection.getresponse()
        text = response.read()
        connection.close()
        found = json.loads(text) if response.headers["Content-Type"] == "application/json" else text.decode()
        return response.status, found, response.headers


@contextlib.contextmanager
def running(model: ScaleDownModel, key: str = "", **settings: Any) -> Iterator[Running]:
    server = Running(model, key, **settings)
    try:
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="module")
def server(model: ScaleDownModel) -> Iterator[Running]:
    with running(model) as made:
        yield made


def chat(text: str = "What causes tides?", **fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}], "max_tokens": 6, **fields}


def test_openais_client_gets_the_models_answers(server: Running, model: ScaleDownModel) -> None:
    with server.client() as client:
        assert [one.id for one in client.models.list()] == ["tiny"]
    cases: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({"documents": DOCUMENTS}, {}),
        (
            {"documents": DOCUMENTS, "compression_rate": 4, "budget": "shared"},
            {"compression_rate": 4, "budget": "shared"},
        ),
        ({"documents": DOCUMENTS, "compressed": False}, {"compressed": False}),
        ({}, {}),
    ]
    for extra, way in cases:
        documents = DOCUMENTS if "documents" in extra else []
        expected = model.answer("What causes tides?", documents, max_new_tokens=6, **way)
        with server.client() as client:
            found = client.chat.completions.create(
                model="any name",
                messages=[{"role": "user", "content": "What causes tides?"}],
                max_completion_tokens=6,
                extra_body=extra,
            )
        assert found.choices[0].message.content == expected
        assert found.model == "tiny"
        assert found.usage is not None
        assert found.usage.total_tokens == found.usage.prompt_tokens + found.usage.completion_tokens
        content = found.usage.model_extra["compression"]  # type: ignore[index]
        assert content["cut_documents"] == content["cut_queries"] == content["cut_tokens"] == 0
        assert (content["embeddings"] > 0) == (bool(documents) and extra.get("compressed", True))
        assert content["document_tokens"] >= 4 * content["embeddings"] - 8


def test_streams_are_the_answer_in_pieces(server: Running, model: ScaleDownModel) -> None:
    with server.client() as client:
        stream = client.chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": [{"type": "text", "text": "What causes tides?"}]}],
            max_tokens=12,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"documents": DOCUMENTS},
        )
        chunks = list(stream)
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(pieces) == model.answer("What causes tides?", DOCUMENTS, max_new_tokens=12)
    assert len([piece for piece in pieces if piece]) > 3
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens in range(1, 13)
    assert chunks[-2].choices[0].finish_reason in {"stop", "length"}
    assert len({chunk.id for chunk in chunks}) == 1


def test_a_system_message_takes_the_place_of_the_templates(server: Running, model: ScaleDownModel) -> None:
    turns = [
        {"role": "system", "content": "Answer in one word."},
        {"role": "user", "content": "An earlier question"},
        {"role": "assistant", "content": "An earlier answer"},
        {"role": "user", "content": "What causes tides?"},
    ]
    _, with_system, _ = server.ask(CHAT, {"messages": turns, "max_tokens": 2, "documents": DOCUMENTS})
    _, without, _ = server.ask(CHAT, {"messages": turns[1:], "max_tokens": 2, "documents": DOCUMENTS})
    template = len(model.tokenizer(model.config.system)["input_ids"])
    own = len(model.tokenizer("Answer in one word.")["input_ids"])
    difference = without["usage"]["prompt_tokens"] - with_system["usage"]["prompt_tokens"]
    assert difference == pytest.approx(template - own, abs=2)


def test_stop_texts_end_an_answer(server: Running) -> None:
    _, whole, _ = server.ask(CHAT, chat(documents=DOCUMENTS, max_tokens=12))
    text = whole["choices"][0]["message"]["content"]
    stop = text[len(text) // 2 : len(text) // 2 + 2]
    _, cut, _ = server.ask(CHAT, chat(documents=DOCUMENTS, max_tokens=12, stop=[stop]))
    assert cut["choices"][0]["message"]["content"] == text.partition(stop)[0].strip()
    assert cut["choices"][0]["finish_reason"] == "stop"


def test_documents_are_ranked(server: Running, model: ScaleDownModel) -> None:
    texts = ["A bird.", "The moon causes the tides.", "The old tower by the river is of stone."]
    scores = model.rerank("Which tower?", texts)
    status, found, _ = server.ask(
        RERANK, {"query": "Which tower?", "documents": [texts[0], {"text": texts[1]}, texts[2]]}
    )
    assert status == 200
    order = sorted(range(3), key=lambda place: -scores[place])
    assert [one["index"] for one in found["results"]] == order
    assert [one["relevance_score"] for one in found["results"]] == pytest.approx(
        [scores[place] for place in order], abs=1e-5
    )
    body = {"query": "Which tower?", "documents": texts, "top_n": 1, "return_documents": True}
    _, found, _ = server.ask(RERANK, body)
    assert found["results"][0]["document"] == {"text": texts[order[0]]}
    assert len(found["results"]) == 1


REFUSED: list[tuple[str, Any, int, str]] = [
    (CHAT, b"{", 400, "not valid JSON"),
    (CHAT, b"\xff\xfe", 400, "not valid JSON"),
    (CHAT, b'{"messages": [{"role": "user", "content": "\xff"}]}', 400, "not valid JSON"),
    (CHAT, b"[" * 3_900, 400, "not valid JSON"),
    (CHAT, [], 400, "JSON object"),
    (CHAT, chat("Why?", document=["x"]), 400, "document is not known here: did you mean documents?"),
    (CHAT, chat("Why?", compresion_rate=4), 400, "did you mean compression_rate?"),
    (CHAT, chat("Why?", presence_penality=1), 400, "did you mean presence_penalty?"),
    (RERANK, {"query": "Why?", "document": ["x"]}, 400, "did you mean documents?"),
    (
        CHAT,
        chat("Why?", documents=["x", {"text": "x", "titel": "y"}]),
        400,
        "documents.1.titel is not known here: did you mean documents.1.title?",
    ),
    (CHAT, {}, 400, "messages: field required"),
    (CHAT, {"messages": []}, 400, "messages: list should have at least 1 item, not 0"),
    (CHAT, {"messages": [{"role": "king", "content": "x"}]}, 400, "messages.0.role"),
    (
        CHAT,
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]},
        400,
        "text",
    ),
    (CHAT, {"messages": [{"role": "system", "content": "x"}]}, 400, "no question"),
    (CHAT, chat("  "), 400, "no question"),
    (CHAT, chat(documents="a text"), 400, "documents"),
    (CHAT, chat(documents=[3]), 400, "documents.0: must be a text, or an object with text"),
    (CHAT, chat(documents=[""]), 400, "documents.0: is empty"),
    (CHAT, chat(documents=[{"title": "x"}]), 400, "documents.0.text"),
    (CHAT, chat(documents=["x"] * 129), 400, "at most 128"),
    (CHAT, chat(documents=["x" * 1_000_000]), 400, "50,000 characters"),
    (CHAT, chat("why " * 5000, documents=["x"], compressed=False), 400, "fit|tokens|shorten"),
    (CHAT, chat(max_tokens="5"), 400, "max_tokens"),
    (CHAT, chat(max_tokens=0), 400, "max_tokens"),
    (CHAT, chat(max_tokens=5000), 400, "at most 1,024"),
    (CHAT, chat(temperature=-1), 400, "temperature"),
    (CHAT, chat(temperature=True), 400, "temperature"),
    (CHAT, chat(stop="x" * 2000), 400, "stop"),
    (CHAT, chat(stop=["a"] * 5), 400, "stop"),
    (CHAT, chat(compression_rate=2), 400, "compression_rate 2"),
    (CHAT, chat(budget="all"), 400, "budget"),
    (CHAT, chat(n=2), 400, "n is not supported"),
    (CHAT, chat(tools=[{"type": "function"}]), 400, "tools is not supported"),
    (CHAT, chat(logprobs=True), 400, "logprobs is not supported"),
    (CHAT, chat(response_format={"type": "json_object"}), 400, "response_format is not supported"),
    (RERANK, {"query": "", "documents": ["x"]}, 400, "no question"),
    (RERANK, {"query": "x", "documents": []}, 400, "at least one"),
    (RERANK, {"query": "x"}, 400, "documents"),
    ("/v1/completions", {}, 404, "no such path: the server has POST /v1/chat/completions"),
    ("/v1/models", {}, 405, "another method"),
]


@pytest.mark.parametrize(("path", "body", "status", "message"), REFUSED)
def test_wrong_requests_get_one_clear_sentence(
    server: Running, path: str, body: Any, status: int, message: str
) -> None:
    found, content, _ = server.ask(path, body)
    assert found == status, content
    assert set(content) == {"error"}
    assert set(content["error"]) == {"message", "type", "param", "code"}
    assert content["error"]["code"] == status
    assert re.search(message, content["error"]["message"]), content
    assert len(content["error"]["message"]) < 400


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        (ChatRequest, {"messages": [{}] * 1000}),
        (ChatRequest, {"messages": [{"role": "user", "content": [{}] * 1000}]}),
        (ChatRequest, chat(documents=[{}] * 1000)),
        (ChatRequest, chat(stop=[3] * 4)),
        (RerankRequest, {"query": "Why?", "documents": [{}] * 1000}),
    ],
)
def test_a_list_is_checked_up_to_its_first_wrong_item(
    kind: type[ChatRequest | RerankRequest], fields: dict[str, Any]
) -> None:
    with pytest.raises(ValidationError) as refused:
        kind.model_validate(fields)
    assert refused.value.error_count() <= 3, "of one item, by each type that it may have"


def test_log_has_the_reason_of_a_refusal(server: Running, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "scaledown")
    assert server.ask(CHAT, chat("Why?", document=["x"]))[0] == 400
    assert "tokens 0: document is not known here: did you mean documents?" in caplog.text


def test_unread_tokens_are_reported_and_logged(server: Running, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "scaledown")
    _, content, _ = server.ask(CHAT, chat("why " * 200, documents=["very " * 200, "No."]))
    found = content["usage"]["compression"]
    assert (found["cut_documents"], found["cut_queries"], found["cut_tokens"]) == (1, 1, 0)
    assert "cut documents 1, queries 1, tokens 0" in caplog.text
    _, content, _ = server.ask(CHAT, chat(documents=["very " * 5000], compressed=False))
    cut = content["usage"]["compression"]["cut_tokens"]
    assert cut > 0
    assert f"cut documents 0, queries 0, tokens {cut}" in caplog.text


def test_each_response_has_the_id_of_its_log_line(server: Running, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "scaledown")
    cases: list[tuple[str, Any, str]] = [
        (CHAT, chat(), "POST"),
        (CHAT, chat(stream=True), "POST"),
        (CHAT, chat(n=2), "POST"),
        (RERANK, {"query": "Why?", "documents": ["x"]}, "POST"),
        ("/health", None, "GET"),
        ("/nowhere", None, "GET"),
    ]
    for path, body, method in cases:
        for given, taken in (("a.Client-1_x", True), ("x" * 65, False), ("a b", False), ("", False)):
            caplog.clear()
            _, content, headers = server.ask(path, body, method, {"X-Request-ID": given})
            identity = headers["x-request-id"]
            assert (identity == given) == taken
            assert re.fullmatch("[A-Za-z0-9._-]{1,64}", identity)
            if path in {CHAT, RERANK}:
                wait_for(lambda sent=identity, route=path: f"request {sent}: {route}" in caplog.text)
            if body and body.get("stream"):
                assert f'"id":"chatcmpl-{identity}"' in content
            elif "id" in content:
                assert content["id"] in {f"chatcmpl-{identity}", f"rerank-{identity}"}


@pytest.mark.parametrize("stream", [False, True])
def test_an_unexpected_failure_is_answered_logged_and_counted(
    model: ScaleDownModel,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    stream: bool,
) -> None:
    def fails(*_: Any) -> None:
        raise ValueError("broken")

    caplog.set_level(logging.INFO, "scaledown")
    monkeypatch.setattr("scaledown.serving.app.Metrics.first", fails)
    with running(model) as server:
        status, content, headers = server.ask(CHAT, chat(stream=stream))
        assert status == (200 if stream else 500)
        if stream:  # its first text cannot be sent
            content = json.loads(content.strip().splitlines()[-1].removeprefix("data: "))
        assert content["error"]["message"] == "the server failed on this request"
        assert "ValueError: broken" in caplog.text
        wait_for(lambda: f"request {headers['x-request-id']}: {CHAT} 500" in caplog.text)
        assert "tokens 0: the server failed on this request" in caplog.text
        _, metrics, _ = server.ask("/metrics", method="GET")
        assert f'scaledown_requests_total{{route="{CHAT}",status="500"}} 1.0' in metrics


def test_a_stream_ends_also_if_its_client_left_before_it_began() -> None:
    begun, ended = [], []

    async def events() -> AsyncIterator[bytes]:
        begun.append(1)
        yield b""

    async def receive() -> dict[str, str]:
        return {"type": "http.disconnect"}

    async def send(_: Any) -> None:
        await asyncio.sleep(0)

    scope = {"type": "http", "asgi": {"spec_version": "2.3"}}  # as uvicorn's
    asyncio.run(_Stream(events(), lambda: ended.append(1))(scope, receive, send))
    assert not begun
    assert ended


def test_a_cancelled_request_gets_503_and_is_logged(
    server: Running, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def cancelled(*_: Any) -> None:
        raise asyncio.CancelledError

    caplog.set_level(logging.INFO, "scaledown")
    monkeypatch.setattr("scaledown.serving.app.Server._body", cancelled)
    status, content, headers = server.ask(CHAT, chat())
    assert status == 503
    assert headers["Retry-After"] == "1"
    assert content["error"]["message"] == "the server is shutting down"
    assert f"{CHAT} 503" in caplog.text


def test_fields_that_ask_for_nothing_are_ignored(server: Running) -> None:
    body = chat(
        documents=[*DOCUMENTS, {"text": "It rains.", "subtitle": "of others", "url": "a"}],
        n=1,
        tools=[],
        logprobs=False,
        presence_penalty=0.0,
        response_format={"type": "text"},
        user="me",
        chat_template_kwargs={"x": 1},
        store=None,
        min_tokens=0,  # of vLLM; no misspelt `max_tokens`
        models=["another"],  # of OpenRouter; no misspelt `model`
        document_ids=["1"],
        stops=None,
    )
    assert server.ask(CHAT, body)[0] == 200


def test_a_model_without_scores_ranks_nothing(models: dict[str, Path]) -> None:
    plain = ScaleDownModel.build(
        ScaleDownConfig(num_layers=1, doc_max_length=32), resolve(str(models["causal_lm"]))
    ).eval()
    with running(plain) as server:
        status, content, _ = server.ask(RERANK, {"query": "x", "documents": ["y"]})
        assert status == 400
        assert "--enable_reranking" in content["error"]["message"]
        status, content, _ = server.ask(CHAT, chat(documents=["y"], compression_rate=4))
        assert status == 400
        assert server.ask(CHAT, chat(documents=["y"]))[0] == 200


def test_a_body_that_is_too_long_is_not_read(model: ScaleDownModel) -> None:
    with running(model, max_body=2000) as server:
        assert server.ask(CHAT, chat("x" * 3000))[0] == 413
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
        connection.request(
            "POST",
            CHAT,
            iter([b" " * 1500] * 2),
            encode_chunked=True,
            headers={"Transfer-Encoding": "chunked"},
        )
        assert connection.getresponse().status == 413
        connection.close()
        assert server.ask(CHAT, chat("Why?"))[0] == 200


def test_a_key_is_asked_for_and_never_logged(model: ScaleDownModel, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    with running(model, key=KEY) as server:
        for given in (
            {},
            {"Authorization": "Bearer wrong"},
            {"Authorization": KEY},
            {"Authorization": "Bearer é"},
        ):
            headers = {name: value.encode().decode("latin-1") for name, value in given.items()}
            status, content, sent = server.ask(CHAT, chat(), headers=headers)
            assert status == 401
            assert sent["WWW-Authenticate"] == "Bearer"
            assert content["error"]["type"] == "authentication_error"
        assert server.ask("/metrics", method="GET")[0] == 401
        assert server.ask("/health", method="GET")[:2] == (200, {"status": "ok"})
        with server.client(KEY) as client:
            found = client.chat.completions.create(
                model="x", messages=[{"role": "user", "content": "Why?"}], max_tokens=2
            )
        assert found.usage is not None
        with server.client("wrong") as client, pytest.raises(openai.AuthenticationError):
            client.models.list()
    assert KEY not in caplog.text


def test_texts_are_logged_only_if_asked_for(model: ScaleDownModel, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    for log_texts in (False, True):
        with running(model, log_texts=log_texts) as server:
            server.ask(CHAT, chat("A secret question?", documents=["A secret document."]))
            long = "A secret text, too long. " * 500
            status, refused, _ = server.ask(CHAT, chat(long, documents=["A tower."], compressed=False))
        assert status == 400
        assert "the model takes" in refused["error"]["message"]
        assert "the model takes" in caplog.text
        assert "secret" not in refused["error"]["message"]
        assert ("secret question" in caplog.text) == log_texts
        assert "secret text" not in caplog.text
        assert "secret document" not in caplog.text


def test_a_client_that_leaves_frees_its_place(model: ScaleDownModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model.generator.generation_config, "eos_token_id", [])  # no answer ends by itself
    with running(model, batch_size=1, max_new_tokens=3_900) as server:
        for stream in (True, False):
            connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
            body = chat(max_tokens=3_900, stream=stream, temperature=2, seed=1)
            connection.request("POST", CHAT, json.dumps(body))
            if stream:
                assert connection.getresponse().read(40)
            else:
                wait_for(lambda: server.engine.running == 1)
            (row,) = server.engine._rows
            connection.close()
            wait_for(lambda: server.engine.running == 0)
            assert row.written < 3_900
            assert server.ask(CHAT, chat())[0] == 200


def wait_for(what: Any) -> None:
    deadline = time.monotonic() + 60
    while not what() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert what()


def test_requests_above_max_waiting_get_429(model: ScaleDownModel) -> None:
    with running(model, batch_size=1, max_waiting=1, max_new_tokens=3_900) as server:
        streams = [http.client.HTTPConnection("127.0.0.1", server.port, timeout=60) for _ in range(2)]
        for number, stream in enumerate(streams):
            body = chat(max_tokens=3_900, stream=True, temperature=2, seed=1)
            stream.request("POST", CHAT, json.dumps(body))
            wait_for(lambda count=number: server.engine.running + server.engine.waiting == count + 1)
        status, content, headers = server.ask(CHAT, chat())
        assert status == 429
        assert headers["Retry-After"] == "1"
        assert content["error"]["type"] == "rate_limit_error"
        for stream in streams:
            stream.close()


def test_request_that_takes_too_long_gets_504(
    model: ScaleDownModel, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "scaledown")
    with running(model, batch_size=1, max_new_tokens=3_900, request_timeout=0.3) as server:
        assert server.ask(CHAT, chat(max_tokens=3_900, temperature=2, seed=1))[0] == 504
        status, text, _ = server.ask(CHAT, chat(max_tokens=3_900, temperature=2, seed=1, stream=True))
        assert status == 200
        assert json.loads(text.strip().splitlines()[-1].removeprefix("data: "))["error"]["code"] == 504
        wait_for(lambda: server.engine.running == 0)
        wait_for(lambda: caplog.text.count("tokens 0: the answer took too long") == 2)


def test_an_engine_that_gave_up_ends_the_server(
    model: ScaleDownModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> None:
        raise ValueError("broken")

    with running(model) as server:
        monkeypatch.setattr(model, "prompts", fails)
        for _ in range(2):
            assert server.ask(CHAT, chat())[0] == 500
        server.ask(CHAT, chat())
        server._thread.join(30)
        assert not server._thread.is_alive()
        assert server.engine.failed


def test_metrics_count_requests_and_tokens(model: ScaleDownModel) -> None:
    with running(model) as server:
        server.ask(CHAT, chat(documents=DOCUMENTS))
        server.ask(CHAT, chat(documents=DOCUMENTS))
        server.ask(CHAT, chat(n=2))
        status, text, _ = server.ask("/metrics", method="GET")
        assert status == 200
    assert f'scaledown_requests_total{{route="{CHAT}",status="200"}} 2.0' in text
    assert f'scaledown_requests_total{{route="{CHAT}",status="400"}} 1.0' in text
    assert 'scaledown_embedding_cache_pairs_total{found="yes"} 2.0' in text
    assert "scaledown_requests_waiting 0.0" in text


@pytest.mark.parametrize("compressed", [True, False])
def test_no_text_becomes_a_special_token(server: Running, model: ScaleDownModel, compressed: bool) -> None:
    token = str(model.tokenizer.eos_token)
    special = f"{token} {token[:2]}\ue000{token[2:]}"  # the second is one without the mark of the documents
    turns = [
        {"role": "system", "content": f"Be {special} brief."},
        {"role": "user", "content": f"Why {special}?"},
    ]
    seen: list[int] = []
    prompts = model.prompts

    def watched(questions: Any, budget: str = "each") -> Any:
        for question in questions:
            seen.extend(token for part in question.encoded.prompt_parts for token in part)
        return prompts(questions, budget)

    plain = {"messages": [{**turn, "content": turn["content"].replace(special, "")} for turn in turns]}
    model.prompts = watched  # type: ignore[method-assign]
    try:
        counts = []
        for body in ({"messages": turns}, plain):
            seen.clear()
            body |= {"documents": [f"A {special} b." if body["messages"] is turns else "A b."]}
            assert server.ask(CHAT, {**body, "max_tokens": 1, "compressed": compressed})[0] == 200
            counts.append(seen.count(model.tokenizer.eos_token_id))
    finally:
        del model.prompts
    assert counts[0] == counts[1]


@pytest.mark.parametrize(
    ("host", "key", "insecure", "fine"),
    [
        ("127.0.0.1", "", False, True),
        ("localhost", "", False, True),
        ("::1", "", False, True),
        ("0.0.0.0", "", False, False),
        ("192.168.1.5", "", False, False),
        ("example.org", "", False, False),
        ("0.0.0.0", KEY, False, True),
        ("0.0.0.0", "", True, True),
    ],
)
def test_others_need_a_key(
    monkeypatch: pytest.MonkeyPatch, host: str, key: str, insecure: bool, fine: bool
) -> None:
    monkeypatch.delenv("SCALEDOWN_API_KEY", raising=False)
    if key:
        monkeypatch.setenv("SCALEDOWN_API_KEY", key)
    config = ServeConfig(model="x", host=host, insecure=insecure)
    if fine:
        assert api_key(config) == key
    else:
        with pytest.raises(UsageError, match="SCALEDOWN_API_KEY"):
            api_key(config)


def test_an_empty_key_is_a_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCALEDOWN_API_KEY", "")
    with pytest.raises(UsageError, match="is empty"):
        api_key(ServeConfig(model="x"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": ""}, "give --model"),
        ({"port": 70_000}, "--port"),
        ({"max_new_tokens": 10}, "--default_new_tokens"),
        ({"request_timeout": 0}, "--request_timeout"),
        ({"batch_size": 0}, "--batch_size"),
    ],
)
def test_settings_are_checked(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        ServeConfig(**{"model": "x", **settings})


PAGE = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")


def fences(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


def test_the_pages_requests_are_answered(server: Running, capsys: pytest.CaptureFixture[str]) -> None:
    snippet, *_ = fences("python")
    exec(compile(snippet.replace("8000", str(server.port)), "serving.md", "exec"), {})
    assert "document_tokens" in capsys.readouterr().out
    (asked,) = [text for text in fences("bash") if text.startswith("curl")]
    words = shlex.split(asked)
    url, body = words[1], words[words.index("-d") + 1]
    status, content, _ = server.ask(url.partition("8000")[2], body.encode())
    assert status == 200
    assert content["usage"]["compression"]["embeddings"] > 0


def test_command_of_the_page_starts_a_server_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    started = []
    monkeypatch.setattr("scaledown.serving.serve.serve", lambda settings: started.append(settings) or 0)
    (start,) = [text for text in fences("bash") if "scaledown serve" in text]
    program, *words = shlex.split(start.splitlines()[-1])
    assert program == "scaledown"
    assert cli.main(words) == 0
    assert [(settings.model, settings.port) for settings in started] == [("model", 8000)]


def test_page_documents_every_field() -> None:
    content = set(re.findall(r"`([a-z_]+)`", PAGE))
    assert set(ChatRequest.model_fields) | set(RerankRequest.model_fields) <= content | {
        "model",
        "return_documents",
    }
    for name in ("max_waiting", "request_timeout", "drain_seconds", "log_texts", "embedding_cache"):
        assert f"--{name}" in PAGE


@pytest.mark.slow
def test_the_example_asks_the_server(server: Running, tmp_path: Path, forked: None) -> None:
    lines = (ROOT / "examples" / "corpus.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    corpus, index = tmp_path / "corpus.jsonl", str(tmp_path / "index")
    corpus.write_text("".join(lines[:5]), encoding="utf-8")
    flags = ["--retriever_model", "bundled:splade-tiny", "--device", "cpu"]
    assert cli.main(["index", "--corpus_path", str(corpus), "--index_dir", index, *flags]) == 0
    done = subprocess.run(
        [
            sys.executable,
            str(ROOT / "examples" / "serve.py"),
            "What causes tides?",
            index,
            f"http://127.0.0.1:{server.port}/v1",
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    first, second = done.stdout.splitlines()
    assert first.split()[0] == "compressed"
    assert int(first.split()[1]) < int(second.split()[1]), done.stdout


def resident_mb() -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1000
    raise AssertionError


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_two_thousand_requests_of_two_hundred_clients_get_their_own_answers(model: ScaleDownModel) -> None:
    words = ["tower", "river", "city", "tree", "bird", "stone", "book", "bridge", "moon"]
    queries = [f"What about the {words[n % 9]} {n}?" for n in range(2000)]
    documents = [[f"The {words[n % 7]} has number {n}."] for n in range(2000)]
    expected = model.answer(queries, documents, max_new_tokens=4, batch_size=50, compressed=False)
    assert len(set(expected)) > 500

    def ask(number: int) -> str:
        streams = number % 2 == 1
        body = chat(
            queries[number], documents=documents[number], compressed=False, max_tokens=4, stream=streams
        )
        status, content, _ = server.ask(CHAT, body)
        assert status == 200
        if not streams:
            return str(content["choices"][0]["message"]["content"])
        events = [line.removeprefix("data: ") for line in content.splitlines() if line.startswith("data: {")]
        deltas = [json.loads(event)["choices"][0]["delta"] for event in events]
        return "".join(delta.get("content") or "" for delta in deltas)

    with running(model, batch_size=16, max_waiting=400) as server, ThreadPoolExecutor(200) as clients:
        assert list(clients.map(ask, range(500))) == expected[:500]
        before = resident_mb()
        assert list(clients.map(ask, range(500, 2000))) == expected[500:]
        assert resident_mb() < before + 60


@contextlib.contextmanager
def served(model: ScaleDownModel, folder: Path, *flags: str) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A process that serves the model, and its port."""
    model.save_pretrained(folder)
    words = [sys.executable, "-m", "scaledown", "serve", "--model", str(folder), "--port", "0"]
    with subprocess.Popen([*words, "--device", "cpu", *flags], stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        try:
            ready = next(line for line in iter(process.stderr.readline, "") if "ready" in line)
            yield process, int(re.findall(r":(\d+)/v1", ready)[0])
        finally:
            process.kill()


@pytest.mark.slow
def test_sigterm_finishes_running_requests(
    model: ScaleDownModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forked: None
) -> None:
    monkeypatch.setenv("SCALEDOWN_CACHE", str(tmp_path / "cache"))
    with served(model, tmp_path / "student") as (process, port):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        body = chat(max_tokens=400, stream=True, temperature=2, seed=1)
        connection.request("POST", CHAT, json.dumps(body))
        response = connection.getresponse()
        assert response.read(40)
        process.send_signal(signal.SIGTERM)
        text = response.read().decode()
        assert text.strip().endswith("data: [DONE]")
        connection.close()
        assert process.stderr is not None
        rest = process.stderr.read()
        assert process.wait(60) == 0
        assert "Traceback" not in rest
        assert "stopped" in rest


@pytest.mark.slow
def test_requests_not_finished_in_time_get_503(
    model: ScaleDownModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forked: None
) -> None:
    monkeypatch.setenv("SCALEDOWN_CACHE", str(tmp_path / "cache"))
    flags = ("--engine", "transformers", "--drain_seconds", "0", "--max_new_tokens", "3900")
    with served(model, tmp_path / "student", *flags) as (process, port):
        body = chat(max_tokens=3_900, temperature=2, seed=1)
        stream, whole = (http.client.HTTPConnection("127.0.0.1", port, timeout=60) for _ in range(2))
        whole.request("POST", CHAT, json.dumps(body))
        stream.request("POST", CHAT, json.dumps({**body, "stream": True}))
        events = stream.getresponse()
        assert events.read(40)
        process.send_signal(signal.SIGTERM)
        last = events.read().decode().strip().splitlines()[-1]
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == 503
        response = whole.getresponse()
        assert response.status == 503
        assert response.headers["Retry-After"] == "1"
        assert json.loads(response.read())["error"]["message"] == "the server is shutting down"
        stream.close()
        whole.close()
        assert process.stderr is not None
        rest = process.stderr.read()
        assert process.wait(60) == 0
        assert "Traceback" not in rest


@pytest.mark.parametrize(
    ("compressor", "flags", "message"),
    [
        ("pointer", ["--compression_rate", "2"], "--compression_rate 2: a pointer takes 4 to 32"),
        ("n_layers", ["--budget", "shared"], "--budget shared: only a pointer"),
    ],
)
def test_wrong_settings_are_reported_before_the_model_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], compressor: str, flags: list[str], message: str
) -> None:
    ScaleDownConfig(compressor=compressor).save_pretrained(tmp_path)  # without weights
    assert main(["--model", str(tmp_path), "--port", "0", *flags]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("window", [None, 4])
def test_a_generator_with_a_window_is_warned_of(
    models: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture, window: int | None
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(models["causal_lm"])
    tokenizer.save_pretrained(tmp_path / "generator")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = MistralConfig(
        vocab_size=len(tokenizer), num_hidden_layers=2, sliding_window=window, eos_token_id=1, **sizes
    )
    MistralForCausalLM(config).save_pretrained(tmp_path / "generator")
    settings = ScaleDownConfig(num_layers=1, doc_max_length=32)
    folder = str(tmp_path / "student")
    ScaleDownModel.build(settings, resolve(str(tmp_path / "generator"))).save_pretrained(folder)
    _load_model(ServeConfig(model=folder, engine="transformers", device="cpu"), resolve(folder))
    assert ("a new request waits until all running answers are complete" in caplog.text) == bool(window)


def test_port_in_use_is_reported_before_the_model_is_loaded(
    server: Running, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--model", "nowhere", "--port", str(server.port)]) == 2
    assert "choose another" in capsys.readouterr().err
