import gzip
import io
import json
import lzma
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from scaledown.config.prepare import PrepareConfig
from scaledown.data.input import delimited
from scaledown.data.input.queries import collect_queries, ms_marco, query_files
from scaledown.data.teacher.questions import as_question
from scaledown.errors import InputError, ModelError
from scaledown.run.directory import RunDirectory
from scaledown.run.stage import Stage


def collected(tmp_path: Path, **settings) -> list[tuple[str, str]]:
    config = PrepareConfig(output_file="o.json", **settings)
    stage = Stage(RunDirectory(tmp_path / "work"), "queries", {k: str(v) for k, v in settings.items()})
    query_files(config)
    collect_queries(stage, config, None)
    return [tuple(row.values()) for table in stage.tables() for row in table.to_pylist()]


def write(path: Path, content: str | bytes) -> str:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def test_text_one_query_a_line(tmp_path: Path) -> None:
    file = write(tmp_path / "q.txt", "\ufeffWhat is  a\ttab?\r\n\n  Who?  \n")
    assert collected(tmp_path, queries_file=(file,)) == [("q1", "What is a tab?"), ("q2", "Who?")]


@pytest.mark.parametrize("name", ["q.tsv", "queries_chunk_aa"])
def test_tsv_with_or_without_its_ending(name: str, tmp_path: Path) -> None:
    file = write(tmp_path / name, "10\twhat is it\n11\twho was it\n")
    assert collected(tmp_path, queries_file=(file,)) == [("10", "what is it"), ("11", "who was it")]


RECORDS = [{"id": "a", "question": {"text": "What is it?"}}, {"id": "b", "question": {"text": "Who was it?"}}]


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "parquet"])
@pytest.mark.parametrize("column", ["question.text", ""])
def test_records_by_column(kind: str, column: str, tmp_path: Path) -> None:
    path = tmp_path / f"q.{kind}"
    lines = "".join(json.dumps(record) + "\n" for record in RECORDS).encode()
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(RECORDS), path)
    else:
        path.write_bytes(gzip.compress(lines) if kind.endswith("gz") else lines)
    found = collected(tmp_path, queries_file=(str(path),), query_column=column)
    assert found == [("a", "What is it?"), ("b", "Who was it?")]


def test_csv_by_column(tmp_path: Path) -> None:
    file = write(tmp_path / "q.csv", 'id,asked\n1,"What, then?"\n')
    assert collected(tmp_path, queries_file=(file,), query_column="asked") == [("1", "What, then?")]


def test_several_files_in_the_order_given(tmp_path: Path) -> None:
    files = (write(tmp_path / "b.txt", "second first\n"), write(tmp_path / "a.tsv", "7\tthen this\n"))
    assert collected(tmp_path, queries_file=files) == [("q1", "second first"), ("7", "then this")]


