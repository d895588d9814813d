import json
import logging
import math
import subprocess
import sys
from random import Random

import numpy as np
import pytest
import torch

from conftest import SHARED
from scaledown.data.reranker import add_reranking_scores
from scaledown.data.reranker import cross_encoder as rerankers
from scaledown.data.reranker.api import best_first, load_reranker, resolve_reranker, scaled
from scaledown.data.reranker.base import Pair
from scaledown.data.reranker.pair_tokens import PairTokens
from scaledown.data.reranker.query_likelihood import QueryLikelihoodReranker
from scaledown.devices import packing
from scaledown.errors import InputError, ModelError, UsageError
from scaledown.models.sources import resolve

RECORDS = [
    {
        "query": "what causes tides",
        "documents": [
            {"title": "Bread", "text": "Yeast makes dough rise."},
            {"title": "Tides", "text": "Tides are caused by the pull of the Moon."},
        ],
    },
    {"query": "q", "documents": ["plain text", "another much longer text " * 10, ""], "kept": 1},
]
PAIRS = [Pair("what is it", "A text. " * n) for n in (3, 1, 20, 7, 1)]


@pytest.mark.parametrize("kind", ["cross_encoder", "causal_lm"])
def test_scores_do_not_depend_on_batches(kind, models) -> None:
    prefix = "ql:" if kind == "causal_lm" else ""
    source = resolve_reranker(prefix + str(models[kind]))
    one, many = (
        load_reranker(source, "cpu", "float32", size).score(PAIRS, lambda _: None) for size in (1, 8)
    )
    np.testing.assert_allclose(one, many, atol=1e-4)
    assert one[1] == pytest.approx(one[4], abs=1e-5)
    assert len(set(np.round(one, 4))) == 4


def test_cross_encoder_scores_are_raw_logits(models) -> None:
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    path = str(models["cross_encoder"])
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForSequenceClassification.from_pretrained(path).eval()
    scores = load_reranker(resolve_reranker(path), "cpu", "float32", 2).score(PAIRS, lambda _: None)
    for pair, score in zip(PAIRS, scores, strict=True):
        with torch.no_grad():
            logit = model(**tokenizer(*pair, return_tensors="pt", truncation=True)).logits.item()
        assert score == pytest.approx(logit, abs=1e-4)


