"""Training files, ours or others': read as a stream, validated line by line."""

import datetime
import json
import logging
import math
import re
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple, TextIO, cast

import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from scaledown.config.options import OUTPUT_SUFFIXES
from scaledown.data.input import files
from scaledown.data.input.seen import Seen
from scaledown.data.logprobs import logprobs_problem
from scaledown.errors import InputError
from scaledown.extensions import OUTPUT_FORMATS
from scaledown.records import Example, document_text
from scaledown.run.progress import track

log = logging.getLogger("scaledown")

_CHUNK_CHARACTERS: Final = 1 << 20
_SPACE: Final = re.compile(r"[ \t\r\n]*")
_OPENING_SPACE: Final = re.compile(r"[\ufeff \t\r\n]*")
_MAX_RECORD_CHARACTERS: Final = 1 << 26
_WRITABLE: Final = (type(None), datetime.date, datetime.time)
_MAX_DEPTH: Final = 100  # of nested values in a record
_MESSAGES: Final = 100


class Entry(NamedTuple):
    """A record of a training file."""

    line: int
    """The line on which it begins, from 1; in Parquet the number of the record."""
    record: Any
    """The record; None if there is a problem."""
    problem: str = ""
    """Why it cannot be read; empty if it can."""


class OutputFormat(NamedTuple):
    """An entry of `OUTPUT_FORMATS`: how training data is written to a file, and read again."""

    write: Callable[[Path, Iterable[Mapping[str, Any]], pa.Schema | None], int]
    """Writes records to a new file, one by one, and returns their number.

    Its arguments are the path, the records, and the schema of all records, or None if it is not known. It
    raises `OutputError` for values that the format cannot hold.
    """
    read: Callable[[Path], Iterator[Entry]]
    """Yields the records of such a file, one by one. Raises `InputError` if it cannot be read."""
    needs_columns: bool = False
    """Whether the columns of all records must be known before the first is written."""
    builder: str = "json"
    """What `datasets.load_dataset` calls the format."""


def output_format(path: Path) -> OutputFormat:
    """Return the format of a file by its suffix, which must be one of `OUTPUT_FORMATS`."""
    found: OutputFormat = OUTPUT_FORMATS[path.suffix.removeprefix(".")]
    return found


def entries(path: Path) -> Iterator[Entry]:
    """Yield the records of a training file one by one. The file may be of any size.

    Args:
        path: The file; its suffix decides the format.

    Raises:
        InputError: The file is missing, is of another kind, or cannot be read.
    """
    check_file(path)
    yield from output_format(path).read(path)


def read_json_lines(path: Path) -> Iterator[Entry]:
    """The records of a file with one JSON object a line."""
    for number, line in files.lines(path):
        try:
            yield Entry(number, orjson.loads(line))
        except orjson.JSONDecodeError as error:
            yield Entry(number, None, f"invalid JSON: {error}")


def read_json_list(path: Path) -> Iterator[Entry]:
    """The records of a file with one JSON list."""
    with path.open(encoding="utf-8") as file:
        try:
            yield from _json_entries(file)
        except UnicodeDecodeError as error:
            yield Entry(0, None, f"invalid UTF-8: {error.reason}")


def check_file(path: Path) -> None:
    """Check that a file can be training data, by its suffix.

    Args:
        path: The file.

    Raises:
        InputError: It is missing, a folder or a stream, or has another suffix.
    """
    files.check_stream(str(path), "")
    if not path.is_file():
        problem = (
            "is a folder; name a file in it" if path.is_dir() else "there is no such file; check the path"
        )
        raise InputError(f"{path}: {problem}")
    if path.suffix not in OUTPUT_SUFFIXES:
        raise InputError(f"{path}: training data ends in {', '.join(OUTPUT_SUFFIXES)}; name such a file")


def read_parquet(path: Path) -> Iterator[Entry]:
    """The records of a Parquet file; a column without a value is left out of its record."""
    try:
        number = 0
        for batch in pq.ParquetFile(path, buffer_size=1 << 20).iter_batches(batch_size=256):
            for record in batch.to_pylist():
                number += 1
                yield Entry(number, {name: value for name, value in record.items() if value is not None})
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path}: is not a whole Parquet file ({error})") from error


