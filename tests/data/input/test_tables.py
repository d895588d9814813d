"""One reader understands corpora, queries and right answers from their content, and says what it found."""

import bz2
import csv
import decimal
import gzip
import io
import json
import logging
import lzma
import os
import re
import struct
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest

from scaledown.config.prepare import PrepareConfig
from scaledown.data.input import files, tables
from scaledown.data.input.corpus import parse_article
from scaledown.data.input.gold import gold_questions
from scaledown.data.input.queries import from_files
from scaledown.data.input.rows import parse
from scaledown.data.input.tables import reader
from scaledown.errors import InputError
from web import Server


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def queries(*paths: Path, column: str = "", bad: float = 0.0) -> list[tuple[str, str]]:
    config = PrepareConfig(
        queries_file=tuple(map(str, paths)), output_file="o.json", query_column=column, max_bad_fraction=bad
    )
    intake = files.Intake("the queries", bad)
    found = [(query.query_id, query.text) for query in from_files(config, intake)]
    intake.close()
    return found


def gold(path: Path) -> list[tuple[str, str, tuple[str, ...]]]:
    return [(one.query_id, one.query, one.answers) for one in gold_questions(str(path), "--decontaminate")]


def articles(*paths: Path, column: str = "", bad: float = 0.0) -> list[tuple[str, str, str]]:
    """Id, title and text of each article; none may be rejected."""
    found = []
    for path in files.every(paths, "--corpus_path"):
        for row in tables.rows(path, tables.CORPUS, column):
            article = parse_article(parse(row), f"line {row.line}", column)
            found.append((article.doc_id, article.title, "\n".join(block.text for block in article.blocks)))
    return found


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [re.sub(r"^.*/", "", record.getMessage()) for record in caplog.records]


@pytest.fixture(autouse=True)
def _log_of_each_test(caplog: pytest.LogCaptureFixture) -> None:
    reader._log_once.cache_clear()
    caplog.set_level(logging.INFO, logger="scaledown")


# Questions: delimiter, header and columns

TIDES = [("", "What causes tides?", ("the Moon",)), ("", "Who wrote Faust?", ("Goethe", "J. W. Goethe"))]
IDS = [("q1", "What causes tides?"), ("q2", "Who wrote Faust?")]


@pytest.mark.parametrize("name", ["nq-test.tsv", "nq-test.qa.csv", "nq-test.txt", "nq-test"])
def test_question_and_answers_without_a_header(name: str, tmp_path: Path, caplog) -> None:
    text = 'What causes tides?\t[\'the Moon\']\nWho wrote Faust?\t["Goethe", "J. W. Goethe"]\n'
    path = write(tmp_path / name, text)
    assert gold(path) == TIDES
    assert queries(path) == [("", query) for _, query, _ in TIDES]
    how = f"{name}: tab-separated, no header, question = column 1, answers = column 2"
    assert said(caplog) == [how], "one line for each file"


@pytest.mark.parametrize(
    ("name", "text", "how"),
    [
        ("q.tsv", "id\tquestion\n{}\t{}\n{}\t{}\n", "tab-separated, header, id = id, question = question"),
        ("q.txt", "qid,query\n{},{}\n{},{}\n", "comma-separated, header, id = qid, question = query"),
        ("q.csv", "qid;query\n{};{}\n{};{}\n", "semicolon-separated, header, id = qid, question = query"),
        ("q.csv", "qid|query\n{}|{}\n{}|{}\n", "bar-separated, header, id = qid, question = query"),
        ("q.csv", "qid\tquery\n{}\t{}\n{}\t{}\n", "tab-separated, header, id = qid, question = query"),
        ("q.csv", 'qid, query\n{}, "{}"\n{}, "{}"\n', "comma-separated, header, id = qid, question = query"),
        ("q.csv", "qid,query\r{},{}\r{},{}\r", "comma-separated, header, id = qid, question = query"),
        ("q.tsv", "{}\t{}\r{}\t{}\r", "tab-separated, no header, id = column 1, question = column 2"),
        ("q.csv", "{},{}\n{},{}\n", "comma-separated, no header, id = column 1, question = column 2"),
        ("q.csv", "{};{}\n{};{}\n", "semicolon-separated, no header, id = column 1, question = column 2"),
        (
            "q.csv",
            "'qid','query'\n'{}','{}'\n'{}','{}'\n",
            "comma-separated, header, id = qid, question = query",
        ),
    ],
)
@pytest.mark.parametrize("read", [queries, gold])
def test_delimiters_and_headers(read, name: str, text: str, how: str, tmp_path: Path, caplog) -> None:
    path = write(tmp_path / name, text.format(*(cell for row in IDS for cell in row)))
    assert [row[:2] for row in read(path)] == IDS
    assert said(caplog) == [f"{name}: {how}"]


