"""Reads questions with right answers: for evaluation, for training, and to keep them out of training data."""

import ast
import contextlib
import json
import logging
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, NamedTuple

from scaledown.data.input import files, tables, values
from scaledown.data.input.rows import parse
from scaledown.data.input.training_files import entries
from scaledown.data.input.values import is_full
from scaledown.errors import InputError
from scaledown.text import folded, has_content, question_key

log = logging.getLogger("scaledown")

_SURE: Final = tuple(
    key for key in tables.QUERY_KEYS if key not in {*tables.MANY_KEYS, "text", "body", "input"}
)
_TEXT_KEYS: Final = ("text", "value", "aliases", "answer", "short_answers", "answers", "sentences")
_MESSAGES: Final = 5  # messages about bad rows; the others are only counted
# Texts by which MS MARCO, SQuAD, QuAC, Qasper and tables say that there is no right answer, with or without
# brackets. Dots and dashes say the same.
_NO_ANSWER: Final = frozenset(
    {
        *("<unk>", "<na>", "nan", "n/a", "#n/a", "#nv", "null", "no answer present", "no answer"),
        *("no answer found", "no_answer", "noanswer", "cannotanswer", "unanswerable", "not answerable"),
    }
)
_BRACKETS: Final = "[](){}<>. "
_UNANSWERED: Final = {"answerable": False, "is_impossible": True}
"""A field that says that a record has no answer."""
_DOTS: Final = ".\u2026-\u2013\u2014?_ "
_QUOTED_TEXT: Final = r"""(?:'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")"""
_ITEM: Final = rf"(?:{_QUOTED_TEXT}|-?\d+(?:\.\d*)?)"
_SCALAR: Final = re.compile(rf"\bnp\.\w+\(({_ITEM})\)")  # as NumPy 2 prints the values of a list
_NUMPY: Final = re.compile(rf"\[\s*{_ITEM}(?:\s+{_ITEM})*\s*\]")
_ARRAY: Final = re.compile(r"array\((\[[^\]]*\])(?:,\s*dtype=[^()]*)?\)")
_WHOLE_NUMBER: Final = re.compile(r"(-?\d+)\.0")


class GoldQuestion(NamedTuple):
    """A question with its right answers."""

    query_id: str
    """Its id in the file; empty if it has none."""
    query: str
    """The question."""
    answers: tuple[str, ...] = ()
    """Right answers; each of them is right. Empty if the file has none."""
    passages: tuple[str, ...] = ()
    """Passages that contain an answer. Empty if the file has none."""


class Gold(NamedTuple):
    """Right answers by normalized query; not by id, because data sets use the same ids."""

    by_query: dict[str, tuple[str, ...]]
    """The right answers to each query, by `question_key` of its text."""
    counts: Mapping[str, int] = MappingProxyType({})
    """Facts about the files: `gold_came_again`, `gold_without_answer`, `gold_unread`,
    `gold_passed_over`, `gold_guessed`; no zeros."""

    def answers(self, query: str) -> tuple[str, ...]:
        """Return the right answers to a query; empty if there are none.

        Args:
            query: The text of the query. It is compared by its words.
        """
        return self.by_query.get(question_key(query), ())


def gold_questions(
    name: str, flag: str, counts: Counter[str] | None = None, *, tell: bool = True
) -> Iterator[GoldQuestion]:
    """Yield the questions of a file or folder, in the formats of known data sets.

    These are JSON lines, a JSON list, Parquet and CSV. Plain text and `qid<TAB>query` have questions only.

    Args:
        name: A path or a URL.
        flag: The flag that gave it, for messages.
        counts: Receives the number of rows without a question as `unread`, of files of a folder that are not
            read as `passed_over`, and of files read by their content alone as `guessed`.
        tell: Log rows without a question.

    Raises:
        InputError: There is no question, or a file cannot be read.
    """
    found = bad = 0
    located = files.locate(name, flag)
    counts = Counter() if counts is None else counts
    counts["passed_over"] += len(files.passed_over(located, flag))
    for source in files.sources(located, flag):
        for line, read in _record_lines(source, counts):
            for record in _each_question(read):
                number = found
                for question in _wordings(record):
                    found += 1
                    yield question
                if found == number:
                    bad += 1
                    counts["unread"] += 1
                    if tell and bad <= _MESSAGES:
                        reason = record if isinstance(record, str) else "no question in it"
                        log.warning("%s:%s: %s; skipped", source, line, reason)
    if tell and bad > _MESSAGES:
        log.warning("%s %s: %s more rows without a question", flag, located, f"{bad - _MESSAGES:,}")
    if not found:
        names = " or ".join(tables.QUERY_KEYS[:2])
        raise InputError(
            f"{flag} {located}: holds no question; it needs rows with a column {names}, as in "
            f"{tables.EXAMPLE}"
        )