class _Window:
    """A part of a text that is read in pieces, and a position in it."""

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self.text, self.at, self.line, self.ended = "", 0, 1, False

    def left(self) -> int:
        """Return the number of characters after the position."""
        return len(self.text) - self.at

    def begin_here(self, more: int = 0) -> None:
        """Drop the text before the position, and read up to `more` characters."""
        read = self._file.read(more) if more else ""
        self.ended = self.ended or (more > 0 and not read)
        self.text, self.at = self.text[self.at :] + read, 0

    def skip(self, until: int) -> None:
        """Move to the position `until`, and count the lines before it."""
        self.line += self.text.count("\n", self.at, until)
        self.at = until

    def skip_space(self, space: re.Pattern[str]) -> None:
        """Move to the end of the white space."""
        if found := space.match(self.text, self.at):
            self.skip(found.end())


def _json_entries(file: TextIO) -> Iterator[Entry]:
    """The elements of a JSON list, decoded one by one while the text is read."""
    decoder = json.JSONDecoder()
    window = _Window(file)
    window.begin_here(_CHUNK_CHARACTERS)
    window.skip_space(_OPENING_SPACE)
    if not window.text.startswith("[", window.at):
        yield Entry(window.line, None, "expected a JSON list of records (`[` first)")
        return
    window.skip(window.at + 1)
    expects_comma = after_comma = False
    while True:
        window.skip_space(_SPACE)
        if not window.left() and not window.ended:
            window.begin_here(_CHUNK_CHARACTERS)
        elif window.text.startswith("]", window.at) and not after_comma:
            if window.text[window.at + 1 :].strip() or file.read(_CHUNK_CHARACTERS).strip():
                yield Entry(window.line, None, "there is more text after the end of the list")
            return
        elif not window.left():
            yield Entry(window.line, None, "the file ends inside the list: it is cut short")
            return
        elif expects_comma:
            if not window.text.startswith(",", window.at):
                yield Entry(window.line, None, "expected `,` or `]` after a record")
                return
            window.skip(window.at + 1)
            expects_comma, after_comma = False, True
        else:
            try:
                record, end = decoder.raw_decode(window.text, window.at)
            except (json.JSONDecodeError, RecursionError) as error:
                whole = window.ended or window.left() > _MAX_RECORD_CHARACTERS
                if whole and not window.at:
                    yield Entry(window.line, None, f"invalid JSON: {error}")
                    return
                # The part is doubled, so that a long record is decoded few times. At the end, the error gets
                # its position in the record.
                window.begin_here(0 if whole else max(window.left(), _CHUNK_CHARACTERS))
                continue
            if end == len(window.text) and not window.ended:
                window.begin_here(_CHUNK_CHARACTERS)  # a number may go on
                continue
            yield Entry(window.line, record)
            window.skip(end)
            expects_comma, after_comma = True, False


def problems(record: Any) -> list[str]:
    """Find every reason why a value is not a training record in the guide's format.

    Args:
        record: The value, as read from a training file.

    Returns:
        The reasons; empty for a valid record.
    """
    if not isinstance(record, dict):
        return [f"is {type(record).__name__}, expected an object with query, documents and answer"]
    found = [
        f"has no {name}" if name not in record else f"{name} {problem}"
        for name in ("query", "answer")
        if (problem := _text_problem(record.get(name)))
    ]
    documents = record.get("documents")
    if not isinstance(documents, list):
        found.append("has no documents" if documents is None else "documents is not a list")
        return found
    if not documents:
        found.append("documents is empty")
    for number, document in enumerate(documents, 1):
        text = document.get("text") if isinstance(document, dict) else document
        if not isinstance(text, str):
            found.append(f"document {number} is neither a string nor an object with title and text")
        elif problem := _text_problem(text) or _unwritable(document):
            found.append(f"document {number} {problem}")
    if (scores := record.get("reranking_scores")) is not None:  # null, as Parquet has it, is none
        found += _score_problems(scores, len(documents))
    if wrong := logprobs_problem(record.get("answer_logprobs"), str(record.get("answer"))):
        found.append(f"answer_logprobs {wrong}")
    others = ((name, value) for name, value in record.items() if name not in Example.__annotations__)
    found += [f"{name} {problem}" for name, value in others if (problem := _unwritable([name, value]))]
    return found


def _text_problem(value: Any) -> str:
    """Return what is wrong with a text; empty if it is valid."""
    if not isinstance(value, str):
        return f"is {type(value).__name__}, expected a string"
    if not value.strip():
        return "is empty"
    return _unwritable(value)


