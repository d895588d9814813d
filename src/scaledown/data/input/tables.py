"""What a table's columns mean: the one reader of corpora, queries, right answers and evaluation sets.

The format, delimiter, header and columns of a file are found from its content. One log line for each file
says how it is read; what cannot be decided is refused, with the columns that were seen and the flag that
decides.
"""

import contextlib
import functools
import itertools
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final, NamedTuple

from scaledown.data.input import delimited, files, first_bytes, folders, unnamed
from scaledown.data.input import rows as formats
from scaledown.data.input.delimited import Sample
from scaledown.data.input.files import Meter, Row, Source
from scaledown.data.input.values import has, is_full
from scaledown.errors import InputError, one_line

log = logging.getLogger("scaledown")

VERSION: Final = 1  # of how delimited text is read

# A passage's own id before that of its document.
DOCUMENT_IDS: Final = ("id", "_id", "pid", "doc_id", "docid", "docno", "wikipedia_id", "kilt_id")
QUERY_IDS: Final = ("query_id", "qid", "question_id", "questionid", "id", "_id")
TITLE_KEYS: Final = ("title", "wikipedia_title")
TEXT_KEYS: Final = ("text", "contents", "content", "body", "passage", "segment")
QUERY_KEYS: Final = (
    *(
        "query",
        "question",
        "queries",
        "questions",
        "ambiguous_question",
        "user_input",
        "input",
        "body",
        "text",
    ),
)
ANSWER_KEYS: Final[tuple[tuple[str, ...], ...]] = (
    ("ground_truth", "ground_truths"),  # first: beside them `answer` is what a model said
    (
        *("answers", "answer", "answer_aliases", "possible_answers", "golden_answers", "exact_answer"),
        *("output", "qa_pairs"),
    ),
    ("label", "labels"),
)
PASSAGE_KEYS: Final = (
    *("passages", "passage", "context", "documents", "positive_passages", "snippets"),
    *("contexts", "reference_contexts"),
)
MANY_KEYS: Final = ("data", "paragraphs", "qas", "questions")
"""Of lists of questions in one record, as SQuAD, MRQA, TriviaQA and BioASQ publish them."""

_BEGINS: Final = re.compile(r"\s*(\[\s*[\[{]|[\[{]\s*[\r\n]\s*[\"\[{\]}])")
"""How a JSON value on several lines begins."""
_SAMPLE_ROWS: Final = 200
_NAMED: Final = 20  # columns in a message
_REGULAR: Final = 0.9  # a share of records with as many columns, from which on it is a table
_ABOVE: Final = 10  # rows among which the names of columns are looked for, where the first has none


class Meaning(NamedTuple):
    """What a command looks for in a table: its parts, each with the names that its column may have."""

    main: str
    """The part that each row must have."""
    parts: Mapping[str, tuple[str, ...]]
    flag: str
    """What names the column of the main part; empty where no flag does."""
    rivals: Mapping[str, tuple[str, ...]] = MappingProxyType({})
    """Names that may not be meant, each with the columns beside which they are not."""
    unread: tuple[str, ...] = ()
    """Parts that only help to understand a table."""

    def known(self) -> set[str]:
        """Return all names that a column may have."""
        return {name for names in self.parts.values() for name in names}

    def read(self) -> set[str]:
        """Return the names of the columns that are read."""
        return {name for part, names in self.parts.items() if part not in self.unread for name in names}


_RIVALS: Final = {
    "text": ("title", "contents", "content", "passage", "documents", "context"),
    "body": ("title",),  # BioASQ's question, elsewhere the text under a title
}
_ASKED: Final[Mapping[str, tuple[str, ...]]] = {
    "id": QUERY_IDS,
    "question": QUERY_KEYS,
    "answers": (*(name for names in ANSWER_KEYS for name in names), "reference"),
    "passages": PASSAGE_KEYS,
}
CORPUS: Final = Meaning(
    "text", {"id": DOCUMENT_IDS, "title": TITLE_KEYS, "text": TEXT_KEYS}, flag="--text_column"
)
QUERIES: Final = Meaning("question", _ASKED, "--query_column", _RIVALS, unread=("answers", "passages"))
GOLD: Final = Meaning("question", _ASKED, "", _RIVALS)


