"""`scaledown compare` on tiny models: trained or taken, evaluated, timed, shown; nothing is done twice."""

import csv
import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from scaledown.cli import main
from scaledown.config.train import TrainConfig
from scaledown.devices import choice
from scaledown.errors import UsageError
from scaledown.evaluation import compare as command
from scaledown.models.sources import resolve
from scaledown.student.model import ScaleDownModel
from scaledown.student.settings import ScaleDownConfig
from scaledown.student.training import run as run_of_training

pytestmark = pytest.mark.plots

Compare = Callable[..., int]

COST = ["--cost_documents", "2", "--cost_document_tokens", "16", "--cost_query_tokens", "4"]
HOSTILE = "Tower <script>hit()</script>"
COST += ["--cost_new_tokens", "3", "--cost_repeats", "1"]


@pytest.fixture(scope="module")
def students(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Models of two rates and, of the second, with two layers and a reranking head."""
    folders = {}
    for name, rate, layers in (("rate16", 16, 1), ("rate8", 8, 2)):
        torch.manual_seed(0)
        config = ScaleDownConfig(
            num_layers=layers, doc_max_length=32, compression_rate=rate, enable_reranking=layers == 2
        )
        folders[name] = tmp_path_factory.mktemp("compared") / name
        ScaleDownModel.build(config, resolve(str(models["causal_lm"]))).save_pretrained(folders[name])
    return folders


@pytest.fixture
def data(tmp_path: Path) -> Path:
    records = [
        {
            "query": f"Who painted {HOSTILE} {n}?",
            "documents": [
                f"Tower {n // 2}\nAda painted it.",
                "Bees\nThey make honey.",
            ],
            "answer": "Ada",
            "reranking_scores": [1.0, 0.0],
        }
        for n in range(6)
    ]
    path = tmp_path / "held_out.json"
    path.write_text(json.dumps(records))
    return path


@pytest.fixture
def compare(data: Path, tmp_path: Path) -> Compare:
    def run(*words: str) -> int:
        given = ["--output_dir", str(tmp_path / "out"), "--device", "cpu"]
        given += [] if "--data" in words else ["--data", str(data)]
        given += ["--max_new_tokens", "3", "--cost_batches", "1", "2", *COST]
        return main(["compare", *given, "--seed", "0", *words])

    return run


def settings(path: Path, **parameters: Any) -> str:
    path.write_text(json.dumps(parameters))
    return str(path)


def test_page_tables_and_summary(compare: Compare, students: dict[str, Path], tmp_path: Path, capsys) -> None:
    assert compare(*map(str, students.values()), "--cost_document_tokens", "0") == 0
    out = capsys.readouterr().out
    for text in ("2 runs", "rate16", "first 2 layers, reranking", "8x", "uncompressed", "closed_book"):
        assert text in out
    page = (tmp_path / "out" / "comparison.html").read_text()
    for text in (
        "Accuracy against FLOPs",
        "Accuracy against time of a query, batches of 2",
        "by compression rate",
        "with 2 documents of 32,",  # as many tokens as the models compress
    ):
        assert text in page
    card = (tmp_path / "out" / "comparison.md").read_text()
    assert "| rate16 | embeddings | 2 |" in card
    assert "| rate8 | text | 1 |" in card
    with (tmp_path / "out" / "comparison.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["run"] for row in rows} == {"rate16", "rate8"}
    flops = {
        (row["run"], row["system"]): float(row["value"])
        for row in rows
        if row["measure"] == "generation FLOPs" and row["batch"] == "1"
    }
    assert flops["rate16", "compressed"] < flops["rate8", "compressed"] < flops["rate8", "uncompressed"]
    (accuracy,) = [
        row
        for row in rows
        if (row["run"], row["system"], row["measure"]) == ("rate8", "compressed", "accuracy")
    ]
    assert accuracy["n"] == "6"


def test_all_runs_are_computed_in_the_dtype_of_the_first(
    compare: Compare, students: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if the command goes on where the processor has no bfloat16."""
    both = [*map(str, students.values()), "--baselines", "uncompressed"]
    monkeypatch.setattr(choice, "multiplies_bfloat16", lambda: True)
    evaluate = command.evaluate

    def interrupted(config: Any, **keywords: Any) -> Any:
        if config.output_dir.endswith("rate8"):
            raise KeyboardInterrupt
        return evaluate(config, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(command, "evaluate", interrupted)
        assert compare(*both) == 130
    monkeypatch.setattr(choice, "multiplies_bfloat16", lambda: False)
    assert compare(*both) == 0
    folder = tmp_path / "out" / "evaluations"
    found = [json.loads(path.read_text())["dtype"] for path in folder.rglob("compressed/*/settings.json")]
    assert found == ["torch.bfloat16"] * 2


def test_page_names_batches_left_out_for_memory(
    compare: Compare, students: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure = command.costs
    monkeypatch.setattr(command, "costs", lambda model, _, **way: measure(model, [1], **way))
    assert compare(str(students["rate8"])) == 0
    for page in ("comparison.html", "comparison.md"):
        assert "rate8 in batches of 2: left out" in (tmp_path / "out" / page).read_text()


def test_a_pointer_is_compared_as_others_are(
    compare: Compare, models: dict[str, Path], students: dict[str, Path], tmp_path: Path
) -> None:
    config = ScaleDownConfig(compressor="pointer", num_layers=1, doc_max_length=32, compression_rate=8)
    folder = tmp_path / "pointing"
    ScaleDownModel.build(config, resolve(str(models["causal_lm"]))).save_pretrained(folder)
    assert compare(str(folder), str(students["rate8"])) == 0
    card = (tmp_path / "out" / "comparison.md").read_text()
    assert "| pointing | pointer on first 1 layers | 8x |" in card
    assert "| pointing | embeddings | 2 |" in card
    with (tmp_path / "out" / "comparison.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["run"] == "pointing"]
    assert {row["num_layers"] for row in rows} == {"1"}
    flops = [float(row["value"]) for row in rows if row["measure"] == "compression FLOPs"]
    assert flops[0] > 0, "of compressed answers"
    assert {"R@1 model", "tau"} <= {row["measure"] for row in rows}


def test_a_pointer_is_compared_at_several_rates(
    compare: Compare, models: dict[str, Path], students: dict[str, Path], tmp_path: Path
) -> None:
    config = ScaleDownConfig(compressor="pointer", num_layers=1, doc_max_length=32, compression_rate=8)
    folder = tmp_path / "pointing"
    ScaleDownModel.build(config, resolve(str(models["causal_lm"]))).save_pretrained(folder)
    words = ["--compression_rates", "4", "32", "--budget", "shared"]
    baselines = ["--baselines", "uncompressed", "first", "echo", "echo_span"]
    assert compare(str(folder), str(students["rate8"]), *words, *baselines) == 0
    card = (tmp_path / "out" / "comparison.md").read_text()
    for row in (
        "pointing-4x | pointer on first 1 layers | 4x",
        "pointing-32x | pointer on first 1 layers | 32x",
    ):
        assert card.count(f"| {row} |") == 1
    assert card.count("| rate8 | first 2 layers, reranking | 8x |") == 1, "it has but one rate"
    for system, rates in {"first": ["4x", "32x"], "echo": ["4x", "32x"], "uncompressed": [""]}.items():
        found = [line.split(" | ")[2] for line in card.splitlines() if line.startswith(f"| {system} | ")]
        assert [cell.strip() for cell in found] == rates
    with (tmp_path / "out" / "comparison.csv").open() as file:
        rows = list(csv.DictReader(file))
    sums = {
        run: sum(
            float(row["value"]) for row in rows if row["run"] == run and row["measure"] == "generation FLOPs"
        )
        for run in ("pointing-4x", "pointing-32x")
    }
    assert sums["pointing-4x"] > sums["pointing-32x"], "more embeddings cost more"


def test_differences_are_to_the_first_runs_text(
    compare: Compare, students: dict[str, Path], tmp_path: Path
) -> None:
    assert compare(str(students["rate16"]), str(students["rate8"])) == 0
    out = tmp_path / "out"
    assert "accuracy against uncompressed" in (out / "comparison.md").read_text()
    scores = {}
    for run in ("rate16", "rate8"):
        lines = (out / "evaluations" / run / "answers.jsonl").read_text().splitlines()
        scores[run] = [json.loads(line)["answers"] for line in lines]
    text = [one["uncompressed"]["ROUGE-L"] for one in scores["rate16"]]
    own = [one["compressed"]["ROUGE-L"] for one in scores["rate8"]]
    with (out / "comparison.csv").open() as file:
        found = {(row["run"], row["measure"]): row for row in csv.DictReader(file)}
    shown = float(found["rate8", "ROUGE-L against uncompressed"]["value"])
    assert shown == pytest.approx(sum(a - b for a, b in zip(own, text, strict=True)) / 6)
    assert 0 < float(found["rate8", "ROUGE-L against uncompressed, p"]["value"]) <= 1
    report = (out / "evaluations" / "rate8" / "report.html").read_text()
    assert "hit()" in report
    assert "<script>hit" not in report


def test_all_settings_are_checked_before_training(
    compare: Compare, models: dict[str, Path], data: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    monkeypatch.setattr(run_of_training, "train", None)
    run = settings(tmp_path / "one.json", generator_model=str(models["causal_lm"]), train_data=[str(data)])
    assert compare(run, str(tmp_path / "nowhere")) in {1, 2}
    assert compare(run, "--data", "nowhere.json") in {1, 2}
    assert compare(run, run) in {1, 2}
    assert "unexpected" not in capsys.readouterr().err


def test_runs_that_are_called_alike_have_their_folders_names() -> None:
    assert command._names(["a/model", "b/model/", "c/other.json"]) == ["a-model", "b-model", "other"]


def test_settings_are_trained_first_and_once(
    compare: Compare, models: dict[str, Path], data: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    shared = {"generator_model": str(models["causal_lm"]), "train_data": [str(data)], "batch_size": 2}
    shared |= {
        "max_steps": 2,
        "num_layers": 1,
        "doc_max_length": 32,
        "device": "cpu",
        "report_to": "none",
        "eval_fraction": 0.0,
    }
    runs = [
        settings(tmp_path / "one.json", **shared, compression_rate=16),
        settings(tmp_path / "two.json", **shared, compression_rate=4),
    ]
    assert compare(*runs) == 0
    first = capsys.readouterr().out
    monkeypatch.setattr(command, "costs", None)
    assert compare(*runs) == 0
    assert capsys.readouterr().out == first
    assert len(list((tmp_path / "out" / "models").iterdir())) == 2
    settings(tmp_path / "two.json", **shared | {"max_steps": 1}, compression_rate=4)
    with pytest.raises(TypeError):  # another model: it is timed anew
        compare(*runs, "--debug")
    assert len(list((tmp_path / "out" / "models").iterdir())) == 3


def test_training_logs_the_command_that_repeats_it(
    compare: Compare, models: dict[str, Path], data: Path, tmp_path: Path, monkeypatch
) -> None:
    """For GPUs that are idle: `torchrun … -m scaledown` and this command, then the comparison again."""
    commands: list[list[str]] = []
    asked: list[TrainConfig] = []

    def noted(config: TrainConfig, *, command: str = "", **_: Any) -> None:
        asked.append(config)
        commands.append(shlex.split(command))
        raise UsageError("seen")

    monkeypatch.setattr(run_of_training, "train", noted)
    generator = str(models["causal_lm"])
    path = settings(tmp_path / "one two.json", generator_model=generator, train_data=[str(data)])
    assert compare(path) == 2
    assert main(commands[0]) == 2
    assert asked[0] == asked[1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere"], "nowhere"),
        (["missing.json"], "--config missing.json"),
        (["{rate8}", "{rate8}"], "named twice"),
        (["{rate8}", "--data", "nowhere.json"], "--data nowhere.json: there is no such file"),
        (["{rate8}", "--cost_document_tokens", "64"], "compresses 32 tokens of a document"),
        (["{rate8}", "--baselines", "pruned", "--pruning_reranker", "nowhere/at/all"], "nowhere/at/all"),
        (["{rate8}", "--cost_batches", "0"], "--cost_batches 0"),
        (["{rate8}", "--compression_rates", "many"], "--compression_rates many"),
        (["{rate8}", "--compression_rates", "4", "4"], "name each once"),
        (["{rate8}", "--compression_rates", "4"], "no run is a pointer"),
        (["{rate8}", "--baselines", "echo"], "echo"),
        (["{rate8}", "--cost_documents", "1000"], "lower --cost_documents"),
        (["{rate8}", "--gold", "missing.jsonl"], "missing.jsonl"),
    ],
)
def test_user_errors_are_reported(
    compare: Compare, students: dict[str, Path], words, message, capsys
) -> None:
    assert compare(*(word.format(**students) for word in words)) in {1, 2}
    shown = capsys.readouterr().err
    assert message in shown
    assert "Traceback" not in shown
