"""Finds by its first bytes what a file is: its compression, its format, or why it is not data."""

import re
import shlex
from pathlib import Path
from typing import Final

from scaledown.data.input.remote import Remote
from scaledown.errors import InputError

SIZE: Final = 1 << 12
"""Bytes that are enough for all that is asked here."""

# zstd's second form is a skippable frame: pzstd writes one first. bzip2: its three letters, a digit, and how
# a block begins, because text may begin with the letters.
_COMPRESSED: Final = (
    (rb"\x1f\x8b", "gzip"),
    (rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18", "zstd"),
    (rb"BZh[1-9](1AY&SY|\x17\x72\x45\x38\x50\x90)", "bz2"),
)
PARQUET: Final = "Parquet"
ARROW: Final = "Arrow"
TOPICS: Final = "TREC topics"
_FORMATS: Final = (
    (rb"PAR1", PARQUET),
    (rb"ARROW1|\xff{4}..[\x00-\x7f]\x00", ARROW),
    (rb"\s*(<\?xml[^>]*>\s*)?(<!--.*?-->\s*)*(<(?!top[ >])[\w-]+[^>]*>\s*)?<top(ic)?[\s>]", TOPICS),
)
_UNPACK: Final = "unpack it (`{command} {name}`) and give what was in it"
# Files that are not data, by their first bytes, and the next step for the user.
_OTHER: Final = (
    (rb".{257}ustar", "a tar archive", _UNPACK.replace("{command}", "tar -xf")),
    (
        rb"PK\x03\x04.{22}.{4}(\[Content_Types\]|_rels/|docProps/|xl/|word/)",
        "an Excel workbook, or another Office document",
        "save its sheet as CSV or Parquet and give that",
    ),
    (rb"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an old Office document", "save its sheet as CSV and give that"),
    (
        rb"PK\x03\x04.{22}.{4}mimetypeapplication/vnd\.oasis",
        "an OpenDocument file",
        "save its sheet as CSV and give that",
    ),
    (rb"PK\x03\x04|PK\x05\x06", "a zip archive", _UNPACK.replace("{command}", "unzip")),
    (rb"\xfd7zXZ\x00", "an xz file", _UNPACK.replace("{command}", "xz -dk")),
    (rb"\x5d\0\0.{2}(\xff{8}|.{4}\0{4})", "an lzma file", _UNPACK.replace("{command}", "unlzma -k")),
    (rb"7z\xbc\xaf\x27\x1c", "a 7z archive", _UNPACK.replace("{command}", "7z x")),
    (rb"Rar!\x1a\x07", "a RAR archive", _UNPACK.replace("{command}", "unrar x")),
    (rb"\x04\x22\x4d\x18", "an lz4 file", _UNPACK.replace("{command}", "lz4 -dk")),
    (rb"LZIP\x01", "an lzip file", _UNPACK.replace("{command}", "lzip -dk")),
    (rb"\x1f\x9d", "a file of compress", _UNPACK.replace("{command}", "uncompress -k")),
    (rb"%PDF-", "a PDF", "extract its text, one article a file or a line, and give that"),
    (rb"FEA1", "a Feather file of version 1", "write it again as Feather 2 or Parquet and give that"),
    (rb"ORC", "an ORC file", "write it as Parquet or JSON lines and give that"),
    (rb"Obj\x01", "an Avro file", "write it as Parquet or JSON lines and give that"),
    (rb"SQLite format 3\x00", "a SQLite database", "export the table as CSV and give that"),
    (rb"\x93NUMPY|\x89HDF\r\n", "an array file", "write it as Parquet or JSON lines and give that"),
    (rb"\x80[\x02-\x05][\x8c\x95\x7d\x5d(c]", "a pickle", "write it as Parquet or JSON lines and give that"),
    (
        rb"version https://git-lfs\.github\.com/",
        "a Git LFS pointer, not the file itself",
        "run `git lfs pull` where it lies, or fetch the file from its page",
    ),
    (
        rb"# xet version \d",
        "a Xet pointer, not the file itself",
        "fetch the file from its page",
    ),
    (
        rb"(\.\./)*(\.git)?/annex/objects/",
        "a git-annex pointer, not the file itself",
        "run `git annex get` where it lies",
    ),
    (
        rb"\s*(<!--.*?-->\s*)*<(!doctype\s+html|html|head|body)\b",
        "a web page (HTML), such as a login or error page",
        "open the address in a browser to see it, and give the address or path of the file itself",
    ),
    (
        rb"\s*(<\?xml|<(DOC|doc|article|mediawiki|feed|rss|root|data|Error)[\s>])",
        "XML",
        "write it as JSON lines with id, title and text, or with id and question, and give that",
    ),
    (
        rb"\x89PNG\r|\xff\xd8\xff|GIF8[79]a.{0,3}[\0-\x08]|RIFF.{4}(WAVE|WEBP|AVI )|ID3[\x02-\x04]|OggS\0"
        rb"|\x1aE\xdf\xa3|\0\0.{2}ftyp",
        "an image, sound or film",
        "give files with text",
    ),
    (rb"\{\\rtf", "a document in Rich Text Format", "save it as plain text and give that"),
)
_CONTROL: Final = bytes({*range(1, 32), 127} - {*b"\b\t\n\v\f\r\x1b"})
_BINARY: Final = (32, 0.05)
"""The least number and share of control characters in binary data; random bytes have 0.1, text hardly any."""
_HTML_TYPES: Final = ("text/html", "application/xhtml")


def compression(head: bytes) -> str:
    """Return the compression of a file: gzip, zstd or bz2; empty if it is not compressed."""
    return _first_match(_COMPRESSED, head)


def binary_format(head: bytes) -> str:
    """Return `PARQUET`, `ARROW` or `TOPICS`; empty if the first bytes do not show the format."""
    return _first_match(_FORMATS, head)


def _first_match(table: tuple[tuple[bytes, str], ...], head: bytes) -> str:
    return next((name for magic, name in table if re.match(magic, _unmarked(head), re.DOTALL)), "")


def _unmarked(head: bytes) -> bytes:
    """Remove the byte order mark of UTF-8."""
    return head.removeprefix(b"\xef\xbb\xbf")


def local_name(source: Path | Remote) -> tuple[Path, str]:
    """Return the name of a file after its download, and the words for the download in a message.

    Args:
        source: A local file, or a file at a URL. For a local file the words are empty.
    """
    return (Path(source.path.name), "fetch it and ") if isinstance(source, Remote) else (source, "")


def check(source: Path | Remote, head: bytes) -> None:
    """Check by the first bytes and the content type that a file is data.

    Args:
        source: The file.
        head: Its first bytes, decompressed.

    Raises:
        InputError: It is something else, for example a web page; the message has the next step.
    """
    path, fetch = local_name(source)
    quoted = shlex.quote(str(path))
    if head and not head.strip(b"\0"):
        raise InputError(
            f"{source}: begins with NUL bytes alone: a download or copy that did not finish; fetch it again"
        )
    if not _first_match(_FORMATS, head):
        for magic, kind, way in _OTHER:
            if re.match(magic, _unmarked(head), re.DOTALL | (re.IGNORECASE if b"html" in magic else 0)):
                raise InputError(f"{source}: is {kind}; {fetch}{way.replace('{name}', quoted)}")
        if (
            isinstance(source, Remote)
            and source.content_type.startswith(_HTML_TYPES)
            and head.lstrip()[:1] == b"<"
        ):
            raise InputError(
                f"{source}: the server gives a web page ({source.content_type}), such as a login page; open "
                "the address in a browser to see it, and give the address of the file itself"
            )
        if encoding := _encoding(head[:512].rstrip(b"\0")):
            converted = shlex.quote(str(path.with_name(f"{path.stem}.utf8{path.suffix}")))
            raise InputError(
                f"{source}: is {encoding[:6]}; {fetch}convert it: "
                f"`iconv -f {encoding} -t UTF-8 {quoted} > {converted}`"
            )
        if len(head) - len(head.translate(None, _CONTROL)) >= max(_BINARY[0], _BINARY[1] * len(head)):
            raise InputError(
                f"{source}: is not text in UTF-8; give a file in a format that is read, or convert the text"
            )


def _encoding(head: bytes) -> str:
    """Detect UTF-32 or UTF-16 by the byte order mark; without one, by the NUL bytes of Latin text."""
    if head.startswith((b"\xff\xfe\0\0", b"\0\0\xfe\xff")):
        return "UTF-32"
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "UTF-16"

    def mostly_nul(*lanes: bytes) -> bool:
        return all(lane.count(0) * 2 > len(lane) for lane in lanes)

    if mostly_nul(head[1::4], head[2::4], head[3::4]):
        return "UTF-32LE"
    if mostly_nul(head[::4], head[1::4], head[2::4]):
        return "UTF-32BE"
    if mostly_nul(head[1::2]):
        return "UTF-16LE"
    return "UTF-16BE" if mostly_nul(head[::2]) else ""
