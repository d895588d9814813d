"""A stand-in for the Hub on loopback, as far as its buckets go: their API, and the store behind it.

What is sent and read goes through huggingface_hub and hf_xet as they are. The formats are those of the Xet
protocol (https://huggingface.co/docs/xet): xorbs of chunks, and shards that tell which of them make a file.
It is a process of its own: hf_xet waits for answers without letting other threads of Python run.
"""

import json
import re
import struct
import subprocess
import sys
import time
import urllib.request
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Final, NamedTuple, Self
from urllib.parse import unquote

import pyarrow as pa

TOKEN: Final = "hf_secret-of-the-tests"
_HASH: Final = 32
_ENTRY: Final = 48


class Hub:
    """The stand-in, started; `url` is its address."""

    def __init__(self) -> None:
        self._process = subprocess.Popen([sys.executable, __file__], stdout=subprocess.PIPE, text=True)
        assert self._process.stdout
        self.url = self._process.stdout.readline().strip()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()

    def create(self, bucket: str) -> None:
        """Create a bucket, OWNER/NAME."""
        self._tell(f"create/{bucket}")

    def answer(self, path: str, status: int) -> None:
        """From now on answer what asks for a path that has `path` in it with a status; 0 ends that."""
        self._tell(f"answer/{status}/{path}")

    def requests(self) -> list[str]:
        """What was asked so far: method and path."""
        asked: list[str] = json.loads(self._tell("requests"))
        return asked

    def _tell(self, what: str) -> bytes:
        with urllib.request.urlopen(f"{self.url}/tests/{what}") as answer:
            content: bytes = answer.read()
        return content


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


class Chunk(NamedTuple):
    """A chunk of a xorb: where it ends there, and what it holds."""

    end: int
    content: bytes


def _chunks(xorb: bytes) -> list[Chunk]:
    found, place = [], 0
    while place < len(xorb):
        packed, size = (int.from_bytes(xorb[place + at : place + at + 3], "little") for at in (1, 5))
        scheme, data = xorb[place + 4], xorb[place + 8 : place + 8 + packed]
        if scheme:
            data = pa.decompress(data, size, codec="lz4", asbytes=True)
        if scheme == 2:  # every fourth byte together
            grouped, data = data, bytearray(size)
            for group in range(4):
                part, grouped = grouped[: (size + 3 - group) // 4], grouped[(size + 3 - group) // 4 :]
                data[group::4] = part
        place += 8 + packed
        found.append(Chunk(place, bytes(data)))
    return found


def _now() -> str:
    return f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%S.%fZ}"