def test_repeated_ids_get_a_number(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    one = write(tmp_path / "a.tsv", "7\tWho is it?\nq4\tWho was it?\n")
    other = write(tmp_path / "b.jsonl", '{"id": 7, "query": "What is it?"}\n{"query": "What was it?"}\n')
    found = collected(tmp_path, queries_file=(one, other))
    assert [query_id for query_id, _ in found] == ["7", "q4", "7#2", "q4#2"]
    assert "2 queries have the id of another: told apart by #2" in caplog.text


def test_shards_follow_the_flag(tmp_path: Path) -> None:
    file = write(tmp_path / "q.txt", "".join(f"query {n}\n" for n in range(10)))
    config = PrepareConfig(output_file="o.json", queries_file=(file,), queries_per_shard=4)
    stage = Stage(RunDirectory(tmp_path / "work"), "queries", {})
    collect_queries(stage, config, None)
    assert stage.finished().rows == [4, 4, 2]


@pytest.mark.parametrize("content", ["", "\n \n\n"])
def test_no_queries_is_an_error(content: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no queries"):
        collected(tmp_path, queries_file=(write(tmp_path / "q.txt", content),))


def test_bad_lines_are_set_aside(tmp_path: Path) -> None:
    content = b"".join(b"query %d\n" % n for n in range(50)) + b"\xff\xfe\n"
    found = collected(tmp_path, queries_file=(write(tmp_path / "q.txt", content),))
    assert len(found) == 50
    (file,) = (tmp_path / "work" / "quarantine").iterdir()
    row = json.loads(file.read_text())
    assert row["line"] == 51
    assert "invalid UTF-8" in row["reason"]


def test_a_text_that_begins_like_a_bzip2_file_is_a_text(tmp_path: Path) -> None:
    file = write(tmp_path / "q.txt", "BZhang: who is it?\n")
    assert collected(tmp_path, queries_file=(file,)) == [("q1", "BZhang: who is it?")]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("name", ["q.txt", "q.csv", "q.jsonl.gz"])
def test_utf_16_is_refused_with_the_command_that_converts_it(
    encoding: str, name: str, tmp_path: Path
) -> None:
    content = "query\nWhat is naïve?\n".encode(encoding)
    path = tmp_path / "my data" / name
    path.parent.mkdir()
    file = write(path, gzip.compress(content) if name.endswith("gz") else content)
    with pytest.raises(InputError, match=rf"`iconv -f UTF-16\w* -t UTF-8 '{file}' >"):
        collected(tmp_path, queries_file=(file,))


def packed(kind: str) -> bytes:
    file = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("q.txt", "What?\n")
    elif kind == "xz":
        file.write(lzma.compress(b"What?\n"))
    else:
        with tarfile.open(fileobj=file, mode="w:gz" if kind == "tar.gz" else "w") as tar:
            tar.addfile(tarfile.TarInfo("q.txt"))
    return file.getvalue()


@pytest.mark.parametrize(
    ("kind", "command"), [("zip", "unzip"), ("xz", "xz -dk"), ("tar", "tar -xf"), ("tar.gz", "tar -xf")]
)
def test_archives_say_how_to_unpack_them(kind: str, command: str, tmp_path: Path) -> None:
    file = write(tmp_path / "q.jsonl", packed(kind))
    with pytest.raises(InputError, match=f"`{command} {file}`"):
        collected(tmp_path, queries_file=(file,))


@pytest.mark.parametrize("ending", ["\n", "\r\n", "\r"])
def test_an_unclosed_quote_costs_its_own_line_only(ending: str, tmp_path: Path) -> None:
    good = [f'{n},"What is ""{n}"",{ending}in two lines?"' for n in range(40)]
    bad = ['x,"Who opened', 'y,"Who opened again']
    lines = ["id,query", *good[:20], bad[0], *good[20:30], bad[1], *good[30:35], "", *good[35:]]
    file = write(tmp_path / "q.csv", ending.join(lines) + ending)
    found = collected(tmp_path, queries_file=(file,))
    assert found == [(str(n), f'What is "{n}", in two lines?') for n in range(40)]
    (quarantined,) = (tmp_path / "work" / "quarantine").iterdir()
    rows = [json.loads(line) for line in quarantined.read_text().splitlines()]
    assert [(row["line"], row["content"]) for row in rows] == [(42, bad[0]), (63, bad[1])]
    assert all("quote is not closed" in row["reason"] for row in rows)


def test_a_quote_that_is_never_closed_is_looked_for_no_further_than_a_record_is_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delimited, "_MOST_CHARACTERS", 250)
    lines = ["id,query", 'x,"Who', *(f"{n},What is {n}?" for n in range(3000))]
    file = write(tmp_path / "q.csv", "\n".join(lines))
    assert len(collected(tmp_path, queries_file=(file,))) == 3000


@pytest.mark.parametrize("content", ["ID,Query\n7,What?\n", '{"ID": 7, "Query": "What?"}\n'])
@pytest.mark.parametrize("column", ["", "Query", "query"])
def test_names_match_in_any_case(content: str, column: str, tmp_path: Path) -> None:
    file = write(tmp_path / ("q.jsonl" if content.startswith("{") else "q.csv"), content)
    assert collected(tmp_path, queries_file=(file,), query_column=column) == [("7", "What?")]


def test_names_that_differ_only_in_case_are_kept_apart(tmp_path: Path) -> None:
    file = write(tmp_path / "q.csv", "QUERY,query\nUpper?,Lower?\n")
    assert collected(tmp_path, queries_file=(file,)) == [("q1", "Lower?")]
    found = collected(tmp_path, queries_file=(file,), query_column="QUERY")
    assert found == [("q1", "Upper?")]


def test_a_wrong_column_names_the_columns_there_are(tmp_path: Path) -> None:
    file = write(tmp_path / "q.jsonl", '{"asked": "What?"}\n')
    with pytest.raises(InputError, match=r"no question under 'title'; the columns are asked"):
        collected(tmp_path, queries_file=(file,), query_column="title")


# Datasets: local data with the columns that the hub's have

ROWS = {
    "natural_questions": [{"id": "1", "question": {"text": "who is it", "tokens": ["who"]}, "document": {}}],
    "trivia_qa": [{"question": "Who is it?", "question_id": "tc_1", "answer": {"value": "He"}}],
    "squad": [
        {"id": "5", "title": "T", "context": "C", "question": "Who is it?", "answers": {"text": ["He"]}}
    ],
    "nq_open": [{"question": "who is it", "answer": ["He"]}],
    "pisco": [{"docs": ["d"], "query": "who is it", "mistral_label": "He"}],
    "pisco, as its card spells it": [{"docs": ["d"], "queries": "who is it", "mistral_labels": "He"}],
}


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("layout", ["parquet folder", "saved to disk", "file"])
def test_qa_datasets(name: str, layout: str, tmp_path: Path) -> None:
    import datasets

    path = tmp_path / "data"
    path.mkdir()
    if layout == "saved to disk":
        data = datasets.Dataset.from_list([{k: v for k, v in row.items() if v != {}} for row in ROWS[name]])
        datasets.DatasetDict({"train": data}).save_to_disk(str(path))
    else:
        path = path / "train.parquet"
        pq.write_table(pa.Table.from_pylist([{**row, "document": "d"} for row in ROWS[name]]), path)
    place = path.parent if layout == "parquet folder" else path
    ((_, query),) = collected(tmp_path, query_dataset=str(place))
    assert query.lower().startswith("who is it")


def test_hub_datasets_are_asked_for_by_their_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked = []

    def load(*arguments, **keywords):
        asked.append((*arguments, keywords["split"], keywords["revision"]))
        name = next(key for key, value in NAMES.items() if value == arguments[0])
        return datasets.Dataset.from_list(ROWS[name] if name != "natural_questions" else [RECORDS[0]])

    monkeypatch.setattr(datasets, "load_dataset", load)
    for number, name in enumerate(NAMES):
        found = collected(tmp_path / str(number), query_dataset=f"{name}@v1", query_split="validation")
        assert len(found) == 1
    assert asked == [
        ("google-research-datasets/natural_questions", "default", "validation", "v1"),
        ("mandarjoshi/trivia_qa", "unfiltered.nocontext", "validation", "v1"),
        ("rajpurkar/squad", None, "validation", "v1"),
        ("google-research-datasets/nq_open", None, "validation", "v1"),
        ("maxoul/pisco_finetuning_data", None, "validation", "v1"),
    ]


NAMES = {
    "natural_questions": "google-research-datasets/natural_questions",
    "trivia_qa": "mandarjoshi/trivia_qa",
    "squad": "rajpurkar/squad",
    "nq_open": "google-research-datasets/nq_open",
    "pisco": "maxoul/pisco_finetuning_data",
}


def test_a_missing_split_names_those_there_are(tmp_path: Path) -> None:
    import datasets

    data = datasets.Dataset.from_list(ROWS["nq_open"])
    datasets.DatasetDict({"dev": data, "test": data}).save_to_disk(str(tmp_path / "d"))
    with pytest.raises(InputError, match="--query_split is one of dev, test"):
        collected(tmp_path, query_dataset=str(tmp_path / "d"))


def test_malformed_rows_of_a_dataset_are_no_fault_of_the_hub(tmp_path: Path) -> None:
    import datasets

    datasets.Dataset.from_list([{"other": 1}]).save_to_disk(str(tmp_path / "d"))
    with pytest.raises(InputError, match="no question under .*; the columns are other"):
        collected(tmp_path, query_dataset=str(tmp_path / "d"))


def test_a_dataset_out_of_reach_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"dataset squad .*give a local copy, a folder as --query_dataset"):
        collected(tmp_path, query_dataset="squad")