def test_a_header_of_one_column_in_a_text(tmp_path: Path) -> None:
    assert queries(write(tmp_path / "q.txt", "query\nWho, then?\nWhy?\n")) == [
        ("", "Who, then?"),
        ("", "Why?"),
    ]
    assert queries(write(tmp_path / "t.txt", "text\nWho, then?\n")) == [("", "text"), ("", "Who, then?")]


def test_quotes_in_tsv_are_text(tmp_path: Path) -> None:
    rows = ['"Let it be" is by whom', 'who said "no', '"what is a tag', "who's next"]
    path = write(tmp_path / "q.tsv", "".join(f"{n}\t{row}\n" for n, row in enumerate(rows)))
    assert queries(path) == [(str(n), row) for n, row in enumerate(rows)]
    path = write(tmp_path / "q2.tsv", "id\tquery\n" + "".join(f"{n}\t{row}\n" for n, row in enumerate(rows)))
    assert queries(path) == [(str(n), row) for n, row in enumerate(rows)]


@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
def test_tsv_that_is_quoted_nevertheless(quoting: int, tmp_path: Path) -> None:
    rows = [["id", "query"], ["1", 'who said "no"'], ["2", "what is\ta tab"], ["3", "why"]]
    text = io.StringIO()
    csv.writer(text, dialect="excel-tab", quoting=quoting).writerows(rows)
    assert queries(write(tmp_path / "q.tsv", text.getvalue())) == [
        (number, " ".join(query.split())) for number, query in rows[1:]
    ]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "q.csv",
            "nr;frage\n1;Wer war Goethe?\n2;Wer war Schiller?\n",
            r"semicolon-separated, and its first line \(nr, frage\) may be a header or a row; give "
            "--query_column frage if it names columns, --query_column 2 if it is a row",
        ),
        (
            "q.tsv",
            "the first text\tthe second text\nanother one here\tand one more\n",
            r"tab-separated, no header, 2 columns \(the first text, the second text\): it is not clear "
            "which column is the question; give its number with --query_column",
        ),
        ("q.csv", "id,frage\n1,Wer?\n", "no question under query or question .*; the columns are id, frage"),
        (
            "q.csv",
            "query,query\nWho?,Why?\n",
            "2 columns are called query; the columns are query, query; rename all but one",
        ),
        (
            "q.jsonl",
            '{"title": "What is it?", "text": "A passage."}\n',
            "either of the columns text and title may hold the question; name one with --query_column",
        ),
        ("q.jsonl", '{"prompt": "Who?"}\n', "the columns are prompt: name one with --query_column"),
    ],
)
def test_ambiguous_tables_are_refused(name: str, text: str, message: str, tmp_path: Path) -> None:
    path = write(tmp_path / name, text)
    with pytest.raises(InputError, match=message):
        queries(path)
    with pytest.raises(InputError, match=name):
        gold(path)


def test_the_line_in_which_excel_names_its_delimiter_is_no_row(tmp_path: Path, caplog) -> None:
    text = "\ufeffsep=;\r\nID;Question;Answer\r\n1;Was ist 3,5?;eine Zahl\r\n2;Wer?;Goethe\r\n"
    for name in ("q.csv", "q.txt", "q"):
        path = write(tmp_path / name, text)
        assert queries(path) == [("1", "Was ist 3,5?"), ("2", "Wer?")]
        assert gold(path)[1] == ("2", "Wer?", ("Goethe",))
    assert "q.csv: semicolon-separated, header, id = ID, question = Question, answers = Answer" in said(
        caplog
    )
    path = write(tmp_path / "c.csv", "sep=,\nid,title,text\n1,T,Some text\n")
    assert articles(path) == [("1", "T", "Some text")]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("q.csv", "# exported today\nid,question,text\n{}"),
        ("q.csv", "My questions\n\nid,question,text\n{}"),
        ("q.csv", "Survey,,\nid,question,text\n{}"),
        ("q.tsv", "#version=1\nid\tquestion\ttext\n{}"),
    ],
)
@pytest.mark.parametrize("rows", [2, 40])
def test_names_below_other_lines_are_refused(name: str, text: str, rows: int, tmp_path: Path) -> None:
    delimiter = "\t" if name == "q.tsv" else ","
    lines = "".join(delimiter.join((str(n), f"Who is {n}?", f"Text {n}.")) + "\n" for n in range(rows))
    path = write(tmp_path / name, text.format(lines))
    for read in (queries, gold, articles):
        with pytest.raises(InputError, match=r"its row 2 \(id, question, text\) looks like the names of"):
            read(path)


