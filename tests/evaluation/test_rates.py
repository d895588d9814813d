"""One pointer evaluated at several rates: what follows the rate is answered anew, and nothing else."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from scaledown.cli import main
from scaledown.data.prompts import VERSION as PROMPT_VERSION
from scaledown.evaluation.results import read_results
from scaledown.models import resolve
from scaledown.store import SCHEMA, fingerprint
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
    assert len(found) == 3, "each way answers in its own words"


def test_another_rate_answers_anew_only_what_it_changes(
    evaluate: Evaluate, monkeypatch: pytest.MonkeyPatch
) -> None:
    answered: list[bool] = []
    answer = ScaleDownModel.answer

    def counted(self: Any, queries: Any, documents: Any, **options: Any) -> Any:
        answered.append(options["compressed"])
        return answer(self, queries, documents, **options)

    monkeypatch.setattr(ScaleDownModel, "answer", counted)
    assert evaluate() == 0
    assert answered == [True, False, False, False]
    answered.clear()
    assert evaluate("--compression_rate", "4") == 0
    assert answered == [True, False], "compressed and pruned"
    answered.clear()
    assert evaluate("--compression_rate", "4", "--budget", "shared") == 0
    assert answered == [True]
    answered.clear()
    assert evaluate("--compression_rate", "8") == 0, "the model's own"
    assert evaluate("--compression_rate", "4") == 0
    assert not answered


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
        expected = fingerprint({"schema": SCHEMA, "stage": system, **settings, **depends})
        assert [folder.name for folder in (work / system).iterdir()] == [expected]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--compression_rate", "3"], "a pointer takes 4 to 32"),
        (["--compression_rate", "-1"], "--compression_rate -1: must not be negative"),
        (["--model", "{student}", "--compression_rate", "4"], "trained for 8 alone"),
        (["--model", "{student}", "--budget", "shared"], "only a pointer shares memory tokens"),
    ],
)
def test_rates_that_the_model_does_not_have(
    evaluate: Evaluate, student: Path, flags: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate("--systems", "compressed", *(flag.format(student=student) for flag in flags)) == 2
    assert said in capsys.readouterr().err