class Reading(NamedTuple):
    """How a file is read."""

    format: str
    columns: Mapping[str, str]
    """The column of each part, by the part."""
    header: bool | None
    """Whether there is a line of names; None where the format needs none."""
    guessed: bool
    """Whether that follows from the content alone, and not from the file's ending and its names."""

    def __str__(self) -> str:
        words = [self.format]
        if self.header is not None:
            words.append("header" if self.header else "no header")
        return ", ".join([*words, *(f"{part} = {column}" for part, column in self.columns.items())])


class _Table(NamedTuple):
    reading: Reading
    rows: Callable[[], Iterator[Row]]


def rows(source: Source, meaning: Meaning, column: str = "", meter: Meter | None = None) -> Iterator[Row]:
    """The rows of a file, with the columns that have a meaning; `column` is what `meaning.flag` names.

    Raises `InputError` for what is no data and for columns that cannot be told apart.
    """
    with files.open_stream(source, meter) as stream:
        table = _table(source, stream, meaning, column, meter)
        if table.reading.format:
            _tell(str(source), str(table.reading))
        yield from table.rows()


def version_of(sources: Iterable[Source]) -> dict[str, int]:
    """What the passages or queries of some files depend on besides their content; nothing for JSON lines."""
    tables = any(files.inner_suffix(source) in folders.TABLES for source in sources)
    return {"tables": VERSION} if tables else {}


def reading(source: Source, meaning: Meaning, column: str = "") -> Reading:
    """Find how a file is read. Raises `InputError` like `rows`."""
    with files.open_stream(source) as stream:
        return _table(source, stream, meaning, column, None).reading


@functools.cache
def _tell(source: str, said: str) -> None:
    log.info("%s: %s", source, said)


def _table(  # noqa: PLR0911
    source: Source, stream: Any, meaning: Meaning, column: str, meter: Meter | None
) -> _Table:
    """Find the kind of a file from its first bytes, its ending and its first lines."""
    try:
        head = stream.peek()
    except OSError as error:
        raise files.damaged(source, 0, error) from error
    suffix = files.inner_suffix(source)
    kind = first_bytes.format_of(head)
    if kind == first_bytes.TOPICS:
        return _topics(source, stream, meaning, column)
    if kind or suffix == ".parquet":
        return _batches(source, stream, kind or first_bytes.PARQUET, meaning, column, meter)
    whole = len(head) < files.HEAD_BYTES
    text = head.rstrip(b"\0").decode("utf-8", "surrogateescape").lstrip("\ufeff")
    declared = delimited.DECLARED.match(text)
    if declared:
        suffix, text = ".tsv" if declared[1] == "\t" else ".csv", text[declared.end() :]
    if suffix in folders.LINES or _is_json(text, whole=whole) or _BEGINS.match(text):
        return _json(source, stream, text, meaning, column, certain=suffix in folders.LINES)
    is_table = suffix in folders.TABLES
    looked = text.strip() and (is_table or _may_be_a_table(text, meaning, column))
    above = int(bool(declared))
    if looked and (
        found := _delimited(source, stream, text, suffix, meaning, column, whole=whole, above=above)
    ):
        if not found.reading.header:
            _check_first(source, text, meaning)
        return found
    _check_first(source, text, meaning)
    if meaning.main != "text":
        reading = Reading("text, one question a line", {}, None, guessed=False)
        return _Table(reading, lambda: formats.line_rows(source, stream, column or meaning.main))
    if suffix in folders.TEXT:
        return _Table(Reading("", {}, None, guessed=False), lambda: formats.article(source, stream))
    if not text.strip():
        return _Table(Reading("", {}, None, guessed=False), lambda: iter(()))
    raise InputError(
        f"{source}: neither its ending nor its first line ({one_line(text.splitlines()[0], 60)}) says what "
        "it is; expected JSON lines, Parquet, Arrow, CSV or TSV, or the ending .txt for an article"
    )


def _first_line(text: str) -> str:
    """Return the first line that is not blank."""
    return text.strip().replace("\r", "\n").partition("\n")[0].strip()


def _is_json(text: str, *, whole: bool) -> bool:
    """Whether the first line is a JSON object."""
    first = _first_line(text)
    if not first.startswith("{") or (first == text.strip() and not whole):
        return first.startswith('{"')
    try:
        formats.parse(Row("", 1, first.strip().encode("utf-8", "surrogateescape")))
    except ValueError:
        return False
    return True


