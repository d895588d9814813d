"""Google's storage protocol on loopback: an emulator, with correct uploads and conditions of writes."""

import json
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from typing import Any

import pytest


def multipart(raw: bytes, boundary: bytes) -> tuple[bytes, bytes]:
    """The metadata and the whole content of a `multipart/related` body, as gcsfs sends it."""
    _, metadata, rest = raw.split(b"--" + boundary, 2)
    content = rest[: rest.rindex(b"\n--" + boundary + b"--")]
    first, second = (re.split(rb"\r?\n\r?\n", part, maxsplit=1)[1] for part in (metadata, content))
    return first, second


@contextmanager
def gs_server() -> Iterator[str]:
    """The address of a server that keeps objects in memory.

    gcp-storage-emulator reads an upload as an e-mail: if the content ends with a carriage return, it takes
    this and the line break of the boundary for one line end, and drops both. One shard in 256 ends so,
    because of its checksum. It also ignores the condition that an object must not exist.
    """
    emulator = pytest.importorskip("gcp_storage_emulator.server", reason="pip install gcp-storage-emulator")
    from gcp_storage_emulator.handlers import objects

    read_data, insert = emulator._read_data, objects.insert

    def read_exactly(handler: Any, query: Any) -> Any:
        kind = handler.headers.get("Content-Type") or ""
        found = re.search(r'^multipart/related;.*boundary="?([^";]+)', kind)
        if not found:
            return read_data(handler, query)
        raw = emulator._decode_raw_data(emulator._read_raw_data(handler), handler)
        metadata, content = multipart(raw, found[1].encode())
        return {
            "meta": json.loads(metadata),
            "content": content,
            "content-type": "application/octet-stream",
        }

    def insert_if_new(request: Any, response: Any, storage: Any, *arguments: Any, **keywords: Any) -> None:
        name = request.query.get("name", [None])[0] or (request.data or {}).get("meta", {}).get("name")
        there = storage.objects.get(request.params["bucket_name"], {})
        if request.query.get("ifGenerationMatch") == ["0"] and name in there:
            response.status = HTTPStatus.PRECONDITION_FAILED
            return
        insert(request, response, storage, *arguments, **keywords)

    with pytest.MonkeyPatch.context() as patch, socket.create_server(("127.0.0.1", 0)) as free:
        patch.setattr(emulator, "_read_data", read_exactly)
        for _, handlers in emulator.HANDLERS:
            for method, handler in handlers.items():
                if handler is insert:
                    patch.setitem(handlers, method, insert_if_new)
        port = free.getsockname()[1]
        free.close()
        with emulator.create_server("127.0.0.1", port, in_memory=True):
            yield f"http://127.0.0.1:{port}"
