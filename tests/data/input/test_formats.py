"""docs/formats.md says which kinds of files are read where; each cell of its table is tried."""

import bz2
import gzip
import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest

from conftest import ROOT
from scaledown.config.prepare import PrepareConfig
from scaledown.data.input import files, tables
from scaledown.data.input.corpus import parse_article
from scaledown.data.input.gold import gold_questions, read_gold
from scaledown.data.input.queries import from_files
from scaledown.data.input.rows import parse
from scaledown.data.input.training_files import validate
from scaledown.errors import InputError

RECORD = {"id": "1", "query": "Who was it?", "answer": "Ada", "documents": ["It was Ada."]}
ARTICLE = {"id": "1", "title": "Ada", "text": "It was Ada."}
ANSWERS = {"id": "1", "question": "Who was it?", "answer": "Ada"}
TOPIC = "<top>\n<num> Number: 1\n<title> Who was it?\n</top>\n"


def line(record: dict[str, Any]) -> bytes:
    return (json.dumps(record) + "\n").encode()


def table(record: dict[str, Any], delimiter: str) -> bytes:
    flat = {name: value for name, value in record.items() if isinstance(value, str)}
    return f"{delimiter.join(flat)}\n{delimiter.join(flat.values())}\n".encode()


def parquet(record: dict[str, Any]) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist([record]), sink)
    return sink.getvalue()


def arrow(record: dict[str, Any]) -> bytes:
    sink = io.BytesIO()
    pyarrow.feather.write_feather(pa.Table.from_pylist([record]), sink)
    return sink.getvalue()


KINDS: dict[str, tuple[str, Callable[[dict[str, Any]], bytes]]] = {
    "JSON lines (`.jsonl`)": ("d.jsonl", line),
    "a JSON list (`.json`)": ("d.json", lambda record: json.dumps([record]).encode()),
    'one JSON object on several lines (`{"data": […]}`)': (
        "d.json",
        lambda record: json.dumps({"data": [record]}, indent=1).encode(),
    ),
    "CSV with a header; `,` `;` `\\|` or tabs": ("d.csv", lambda record: table(record, ";")),
    "TSV with a header": ("d.tsv", lambda record: table(record, "\t")),
    "TSV or CSV without a header": (
        "d.tsv",
        lambda record: "\t".join(v for v in record.values() if isinstance(v, str)).encode(),
    ),
    "Parquet": ("d.parquet", parquet),
    "Arrow, Feather 2": ("d.arrow", arrow),
    "plain text (`.txt`, `.md`)": ("d.txt", lambda record: b"Who was it?\n"),
    "TREC topics": ("topics.1-2", lambda _: TOPIC.encode()),
    "a folder of such files": ("d", line),
    "a folder of `save_to_disk`": ("saved", line),
    "gzip, zstd or bzip2 of text or JSON lines": ("d.jsonl.gz", lambda record: gzip.compress(line(record))),
    "a pipe (`-`, `/dev/stdin`)": ("-", line),
}


def corpus(path: str) -> None:
    found = [
        parse_article(parse(row), "id")
        for one in files.sources(files.locate(path, "--corpus_path"), "--corpus_path")
        for row in tables.rows(one, tables.CORPUS)
    ]
    assert found[0].blocks


def queries(path: str) -> None:
    intake = files.Intake("queries", 0.0)
    config = PrepareConfig(queries_file=(path,), output_file="o.json")
    found = [query.text for query in from_files(config, intake)]
    intake.close()
    assert found == ["Who was it?"]


def gold(path: str) -> None:
    assert read_gold([path], "--gold").answers("who was it?") == ("Ada",)


def evaluation(path: str) -> None:
    assert [one.query for one in gold_questions(path, "--decontaminate")] == ["Who was it?"]


def training(path: str) -> None:
    found = validate(Path(path))
    if found.problems:
        raise InputError(found.messages[0])


COLUMNS: dict[str, tuple[Callable[[str], None], dict[str, Any]]] = {
    "`--queries_file`": (queries, ANSWERS),
    "`--corpus_path`": (corpus, ARTICLE),
    "`--gold`": (gold, ANSWERS),
    "`--decontaminate`": (evaluation, ANSWERS),
    "`--train_data`": (training, RECORD),
}


def documented() -> dict[str, dict[str, str]]:
    text = (ROOT / "docs" / "formats.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\|(.*)\|$", text.partition("## Read\n")[2].partition("\n\n**")[0], re.MULTILINE)
    header, _, *body = [[cell.strip() for cell in re.split(r"(?<!\\)\|", row)] for row in rows]
    return {row[0]: dict(zip(header[1:], row[1:], strict=True)) for row in body}


def test_the_table_has_every_kind_and_every_flag() -> None:
    assert list(documented()) == list(KINDS)
    assert all(list(cells) == list(COLUMNS) for cells in documented().values())


@pytest.mark.parametrize("flag", COLUMNS)
@pytest.mark.parametrize("kind", KINDS)
def test_each_cell_of_the_table_is_so(kind: str, flag: str, tmp_path: Path) -> None:
    read, record = COLUMNS[flag]
    name, write = KINDS[kind]
    path = tmp_path / name
    if name == "saved":
        import datasets

        datasets.Dataset.from_list([record]).save_to_disk(str(path))
    elif name == "d":
        path.mkdir()
        (path / "part.jsonl").write_bytes(write(record))
    elif name != "-":
        path.write_bytes(write(record))
    try:
        read(str(path) if name != "-" else "-")
    except (InputError, ValueError):  # the latter of a row
        found = "no"
    else:
        found = "yes"
    assert found == documented()[kind][flag].partition(" ")[0]


@pytest.mark.parametrize("squeeze", [bz2.compress, gzip.compress])
def test_compression_is_found_by_content(squeeze: Callable[[bytes], bytes], tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_bytes(squeeze(line(ANSWERS)))
    queries(str(tmp_path / "d.jsonl"))