def test_unknown_column_names_are_refused_with_the_likely_column(tmp_path: Path) -> None:
    path = write(tmp_path / "q.csv", "Nr;Frage;Antwort\n1;Wer schrieb Faust?;Goethe\n2;Was ist das?;x\n")
    with pytest.raises(InputError, match="give --query_column Frage if it names columns, --query_column 2 "):
        queries(path)


def test_one_column_is_called_so(tmp_path: Path, caplog) -> None:
    path = write(tmp_path / "q.csv", "question\nWho, what?\nWhen, why, how?\n")
    assert queries(path) == [("", "Who, what?"), ("", "When, why, how?")]
    assert said(caplog) == ["q.csv: one column, header, question = question"]


def test_a_quote_that_is_not_closed_leaves_the_others_quotes(tmp_path: Path) -> None:
    path = write(tmp_path / "q.csv", 'id,question\n1,"Who?"\n2,"Why\n3,"When, then?"\n')
    assert queries(path, bad=0.5) == [("1", "Who?"), ("3", "When, then?")]
    with pytest.raises(InputError, match="1 of 3 lines are malformed .*line 3: a quote is not closed"):
        queries(path)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("q.txt", "Who?\rWhy?\rWhen?\nWhere?\r\nHow?\n"),
        (
            "q.jsonl",
            '{"query": "Who?"}\r{"query": "Why?"}\r{"query": "When?"}\n{"query": "Where?"}\r\n'
            '{"query": "How?"}',
        ),
        ("q.csv", "id,query\r1,Who?\r2,Why?\r\n3,When?\n4,Where?\r\n5,How?"),
        ("q.tsv", "id\tquery\r1\tWho?\r2\tWhy?\r\n3\tWhen?\n4\tWhere?\r\n5\tHow?"),
    ],
)
def test_line_ends_of_several_kinds_in_one_file(name: str, text: str, tmp_path: Path) -> None:
    found = [query for _, query in queries(write(tmp_path / name, text))]
    assert found == ["Who?", "Why?", "When?", "Where?", "How?"]


@pytest.mark.parametrize("name", ["q.json", "q.jsonl", "q.txt", "q"])
def test_json_over_several_lines_is_refused_with_the_command_that_converts_it(
    name: str, tmp_path: Path
) -> None:
    records = [{"query": "Who?", "text": "T"}, {"query": "Why?", "text": "T"}]
    for text, how in (
        (
            "\n".join(json.dumps(record, indent=1) for record in records),
            r"JSON of several lines; .*jq -c '\.' ",
        ),
        (json.dumps(records, indent=1), r"one JSON array; .*jq -c '\.\[\]' "),
        (json.dumps(records), r"one JSON array; .*jq -c '\.\[\]' "),
    ):
        path = write(tmp_path / name, text)
        for read in (queries, articles):
            with pytest.raises(InputError, match=how):
                read(path)


def test_a_list_in_the_place_of_a_question_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "q.jsonl", '{"query": ["Who?", "What?"]}\n')
    with pytest.raises(InputError, match="the question is list, expected a string"):
        queries(path)


def test_text_in_another_encoding_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "q.csv", "id;query\n1;Wer schrieb über Köln?\n".encode("latin-1"))
    with pytest.raises(InputError, match=r"invalid UTF-8 \(.*\): save it as UTF-8"):
        queries(path)


def test_the_flag_decides(tmp_path: Path) -> None:
    path = write(tmp_path / "q.csv", "nr;frage\n1;Wer war Goethe?\n2;Wer war Schiller?\n")
    assert [text for _, text in queries(path, column="frage")] == ["Wer war Goethe?", "Wer war Schiller?"]
    assert len(queries(path, column="2")) == 3
    path = write(tmp_path / "q.tsv", "the first text\tthe second text\nanother one here\tand one more\n")
    assert [text for _, text in queries(path, column="2")] == ["the second text", "and one more"]
    path = write(tmp_path / "q.jsonl", '{"title": "What is it?", "text": "A passage."}\n')
    assert queries(path, column="title") == [("", "What is it?")]
    path = write(tmp_path / "flat.csv", "id,question.text\n1,Who?\n")
    assert queries(path, column="question.text") == [("1", "Who?")]