# Records: JSON lines, Parquet, Arrow, TREC topics, datasets of the hub


def _json(source: Source, stream: Any, text: str, meaning: Meaning, column: str, *, certain: bool) -> _Table:
    seen = []
    for line in re.split(r"[\r\n]+", text.strip())[:_SAMPLE_ROWS]:
        try:
            seen.append(formats.parse(Row("", 1, line.strip().encode("utf-8", "surrogateescape"))))
        except ValueError:
            if not seen:  # perhaps one value on many lines
                break
    columns = _columns(str(source), seen, meaning, column)
    reading = Reading("JSON lines", columns, None, guessed=not certain)
    return _Table(reading, lambda: formats.json_rows(source, stream))


def _batches(  # noqa: PLR0917
    source: Source, stream: Any, kind: str, meaning: Meaning, column: str, meter: Meter | None
) -> _Table:
    if files.is_compressed(stream):
        raise InputError(f"{source}: is a {kind} file that was compressed again; unpack it and give that")
    found = formats.batches(source, kind, meter)
    wanted = (
        meaning.read()
        | set(MANY_KEYS)
        | ({column.lower(), column.lower().partition(".")[0]} if column else set())
    )
    _check_doubled(str(source), found.names, meaning, column)
    used = [name for name in found.names if name.lower() in wanted and found.names.count(name) == 1]
    if not used:
        raise _no_main(str(source), found.names, meaning, column)
    rivals = {name for names in meaning.rivals.values() for name in names}
    beside = [name for name in found.names if name.lower() in rivals and found.names.count(name) == 1]
    looked = list(dict.fromkeys([*used, *beside]))
    again = itertools.islice(formats.batches(source, kind, None).read(looked), _SAMPLE_ROWS)
    seen = []
    for row in again:
        with contextlib.suppress(ValueError):  # it is rejected when it is read
            seen.append(formats.parse(row))
    columns = _columns(str(source), seen, meaning, column, found.names)
    reading = Reading(kind, columns, None, guessed=files.inner_suffix(source) not in folders.BATCHES)
    return _Table(reading, lambda: found.read(used))


def _topics(source: Source, stream: Any, meaning: Meaning, column: str) -> _Table:
    if meaning.main != "question":
        raise InputError(f"{source}: holds TREC topics, which are questions, no corpus; give the documents")

    def named(row: Row) -> Row:
        content: Mapping[str, Any] = row.content if isinstance(row.content, dict) else {}
        order = (column.lower(),) if column else ("query", "title", "question", "desc", "description")
        key = next((name for name in order if content.get(name)), "")
        if not key:
            seen = ", ".join(content) or "none"
            return row._replace(problem=f"has no {' or '.join(order)}; its tags are {seen}")
        number = next((content[name] for name in ("num", "number", "id") if name in content), "")
        return row._replace(content={"id": number, column or "question": content[key]})

    columns = {"id": "num", "question": column or "title"}
    reading = Reading(first_bytes.TOPICS, columns, None, guessed=True)
    return _Table(reading, lambda: map(named, formats.topic_rows(source, stream)))


def of_records(name: str, given: Iterator[Row], meaning: Meaning, column: str) -> Iterator[Row]:
    """Rows that are records already, of the data set `name`, after their first ones were looked at."""
    first = list(itertools.islice(given, _SAMPLE_ROWS))
    seen = [row.content for row in first if isinstance(row.content, dict)]
    lower = [{str(key).lower(): value for key, value in record.items()} for record in seen]
    columns = _columns(name, lower, meaning, column)
    _tell(name, str(Reading("records", columns, None, guessed=False)))
    return itertools.chain(first, given)


