"""Exports of training data: `datasets` reads them, the card, the hub; rankings as TREC runs."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import huggingface_hub
import ir_measures
import pytest

from scaledown.cli import main
from scaledown.data.output import hub_dataset
from scaledown.evaluation.ranking import read_run

RECORDS = [
    {
        "query": f"Why {number}? \u2603",
        "documents": ["Title\nText", {"title": "T", "text": "x"}],
        "answer": "So.",
        "reranking_scores": [0.5, -1.25],
    }
    for number in range(40)
]
EXPECTED = RECORDS[3] | {"documents": ["Title\nText", "T\nx"]}
RERANK = ("--enable_reranking", "--top_k_retrieval", "6", "--top_k_reranking", "3")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "train_data.json"
    path.write_text(json.dumps(RECORDS))
    return path


@pytest.mark.parametrize("form", ["json", "jsonl", "parquet"])
def test_datasets_reads_exports_in_every_format(form: str, data: Path, tmp_path: Path, capsys) -> None:
    folder = tmp_path / "shared"
    assert main(["export", str(data), "--format", form, "--output_dir", str(folder)]) == 0
    assert "40 records" in capsys.readouterr().out
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "report.html", f"train.{form}"]
    cache = str(tmp_path / "cache")
    kind = "parquet" if form == "parquet" else "json"
    one = datasets.load_dataset(kind, data_files=str(folder / f"train.{form}"), cache_dir=cache)["train"]
    whole = datasets.load_dataset(str(folder), cache_dir=cache)["train"]
    for found in (one, whole):
        assert len(found) == 40
        assert found[3] == EXPECTED


@pytest.mark.parametrize("ending", ["json", "jsonl", "parquet"])
def test_datasets_reads_the_output_of_a_run(ending: str, prepare, tmp_path: Path) -> None:
    output = prepare.output.with_suffix(f".{ending}")
    assert prepare(*RERANK, "--output_file", str(output)) == 0
    kind = "parquet" if ending == "parquet" else "json"
    found = datasets.load_dataset(kind, data_files=str(output), cache_dir=str(tmp_path / "cache"))["train"]
    assert found.column_names == ["query", "documents", "answer", "reranking_scores"]
    assert len(found[0]["documents"]) == 3


def test_card_describes_the_run(prepare, tmp_path: Path) -> None:
    assert prepare(*RERANK) == 0
    folder = tmp_path / "shared"
    assert main(["export", str(prepare.output), "--format", "parquet", "--output_dir", str(folder)]) == 0
    card = huggingface_hub.DatasetCard((folder / "README.md").read_text())
    assert card.data.task_categories == ["question-answering"]
    assert "Beside the paper" in card.text
    assert 'data_files="train.parquet"' in card.text


@pytest.mark.parametrize("is_private", [True, False])
def test_push_uploads_the_folder_unless_private_data_would_be_public(
    is_private: bool, data: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    uploaded: dict[str, Any] = {}

    class Api:
        endpoint = "https://hub"

        def repo_info(self, name: str, **_: Any) -> Any:
            return SimpleNamespace(private=is_private)

        def create_repo(self, name: str, **keywords: Any) -> Any:
            uploaded.update(keywords, name=name)
            return huggingface_hub.RepoUrl(f"https://huggingface.co/datasets/{name}")

        def upload_folder(self, folder_path: Path, delete_patterns: list[str], **keywords: Any) -> None:
            assert delete_patterns == ["train.*"]
            uploaded["files"] = sorted(path.name for path in folder_path.iterdir())

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(hub_dataset, "reach_hub", lambda: None)
    words = ["export", str(data), "--format", "jsonl", "--output_dir", str(tmp_path / "shared")]
    assert main(words) == 0
    if not is_private:
        assert main([*words, "--push_to_hub", "me/data", "--private"]) == 2
        assert "exists and is public" in capsys.readouterr().err
        assert "files" not in uploaded
        return
    assert main([*words, "--push_to_hub", "me/data", "--private"]) == 0, "the folder is used again"
    assert uploaded == {
        "name": "me/data",
        "repo_type": "dataset",
        "private": True,
        "exist_ok": True,
        "files": ["README.md", "report.html", "train.jsonl"],
    }
    assert "https://hub/datasets/me/data" in capsys.readouterr().out


def test_export_with_other_data_needs_overwrite(data: Path, tmp_path: Path, capsys) -> None:
    words = ["export", str(data), "--format", "jsonl", "--output_dir", str(tmp_path / "shared")]
    assert main(words) == 0
    data.write_text(json.dumps(RECORDS[:3]))
    assert main(words) == 1
    assert "has other data: name a new folder, or give --overwrite" in capsys.readouterr().err


def test_rankings_are_exported_as_trec_runs(prepare, tmp_path: Path, capsys) -> None:
    assert prepare(*RERANK) == 0
    folder = tmp_path / "runs"
    assert main(["export", str(prepare.output), "--format", "trec", "--output_dir", str(folder)]) == 0
    assert "evaluate --run" in capsys.readouterr().out
    retrieved, reranked = (
        list(ir_measures.read_trec_run(str(folder / f"{name}.run"))) for name in ("retrieved", "reranked")
    )
    assert len(retrieved) == len(reranked) == 4 * 6
    assert {(one.query_id, one.doc_id) for one in retrieved} == {(o.query_id, o.doc_id) for o in reranked}
    first = [one.score for one in retrieved if one.query_id == retrieved[0].query_id]
    assert first == sorted(first, reverse=True)
    assert "\tQ0\t" in (folder / "retrieved.run").read_text()


def test_rankings_with_repeated_ids_can_be_evaluated(
    prepare, corpus: Path, queries: Path, tmp_path: Path, capsys
) -> None:
    articles = [json.loads(line) | {"id": "a 1", "_id": "a 1"} for line in corpus.read_text().splitlines()]
    corpus.write_text("".join(json.dumps(article) + "\n" for article in articles))
    lines = queries.read_text().splitlines()
    queries.with_suffix(".tsv").write_text("".join(f"7\t{line}\n" for line in lines))
    assert prepare(*RERANK, "--queries_file", str(queries.with_suffix(".tsv"))) == 0
    printed = capsys.readouterr()
    assert "queries have the id of another: told apart by #2" in printed.err
    assert "articles have the id of another: told apart by #2" in printed.err
    assert "ids made unique" in printed.out
    folder = tmp_path / "runs"
    assert main(["export", str(prepare.output), "--format", "trec", "--output_dir", str(folder)]) == 0
    found = read_run(folder / "reranked.run")
    assert {"7", "7#2", "7#3", "7#4"} <= found.keys()
    assert all(len(own) == 6 for own in found.values())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--format", "pisco", "--push_to_hub", "me/x"], "--format pisco: use one of json, jsonl, parquet"),
        (["--format", "json", "--private"], "--private needs --push_to_hub"),
        (["--format", "trec"], "which has the rankings, is missing"),
        (["{data}", "--format", "trec"], "takes one file"),
        (["--format", "json", "{empty}"], "no record"),
        (["--format", "parquet", "{bad}"], "answer"),
    ],
)
def test_user_errors_are_reported(words, message, data: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "empty.json").write_text("[]")
    (tmp_path / "bad.json").write_text('[{"query": "q", "documents": ["d"]}]')
    paths = {"data": data, "empty": tmp_path / "empty.json", "bad": tmp_path / "bad.json"}
    given = [word.format(**paths) for word in words]
    first = [] if any(name in words for name in ("{empty}", "{bad}")) else [str(data)]
    folder = tmp_path / "out"
    assert main(["export", *first, *given, "--output_dir", str(folder)]) in {1, 2}
    printed = capsys.readouterr().err
    assert message in printed
    assert "Traceback" not in printed
    assert not folder.exists()
