"""A server of files on loopback, with faults that tests choose."""

import functools
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Server(ThreadingHTTPServer):
    """Serves `files`; its attributes set its faults."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.headers: dict[str, str] = {"ETag": '"1"'}
        self.status: dict[str, int] = {}
        self.ranges = True
        self.length = True
        self.drop_after: int | None = None  # the connection, once, after so many bytes of a second answer
        self.requests: list[tuple[str, str | None]] = []
        threading.Thread(target=functools.partial(self.serve_forever, 0.01), daemon=True).start()

    def url(self, name: str, login: str = "") -> str:
        return f"http://{login}127.0.0.1:{self.server_port}/{name}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        server = self.server
        name = self.path.partition("?")[0].lstrip("/")
        wanted = self.headers["Range"] if server.ranges else None
        server.requests.append((self.path, wanted))
        number = len(server.requests)
        status = server.status.get(name, 200 if name in server.files else 404)
        content = server.files.get(name, b"")
        if wanted and status == 200:
            first, last = map(int, re.findall(r"\d+", wanted))
            content, status = content[first : last + 1], 206
        self.send_response(status)
        for key, value in server.headers.items():
            self.send_header(key, value)
        if server.length:
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if server.drop_after is not None and number > 1:
            content, server.drop_after = content[: server.drop_after], None
        try:
            self.wfile.write(content)
        except ConnectionError:  # the reader wanted the headers alone
            self.close_connection = True

    def log_message(self, *_: Any) -> None:
        pass
