"""The engine alone: many requests at once, pieces of text, failures that stay with their own."""

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from asked import Asked
from scaledown.config.serve import ServeConfig
from scaledown.serving.answer_text import AnswerText
from scaledown.serving.embedding_cache import EmbeddingCache
from scaledown.serving.engine import Engine
from scaledown.serving.jobs import End, Job, Piece, Scores
from scaledown.serving.protocol import RequestError
from scaledown.student import decoding
from scaledown.student.engines.base import Sampling
from scaledown.student.engines.steps import _Chance
from scaledown.student.model import ScaleDownModel
from tiny import pointer_student

WORDS = ["tower", "river", "city", "tree", "bird", "stone", "book", "bridge", "moon", "tide", "iron", "bee"]


@pytest.fixture(scope="module")
def model(models: dict[str, Path]) -> ScaleDownModel:
    made: ScaleDownModel = pointer_student(models["causal_lm"])
    return made


@pytest.fixture
def engine(model: ScaleDownModel) -> Iterator[Engine]:
    made = Engine(model, ServeConfig(model="x", batch_size=16, max_waiting=5000))
    made.start(lambda: None)
    yield made
    made.stop(10)
    assert not made._thread.is_alive()


def test_a_thousand_at_once_get_their_own_answers(engine: Engine, model: ScaleDownModel) -> None:
    """Texts in float32: what is batched together changes nothing."""
    queries = [f"What about the {WORDS[n % 12]} {n}?" for n in range(1000)]
    documents = [[f"The {WORDS[n % 11]} has number {n}.", f"{WORDS[n % 7]} {n * 7}"] for n in range(1000)]
    expected = model.answer(queries, documents, max_new_tokens=6, batch_size=50, compressed=False)
    assert len(set(expected)) > 500
    asked = [
        Asked(engine, query, own, compressed=False) for query, own in zip(queries, documents, strict=True)
    ]
    assert [one.text() for one in asked] == expected
    assert engine.running == engine.waiting == 0


@pytest.mark.parametrize("budget", ["each", "shared"])
@pytest.mark.parametrize("rate", [4, 16])
def test_compressed_answers_are_those_of_the_model(
    engine: Engine, model: ScaleDownModel, budget: str, rate: int
) -> None:
    queries = [f"What about the {word}?" for word in WORDS]
    documents = [
        [f"A {word} by the {other} is old, tall and far away." for other in WORDS[: n + 1]]
        for n, word in enumerate(WORDS)
    ]
    ways = {"compression_rate": rate, "budget": budget}
    expected = [
        model.answer(*pair, max_new_tokens=6, **ways) for pair in zip(queries, documents, strict=True)
    ]
    for _ in range(2):  # the second time from the cache
        asked = [
            Asked(engine, *pair, rate=rate, budget=budget) for pair in zip(queries, documents, strict=True)
        ]
        assert [one.text() for one in asked] == expected
    assert engine.hits == (sum(map(len, documents)) if budget == "each" else 0)


