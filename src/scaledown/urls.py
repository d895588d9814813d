"""URLs: removes their secrets, opens their file systems, describes errors of servers."""

import ipaddress
import re
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, Final
from urllib.parse import unquote

from scaledown.errors import InputError, MissingExtraError, UsageError, install_command, one_line

HTTP: Final = re.compile(r"https?://", re.IGNORECASE)
# Up to the last @ of the authority; if a key with a slash comes before it, up to the first @.
LOGIN: Final = re.compile(r"://(?:[^/?#]*@|[^/?#@:]*:(?!\d+(?:/|$))[^@?]*@)")
HIDDEN: Final = "…"
HIDDEN_QUERY: Final = f"?{HIDDEN}"
# Stores in which an object appears only when it is complete.
_EXTRAS: Final = {"s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs", "az": "az", "abfs": "az", "abfss": "az"}
_STORES: Final = (*_EXTRAS, "memory")
# Names, in file systems' data about a file, of values that change with its content; the most reliable first.
_STATES: Final = (
    "xet_hash",
    "blob_id",
    "ETag",
    "etag",
    "VersionId",
    "Last-Modified",
    "LastModified",
    "last_modified",
    "mtime",
    "created",
)


def is_url(text: str) -> bool:
    """Whether `text` is a URL and not a local path."""
    return re.match(r"[a-z][a-z0-9+.-]*://", text, re.IGNORECASE) is not None


def local(name: str) -> str:
    """Return the path of a URL like `file:///data/a%20b`; any other name is returned unchanged."""
    scheme, separator, rest = name.partition("://")
    if not separator or scheme.lower() not in {"file", "local"} or not rest:
        return name
    return unquote(rest.removeprefix("localhost"))


def check_exists(name: str, what: str) -> None:
    """Check that a local path exists. URLs are not checked.

    Args:
        name: A path or URL.
        what: The flag that it was given for, for the message; may be empty.

    Raises:
        InputError: The path does not exist.
    """
    if not is_url(local(name)) and not Path(local(name)).exists():
        raise InputError(f"{what} {name}: there is no such file; check the path".lstrip())


def check_store(name: str) -> None:
    """Check that a run, an index or an output can be written to a URL. Local paths are not checked.

    Raises:
        UsageError: It is a URL of another kind, or without a bucket and a folder.
    """
    scheme, _, rest = name.partition("://")
    scheme = scheme.lower()
    if not is_url(name) or (scheme in {"file", "local"} and rest):
        return
    if scheme not in _STORES:
        published = "; publish the finished data with `scaledown export --push_to_hub`" * (scheme == "hf")
        raise UsageError(
            f"{redacted(name)}: {scheme}:// cannot be written to; use a local path, s3://, gs:// or "
            f"az://{published}"
        )
    parts = list(filter(None, rest.split("/")))
    if not parts or ".." in parts:
        raise UsageError(f"{redacted(name)}: give a bucket and a folder in it")


def redacted(url: str) -> str:
    """Remove login and query from a URL: they may be secrets."""
    address, query, _ = LOGIN.sub(f"://{HIDDEN}@", url, count=1).partition("?")
    return address + (HIDDEN_QUERY if query else "")


def without_secrets(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings that may be stored: secrets in URLs are removed."""

    def hidden(value: Any) -> Any:
        if isinstance(value, tuple | list):
            return [hidden(item) for item in value]
        return redacted(value) if isinstance(value, str) and is_url(value) else value

    return {name: hidden(value) for name, value in settings.items()}


def without_query(source: str) -> str:
    """Remove the sign for a removed query from a redacted URL; any other text is returned unchanged."""
    return source.removesuffix(HIDDEN_QUERY)


def file_system(url: str, shown: str) -> Any:
    """The fsspec file system of a URL.

    Args:
        url: The URL.
        shown: The URL without secrets, for messages.

    Raises:
        MissingExtraError: The package of the file system is not installed.
        InputError: There is no file system for this scheme.
    """
    import fsspec

    scheme = url.partition("://")[0].lower()
    try:
        return fsspec.filesystem(scheme, skip_instance_cache=True)  # a cached one remembers old listings
    except ImportError as error:
        if extra := _EXTRAS.get(scheme):
            raise MissingExtraError(f"{shown} needs another package: {install_command(extra)}") from None
        raise MissingExtraError(f"{shown} needs another package: {error}") from None
    except (ValueError, TypeError):  # the scheme is unknown, or it needs more than a URL
        raise InputError(
            f"{shown}: {scheme}:// cannot be read; use https://, s3:// or a local path"
        ) from None


def state_of(info: Mapping[str, Any]) -> str:
    """Return a text that changes when a file changes.

    Args:
        info: A server's or file system's data about the file.

    Returns:
        A hash, a version or a time; empty if the data has none.
    """
    found = next((info[name] for name in _STATES if info.get(name)), "")
    return str(found.timestamp() if isinstance(found, datetime) else found)  # listings may have either


def http_status(error: Exception) -> Any:
    """Return the HTTP status of an error, if it has one."""
    answer = getattr(error, "response", None)
    return getattr(answer, "status_code", None)


def refused(error: Exception) -> bool:
    """Whether an error means that access is denied, or that no login was found."""
    denied = isinstance(error, PermissionError) or http_status(error) in {401, 403}
    return denied or type(error).__name__ == "NoCredentialsError"


def detail(url: str, error: Exception) -> str:
    """Describe an error in one line, without secrets.

    Queries of other URLs, to which a server may have redirected, are removed too.

    Args:
        url: The URL that was opened. If it has secrets, only the error's type is shown.
        error: The error.
    """
    kind = type(error).__name__
    message = re.sub(r"\?[^\s'\")>]+", HIDDEN_QUERY, str(error))
    return f"{kind}: {one_line(message, 200)}" if redacted(url) == url else kind


def is_loopback(host: str) -> bool:
    """Whether a host name or address is this machine's own, which no other machine reaches."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
