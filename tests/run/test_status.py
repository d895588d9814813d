"""How far a run is, seen from elsewhere: while it works, when it is finished, and after it was killed."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest

from conftest import ROOT
from scaledown.cli import main
from scaledown.run.directory import RunDirectory
from scaledown.run.heartbeat import processes, publishing
from scaledown.run.progress import track
from scaledown.run.stage import Stage
from scaledown.run.status import Status, status_at, status_of

ROWS = [4, 4, 4, 2]

# A worker: makes shard 0 of `candidates`, does 3 rows of shard 1, and then hangs.
WORKER = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_status import table, opened
from scaledown.run.heartbeat import publishing
from scaledown.run.progress import track
from scaledown.run.directory import RunDirectory

run = RunDirectory(Path(sys.argv[1]), worker="worker-7")
with run.claim("same") as place, publishing(place, "worker-7", run):
    stage = opened(run)[1]
    with track("retrieve", "queries", 14, 0, stage) as tracker:
        def work(shard):
            tracker.advance(4 if shard == 0 else 3)
            if shard:
                print("hangs", flush=True)
                time.sleep(60)
            return table(4)
        stage.complete(4, work)
"""


def table(rows: int) -> pa.Table:
    return pa.table({"row": list(range(rows))})


def opened(run: RunDirectory) -> tuple[Stage, Stage]:
    """A finished stage of queries, and one that is to be made from it."""
    queries = Stage(run, "queries", {"files": 1})
    return queries, Stage(run, "candidates", {"queries": queries.fingerprint}, [queries])


def begun(path: Path) -> RunDirectory:
    run = RunDirectory(path)
    queries, _ = opened(run)
    for shard, rows in enumerate(ROWS):
        queries.write(shard, table(rows), 0.5)
    queries.finish(ROWS, {"queries": sum(ROWS)})
    return run