def test_usage_counts_positions_and_compression(engine: Engine, model: ScaleDownModel) -> None:
    documents = ["The tower by the river is old.", "A bird."]
    read = model.reader.encode("Why?", documents, rate=4)
    end = Asked(engine, "Why?", documents, rate=4, max_new_tokens=3).all()[-1]
    assert isinstance(end, End)
    tokens = [one.stop - one.start for one in read.documents]
    embeddings = sum(-(-count // 4) for count in tokens)
    assert end.usage == (read.prompt_length, 3, sum(tokens), embeddings, 0, 0, 0)
    assert end.reason == "length"
    end = Asked(engine, "Why?", documents, compressed=False, max_new_tokens=3).all()[-1]
    assert isinstance(end, End)
    assert end.usage.embeddings == end.usage.document_tokens == 0
    assert end.usage.prompt == model.reader.encode_text("Why?", documents, 3).prompt_length


def test_scores_are_those_of_the_model(engine: Engine, model: ScaleDownModel) -> None:
    documents = [f"The {word} is old and stands by the road." for word in WORDS]
    (found,) = Asked(engine, "Which tower?", documents, ranks=True).all()
    assert isinstance(found, Scores)
    assert found.relevance == pytest.approx(model.rerank("Which tower?", documents), abs=1e-5)


def test_a_request_that_cannot_be_read_fails_alone(engine: Engine, model: ScaleDownModel) -> None:
    long = "very " * model.reader.context
    bad = [
        Asked(engine, long, ["A."], compressed=False),
        Asked(engine, "Why?", ["A."], max_new_tokens=model.reader.context),
    ]
    good = Asked(engine, "Why?", ["No."])
    for one in bad:
        (error,) = one.all()
        assert isinstance(error, RequestError)
        assert error.status == 400
    assert good.text() == model.answer("Why?", ["No."], max_new_tokens=6)


def test_chance_depends_on_the_seed_alone(engine: Engine) -> None:
    def written(seed: int, top_p: float = 1.0) -> str:
        return Asked(engine, "Why?", ["No."], temperature=1.5, seed=seed, top_p=top_p).text()

    assert written(1) == written(1)
    assert len({written(seed) for seed in range(8)}) > 4
    assert len({written(seed, 1e-9) for seed in range(4)}) == 1, "the likeliest only"


def test_chances_are_those_of_the_model_without_sorting_the_vocabulary(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def sorts(*_: Any, **__: Any) -> None:
        raise AssertionError

    monkeypatch.setattr(torch.Tensor, "sort", sorts)
    chance = _Chance(Sampling(1, temperature=0.5, seed=0))
    drawn = [chance.draw(torch.tensor([0.0, 1.0, -9.0, 0.5])) for _ in range(2000)]
    expected = torch.tensor([0.0, 2.0, -18.0, 1.0]).softmax(-1).tolist()
    assert [drawn.count(token) / 2000 for token in range(4)] == pytest.approx(expected, abs=0.04)


@pytest.mark.parametrize("extreme", [{"temperature": 1e-40}, {"temperature": 1.0, "top_p": 1e-50}])
def test_extremes_of_chance_give_the_likeliest(
    engine: Engine, model: ScaleDownModel, extreme: dict[str, float]
) -> None:
    expected = model.answer("Why?", ["No."], max_new_tokens=6)
    assert Asked(engine, "Why?", ["No."], seed=1, **extreme).text() == expected


def test_logits_that_are_no_numbers_end_their_own_request(
    engine: Engine, model: ScaleDownModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> int:
        raise RuntimeError("probability tensor contains either inf, nan or element < 0")

    monkeypatch.setattr("scaledown.student.engines.steps._Chance.draw", fails)
    greedy = [Asked(engine, f"Why {n}?", ["No."]) for n in range(3)]
    (error,) = Asked(engine, "Why?", ["No."], temperature=1.0).all()
    assert isinstance(error, RequestError)
    assert error.status == 500
    assert [one.text() for one in greedy] == [
        model.answer(f"Why {n}?", ["No."], max_new_tokens=6) for n in range(3)
    ]
    assert not engine._failures


def test_cancelled_request_makes_room(model: ScaleDownModel) -> None:
    engine = Engine(model, ServeConfig(model="x", batch_size=1, max_new_tokens=3_900))
    engine.start(lambda: None)
    try:
        first = Asked(engine, "Why?", ["No."], max_new_tokens=3_900, temperature=5.0, seed=0)
        waits = Asked(engine, "Why?", ["No."], max_new_tokens=1)
        never = Asked(engine, "Why?", ["Never."], max_new_tokens=1)
        never.job.cancelled = True
        assert isinstance(first.events.get(timeout=30), Piece)
        first.job.cancelled = True
        assert isinstance(waits.all()[-1], End)
        deadline = time.monotonic() + 30
        while (engine.running or engine.waiting) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert never.events.empty()
    finally:
        engine.stop(10)


def test_no_more_wait_than_may(model: ScaleDownModel) -> None:
    engine = Engine(model, ServeConfig(model="x", batch_size=2, max_waiting=3))  # not started: all wait
    for _ in range(5):
        engine.submit(Job("Why?", [], lambda _: None))
    with pytest.raises(RequestError, match="too many") as error:
        engine.submit(Job("Why?", [], lambda _: None))
    assert error.value.status == 429
    engine._waiting[1].cancelled = True
    engine.submit(Job("Why?", [], lambda _: None))
    assert engine.waiting == 5, "who is gone takes no place"


def failing(
    model: ScaleDownModel, monkeypatch: pytest.MonkeyPatch, error: Callable[[str], Exception | None]
) -> None:
    """Let reading prompts fail for queries, as `error` says."""
    prompts = model.prompts

    def fails(questions: Any, budget: str = "each") -> Any:
        for question in questions:
            text = model.tokenizer.decode([token for part in question.encoded.prompt_parts for token in part])
            if (found := error(text)) is not None:
                raise found
        return prompts(questions, budget)

    monkeypatch.setattr(model, "prompts", fails)


def test_failure_ends_its_requests_and_the_engine_continues(
    engine: Engine, model: ScaleDownModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(model, monkeypatch, lambda text: ValueError("broken") if "poison" in text else None)
    (error,) = Asked(engine, "poison", ["A."]).all()
    assert isinstance(error, RequestError)
    assert error.status == 500
    assert "broken" not in str(error)
    assert Asked(engine, "Why?", ["No."]).text() == model.answer("Why?", ["No."], max_new_tokens=6)


def test_engine_that_keeps_failing_is_logged(model: ScaleDownModel, monkeypatch: pytest.MonkeyPatch) -> None:
    failing(model, monkeypatch, lambda _: ValueError("broken"))
    failed = threading.Event()
    engine = Engine(model, ServeConfig(model="x"))
    engine.start(failed.set)
    for _ in range(3):
        (error,) = Asked(engine, "Why?", ["No."]).all()
        assert isinstance(error, RequestError)
    assert failed.wait(30)
    assert "start the server again" in engine.failed
    with pytest.raises(RequestError) as refused:
        engine.submit(Job("Why?", [], lambda _: None))
    assert refused.value.status == 503
    engine.stop(10)


def test_out_of_memory_halves_the_answers_at_once(
    model: ScaleDownModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts, most = model.prompts, 4

    def small(questions: Any, budget: str = "each") -> Any:
        if len(questions) > most:
            raise torch.OutOfMemoryError
        return prompts(questions, budget)

    monkeypatch.setattr(model, "prompts", small)
    engine = Engine(model, ServeConfig(model="x", batch_size=16))
    asked = [Asked(engine, f"Why {n}?", ["No."]) for n in range(16)]
    engine.start(lambda: None)
    expected = [model.answer(f"Why {n}?", ["No."], max_new_tokens=6) for n in range(16)]
    assert [one.text() for one in asked] == expected
    assert engine._most_rows == 4
    most = 0
    (error,) = Asked(engine, "Why?", ["No."]).all()
    assert isinstance(error, RequestError)
    assert error.status == 413
    assert engine._most_rows == 16, "it was this one, not their number"
    engine.stop(10)


def test_cached_embeddings_are_given_up_for_a_request(
    engine: Engine, model: ScaleDownModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = model.answer("Who?", ["No."], max_new_tokens=6)
    Asked(engine, "Why?", ["No."]).text()
    prompts, room = model.prompts, engine.cached_bytes

    def small(questions: Any, budget: str = "each") -> Any:
        if engine.cached_bytes > room:
            raise torch.OutOfMemoryError
        return prompts(questions, budget)

    monkeypatch.setattr(model, "prompts", small)
    assert Asked(engine, "Who?", ["No."]).text() == expected
    assert 0 < engine.cached_bytes <= room


def test_a_step_without_memory_ends_running_answers(
    model: ScaleDownModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(model.generator.generation_config, "eos_token_id", [])  # no answer ends by itself
    monkeypatch.setattr(decoding.Decoding, "step", fails)
    engine = Engine(model, ServeConfig(model="x", batch_size=16))
    asked = [Asked(engine, "Why?", ["No."]) for _ in range(2)]
    engine.start(lambda: None)
    try:
        for one in asked:
            error = one.all()[-1]
            assert isinstance(error, RequestError)
            assert error.status == 503, "each may fit alone"
        assert engine.cached_bytes
        error = Asked(engine, "Why?", ["No."]).all()[-1]
        assert isinstance(error, RequestError)
        assert error.status == 413
        assert not engine.cached_bytes
    finally:
        engine.stop(10)


def test_running_answers_end_if_memory_does_not_suffice_to_join(
    model: ScaleDownModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model.generator.generation_config, "eos_token_id", [])  # no answer ends by itself
    engine = Engine(model, ServeConfig(model="x", batch_size=4, max_new_tokens=3_900))
    engine.start(lambda: None)
    try:
        first = Asked(engine, "Why?", ["No."], max_new_tokens=3_900, temperature=5.0, seed=0)
        assert isinstance(first.events.get(timeout=30), Piece)
        widened, calls = decoding._padded_rows, []

        def fails(*arguments: Any) -> Any:
            calls.append(1)
            if len(calls) == 6:  # some layer has both rows' keys, and not their values
                raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
            return widened(*arguments)

        monkeypatch.setattr(decoding, "_padded_rows", fails)
        second = Asked(engine, "Why?", ["No."])
        assert second.text() == model.answer("Why?", ["No."], max_new_tokens=6)
        error = first.all()[-1]
        assert isinstance(error, RequestError)
        assert error.status == 503
    finally:
        engine.stop(10)


def test_a_request_that_fails_as_it_begins_ends_no_other(
    model: ScaleDownModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = model.reader.read

    def fails(query: str, *arguments: Any, **keywords: Any) -> Any:
        if "poison" in query:
            raise ValueError("broken")
        return read(query, *arguments, **keywords)

    monkeypatch.setattr(model.reader, "read", fails)
    engine = Engine(model, ServeConfig(model="x", batch_size=4, max_new_tokens=3_900))
    engine.start(lambda: None)
    try:
        first = Asked(engine, "Why?", ["No."], max_new_tokens=40, temperature=5.0, seed=0)
        assert isinstance(first.events.get(timeout=30), Piece)
        for _ in range(4):
            (error,) = Asked(engine, "poison", ["No."]).all()
            assert isinstance(error, RequestError)
            assert error.status == 500
        assert isinstance(first.all()[-1], End)
        assert not engine.failed
    finally:
        engine.stop(10)


def test_engine_that_dies_ends_all_requests(model: ScaleDownModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def dies() -> bool:
        raise SystemExit

    failed = threading.Event()
    engine = Engine(model, ServeConfig(model="x"))
    monkeypatch.setattr(engine, "_admit", dies)
    asked = [Asked(engine, "Why?", ["No."]) for _ in range(3)]
    engine.start(failed.set)
    for one in asked:
        (error,) = one.all()
        assert isinstance(error, RequestError)
        assert error.status == 503
    assert failed.wait(30)
    assert engine.failed


def test_documents_that_are_cut_are_counted(engine: Engine, model: ScaleDownModel) -> None:
    end = Asked(engine, "Why?", ["very " * 200, "No."]).all()[-1]
    assert isinstance(end, End)
    assert end.usage.cut_documents == 1
    assert end.usage.document_tokens <= 2 * model.config.doc_max_length


def test_a_query_that_is_cut_for_the_compressor_is_counted(engine: Engine) -> None:
    cut = {}
    for words, documents in ((1, ["No."]), (200, ["No."]), (200, [])):
        end = Asked(engine, "why " * words, documents).all()[-1]
        assert isinstance(end, End)
        cut[words, len(documents)] = end.usage.cut_queries
    assert cut == {(1, 1): 0, (200, 1): 1, (200, 0): 0}, "without documents the compressor reads nothing"
    (scores,) = Asked(engine, "why " * 200, ["No."], ranks=True).all()
    assert isinstance(scores, Scores)
    assert scores.usage.cut_queries == 1


def test_text_that_does_not_fit_is_counted(engine: Engine, model: ScaleDownModel) -> None:
    documents = ["very " * 100] * 60
    tokens = len(model.tokenizer(documents[0], add_special_tokens=False)["input_ids"])
    end = Asked(engine, "Why?", documents, compressed=False).all()[-1]
    assert isinstance(end, End)
    read = end.usage.prompt + end.usage.cut_tokens
    assert end.usage.cut_tokens > 0
    assert 60 * tokens < read < 60 * tokens + 400, "all documents, what is between them, and the question"
    end = Asked(engine, "Why?", documents[:2], compressed=False).all()[-1]
    assert isinstance(end, End)
    assert end.usage.cut_tokens == 0


def test_stopped_engine_ends_all_requests(model: ScaleDownModel) -> None:
    engine = Engine(model, ServeConfig(model="x", batch_size=1, max_new_tokens=3_900))
    engine.start(lambda: None)
    asked = [Asked(engine, "Why?", ["No."], max_new_tokens=3_900, temperature=5.0, seed=n) for n in range(3)]
    assert isinstance(asked[0].events.get(timeout=30), Piece)
    engine.stop(0.05)
    for one in asked:
        assert isinstance(one.all()[-1], RequestError)
    engine._thread.join(10)
    assert not engine._thread.is_alive()


@pytest.fixture(scope="module")
def tokenizer(models: dict[str, Path]) -> Any:
    return AutoTokenizer.from_pretrained(models["causal_lm"])


@given(
    text=st.text(st.sampled_from("ab c\n.éß語🙂"), max_size=30),
    stop=st.text(st.sampled_from("ab c\né"), max_size=4),
)
def test_pieces_are_the_text_before_the_stop(tokenizer: Any, text: str, stop: str) -> None:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    stops = [stop] if stop else []
    reader, shown = AnswerText(tokenizer, stops), ""
    for token in ids:
        shown += reader.add(token)
        if reader.stopped:
            break
    else:
        shown += reader.rest()
    whole = tokenizer.decode(ids, skip_special_tokens=True)
    assert reader.stopped == (bool(stop) and stop in whole)
    assert shown == (whole.partition(stop)[0] if stop else whole).strip()


def test_cache_drops_the_least_recently_used() -> None:
    cache = EmbeddingCache(1e-9 * 4 * 100)  # a hundred numbers
    for name in (b"a", b"b"):
        cache.put(name, torch.ones(4, 10))
    assert cache.get(b"a") is not None
    cache.put(b"c", torch.ones(4, 10))
    assert cache.get(b"b") is None
    assert cache.get(b"a") is not None
    assert cache.size == 320
    cache.put(b"d", torch.ones(11, 10))
    assert cache.get(b"d") is None, "what has no room at all takes none"
    assert cache.size == 320
    own = torch.ones(100, 10)
    cache.put(b"e", own[:2])
    assert cache.get(b"e").untyped_storage().nbytes() == 80  # type: ignore[union-attr]