def _unwritable(value: Any, depth: int = 0) -> str:
    """Return why a value cannot be written as JSON; empty if it can."""
    if depth > _MAX_DEPTH:
        return "is nested too deep"
    if isinstance(value, dict):
        value = [*value.keys(), *value.values()]
    if isinstance(value, list):
        return next(filter(None, (_unwritable(item, depth + 1) for item in value)), "")
    if isinstance(value, str):
        return "" if is_unicode(value) else "holds half of a surrogate pair, which is no text"
    if isinstance(value, float):
        return "" if math.isfinite(value) else "holds a number that is not finite"
    if isinstance(value, int):
        return "" if -(1 << 63) <= value < 1 << 64 else "holds a number of more than 64 bits"
    return "" if isinstance(value, _WRITABLE) else f"holds {type(value).__name__}, which JSON has not"


def is_unicode(text: str) -> bool:
    """Whether a text can be written: it has no half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _score_problems(scores: Any, documents: int) -> list[str]:
    if not isinstance(scores, list):
        return ["reranking_scores is not a list"]
    found = []
    if len(scores) != documents:
        found.append(f"has {len(scores)} reranking_scores for {documents} documents")
    if not all(
        isinstance(score, float | int) and not isinstance(score, bool) and not _unwritable(score)
        for score in scores
    ):
        found.append("reranking_scores holds something that is not a finite number")
    return found


def sound_records(paths: Sequence[Path], *, task: str = "read", alike: bool = False) -> Iterator[Example]:
    """Yield the records of training files, with documents as strings.

    Args:
        paths: The files, in order.
        task: The name of the work, for the progress.
        alike: Either all records must have reranking scores or none.

    Raises:
        InputError: A record is not valid, or it is not `alike`.
    """
    sizes = [path.stat().st_size for path in paths]
    with_scores: bool | None = None
    with track(task, "records", None) as tracker:
        for place, path in enumerate(paths):
            for number, entry in enumerate(entries(path), 1):
                wrong = [entry.problem] if entry.problem else problems(entry.record)
                if wrong:
                    raise InputError(
                        f"{path}:{entry.line}: record {number}: {wrong[0]}; "
                        f"`scaledown validate {shlex.quote(str(path))}` lists all"
                    )
                has_scores = entry.record.get("reranking_scores") is not None
                if alike and with_scores not in (None, has_scores):
                    raise InputError(
                        f"{path}:{entry.line}: some records have reranking_scores and some have none; "
                        "give only files that are alike in this"
                    )
                with_scores = has_scores
                documents = [document_text(document) for document in entry.record["documents"]]
                yield cast("Example", entry.record | {"documents": documents})
                tracker.advance()
            tracker.advance(0, sum(sizes[: place + 1]) / (sum(sizes) or 1))


class Validation(NamedTuple):
    """The result of a validation."""

    records: int
    """Valid records."""
    messages: list[str]
    """`file:line: record n: problem` for each problem, 100 at most."""
    bad_records: int
    """Records with a problem."""
    problems: int
    """Number of problems."""
    duplicates: int
    """Valid records whose query an earlier one has; that is no problem."""


def validate(path: Path) -> Validation:
    """Check every record of a training file.

    Args:
        path: The file.

    Raises:
        InputError: The file is missing, is of another kind, or cannot be read.
    """
    sound = bad = total = 0
    messages: list[str] = []
    with_scores: bool | None = None
    seen, again = Seen(), 0
    for number, entry in enumerate(entries(path), 1):
        found = [entry.problem] if entry.problem else problems(entry.record)
        if not found:
            has_scores = entry.record.get("reranking_scores") is not None
            if with_scores is not None and has_scores != with_scores:
                found = ["some records have reranking_scores and some have none"]
            with_scores = has_scores if with_scores is None else with_scores
        if found:
            bad += 1
            total += len(found)
            place = f"{path}:{entry.line}: record {number}: "
            messages += [place + problem for problem in found][: _MESSAGES - len(messages)]
        else:
            sound += 1
            again += not seen.add(entry.record["query"])
    if not sound and not bad:
        total, messages = 1, [f"{path}: holds no records"]
    return Validation(sound, messages, bad, total, again)


def unanswerable(entry: Entry) -> str:
    """Return why a record cannot be answered; empty if it can. Documents are not required."""
    if entry.problem:
        return entry.problem
    record = entry.record
    if not isinstance(record, dict) or not isinstance(record.get("documents"), list):
        return "expected a query and documents"
    asked = {name: record[name] for name in ("query", "documents") if record.get(name)}
    found = problems({"documents": ["-"], "answer": "-"} | asked)  # the rest is not needed
    return found[0] if found else ""