@contextlib.contextmanager
def hanging_worker(path: Path) -> Iterator["subprocess.Popen[str]"]:
    process = subprocess.Popen(
        [sys.executable, "-c", WORKER, str(path), str(ROOT / "tests" / "run")],
        env={**os.environ, "PYTHONPATH": f"{ROOT / 'src'}:{ROOT / 'tests'}"},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout
        assert process.stdout.readline() == "hangs\n"
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def wait_for(path: Path, rows: int) -> Status:
    """The status once the stage under way has so many rows; words come every second."""
    deadline = time.monotonic() + 10
    while (status := status_of(path)).stages[-1].done != rows:
        assert time.monotonic() < deadline, status
        time.sleep(0.1)
    return status


def everything(path: Path) -> dict[str, tuple[int, bytes]]:
    files = [file for file in sorted(path.rglob("*")) if file.is_file()]
    return {str(file): (file.stat().st_mtime_ns, file.read_bytes()) for file in files}


def test_rows_of_all_processes_count_once_also_when_one_dies(tmp_path: Path) -> None:
    run = begun(tmp_path)
    with hanging_worker(tmp_path) as process:
        status = wait_for(tmp_path, 7)
        stage = status.stages[-1]
        assert (stage.name, stage.unit, stage.finished) == ("candidates", "queries", False)
        assert (stage.shards, stage.shards_planned, stage.rows, stage.rows_planned) == (1, 4, 4, 14)
        assert (stage.rows_in_progress, stage.workers, stage.deaths) == (3, 1, 0)
        assert stage.rate > 0
        assert stage.seconds_left is not None
        (worker,) = status.workers
        assert (worker.worker, worker.pid, worker.alive) == ("worker-7", process.pid, True)
        assert worker.at == "candidates 000001"
        assert worker.seconds_at is not None
        with run.claim("same") as place, publishing(place, "worker-8", run):
            mine = opened(run)[1]
            with track("retrieve", "queries", 14, 4, mine) as tracker:

                def work(shard: int) -> pa.Table:
                    if shard == 1:  # another may die of it while it is this process' turn
                        wait_for(tmp_path, 10)
                    tracker.advance(ROWS[shard])
                    if shard == 3:
                        process.kill()
                        process.wait()
                        wait_for(tmp_path, 4 + 4 + 2)
                        assert len(status_of(tmp_path).workers) == 1
                    return table(ROWS[shard])

                assert mine.complete(4, work)
                mine.finish(ROWS, {"queries": 14})
    stage = status_of(tmp_path).stages[-1]
    assert (stage.done, stage.rows_planned, stage.shards, stage.finished) == (14, 14, 4, True)
    assert stage.deaths == 1


def test_status_changes_no_file(tmp_path: Path, capsys) -> None:
    begun(tmp_path)
    with hanging_worker(tmp_path) as process:
        wait_for(tmp_path, 7)
        process.send_signal(signal.SIGSTOP)  # so that only the one who looks could change anything
        before = everything(tmp_path)
        folders = {path for path in tmp_path.rglob("*") if path.is_dir()}
        assert main(["status", str(tmp_path)]) == 0
        assert main(["status", str(tmp_path), "--json"]) == 0
        assert everything(tmp_path) == before
        assert {path for path in tmp_path.rglob("*") if path.is_dir()} == folders
    out = capsys.readouterr().out
    assert re.search(r"candidates +1/4 +7/14 queries .* left", out) or "7/14 queries" in out
    assert "worker-7" in out


def test_a_killed_run_is_interrupted(tmp_path: Path, capsys) -> None:
    begun(tmp_path)
    with hanging_worker(tmp_path):
        wait_for(tmp_path, 7)
    status = status_of(tmp_path)
    assert [stage.name for stage in status.stages] == ["queries", "candidates"]
    assert (status.stages[-1].done, status.workers, status.finished) == (4, (), False)
    assert [process.alive for process in processes(tmp_path)] == [False]
    assert main(["status", str(tmp_path)]) == 0
    assert "interrupted" in capsys.readouterr().out
    run = RunDirectory(tmp_path)
    with run.claim("same") as place, publishing(place, "", run):
        assert len(processes(tmp_path)) == 1, "what is left of the dead goes"
    assert not list((tmp_path / "live").glob("*.progress"))


def test_status_shows_all_stages_of_a_part(tmp_path: Path) -> None:
    """As after a part of a run, which ended well: nobody says which settings were the last."""
    run = begun(tmp_path)
    Stage(run, "candidates", {"other": "settings"})
    names = [stage.name for stage in status_of(tmp_path).stages]
    assert names == ["queries", "candidates", "candidates"]


def test_a_finished_run(prepare, capsys) -> None:
    assert prepare("--enable_reranking", "--queries_per_shard", "3") == 0
    for path in (prepare.work, prepare.output):
        capsys.readouterr()
        assert main(["status", str(path), "--json"]) == 0
        status = json.loads(capsys.readouterr().out)
        assert status["finished"]
        assert (status["output"], status["examples"], status["workers"]) == (str(prepare.output), 4, [])
        stages = {stage["name"]: stage for stage in status["stages"]}
        assert list(stages) == [
            "queries",
            "passages",
            "vectors",
            "candidates",
            "ranked",
            "answers",
            "reviewed",
        ]
        assert all(stage["finished"] for stage in status["stages"])
        assert stages["answers"]["rows"] == 4
        assert (stages["ranked"]["shards"], stages["ranked"]["shards_planned"]) == (2, 2)
    capsys.readouterr()
    assert main(["status", str(prepare.work)]) == 0
    out = capsys.readouterr().out
    assert f"4 examples in {prepare.output}" in out
    assert re.search(r"ranked +2 +4 queries +.* done", out)


def test_status_shows_an_index(tiny_flags, corpus: Path, tmp_path: Path, capsys) -> None:
    index = tmp_path / "index"
    given = ["--corpus_path", str(corpus), "--retriever_model", tiny_flags[1], "--device", "cpu"]
    assert main(["index", "--index_dir", str(index), *given]) == 0
    assert main(["status", str(index)]) == 0
    out = capsys.readouterr().out
    assert f"{index}: finished" in out
    assert re.search(r"vectors +1 +\d+ passages", out)


@pytest.mark.parametrize("path", ["", "there-is-none", "file.json"])
def test_path_that_is_not_a_run_directory_is_reported(path: str, tmp_path: Path, capsys) -> None:
    (tmp_path / "file.json").write_text("[]")
    (tmp_path / "mine.txt").write_text("mine")
    assert main(["status", str(tmp_path / path)]) == 1
    err = capsys.readouterr().err
    assert "there is no run directory" in err
    assert err.count("\n") == 1


def test_folder_of_a_model_is_named_as_one(models, capsys) -> None:
    assert main(["status", str(models["causal_lm"])]) == 1
    assert "this looks like a model, not like a run" in capsys.readouterr().err


def test_foreign_files_in_a_run_directory_are_ignored(tmp_path: Path) -> None:
    run = begun(tmp_path)
    live = tmp_path / "live"
    live.mkdir()
    (live / "1-a.progress").write_text("{cut sho")
    (live / "2-b.progress").write_text('{"worker": "w", "work": [{"from": "another version"}]}')
    (live / "3-c.json").write_text("[]")
    (run.path / "queries" / "stray.txt").write_text("")
    (opened(run)[1].folder / "stray.arrow").write_text("")
    (opened(run)[1].folder / "journal.jsonl").write_text('{"shard": 0, "seco')
    status = status_of(tmp_path)
    assert (status.workers, status.stages[0].rows) == ((), 14)
    assert status_at(str(tmp_path)) == status


def test_no_model_library_is_loaded(tmp_path: Path) -> None:
    begun(tmp_path)
    code = (
        "import sys; from scaledown.cli import main; status = main(['status', sys.argv[1]]); "
        "loaded = {'torch', 'transformers', 'numba'} & set(sys.modules); assert not loaded, loaded"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], env=environment, check=True)