def test_the_question_beside_a_passage_in_json_lines(tmp_path: Path, caplog) -> None:
    path = write(tmp_path / "q.jsonl", '{"text": "A long passage.", "input": "Who was it?"}\n')
    assert queries(path) == [("", "Who was it?")]
    assert said(caplog) == ["q.jsonl: JSON lines, question = input"]
    assert gold(path) == [("", "Who was it?", ())]


def test_queries_without_a_word(tmp_path: Path) -> None:
    path = write(tmp_path / "q.txt", "Who?\n\u200b\n???\n 🙂\nC++\n" + "Why?\n" * 40)
    assert queries(path, bad=0.05)[:4] == [("", "Who?"), ("", "🙂"), ("", "C++"), ("", "Why?")]
    assert len(gold(write(tmp_path / "g.csv", "question\nWho?\n\u200b\n???\n"))) == 1
    with pytest.raises(InputError, match="2 of 45 lines are malformed .*holds no letter, digit or symbol"):
        queries(path)


@pytest.mark.parametrize("name", ["q.txt", "q.tsv", "q.csv", "q.jsonl"])
def test_files_that_were_joined_have_marks_in_the_middle(name: str, tmp_path: Path, caplog) -> None:
    part = {
        "q.txt": "Who is {0}?\n",
        "q.tsv": "id\tquery\n{0}\tWho is {0}?\n",
        "q.csv": 'id,query\n"{0}","Who is {0}?"\n',
        "q.jsonl": '{{"id": {0}, "query": "Who is {0}?"}}\n',
    }[name]
    path = write(tmp_path / name, "".join("\ufeff" + part.format(n) for n in range(3)))
    assert [text for _, text in queries(path)] == ["Who is 0?", "Who is 1?", "Who is 2?"]
    repeats = [line for line in said(caplog) if "repeats the header" in line]
    assert len(repeats) == (2 if name in {"q.tsv", "q.csv"} else 0)


@pytest.mark.parametrize(
    ("given", "written"),
    [
        (12.0, "12"),
        (1.5, "1.5"),
        (decimal.Decimal("12"), "12"),
        (2**63 - 1, "9223372036854775807"),
        ("007", "007"),
        (b"ab", "ab"),
    ],
)
def test_ids_of_any_type(given: Any, written: str, tmp_path: Path) -> None:
    pq.write_table(pa.table({"id": [given], "text": ["Some text."]}), tmp_path / "c.parquet")
    assert articles(tmp_path / "c.parquet") == [(written, "", "Some text.")]
    if not isinstance(given, decimal.Decimal | bytes):
        line = json.dumps({"id": given, "query": "Who?"})
        assert queries(write(tmp_path / "q.jsonl", line)) == [(written, "Who?")]


def test_ids_longer_than_64_bits_keep_their_digits(tmp_path: Path) -> None:
    path = write(tmp_path / "c.jsonl", '{"id": 123456789012345678901234567890, "text": "Text."}\n')
    assert articles(path) == [("123456789012345678901234567890", "", "Text.")]
    path = write(tmp_path / "q.jsonl", '{"id": "a", "query": -9223372036854775809}\n')
    assert queries(path) == [("a", "-9223372036854775809")], "more than 64 bits"


# Corpora


def test_ms_marcos_collection(tmp_path: Path, caplog) -> None:
    rows = [
        ("0", '"The presence of communication amid scientific minds was equally important.'),
        ("1", 'He said "stop" and left. The end of it was not near.'),
        ("2", '"Quoted whole."'),
        ("3", "Plain text, with commas; and more."),
    ]
    for name in ("collection.tsv", "collection.txt", "collection"):
        path = write(tmp_path / name, "".join(f"{pid}\t{text}\n" for pid, text in rows))
        assert articles(path) == [(pid, "", text) for pid, text in rows]
    assert said(caplog)[0] == "collection.tsv: tab-separated, no header, id = column 1, text = column 2"


def test_dprs_passages(tmp_path: Path) -> None:
    path = write(
        tmp_path / "psgs_w100.tsv", 'id\ttext\ttitle\n1\t"Aaron, the prophet\tAaron\n2\tHe "spoke"\tAaron\n'
    )
    assert articles(path) == [("1", "Aaron", '"Aaron, the prophet'), ("2", "Aaron", 'He "spoke"')]