def _columns(
    shown: str,
    records: Sequence[Mapping[str, Any]],
    meaning: Meaning,
    column: str,
    names: Sequence[str] = (),
) -> dict[str, str]:
    """Find the column of each part in some records. Raises `InputError` if none has the main part."""
    found: dict[str, str] = {}
    for part, keys in meaning.parts.items():
        if part == meaning.main and column:
            if not records or any(has(record, column) for record in records):
                found[part] = column
            continue
        full = {key for record in records for key in keys if is_full(record.get(key))}
        if key := next((key for key in keys if key in full), ""):
            found[part] = key
            if part == meaning.main:
                _check_rivals(shown, records, meaning, key)
    seen = names or list(dict.fromkeys(str(name) for record in records for name in record))
    many = meaning.main == "question" and any(not set(MANY_KEYS).isdisjoint(record) for record in records)
    empty = any(key in record for record in records for key in meaning.parts[meaning.main])
    if records and meaning.main not in found and not many and (column or not empty):
        raise _no_main(shown, seen, meaning, column)
    return found


def _check_rivals(shown: str, records: Sequence[Mapping[str, Any]], meaning: Meaning, key: str) -> None:
    """Refuse `text` as the question if another column may be the question: it may be a corpus."""
    every = meaning.rivals.get(key, ())
    rivals = [name for name in every if any(is_full(record.get(name)) for record in records)]
    if rivals:
        raise InputError(
            f"{shown}: either of the columns {key} and {rivals[0]} may hold the question; "
            f"{_way(meaning, key, 'question')}"
        )


def _check_doubled(shown: str, names: Sequence[str], meaning: Meaning, column: str) -> None:
    """Refuse a column name that occurs several times, if a part is read from it."""
    for part, keys in meaning.parts.items():
        if part in meaning.unread:
            continue
        own = [name for key in keys for name in names if name.lower() == key]
        if part == meaning.main and column:
            own = [names[place] for place in _place(column, names)]
        exact = [name for name in own if name.islower()] or own
        if exact and (many := names.count(exact[0])) > 1:
            raise InputError(
                f"{shown}: {many} columns are called {exact[0]}; the columns are {_listed(names)}; rename "
                "all but one"
            )


def _no_main(shown: str, names: Sequence[str], meaning: Meaning, column: str) -> InputError:
    wanted = repr(column) if column else " or ".join(meaning.parts[meaning.main])
    return InputError(
        f"{shown}: no {meaning.main} under {wanted}; the columns are {_listed(names)}: "
        + (f"name one with {meaning.flag}" if meaning.flag else f"call one {meaning.main}")
    )


def _listed(names: Sequence[str]) -> str:
    shown = [one_line(name, 40) or "(no name)" for name in names[:_NAMED]]
    return ", ".join([*shown, *["…"] * (len(names) > _NAMED)]) or "none"


def _way(meaning: Meaning, column: str, part: str) -> str:
    if meaning.flag:
        return f"name one with {meaning.flag}, as {meaning.flag} {column}"
    return f"call the right one {part}"


# Delimited text


def _delimited(  # noqa: PLR0917
    source: Source,
    stream: Any,
    text: str,
    suffix: str,
    meaning: Meaning,
    column: str,
    *,
    whole: bool,
    above: int,
) -> _Table | None:
    """Find whether a text is CSV or TSV, by its ending, a header or tabs; None if it is neither."""
    is_table = suffix in folders.TABLES
    found = delimited.samples(text, whole=whole)
    if not is_table and not _looks_like_a_table(found, meaning, column):
        return None
    usual = "," if suffix == ".csv" else "\t"
    sample = _chosen(found, usual, meaning, column)
    dialect, records = sample.dialect, sample.records
    if not records:
        return None
    parted = str(dialect) if sample.width > 1 else "one column"
    shown = f"{source}: {parted}"
    header = records[0] if _is_header(records[0], meaning, column) else None
    if header is None:
        _check_above(source, found, meaning)
    if header is not None:
        named = _named(shown, header, meaning, column)
        columns = _of_header(shown, header, named, records[1:], meaning, column)
        needed, width = columns[meaning.main], len(header)
    else:
        places = _told(shown, sample, meaning, column)
        columns = {part: f"column {place + 1}" for part, place in places.items()}
        needed, width = column or meaning.main, sample.width
        named = {
            needed if part == meaning.main else part: place
            for part, place in places.items()
            if part not in meaning.unread
        }
    reading = Reading(
        parted,
        columns,
        header is not None,
        guessed=header is None or dialect.delimiter != usual or not is_table,
    )
    wanted = formats.Columns(named, needed, width, header, above)
    return _Table(reading, lambda: formats.delimited_rows(source, stream, dialect, wanted))