class Handler(BaseHTTPRequestHandler):
    """Answers as the Hub and its store do."""

    protocol_version = "HTTP/1.1"
    url = ""
    buckets: dict[str, dict[str, dict[str, Any]]] = {}  # noqa: RUF012
    asked: list[str] = []  # noqa: RUF012
    answers: dict[str, int] = {}  # noqa: RUF012
    xorbs: dict[str, bytes] = {}  # noqa: RUF012
    terms: dict[str, list[Term]] = {}  # noqa: RUF012

    def log_message(self, *_: object) -> None:
        """Nothing: tests look at what commands print."""

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

    def _part(self, content: bytes) -> None:
        """All, or the range that is asked for."""
        if not (asked := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))):
            self._send(200, content)
            return
        first, last = int(asked[1]), int(asked[2] or len(content) - 1)
        told = f"bytes {first}-{last}/{len(content)}"
        self._send(206, content[first : last + 1], Content_Range=told)

    def do_HEAD(self) -> None:
        """Without the body."""
        self.do_GET()

    def do_POST(self) -> None:
        """What is sent: chunks, what they make, and changes of a bucket."""
        body = self.rfile.read(int(self.headers["Content-Length"]))
        match self._known():
            case ["api", "buckets", owner, name, "batch"]:
                self._batch(f"{owner}/{name}", body)
                self._json({"success": True, "failed": []})
            case ["v1", "xorbs", _, name]:
                self.xorbs[name] = body
                self._json({"was_inserted": True})
            case ["v1", "shards"]:
                self.terms.update(_files(body))
                self._json({"result": 1})
            case None:
                pass
            case _:
                self._send(404)

    def do_GET(self) -> None:
        """What is asked: a bucket, a listing, a token, a file in one piece or in parts."""
        match self._known():
            case ["tests", "create", owner, name]:
                self.buckets[f"{owner}/{name}"] = {}
                self._send(200)
            case ["tests", "answer", status, *path]:
                self.answers["/".join(path)] = int(status)
                self._send(200)
            case ["tests", "requests"]:
                self._json(self.asked)
            case ["api", "buckets", owner, name]:
                told = {"id": f"{owner}/{name}", "private": True, "createdAt": _now(), "size": 0}
                self._json({**told, "totalFiles": 0})
            case ["api", "buckets", owner, name, "tree", *prefix]:
                deep = "recursive=true" in self.path.lower()
                self._json(self._tree(f"{owner}/{name}", unquote("/".join(prefix)), deep=deep))
            case ["api", "buckets", owner, name, "xet-read-token" | "xet-write-token"]:
                until = int(time.time()) + 3600  # hf_xet reads the content, huggingface_hub the headers
                told = {"X_Xet_Access_Token": "t", "X_Xet_Token_Expiration": str(until)}
                content = {"casUrl": self.url, "exp": until, "accessToken": "t"}
                self._json(content, X_Xet_Cas_Url=self.url, **told)
            case ["buckets", owner, name, "resolve", *inside]:
                self._file(f"{owner}/{name}", unquote("/".join(inside)))
            case ["v1", "reconstructions", name]:
                self._json(self._reconstruction(name))
            case ["xorb", name]:
                self._part(self.xorbs[name])
            case None:
                pass
            case _:
                self._send(404)

    def _known(self) -> list[str] | None:
        """The path's parts; none where it was answered: as a test wants, or to whom has no right to more."""
        path = self.path.partition("?")[0].strip("/")
        parts = path.split("/")
        if parts[0] == "tests":
            return parts
        self.asked.append(f"{self.command} {self.path}")
        if wanted := [status for asked, status in self.answers.items() if status and asked in path]:
            self._send(wanted[0])
            return None
        if "buckets" not in parts[:2]:
            return parts
        bucket = "/".join(parts[parts.index("buckets") + 1 :][:2])
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._send(401, X_Error_Message="Invalid credentials in Authorization header")
        elif bucket not in self.buckets:
            self._send(404, X_Error_Code="RepoNotFound")
        else:
            return parts
        return None

    def _batch(self, bucket: str, lines: bytes) -> None:
        for operation in map(json.loads, lines.splitlines()):
            path = operation["path"]
            if operation["type"] == "deleteFile":
                self.buckets[bucket].pop(path, None)
                continue
            size = sum(term.bytes for term in self.terms[operation["xetHash"]])
            told = {"type": "file", "path": path, "size": size, "xetHash": operation["xetHash"]}
            before = self.buckets[bucket].get(path)
            same = before is not None and before["xetHash"] == told["xetHash"]
            # The Hub is not known to tell a new time of an equal file; that of a client may be any.
            told["uploadedAt"] = before["uploadedAt"] if before and same else _now()
            self.buckets[bucket][path] = {**told, "mtime": "1970-01-01T00:00:01.000Z"}

    def _tree(self, bucket: str, prefix: str, *, deep: bool) -> list[dict[str, Any]]:
        """What begins with the letters of the prefix, whether they end a name or not."""
        found: dict[str, dict[str, Any]] = {}
        for path, file in sorted(self.buckets[bucket].items()):
            if not path.startswith(prefix):
                continue
            start = len(prefix) + 1 if path.startswith(f"{prefix}/") else len(prefix)
            end = path.find("/", start)
            if deep or end < 0:
                found[path] = file
            else:
                found[path[:end]] = {"type": "directory", "path": path[:end], "uploadedAt": _now()}
        return list(found.values())

    def _file(self, bucket: str, path: str) -> None:
        if (entry := self.buckets[bucket].get(path)) is None:
            self._send(404, X_Error_Code="EntryNotFound")
            return
        if self.command == "HEAD":
            route = f"{self.url}/api/buckets/{bucket}/xet-read-token"
            told = {"X_Xet_Hash": entry["xetHash"], "X_Xet_Refresh_Route": route}
            self._send(200, X_Linked_Size=str(entry["size"]), **told)
            return
        terms = self.terms[entry["xetHash"]]
        parts = [_chunks(self.xorbs[term.xorb])[term.first : term.end] for term in terms]
        self._part(b"".join(chunk.content for part in parts for chunk in part))

    def _reconstruction(self, name: str) -> dict[str, Any]:
        terms, sources = [], {}
        for xorb, size, first, end in self.terms[name]:
            ends = [0, *(chunk.end for chunk in _chunks(self.xorbs[xorb]))]
            chunks = {"start": first, "end": end}
            terms.append({"hash": xorb, "unpacked_length": size, "range": chunks})
            part = {"start": ends[first], "end": ends[end] - 1}
            source = {"range": chunks, "url": f"{self.url}/xorb/{xorb}", "url_range": part}
            if source not in sources.setdefault(xorb, []):
                sources[xorb].append(source)
        return {"offset_into_first_range": 0, "terms": terms, "fetch_info": sources}


if __name__ == "__main__":
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Handler.url = f"http://127.0.0.1:{server.server_port}"
    print(Handler.url, flush=True)
    server.serve_forever()
