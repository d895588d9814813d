"""One pointer at several rates beside its baselines: what each reads and says, what is answered anew."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from scaledown.cli import main
from scaledown.config.evaluate import SYSTEMS, EvaluateConfig
from scaledown.data.prompts import PROMPT_VERSION
from scaledown.evaluation import baselines, systems
from scaledown.evaluation.results import read_results
from scaledown.models.sources import resolve
from scaledown.run.directory import RUN_LAYOUT, fingerprint
from scaledown.student.compressors.pointer import with_neighbours
from scaledown.student.inference.compressing import Pointed
from scaledown.student.model import ScaleDownModel
from scaledown.student.settings import ScaleDownConfig

Evaluate = Callable[..., int]

SMALL: dict[str, Any] = {"num_layers": 1, "doc_max_length": 48, "query_max_length": 32, "compression_rate": 8}


@pytest.fixture(scope="module")
def pointer(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a pointer that picks by random weights."""
    torch.manual_seed(0)
    config = ScaleDownConfig(compressor="pointer", **SMALL)
    model = ScaleDownModel.build(config, resolve(str(models["causal_lm"])))
    for parameter in model.pointer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    folder = tmp_path_factory.mktemp("pointer")
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def student(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a model that compresses at one rate."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("student")
    model = ScaleDownModel.build(ScaleDownConfig(**SMALL), resolve(str(models["causal_lm"])))
    model.save_pretrained(folder)
    return folder


RECORDS = [
    {
        "query": f"Who painted tower number {number}?",
        "documents": [
            f"Paint {number}\nPaint number {number} is red. It dries in an hour, then it is dry for years.",
            f"Tower {number}\nThe tower was painted by Ada. It stands in Prague. Many came to see it there.",
        ],
        "answer": "Ada",
        "reranking_scores": [-1.0, 1.0],
    }
    for number in range(3)
]


@pytest.fixture
def evaluate(pointer: Path, tmp_path: Path, models: dict[str, Path]) -> Evaluate:
    """Run the command on the tiny pointer, or on `--model`; flags given come last."""
    data = tmp_path / "held_out.json"
    data.write_text(json.dumps(RECORDS))

    def command(*flags: str) -> int:
        words = ["evaluate", "--model", str(pointer), "--data", str(data), "--device", "cpu"]
        words += ["--output_dir", str(tmp_path / "out"), "--max_new_tokens", "6"]
        words += ["--keyword_model", "bundled:splade-tiny"]
        return main([*words, "--pruning_reranker", str(models["cross_encoder"]), *flags])

    return command


def answers(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line)["answers"] for line in (folder / "answers.jsonl").read_text().splitlines()]


def test_the_answers_are_those_of_the_rate_and_budget(
    evaluate: Evaluate, pointer: Path, tmp_path: Path
) -> None:
    model = ScaleDownModel.from_pretrained(str(pointer))
    query, documents = RECORDS[0]["query"], RECORDS[0]["documents"]
    found = set()
    for rate, budget in ((0, "each"), (4, "each"), (4, "shared")):
        flags = ["--compression_rate", str(rate), "--budget", budget]
        assert evaluate("--systems", "compressed", *flags) == 0
        expected = model.answer(query, documents, max_new_tokens=6, compression_rate=rate, budget=budget)
        assert answers(tmp_path / "out")[0]["compressed"]["answer"] == expected
        found.add(expected)
        results = read_results(tmp_path / "out")
        assert results.parameters["compression_rate"] == rate
        assert results.model["compression_rate"] == (rate or 8)
        assert results.model["budget"] == budget
        assert results.model["memory_tokens"] == 48 // (rate or 8)
    assert len(found) > 1, "ways differ in their words"