def test_a_column_in_quotes_throughout_is_quoted(tmp_path: Path) -> None:
    """As DPR's whole file is; elsewhere quotes in TSV are text."""
    head = 'id\ttext\ttitle\n1\t"Aaron ( or ""Ahärôn"") is"\t"The ""Who"""\n'
    path = write(tmp_path / "c.tsv", head + '2\t"God at Sinai"\tAaron\n3\t"He"\tAaron\n')
    assert articles(path) == [
        ("1", 'The "Who"', 'Aaron ( or "Ahärôn") is'),
        ("2", "Aaron", "God at Sinai"),
        ("3", "Aaron", "He"),
    ]
    write(path, head + '2\t"God at Sinai" or so\tAaron\n3\t"He"\tAaron\n')
    assert [text for _, _, text in articles(path)][1:] == ['"God at Sinai" or so', '"He"']


def test_a_passages_own_id_comes_before_its_documents(tmp_path: Path) -> None:
    line = '{"pid": "msmarco_passage_00_0", "passage": "Text.", "docid": "msmarco_doc_00_0"}\n'
    assert articles(write(tmp_path / "c.jsonl", line)) == [("msmarco_passage_00_0", "", "Text.")]


def test_an_article_may_begin_with_the_name_of_a_column(tmp_path: Path) -> None:
    path = write(tmp_path / "Notes.txt", "Passage, text and context\nSome words here.\n")
    assert articles(path) == [("line 1", "Notes", "Passage, text and context\nSome words here.")]


def test_documents_with_addresses_and_titles_without_a_header(tmp_path: Path, caplog) -> None:
    rows = [
        (f"D{n}", f"https://a.org/{n}", f"Title of {n}", f"Long text of number {n}. " * 9) for n in range(3)
    ]
    path = write(tmp_path / "msmarco-docs.tsv", "".join("\t".join(row) + "\n" for row in rows))
    assert articles(path) == [(row[0], row[2], row[3].strip()) for row in rows]
    assert said(caplog) == [
        "msmarco-docs.tsv: tab-separated, no header, id = column 1, title = column 3, text = column 4"
    ]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("id;title;text\n1;T;A, b\n", [("1", "T", "A, b")]),
        ('id, title, text\n1, T, "A, b"\n', [("1", "T", "A, b")]),
        ("id,text,note,note\n1,A,x,y\n", [("1", "", "A")]),
        ("id,text,contents\n1,,Full\n2,Text,\n", [("1", "", "Full"), ("2", "", "Text")]),
        ("id,title,text\n1,1984,A\n", [("1", "1984", "A")]),
        ("id,text\n1,A,\n", [("1", "", "A")]),
    ],
)
def test_csv_corpora(text: str, found: list[tuple[str, str, str]], tmp_path: Path) -> None:
    assert articles(write(tmp_path / "c.csv", text)) == found


def test_only_a_column_that_is_used_may_spoil_a_row(tmp_path: Path) -> None:
    line = '{"id": 1, "title": 1984, "text": "", "contents": "Full.", "score": NaN}\n'
    assert articles(write(tmp_path / "c.jsonl", line)) == [("1", "1984", "Full.")]
    table = pa.table(
        {
            "id": [1.0, 2.0],
            "title": [1984, None],
            "text": [None, "Text."],
            "contents": ["Full.", "More."],
            "price": [decimal.Decimal("1.5"), None],
            "score": [float("nan"), 0.5],
        }
    )
    pq.write_table(table, tmp_path / "c.parquet")
    assert articles(tmp_path / "c.parquet") == [("1", "1984", "Full."), ("2", "", "Text.")]
    raw = b"id,text,note\n1,A,\xff\xfe\n"
    assert articles(write(tmp_path / "c.csv", raw)) == [("1", "", "A")]
    with pytest.raises(ValueError, match="invalid UTF-8"):
        articles(write(tmp_path / "d.csv", b"id,text\n1,\xff\xfe\n"))


def test_bytes_that_are_no_text_cost_their_row_alone(tmp_path: Path) -> None:
    for name in ("id", "text"):
        table = pa.table({"id": [b"1", b"2"], "text": [b"One.", b"Two."]})
        place = table.column_names.index(name)
        table = table.set_column(place, name, pa.array([b"\xff", b"2"]))
        pq.write_table(table, tmp_path / "c.parquet")
        first, second = tables.rows(tmp_path / "c.parquet", tables.CORPUS)
        with pytest.raises(ValueError, match="invalid UTF-8"):
            parse(first)
        assert parse(second)[name] == "2"


