"""A stand-in for the Hub on loopback, as far as its buckets go: their API, and the store behind it.

What is sent and read goes through huggingface_hub and hf_xet as they are. The formats are those of the Xet
protocol (https://huggingface.co/docs/xet): xorbs of chunks, and shards that tell which of them make a file.
"""

import json
import struct
import tempfile
import threading
import time
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Final, NamedTuple
from urllib.parse import unquote

TOKEN: Final = "hf_secret-of-the-tests"
_HASH: Final = 32
_ENTRY: Final = 48


class Term(NamedTuple):
    """A range of a xorb's chunks, which hold so many bytes of a file."""

    xorb: str
    bytes: int
    first: int
    end: int


def _name(raw: bytes) -> str:
    return "".join(f"{part:016x}" for part in struct.unpack("<4Q", raw))


def _files(shard: bytes) -> dict[str, list[Term]]:
    """What a shard tells of files."""
    found, place = {}, _ENTRY
    while (raw := shard[place : place + _HASH]) != b"\xff" * _HASH:
        flags, count = struct.unpack_from("<II", shard, place + _HASH)
        entries = [shard[place + _ENTRY * (n + 1) : place + _ENTRY * (n + 2)] for n in range(count)]
        found[_name(raw)] = [Term(_name(one[:_HASH]), *struct.unpack("<III", one[-12:])) for one in entries]
        verified, described = flags >> 31 & 1, flags >> 30 & 1
        place += _ENTRY * (1 + count * (1 + verified) + described)
    return found


def _places(xorb: bytes) -> list[int]:
    """Where the chunks of a xorb begin, and where the last ends."""
    places = [0]
    while places[-1] < len(xorb):
        places.append(places[-1] + 8 + int.from_bytes(xorb[places[-1] + 1 : places[-1] + 4], "little"))
    return places


def _now() -> str:
    return f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%S.%fZ}"


class Hub:
    """The stand-in: `url` is its address, `buckets` the files of each by their paths."""

    def __init__(self) -> None:
        self.buckets: dict[str, dict[str, dict[str, Any]]] = {}
        self.requests: list[str] = []
        self._xorbs: dict[str, bytes] = {}
        self._terms: dict[str, list[Term]] = {}
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def content(self, bucket: str, path: str) -> bytes:
        """What a file holds, as a client reads it."""
        from huggingface_hub import HfFileSystem

        system = HfFileSystem(endpoint=self.url, token=TOKEN, skip_instance_cache=True)
        with tempfile.TemporaryDirectory() as folder:
            system.get_file(f"buckets/{bucket}/{path}", f"{folder}/file")
            return (Path(folder) / "file").read_bytes()

    def batch(self, bucket: str, lines: bytes) -> None:
        for operation in map(json.loads, lines.splitlines()):
            path = operation["path"]
            if operation["type"] == "deleteFile":
                self.buckets[bucket].pop(path, None)
                continue
            size = sum(term.bytes for term in self._terms[operation["xetHash"]])
            # The time of a client is not to be believed: this one lives in 1970.
            told = {"size": size, "xetHash": operation["xetHash"], "mtime": "1970-01-01T00:00:01.000Z"}
            self.buckets[bucket][path] = {"type": "file", "path": path, "uploadedAt": _now(), **told}

    def tree(self, bucket: str, prefix: str, *, deep: bool) -> list[dict[str, Any]]:
        """As the Hub does, by the beginning of the name, whether a folder's or not."""
        found: dict[str, dict[str, Any]] = {}
        for path, file in sorted(self.buckets[bucket].items()):
            if not path.startswith(prefix):
                continue
            inside, _, deeper = path.removeprefix(f"{prefix}/" if prefix else "").partition("/")
            if deep or not deeper:
                found[path] = file
            else:
                folder = f"{prefix}/{inside}" if prefix else inside
                found[folder] = {"type": "directory", "path": folder, "uploadedAt": _now()}
        return list(found.values())

    def upload(self, kind: str, name: str, body: bytes) -> dict[str, Any]:
        if kind == "xorbs":
            self._xorbs[name] = body
            return {"was_inserted": True}
        self._terms |= _files(body)
        return {"result": 1}

    def reconstruction(self, name: str) -> dict[str, Any]:
        terms, sources = [], {}
        for xorb, size, first, end in self._terms[name]:
            places = _places(self._xorbs[xorb])
            chunks = {"start": first, "end": end}
            terms.append({"hash": xorb, "unpacked_length": size, "range": chunks})
            sources.setdefault(xorb, []).append(
                {
                    "range": chunks,
                    "url": f"{self.url}/xorb/{xorb}",
                    "url_range": {"start": places[first], "end": places[end] - 1},
                }
            )
        return {"offset_into_first_range": 0, "terms": terms, "fetch_info": sources}

    def part(self, name: str, asked: str) -> bytes:
        first, last = asked.removeprefix("bytes=").split("-")
        return self._xorbs[name][int(first) : int(last) + 1]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: object) -> None:
        pass

    def _send(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _json(self, content: object, **headers: str) -> None:
        self._send(200, json.dumps(content).encode(), Content_Type="application/json", **headers)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        path = self._known()
        match path:
            case ["api", "buckets", owner, name, "batch"]:
                self.hub.batch(f"{owner}/{name}", body)
                self._json({"success": True, "failed": []})
            case ["v1", "xorbs", _, name]:
                self._json(self.hub.upload("xorbs", name, body))
            case ["v1", "shards"]:
                self._json(self.hub.upload("shards", "", body))
            case None:
                pass
            case _:
                self._send(404)

    def do_GET(self) -> None:
        path = self._known()
        match path:
            case ["api", "buckets", owner, name]:
                told = {"id": f"{owner}/{name}", "private": True, "createdAt": _now(), "size": 0}
                self._json({**told, "totalFiles": 0})
            case ["api", "buckets", owner, name, "tree", *prefix]:
                deep = "recursive=true" in self.path.lower()
                self._json(self.hub.tree(f"{owner}/{name}", unquote("/".join(prefix)), deep=deep))
            case ["api", "buckets", _, _, "xet-read-token" | "xet-write-token"]:
                until = int(time.time()) + 3600  # hf_xet reads the content, huggingface_hub the headers
                told = {"X_Xet_Access_Token": "t", "X_Xet_Token_Expiration": str(until)}
                content = {"casUrl": self.hub.url, "exp": until, "accessToken": "t"}
                self._json(content, X_Xet_Cas_Url=self.hub.url, **told)
            case ["v1", "reconstructions", name]:
                self._json(self.hub.reconstruction(name))
            case ["xorb", name]:
                self._send(206, self.hub.part(name, self.headers["Range"]))
            case ["buckets", owner, name, "resolve", *inside]:
                self._send(200, self.hub.content(f"{owner}/{name}", unquote("/".join(inside))))
            case None:
                pass
            case _:
                self._send(404)

    def _known(self) -> list[str] | None:
        """The path's parts; none where it was answered: the token is not ours, or there is no such bucket."""
        parts = self.path.partition("?")[0].strip("/").split("/")
        self.hub.requests.append(f"{self.command} {self.path}")
        if "buckets" not in parts[:2]:
            return parts
        bucket = "/".join(parts[parts.index("buckets") + 1 :][:2])
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._send(401, X_Error_Message="Invalid credentials in Authorization header")
        elif bucket not in self.hub.buckets:
            self._send(404, X_Error_Code="RepoNotFound")
        else:
            return parts
        return None