def _may_be_a_table(text: str, meaning: Meaning, column: str) -> bool:
    """Whether the text may be a table: its first line has a tab, or a name of the main part."""
    first = _first_line(text)
    main = {*meaning.parts[meaning.main], *([column.lower()] if column else [])}
    cells = (cell for delimiter in delimited.DELIMITERS for cell in first.split(delimiter))
    return "\t" in first or any(cell.strip(" \"'").lower() in main for cell in cells)


def _check_above(source: Source, found: Mapping[str, Sample], meaning: Meaning) -> None:
    """Refuse a table with other lines above its header, because they would become rows."""
    sure = set(meaning.parts[meaning.main]) - set(meaning.rivals)
    for sample in found.values():
        for number, record in enumerate(sample.records[1:_ABOVE], 2):
            cells = [cell.strip() for cell in record]
            names = len(record) == sample.width > 1 and all(map(unnamed.NAME.fullmatch, filter(None, cells)))
            if names and not sure.isdisjoint(_plain_names(cells)):
                raise InputError(
                    f"{source}: its row {number} ({', '.join(cells)}) looks like the names of columns; "
                    "delete what stands above it"
                )


def _check_first(source: Source, text: str, meaning: Meaning) -> None:
    """Refuse a file whose first line has the names of columns where its other lines have no such columns."""
    first = _first_line(text)
    sure = set(meaning.parts[meaning.main]) - set(meaning.rivals)
    for delimiter, called in delimited.DELIMITERS.items():
        cells = [cell.strip() for cell in first.split(delimiter)]
        names = [cell.strip("\"'").lower() for cell in cells]
        short = all(map(unnamed.NAME.fullmatch, names)) or all(
            re.fullmatch(r"(['\"]).*\1", cell) for cell in cells
        )
        if len(names) > 1 and short and not sure.isdisjoint(names):
            raise InputError(
                f"{source}: its first line has the columns {', '.join(names)}, {called}-separated, and other "
                "lines do not; mend its quotes"
            )


def _looks_like_a_table(found: Mapping[str, Sample], meaning: Meaning, column: str) -> bool:
    """Whether a text without the ending of a table has a header, or a tab or more in each line."""
    for sample in found.values():
        first = sample.records[0] if sample.records else []
        sure = [name for name in _plain_names(first) if name in meaning.parts[meaning.main]]
        if len(first) == 1:
            sure = [name for name in sure if meaning.main == "question" and name not in meaning.rivals]
            sure = sure if len(sample.records) > 1 else []
        if meaning.main == "text" and sample.regular < _REGULAR:
            continue  # an article may begin with such a word
        if (sure or (len(first) > 1 and column.lower() in _plain_names(first))) and _is_header(
            first, meaning, column
        ):
            return True
    tabs = found["\t"]
    return tabs.regular == 1 and tabs.width > 1 and (meaning.main == "question" or len(tabs.records) > 1)


def _plain_names(cells: Sequence[str]) -> list[str]:
    return [cell.strip().lower() for cell in cells]


def _chosen(found: Mapping[str, Sample], usual: str, meaning: Meaning, column: str) -> Sample:
    """Choose the delimiter: with known column names, else with regular columns, else the usual one."""

    def sense(item: tuple[str, Sample]) -> tuple[bool, bool, bool, bool, float, bool, int]:
        delimiter, sample = item
        header = bool(sample.records) and _is_header(sample.records[0], meaning, column)
        names = set(_plain_names(sample.records[0])) if sample.records else set()
        main = {*meaning.parts[meaning.main], *([column.lower()] if column else [])}
        regular = sample.regular >= _REGULAR and sample.width > 1
        codes = all(re.fullmatch(r"[\w.-]+", record[0].strip()) for record in sample.records)
        return (
            header and not names.isdisjoint(main),
            regular,
            regular and codes,
            delimiter == usual and regular,
            sample.regular,
            delimiter == usual,
            sample.width,
        )

    return max(found.items(), key=sense)[1]


def _is_header(cells: Sequence[str], meaning: Meaning, column: str) -> bool:
    """Whether the cells of the first line are names: one of them known, none of them a number."""
    names = _plain_names(cells)
    if column and column.lower() in names:
        return True
    numbers = any(re.fullmatch(r"[-+\d.,]+", name) for name in names)
    return not numbers and not meaning.known().isdisjoint(names)