def test_doubled_names(tmp_path: Path) -> None:
    for name, made in {
        "c.csv": "id,text,text\n1,A,B\n",
        "c.parquet": pa.Table.from_arrays(
            [pa.array(["1"]), pa.array(["A"]), pa.array(["B"])], ["id", "text", "text"]
        ),
        "i.parquet": pa.Table.from_arrays(
            [pa.array(["1"]), pa.array(["2"]), pa.array(["B"])], ["id", "id", "text"]
        ),
    }.items():
        path = tmp_path / name
        pq.write_table(made, path) if isinstance(made, pa.Table) else path.write_text(made)
        with pytest.raises(InputError, match="2 columns are called .*; the columns are id, .*; rename"):
            articles(path)
    unused = pa.Table.from_arrays([pa.array(["A"]), pa.array([1]), pa.array([2])], ["text", "n", "n"])
    pq.write_table(unused, tmp_path / "u.parquet")
    assert articles(tmp_path / "u.parquet") == [("line 1", "", "A")]


def test_the_column_of_a_corpus_by_its_flag(tmp_path: Path) -> None:
    path = write(tmp_path / "c.csv", "nr,inhalt\n1,Ein Text\n2,Noch ein Text dazu\n")
    with pytest.raises(
        InputError, match=r"first line \(nr, inhalt\) may be a header or a row; give --text_column"
    ):
        articles(path)
    assert [text for _, _, text in articles(path, column="inhalt")] == ["Ein Text", "Noch ein Text dazu"]
    path = write(tmp_path / "c.jsonl", '{"id": 1, "article": {"de": "Ein Text"}}\n')
    with pytest.raises(InputError, match="the columns are id, article: name one with --text_column"):
        articles(path)
    assert articles(path, column="article.de") == [("1", "", "Ein Text")]


def test_several_corpora(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    one = write(tmp_path / "a" / "c.jsonl", '{"text": "A"}\n')
    other = write(tmp_path / "b.csv", "text\nB\n")
    assert [text for _, _, text in articles(tmp_path / "a", other, one)] == ["A", "B"], "each file once"


# Kinds of files


def batches(kind: str) -> bytes:
    table = pa.table({"id": [1], "title": ["T"], "text": ["Some text."], "query": ["Who?"]})
    sink = io.BytesIO()
    if kind == "parquet":
        pq.write_table(table, sink)
    elif kind == "feather":
        pyarrow.feather.write_feather(table, sink, compression="zstd")
    elif kind == "arrow stream":
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
    return sink.getvalue()


@pytest.mark.parametrize("kind", ["parquet", "feather", "arrow stream"])
@pytest.mark.parametrize("name", ["part-00000", "data.bin", "data.arrow"])
def test_columnar_files_are_read_with_any_suffix(kind: str, name: str, tmp_path: Path) -> None:
    path = write(tmp_path / name, batches(kind))
    assert articles(path) == [("1", "T", "Some text.")]
    assert queries(path, column="query") == [("1", "Who?")]
    write(path, batches(kind)[:-200])
    with pytest.raises(InputError, match="is not a whole (Parquet|Arrow) file"):
        articles(path)


def test_a_folder_that_datasets_saved(tmp_path: Path) -> None:
    import datasets

    rows = [{"id": str(n), "title": "T", "text": f"Text {n}."} for n in range(5)]
    saved = datasets.Dataset.from_list(rows)
    saved.save_to_disk(str(tmp_path / "one"), num_shards=2)
    datasets.DatasetDict({"train": saved.select([0]), "test": saved.select([1])}).save_to_disk(
        str(tmp_path / "d")
    )
    expected = [(row["id"], "T", row["text"]) for row in rows]
    assert articles(tmp_path / "one") == expected
    assert sorted(articles(tmp_path / "d")) == expected[:2]
    assert files.passed_over(tmp_path / "one", "--corpus_path") == {
        "dataset_info.json": "is about the data",
        "state.json": "is about the data",
    }


TOPICS = """<top>
<num> Number: 301
<title> International Organized Crime

<desc> Description:
Identify organizations that participate in international criminal activity.

<narr> Narrative:
A relevant document must name the organization &amp; its acts.
</top>

<top>
<num> Number: 302
<title> Poliomyelitis and Post-Polio
<desc> Description:
Is the disease of Poliomyelitis (polio) under control?
</top>
"""
XML = """<?xml version="1.0" encoding="UTF-8"?>
<topics>
  <topic number="1">
    <query>coronavirus origin</query>
    <question>what is the origin of COVID-19</question>
  </topic>
</topics>
"""


def test_trec_topics(tmp_path: Path, caplog) -> None:
    path = write(tmp_path / "topics.301-302", TOPICS)
    expected = [("301", "International Organized Crime"), ("302", "Poliomyelitis and Post-Polio")]
    assert queries(path) == expected
    assert said(caplog) == ["topics.301-302: TREC topics, id = num, question = title"]
    assert [one[:2] for one in gold(path)] == expected
    assert queries(path, column="desc")[1] == (
        "302",
        "Is the disease of Poliomyelitis (polio) under control?",
    )
    for text in (
        XML.replace("topics>", "webtrack2009>"),
        XML.replace("<topics>", "<!-- of 2020 -->\n<topics>"),
        "\ufeff" + XML,
    ):
        assert queries(write(tmp_path / "web.xml", text)) == [("1", "coronavirus origin")]
    path = write(tmp_path / "topics.xml", XML)
    assert queries(path) == [("1", "coronavirus origin")]
    assert queries(path, column="question") == [("1", "what is the origin of COVID-19")]
    with pytest.raises(InputError, match="TREC topics, which are questions"):
        articles(path)


def office() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("[Content_Types].xml", "<Types/>")
        archive.writestr("xl/workbook.xml", "<workbook/>")
    return file.getvalue()


LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22e\nsize 12345\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"<!DOCTYPE html>\n<html><body>Sign in</body></html>", r"is a web page \(HTML\), such as a login"),
        (b"\n <!-- x --><HTML lang=en>", "is a web page"),
        (b"\xef\xbb\xbf<!DOCTYPE html><html>", "is a web page"),
        (b"<Error><Code>AccessDenied</Code></Error>", "is XML"),
        (b"# xet version 0\nfilesize = 12\n", "is a Xet pointer"),
        (LFS.encode(), "is a Git LFS pointer, not the file itself; run `git lfs pull`"),
        (b"\0" * 5000, "NUL bytes alone: a download or copy that did not finish"),
        ("query\nWhat?\n".encode("utf-32"), "is UTF-32; convert it: `iconv -f UTF-32 -t UTF-8"),
        ("query\nWhat?\n".encode("utf-32-be"), "`iconv -f UTF-32BE -t UTF-8"),
        (office(), "is an Excel workbook, or another Office document; save its sheet as CSV"),
        (b"%PDF-1.7\n%abc", "is a PDF"),
        (b"SQLite format 3\0" + b"x" * 99, "is a SQLite database"),
        (b"<?xml version='1.0'?><mediawiki>", "is XML"),
        (b"<DOC>\n<DOCNO> 1 </DOCNO>\n", "is XML"),
        (b"Rar!\x1a\x07\x01", "is a RAR archive"),
        (b"FEA1" + b"x" * 99, "is a Feather file of version 1"),
        (b"\x89PNG\r\n\x1a\n" + bytes(range(256)), "is an image, sound or film; give files with text"),
        (b"\0\0\0\x20ftypisom" + bytes(99), "is an image, sound or film"),
        ((bytes(range(128, 256)) + bytes(range(128))) * 3, "is not text in UTF-8"),
    ],
)
@pytest.mark.parametrize("name", ["q.jsonl", "q.parquet", "q.txt", "q.tsv", "q"])
def test_other_file_types_are_refused_by_their_first_bytes(
    name: str, content: bytes, message: str, tmp_path: Path
) -> None:
    path = write(tmp_path / name, content)
    for read in (queries, gold, articles):
        with pytest.raises(InputError, match=message):
            read(path)
    write(path, gzip.compress(content))
    with pytest.raises(InputError, match=message):
        queries(path)


