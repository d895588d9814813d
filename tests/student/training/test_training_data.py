import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from scaledown.config.train import TrainConfig
from scaledown.errors import InputError, UsageError
from scaledown.student.batch import plain_ids
from scaledown.student.training.training_data import (
    Examples,
    load_parts,
    measure_documents,
    read_examples,
    shares,
    training_order,
)


def record(query: str, *titles: str, **more: Any) -> dict[str, Any]:
    return {"query": query, "documents": [f"{title}\nText." for title in titles], "answer": "A.", **more}


def written(path: Path, records: list[Any]) -> str:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(records), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    else:
        path.write_text(json.dumps(records))
    return str(path)


def examples(folder: Path, records: list[Any], **keywords: Any) -> Examples:
    return read_examples([written(folder / "data.json", records)], folder, **keywords)


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".parquet"])
def test_all_formats_read_alike(tmp_path: Path, suffix: str) -> None:
    records = [record(f"q{n}", "a", "b", reranking_scores=[n / 7, -1.0]) for n in range(2500)]
    found = read_examples([written(tmp_path / f"data{suffix}", records)], tmp_path)
    assert len(found) == 2500
    assert found.skipped == 0
    for row in (0, 1023, 1024, 2499):
        assert found[row] == (f"q{row}", ["a\nText.", "b\nText."], "A.", [row / 7, -1.0])
    assert [path.name for path in tmp_path.iterdir()] == [f"data{suffix}"], "nothing else is left"


def test_documents_may_have_titles(tmp_path: Path) -> None:
    documents = ["bare", {"title": "T", "text": "x"}, {"text": "y"}]
    found = examples(tmp_path, [{"query": "q", "documents": documents, "answer": "a"}])
    assert found[0] == ("q", ["bare", "T\nx", "y"], "a", None)


def test_unusable_records_are_named_and_skipped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    lines = [json.dumps(record("one", "a")), "{oops", json.dumps({"query": "q", "documents": []})]
    path = tmp_path / "d.jsonl"
    path.write_text("\n".join([*lines, json.dumps(record("two", "b"))]) + "\n")
    with caplog.at_level(logging.WARNING, "scaledown"):
        found = read_examples([str(path)], tmp_path)
    assert [found[row].query for row in range(len(found))] == ["one", "two"]
    assert found.skipped == 2
    messages = [entry.getMessage() for entry in caplog.records]
    assert messages[0].startswith(f"{path}:2: record 2: invalid JSON")
    assert messages[1].startswith(f"{path}:3: record 3: has no answer")


def test_many_unusable_records_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "scaledown"):
        found = examples(tmp_path, [record("q", "a"), *([1] * 50)])
    assert found.skipped == 50
    assert len(caplog.records) == 21
    assert caplog.records[-1].getMessage().startswith("30 more records are unusable")


