"""Runs with several workers, in parts, and with faults have the same bytes, or end with an error."""

import collections
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pytest

import faulty
from conftest import ROOT
from scaledown.config.prepare import PrepareConfig
from scaledown.data import build_index, workers
from scaledown.data import prepare_dataset as command
from scaledown.run.executor import LocalPool, Order
from scaledown.run.logs import LogStyle

RERANK = ("--enable_reranking", "--top_k_retrieval", "6", "--top_k_reranking", "3")
SHARDS = ("--queries_per_shard", "2", "--passages_per_shard", "4")
pytestmark = pytest.mark.slow


class Alone(NamedTuple):
    """The results of a run without workers."""

    output: bytes
    counts: dict[str, Any]


def stage_counts(work: Path) -> dict[str, Any]:
    stages = json.loads((work / "manifest.json").read_text())["stages"]
    return {name: stage["counts"] for name, stage in stages.items()}


@pytest.fixture(scope="module")
def known() -> list[Alone]:
    """A run without workers, made once for all tests, since it does not depend on paths."""
    return []


@pytest.fixture
def run(prepare, queries, corpus, tmp_path, monkeypatch, known, forked) -> Any:
    """Twelve queries over forty articles, and the results of a run without workers."""
    corpus.write_text("".join((ROOT / "examples" / "corpus.jsonl").read_text().splitlines(True)[:40]))
    queries.write_text("".join(f"What is number {number}?\n" for number in range(12)))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    if not known:
        whole = tmp_path / "whole.json"
        assert prepare(*RERANK, *SHARDS, "--output_file", str(whole)) == 0
        known.append(Alone(whole.read_bytes(), stage_counts(Path(f"{whole}.work"))))

    class Run:
        output, work = prepare.output, prepare.work
        bytes, counts = known[0]

        def __call__(self, *flags: str) -> int:
            return prepare(*RERANK, *SHARDS, *flags)

        def lines(self) -> list[dict[str, Any]]:
            return list(map(json.loads, prepare.output.read_text().splitlines()))

    return Run()