@pytest.mark.parametrize("name", ["squad", "org/unknown"])
def test_without_a_network_no_dataset_is_tried_again_and_again(
    name: str, tmp_path: Path, monkeypatch
) -> None:
    import datasets
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("was tried"))
    with pytest.raises(ModelError, match=f"dataset {name} .*the hub cannot be reached"):
        collected(tmp_path, query_dataset=name)


# MS MARCO


@pytest.fixture
def server() -> Iterator[tuple[str, dict[str, tuple[int, bytes]]]]:
    """A loopback server and the pages it serves."""
    pages: dict[str, tuple[int, bytes]] = {}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, body = pages.get(self.path, (404, b"gone"))
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{httpd.server_port}", pages
    httpd.shutdown()
    httpd.server_close()


WHOLE = b"".join(b"%d\twhat is number %d\n" % (n, n) for n in range(6980))


def test_ms_marco_is_downloaded_once_and_checked(server, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("SCALEDOWN_CACHE", str(tmp_path / "cache"))
    base, pages = server
    pages["/q.tsv"] = (200, WHOLE)
    config = PrepareConfig(output_file="o.json", download_ms_marco=True, ms_marco_url=base + "/q.tsv")
    (path,) = query_files(config)
    assert path.read_bytes() == WHOLE
    pages.clear()
    assert ms_marco(base + "/q.tsv") == path
    found = collected(tmp_path, download_ms_marco=True, ms_marco_url=base + "/q.tsv")
    assert len(found) == 6980
    assert found[1] == ("1", "what is number 1")


@pytest.mark.parametrize(
    ("status", "body", "reason"),
    [
        (404, b"gone", "HTTP 404"),
        (200, WHOLE[: len(WHOLE) // 2], "lines instead of 6,980"),
        (200, b"<html>moved</html>\n" * 6980, "is a web page"),
        (200, b"1 moved\n" * 6980, "not qid<TAB>query"),
    ],
)
def test_failed_download_names_the_file_to_fetch_by_hand(
    status, body, reason, server, tmp_path, monkeypatch
) -> None:
    monkeypatch.setenv("SCALEDOWN_CACHE", str(tmp_path / "cache"))
    base, pages = server
    pages["/q.tsv"] = (status, body)
    with pytest.raises(InputError, match=rf"{reason}.*--queries_file queries\.dev\.small\.tsv"):
        ms_marco(base + "/q.tsv")
    assert not list((tmp_path / "cache").rglob("*.ts*"))


def test_no_network_for_ms_marco(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("SCALEDOWN_CACHE", str(tmp_path / "cache"))
    with pytest.raises(InputError, match=r"ConnectionError.*--ms_marco_url"):
        ms_marco("http://127.0.0.1:9/q.tsv")


# Synthetic


@pytest.mark.parametrize(
    ("text", "question"),
    [
        ("What is the capital of Iceland?", "What is the capital of Iceland?"),
        ('Question: "Who invented the violin?"\nIt was...', "Who invented the violin?"),
        ("1. In which year did Apollo 11 land? The answer is 1969.", "In which year did Apollo 11 land?"),
        ("**Question:** How do bees make honey?", "How do bees make honey?"),
        ("Here is one:\nWhy do tides rise twice a day?", "Why do tides rise twice a day?"),
        ("What causes tides?", "What causes tides?"),
        ("What is the answer to this question?", None),
        ("Who painted the ceiling of the Sistine Chapel?", None),  # not in the passage
        ("What is this passage about?", None),
        ("According to the text, who was first?", None),
        ("What is example topic 7?", None),
        ("The tower is tall.", None),
        ("Why?", None),
        ("Really big towers everywhere?", None),
        ("What " + "very " * 60 + "long?", None),
        ("", None),
    ],
)
def test_only_questions_that_stand_alone_pass(text: str, question: str | None) -> None:
    passage = (
        "Reykjavík is the capital of Iceland. The violin was invented in Italy; Apollo 11 did land in "
        "the year 1969. Bees make honey. The Moon causes tides, which rise twice a day. "
        "Towers everywhere are long."
    )
    assert as_question(text, passage) == question