@pytest.mark.parametrize(
    "text", [b"ID3 is an algorithm?\n", b"GIF89a or PNG?\n", b"OggS?\n", b"Who?\x01\x02 \x0b", b"....ftyp?\n"]
)
def test_texts_that_begin_like_other_files_are_read(text: bytes, tmp_path: Path) -> None:
    assert [one for _, one in queries(write(tmp_path / "q.txt", text))] == [text.decode().strip()]


@pytest.mark.parametrize("name", ["q.txt", "q.csv", "q.tsv", "q.jsonl"])
def test_a_file_whose_end_is_nul_bytes(name: str, tmp_path: Path) -> None:
    rows = {
        "q.txt": "Who?\n",
        "q.csv": "id,query\n1,Who?\n",
        "q.tsv": "1\tWho is it?\n",
        "q.jsonl": '{"query": "Who?"}\n',
    }
    path = write(tmp_path / name, rows[name].encode() + b"\0" * 70_000)
    with pytest.raises(InputError, match=r"NUL bytes alone from line \d on"):
        queries(path)


def test_a_page_that_a_server_gives_in_the_place_of_a_file(server: Server) -> None:
    server.files["c.jsonl"] = b"<div>Please sign in</div>\n"
    source = files.locate(server.url("c.jsonl"), "--corpus_path")
    page = type(source)(
        **{**{f: getattr(source, f) for f in ("url", "label", "size", "state")}, "content_type": "text/html"}
    )
    with pytest.raises(InputError, match=r"the server gives a web page \(text/html\), such as a login page"):
        list(tables.rows(page, tables.CORPUS))


