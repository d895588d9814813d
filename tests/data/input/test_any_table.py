"""Whatever a table was written by, its rows come back, or the refusal names what was seen."""

import contextlib
import csv
import io
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from scaledown.data.input import tables, values
from scaledown.data.input.rows import parse
from scaledown.errors import InputError

FUZZ = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
SPECIAL = st.sampled_from(
    [*"\",;|\t'\\ \n?[]{}<>#", '""', "''", '\\"', "\r\n", "é", "東京", "\u2028", "\x0b", "1", "0.5"]
)
CELL = st.lists(SPECIAL | st.text("abc XYZ", max_size=6), max_size=6).map("".join)
QUESTION = CELL.map(lambda cell: f"What {cell} it")


@st.composite
def tables_of_questions(draw: st.DrawFn) -> tuple[list[str], list[list[str]]]:
    """Names of columns, one of them `question`, and rows with a question each."""
    known = st.sampled_from(["id", "note", "score", "title of it", "x"])
    others = draw(st.lists(known, max_size=3, unique=True))
    names = draw(st.permutations([*others, "question"]))
    row = st.tuples(*(QUESTION if name == "question" else CELL for name in names)).map(list)
    return names, draw(st.lists(row, min_size=1, max_size=6))


@st.composite
def dialects(draw: st.DrawFn) -> dict[str, Any]:
    return {
        "delimiter": draw(st.sampled_from(",;|\t")),
        "quotechar": draw(st.sampled_from("\"'")),
        "escapechar": draw(st.sampled_from([None, "\\"])),
        "doublequote": draw(st.booleans()),
        "lineterminator": draw(st.sampled_from(["\n", "\r\n", "\r"])),
        "quoting": draw(
            st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC, csv.QUOTE_NONE])
        ),
        "skipinitialspace": draw(st.booleans()),
    }


def read(path: Path, column: str = "") -> tuple[list[str], list[str]]:
    """The questions in a file, and why other rows have none."""
    found, bad = [], []
    for row in tables.rows(path, tables.QUERIES, column):
        try:
            record = parse(row)
            value = values.column_of(record, column) if column else values.value_of(record, tables.QUERY_KEYS)
            text = same(values.as_text(value) or "")
            if not text:
                raise ValueError("no question")
            found.append(text)
        except ValueError as error:
            bad.append(str(error))
    return found, bad


def same(text: str) -> str:
    """A text without what tables do not keep: spaces, and how often a backslash stands."""
    return " ".join(re.sub(r"\\+", r"\\", text.replace("\ufeff", "")).split())


def check(path: Path, expected: list[str]) -> None:
    """The rows come back, each as it was or rejected with a reason; or the file is refused by its name."""
    try:
        found, bad = read(path)
    except InputError as error:
        assert path.name in str(error)
        return
    assert not Counter(found) - Counter(expected), "what is read was written"
    assert len(found) + len(bad) >= len(expected), "what is not read is counted"
    assert all(bad)


@FUZZ
@given(
    table=tables_of_questions(), dialect=dialects(), name=st.sampled_from(["q.csv", "q.tsv", "q.txt", "q"])
)
def test_any_dialect_of_the_csv_module(table, dialect, name: str, tmp_path: Path) -> None:
    names, rows = table
    # One column alone is a table only in CSV; elsewhere it is text, one question a line.
    assume(len(names) > 1 or (name == "q.csv" and dialect["delimiter"] == ","))
    text = io.StringIO(newline="")
    try:
        csv.writer(text, **dialect).writerows([names, *rows])
        back = list(csv.reader(io.StringIO(text.getvalue(), newline=""), **dialect))
    except csv.Error:
        assume(False)
    assume(back == [names, *rows])  # some dialects cannot be read by their own reader
    # Without quoting a quote in front of a cell may mean that its line goes on.
    assume(dialect["quoting"] != csv.QUOTE_NONE or not re.search(r"(^|[,;|\t\r\n])[\"']", text.getvalue()))
    # A line that ends within a quote is a line in TSV, where its columns are as many as elsewhere.
    lines = any(re.search(r"[\r\n]", cell) for row in rows for cell in row)
    assume(dialect["delimiter"] != "\t" or dialect["quoting"] == csv.QUOTE_ALL or not lines)
    # Apostrophes are quotes only where they stand around every text.
    assume(dialect["quotechar"] == '"' or dialect["quoting"] in {csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC})
    # Behind a backslash a quote is taken for an escaped one, whatever quotes the dialect has.
    assume(dialect["quotechar"] == '"' or '\\"' not in text.getvalue())
    path = tmp_path / name
    path.write_text(text.getvalue(), encoding="utf-8", newline="")
    check(path, [same(row[names.index("question")]) for row in rows])


