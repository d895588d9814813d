"""The pointer: what it picks, what it learns from, and that nothing depends on padding or batches."""

import math
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from scaledown.errors import UsageError
from scaledown.models.sources import resolve
from scaledown.student.batch import collate, group
from scaledown.student.compressors import pointer
from scaledown.student.labels import copied_spans, occurrences
from scaledown.student.model import ScaleDownModel
from scaledown.student.settings import ScaleDownConfig
from scaledown.student.training.cloze import cloze_questions

QUERY = "When was the tower built?"
DOCUMENTS = [
    "The iron tower was built in 1889 and is 300 metres tall. It was painted many times over the years.",
    "Tides come and go.",
    "A book about the tower was written by nobody at all, and it was never printed anywhere.",
]


def build(models: dict[str, Path], *, learned: bool = True, **settings: Any) -> ScaleDownModel:
    torch.manual_seed(0)
    small = {"num_layers": 1, "doc_max_length": 48, "query_max_length": 32, "compression_rate": 8}
    config = ScaleDownConfig(compressor="pointer", **{**small, **settings})
    model = ScaleDownModel.build(config, resolve(str(models["causal_lm"])))
    if learned:
        for parameter in model.pointer.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


@pytest.fixture(scope="module")
def model(models: dict[str, Path]) -> ScaleDownModel:
    return build(models)


def scores_of(model: ScaleDownModel, documents: list[str]) -> list[torch.Tensor]:
    """Scores of each document's tokens, every document read alone."""
    read = model.reader.read(QUERY, documents)
    found = [model.compress_ids(group([one])) for one in read]
    return [own.token_scores[0, : one.stop - one.start] for own, one in zip(found, read, strict=True)]


def likely(scores: Sequence[float] | torch.Tensor) -> list[float]:
    """Sums of the probabilities within 4 tokens, times 0.7 for each of distance, except for a factor."""
    ones = [math.exp(float(score)) for score in scores]
    return [
        sum(0.7 ** abs(place - other) * one for other, one in enumerate(ones) if abs(place - other) <= 4)
        for place in range(len(ones))
    ]


def best_places(values: Sequence[float], count: int) -> list[int]:
    return sorted(sorted(range(len(values)), key=lambda place: -values[place])[:count])