def test_a_pointers_scores_rank_the_documents(
    evaluate: Evaluate, pointer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate("--systems", "compressed", "closed_book") == 0
    assert "R@1 model" in capsys.readouterr().out
    model = ScaleDownModel.from_pretrained(str(pointer))
    for record, found in zip(RECORDS, answers(tmp_path / "out"), strict=True):
        paint, tower = model.rerank(record["query"], record["documents"])
        assert found["compressed"]["R@1 order"] == 0, "the tower's document holds the answer"
        assert found["compressed"]["R@1 model"] == (tower > paint)
        assert found["compressed"]["tau"] == (1 if tower > paint else -1)
        # Of two documents both standardised scores are 1 and -1: they agree, or the first one stays.
        assert found["compressed"]["R@1 sum"] == (tower > paint)
        assert "R@1 order" not in found["closed_book"]
    measures = read_results(tmp_path / "out").systems["compressed"].measures
    assert measures["R@1 order"].n == 3


@pytest.fixture
def answered(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The systems that had to answer, in their order."""
    asked: list[str] = []
    answer = systems.answer_shards

    def noted(stage: Any, *rest: Any) -> None:
        if not stage.done():
            asked.append(stage.name)
        answer(stage, *rest)

    monkeypatch.setattr(systems, "answer_shards", noted)
    return asked


def test_another_rate_budget_or_seed_repeats_only_its_systems(
    evaluate: Evaluate, answered: list[str]
) -> None:
    everything = ["--systems", *SYSTEMS]
    assert evaluate(*everything) == 0
    assert answered == [*SYSTEMS]
    for flags, anew in (
        (["--compression_rate", "4"], {"compressed", "pruned", "first", "keywords", "random", "echo"}),
        (["--compression_rate", "4", "--budget", "shared"], {"compressed", "echo"}),
        (["--compression_rate", "8"], set()),  # the model's own
        (["--compression_rate", "4", "--seed", "5"], {"random"}),
    ):
        answered.clear()
        assert evaluate(*everything, *flags) == 0
        assert set(answered) == anew


def test_stopped_midway_the_same_command_continues(
    evaluate: Evaluate, answered: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    flags = ["--systems", "first", "echo", "random"]
    assert evaluate(*flags, "--output_dir", str(tmp_path / "undisturbed")) == 0
    answered.clear()

    def stop(*_: Any, **__: Any) -> str:
        raise KeyboardInterrupt

    with monkeypatch.context() as broken:
        broken.setattr(baselines, "echo", stop)
        assert evaluate(*flags) != 0
    assert answered == ["first", "echo"]
    assert not (tmp_path / "out" / "results.json").exists()
    answered.clear()
    assert evaluate(*flags) == 0
    assert answered == ["echo", "random"]
    assert answers(tmp_path / "out") == answers(tmp_path / "undisturbed")


def test_pruned_documents_follow_the_rate(evaluate: Evaluate, pointer: Path, tmp_path: Path) -> None:
    import pyarrow as pa

    model = ScaleDownModel.from_pretrained(str(pointer))
    for rate in (4, 16):
        assert evaluate("--systems", "pruned", "--compression_rate", str(rate)) == 0
    sizes = set()
    for folder in (tmp_path / "out" / "work" / "sentences").iterdir():
        with pa.memory_map(str(folder / "000000.arrow")) as source:
            kept = pa.ipc.open_stream(source).read_all().column("documents").to_pylist()
        sizes.add(sum(len(model.tokenizer(text, add_special_tokens=False)["input_ids"]) for text in kept[0]))
    budgets = []
    for rate in (4, 16):
        read = model.reader.read(RECORDS[0]["query"], RECORDS[0]["documents"], rate=rate)
        budgets.append(sum(one.memory for one in read))
    small, large = sorted(sizes)
    assert 0 < small <= budgets[1] < large <= budgets[0]


def test_stages_of_other_models_keep_their_fingerprints(
    evaluate: Evaluate, student: Path, tmp_path: Path
) -> None:
    assert evaluate("--model", str(student)) == 0
    work = tmp_path / "out" / "work"
    only = {name: next((work / name).iterdir()).name for name in ("questions", "sentences")}
    settings = {
        "questions": only["questions"],
        "model": read_results(tmp_path / "out").models["model"],
        "prompts": PROMPT_VERSION,
        "max_new_tokens": 6,
        "batch_size": 8,
        "device": "cpu",
        "dtype": "torch.float32",
    }
    for system in ("compressed", "uncompressed", "closed_book", "pruned"):
        depends = {"sentences": only["sentences"]} if system == "pruned" else {}
        expected = fingerprint({"schema": RUN_LAYOUT, "stage": system, **settings, **depends})
        assert [folder.name for folder in (work / system).iterdir()] == [expected]


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--compression_rate", "3"], "a pointer takes 4 to 32"),
        (["--compression_rate", "-1"], "--compression_rate -1: must not be negative"),
        (["--model", "{student}", "--compression_rate", "4"], "trained for 8 alone"),
        (["--model", "{student}", "--budget", "shared"], "only a pointer shares memory tokens"),
        (
            ["--model", "{student}", "--systems", "echo", "first", "echo_span"],
            "--systems echo: only a pointer picks tokens: evaluate a model trained with --compressor "
            "pointer, or leave echo and echo_span out",
        ),
        (
            ["--systems", "keywords", "--keyword_model", "{dense}"],
            "not a SPLADE model; or leave keywords out",
        ),
        (["--systems", "keywords", "--keyword_model", "/no/model"], "or give --keyword_model"),
    ],
)
def test_systems_that_the_model_cannot_run_are_refused(
    evaluate: Evaluate,
    student: Path,
    models: dict[str, Path],
    flags: list[str],
    expected: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = [flag.format(student=student, dense=models["dense"]) for flag in flags]
    assert evaluate("--systems", "compressed", *words) in {1, 2}
    assert expected in capsys.readouterr().err


CONFIG = EvaluateConfig(
    model="m", data="d", keyword_model="bundled:splade-tiny", max_new_tokens=6, device="cpu", dtype="float32"
)


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the generator was given: documents of each question, and whether they are compressed."""
    given: list[Any] = []
    answer = ScaleDownModel.answer

    def noted(self: Any, queries: Any, documents: Any, **options: Any) -> Any:
        given.append((documents, options.get("compressed", True)))
        return answer(self, queries, documents, **options)

    monkeypatch.setattr(ScaleDownModel, "answer", noted)
    return given


@pytest.mark.parametrize("system", baselines.READERS)
@pytest.mark.parametrize("rate", [4, 16])
def test_the_generator_reads_as_many_tokens_as_compression_takes(
    pointer: Path, read: list[Any], system: str, rate: int
) -> None:
    model = ScaleDownModel.from_pretrained(str(pointer))
    config = replace(CONFIG, compression_rate=rate)
    queries = [record["query"] for record in RECORDS]
    documents = [[*record["documents"], "Tiny."] for record in RECORDS]
    weigh = baselines.weighing(system, config)
    written = baselines.answer_by_baseline(
        system, model, queries, documents, weigh=lambda: weigh, config=config
    )
    assert len(written) == 3
    words = model.get_input_embeddings().weight
    for query, own, embeddings in zip(queries, documents, read[0][0], strict=True):
        for one, rows in zip(model.reader.read(query, own, rate=rate), embeddings, strict=True):
            tokens = one.ids[one.start : one.stop]
            assert len(rows) == one.memory
            ids = [int((words == row).all(1).nonzero()[0]) for row in rows]
            remaining = iter(tokens)
            assert all(token in remaining for token in ids), "a part of the document, in order"
            if system == "first":
                assert ids == tokens[: len(ids)]


@pytest.mark.parametrize("system", baselines.ECHOES)
def test_long_documents_are_reported_once(
    pointer: Path, system: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = ScaleDownModel.from_pretrained(str(pointer))
    queries, documents = ["Where?", "When?"], [["A tower in a town. " * 50], ["A bridge in a city. " * 50]]
    for _ in range(2):
        baselines.answer_by_baseline(system, model, queries, documents, weigh=pytest.fail, config=CONFIG)
    assert [message.partition(";")[0] for message in caplog.messages] == [
        f"documents cut to {model.config.doc_max_length} tokens, the most that this model compresses: 2"
    ] * 2


def test_picked_tokens_give_the_same_answer_as_their_embeddings(pointer: Path) -> None:
    """The tokens that a pointer picks, read as tokens, give its own answer where it carries nothing else."""
    model = ScaleDownModel.from_pretrained(str(pointer))
    torch.nn.init.zeros_(model.pointer.carry.weight)
    query, documents = RECORDS[0]["query"], RECORDS[0]["documents"]

    def weigh(query: str, read: Any) -> list[list[float]]:
        scores = [torch.tensor([own.scores]) for own in model.point(query, [one.text for one in read])]
        return [with_neighbours(own, own > -torch.inf)[0].tolist() for own in scores]

    (found,) = baselines.answer_by_baseline(
        "first", model, [query], [documents], weigh=lambda: weigh, config=CONFIG
    )
    assert found == model.answer(query, documents, max_new_tokens=6)
    assert found != model.answer(query, documents, max_new_tokens=6, compressed=False)


@pytest.mark.parametrize("system", baselines.READERS)
def test_another_generator_reads_the_tokens_as_text(student: Path, read: list[Any], system: str) -> None:
    model = ScaleDownModel.from_pretrained(str(student))
    query, documents = RECORDS[0]["query"], [*RECORDS[0]["documents"], "Tiny."]
    weigh = baselines.weighing(system, CONFIG)
    baselines.answer_by_baseline(system, model, [query], [documents], weigh=lambda: weigh, config=CONFIG)
    (((texts,), compressed),) = read
    assert not compressed
    assert len(texts) == 3
    assert texts[2] == "Tiny.", "it has fewer tokens than memory tokens"
    for text, document in zip(texts, documents, strict=True):
        tokens = baselines.tokenised(model, document)
        kept = baselines.highest(weigh(query, [tokens])[0], model.config.memory_tokens)
        assert len(kept) == min(6, len(tokens.ids))
        if system == "first":
            assert text == model.tokenizer.decode(tokens.ids[:6]).strip()


def test_keywords_weigh_as_the_query_does(pointer: Path) -> None:
    model = ScaleDownModel.from_pretrained(str(pointer))
    keywords = baselines.weighing("keywords", CONFIG)
    query = "Who painted the tower?"
    document = "Ünrelated \U0001f642 words. The TOWER was paintedover by Ada"
    tokens = baselines.tokenised(model, document)
    (weights,) = keywords(query, [tokens])
    encoder, tokenizer = keywords._encoder, keywords._tokenizer
    vector = encoder.queries([query], lambda _: None).toarray()[0]
    pieces = tokenizer(document, add_special_tokens=False, return_offsets_mapping=True)
    for weight, (begin, end) in zip(weights, tokens.spans, strict=True):
        over = [
            vector[piece]
            for piece, (a, b) in zip(pieces["input_ids"], pieces["offset_mapping"], strict=True)
            if a < end and b > begin
        ]
        assert weight == pytest.approx(max(over, default=0.0))
    heaviest = tokens.spans[max(range(len(weights)), key=weights.__getitem__)]
    assert document[slice(*heaviest)].strip().lower() in "tower painted"


def test_ties_go_to_the_earlier_token_and_nothing_comes_last() -> None:
    assert baselines.highest([0.0, 2.0, 0.0, 1.0, 2.0], 1) == [1]
    assert baselines.highest([0.0, 2.0, 0.0, 1.0, 2.0], 4) == [0, 1, 3, 4]
    assert baselines.highest([0.0, 0.0], 5) == [0, 1]
    assert baselines.highest([], 1) == []


def test_random_tokens_are_those_of_the_seed_and_the_question() -> None:
    document = baselines.DocumentTokens("", list(range(40)), [])

    def kept(seed: int, query: str) -> list[int]:
        (weights,) = baselines.weighing("random", replace(CONFIG, seed=seed))(query, [document])
        return baselines.highest(weights, 5)

    assert kept(1, "Why?") == kept(1, "Why?")
    assert len({tuple(kept(seed, query)) for seed in (1, 2) for query in ("Why?", "Who?")}) == 4


def test_echoes_are_the_tokens_that_the_pointer_picks(
    evaluate: Evaluate, pointer: Path, tmp_path: Path
) -> None:
    assert evaluate("--systems", "echo", "echo_span", "--compression_rate", "4", "--budget", "shared") == 0
    model = ScaleDownModel.from_pretrained(str(pointer))
    for record, found in zip(RECORDS, answers(tmp_path / "out"), strict=True):
        picked = model.pick(record["query"], record["documents"], compression_rate=4, budget="shared")
        expected = found["echo"]["answer"]
        assert "".join(expected.split()) == "".join("".join("".join(own) for own in picked).split())
        best = max(
            (score, token)
            for own in model.point(record["query"], record["documents"])
            for score, token in zip(own.scores, own.ids, strict=True)
        )
        span = found["echo_span"]["answer"]
        assert model.tokenizer.decode([best[1]]).strip() in span
        assert any(span in document for document in record["documents"])


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ([[0, 1, 9, 8, 7, 0], [5, 8.9]], "c d"),  # exp(-1) is more than a quarter, exp(-2) less
        ([[0, 0], [0, 3, 3, 0]], "b c"),
        ([[2, 2, 2, 2, 2, 2, 2, 2, 2, 2]], "a b c d e f g h"),
        ([[1, 5, 6, 5.5, 1], [6]], "b c d"),  # the earlier of two best tokens; both neighbours
        ([[], [4]], "a"),
        ([[], []], ""),
        ([], ""),
    ],
)
def test_a_span_grows_while_its_neighbours_are_likely(scores: list[list[float]], expected: str) -> None:
    tokenizer = SimpleNamespace(decode=lambda ids: " ".join("abcdefghij"[one] for one in ids))
    found = [Pointed(list(range(len(own))), own, []) for own in scores]
    model: Any = SimpleNamespace(tokenizer=tokenizer, point=lambda *_: found)
    assert baselines.echo_span(model, "", []) == expected


def test_text_of_tokens_keeps_neighbours_together(pointer: Path) -> None:
    model = ScaleDownModel.from_pretrained(str(pointer))
    text = "Towers were painted, in 1889."
    ids = model.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert baselines.text_of(model, ids, range(len(ids))) == text
    apart = [0, len(ids) - 1]
    expected = " ".join(model.tokenizer.decode([ids[place]]).strip() for place in apart)
    assert baselines.text_of(model, ids, apart) == expected
    assert baselines.text_of(model, ids, []) == ""