def read_gold(names: Iterable[str], flag: str, *, needed: bool = True) -> Gold:
    """Read the right answers of some files; a repeated question gets all its answers.

    Args:
        names: Paths and URLs.
        flag: The flag that gave them, for messages.
        needed: Each file must have right answers. Otherwise nothing is logged about its questions.

    Raises:
        InputError: A file has no question; or it has no answers, if they are `needed`.
    """
    gold, counts = Gold({}), Counter[str]()
    for name in names:
        answered = without = again = 0
        for question in gold_questions(name, flag, counts, tell=needed):
            if question.answers:
                answered += 1
                key = question_key(question.query)
                known = gold.by_query.get(key, ())
                again += bool(known)
                gold.by_query[key] = tuple(dict.fromkeys((*known, *question.answers)))
            else:
                without += 1
        if needed and (without or again):
            said = (f"{answered:,}", f"{without:,}", f"{again:,}")
            log.info("%s %s: %s questions with right answers, %s without; %s came again", flag, name, *said)
        if needed and not answered:
            raise InputError(f"{flag} {name}: has no answers; it needs a column answers beside the question")
        counts.update(came_again=again, without_answer=without)
    return gold._replace(counts={f"gold_{what}": count for what, count in sorted(counts.items()) if count})


def _record_lines(source: files.Source, counts: Counter[str]) -> Iterator[tuple[int, Any]]:
    """Yield each line with its record, or with the reason why it has none."""
    if isinstance(source, Path) and source.suffix == ".json" and _is_json_list(source):
        for entry in entries(source):
            yield entry.line, entry.problem or _asked(entry.record)
    elif _begins_as_json(source) and (whole := _whole_file(source)) is not None:
        for record in whole if isinstance(whole, list) else [whole]:
            yield 1, _asked(record)
    else:
        counts["guessed"] += tables.reading(source, tables.GOLD).guessed
        for row in tables.rows(source, tables.GOLD):
            try:
                yield row.line, parse(row)
            except ValueError as error:
                yield row.line, str(error)


def _asked(record: Any) -> Any:
    """Return a record; in a list of texts, each text is a question."""
    return {"question": record} if isinstance(record, str) else record