@pytest.mark.parametrize("name", ["-", "/dev/stdin", "/dev/fd/63"])
def test_streams_that_can_be_read_only_once(name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="can be read only once, .*write it to a file"):
        files.locate(name, "--queries_file")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="can be read only once"):
        files.locate(str(tmp_path / "pipe"), "--queries_file")


def long_window(text: bytes) -> bytes:
    zstd = pytest.importorskip("backports.zstd")
    options = {
        zstd.CompressionParameter.window_log: 28,
        zstd.CompressionParameter.enable_long_distance_matching: 1,
    }
    writer = zstd.ZstdCompressor(options=options)
    return writer.compress(text) + writer.flush()


def parallel(text: bytes) -> bytes:
    """As pzstd writes: frames, each behind one that says how long it is."""
    half = len(text) // 2
    frames = [pa.compress(part, "zstd", asbytes=True) for part in (text[:half], text[half:])]
    return b"".join(struct.pack("<III", 0x184D2A50, 4, len(frame)) + frame for frame in frames)


@pytest.mark.parametrize(
    "squeeze",
    [
        long_window,
        parallel,
        lambda text: gzip.compress(text) + b"\0" * 512,
        lambda text: gzip.compress(text[:50]) + gzip.compress(text[50:]),
        lambda text: bz2.compress(text[:50]) + bz2.compress(text[50:]),
    ],
)
def test_sound_compressed_files_of_any_writer(squeeze, tmp_path: Path) -> None:
    text = "".join(f'{{"id": {n}, "text": "Number {n}."}}\n' for n in range(3000)).encode()
    path = write(tmp_path / "c.jsonl.z", squeeze(text))
    assert articles(path) == [(str(n), "", f"Number {n}.") for n in range(3000)]
    write(path, squeeze(text)[:-600])
    with pytest.raises(InputError, match="cut short or damaged after line"):
        articles(path)


def test_double_and_unknown_compression_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "q.txt.gz", gzip.compress(gzip.compress(b"Who?\n")))
    with pytest.raises(InputError, match="is gzip within gzip; unpack it once and give that"):
        queries(path)
    path = write(tmp_path / "q.txt.lzma", lzma.compress(b"Who?\n", format=lzma.FORMAT_ALONE))
    with pytest.raises(InputError, match=r"is an lzma file; unpack it \(`unlzma -k"):
        queries(path)
    path = write(tmp_path / "q.json.gz", gzip.compress(b'[{"query": "Who?"}]'))
    with pytest.raises(InputError, match=r"Unpack it and convert it with `jq -c '\.\[\]' \S*/q\.json > "):
        queries(path)


def test_guesses_are_named_in_summary_manifest_and_report(
    prepare, corpus: Path, tmp_path: Path, capsys
) -> None:
    queries = write(tmp_path / "q.txt", "qid,query\n1,What is photosynthesis?\n2,What causes tides?\n")
    records = [json.loads(line) for line in corpus.read_text().splitlines()]
    text = [
        (record["_id"], " ".join(record["text"]).replace("\n", " ").replace("\t", " ")) for record in records
    ]
    collection = write(tmp_path / "c.tsv", "".join(f"{own}\t{words}\n" for own, words in text))
    test = write(tmp_path / "nq-test.tsv", "What causes tides?\t['the Moon']\n")
    flags = ("--corpus_path", str(collection), "--queries_file", str(queries), "--decontaminate", str(test))
    assert prepare(*flags, "--top_k_retrieval", "2") == 0
    assert [record["query"] for record in json.loads(prepare.output.read_text())] == [
        "What is photosynthesis?"
    ]
    guessed = json.loads((prepare.work / "manifest.json").read_text())["guessed"]
    assert guessed == {
        "--corpus_path": {str(collection): "tab-separated, no header, id = column 1, text = column 2"},
        "--queries_file": {str(queries): "comma-separated, header, id = qid, question = query"},
        "--decontaminate": {str(test): "tab-separated, no header, question = column 1, answers = column 2"},
    }
    assert (
        f"read by its content, --decontaminate: {test}: tab-separated, no header" in capsys.readouterr().out
    )
    assert "question = column 1, answers = column 2" in (prepare.work / "report.html").read_text()


def cells(rows: Iterable[Iterable[str]]) -> list[list[str]]:
    return [[" ".join(cell.split()) for cell in row] for row in rows]
