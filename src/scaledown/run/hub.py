"""Storage buckets of the Hub as `mirror` asks an object store: by the Hub's own API, and each object whole.

huggingface_hub has a file system for them, too; it would write what is cut short when it is interrupted, and
remembers listings.
"""

import contextlib
import re
import time
from collections.abc import Iterator
from typing import Any, Final

from scaledown.errors import OutputError
from scaledown.urls import status_of

_SETTLE_SECONDS: Final = 2.0
_SLOWEST_BEAT_SECONDS: Final = 20.0
_PREFIX: Final = "hf://buckets/"


class HubBuckets:
    """What fsspec's file systems have, as far as `mirror` uses it, for `hf://buckets/OWNER/NAME/…`."""

    def __init__(self) -> None:
        from huggingface_hub import HfApi, HfFileSystem, constants

        if constants.HF_HUB_OFFLINE:
            raise OutputError("HF_HUB_OFFLINE=1 keeps the Hub's buckets out of reach: unset it")
        self._api: Any = HfApi()
        self._files: Any = HfFileSystem(skip_instance_cache=True)

    def invalidate_cache(self) -> None:
        """Nothing is remembered."""

    @staticmethod
    def _strip_protocol(url: str) -> str:
        return url.removeprefix("hf://")

    def _entries(self, url: str, *, recursive: bool) -> Iterator[dict[str, Any]]:
        """What is at a path and below, and beside it where a name goes on: the Hub compares letters."""
        bucket, path = _place(url)
        with _told():
            for found in self._api.list_bucket_tree(bucket, path or None, recursive=recursive):
                name = f"buckets/{bucket}/{found.path}"
                told = {"name": name, "type": found.type, "size": getattr(found, "size", 0)}
                yield told | {"uploaded_at": found.uploaded_at, "xet_hash": getattr(found, "xet_hash", "")}

    def ls(self, url: str, *, detail: bool = True) -> list[Any]:
        """The files and folders in a folder."""
        inside = f"{self._strip_protocol(url).rstrip('/')}/"
        found = [entry for entry in self._entries(url, recursive=False) if entry["name"].startswith(inside)]
        found = [entry for entry in found if "/" not in entry["name"].removeprefix(inside)]
        return found if detail else [entry["name"] for entry in found]

    def find(self, url: str, *, detail: bool = False) -> Any:
        """The files below a folder."""
        inside = f"{self._strip_protocol(url).rstrip('/')}/"
        every = self._entries(url, recursive=True)
        found = {
            entry["name"]: entry
            for entry in every
            if entry["type"] == "file" and entry["name"].startswith(inside)
        }
        return found if detail else list(found)

    def info(self, url: str) -> dict[str, Any]:
        """A file. Raises `FileNotFoundError`."""
        name = self._strip_protocol(url)
        found = next((entry for entry in self._entries(url, recursive=False) if entry["name"] == name), None)
        if found is None or found["type"] != "file":
            raise FileNotFoundError(url)
        return found

    def cat_file(self, url: str) -> bytes:
        """What a file holds."""
        with _told(), self._files.open(url, "rb", block_size=0) as file:
            content: bytes = file.read()
        return content

    def get_file(self, url: str, target: str) -> None:
        """Fetch a file."""
        bucket, path = _place(url)
        with _told(), _quiet():
            every = self._api.list_bucket_tree(bucket, path)
            found = next((entry for entry in every if entry.path == path and entry.type == "file"), None)
            if found is None:
                raise FileNotFoundError(url)
            self._api.download_bucket_files(bucket, [(found, target)])

    def put_file(self, source: str, url: str) -> None:
        """Send a file."""
        self._send(source, url)

    def pipe_file(self, url: str, content: bytes, mode: str = "overwrite") -> None:
        """Write a file; with the mode "create" raise `FileExistsError` where one is there.

        The Hub has no conditional writes. Of several who create one at once that one succeeds who wrote last:
        each waits for as long as another needs from asking to having written. Where this one was slow itself,
        another may have settled meanwhile, and has written again, if it does so every ten seconds.
        """
        if mode != "create":
            self._send(content, url)
            return
        begun = time.monotonic()
        with contextlib.suppress(FileNotFoundError):
            self.info(url)
            raise FileExistsError(url)
        self._send(content, url)
        quick = time.monotonic() - begun < _SETTLE_SECONDS
        time.sleep(_SETTLE_SECONDS if quick else _SLOWEST_BEAT_SECONDS)
        with contextlib.suppress(FileNotFoundError):
            if self.cat_file(url) == content:
                return
        raise FileExistsError(url)

    def _send(self, content: bytes | str, url: str) -> None:
        bucket, path = _place(url)
        with _told(), _quiet():
            self._api.batch_bucket_files(bucket, add=[(content, path)])

    def rm_file(self, url: str) -> None:
        """Delete a file, if it is there."""
        bucket, path = _place(url)
        with _told():
            self._api.batch_bucket_files(bucket, delete=[path])


def _place(url: str) -> tuple[str, str]:
    """The bucket, and the path in it."""
    parts = url.removeprefix(_PREFIX).strip("/").split("/")
    return "/".join(parts[:2]), "/".join(parts[2:])


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """Make errors those that file systems raise."""
    try:
        yield
    except (FileNotFoundError, FileExistsError):
        raise
    except Exception as error:
        if status_of(error) == 404:
            raise FileNotFoundError(str(error)) from None
        if isinstance(error, ConnectionError) and (told := re.search(r"\b40([134]) [A-Z]", str(error))):
            kind = FileNotFoundError if told[1] == "4" else PermissionError  # hf_xet's own have no response
            raise kind(str(error)) from None
        raise


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No bars meanwhile: there would be three for each file."""
    from huggingface_hub.utils.tqdm import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    if are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()