@FUZZ
@given(
    rows=st.lists(
        st.tuples(st.integers(0, 10**9), QUESTION), min_size=1, max_size=6, unique_by=lambda row: row[0]
    ),
    delimiter=st.sampled_from(",;\t"),
    answers=st.booleans(),
)
def test_tables_without_a_header(rows, delimiter: str, answers: bool, tmp_path: Path) -> None:
    # As in tables with a header: a line that ends within a quote is a line in TSV.
    assume(delimiter != "\t" or not any(re.search(r"[\r\n]", asked) for _, asked in rows))
    text = io.StringIO(newline="")
    writer = csv.writer(text, delimiter=delimiter, lineterminator="\n")
    writer.writerows([number, asked, *(["['x', 'y z']"] if answers else [])] for number, asked in rows)
    path = tmp_path / ("q.tsv" if delimiter == "\t" else "q.csv")
    path.write_text(text.getvalue(), encoding="utf-8", newline="")
    check(path, [same(asked) for _, asked in rows])


VALUE = st.none() | st.booleans() | st.integers() | st.floats() | CELL
RECORDS = st.lists(
    st.dictionaries(
        st.sampled_from(["id", "title", "text", "x", "score", "Query"]), VALUE | st.lists(VALUE, max_size=2)
    ).flatmap(lambda other: QUESTION.map(lambda asked: {**other, "question": asked})),
    min_size=1,
    max_size=6,
)


@FUZZ
@given(
    records=RECORDS,
    end=st.sampled_from(["\n", "\r\n", "\r", "\n\n"]),
    name=st.sampled_from(["q.jsonl", "q.txt", "q"]),
)
def test_any_json_lines(records, end: str, name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text("".join(json.dumps(record) + end for record in records), encoding="utf-8", newline="")
    expected = []
    for record in records:
        rival = values.as_text(record.get("Query")) if values.is_full(record.get("Query")) else None
        expected.append(same(record["question"]) if rival is None else same(rival))
    check(path, expected)


COLUMN = st.sampled_from(
    [pa.string(), pa.large_string(), pa.int64(), pa.float64(), pa.bool_(), pa.decimal128(9, 2), pa.binary()]
)


@FUZZ
@given(
    asked=st.lists(QUESTION, min_size=1, max_size=9),
    kind=COLUMN,
    names=st.lists(st.sampled_from(["id", "note", "title"]), max_size=3),
    text=st.sampled_from([pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())]),
    form=st.sampled_from(["parquet", "feather", "stream"]),
)
def test_any_table_of_pyarrow(asked, kind, names, text, form, tmp_path: Path) -> None:
    columns = [pa.array(asked).cast(text), *(pa.nulls(len(asked), kind) for _ in names)]
    table = pa.Table.from_arrays(columns, ["question", *names])
    path = tmp_path / "q.data"
    if form == "parquet":
        pq.write_table(table, path)
    elif form == "feather":
        pyarrow.feather.write_feather(table, path) if len(set(names)) == len(names) else assume(False)
    else:
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table)
    check(path, [same(one) for one in asked])


@FUZZ
@given(
    content=st.binary(max_size=300) | st.text(max_size=200).map(str.encode),
    name=st.sampled_from(["q.csv", "q.tsv", "q.txt", "q.jsonl", "q.parquet", "q"]),
)
def test_anything_at_all_is_read_or_refused_by_its_name(content: bytes, name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    for meaning in (tables.QUERIES, tables.GOLD, tables.CORPUS):
        try:
            for row in tables.rows(path, meaning):
                with contextlib.suppress(ValueError):  # a row that is rejected, with its reason
                    parse(row)
        except InputError as error:
            assert name in str(error)
