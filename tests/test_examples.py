"""The sample data is correct, and the guide's snippets run as files with the bundled models."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from conftest import ROOT, load_script
from scaledown.cli import main

EXAMPLES = ROOT / "examples"


def lines(name: str) -> list[dict]:
    return [json.loads(line) for line in (EXAMPLES / name).read_text(encoding="utf-8").splitlines()]


def test_sample_corpus_has_kilt_lines() -> None:
    articles = lines("corpus.jsonl")
    assert len(articles) == 60
    assert len({article["wikipedia_id"] for article in articles}) == 60
    for article in articles:
        assert article["text"][0] == article["wikipedia_title"] + "\n"
        assert all(paragraph.endswith("\n") for paragraph in article["text"])


def test_three_of_the_sample_queries_have_no_answer_in_the_corpus() -> None:
    queries = lines("queries.jsonl")
    articles = {article["wikipedia_id"]: " ".join(article["text"]) for article in lines("corpus.jsonl")}
    assert [query["query"] for query in queries] == (EXAMPLES / "queries.txt").read_text().splitlines()
    assert len(queries) == 24
    unanswerable = [query for query in queries if not query["answers"]]
    assert len(unanswerable) == 3
    for query in queries:
        for answer in query["answers"]:
            assert answer.lower() in articles[query["wikipedia_id"]].lower()


def run(*words: str, cwd: Path) -> str:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / words[0]), *words[1:]],
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
def test_custom_retrieval(tmp_path: Path, forked: None) -> None:
    run("custom_retrieval.py", "made.json", cwd=tmp_path)
    made = json.loads((tmp_path / "made.json").read_text())
    assert main(["validate", str(tmp_path / "made.json")]) == 0
    assert made[0]["reranking_scores"][1] > made[0]["reranking_scores"][0]
    assert "Sostratus" in made[0]["answer"] or "Ptolemy" in made[0]["answer"]


@pytest.mark.slow
def test_own_corpus(tmp_path: Path, forked: None) -> None:
    out = run("own_corpus.py", cwd=tmp_path).splitlines()
    assert out[1].endswith("1  Tides")
    assert out[4].endswith("2  Chess")


def test_corpus_subset(tmp_path: Path, forked: None) -> None:
    run("corpus_subset.py", str(EXAMPLES / "corpus.jsonl"), "small.json", "7", cwd=tmp_path)
    whole = (EXAMPLES / "corpus.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    assert (tmp_path / "small.json").read_text(encoding="utf-8") == "".join(whole[:7])


def test_mock_data(tmp_path: Path, forked: None) -> None:
    run("mock_data.py", "mock.json", cwd=tmp_path)
    assert main(["validate", str(tmp_path / "mock.json")]) == 0


@pytest.fixture
def demo(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """`examples/demo.py` as a module; it has not run."""
    return load_script(EXAMPLES / "demo.py", monkeypatch)


@pytest.mark.slow
def test_demo_runs_with_small_models(
    demo: ModuleType,
    tiny_flags: list[str],
    models: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    forked: None,
) -> None:
    """All of `make demo` with tiny models. Repeated, it trains, measures and answers nothing."""
    size = demo.Size(
        data=(*tiny_flags, "--retriever_model", "bundled:splade-tiny", "--top_k_retrieval", "2"),
        generator=str(models["causal_lm"]),
        layers=1,
        cloze_steps=1,
        cloze_batch=2,
        steps=1,
        batch=2,
        new_tokens=4,
    )
    folder = tmp_path / "demo"
    demo.main(folder, size)
    first = capsys.readouterr().out
    assert re.findall(r"^\$ .*scaledown (\w+) ", first, re.MULTILINE) == [
        "prepare",
        "split",
        "pretrain",
        "train",
    ]
    assert "This was a taste. 1 steps of 2 and 1 of 2 examples" in first
    assert "makes many mistakes" in first
    found_out = json.loads((folder / "taste.json").read_text())
    own, others = found_out["losses"]
    assert own != others
    found = re.findall(r"question's (?:own documents)? +(\d+\.\d\d)\n", first)
    assert found == [f"{own:.2f}", f"{others:.2f}"]
    taught, held = (
        json.loads((folder / "split" / f"{name}.json").read_text()) for name in ("train", "held_out")
    )
    assert found_out["query"] in {record["query"] for record in held}
    assert f"\n  {found_out['query']} ({found_out['right']})" in first
    assert not {record["query"] for record in taught} & {record["query"] for record in held}
    assert re.search(r"--leave_out: \d+ of the \d+ articles", (folder / "pretrain.log").read_text())
    (look,) = set(re.findall(r"look: (.+)", first))  # of the data's summary, and at the end
    assert Path(look).is_file()
    assert "train: " in (folder / "train.log").read_text()
    assert "INFO" not in first
    assert len(re.findall(r"^ *next", first, re.MULTILINE)) == 1, "only at the end"
    assert not list(folder.glob("*/checkpoint-*"))

    def again(*_: Any) -> None:
        raise AssertionError("it is known what the student makes of the questions")

    monkeypatch.setattr(demo, "taste", again)
    weights = (folder / "model" / "model.safetensors").stat()
    demo.main(folder, size)
    second = capsys.readouterr().out
    assert second.count("nothing to do: this run is finished") == 3
    assert second.partition("This was a taste")[2] == first.partition("This was a taste")[2]
    assert (folder / "model" / "model.safetensors").stat().st_mtime_ns == weights.st_mtime_ns


@pytest.mark.slow
def test_demo_stops_at_ctrl_c(tmp_path: Path, forked: None) -> None:
    """As on a terminal, all processes of the group get the signal."""
    words = [sys.executable, str(EXAMPLES / "demo.py"), str(tmp_path / "demo")]
    log = tmp_path / "demo" / "prepare.log"
    with subprocess.Popen(
        words, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        until = time.monotonic() + 120
        while not (log.exists() and log.read_text()) and time.monotonic() < until:
            time.sleep(0.1)
        os.killpg(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=120)
    assert process.returncode == 130
    assert errors.strip() == "stopped; the same command goes on from here"


def demo_of_this_code() -> Path | None:
    """The output of the last `make demo`, if no source has changed since; else None."""
    output = ROOT / "demo" / "train_data.json"
    sources = [*(ROOT / "src").rglob("*.py"), *EXAMPLES.glob("*.*"), ROOT / "Makefile"]
    newest = max(path.stat().st_mtime for path in sources)
    return output if output.exists() and output.stat().st_mtime > newest else None


@pytest.mark.slow
def test_demo_answers_most_queries(tmp_path: Path) -> None:
    """The command of `make demo`: nearly all queries get the passage with their answer, and the teacher, a
    model of 135M parameters, answers most. Where `make demo` has not run, with every third query."""
    asked = lines("queries.jsonl")
    output = demo_of_this_code()
    if output is None:
        asked, output = asked[::3], tmp_path / "train_data.json"
        queries = tmp_path / "queries.txt"
        queries.write_text("".join(f"{query['query']}\n" for query in asked))
        flags = ["--preset", "demo", "--queries_file", str(queries), "--output_file", str(output)]
        assert main(["prepare", *flags]) == 0
    made = {record["query"]: record for record in json.loads(output.read_text(encoding="utf-8"))}
    assert list(made) == [query["query"] for query in asked]
    found = answered = 0
    for query in asked:
        record = made[query["query"]]
        documents = " ".join(record["documents"]).lower()
        found += any(answer.lower() in documents for answer in query["answers"])
        answered += any(answer.lower() in record["answer"].lower() for answer in query["answers"])
        assert len(record["documents"]) == len(record["reranking_scores"]) == 3
    answerable = sum(bool(query["answers"]) for query in asked)
    assert found >= 0.95 * answerable, f"{found} of {answerable} have the answer among their documents"
    assert answered >= 0.6 * answerable, f"{answered} of {answerable} are answered"
