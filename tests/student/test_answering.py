"""Answers, embeddings, scores and streams of a tiny model."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from scaledown.data.prompts import answer_prompt
from scaledown.data.teacher.base import TeacherSettings, answer_all
from scaledown.data.teacher.engines.transformers import TransformersTeacher
from scaledown.errors import InputError, ModelError, UsageError
from scaledown.models.sources import resolve
from scaledown.student.model import ScaleDownModel
from scaledown.student.settings import ScaleDownConfig

QUERIES = ["What causes tides?", "Why?", "Who wrote the book about the iron tower, and when?"]
DOCUMENTS: list[list[Any]] = [
    ["Tides come and go twice a day.", {"title": "Tides", "text": "The moon causes the tides."}],
    ["No."],
    ["A tower of iron is 300 metres tall and was painted many times over the years.", "A book.", "Wind"],
]


def student(models: dict[str, Path], compressor: str = "n_layers", **settings: Any) -> ScaleDownModel:
    torch.manual_seed(0)
    small = {"num_layers": 1, "doc_max_length": 32, "query_max_length": 32, "compression_rate": 8}
    config = ScaleDownConfig(compressor=compressor, **{**small, "mapping_width": 64, **settings})
    source = resolve(compressor) if compressor not in {"n_layers", "pointer"} else None
    return ScaleDownModel.build(config, resolve(str(models["causal_lm"])), source)


@pytest.fixture(scope="module", params=["n_layers", "splade", "pointer"])
def model(models: dict[str, Path], request: pytest.FixtureRequest) -> ScaleDownModel:
    if request.param == "pointer":
        made = student(models, "pointer")
        for parameter in made.pointer.parameters():  # as if it had learned something
            torch.nn.init.normal_(parameter, std=0.3)
        return made.eval()
    compressor = "n_layers" if request.param == "n_layers" else str(models[request.param])
    return student(models, compressor, enable_reranking=True).eval()


@pytest.mark.parametrize("compressed", [True, False])
def test_answers_in_a_batch_equal_single_answers(model: ScaleDownModel, compressed: bool) -> None:
    alone = [
        model.answer(query, documents, max_new_tokens=12, compressed=compressed)
        for query, documents in zip(QUERIES, DOCUMENTS, strict=True)
    ]
    assert len(set(alone)) == 3
    for batch_size in (1, 2, 8):
        together = model.answer(
            QUERIES, DOCUMENTS, max_new_tokens=12, batch_size=batch_size, compressed=compressed
        )
        assert together == alone


def test_text_is_answered_as_the_teacher_does(model: ScaleDownModel, models: dict[str, Path]) -> None:
    """Before training, the generator is the model it was made of."""
    generation = TeacherSettings(max_new_tokens=12)
    teacher = TransformersTeacher(resolve(str(models["causal_lm"])), "cpu", "float32", generation)
    documents = [["Tides come and go twice a day.", "Tides\nThe moon causes the tides."], *DOCUMENTS[1:]]
    prompts = [answer_prompt("", *pair, 0.0) for pair in zip(QUERIES, documents, strict=True)]
    expected = [answer.text for answer in answer_all(teacher, prompts)]
    assert model.answer(QUERIES, DOCUMENTS, max_new_tokens=12, compressed=False) == expected


def test_embeddings_can_be_kept(model: ScaleDownModel, tmp_path: Path) -> None:
    embeddings = model.compress(QUERIES, DOCUMENTS)
    assert [len(own) for own in embeddings] == [2, 1, 3]
    if not model.config.kind.picks_tokens:
        assert {tuple(kept.shape) for own in embeddings for kept in own} == {(4, 32)}
    named = {f"{n} {m}": kept for n, own in enumerate(embeddings) for m, kept in enumerate(own)}
    save_file(named, tmp_path / "kept.safetensors")
    read = load_file(tmp_path / "kept.safetensors")
    kept = [[read[f"{n} {m}"] for m in range(len(own))] for n, own in enumerate(embeddings)]
    expected = model.answer(QUERIES, DOCUMENTS, max_new_tokens=12)
    assert model.answer(QUERIES, kept, max_new_tokens=12) == expected
    # Text and kept embeddings side by side.
    assert model.answer(QUERIES, [kept[0], *DOCUMENTS[1:]], max_new_tokens=12) == expected
    for again, own in zip(model.compress(QUERIES[0], DOCUMENTS[0]), embeddings[0], strict=True):
        assert torch.allclose(again, own, atol=1e-5)
        assert not own.requires_grad


@pytest.mark.parametrize("compressed", [True, False])
def test_a_stream_spells_the_answer(model: ScaleDownModel, compressed: bool) -> None:
    pieces = list(model.stream(QUERIES[0], DOCUMENTS[0], max_new_tokens=12, compressed=compressed))
    assert len(pieces) > 2
    expected = model.answer(QUERIES[0], DOCUMENTS[0], max_new_tokens=12, compressed=compressed)
    assert "".join(pieces).strip() == expected


def test_a_stream_leaves_its_callers_gradients_alone(model: ScaleDownModel) -> None:
    for _ in model.stream(QUERIES[0], DOCUMENTS[0], max_new_tokens=3):
        assert torch.is_grad_enabled()


def test_no_documents_is_one_of_the_ways_to_ask(model: ScaleDownModel) -> None:
    alone = model.answer(QUERIES[0], [], max_new_tokens=8)
    assert alone == model.answer(QUERIES[0], [], max_new_tokens=8, compressed=False)
    assert model.answer(QUERIES, [[], *DOCUMENTS[1:]], max_new_tokens=8)[0] == alone
    assert model.compress("Why?", []) == []
    assert model.rerank(["Why?", "Who?"], [[], ["I."]])[0] == []
    assert model.answer([], []) == []


def test_scores_do_not_depend_on_the_batch(model: ScaleDownModel) -> None:
    together = model.rerank(QUERIES, DOCUMENTS)
    assert [len(scores) for scores in together] == [2, 1, 3]
    for query, documents, scores in zip(QUERIES, DOCUMENTS, together, strict=True):
        assert model.rerank(query, documents, batch_size=1) == pytest.approx(scores, abs=1e-5)


def test_query_changes_the_embeddings(model: ScaleDownModel) -> None:
    first, second = (model.compress(query, ["The moon."]) for query in ("Who?", "When was it?"))
    assert not torch.allclose(first[0], second[0], atol=1e-3)


def test_inference_does_not_change_training(models: dict[str, Path]) -> None:
    model = student(models).train()
    answers = [model.answer(QUERIES, DOCUMENTS, max_new_tokens=8) for _ in range(2)]
    assert answers[0] == answers[1], "dropout was on"
    assert model.training
    assert model.generator.training
    assert torch.is_grad_enabled()


def test_out_of_memory_halves_the_batch(
    models: dict[str, Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = student(models).eval()
    expected = model.answer(QUERIES, DOCUMENTS, max_new_tokens=8)
    forward = model.generator.forward

    def tight(**keywords: Any) -> Any:
        if len(keywords["attention_mask"]) > 1:
            raise RuntimeError("CUDA out of memory")
        return forward(**keywords)

    monkeypatch.setattr(model.generator, "forward", tight)
    assert model.answer(QUERIES, DOCUMENTS, max_new_tokens=8) == expected
    assert "a lower batch_size avoids this" in caplog.text


@pytest.mark.parametrize("method", ["answer", "stream", "rerank", "compress", "prompt_embeddings"])
def test_a_text_is_not_a_list_of_documents(model: ScaleDownModel, method: str) -> None:
    with pytest.raises(InputError, match="put it into a list"):
        list(getattr(model, method)("Why?", "No."))


def test_answers_end_at_an_end_token(models: dict[str, Path]) -> None:
    model = student(models, generator_training="full").eval()
    assert model.generator.generation_config.eos_token_id == [1]
    asked = [model._question("Why?", ["No."], 8, compressed=True)]
    ((_, first), *_) = model._tokens(asked, 8, "each")
    assert model.answer("Why?", ["No."], max_new_tokens=8)
    model.generator.generation_config.eos_token_id = [first]
    assert model.answer("Why?", ["No."], max_new_tokens=8) == ""
    assert list(model.stream("Why?", ["No."], max_new_tokens=8)) == []


@pytest.mark.parametrize("compressed", [True, False])
def test_answers_are_those_of_generate(model: ScaleDownModel, compressed: bool) -> None:
    """The slow way: transformers' own greedy decoding of the same padded prompts."""
    questions = [
        model._question(query, own, 12, compressed=compressed)
        for query, own in zip(QUERIES, DOCUMENTS, strict=True)
    ]
    with torch.no_grad():
        embedded, mask = model.prompts(questions)
        assert 0 in mask, "prompts of one length are not padded"
        written = model.generator.generate(inputs_embeds=embedded, attention_mask=mask, max_new_tokens=12)
    expected = [text.strip() for text in model.tokenizer.batch_decode(written, skip_special_tokens=True)]
    found = model.answer(
        QUERIES, DOCUMENTS, max_new_tokens=12, compressed=compressed, batch_size=len(QUERIES)
    )
    assert found == expected