@torch.no_grad()
def test_the_best_tokens_stand_for_a_document_in_its_order(model: ScaleDownModel) -> None:
    for rate in (4, 8, 16, 32):
        read = model.reader.read(QUERY, DOCUMENTS, rate=rate)
        embeddings = model.compress(QUERY, DOCUMENTS, compression_rate=rate)
        for one, scores, own in zip(read, scores_of(model, DOCUMENTS), embeddings, strict=True):
            tokens = one.ids[one.start : one.stop]
            kept = best_places(likely(scores), max(1, math.ceil(len(tokens) / rate)))
            states = model.compressor(input_ids=torch.tensor([one.ids])).last_hidden_state[0, one.start :]
            state = states[kept] / states[kept].square().mean(-1, keepdim=True).add(1e-5).sqrt()
            words = model.get_input_embeddings()(torch.tensor([tokens[place] for place in kept]))
            expected = words + state @ model.pointer.carry.weight.T
            torch.testing.assert_close(own, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_untrained_pointer_returns_the_embeddings_of_tokens(models: dict[str, Path]) -> None:
    model = build(models, learned=False)
    read = model.reader.read(QUERY, DOCUMENTS[:1], rate=4)[0]
    (embeddings,) = model.compress(QUERY, DOCUMENTS[:1], compression_rate=4)
    words = model.get_input_embeddings().weight
    tokens = [int((words == own).all(1).nonzero()[0]) for own in embeddings]
    remaining = iter(read.ids[read.start : read.stop])
    assert all(token in remaining for token in tokens), "a part of the document, in order"
    assert "".join(model.pick(QUERY, DOCUMENTS[:1], compression_rate=4)[0]) == "".join(
        model.tokenizer.decode([token]) for token in tokens
    )


@torch.no_grad()
def test_a_shared_budget_goes_to_the_best_tokens_of_all_documents(model: ScaleDownModel) -> None:
    each, shared = (model.compress(QUERY, DOCUMENTS, budget=budget) for budget in ("each", "shared"))
    assert sum(map(len, each)) == sum(map(len, shared))
    found = enumerate(scores_of(model, DOCUMENTS))
    best = sorted([(score, -n) for n, own in found for score in likely(own)], reverse=True)
    best = best[: sum(map(len, shared))]
    assert [len(own) for own in shared] == [sum(-n == number for _, n in best) for number in range(3)]
    together = model.compress([QUERY, "Why?"], [DOCUMENTS, DOCUMENTS[1:]], budget="shared")
    assert [len(own) for own in together[0]] == [len(own) for own in shared]
    alone = model.answer(QUERY, DOCUMENTS, budget="shared", max_new_tokens=8)
    assert alone == model.answer(QUERY, shared, max_new_tokens=8)
    assert (
        alone
        == model.answer([QUERY, "Why?"], [DOCUMENTS, DOCUMENTS[1:]], budget="shared", max_new_tokens=8)[0]
    )


@torch.no_grad()
def test_padding_does_not_reach_scores_or_embeddings(model: ScaleDownModel) -> None:
    read = model.reader.read(QUERY, DOCUMENTS)
    groups = group(read, 1 << 15)
    together = model.compress_ids(groups)
    for part in groups:
        part["ids"][torch.arange(part["ids"].shape[1]) >= part["lengths"][:, None]] = 17
    again = model.compress_ids(groups)
    assert torch.equal(together.embeddings, again.embeddings)
    for place, (one, scores) in enumerate(zip(read, scores_of(model, DOCUMENTS), strict=True)):
        own = together.token_scores[place, : one.stop - one.start]
        torch.testing.assert_close(own, scores, rtol=1e-4, atol=1e-4)


@given(st.integers(0, 10**6))
def test_choosing_is_a_sort_by_the_probability_of_a_token_and_those_around_it(seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 17, (4,), generator=random)
    counts = torch.randint(1, 5, (4,), generator=random)
    scores = 4 * torch.randn(4, 16, generator=random)
    values = [likely(own[:length]) for own, length in zip(scores, lengths.tolist(), strict=True)]
    chosen = pointer.choose(scores, counts, lengths)
    for row in range(4):
        assert chosen[row].nonzero()[:, 0].tolist() == best_places(values[row], int(counts[row]))
    shared = pointer.choose_shared(scores, counts, lengths, [3, 1])
    for rows in (range(3), range(3, 4)):
        together = [(value, row, place) for row in rows for place, value in enumerate(values[row])]
        expected = sorted(together, reverse=True)[: int(counts[rows.start : rows.stop].sum())]
        found = {(row, place) for row in rows for place in shared[row].nonzero()[:, 0].tolist()}
        assert found == {(row, place) for _, row, place in expected}


def test_of_equally_good_tokens_the_earlier_is_chosen() -> None:
    scores = torch.tensor([[0.0, 0, 0, 0, 0, 0, 7, 7], [-200.0, -200, -200, -200, -200, -200, 7, 7]])
    chosen = pointer.choose(scores, torch.tensor([1, 3]), torch.tensor([6, 6]))
    assert [own.nonzero()[:, 0].tolist() for own in chosen] == [[2], [1, 2, 3]]


def test_the_loss_is_a_softmax_over_all_documents_of_a_question(model: ScaleDownModel) -> None:
    answers = ("1889", "Neither", "")
    examples = [model.reader.encode(QUERY, DOCUMENTS, answer) for answer in answers]
    batch = collate(examples)
    assert int(batch["copied"].sum()) == sum(examples[0].documents[0].copied) > 0
    output = model(**batch)
    scores = torch.cat(scores_of(model, DOCUMENTS))
    wanted = [place for place, copied in enumerate(examples[0].documents[0].copied) if copied]
    expected = -scores.log_softmax(0)[wanted].mean() / 3
    torch.testing.assert_close(output.pointer_loss, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(output.loss, output.answer_loss + output.pointer_loss)


def test_gradients_reach_scorer_layers_and_map_but_not_the_generator(models: dict[str, Path]) -> None:
    model = build(models).train()
    encoded = model.reader.encode(QUERY, DOCUMENTS, "1889")
    model(
        **collate([encoded._replace(documents=model.reader.read(QUERY, DOCUMENTS, "1889"))])
    ).loss.backward()
    without = {
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and parameter.grad is None
    }
    assert not without
    assert not any(p.grad is not None for n, p in model.named_parameters() if not p.requires_grad)


def test_a_pointer_keeps_its_rate_scores_and_answers_in_its_folder(
    model: ScaleDownModel, tmp_path: Path
) -> None:
    model.save_pretrained(tmp_path)
    again = ScaleDownModel.from_pretrained(tmp_path)
    for budget in ("each", "shared"):
        for rate in (4, 32):
            way = {"budget": budget, "compression_rate": rate}
            expected = model.compress(QUERY, DOCUMENTS, **way)
            for left, right in zip(expected, again.compress(QUERY, DOCUMENTS, **way), strict=True):
                assert torch.equal(left, right)
    assert again.rerank(QUERY, DOCUMENTS) == model.rerank(QUERY, DOCUMENTS)
    half = ScaleDownModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.pointer.words.dtype == torch.int64
    assert torch.equal(half.pointer.words, model.pointer.words)
    assert {parameter.dtype for parameter in half.pointer.parameters()} == {torch.float32}
    assert half.generator.dtype == torch.bfloat16
    assert len(half.answer(QUERY, DOCUMENTS, max_new_tokens=4)) >= 0
    assert "a pointer that picks tokens" in (tmp_path / "README.md").read_text()


@torch.no_grad()
def test_point_returns_each_token_with_its_score(model: ScaleDownModel) -> None:
    read = model.reader.read(QUERY, DOCUMENTS, rate=4)
    found = model.point(QUERY, DOCUMENTS, compression_rate=4)
    for own, one, scores in zip(found, read, scores_of(model, DOCUMENTS), strict=True):
        assert own.ids == one.ids[one.start : one.stop]
        assert own.scores == pytest.approx(scores.tolist(), abs=1e-4)
        assert own.picked == best_places(likely(own.scores), one.memory)
    shared = model.point(QUERY, DOCUMENTS, compression_rate=4, budget="shared")
    assert [own.scores for own in shared] == [own.scores for own in found]
    lengths = [len(own) for own in model.compress(QUERY, DOCUMENTS, compression_rate=4, budget="shared")]
    assert [len(own.picked) for own in shared] == lengths != [len(own.picked) for own in found]
    assert model.point(QUERY, []) == []


@torch.no_grad()
def test_relevance_is_the_best_tokens_score(model: ScaleDownModel) -> None:
    expected = [float(own.max()) for own in scores_of(model, DOCUMENTS)]
    assert model.rerank(QUERY, DOCUMENTS) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"compression_rate": 3}, "takes 4 to 32"),
        ({"compression_rate": 64}, "takes 4 to 32"),
        ({"budget": "most"}, "use each or shared"),
    ],
)
def test_unsupported_rates_and_budgets_are_refused(model: ScaleDownModel, options: Any, message: str) -> None:
    for call in (model.answer, model.compress, model.pick, model.point):
        with pytest.raises(UsageError, match=message):
            call(QUERY, DOCUMENTS, **options)


