"""The file of a shard: an Arrow IPC stream, read memory-mapped, followed by the CRC-32 of its bytes."""

import zlib
from pathlib import Path
from typing import Final

import pyarrow as pa

_CHECKSUM_BYTES: Final = 4


def write_rows(path: Path, rows: pa.Table) -> None:
    """Write rows and their checksum.

    Args:
        path: A temporary file; the caller makes the file appear in one step.
        rows: The rows of a shard.
    """
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, rows.schema) as writer:
        writer.write_table(rows.combine_chunks())
    checksum = _checksum(pa.memory_map(str(path)).read_buffer())
    with path.open("ab") as file:
        file.write(checksum)


def read_rows(path: Path, *, check: bool) -> pa.Table:
    """Map the rows of a file into memory.

    Args:
        path: The file of a shard.
        check: Read all its bytes, and compare them with the checksum.

    Raises:
        ArrowException, OSError, ValueError: The file is missing or damaged.
    """
    mapped = pa.memory_map(str(path)).read_buffer()
    body = mapped[: mapped.size - _CHECKSUM_BYTES]
    if check and _checksum(body) != mapped[body.size :].to_pybytes():
        raise ValueError("the checksum differs")
    return pa.ipc.open_stream(body).read_all()


def _checksum(buffer: pa.Buffer) -> bytes:
    return zlib.crc32(buffer).to_bytes(_CHECKSUM_BYTES, "little")
