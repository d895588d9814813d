import functools
import json
import logging
from pathlib import Path

import numpy as np
import pytest

from conftest import SHARED
from scaledown.config.prepare import PrepareConfig
from scaledown.data.input.corpus import PassageTable, build_passages
from scaledown.data.retrieval import DenseRetriever, SPLADERetriever
from scaledown.data.retrieval.encoders import is_sparse, load_encoder
from scaledown.data.retrieval.index import search
from scaledown.data.retrieval.stages import encode_passages
from scaledown.errors import InputError, ModelError, UsageError
from scaledown.models.sources import resolve
from scaledown.run.directory import RunDirectory
from scaledown.run.stage import Stage

CORPUS = [
    {"id": "1", "title": "Tides", "text": "The Moon pulls the water of the oceans."},
    {"id": "2", "title": "Bread", "text": "Yeast makes dough rise in a warm place."},
    {"id": "3", "title": "Chess", "text": "The queen is the strongest piece on the board."},
    {"id": "4", "title": "Chess", "text": "The queen is the strongest piece on the board."},
]


def test_bundled_splade_finds_the_right_document() -> None:
    retriever = SPLADERetriever("bundled:splade-tiny", device="cpu")
    queries = ["what causes tides in the ocean", "why does dough rise", "strongest piece in chess"]
    found = retriever.retrieve(queries, CORPUS, top_k=2)
    assert [documents[0]["id"] for documents in found] == ["1", "2", "3"]
    assert found[2][1]["id"] == "4"  # an exact tie goes to the earlier document
    assert found[2][0]["score"] == found[2][1]["score"]
    for documents in found:
        assert documents[0]["score"] >= documents[1]["score"]
        assert set(documents[0]) == {"id", "title", "text", "score"}
    json.dumps(found)


@pytest.mark.parametrize(("kind", "retriever"), [("splade", SPLADERetriever), ("dense", DenseRetriever)])
def test_top_k_above_the_corpus_gives_all_and_warns(kind, retriever, models, caplog) -> None:
    with caplog.at_level(logging.WARNING, "scaledown"):
        found = retriever(str(models[kind]), device="cpu").retrieve(["queen"], CORPUS, top_k=9)
    assert sorted(document["id"] for document in found[0]) == ["1", "2", "3", "4"]
    assert "every query gets all" in caplog.text


def test_top_k_of_zero_is_refused(models) -> None:
    with pytest.raises(UsageError, match="at least 1"):
        SPLADERetriever(str(models["splade"]), device="cpu").retrieve(["a"], CORPUS, top_k=0)


@pytest.mark.parametrize(("kind", "retriever"), [("dense", SPLADERetriever), ("splade", DenseRetriever)])
def test_model_of_the_other_kind_is_refused(kind, retriever, models) -> None:
    with pytest.raises(ModelError, match="use (SPLADE|Dense)Retriever"):
        retriever(str(models[kind]), device="cpu")


def test_wrong_arguments_are_clear_errors(models) -> None:
    retriever = SPLADERetriever(str(models["splade"]), device="cpu")
    with pytest.raises(UsageError, match="list of queries"):
        retriever.retrieve("one string", CORPUS)
    with pytest.raises(InputError, match="neither a string nor"):
        retriever.retrieve(["q"], [{"id": "1"}])  # type: ignore[typeddict-item]


def test_kind_of_a_retriever_is_read_from_its_files(models) -> None:
    assert is_sparse(resolve("bundled:splade-tiny"))
    assert is_sparse(resolve(str(models["splade"])))
    assert not is_sparse(resolve(str(models["dense"])))


@pytest.mark.parametrize("kind", ["splade", "dense"])
def test_batch_size_does_not_change_vectors(kind, models) -> None:
    texts = [document["title"] + "\n" + document["text"] * n for n, document in enumerate(CORPUS, 1)]
    one, many = (load_encoder(resolve(str(models[kind])), "cpu", "float32", size) for size in (1, 32))
    first, second = one.documents(texts, lambda _: None), many.documents(texts, lambda _: None)
    if kind == "splade":
        first, second = first.toarray(), second.toarray()
    np.testing.assert_allclose(first, second, atol=1e-4)


