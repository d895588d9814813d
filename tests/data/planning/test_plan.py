"""`scaledown plan` on tiny models: what it says before a run against what the run then does."""

import json
import random
import shutil
from pathlib import Path

import pytest
import torch

from conftest import ROOT
from scaledown import cli
from scaledown.config.prepare import PrepareConfig
from scaledown.data import prepare_dataset as command
from scaledown.data.planning import plan as planning
from scaledown.data.planning import sample as sampling
from scaledown.data.planning import trial
from scaledown.data.workers import gpu_workers
from scaledown.devices.gpus import GIB

RERANK = ("--enable_reranking", "--top_k_retrieval", "6", "--top_k_reranking", "3")


@pytest.fixture
def flags(tiny_flags, corpus, queries, tmp_path) -> list[str]:
    """A whole command, without its name."""
    given = [*tiny_flags, "--corpus_path", str(corpus), "--queries_file", str(queries)]
    return [*given, "--output_file", str(tmp_path / "train_data.json"), *RERANK]


@pytest.fixture
def work(tmp_path) -> Path:
    return tmp_path / "train_data.json.work"


def planned(work: Path) -> dict[str, dict]:
    return {stage["name"]: stage for stage in json.loads((work / "plan.json").read_text())["stages"]}


def shards(work: Path, stage: str) -> list[Path]:
    return sorted(work.glob(f"{stage}/*/*.arrow"))