def _is_json_list(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(64).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[")


def _begins_as_json(source: files.Source) -> bool:
    with files.open_stream(source) as stream:
        return stream.peek()[:64].lstrip(b"\xef\xbb\xbf \t\r\n").startswith((b"{", b"["))


def _whole_file(source: files.Source) -> Any:
    """Return the list, or the object on several lines, of a file; None if it has one record a line."""
    first = next(iter(files.lines(source)), (0, b""))[1].strip()
    with contextlib.suppress(ValueError):
        whole = json.loads(first)
        return whole if isinstance(whole, list) else None
    if first.startswith((b"{", b"[")):
        with contextlib.suppress(ValueError), files.open_stream(source) as stream:
            return json.loads(stream.read())
    return None


def _each_question(record: Any) -> Iterator[Any]:
    """Return the questions of a record that has several, each with their passage; else the record."""
    if not isinstance(record, Mapping):
        yield record
        return
    record = {str(key).lower(): value for key, value in record.items()}
    if any(is_full(record.get(key)) for key in _SURE):  # MuSiQue's has `paragraphs` beside it
        yield record
        return
    many = (record.get(key) for key in tables.MANY_KEYS)
    inside = next(
        (own for own in many if isinstance(own, list) and isinstance(next(iter(own), 0), Mapping)), None
    )
    if inside is None:
        yield record
        return
    shared = {key: record[key] for key in tables.PASSAGE_KEYS if key in record}
    for one in inside:
        yield from _each_question({**shared, **one} if isinstance(one, Mapping) else one)


def _wordings(record: Any) -> Iterator[GoldQuestion]:
    """Return the question of a record, in each of its wordings."""
    if not isinstance(record, Mapping):
        return
    told = (record.get(key) for key in tables.QUERY_KEYS)
    every = (list(_nested_texts(value)) for value in told if not isinstance(value, int | float))
    asked = [text for text in next(filter(None, every), []) if has_content(text)]
    if not asked:
        return
    query_id = _id(record)
    there = [keys for keys in tables.ANSWER_KEYS if not record.keys().isdisjoint(keys)]
    keys: tuple[str, ...] = there[0] if there else ()
    if len(there) > 1 and keys != tables.ANSWER_KEYS[0] and not any(is_full(record.get(key)) for key in keys):
        keys = tuple(key for key in there[1] if not _is_number(record.get(key)))  # a number is a class
    if "user_input" in record and "reference" in record:  # RAGAS; in other data `reference` names a source
        keys = ("reference",)
    if any(record.get(name) is value for name, value in _UNANSWERED.items()):
        keys = ()
    answers = dict.fromkeys(
        text for key in keys for text in _nested_texts(record.get(key)) if not _is_none(text)
    )
    passages = dict.fromkeys(text for key in tables.PASSAGE_KEYS for text in _nested_texts(record.get(key)))
    for text in dict.fromkeys(" ".join(text.split()) for text in asked):
        yield GoldQuestion(query_id, text, tuple(answers), tuple(passages))


def _id(record: Mapping[str, Any]) -> str:
    try:
        return values.id_of(record, tables.QUERY_IDS)
    except ValueError:  # questions are found by their words, not by their ids
        return ""


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) or (isinstance(value, str) and value.strip().isdecimal())


def _is_none(text: str) -> bool:
    """Whether a text states that there is no right answer."""
    plain = folded(text)
    return plain in _NO_ANSWER or plain.strip(_BRACKETS) in _NO_ANSWER or not text.strip(_DOTS)


def _nested_texts(value: Any) -> Iterator[str]:
    """Yield all texts in a nested value. Numbers become texts."""
    if isinstance(value, bool):
        yield "yes" if value else "no"
    elif isinstance(value, int | float):
        if math.isfinite(value):
            yield f"{int(value) if value == int(value) else value}"
    elif isinstance(value, str):
        read = _parsed(value.strip())
        if not isinstance(read, str):
            yield from _nested_texts(read)
        elif whole := _WHOLE_NUMBER.fullmatch(read):  # because its column had an empty cell
            yield whole[1]
            if len(whole[1]) < 3:  # or it is a version, a grade
                yield read
        elif read:
            yield read
    elif isinstance(value, Mapping):
        lower = {str(key).lower(): own for key, own in value.items()}
        for key in _TEXT_KEYS:
            yield from _nested_texts(lower.get(key))
    elif isinstance(value, Iterable) and not isinstance(value, bytes):
        for one in value:
            yield from _nested_texts(one)


def _parsed(text: str) -> Any:
    """Return the list or record that a text contains in the form of JSON, Python or NumPy; else the text."""
    if array := _ARRAY.fullmatch(text):
        text = array[1]
    if text[:1] + text[-1:] not in {"[]", "{}", "()"}:
        return text
    text = _SCALAR.sub(r"\1", text)
    with contextlib.suppress(ValueError, RecursionError):
        return json.loads(text)
    with contextlib.suppress(ValueError, SyntaxError, RecursionError, MemoryError):
        if _NUMPY.fullmatch(text):  # Python would concatenate its texts
            return [ast.literal_eval(own) for own in re.findall(_ITEM, text)]
        value = ast.literal_eval(_ARRAY.sub(r"\1", text))
        value = sorted(value, key=str) if isinstance(value, set) else value
        return value if isinstance(value, list | dict | tuple) else text
    return text