@pytest.mark.parametrize(
    ("query", "documents", "message"),
    [
        (["Why?"], ["No."], "put it into a list"),
        ("Why?", "No.", "put it into a list"),
        (["Why?"], [], "give a list for each query"),
        ("Why?", [3], "correct it"),
        ("Why?", torch.zeros(2, 3, 31), r"shape \[3, 31\] .* compress the documents with it"),
        ("why " * 5000, ["No."], "or a shorter query"),
        ("Why?", ["No."] * 3000, "give fewer documents"),
    ],
)
def test_unusable_questions_are_refused_with_the_next_step(
    model: ScaleDownModel, query: Any, documents: Any, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        model.answer(query, documents)


def test_cuts_are_warned_about(models: dict[str, Path], caplog: pytest.LogCaptureFixture) -> None:
    model = student(models)
    model.compress("why " * 40, ["tide " * 90, "No."])
    assert "documents cut to 32 tokens, the most that this model compresses: 1;" in caplog.text
    assert "queries cut to 32 tokens, the most that this model compresses: 1;" in caplog.text
    caplog.clear()
    model.answer("Why?", ["tide " * 90], max_new_tokens=1, compressed=False)
    model.answer("Why?", ["No."], max_new_tokens=1)
    assert not caplog.text


def test_wrong_options_are_refused(models: dict[str, Path]) -> None:
    model = student(models)
    with pytest.raises(UsageError, match="train one with --enable_reranking"):
        model.rerank("Why?", ["No."])
    with pytest.raises(InputError, match="give the documents"):
        model.answer("Why?", model.compress("Why?", ["No."]), compressed=False)
    with pytest.raises(UsageError, match="batch_size 0: must be at least 1"):
        model.answer("Why?", ["No."], batch_size=0)
    with pytest.raises(UsageError, match="max_new_tokens 0"):
        model.answer("Why?", ["No."], max_new_tokens=0)


def test_single_text_without_enough_memory_is_an_error(
    models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = student(models)

    def never(*_: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(model, "compress_ids", never)
    with pytest.raises(ModelError, match="use a smaller model"):
        model.compress("Why?", ["No."])


def test_embeddings_of_no_documents_are_no_documents(models: dict[str, Path]) -> None:
    model = student(models)
    none = model.compress("Why?", [])
    assert none == []
    assert model.answer("Why?", none, max_new_tokens=5) == model.answer("Why?", [], max_new_tokens=5)
    mixed = model.answer(["Why?", "Why?"], [none, ["Because."]], max_new_tokens=5)
    assert mixed == [model.answer("Why?", own, max_new_tokens=5) for own in ([], ["Because."])]
