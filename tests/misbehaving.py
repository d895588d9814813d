"""An OpenAI-compatible server with the faults of real servers."""

import functools
import hashlib
import json
import random
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

FAULTS = ("429", "500", "hang", "cut", "json", "model")
Script = Callable[[int], str] | Sequence[str]


def mixture(seed: int = 0, share: float = 0.3, faults: Sequence[str] = FAULTS) -> Callable[[int], str]:
    """A fault for the given `share` of requests, chosen by their numbers."""

    def fault(number: int) -> str:
        draw = random.Random(seed * 1_000_003 + number)
        return draw.choice(faults) if draw.random() < share else ""

    return fault


def answer_to(question: str) -> str:
    """The answer of this server, with `mark(question)` in it."""
    return f"The answer is {mark(question)}, as the documents say."


def mark(question: str) -> str:
    return hashlib.sha256(question.encode()).hexdigest()[:16]


def logprobs_of(text: str, count: int) -> list[dict[str, Any]]:
    """Log probabilities with a token for each letter; some servers also send the token that ends it."""
    return [
        {
            "token": token,
            "logprob": -0.5,
            "top_logprobs": [{"token": token * (n + 1), "logprob": -0.5 - n} for n in range(count)],
        }
        for token in [*text, "<|im_end|>"]
    ]


class Misbehaving(ThreadingHTTPServer):
    """Serves `/v1`. The n-th request has the fault `script(n)` or `script[n]`; "" is no fault.

    A question is the last line of a user turn. `asked` counts its requests, `paid` its right answers.
    """

    daemon_threads = True
    request_queue_size = 512

    def __init__(self, script: Script = (), *, model: str = "wise-owl", port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.script = script
        self.model = model
        self.models: Sequence[str] | None = [model]  # None: has no list
        self.key = ""
        self.retry_after = "0.05"
        self.hang = 30.0
        self.delay = 0.0
        self.refuses_system = False
        self.knows_model = True
        self.newer_limit = False  # knows only max_completion_tokens
        self.context = 1 << 40  # characters of all messages
        self.poison: dict[str, str] = {}  # question -> the fault it always meets
        self.usage: Any = {"prompt_tokens": 90, "completion_tokens": 10}
        self.text: Any = None
        self.logprobs = "given"  # where asked for; or ignored, refused, thoughts: of these, too
        self.error_text = ""  # with a fault that is a status
        self.error: Any = "no more"  # with the fault "error", under status 200
        self.message: dict[str, Any] = {}  # of each answer, besides
        self.completion_model: Callable[[], str] = str  # the name under which it answers, if another
        self.only_temperature: float | None = None
        self.finish_reason: Any = "stop"
        self.asked: Counter[str] = Counter()
        self.paid: Counter[str] = Counter()
        self.bodies: list[dict[str, Any]] = []
        self.times: list[float] = []
        self.keys: set[str | None] = set()
        self.running = self.most_running = 0
        self.lock = threading.Lock()
        self.released = threading.Event()
        threading.Thread(target=functools.partial(self.serve_forever, 0.01), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    def stop(self) -> None:
        self.released.set()
        self.shutdown()
        self.server_close()

    def next_fault(self, question: str, body: dict[str, Any]) -> str:
        with self.lock:
            number = len(self.bodies)
            self.bodies.append(body)
            self.times.append(time.monotonic())
            self.asked[question] += 1
        if question in self.poison:
            return self.poison[question]
        if callable(self.script):
            return self.script(number)
        return self.script[number] if number < len(self.script) else ""

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore clients that close the connection."""


class Handler(BaseHTTPRequestHandler):
    server: Misbehaving
    protocol_version = "HTTP/1.1"

    def setup(self) -> None:
        super().setup()
        self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def do_GET(self) -> None:
        models = self.server.models
        if not self.key_fits():
            return
        if models is None:
            self.reply(404, {"error": "no such page"})
        else:
            self.reply(200, {"object": "list", "data": [{"id": name} for name in models]})

    def do_POST(self) -> None:
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        question = body["messages"][-1]["content"].splitlines()[-1]
        with server.lock:
            server.running += 1
            server.most_running = max(server.most_running, server.running)
        try:
            self.serve(body, question)
        finally:
            with server.lock:
                server.running -= 1

    def serve(self, body: dict[str, Any], question: str) -> None:
        server = self.server
        if not self.key_fits():
            return
        if self.path != "/v1/chat/completions":
            self.reply(404, {"detail": "Not Found"})
            return
        if not server.knows_model:
            self.reply(404, {"error": {"message": "no such model"}})
            return
        fault = server.next_fault(question, body)
        roles = [message["role"] for message in body["messages"]]
        if server.refuses_system and "system" in roles:
            self.reply(400, {"error": {"message": "System role not supported"}})
        elif server.newer_limit and "max_tokens" in body:
            self.reply(400, {"error": {"message": "Use 'max_completion_tokens' instead of 'max_tokens'."}})
        elif server.logprobs == "refused" and "logprobs" in body:
            self.reply(400, {"error": {"message": "This model does not support logprobs"}})
        elif server.only_temperature not in {None, body.get("temperature", server.only_temperature)}:
            error_text = (
                "Unsupported value: 'temperature' does not support 0.0 with this model. Only the default (1)"
            )
            self.reply(400, {"error": {"message": error_text, "param": "temperature"}})
        elif sum(len(message["content"]) for message in body["messages"]) > server.context:
            self.reply(400, {"error": {"message": f"maximum context length is {server.context}"}})
        elif fault == "hang":
            server.released.wait(server.hang)
            self.close_connection = True
        elif fault == "429":
            error_text = {"error": {"message": server.error_text or "slow down"}}
            self.reply(429, error_text, {"Retry-After": server.retry_after})
        elif fault == "error":
            self.reply(200, {"error": server.error})
        elif fault == "json":
            self.reply(200, {"choices": "none", "model": 3})
        elif fault.isdecimal():
            self.reply(int(fault), {"error": {"message": server.error_text or f"fault {fault}"}})
        else:
            time.sleep(server.delay)
            if not fault:
                with server.lock:  # before the reply: who has it may look at once
                    server.paid[question] += 1
            self.reply(200, self.completion(body, question, fault), cut=fault == "cut")

    def completion(self, body: dict[str, Any], question: str, fault: str) -> dict[str, Any]:
        server = self.server
        text = answer_to(question) if server.text is None else server.text
        message = {"role": "assistant", "content": text} | server.message
        choice = {"message": message, "finish_reason": server.finish_reason}
        if body.get("logprobs") and server.logprobs != "ignored" and fault != "bare":
            thoughts = "Well, well." if server.logprobs == "thoughts" else ""
            choice["logprobs"] = {"content": logprobs_of(thoughts + text, body["top_logprobs"])}
        return {
            "object": "chat.completion",
            "model": "impostor" if fault == "model" else server.completion_model() or body["model"],
            "choices": [choice],
            "usage": server.usage,
        }

    def key_fits(self) -> bool:
        server = self.server
        server.keys.add(self.headers["Authorization"])
        if server.key and self.headers["Authorization"] != f"Bearer {server.key}":
            self.reply(401, {"error": {"message": f"wrong: {self.headers['Authorization']}"}})
            return False
        return True

    def reply(
        self, status: int, content: Any, headers: dict[str, str] | None = None, *, cut: bool = False
    ) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data[: len(data) // 2] if cut else data)
        if cut:
            self.close_connection = True

    def log_message(self, *_: Any) -> None:
        pass