def generated(path: Path, articles: int) -> Path:
    """A corpus of very different articles, the longest first, as in KILT."""
    words = (ROOT / "LICENSE").read_text().split()
    chance = random.Random(1)
    with path.open("w") as file:
        for number in range(articles):
            length = chance.randrange(20, 1200 if number < articles // 10 else 120)
            text = [" ".join(chance.choices(words, k=12)) + "." for _ in range(length // 12 + 1)]
            file.write(
                json.dumps({"id": number, "title": f"Number {number}", "text": "\n".join(text)}) + "\n"
            )
    return path


def off(estimate: float, real: float) -> float:
    return abs(estimate / real - 1)


def test_plan_of_a_small_run_equals_the_run(flags, work, capsys) -> None:
    assert cli.main(["plan", *flags]) == 0
    shown = capsys.readouterr().out
    estimate = planned(work)
    assert list(estimate) == [
        "queries",
        "passages",
        "vectors",
        "candidates",
        "ranked",
        "answers",
        "reviewed",
        "output",
    ]
    assert [path.name for path in work.iterdir()] == ["plan.json"]
    assert not work.with_suffix("").exists(), "a plan writes no output"
    assert cli.main(["prepare", *flags]) == 0
    stages = json.loads((work / "manifest.json").read_text())["stages"]
    assert estimate["queries"]["rows"] == stages["queries"]["counts"]["queries"] == 4
    assert (
        estimate["passages"]["rows"]
        == estimate["vectors"]["rows"]
        == stages["passages"]["counts"]["passages"]
    )
    for name in stages:
        assert estimate[name]["shards"] == len(shards(work, name))
        real = sum(path.stat().st_size for path in shards(work, name))
        assert off(estimate[name]["disk"], real) < 0.25, name
        assert estimate[name]["seconds"] >= 0
        assert estimate[name]["memory"] > 1e6
        assert any(line.split()[:1] == [name] for line in shown.splitlines())
    assert off(estimate["output"]["disk"], work.with_suffix("").stat().st_size) < 0.25
    last = shown.splitlines()[-1]
    assert last.startswith("next: ")
    assert last.endswith(f"prepare {' '.join(flags)}")
    assert "missing" not in shown
    assert "\x1b" not in shown


def test_summary_has_the_error_of_the_plan(flags, queries, capsys) -> None:
    cli.main(["plan", *flags])
    capsys.readouterr()
    assert cli.main(["prepare", *flags]) == 0
    out = capsys.readouterr().out
    assert "the plan said " in out
    assert ", it took " in out
    assert out.count("   planned ") == 7
    other = [*flags, "--seed", "1"]
    assert cli.main(["prepare", *other]) == 0
    assert "plan" not in capsys.readouterr().out, "that plan was of another command"
    queries.write_text(queries.read_text() + "Who was here?\n")
    assert cli.main(["prepare", *flags]) == 0
    assert "plan" not in capsys.readouterr().out, "that plan was of other queries"


@pytest.mark.parametrize("limit", [0, 700])
def test_a_large_corpus_is_sampled_all_over(limit: int, flags, work, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(sampling, "_BYTES_A_PLACE", 1 << 13)
    corpus = generated(tmp_path / "large.jsonl", 1500)
    assert corpus.stat().st_size > 5 * sampling._PLACES * sampling._BYTES_A_PLACE
    flags += ["--corpus_path", str(corpus), "--passages_per_shard", "1500", "--top_k_retrieval", "3"]
    assert cli.main(["plan", *flags, "--max_corpus_size", str(limit)]) == 0
    estimate = planned(work)
    assert cli.main(["prepare", *flags, "--max_corpus_size", str(limit)]) == 0
    passages = json.loads((work / "manifest.json").read_text())["stages"]["passages"]["counts"]["passages"]
    for name in ("passages", "vectors"):
        files = shards(work, name)
        assert off(estimate[name]["rows"], passages) < 0.1
        assert abs(estimate[name]["shards"] - len(files)) <= max(1, 0.1 * len(files))
        assert off(estimate[name]["disk"], sum(path.stat().st_size for path in files)) < 0.25


@pytest.mark.parametrize("kind", ["gzip", "parquet", "csv", "folder", "texts"])
def test_corpora_that_cannot_be_entered_midway(kind: str, tmp_path, monkeypatch, models) -> None:
    import gzip

    import pyarrow as pa
    import pyarrow.csv
    import pyarrow.parquet

    from scaledown.data.input import files
    from scaledown.data.input.corpus import load_retriever_tokenizer
    from scaledown.models.sources import resolve

    monkeypatch.setattr(sampling, "_BYTES_A_PLACE", 1 << 11)
    monkeypatch.setattr(files, "_CHUNK_BYTES", 1 << 15)
    lines = generated(tmp_path / "large.jsonl", 1500).read_text().splitlines()
    random.Random(2).shuffle(lines)  # the first rows say something about the rest
    records = [json.loads(line) for line in lines]
    path = tmp_path / {"gzip": "c.jsonl.gz", "parquet": "c.parquet", "csv": "c.csv"}.get(kind, "c")
    if kind == "gzip":
        path.write_bytes(gzip.compress("\n".join(lines).encode()))
    elif kind == "parquet":
        pa.parquet.write_table(pa.Table.from_pylist(records), path, row_group_size=100)
    elif kind == "csv":
        pa.csv.write_csv(pa.Table.from_pylist(records), path)
    elif kind == "folder":
        path.mkdir()
        for number in range(30):
            (path / f"{number}.jsonl").write_text("\n".join(lines[number::30]) + "\n")
    else:
        path.mkdir()
        for number, record in enumerate(records[:600]):
            (path / f"{number}.txt").write_text(record["text"])
    config = PrepareConfig(
        retriever_model=str(models["splade"]), queries_file=("q.txt",), output_file="o.json"
    )
    tokenizer = load_retriever_tokenizer(resolve(config.retriever_model), config)
    found = sampling.sample_corpus(config, [path], tokenizer)
    with monkeypatch.context() as patch:
        patch.setattr(sampling, "_BYTES_A_PLACE", 1 << 30)
        whole = sampling.sample_corpus(config, [path], tokenizer)
    assert (found.whole > 1.2, whole.whole) == (True, 1.0)
    assert off(found.cut.passages.num_rows * found.whole, whole.cut.passages.num_rows) < 0.15


def test_missing_models_are_listed_and_the_rest_is_planned(flags, work, capsys) -> None:
    flags += ["--teacher_model", "meta-llama/no-such-model", "--retriever_model", "org/nothing"]
    assert cli.main(["plan", *flags]) == 1
    out = capsys.readouterr().out
    assert "missing: model meta-llama/no-such-model is not on this machine" in out
    assert "missing: model org/nothing is not on this machine" in out
    assert out.count("missing:") == 2
    assert out.splitlines()[-1].startswith("next: ")
    assert "at least" in out
    estimate = planned(work)
    assert estimate["passages"]["rows"] > 10
    assert estimate["ranked"]["seconds"] is not None
    assert estimate["answers"]["disk"] > 0
    for name in ("vectors", "candidates", "answers"):
        assert estimate[name]["seconds"] is None


def test_a_missing_device_is_listed(flags, work, capsys) -> None:
    assert cli.main(["plan", *flags, "--device", "cuda:9"]) == 1
    assert capsys.readouterr().out.count("missing: --device cuda:9") == 1
    assert planned(work)["vectors"]["seconds"] is None


def test_a_full_disk_is_listed(flags, monkeypatch, capsys) -> None:
    usage = shutil.disk_usage("/")._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    assert cli.main(["plan", *flags]) == 1
    assert "missing: disk: " in capsys.readouterr().out


def test_plan_warns_of_days_without_a_gpu(flags, monkeypatch, capsys) -> None:
    monkeypatch.setattr(planning, "_LONG_RUN_SECONDS", 0.0)
    assert cli.main(["plan", *flags]) == 1
    assert "missing: a GPU: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("corpus_path", "", "no article with text"),
        ("corpus_path", '{"id": 1, "text": "A sentence."}\n{"id":\n', "1 of 2 rows read are malformed"),
        ("corpus_path", "[\n", "holds one JSON array"),
        ("queries_file", "\n", "there are no queries"),
    ],
)
def test_unusable_inputs_end_it(name, content, message, flags, tmp_path, capsys) -> None:
    (tmp_path / "bad.txt.jsonl" if name == "corpus_path" else tmp_path / "bad.txt").write_text(content)
    bad = tmp_path / ("bad.txt.jsonl" if name == "corpus_path" else "bad.txt")
    words = [*flags, f"--{name}", str(bad)]
    place = words.index(f"--{name}")
    del words[place : place + 2]
    assert cli.main(["plan", *words]) == 1
    err = capsys.readouterr().err.splitlines()[-1]
    assert err.startswith("error: ")
    assert message in err


def test_a_dry_run_is_a_plan(flags, work, capsys) -> None:
    assert cli.main(["plan", *flags]) == 0
    one, shown = planned(work), capsys.readouterr().out
    assert command.main([*flags, "--dry-run"]) == 0
    other, again = planned(work), capsys.readouterr().out
    for name, stage in one.items():
        for what in ("rows", "shards", "disk"):
            assert stage[what] == other[name][what]
    assert shown.splitlines()[-1] == again.splitlines()[-1]


def test_queries_that_the_teacher_is_to_write(flags, work, monkeypatch, capsys) -> None:
    place = flags.index("--queries_file")
    words = [*flags[:place], *flags[place + 2 :], "--num_synthetic_queries", "5"]
    assert cli.main(["plan", *words]) == 0
    assert planned(work)["queries"]["rows"] == 5
    assert planned(work)["synthetic"]["rows"] is None, "random weights write no question"
    from scaledown.data.teacher import questions

    monkeypatch.setattr(questions, "as_question", lambda text, passage: "What is it?" if len(text) else None)
    assert cli.main(["plan", *words]) == 0
    assert planned(work)["synthetic"]["rows"] >= 5


def test_queries_elsewhere(flags, work, capsys) -> None:
    place = flags.index("--queries_file")
    words = [*flags[:place], *flags[place + 2 :]]
    assert cli.main(["plan", *words, "--download_ms_marco"]) == 0
    assert planned(work)["queries"]["rows"] == 6980
    assert cli.main(["plan", *words, "--query_dataset", "squad"]) == 1
    assert "missing: dataset rajpurkar/squad is not on this machine" in capsys.readouterr().out
    assert planned(work)["answers"]["rows"] is None


@pytest.mark.parametrize(
    ("given", "workers", "hours", "alone"),
    [
        ({}, 8, 0.5, 0.5),
        ({"workers": 2}, 2, 2.0, 2.0),
        ({"tensor_parallel": 4}, 2, 2.0, 0.5),
        ({"tensor_parallel": 2, "workers": 2}, 2, 2.0, 1.0),
        ({"device": "cpu"}, 1, 4.0, 4.0),
    ],
)
def test_stages_on_gpus_are_shared_by_workers(given, workers, hours, alone, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    config = PrepareConfig(query_dataset="q", output_file="o.json", **given)
    assert gpu_workers(config) == workers
    expected = {"answers": hours, "vectors": alone, "ranked": alone, "candidates": 4.0}
    for name, time in expected.items():  # search has the cores of the machine once
        stage = planning.StagePlan(name, 1000, 100, 0, 0, 4 * 3600.0)
        assert planning._shared(stage, config).seconds == time * 3600, name


def test_memory_of_other_processes_and_of_another_gpu_counts(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda number: {0: 70, 1: 20}[number] * GIB)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda number: ((60, 50)[number] * GIB, 80 * GIB))
    assert trial.peak("cuda:1") == 30 * GIB, "torch has 20, and other processes 10"
    assert trial.peak("cuda") == 70 * GIB, "at its peak"


def test_an_engine_that_schedules_itself_is_timed_with_a_full_load(flags, monkeypatch) -> None:
    asked: list[int] = []
    answer_all = trial.answer_all

    def noted(teacher, prompts):
        asked.append(len(prompts))
        return answer_all(teacher, prompts)

    monkeypatch.setattr(trial, "choose_backend", lambda *_: "vllm")
    monkeypatch.setattr(trial, "answer_all", noted)
    assert cli.main(["plan", *flags, "--teacher_batch_size", "2"]) == 0
    assert asked == [1, 4], "one to get ready, and all queries there are"
