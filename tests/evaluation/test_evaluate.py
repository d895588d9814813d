"""`scaledown evaluate` on a tiny student: what it measures, keeps, goes on with and refuses."""

import json
import os
import shutil
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import ROOT
from misbehaving import Misbehaving
from scaledown.cli import main
from scaledown.devices import choice
from scaledown.devices.choice import choose_device
from scaledown.evaluation import judge as judging
from scaledown.evaluation import systems
from scaledown.evaluation.results import read_results
from scaledown.evaluation.scoring import _first_of_each_order
from scaledown.metrics import accuracy, f1
from scaledown.models.sources import resolve
from scaledown.run.directory import RunDirectory
from scaledown.student.model import ScaleDownModel
from scaledown.student.settings import ScaleDownConfig
from web import Server

Evaluate = Callable[..., int]
HOSTILE = "<script>alert(1)</script> {answer} <|im_end|> \x1b[31m\u202e ' or 1=1 -- 🙂"


@pytest.fixture(scope="module")
def student(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a model: 4 memory tokens a document of 32 tokens."""
    torch.manual_seed(0)
    config = ScaleDownConfig(
        num_layers=1, doc_max_length=32, query_max_length=32, compression_rate=8, enable_reranking=True
    )
    model = ScaleDownModel.build(config, resolve(str(models["causal_lm"])))
    folder = tmp_path_factory.mktemp("evaluated")
    model.save_pretrained(folder)
    return folder


def records(count: int) -> list[dict[str, Any]]:
    """Questions with ids, two about each article; the last one is hostile."""
    found = [
        {
            "query_id": f"q{number}",
            "query": f"Who painted tower number {number}?",
            "documents": [
                f"Tower {number // 2}\nThe tower was painted by Ada. It stands in Prague. Many came.",
                {"title": "Paint", "text": f"Paint number {number} is red. It dries in an hour."},
            ],
            "answer": "Ada",
            "reranking_scores": [1.0, -1.0],
        }
        for number in range(count)
    ]
    found[5]["reranking_scores"] = [1.0, "high"]
    found[-1] |= {"query": HOSTILE, "documents": [HOSTILE, "x"], "answer": HOSTILE}
    return found


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "held_out.json"
    path.write_text(json.dumps(records(10)))
    return path


@pytest.fixture
def gold(tmp_path: Path) -> Path:
    """Right answers to eight of the ten questions."""
    path = tmp_path / "gold.jsonl"
    lines = [{"question": f"who painted tower number {n}", "answer": ["Ada", "Countess"]} for n in range(5)]
    lines += [{"question": records(10)[n]["query"], "answer": "Ada"} for n in (5, 6, 9, 9)]
    lines.append({"title": "no question"})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def judge_server() -> Iterator[Misbehaving]:
    server = Misbehaving()
    server.text = "1"
    yield server
    server.stop()


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "evaluation"


@pytest.fixture
def evaluate(student: Path, data: Path, gold: Path, output: Path, models: dict[str, Path]) -> Evaluate:
    """Run the command on the tiny student; flags given come last."""

    def command(*flags: str) -> int:
        words = ["evaluate", "--model", str(student), "--gold", str(gold)]
        words += [] if "--data" in flags else ["--data", str(data)]
        words += ["--output_dir", str(output), "--max_new_tokens", "6", "--device", "cpu"]
        words += ["--pruning_reranker", str(models["cross_encoder"]), *flags]
        return main(words)

    return command


def lines(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "answers.jsonl").read_text().splitlines()]


def test_evaluation_data_may_be_at_a_url(
    evaluate: Evaluate,
    output: Path,
    data: Path,
    gold: Path,
    server: Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SCALEDOWN_CACHE", str(tmp_path / "cache"))
    server.files = {"held.json": data.read_bytes(), "gold.jsonl": gold.read_bytes()}
    urls = [server.url(f"{name}?signature=secret", "user:secret@") for name in ("held.json", "gold.jsonl")]
    assert evaluate("--systems", "closed_book", "--data", urls[0], "--gold", urls[1]) == 0
    assert read_results(output).counts["questions"] == 8
    assert "127.0.0.1" in (output / "results.json").read_text()
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and b"secret" in path.read_bytes()]


def test_evaluation_on_training_data_is_reported(
    evaluate: Evaluate,
    student: Path,
    data: Path,
    output: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    trained = tmp_path / "trained"
    shutil.copytree(student, trained)
    digest = RunDirectory(tmp_path / "hashes").content_hash(data)
    remarks = ("8 questions are training data of this model", "the generator was trained without text")
    for share, found in ((0.0, [True, True]), (0.1, [True, False])):
        record = {"inputs": {"train_data": [digest]}, "parameters": {"text_fraction": share}}
        (trained / "settings.json").write_text(json.dumps(record))
        assert evaluate("--model", str(trained), "--output_dir", f"{output}-{share}") == 0
        said = capsys.readouterr().out
        assert [remark in said for remark in remarks] == found
    assert evaluate() == 0
    said = capsys.readouterr().out
    assert not any(remark in said for remark in remarks)


def test_all_systems_are_measured(
    evaluate: Evaluate, output: Path, student: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate() == 0
    out = capsys.readouterr().out
    assert "8 questions about 5 articles, gold answers" in out
    assert "2 of 10 records have no right answer: left out" in out
    assert "1 questions of --gold come again: all their answers count" in out
    assert "1 rows of --gold hold no question: passed over, the log names them" in out
    assert "against uncompressed" in out
    assert "from 5 articles are rough" in out
    results = read_results(output)
    assert list(results.systems) == ["compressed", "uncompressed", "closed_book", "pruned"]
    assert results.counts["questions"] == 8
    assert results.baseline == "uncompressed"
    assert results.right_answers == "gold"
    assert results.model["memory_tokens"] == 4
    found = lines(output)
    assert [line["gold"] for line in found] == [["Ada", "Countess"]] * 5 + [["Ada"]] * 3
    for system, result in results.systems.items():
        reranks = {"tau", "R@1 order", "R@1 model", "R@1 sum"} if system == "compressed" else set()
        assert result.measures.keys() == {"accuracy", "EM", "F1", "ROUGE-L", "length"} | reranks
        for name, measure in (("accuracy", accuracy), ("F1", f1)):
            scores = [line["answers"][system][name] for line in found]
            expected = [measure(line["answers"][system]["answer"], line["gold"]) for line in found]
            assert scores == expected
            assert result.measures[name].mean == pytest.approx(sum(scores) / 8)
            assert result.measures[name].n == 8
        words = [len(line["answers"][system]["answer"].split()) for line in found]
        assert result.measures["length"].mean == pytest.approx(sum(words) / 8)
        assert bool(result.differences) == (system != "uncompressed")
        assert result.differences.keys().isdisjoint({"tau", "length"})
    # Each system is the same model, used in another way.
    model = ScaleDownModel.from_pretrained(str(student))
    query = "Who painted tower number 0?"
    documents = [
        "Tower 0\nThe tower was painted by Ada. It stands in Prague. Many came.",
        "Paint\nPaint number 0 is red. It dries in an hour.",
    ]
    first = {name: own["answer"] for name, own in found[0]["answers"].items()}
    assert first["compressed"] == model.answer(query, documents, max_new_tokens=6)
    assert first["uncompressed"] == model.answer(query, documents, max_new_tokens=6, compressed=False)
    assert first["closed_book"] == model.answer(query, [], max_new_tokens=6)
    assert len(set(first.values())) == 4
    ours = model.rerank(query, documents)
    assert found[0]["answers"]["compressed"]["tau"] == (1 if ours[0] > ours[1] else -1)
    assert found[5]["answers"]["compressed"]["tau"] is None  # the teacher's scores of that record are none


@pytest.mark.plots
def test_measures_are_reported_separately_by_whether_documents_hold_an_answer(
    evaluate: Evaluate, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate("--systems", "uncompressed", "closed_book") == 0
    printed = capsys.readouterr().out
    assert "held (7)" in printed
    assert "not held (1)" in printed
    assert "Questions whose documents hold a right answer" in (output / "report.html").read_text()
    results, found = read_results(output), lines(output)
    assert results.counts["held"] == 7
    assert [line["held"] for line in found] == [True] * 7 + [False], "the documents of the last say nothing"
    for system, result in results.systems.items():
        for group, held, count in ((result.held, True, 7), (result.not_held, False, 1)):
            assert group.keys() == result.measures.keys()
            for name, own in group.items():
                scores = [line["answers"][system][name] for line in found if line["held"] == held]
                assert own.n == count
                assert own.mean == pytest.approx(sum(scores) / count)


def test_measures_are_not_separated_if_all_documents_hold_the_answer(
    evaluate: Evaluate, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate("--systems", "closed_book", "--num_examples", "3") == 0
    assert "not held" not in capsys.readouterr().out
    result = read_results(output).systems["closed_book"]
    assert result.held == result.measures
    assert not result.not_held


@pytest.mark.parametrize(
    ("own", "given", "holding", "expected"),
    [
        ([1.0, 2.0, 0.0], [5.0, 0.0, 0.0], [True, False, False], [1, 0, 1]),
        ([1.0, 2.0], [0.5, 0.5], [False, True], [0, 1, 1]),  # the data's scores say nothing
        ([2.0, 2.0], [0.0, 100.0], [True, False], [1, 1, 0]),  # the earlier of two that are alike
        # Thousands do not drown ones: standardised, both count the same.
        ([9.0, 0.0, 8.9], [3000.0, 1000.0, 3100.0], [False, False, True], [0, 0, 1]),
        ([1.0, 2.0], None, [True, True], [1, 1, None]),
        ([1.0, 2.0], [1.0, 2.0], [False, False], [None, None, None]),
        (None, [1.0, 2.0], [True, False], [None, None, None]),
        ([], None, [], [None, None, None]),
    ],
)
def test_the_first_document_of_each_order(own: Any, given: Any, holding: Any, expected: Any) -> None:
    names = ("R@1 order", "R@1 model", "R@1 sum")
    assert _first_of_each_order(own, given, holding) == dict(zip(names, expected, strict=True))


def test_second_call_reads_results_without_importing_torch(
    evaluate: Evaluate, output: Path, student: Path, data: Path, gold: Path, models: dict[str, Path]
) -> None:
    assert evaluate() == 0
    before = (output / "results.json").read_bytes()
    script = (
        "import sys; from scaledown.cli import main; status = main(sys.argv[1:]); "
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules; sys.exit(status)"
    )
    config = ["evaluate", "--config", str(output / "results.json")]
    done = subprocess.run(
        [sys.executable, "-c", script, *config], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "8 questions" in done.stdout
    assert (output / "results.json").read_bytes() == before


def test_finished_answers_are_not_repeated(
    evaluate: Evaluate, output: Path, monkeypatch: pytest.MonkeyPatch, judge_server: Misbehaving
) -> None:
    assert evaluate("--systems", "compressed", "closed_book") == 0
    answered: list[str] = []
    answer = ScaleDownModel.answer

    def counted(self: Any, queries: Any, documents: Any, **options: Any) -> Any:
        answered.extend("compressed" if options["compressed"] else "text" for _ in queries)
        return answer(self, queries, documents, **options)

    monkeypatch.setattr(ScaleDownModel, "answer", counted)
    first = lines(output)
    assert evaluate("--systems", "compressed", "closed_book", "uncompressed") == 0
    assert answered == ["text"] * 8
    judge = ["--judge_model", "wise-owl", "--teacher_endpoint", judge_server.url]
    assert evaluate("--systems", "compressed", "closed_book", *judge) == 0
    assert answered == ["text"] * 8
    for line, before in zip(lines(output), first, strict=True):
        assert line["answers"]["compressed"] == before["answers"]["compressed"] | {"judge": 1.0}
    # Another seed measures anew, and asks nobody.
    asked = len(judge_server.bodies)
    assert evaluate("--systems", "compressed", "closed_book", *judge, "--seed", "5") == 0
    assert answered == ["text"] * 8
    assert len(judge_server.bodies) == asked


@pytest.mark.slow
def test_killed_midway_the_same_command_continues(
    evaluate: Evaluate, output: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, forked: None
) -> None:
    assert evaluate("--output_dir", str(tmp_path / "undisturbed"), "--batch_size", "2") == 0
    # A process that dies without a word after its second system.
    script = tmp_path / "die.py"
    script.write_text(
        "import os, signal, sys\n"
        "from scaledown.evaluation import systems\n"
        "answer = systems.answer_shards\n"
        "def dying(stage, *rest):\n"
        "    if stage.name == 'closed_book':\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    answer(stage, *rest)\n"
        "systems.answer_shards = dying\n"
        "from scaledown.cli import main\n"
        "main(sys.argv[1:])\n"
    )
    repeated = ["evaluate", "--config", str(tmp_path / "undisturbed" / "results.json")]
    words = [sys.executable, str(script), *repeated, "--output_dir", str(output)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    assert subprocess.run(words, env=environment, capture_output=True, check=False).returncode == -9
    assert not (output / "results.json").exists()
    answered = []
    answer = systems.answer_shards
    monkeypatch.setattr(
        systems,
        "answer_shards",
        lambda stage, *rest: (answered.append(bool(stage.done())), answer(stage, *rest))[1],
    )
    assert main([*repeated, "--output_dir", str(output)]) == 0
    assert answered == [True, True, False, False]
    for name in ("answers.jsonl",):
        assert (output / name).read_bytes() == (tmp_path / "undisturbed" / name).read_bytes()
    one, other = read_results(output), read_results(tmp_path / "undisturbed")
    assert one.systems == other.systems
    assert one.request == other.request


def test_a_judge_grades_and_prefers(evaluate: Evaluate, output: Path, judge_server: Misbehaving) -> None:
    judge = ["--judge_model", "wise-owl", "--teacher_endpoint", judge_server.url, "--pairwise"]
    judge_server.text = "A"
    assert evaluate("--systems", "compressed", "uncompressed", *judge) == 0
    results = read_results(output)
    # "A" is no grade, and in both orders the first is no preference.
    compressed = results.systems["compressed"]
    assert compressed.counts["no_verdict_judge"] == 8
    assert "judge" not in compressed.measures
    assert compressed.measures["preferred"].mean == 0.5
    assert compressed.differences["preferred"].p_value == 1
    assert "preferred" not in results.systems["uncompressed"].measures
    shown = [body["messages"] for body in judge_server.bodies]
    assert any("0.5: Partially correct" in system["content"] for system, _ in shown)
    assert any("Golden answer: Ada or Countess" in user["content"] for _, user in shown)


def test_judge_without_verdict_is_counted_and_not_a_zero(
    evaluate: Evaluate, output: Path, judge_server: Misbehaving, capsys: pytest.CaptureFixture[str]
) -> None:
    judge_server.text = "I think that \x1b[31m the answer is fine."
    judge = ["--judge_model", "wise-owl", "--teacher_endpoint", judge_server.url]
    assert evaluate("--systems", "compressed", *judge) == 0
    assert "the judge gave no verdict about 8 answers" in capsys.readouterr().out
    assert "judge" not in read_results(output).systems["compressed"].measures
    assert all(line["answers"]["compressed"]["judge"] is None for line in lines(output))


def test_no_reply_is_paid_twice(
    evaluate: Evaluate, output: Path, judge_server: Misbehaving, capsys: pytest.CaptureFixture[str]
) -> None:
    judge = ["--systems", "closed_book", "--judge_model", "wise-owl", "--teacher_endpoint", judge_server.url]
    judge_server.script = lambda number: "" if number < 3 else "401"
    assert evaluate(*judge) == 1
    assert "OPENAI_API_KEY" in capsys.readouterr().err
    assert sum(judge_server.paid.values()) == 3
    judge_server.script = ()
    assert evaluate(*judge) == 0
    answers = [line["answers"]["closed_book"]["answer"] for line in lines(output)]
    assert sum(judge_server.paid.values()) == len(list(filter(None, answers)))
    assert read_results(output).systems["closed_book"].measures["judge"].n == 8


def test_missing_reply_of_the_judge_is_not_a_verdict(
    evaluate: Evaluate, output: Path, judge_server: Misbehaving
) -> None:
    judge_server.context = 1
    judge = ["--judge_model", "wise-owl", "--teacher_endpoint", judge_server.url]
    assert evaluate("--systems", "closed_book", *judge) == 0
    result = read_results(output).systems["closed_book"]
    assert result.counts["no_verdict_judge"] == 8
    quarantined = list((output / "work" / "quarantine").glob("judged_closed_book-*.jsonl"))
    assert len(quarantined) == 1


def test_a_local_judge(evaluate: Evaluate, output: Path, models: dict[str, Path]) -> None:
    """One of random weights: its words are no grades."""
    assert evaluate("--systems", "closed_book", "--judge_model", str(models["instruct"])) == 0
    counts = read_results(output).systems["closed_book"].counts
    graded = read_results(output).systems["closed_book"].measures.get("judge")
    assert counts["no_verdict_judge"] + (graded.n if graded else 0) == 8


def test_the_model_is_gone_before_the_judge_is_loaded(
    evaluate: Evaluate, models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[weakref.ref[Any]] = []
    alive: list[Any] = []
    load, load_teacher = ScaleDownModel.from_pretrained, judging.load_teacher

    def noted(*arguments: Any, **keywords: Any) -> Any:
        model = load(*arguments, **keywords)
        model.itself = [model]  # as parts of libraries refer to each other
        loaded.append(weakref.ref(model))
        return model

    def looked(*arguments: Any) -> Any:
        alive.extend(filter(None, (model() for model in loaded)))
        return load_teacher(*arguments)

    monkeypatch.setattr(ScaleDownModel, "from_pretrained", noted)
    monkeypatch.setattr(judging, "load_teacher", looked)
    assert evaluate("--systems", "closed_book", "--judge_model", str(models["instruct"])) == 0
    assert loaded
    assert not alive


@pytest.mark.parametrize(("deterministic", "given"), [(True, "bfloat16"), (False, "auto")])
def test_judge_gets_the_kept_dtype_only_if_its_bytes_depend_on_it(
    deterministic: bool, given: str, evaluate: Evaluate, models: dict[str, Path], monkeypatch
) -> None:
    dtypes: list[str] = []
    load, engine_of = judging.load_teacher, judging.engine_of

    def noted(source: Any, device: str, dtype: str, *rest: Any) -> Any:
        dtypes.append(dtype)
        return load(source, device, dtype, *rest)

    monkeypatch.setattr(choice, "multiplies_bfloat16", lambda: True)
    monkeypatch.setattr(judging, "load_teacher", noted)
    monkeypatch.setattr(
        judging, "engine_of", lambda name: engine_of(name)._replace(deterministic=deterministic)
    )
    flags = ["--systems", "closed_book", "--judge_model", str(models["instruct"]), "--dtype", "auto"]
    assert evaluate(*flags, "--teacher_backend", "transformers") == 0
    assert dtypes == [given]


def test_without_gold_the_teachers_answers_are_right(
    student: Path, data: Path, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--model", str(student), "--data", str(data), "--output_dir", str(output), "--device", "cpu"]
    assert main(["evaluate", *words, "--systems", "closed_book", "--num_examples", "3"]) == 0
    assert "the teacher's answers taken as right" in capsys.readouterr().out
    results = read_results(output)
    assert results.right_answers == "teacher"
    assert results.counts["records"] == results.counts["questions"] == 3
    assert lines(output)[0]["gold"] == ["Ada"]


def test_a_question_that_does_not_fit_is_counted_and_wrong(
    student: Path, output: Path, tmp_path: Path
) -> None:
    data = tmp_path / "long.jsonl"
    records = [{"query": q, "documents": ["d"], "answer": "a"} for q in ("long " * 5000, "short?")]
    records.append({"query": "q", "documents": [5], "answer": "a"})
    data.write_text("".join(json.dumps(record) + "\n" for record in records))
    words = ["--model", str(student), "--data", str(data), "--output_dir", str(output), "--device", "cpu"]
    assert main(["evaluate", *words, "--systems", "compressed", "--max_new_tokens", "6"]) == 0
    results = read_results(output)
    assert results.counts == {
        "questions": 2,
        "records": 3,
        "unusable": 1,
        "without_right_answer": 0,
        "articles": 2,
        "held": 0,
    }
    assert results.systems["compressed"].counts["errors"] == 1
    assert "the generator takes" in lines(output)[0]["answers"]["compressed"]["error"]
    assert results.systems["compressed"].measures["F1"].n == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give --model DIR and --data FILE, or --run FILE and --qrels FILE"),
        (["--model", "m"], "give --model DIR and --data FILE"),
        (["--model", "{student}", "--data", "nowhere.json"], "--data nowhere.json: there is no such file"),
        (["--model", "/nowhere/m", "--data", "{data}"], "/nowhere/m"),
        (["--model", "{lm}", "--data", "{data}"], "is not a ScaleDown model"),
        (["--model", "{student}", "--data", "{data}", "--gold", "no.jsonl"], "--gold no.jsonl"),
        (["--model", "{student}", "--data", "{empty}"], "holds no records: make some with scaledown prepare"),
        (
            ["--model", "{student}", "--data", "{data}", "--gold", "{other}"],
            "matched by the question's words",
        ),
        (["--model", "{student}", "--data", "{data}", "--pruning_reranker", "/no/r"], "leave pruned out"),
        (["--model", "{student}", "--data", "{data}", "--systems", "magic"], "magic"),
        (["--model", "{student}", "--data", "{data}", "--systems", "pruned", "pruned"], "each once"),
        (["--model", "{student}", "--data", "{data}", "--pairwise"], "--pairwise needs a judge"),
        (["--run", "a.run", "--qrels", "q"], "--run a.run: there is no such file"),
        (["--run", "a.run", "--qrels", "q", "--gold", "g"], "--gold is for answers"),
        (["--model", "{student}", "--data", "{data}", "--output_dir", "{data}"], "is a file: name a folder"),
    ],
)
def test_wrong_usage_is_one_line(
    words: list[str],
    message: str,
    student: Path,
    data: Path,
    models: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.json").write_text("[]")
    (tmp_path / "other.jsonl").write_text('{"question": "why?", "answer": "so"}\n')
    names = {"student": student, "data": data, "lm": models["causal_lm"]}
    names |= {"empty": tmp_path / "empty.json", "other": tmp_path / "other.jsonl"}
    systems_given = "--systems" in words or "--pruning_reranker" in words or "--run" in words
    small = [] if systems_given or len(words) < 4 else ["--systems", "closed_book", "compressed"]
    assert main(["evaluate", *(word.format(**names) for word in words), *small]) != 0
    error = capsys.readouterr().err
    assert message in error
    assert error.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in error


def test_another_results_file_is_left_alone(
    evaluate: Evaluate, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output.mkdir()
    (output / "results.json").write_text('{"mine": 1}')
    assert evaluate() == 1
    assert "results.json already exists" in capsys.readouterr().err
    assert (output / "results.json").read_text() == '{"mine": 1}'


@pytest.mark.slow
def test_processes_of_torchrun_evaluate_as_one(
    evaluate: Evaluate,
    output: Path,
    tmp_path: Path,
    models: dict[str, Path],
    student: Path,
    data: Path,
    gold: Path,
    forked: None,
) -> None:
    assert evaluate("--output_dir", str(tmp_path / "alone"), "--batch_size", "2") == 0
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    words += ["-m", "scaledown", "evaluate", "--config", str(tmp_path / "alone" / "results.json")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*words, "--output_dir", str(output)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("8 questions about 5 articles") == 1, "one of them tells"
    assert (output / "answers.jsonl").read_bytes() == (tmp_path / "alone" / "answers.jsonl").read_bytes()
    assert read_results(output).systems == read_results(tmp_path / "alone").systems


def test_each_process_of_torchrun_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_device("auto") == "cuda"
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert choose_device("auto") == "cuda:3"
    assert choose_device("cuda") == "cuda:3"
