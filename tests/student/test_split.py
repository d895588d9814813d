"""The command `scaledown split`: a held-out part of training files."""

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from scaledown.cli import main


def record(number: int) -> dict[str, Any]:
    title = f"Article {number // 3}"
    return {
        "query": f"Question {number}?",
        "documents": [f"{title}\nText {number}.", f"{title}\nMore."],
        "answer": f"Answer {number}.",
        "query_id": f"q{number}",
    }


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "data.json"
    path.write_text(json.dumps([record(number) for number in range(60)]))
    return path


def articles(records: list[dict[str, Any]]) -> set[str]:
    return {document.partition("\n")[0] for one in records for document in one["documents"]}


def test_parts_share_no_article_and_keep_all_columns(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "new" / "split"
    assert main(["split", str(data), "--output_dir", str(output), "--fraction", "0.2"]) == 0
    train, held = (json.loads((output / f"{name}.json").read_text()) for name in ("train", "held_out"))
    assert (len(train), len(held)) == (48, 12)
    assert not articles(train) & articles(held)
    assert sorted(train + held, key=lambda one: int(one["query_id"][1:])) == json.loads(data.read_text())
    said = capsys.readouterr().out
    assert f"{output}/held_out.json: 12 records, held out by article\n" in said
    assert f" train --train_data {output}/train.json --output_dir {output.parent}/model\n" in said
    assert f" evaluate --model {output.parent}/model --data {output}/held_out.json" in said
    assert [path.name for path in output.parent.iterdir()] == ["split"]


def test_a_split_is_repeated_but_not_replaced(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "split"
    words = ["split", str(data), "--output_dir", str(output)]
    assert main(words) == 0
    before = (output / "held_out.json").read_bytes()
    assert main(words) == 0
    assert main([*words, "--seed", "1"]) == 1
    assert "has another split: name a new folder, or give --overwrite" in capsys.readouterr().err
    assert (output / "held_out.json").read_bytes() == before
    assert main([*words, "--seed", "1", "--overwrite"]) == 0
    assert (output / "held_out.json").read_bytes() != before
    (output / "mine.txt").touch()
    assert main([*words, "--overwrite"]) == 1
    assert "already exists, with other things" in capsys.readouterr().err


def test_several_files_of_other_formats(data: Path, tmp_path: Path) -> None:
    more = tmp_path / "more.parquet"
    assert main(["merge", str(data), "--output_file", str(more)]) == 0
    lines = tmp_path / "lines.jsonl"
    lines.write_text("".join(json.dumps(record(number)) + "\n" for number in range(60, 90)))
    assert main(["split", str(more), str(lines), "--output_dir", str(tmp_path / "split")]) == 0
    parts = [pq.read_table(tmp_path / "split" / f"{name}.parquet") for name in ("train", "held_out")]
    assert sum(part.num_rows for part in parts) == 90
    assert parts[0].schema == parts[1].schema
    held = parts[1].column("query_id").to_pylist()
    assert held == sorted(held, key=lambda name: int(name[1:])), "in the order of the files"


def test_connected_records_are_split_by_their_best_documents(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "data.json"
    content = [record(number) for number in range(60)]
    for one in content:
        one["documents"].append("Everywhere\nText.")
        one["reranking_scores"] = [2.0, 1.0, 0.0]
    content[0]["documents"][1] = "A text without a title."
    path.write_text(json.dumps(content))
    assert main(["split", str(path), "--output_dir", str(tmp_path / "split")]) == 0
    out, err = capsys.readouterr()
    assert "held_out.json: 6 records, held out by best document" in out
    assert "6 of them have a document of an article that training records have, too" in out
    assert "1 of 180 documents have no title line" in err


def test_default_part_of_large_data_is_limited(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("scaledown.student.split.MOST", 3)
    for flags, expected in (([], 3), (["--fraction", "0.2"], 12)):
        output = tmp_path / f"split-{expected}"
        assert main(["split", str(data), "--output_dir", str(output), *flags]) == 0
        assert len(json.loads((output / "held_out.json").read_text())) == expected


@pytest.mark.parametrize(
    ("content", "flags", "message"),
    [
        ([record(0)] * 5, [], "the 5 records cannot be split: records with one question stay together"),
        ([record(0)], [], "the 1 records cannot be split"),
        ([record(0), record(3)], ["--seed", "-1"], "-1 is negative"),
        ([record(0), record(3)], ["--fraction", "1"], "1 is not between 0 and 1"),
        ([record(0), record(3)], ["--fraction", "some"], "invalid"),
        ([{"query": "q"}, record(3)], [], "scaledown validate"),
    ],
)
def test_data_that_cannot_be_split_is_refused_in_one_line(
    content: list[Any], flags: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "data.json"
    path.write_text(json.dumps(content))
    assert main(["split", str(path), "--output_dir", str(tmp_path / "out"), *flags]) != 0
    error = capsys.readouterr().err
    assert message in error.splitlines()[-1]
    assert "Traceback" not in error
    assert not (tmp_path / "out").exists()