@pytest.fixture
def accident(monkeypatch, tmp_path) -> Any:
    """Let workers fail. Returns the file with a line for each failure."""

    def prepare(fault: str) -> Path:
        monkeypatch.setattr(command, "WORK", faulty.TARGET)
        paths = [str(Path(faulty.__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
        monkeypatch.setenv("FAULT", fault)
        monkeypatch.setenv("FAULT_FILE", str(tmp_path / "accidents"))
        return tmp_path / "accidents"

    return prepare


def shards_made(work: Path) -> list[str]:
    return [
        f"{path.parent.parent.name}/{json.loads(line)['shard']}"
        for path in work.glob("*/*/journal.jsonl")
        for line in path.read_text().splitlines()
        if "shard" in line and "seconds" in line
    ]


def test_two_workers_make_each_shard_once(run, capsys) -> None:
    assert run("--workers", "2") == 0
    assert run.output.read_bytes() == run.bytes
    made = shards_made(run.work)
    assert len(made) == len(set(made))
    logs = sorted(path.name[:8] for path in (run.work / "live").glob("*.log"))
    assert logs == ["worker-0", "worker-1"]
    assert run("--workers", "2") == 0
    assert "nothing to do" in capsys.readouterr().out


def test_gpus_that_share_a_teacher_encode_and_rerank_each_by_itself(run, monkeypatch) -> None:
    """Four GPUs that are none; workers say what there is when they start."""
    started: list[tuple[str, str, int]] = []
    start = LocalPool.start

    def noted(self: LocalPool, order: Order, place: int) -> Any:
        gpus = range(place * self._gpus_each, (place + 1) * self._gpus_each)
        ranked = len(list(run.work.glob("ranked/*/*.arrow")))
        assert not list(run.work.glob("answers/*/*.arrow"))
        started.append((order.target.partition(":")[2], ",".join(map(str, gpus)), ranked))
        return start(self, order, place)

    monkeypatch.setattr(LocalPool, "start", noted)
    monkeypatch.setattr(workers, "gpus_here", lambda _: 4)
    assert run("--tensor_parallel", "2", "--teacher_backend", "transformers") == 0
    assert run.output.read_bytes() == run.bytes
    alone = [("find", str(gpu), 0) for gpu in range(4)]
    assert started[:4] == alone
    assert [(target, gpus) for target, gpus, _ in started[4:]] == [("work", "0,1"), ("work", "2,3")]
    assert started[4][2] == 6, "all is ranked"
    made = shards_made(run.work)
    assert len(made) == len(set(made))


@pytest.mark.parametrize(
    ("flags", "gpus", "expected"),
    [
        ((), 1, []),
        ((), 4, [("work", 0)]),
        (("--tensor_parallel", "2"), 4, [("find", 1), ("work", 0)]),
        (("--tensor_parallel", "4"), 4, [("find", 1)]),
        (("--tensor_parallel", "2", "--num_synthetic_queries", "3"), 2, [("ask", 0), ("find", 1)]),
    ],
)
def test_queries_that_the_teacher_writes_come_before_the_other_gpus_work(
    flags, gpus, expected, prepare, corpus, monkeypatch
) -> None:
    shared: list[tuple[str, int]] = []

    def share(config: Any, target: str, runs: Any, gpus_each: int = 0) -> None:
        shared.append((target.partition(":")[2], gpus_each))

    monkeypatch.setattr("scaledown.data.session.enter.share_work", share)
    monkeypatch.setattr(workers, "gpus_here", lambda _: gpus)
    inputs = ("--corpus_path", str(corpus)) if "--num_synthetic_queries" in flags else ()
    prepare(*flags, *inputs, "--teacher_backend", "transformers", inputs=not inputs)
    assert shared == expected


@pytest.mark.parametrize("target", ["ask", "find"])
def test_a_worker_stops_before_the_teacher_answers(target: str, prepare, queries, corpus, tiny_flags) -> None:
    config = PrepareConfig(
        queries_file=(str(queries),),
        corpus_path=(str(corpus),),
        output_file=str(prepare.output),
        **{
            flag.removeprefix("--"): value
            for flag, value in zip(tiny_flags[::2], tiny_flags[1::2], strict=True)
            if flag != "--max_new_tokens"
        },
        enable_reranking=True,
    )
    getattr(command, target)({"config": asdict(config), "log": LogStyle()._asdict()}, "worker-0")
    stages = {path.parent.parent.name for path in prepare.work.glob("*/*/*.arrow")}
    made = {"queries", "passages", "vectors", "candidates", "ranked"}
    assert stages == (made if target == "find" else {"queries"})


def test_parts_run_one_after_the_other_make_the_same_bytes(run, capsys) -> None:
    for part in ("1/3", "0/3"):
        assert run("--shard", part) == 0
        out = capsys.readouterr().out
        assert f"part {part} is done" in out
        assert not run.output.exists()
    assert "2 shards of other parts are missing" in out
    assert run("--shard", "1/3") == 0, "asked again, it has nothing to do"
    assert not run.output.exists()
    assert run("--shard", "2/3") == 0
    assert run.output.read_bytes() == run.bytes
    made = shards_made(run.work)
    assert len(made) == len(set(made))
    assert stage_counts(run.work) == run.counts


def test_call_without_shard_makes_missing_parts(run) -> None:
    assert run("--shard", "1/3") == 0
    assert run() == 0
    assert run.output.read_bytes() == run.bytes


def test_run_works_with_more_parts_than_shards(run) -> None:
    for part in range(8):
        assert run("--shard", f"{part}/8") == 0
    assert run.output.read_bytes() == run.bytes


@pytest.mark.parametrize("part", ["3/3", "1", "a/b", "1/0"])
def test_part_out_of_range_is_refused(part: str, run, capsys) -> None:
    assert run("--shard", part) == 2
    assert "expected I/N" in capsys.readouterr().err


def test_killed_worker_is_replaced(run, accident, capsys) -> None:
    accidents = accident("kill:ranked:2:once")
    assert run("--workers", "2") == 0
    assert len(accidents.read_text().splitlines()) == 1
    assert run.output.read_bytes() == run.bytes
    assert "is dead (SIGKILL)" in capsys.readouterr().err


def test_hanging_worker_is_killed_and_replaced(run, accident, capsys) -> None:
    accident("hang:ranked:1:once")
    assert run("--workers", "1", "--task_timeout", "15") == 0
    assert run.output.read_bytes() == run.bytes
    assert "needs more than 15 s" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("fault", "lost"),
    [("raise:candidates:1", 2), ("kill:ranked:5", 2), ("raise:answers:0", 2), ("kill:vectors:1", 0)],
)
def test_shard_that_kills_its_workers_is_given_up_and_tried_again_later(
    fault: str, lost: int, run, accident, capsys, monkeypatch
) -> None:
    accidents = accident(fault)
    assert run("--workers", "1") == 1
    assert len(accidents.read_text().splitlines()) == 3, "it is tried three times"
    out, err = capsys.readouterr()
    assert "given up: 1 shard was not made, because each worker that tried died" in out
    assert "run the same command again" in err
    assert len(json.loads(run.output.read_text())) == 12 - lost
    stage, shard = fault.split(":")[1:]
    (given_up,) = run.work.glob(f"quarantine/{stage}-*-given-up.jsonl")
    reason = json.loads(given_up.read_text())
    assert reason["shard"] == int(shard)
    assert len(reason["deaths"]) == 3
    manifest = json.loads((run.work / "manifest.json").read_text())
    assert manifest["stages"][stage]["counts"]["given_up"] == 1
    before = collections.Counter(shards_made(run.work))
    monkeypatch.undo()  # the cause is removed
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert run("--workers", "1") == 0
    assert run.output.read_bytes() == run.bytes
    assert not list(run.work.glob("quarantine/*-given-up.jsonl"))
    if stage == "vectors":
        return
    again = collections.Counter(shards_made(run.work)) - before
    assert {name.partition("/")[2] for name in again} == {shard}, "only that shard is made again"


def test_run_ends_if_every_shard_kills_its_worker(run, accident, capsys) -> None:
    accident("raise:queries:0")
    assert run("--workers", "1") == 1
    err = capsys.readouterr().err
    assert "queries: 3 workers died of it" in err
    assert "an accident" in err


def test_user_error_ends_the_run_without_restarting_workers(run, capsys, corpus) -> None:
    corpus.write_text('{"id": "1", "title": "", "text": ""}\n')
    assert run("--workers", "2") == 1
    assert "no article with text" in capsys.readouterr().err


@pytest.mark.parametrize("ends", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_workers_end_with_their_supervisor(ends, run, tiny_flags, corpus, queries) -> None:
    words = [sys.executable, "-m", "scaledown", "prepare", *tiny_flags, *RERANK, *SHARDS, "--workers", "2"]
    inputs = ("--corpus_path", str(corpus), "--queries_file", str(queries))
    with subprocess.Popen(
        [*words, *inputs, "--output_file", str(run.output)],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
    ) as process:
        deadline = time.monotonic() + 120
        while not list(run.work.glob("passages/*/*.arrow")):
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.05)
        workers = psutil.Process(process.pid).children()
        assert len(workers) == 2
        process.send_signal(ends)
        _, err = process.communicate()
    assert psutil.wait_procs(workers, timeout=20)[1] == []
    if ends != signal.SIGKILL:
        assert b"interrupted; finished work is kept" in err
    assert run() == 0
    assert run.output.read_bytes() == run.bytes


def test_two_workers_make_an_index(tiny_flags, corpus, tmp_path) -> None:
    retriever = tiny_flags[tiny_flags.index("--retriever_model") + 1]
    words = ["--corpus_path", str(corpus), "--retriever_model", retriever]
    words += ["--device", "cpu", "--dtype", "float32"]
    folders = [tmp_path / name for name in ("alone", "shared")]
    for folder, more in zip(folders, ([], ["--workers", "2"]), strict=True):
        assert build_index.main([*words, "--index_dir", str(folder), *more]) == 0
    files = [
        {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.arrow")}
        for folder in folders
    ]
    assert files[0] == files[1]
    assert len(files[0]) >= 2


def test_parts_continue_without_a_given_up_shard(run, accident, capsys, monkeypatch) -> None:
    accident("raise:ranked:3")
    assert run("--shard", "1/2", "--workers", "1") == 1, "it is in this part"
    assert "part 1/2 lacks what was given up" in capsys.readouterr().err
    monkeypatch.undo()
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert run("--shard", "0/2") == 1, "all is made but that"
    assert len(json.loads(run.output.read_text())) == 10
    assert run("--shard", "1/2") == 0
    assert run.output.read_bytes() == run.bytes


def test_part_skips_an_index_shard_that_another_gave_up(run, accident, monkeypatch, tmp_path) -> None:
    index = ("--index_dir", str(tmp_path / "index"))
    accident("raise:vectors:1")
    assert run("--shard", "0/2", "--workers", "1", *index) == 1
    monkeypatch.undo()
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert run("--shard", "1/2", *index) == 1, "all is made but for these vectors"
    assert len(list(tmp_path.glob("index/vectors/*/*.absent.json"))) == 1
    assert len(list(run.work.glob("candidates/*"))) == 1, "both parts searched the same vectors"
    assert run(*index) == 0
    assert run.output.read_bytes() == run.bytes
