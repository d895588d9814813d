"""The command `scaledown answer` on a tiny model."""

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from filelock import FileLock
from test_answering import DOCUMENTS, QUERIES, student

from scaledown.cli import main
from scaledown.errors import NoRoomError
from scaledown.student.model import ScaleDownModel


@pytest.fixture(scope="module")
def folder(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("student")
    student(models, enable_reranking=True).save_pretrained(path)
    return path


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs of OpenVINO, which answers where it is installed, are kept for this process only."""
    monkeypatch.setenv("SCALEDOWN_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.mark.parametrize("engine", ["auto", "transformers"])
def test_one_query_is_answered_as_it_is_written(
    engine: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--engine", engine, "--device", "cpu", "--model", str(folder)]
    words += ["--query", QUERIES[0], "--max_new_tokens", "12"]
    assert main(["answer", *words, "--document", "Tides come and go.", "--document", "The moon."]) == 0
    model = ScaleDownModel.from_pretrained(str(folder))
    expected = model.answer(QUERIES[0], ["Tides come and go.", "The moon."], max_new_tokens=12)
    assert capsys.readouterr().out.strip() == expected


@pytest.mark.parametrize("flags", [[], ["--uncompressed"]])
def test_a_file_is_answered_with_scores(flags: list[str], folder: Path, tmp_path: Path) -> None:
    data, output = tmp_path / "data.json", tmp_path / "answers.jsonl"
    records = [
        {"query": query, "documents": documents, "answer": "gold"}
        for query, documents in zip(QUERIES, DOCUMENTS, strict=True)
    ]
    data.write_text(json.dumps(records))
    words = ["--model", str(folder), "--data", str(data), "--output_file", str(output), "--device", "cpu"]
    assert main(["answer", *words, "--max-new-tokens", "12", *flags]) == 0
    found = [json.loads(line) for line in output.read_text().splitlines()]
    model = ScaleDownModel.from_pretrained(str(folder))
    answers = model.answer(QUERIES, DOCUMENTS, max_new_tokens=12, compressed=not flags)
    assert [record["answer"] for record in found] == answers
    assert [record["query"] for record in found] == QUERIES
    for record, scores in zip(found, model.rerank(QUERIES, DOCUMENTS), strict=True):
        assert record["reranking_scores"] == pytest.approx(scores, abs=1e-5)


def test_documents_are_read_once_for_answers_and_scores(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, calls = tmp_path / "data.json", []
    data.write_text(
        json.dumps([{"query": q, "documents": own} for q, own in zip(QUERIES, DOCUMENTS, strict=True)])
    )
    compress_ids = ScaleDownModel.compress_ids

    def counted(self: ScaleDownModel, *given: Any, **named: Any) -> Any:
        calls.append(given)
        return compress_ids(self, *given, **named)

    monkeypatch.setattr(ScaleDownModel, "compress_ids", counted)
    words = ["--model", str(folder), "--data", str(data), "--output_file", str(tmp_path / "o.jsonl")]
    assert main(["answer", *words, "--device", "cpu", "--max_new_tokens", "4"]) == 0
    assert len(calls) == 1


@pytest.mark.parametrize("ending", ["json", "jsonl", "parquet"])
def test_the_ending_decides_the_format(ending: str, folder: Path, tmp_path: Path) -> None:
    data, output = tmp_path / "data.json", tmp_path / f"answers.{ending}"
    data.write_text(json.dumps([{"query": QUERIES[0], "documents": DOCUMENTS[0]}, {"query": "no documents"}]))
    words = [
        "answer",
        "--model",
        str(folder),
        "--data",
        str(data),
        "--device",
        "cpu",
        "--max_new_tokens",
        "4",
    ]
    assert main([*words, "--output_file", str(output)]) == 0
    if ending == "parquet":
        found = [
            {name: value for name, value in record.items() if value is not None}
            for record in pq.read_table(output).to_pylist()
        ]
    else:
        text = output.read_text()
        found = json.loads(text) if ending == "json" else [json.loads(line) for line in text.splitlines()]
    assert [sorted(record) for record in found] == [
        ["answer", "query", "reranking_scores"],
        ["error", "query"],
    ]
    assert main([*words, "--output_file", str(tmp_path / "answers.txt")]) == 2
    assert not (tmp_path / "answers.txt").exists()


def test_document_that_is_the_path_of_a_file_is_reported(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (file := tmp_path / "notes.txt").write_text("Tides are caused by the moon.")
    asked = ["--model", str(folder), "--query", "Why?", "--max_new_tokens", "2"]
    assert main(["answer", *asked, "--document", str(file), "x" * 5000]) == 0
    assert f"--document {file} is read as text, not as a file" in capsys.readouterr().err


def test_one_answer_into_a_file(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "answer.json"
    words = ["--model", str(folder), "--query", QUERIES[0], "--document", "The moon.", "--device", "cpu"]
    assert main(["answer", *words, "--output_file", str(output), "--max_new_tokens", "12"]) == 0
    (record,) = json.loads(output.read_text())
    model = ScaleDownModel.from_pretrained(str(folder))
    assert record["query"] == QUERIES[0]
    assert record["answer"] == model.answer(QUERIES[0], ["The moon."], max_new_tokens=12)
    assert len(record["reranking_scores"]) == 1
    assert f"{output}: 1 record\n" in capsys.readouterr().out


def test_answers_do_not_replace_other_output(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, output = tmp_path / "td.json", tmp_path / "out.jsonl"
    data.write_text(json.dumps([{"query": QUERIES[0], "documents": DOCUMENTS[0], "answer": "a"}]))
    before = data.read_bytes()
    words = [
        "answer",
        "--model",
        str(folder),
        "--data",
        str(data),
        "--device",
        "cpu",
        "--max_new_tokens",
        "4",
    ]
    for flags in ([], ["--overwrite"]):
        assert main([*words, "--output_file", str(data), *flags]) == 2
        assert f"{data} is also read: name another" in capsys.readouterr().err
    output.write_text("mine\n")
    assert main([*words, "--output_file", str(output)]) == 1
    assert "this command has not written it" in capsys.readouterr().err
    assert (data.read_bytes(), output.read_text()) == (before, "mine\n")
    assert main([*words, "--output_file", str(output), "--overwrite"]) == 0
    assert main([*words, "--output_file", str(output)]) == 0, "its own"
    assert json.loads(output.read_text())["query"] == QUERIES[0]


def test_a_pointer_answers_at_the_rate_that_is_asked_for(
    models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = student(models, "pointer").eval()
    model.save_pretrained(tmp_path / "pointer")
    data, output = tmp_path / "data.json", tmp_path / "answers.jsonl"
    data.write_text(json.dumps([{"query": QUERIES[0], "documents": DOCUMENTS[2], "answer": "gold"}]))
    words = ["answer", "--model", str(tmp_path / "pointer"), "--device", "cpu", "--max_new_tokens", "12"]
    way = ["--compression_rate", "4", "--budget", "shared"]
    assert main([*words, "--data", str(data), "--output_file", str(output), *way]) == 0
    (record,) = [json.loads(line) for line in output.read_text().splitlines()]
    expected = model.answer(QUERIES[0], DOCUMENTS[2], max_new_tokens=12, compression_rate=4, budget="shared")
    assert record["answer"] == expected
    assert (record["compression_rate"], record["budget"]) == (4, "shared")
    assert record["reranking_scores"] == pytest.approx(model.rerank(QUERIES[0], DOCUMENTS[2]), abs=1e-5)
    capsys.readouterr()
    given = [word for document in DOCUMENTS[2] for word in ("--document", document)]
    assert main([*words, "--query", QUERIES[0], *given, *way]) == 0
    assert capsys.readouterr().out.strip() == expected
    assert main([*words, "--query", QUERIES[0], *given, "--compression_rate", "2"]) == 2
    assert "--compression_rate 2: a pointer takes 4 to 32 tokens" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give --query TEXT, or --data FILE"),
        (["--query", "a", "--data", "b"], "give --query TEXT, or --data FILE"),
        (["--data", "b"], "--data needs --output_file"),
        (["--query", "a", "--model", "/nowhere/model"], "/nowhere/model"),
    ],
)
def test_wrong_usage_is_one_line(
    words: list[str], message: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["answer", "--model", str(folder), *words]) != 0
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_bad_record_does_not_affect_others(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, output = tmp_path / "data.jsonl", tmp_path / "answers.jsonl"
    lines = [
        '{"query": "q", "documents": ["d"], "answer": ["anything"]}',
        '{"query": "q"}',
        '{"query": "q", "documents": [5]}',
        "{no json",
        json.dumps({"query": "long " * 5000, "documents": ["d"]}),
        '{"query": "\\ud800", "documents": ["d"]}',
        '{"documents": ["d"]}',
        '{"query": "q", "documents": []}',
    ]
    data.write_text("\n".join(lines))
    words = ["--model", str(folder), "--data", str(data), "--output_file", str(output), "--device", "cpu"]
    assert main(["answer", *words, "--max_new_tokens", "5"]) == 0
    found = [json.loads(line) for line in output.read_text().splitlines()]
    assert ["answer" in record for record in found] == [place in {0, 7} for place in range(8)]
    errors = [record.get("error", "") for record in found]
    assert errors[1] == "expected a query and documents"
    assert "document 1 is neither a string" in errors[2]
    assert "invalid JSON" in errors[3]
    assert "the generator takes" in errors[4]
    assert errors[6] == "has no query"
    out, err = capsys.readouterr()
    assert "8 records, 6 with an error" in out
    assert f"{data}:3: document 1 is neither" in err
    assert found[7]["reranking_scores"] == []


def test_interrupted_answers_continue(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data, output, whole = (tmp_path / name for name in ("data.jsonl", "answers.jsonl", "whole.jsonl"))
    records = [{"query": f"{QUERIES[0]} {number}", "documents": ["The moon."]} for number in range(150)]
    records[70] = {"query": "no documents"}
    data.write_text("\n".join(map(json.dumps, records)))
    words = [
        "answer",
        "--model",
        str(folder),
        "--data",
        str(data),
        "--device",
        "cpu",
        "--max_new_tokens",
        "2",
    ]
    assert main([*words, "--output_file", str(whole)]) == 0
    answer, asked = ScaleDownModel.answer, []

    def counting(self: Any, queries: list[str], *arguments: Any, **options: Any) -> list[str]:
        asked.extend(queries)
        if len(asked) > interrupted_at:
            raise KeyboardInterrupt
        return answer(self, queries, *arguments, **options)

    monkeypatch.setattr(ScaleDownModel, "answer", counting)
    interrupted_at = 0
    assert main([*words, "--output_file", str(output)]) == 130
    assert sorted(path.name for path in tmp_path.glob("*answers*")) == [], "nothing was kept"
    asked.clear()
    interrupted_at = 100
    assert main([*words, "--output_file", str(output)]) == 130
    partial = tmp_path / "answers.jsonl.partial"
    assert f"64 answers in {partial} are kept: the same command continues" in capsys.readouterr().err
    assert not output.exists()
    asked.clear()
    interrupted_at = len(records)
    assert main([*words, "--output_file", str(output)]) == 0
    assert len(asked) == 150 - 64 - 1, "answers of before are kept, and one record cannot be asked"
    assert output.read_bytes() == whole.read_bytes()
    assert "150 records, 1 with an error" in capsys.readouterr().out
    assert not partial.exists()


def test_interrupted_answers_of_other_settings_are_not_taken(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, output = tmp_path / "data.jsonl", tmp_path / "answers.jsonl"
    data.write_text(
        "\n".join(json.dumps({"query": f"{number}?", "documents": ["d"]}) for number in range(80))
    )
    words = ["answer", "--model", str(folder), "--data", str(data), "--device", "cpu"]
    answer = ScaleDownModel.answer

    calls = []

    def once(self: Any, *arguments: Any, **options: Any) -> list[str]:
        calls.append(arguments)
        if len(calls) > 1:
            raise KeyboardInterrupt
        return answer(self, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(ScaleDownModel, "answer", once)
        assert main([*words, "--output_file", str(output), "--max_new_tokens", "2"]) == 130
        assert main([*words, "--output_file", str(output), "--max_new_tokens", "3"]) == 130
    assert list(output.with_name("answers.jsonl.partial").rglob("*.arrow")), "what was kept stays"
    for name in (output, tmp_path / "new.jsonl"):
        assert main([*words, "--output_file", str(name), "--max_new_tokens", "3"]) == 0
    assert output.read_bytes() == (tmp_path / "new.jsonl").read_bytes()


def test_record_that_does_not_fit_into_memory_is_an_error_of_its_own(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = ScaleDownModel.answer

    def full(self: Any, queries: list[str], *arguments: Any, **options: Any) -> list[str]:
        if "too long?" in queries:
            raise NoRoomError("out of memory with one text at a time")
        return answer(self, queries, *arguments, **options)

    monkeypatch.setattr(ScaleDownModel, "answer", full)
    data, output = tmp_path / "data.jsonl", tmp_path / "answers.jsonl"
    asked = ("a?", "too long?", "b?")
    data.write_text("\n".join(json.dumps({"query": query, "documents": ["d"]}) for query in asked))
    words = ["--model", str(folder), "--data", str(data), "--output_file", str(output), "--device", "cpu"]
    assert main(["answer", *words, "--max_new_tokens", "2"]) == 0
    found = [json.loads(line) for line in output.read_text().splitlines()]
    assert ["answer" in record for record in found] == [True, False, True]
    assert "out of memory" in found[1]["error"]


def test_folder_of_partial_answers_is_checked(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps({"query": "a?", "documents": ["d"]}))
    words = ["answer", "--model", str(folder), "--data", str(data), "--device", "cpu", "--output_file"]
    assert main([*words, str(folder / "answers.jsonl")]) == 2
    assert f"lies in {folder}, which is read" in capsys.readouterr().err
    partial = tmp_path / "answers.jsonl.partial"
    partial.mkdir()
    (partial / "mine.txt").touch()
    assert main([*words, str(tmp_path / "answers.jsonl")]) == 1
    assert f"{partial} holds other things: delete it" in capsys.readouterr().err
    (partial / "mine.txt").unlink()
    with FileLock(partial / ".lock"):
        assert main([*words, str(tmp_path / "answers.jsonl")]) == 1
    assert "another process writes --output_file" in capsys.readouterr().err


def test_a_file_of_errors_fails(folder: Path, tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text('{"query": "q"}\n')
    words = ["--model", str(folder), "--data", str(data), "--output_file", str(tmp_path / "out.jsonl")]
    assert main(["answer", *words, "--device", "cpu"]) == 1