def test_nothing_usable_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no usable record; `scaledown validate"):
        examples(tmp_path, [{"query": "q"}])
    with pytest.raises(InputError, match="there is no such file"):
        read_examples([str(tmp_path / "none.json")], tmp_path)
    assert not list(tmp_path.glob(".*"))


def test_reranking_needs_scores(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--enable_reranking needs reranking_scores"):
        examples(tmp_path, [record("q", "a")], needs_scores=True)
    mixed = examples(tmp_path, [record("q", "a"), record("r", "b", reranking_scores=[1])], needs_scores=True)
    assert (len(mixed), mixed.skipped) == (1, 1)
    assert mixed[0].scores == [1.0]
    nulls = [record("q", "a", reranking_scores=None), record("r", "b", reranking_scores=[1])]
    found = examples(tmp_path, nulls)
    assert [found[0].scores, found[1].scores] == [None, [1.0]]
    assert examples(tmp_path, nulls, needs_scores=True).skipped == 1


def titles(found: Examples, rows: np.ndarray) -> set[str]:
    return {document.partition("\n")[0] for row in rows for document in found[row].documents}


def test_split_does_not_leak_articles_or_questions(tmp_path: Path) -> None:
    records = [record(f"q{n // 2}", f"a{n}", f"shared{n // 3}") for n in range(300)]
    found = examples(tmp_path, records)
    split = found.split(0.1, seed=3)
    assert split.by == "article"
    assert split.shared == 0
    assert 15 <= len(split.held_out) <= 30
    assert sorted([*split.train, *split.held_out]) == list(range(300))
    assert not titles(found, split.train) & titles(found, split.held_out)
    questions = [{found[row].query for row in rows} for rows in (split.train, split.held_out)]
    assert not questions[0] & questions[1]


def test_split_is_chosen_by_the_seed(tmp_path: Path) -> None:
    found = examples(tmp_path, [record(f"q{n}", f"a{n}") for n in range(100)])
    once, again, other = (found.split(0.1, seed).held_out.tolist() for seed in (0, 0, 1))
    assert once == again
    assert once != other
    assert len(once) == len(other) == 10
    assert len(found.split(0, 0).held_out) == 0
    assert len(found.split(0.001, 0).held_out) == 1, "at least one"


def test_split_where_all_articles_hang_together(tmp_path: Path) -> None:
    records = [
        record(f"q{n}", f"best{n // 4}", "everywhere", reranking_scores=[2.0, 1.0])
        if n % 2
        else record(f"q{n}", "everywhere", f"best{n // 4}", reranking_scores=[1.0, 2.0])
        for n in range(100)
    ]
    found = examples(tmp_path, records)
    split = found.split(0.2, seed=0)
    assert split.by == "best document"
    assert len(split.held_out) == 20
    best = [{row // 4 for row in rows} for rows in (split.train, split.held_out)]
    assert not best[0] & best[1]
    assert split.shared == 20, "it says how many share an article"


def test_split_of_one_article_is_by_question(tmp_path: Path) -> None:
    found = examples(tmp_path, [record(f"q{n // 2}", "only") for n in range(20)])
    split = found.split(0.2, seed=0)
    assert (split.by, len(split.held_out), split.shared) == ("question", 4, 4)
    same = examples(tmp_path, [record("q", "only")] * 5)
    assert len(same.split(0.2, seed=0).held_out) == 0


def test_order_is_pass_after_pass() -> None:
    rows = np.array([3, 5, 8, 9])
    order = training_order(rows, 10, seed=1)
    assert sorted(order[:4]) == sorted(order[4:8]) == rows.tolist()
    assert order[:4].tolist() != order[4:8].tolist()
    assert order.tolist() == training_order(rows, 10, seed=1).tolist()
    assert order.tolist() != training_order(rows, 10, seed=2).tolist()
    assert order[:6].tolist() == training_order(rows, 6, seed=1).tolist()


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_processes_share_each_step(ranks: int) -> None:
    order = np.arange(26)
    parts = [shares(order, 8, rank, ranks) for rank in range(ranks)]
    assert {len(part) for part in parts} == {4}
    for step in range(3):
        together = sorted(row for part in parts for row in part[step])
        assert together == list(range(8 * step, 8 * step + 8))
    assert sorted(row for part in parts for row in part[3]) == [24, 25], "each once, whoever has none"


def test_longest_document_is_found(tmp_path: Path, models: dict[str, Path]) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(models["causal_lm"])
    texts = ["short", "a rather longer text about rivers and towns " * 9, "middle of the road </s>"]
    found = examples(tmp_path, [{"query": "q", "documents": texts, "answer": "a"}] * 3)
    lengths = [len(plain_ids(tokenizer, text)) for text in texts]
    assert measure_documents([found], tokenizer, 0) == (9, max(lengths), sorted(lengths)[2], 0)
    cut = measure_documents([found, found], tokenizer, sorted(lengths)[1])
    assert (cut.number, cut.longest, cut.cut) == (18, max(lengths), 6)


def test_documents_without_a_title_are_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "data.jsonl"
    documents = [["a passage"], ["Title\nanother"], ["one more"], ["Title\nlast"]]
    lines = [{"query": f"{n}?", "documents": own, "answer": "a"} for n, own in enumerate(documents)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = TrainConfig(train_data=(str(path),), output_dir=str(tmp_path / "out"), eval_fraction=0.3)
    with caplog.at_level("WARNING", "scaledown"):
        load_parts(config, tmp_path)
    assert "2 of 4 documents have no title line" in caplog.text


def test_equal_questions_are_shared(tmp_path: Path) -> None:
    files = []
    for name, query in (("train", "Who?"), ("held", " who? ")):
        path = tmp_path / f"{name}.jsonl"
        path.write_text(json.dumps({"query": query, "documents": [f"{name}\ntext"], "answer": "a"}) + "\n")
        files.append(str(path))
    taught, held = (read_examples([file], tmp_path) for file in files)
    assert taught.shared_by(held) == 1