def test_other_compressors_have_one_rate_and_no_shared_budget(models: dict[str, Path]) -> None:
    config = ScaleDownConfig(num_layers=1, doc_max_length=32, compression_rate=8)
    other = ScaleDownModel.build(config, resolve(str(models["causal_lm"])))
    with pytest.raises(UsageError, match="trained for 8 alone"):
        other.answer(QUERY, DOCUMENTS, compression_rate=4)
    with pytest.raises(UsageError, match="only a pointer shares"):
        other.compress(QUERY, DOCUMENTS, budget="shared")
    with pytest.raises(UsageError, match="only a pointer picks"):
        other.pick(QUERY, DOCUMENTS)
    with pytest.raises(UsageError, match="by its own scores"):
        ScaleDownConfig(compressor="pointer", enable_reranking=True)


def test_tokens_of_one_word_count_as_the_same(models: dict[str, Path]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(models["causal_lm"])
    numbers = pointer.same_words(tokenizer, len(tokenizer) + 3)
    assert len(numbers) == len(tokenizer) + 3
    words: dict[int, set[str]] = {}
    assert {numbers[token] for token in tokenizer.all_special_ids} == {pointer.NO_WORD}
    for token, number in enumerate(numbers[: len(tokenizer)]):
        if number == pointer.NO_WORD:
            continue
        words.setdefault(number, set()).add(tokenizer.decode([token]).strip().lower())
    assert all(len({word.rstrip("s") for word in own}) == 1 for own in words.values() if len(own) > 1)


def test_an_answer_copies_its_whole_occurrences() -> None:
    documents = ["The Moon moves. the moon, a moonlight.", "No satellite.", "THE MOON"]
    spans = copied_spans("What moves?", documents, "the Moon.")
    assert [[text[a:b] for a, b in own] for text, own in zip(documents, spans, strict=True)] == [
        ["The Moon", "the moon"],
        [],
        ["THE MOON"],
    ]
    assert occurrences("ab+b and ab+b", "ab+b") == [(0, 4), (9, 13)]
    for document, answer in [
        ("anything", " . "),
        ("There is no rain. Yes!", "No"),
        ("a vitamin A", "A"),
        ("it is the sun", "the"),
        ("1,000 or 1.5 or 1-2 or 21", "1"),
        ("Spider-Man and manly", "Man"),
    ]:
        assert occurrences(document, answer) == [], (document, answer)
        assert copied_spans("Who?", [document], answer) == [[]] or answer in {"1", "Man"}
    assert occurrences("There is 1, or 1.", "1") == [(9, 10), (15, 16)]


def test_longer_answer_copies_content_words_of_supporting_documents() -> None:
    documents = ["Gravity of the Moon pulls oceans.", "Oceans are wet.", "Wind makes waves."]
    spans = copied_spans("What pulls tides?", documents, "Tides are pulled since lunar gravity moves oceans.")
    found = [[text[a:b] for a, b in own] for text, own in zip(documents, spans, strict=True)]
    assert found == [[], [], []], "two of five words are no support"
    spans = copied_spans("What makes tides?", documents, "It is gravity that makes oceans rise.")
    assert [[text[a:b] for a, b in own] for text, own in zip(documents, spans, strict=True)] == [
        ["Gravity", "oceans"],
        [],
        [],
    ]
    assert copied_spans("Who?", documents, "") == [[], [], []]


@torch.no_grad()
def test_documents_without_tokens_have_no_embeddings(model: ScaleDownModel) -> None:
    for documents in (["", DOCUMENTS[0]], [""], ["", "", DOCUMENTS[1], {"title": "", "text": ""}]):
        for budget in ("each", "shared"):
            found = model.compress(QUERY, documents, budget=budget)
            assert [bool(len(own)) for own in found] == [document in DOCUMENTS for document in documents]
            scores = model.rerank(QUERY, documents)
            assert all(score < -1000 for own, score in zip(found, scores, strict=True) if not len(own))
            assert model.answer(QUERY, documents, budget=budget, max_new_tokens=4) is not None
    loss = model(**collate([model.reader.encode(QUERY, ["", DOCUMENTS[0]], "1889")])).loss
    assert loss.isfinite()
    assert model(**collate([model.reader.encode(QUERY, [""], "1889")])).loss.isfinite()


def test_labels_cover_only_the_uncut_document(models: dict[str, Path]) -> None:
    model = build(models, doc_max_length=8)
    late = "wind " * 20 + "gravity oceans"
    read = model.reader.read("What?", [late, "gravity and more"], "It is gravity in oceans")
    assert not any(read[0].copied)
    assert any(read[1].copied)


def test_cloze_answers_occur_only_once() -> None:
    text = (
        "In the year 1889 the engineer Gustave Eiffel finished his tower in Paris for a fair. "
        "Short one. The tower, which Gustave Eiffel drew, is still painted every seven years or so today."
    )
    found = list(cloze_questions(text, Random(0)))
    assert found
    for cloze in found:
        assert cloze.query.startswith("Fill the gap:")
        assert cloze.query.count("____") == 1
        assert text.count(cloze.answer) == 1
        assert cloze.answer not in cloze.query
    assert list(cloze_questions(text, Random(0))) == found
    assert list(cloze_questions("no names or numbers stand in this rather long sentence", Random(0))) == []