def test_query_likelihood_is_the_mean_log_probability_of_the_question(models) -> None:
    """Compared with a plain forward pass for each pair (Sachan et al. 2022)."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = str(models["causal_lm"])
    tokenizer, model = AutoTokenizer.from_pretrained(path), AutoModelForCausalLM.from_pretrained(path).eval()
    scores = load_reranker(resolve_reranker(f"ql:{path}"), "cpu", "float32", 3).score(PAIRS, lambda _: None)
    for pair, score in zip(PAIRS, scores, strict=True):
        context = tokenizer(f"Passage: {pair.document}")["input_ids"]
        asks = "\nPlease write a question based on this passage.\nQuestion:"
        context += tokenizer(asks, add_special_tokens=False)["input_ids"]
        question = tokenizer(" " + pair.query, add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            logits = model(torch.tensor([context + question])).logits[0]
        each = torch.log_softmax(logits, -1)[range(len(context) - 1, len(context + question) - 1), question]
        assert score == pytest.approx(each.mean().item(), abs=1e-4)


REPEATED = [
    Pair(query, document)
    for document in ("Tides are caused by the pull of the Moon. " * 3, "Bread.", "", "Été, 東京 and 🗼 " * 9)
    for query in (
        "what causes tides",
        "who",
        "what causes tides, and how often a day",
        "é 東京?",
        "a " * 90,
    )
]


def alone(reranker: QueryLikelihoodReranker, pairs: list[Pair]) -> list[float]:
    """Score each pair in its own batch, without sharing or padding."""
    return [reranker.score([pair], lambda _: None)[0] for pair in pairs]


@pytest.mark.parametrize("size", [1, 4, 16, 64])
def test_questions_that_share_a_passage_have_the_same_scores_as_pairs(size, models) -> None:
    reranker = load_reranker(resolve_reranker(f"ql:{models['causal_lm']}"), "cpu", "float32", size)
    assert reranker._together
    scores = reranker.score(REPEATED, lambda _: None)
    np.testing.assert_allclose(scores, alone(reranker, REPEATED), atol=1e-5)
    assert best_first(scores, len(scores)) == best_first(alone(reranker, REPEATED), len(scores))


def test_passage_is_read_once_and_questions_are_split_into_batches(models, monkeypatch) -> None:
    reranker = load_reranker(resolve_reranker(f"ql:{models['causal_lm']}"), "cpu", "float32", 8)
    read: list[torch.Tensor] = []
    forward = reranker._model.forward

    def counted(**given: torch.Tensor):
        read.append(given["input_ids"])
        return forward(**given)

    monkeypatch.setattr(reranker._model, "forward", counted)
    reranker.score([Pair(query, "A text. " * 20) for query in ("one", "two", "three")], lambda _: None)
    assert [len(ids) for ids in read] == [1]
    read.clear()
    many = [Pair(f"question number {number}", "A text. " * 20) for number in range(50)]
    reranker.score(many, lambda _: None)
    assert [len(ids) for ids in read] == [1] * 7  # each with at most eight questions
    assert max(ids.shape[1] for ids in read) < 200
    read.clear()
    reranker.score([Pair("word " * 200, "A text."), Pair("term " * 200, "A text.")], lambda _: None)
    assert [len(ids) for ids in read] == [2]  # too long to share a row


def test_model_that_ignores_the_mask_scores_pairs(models, monkeypatch, caplog) -> None:
    from transformers import LlamaForCausalLM

    source = resolve_reranker(f"ql:{models['causal_lm']}")
    expected = load_reranker(source, "cpu", "float32", 4).score(REPEATED, lambda _: None)
    forward = LlamaForCausalLM.forward

    def plain(self, *, attention_mask: torch.Tensor, **given: torch.Tensor):
        if attention_mask.ndim == 4:
            attention_mask = torch.ones_like(given["input_ids"])
        return forward(self, attention_mask=attention_mask, **given)

    monkeypatch.setattr(LlamaForCausalLM, "forward", plain)
    caplog.set_level(logging.INFO, "scaledown")
    reranker = load_reranker(source, "cpu", "float32", 4)
    assert "its own copy of the passage (its scores differ" in caplog.text
    np.testing.assert_allclose(reranker.score(REPEATED, lambda _: None), expected, atol=1e-5)


def test_packed_batch_that_runs_out_of_memory_is_halved_to_pairs(models, monkeypatch) -> None:
    reranker = load_reranker(resolve_reranker(f"ql:{models['causal_lm']}"), "cpu", "float32", 16)
    expected = reranker.score(REPEATED, lambda _: None)
    launch = reranker._launch

    def small(asked):
        if len(asked) > 1:
            raise RuntimeError("out of memory")
        return launch(asked)

    monkeypatch.setattr(reranker, "_launch", small)
    np.testing.assert_allclose(reranker.score(REPEATED, lambda _: None), expected, atol=1e-5)
    assert reranker.halving.count


def test_document_longer_than_the_context_is_cut_at_its_end(models) -> None:
    reranker = load_reranker(resolve_reranker(f"ql:{models['causal_lm']}"), "cpu", "float32", 2)
    (score,) = reranker.score([Pair("what", "word " * 9000)], lambda _: None)
    assert math.isfinite(score)


@pytest.mark.parametrize("scale", ["raw", "sigmoid"])
def test_add_reranking_scores_keeps_scores_beside_their_documents(scale, models) -> None:
    before = json.dumps(RECORDS)
    model = str(models["cross_encoder"])
    plain = add_reranking_scores(RECORDS, model, score_scale=scale, device="cpu")
    assert json.dumps(RECORDS) == before
    assert [record["documents"] for record in plain] == [record["documents"] for record in RECORDS]
    assert [len(record["reranking_scores"]) for record in plain] == [2, 3]
    assert plain[1]["kept"] == 1
    best = add_reranking_scores(RECORDS, model, top_k=2, score_scale=scale, device="cpu")
    for one, two in zip(plain, best, strict=True):
        order = best_first(one["reranking_scores"], 2)
        assert two["documents"] == [one["documents"][i] for i in order]
        assert two["reranking_scores"] == pytest.approx(sorted(one["reranking_scores"], reverse=True)[:2])
    if scale == "sigmoid":
        assert all(0 < score < 1 for record in plain for score in record["reranking_scores"])
    json.dumps(plain)


def test_bundled_query_likelihood_prefers_the_answering_document() -> None:
    (record,) = add_reranking_scores(RECORDS[:1], "ql:bundled:smollm2-135m", device="cpu")
    assert record["reranking_scores"][1] > record["reranking_scores"][0]


def test_sigmoid_never_overflows() -> None:
    assert scaled(-800, "sigmoid") == 0
    assert scaled(800, "sigmoid") == 1
    assert scaled(0, "sigmoid") == 0.5
    assert scaled(-3.5, "raw") == -3.5


def test_ties_keep_their_order() -> None:
    assert best_first([1.0, 2.0, 2.0, 1.0], 3) == [1, 2, 0]


def test_wrong_arguments_are_an_error(models) -> None:
    model = str(models["cross_encoder"])
    with pytest.raises(UsageError, match="top_k"):
        add_reranking_scores(RECORDS, model, top_k=0)
    with pytest.raises(UsageError, match="score_scale"):
        add_reranking_scores(RECORDS, model, score_scale="percent")
    with pytest.raises(InputError, match="record 1: a document is neither"):
        add_reranking_scores([{"query": "q", "documents": [3]}], model)  # type: ignore[list-item]
    with pytest.raises(InputError, match="record 2"):
        add_reranking_scores([RECORDS[0], {"query": "q"}], model)  # type: ignore[typeddict-item]


def test_rerankers_need_no_sentence_transformers(models) -> None:
    """Importing it takes longer than everything else that a worker needs."""
    code = """if True:
        import sys
        from scaledown.data.reranker import add_reranking_scores
        for name in sys.argv[1:]:
            (record,) = add_reranking_scores([{"query": "q", "documents": ["d"]}], name, device="cpu")
            print(len(record["reranking_scores"]), "sentence_transformers" in sys.modules)"""
    names = [f"ql:{models['causal_lm']}", str(models["cross_encoder"])]
    done = subprocess.run([sys.executable, "-c", code, *names], capture_output=True, text=True, check=True)
    assert done.stdout == "1 False\n" * 2


def test_classifier_is_refused_as_reranker(models, tmp_path) -> None:
    from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

    AutoTokenizer.from_pretrained(models["cross_encoder"]).save_pretrained(tmp_path)
    config = BertConfig.from_pretrained(models["cross_encoder"], num_labels=3)
    BertForSequenceClassification(config).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="3 scores for a pair"):
        load_reranker(resolve_reranker(str(tmp_path)), "cpu", "float32", 2)


ODD = [
    Pair(query, document)
    for query in ("who", "", "Été 東京 🗼?", "long " * 300)
    for document in ("", "A text.", "two\nlines [SEP] 2.5%", "much longer " * 400, "long " * 299)
]


@pytest.mark.parametrize("size", [1, 3, 16])
def test_texts_tokenised_once_have_the_same_scores_as_pairs(size, models, monkeypatch) -> None:
    """The scores equal those of `CrossEncoder.predict`, which tokenises each pair, bit for bit.

    Unless weights are packed (`test_packing.py`) or batches have other pairs.
    """
    monkeypatch.setattr(packing, "_can_pack", lambda _: False)
    monkeypatch.setattr(rerankers, "_SORTED", 1)
    source = resolve(str(models["cross_encoder"]))
    with monkeypatch.context() as patch:
        patch.setattr(rerankers, "_pair_tokens", lambda _: (None, "to compare"))
        expected = load_reranker(source, "cpu", "float32", size).score([*ODD, *PAIRS], lambda _: None)
    assert load_reranker(source, "cpu", "float32", size).score([*ODD, *PAIRS], lambda _: None) == expected
    assert len(set(expected)) > 10


@pytest.mark.parametrize("longest", [4, 7, 24, 100])
def test_pairs_of_ids_equal_the_tokenizers_pairs(longest, models) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(models["cross_encoder"], model_max_length=longest)
    tokens = PairTokens(tokenizer)
    pairs = [*ODD, *PAIRS, *(Pair("a " * one, "b " * other) for one in range(12) for other in range(12))]
    tokens.read(text for pair in pairs for text in pair)
    expected = tokenizer(
        [pair.query for pair in pairs],
        [pair.document for pair in pairs],
        padding=True,
        truncation="longest_first",
        return_tensors="pt",
    )
    found = tokens.features(pairs)
    assert found.keys() == expected.keys()
    for name, values in found.items():
        assert torch.equal(values, expected[name]), name
    around = int(tokens.features([Pair("", "")])["attention_mask"].sum()) if longest > 7 else 3
    assert [tokens.length(pair) + around for pair in pairs] == expected["attention_mask"].sum(1).tolist()


def test_each_text_is_tokenised_once(models, monkeypatch) -> None:
    reranker = load_reranker(resolve(str(models["cross_encoder"])), "cpu", "float32", 2)
    read: list[str] = []
    tokenizer = reranker._tokens._tokenizer

    def counted(texts, **settings):
        read.extend(texts)
        return tokenizer(texts, **settings)

    monkeypatch.setattr(reranker._tokens, "_tokenizer", counted)
    counted.pad_token_id, counted.pad_token_type_id = 0, 0
    reranker.score([Pair(query, text) for query in "ab" for text in ("one", "two", "three")], lambda _: None)
    assert sorted(read) == ["a", "b", "one", "three", "two"]


def test_pairs_of_a_batch_have_similar_numbers_of_tokens(models, monkeypatch) -> None:
    """Their numbers of characters are equal, so that only tokens can tell the pairs apart."""
    reranker = load_reranker(resolve(str(models["cross_encoder"])), "cpu", "float32", 4)
    texts = [("a " * n).ljust(64, "c") for n in range(32)]
    pairs = [Pair("who", text) for text in Random(0).sample(texts, len(texts))]
    shapes: list[tuple[int, int]] = []
    features = PairTokens.features

    def seen(self, chosen):
        found = features(self, chosen)
        shapes.append((int(found["attention_mask"].sum()), found["attention_mask"].numel()))
        return found

    monkeypatch.setattr(PairTokens, "features", seen)
    scores = reranker.score(pairs, lambda _: None)
    read, padded = map(sum, zip(*shapes, strict=True))
    assert len(shapes) == 8
    assert padded < 1.2 * read
    assert scores == pytest.approx([reranker.score([pair], lambda _: None)[0] for pair in pairs], abs=1e-5)


def test_tokenizer_with_special_rules_reads_pairs(models, monkeypatch, caplog) -> None:
    monkeypatch.setattr(packing, "_can_pack", lambda _: False)
    source = resolve(str(models["cross_encoder"]))
    expected = load_reranker(source, "cpu", "float32", 4).score(ODD, lambda _: None)
    features = PairTokens.features
    monkeypatch.setattr(PairTokens, "features", lambda self, pairs: features(self, pairs[::-1]))
    caplog.set_level(logging.INFO, "scaledown")
    assert load_reranker(source, "cpu", "float32", 4).score(ODD, lambda _: None) == expected
    assert "its tokenizer changes the tokens of texts in a pair" in caplog.text


@pytest.mark.slow
@pytest.mark.skipif(not (SHARED / "data" / "xquad-dev").is_dir(), reason="needs ../shared/data/xquad-dev")
def test_query_likelihood_finds_real_paragraphs(caplog) -> None:
    """12 real questions, four of each article, whose five paragraphs are read once for all four."""
    caplog.set_level(logging.INFO, "scaledown")
    folder = SHARED / "data" / "xquad-dev"
    articles = {
        record["wikipedia_id"]: record["text"][1:]
        for record in map(json.loads, (folder / "kilt.jsonl").read_text().splitlines())
    }
    every = [json.loads(line) for line in (folder / "questions.jsonl").read_text().splitlines()]
    of_articles = [[q for q in every if q["wikipedia_id"] == name] for name in list(articles)[::8]]
    questions = [question for own in of_articles for question in own[:: len(own) // 4][:4]]
    assert len(questions) == 12
    records = [{"query": q["question"], "documents": articles[q["wikipedia_id"]]} for q in questions]
    scored = add_reranking_scores(records, "ql:bundled:smollm2-135m", device="cpu")
    hits = [
        best_first(record["reranking_scores"], 1) == [question["paragraph"] - 1]
        for record, question in zip(scored, questions, strict=True)
    ]
    assert np.mean(hits) >= 0.75


def test_scores_in_bfloat16_are_distinct(models) -> None:
    reranker = load_reranker(resolve(str(models["cross_encoder"])), "cpu", "bfloat16", 4)
    pairs = [Pair("Who painted it?", f"Number {number} was painted by Ada.") for number in range(8)]
    scores = reranker.score(pairs, lambda _: None)
    assert any(torch.tensor(score).bfloat16().item() != score for score in scores)