def test_splade_vectors_follow_the_formula(models) -> None:
    """The maximum over tokens of log(1 + relu(logit)), Formal et al. 2021, computed with transformers."""
    import torch
    from transformers import AutoModelForMaskedLM, AutoTokenizer

    path = str(models["splade"])
    encoder = load_encoder(resolve(path), "cpu", "float32", 4)
    texts = ["The Moon pulls the water.", "Yeast"]
    tokenizer, model = AutoTokenizer.from_pretrained(path), AutoModelForMaskedLM.from_pretrained(path).eval()
    for text, vector in zip(texts, encoder.documents(texts, lambda _: None).toarray(), strict=True):
        with torch.no_grad():
            logits = model(**tokenizer(text, return_tensors="pt")).logits[0]  # [tokens, vocabulary]
        np.testing.assert_allclose(vector, torch.log1p(torch.relu(logits)).amax(0).numpy(), atol=1e-4)


def test_unsupported_similarity_is_refused(models, tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(models["dense"]), device="cpu", similarity_fn_name="euclidean")
    model.save(str(tmp_path / "m"))
    with pytest.raises(ModelError, match="euclidean"):
        DenseRetriever(str(tmp_path / "m"), device="cpu")


@pytest.mark.skipif(not (SHARED / "data" / "xquad-dev").is_dir(), reason="needs ../shared/data/xquad-dev")
def test_quality_on_real_questions(tmp_path: Path) -> None:
    """R@1, R@5, R@20 over 128-token passages; a passage is right if it has a line of the gold paragraph."""
    folder = SHARED / "data" / "xquad-dev"
    config = PrepareConfig(queries_file=("q",), output_file="o.json")
    source = resolve("bundled:splade-tiny")
    run = RunDirectory(tmp_path / "w")
    passages, vectors = Stage(run, "passages", {}), Stage(run, "vectors", {})
    encoder = load_encoder(source, "cpu", "float32", 32)
    encode_passages(
        vectors,
        passages,
        lambda: encoder,
        "float16",
        lambda check: build_passages(passages, config, [folder / "kilt.jsonl"], source, check),
    )
    articles = [json.loads(line) for line in (folder / "kilt.jsonl").read_text().splitlines()]
    paragraphs = {article["wikipedia_id"]: article["text"] for article in articles}
    questions = [json.loads(line) for line in (folder / "questions.jsonl").read_text().splitlines()]

    table = PassageTable(passages)
    gold = [_of_gold_paragraph(table, question, paragraphs) for question in questions]
    rows = vectors.finished().rows
    shards = [functools.partial(vectors.table, shard, check=True) for shard in range(len(rows))]
    ranking = search(encoder.queries([q["question"] for q in questions], lambda _: None), shards, rows, 20)
    recall = {
        k: np.mean(
            [not own.isdisjoint(rows[:k].tolist()) for own, rows in zip(gold, ranking.rows, strict=True)]
        )
        for k in (1, 5, 20)
    }
    print({f"R@{k}": round(float(value), 4) for k, value in recall.items()}, len(table), "passages")
    assert recall[1] >= 0.90
    assert recall[5] >= 0.975
    assert recall[20] >= 0.99


def _of_gold_paragraph(table: PassageTable, question: dict, paragraphs: dict) -> set[int]:
    """Rows of the passages that have a line of the gold paragraph."""
    paragraph = paragraphs[question["wikipedia_id"]][question["paragraph"]]
    passages = [(row, table[row]) for row in range(len(table))]
    return {
        row
        for row, passage in passages
        if passage.doc_id == question["wikipedia_id"]
        and any(line in paragraph for line in passage.text.split("\n"))
    }