def _named(shown: str, header: Sequence[str], meaning: Meaning, column: str) -> dict[str, int]:
    """The places of the columns whose names have a meaning; that of the flag under the name it has there."""
    names = [name.strip() for name in header]
    flagged = _place(column, names) if column else []
    _check_doubled(shown, names, meaning, column)
    known = meaning.read()
    places: dict[str, int] = {}
    for place, name in enumerate(names):
        if place in flagged:
            places[column] = place
        elif name.lower() in known and names.count(name) == 1:
            places[name] = place
    if column not in places and (column or not _of_part(places, meaning, meaning.main)):
        raise _no_main(shown, names, meaning, column)
    return places


def _of_part(names: Iterable[str], meaning: Meaning, part: str) -> list[str]:
    """Those of some columns that may be a part, the most telling name first."""
    keys = meaning.parts[part]
    return sorted((name for name in names if name.lower() in keys), key=lambda name: keys.index(name.lower()))


def _place(column: str, names: Sequence[str]) -> list[int]:
    """Where the column of a flag is: by its name, its name in any case, or its number from 1."""
    exact = [place for place, name in enumerate(names) if name == column]
    found = exact or [place for place, name in enumerate(names) if name.lower() == column.lower()]
    if not found and (number := _number(column)) and number <= len(names):
        return [number - 1]
    return found


def _number(column: str) -> int:
    """The number that a flag gives in the place of a name: `2` or `column 2`; 0 for a name."""
    number = re.fullmatch(r"(?:column )?([1-9]\d{0,3})", column)
    return int(number[1]) if number else 0


def _of_header(  # noqa: PLR0917
    shown: str,
    header: Sequence[str],
    places: Mapping[str, int],
    records: Sequence[Sequence[str]],
    meaning: Meaning,
    column: str,
) -> dict[str, str]:
    """The column of each part, by its name: the first that is not empty throughout."""
    rows = [dict(zip((name.strip() for name in header), record, strict=False)) for record in records]
    columns = {}
    for part in meaning.parts:
        if part == meaning.main and column:
            columns[part] = column
        elif own := _of_part(dict.fromkeys(name.strip() for name in header), meaning, part):
            columns[part] = next(
                (name for name in own if any(is_full(row.get(name)) for row in rows)), own[0]
            )
    if not column:
        lower = [{name.lower(): cell for name, cell in row.items()} for row in rows]
        _check_rivals(shown, lower, meaning, columns[meaning.main].lower())
    return columns


def _told(shown: str, sample: Sample, meaning: Meaning, column: str) -> dict[str, int]:
    """The places of the parts in a table without names, by what the columns hold."""
    records, width = sample.records, sample.width
    first = [one_line(cell.strip(), 30) for cell in records[0]]
    number = _number(column)
    if column and not number:
        raise _no_main(shown, first, meaning, column)
    if number > width:
        raise InputError(f"{shown}, has {width} columns; {meaning.flag} {column} names none of them")
    if not number and unnamed.may_be_names(records):
        if meaning.flag:
            place = unnamed.main_column(_cells(records[1:], width), meaning.main)
            place = len(first) - 1 if place is None else place
            way = (
                f"give {meaning.flag} {first[place]} if it names columns, {meaning.flag} {place + 1} if it "
                "is a row"
            )
        else:
            way = f"write a first line that names a column {meaning.main}"
        raise InputError(f"{shown}, and its first line ({', '.join(first)}) may be a header or a row; {way}")
    cells = _cells(records, width)
    main = number - 1 if number else unnamed.main_column(cells, meaning.main)
    if main is None:
        raise InputError(
            f"{shown}, no header, {width} columns ({', '.join(first)}): which holds the {meaning.main} "
            "cannot be told; "
            + (
                f"give its number with {meaning.flag}, as {meaning.flag} {width}"
                if meaning.flag
                else f"write a first line that names a column {meaning.main}"
            )
        )
    return unnamed.places(cells, main, meaning.parts)


def _cells(records: Sequence[Sequence[str]], width: int) -> list[list[str]]:
    """Return the cells of each column that are not empty."""
    rows = [[cell.strip() for cell in record] for record in records if len(record) == width]
    return [[row[place] for row in rows if row[place]] for place in range(width)]
