"""`scaledown status s3://…`: what another machine sees of a run, and of what is none."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from scaledown.cli import main
from scaledown.errors import InputError
from scaledown.run import heartbeat
from scaledown.run.directory import RunDirectory
from scaledown.run.locations import storage_at
from scaledown.run.progress import track
from scaledown.run.stage import Stage
from scaledown.run.status import Status, status_at

TABLE = pa.table({"n": list(range(100))})
NOW = time.time()


@pytest.fixture(autouse=True)
def _quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeat, "_SEND_SECONDS", 0.1)


def word_of(url: str) -> Status:
    """The status once a worker has sent word."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        found = status_at(url)
        if any(worker.silent_seconds is not None for worker in found.workers):
            return found
        time.sleep(0.1)
    raise AssertionError(found)


def test_a_run_under_way_and_interrupted(machine, bucket, capsys) -> None:
    run = machine("one")
    queries, stage = Stage(run, "queries", {}), Stage(run, "candidates", {})
    for shard in range(3):
        queries.write(shard, TABLE)
    queries.finish([100] * 3, {"queries": 300})

    def work(shard: int) -> pa.Table:
        tracker.advance(60)
        if shard == 2:
            found = word_of(f"{bucket}/run")
            told, (worker,) = found.stages[-1], found.workers
            assert (told.name, told.shards, told.shards_planned, told.rows_planned) == (
                "candidates",
                2,
                3,
                300,
            )
            assert told.rows == 200
            assert (worker.worker, worker.alive, worker.at) == ("worker-1", None, "candidates 000002")
            raise KeyboardInterrupt
        return TABLE

    with (
        pytest.raises(KeyboardInterrupt),
        run.claim("same") as place,
        heartbeat.publishing(place, "worker-1", run),
        track("retrieve", "queries", 300, 0, stage) as tracker,
    ):
        stage.complete(3, work)
    found = status_at(f"{bucket}/run")
    assert (found.path, found.workers, found.finished) == (f"{bucket}/run", (), False)
    assert main(["status", f"{bucket}/run"]) == 0
    assert "candidates  2/3" in capsys.readouterr().out
    assert main(["status", f"{bucket}/none"]) == 1
    assert "there is no run directory" in capsys.readouterr().err


def test_a_stage_without_any_object_yet(machine, bucket, tmp_path) -> None:
    run, index = machine("one"), RunDirectory(tmp_path / "index")
    queries, stage = Stage(run, "queries", {}), Stage(run, "candidates", {})
    Stage(index, "vectors", {})
    queries.write(0, TABLE)
    queries.finish([100], {"queries": 100})
    with (
        run.claim("same") as place,
        heartbeat.publishing(place, "worker-1", run, index),
        track("retrieve", "queries", 100, 0, stage) as tracker,
        run.leases.hold(f"candidates-{stage.fingerprint}-000000"),
    ):
        stage.at = range(1)
        tracker.advance(60)
        deadline = time.monotonic() + 20
        while (found := word_of(f"{bucket}/run")).stages[-1].rows_in_progress != 60:
            assert time.monotonic() < deadline, found
    assert [told.name for told in found.stages] == ["queries", "candidates"], "and the index is elsewhere"
    assert [worker.at for worker in found.workers] == ["candidates 000000"]


def test_another_clock(machine, bucket, monkeypatch) -> None:
    run = machine("one")
    Stage(run, "queries", {}).write(0, TABLE)
    with run.claim("same") as place, heartbeat.publishing(place, "worker-1", run):
        word_of(f"{bucket}/run")
        for ahead in (-300, 300):
            clock = type("Clock", (), {"time": staticmethod(lambda ahead=ahead: time.time() + ahead)})
            monkeypatch.setattr(heartbeat, "time", clock)
            assert len(status_at(f"{bucket}/run").workers) == 1
            monkeypatch.setattr(heartbeat, "time", time)


def test_the_dead_are_not_at_work(machine, bucket, tmp_path, monkeypatch) -> None:
    code = (
        "import os, sys\n"
        "from scaledown.run.locations import storage_at\n"
        "from scaledown.run.directory import RunDirectory\n"
        "run = RunDirectory(storage_at(sys.argv[1] + '/run', sys.argv[2]))\n"
        "with run.claim('same'): os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", code, bucket, str(tmp_path / "killed")], check=False)
    assert len(status_at(f"{bucket}/run").workers) == 1, "it may live"
    monkeypatch.setattr(heartbeat, "_SILENT_SECONDS", 2.0)
    run = machine("one")
    Stage(run, "queries", {}).write(0, TABLE)  # a run is still there when nobody is
    with run.claim("same"):
        time.sleep(3.5)
        (worker,) = status_at(f"{bucket}/run").workers
        assert worker.pid == os.getpid()
    monkeypatch.setattr(heartbeat, "_PATIENCE_SECONDS", 1.0)
    assert status_at(f"{bucket}/run").workers == ()


def test_a_file_url_is_a_local_path(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    Stage(run, "queries", {}).write(0, TABLE)
    with run.claim("same") as place:
        os.utime(place.with_suffix(".json"), (NOW - 3600,) * 2)  # an hour into the run
        for url in (str(run.path), f"file://{run.path}"):
            assert [worker.alive for worker in status_at(url).workers] == [True]


def test_what_is_no_run_is_not_fetched(bucket, monkeypatch, capsys) -> None:
    system = storage_at(f"{bucket}/data")._system
    system.pipe_file(f"{bucket}/data/set/part.jsonl", b"x")
    monkeypatch.setattr(type(storage_at(f"{bucket}/data")), "_cat", None)
    for url in (f"{bucket}/data", "s3://no-such-bucket/run"):
        assert main(["status", url]) == 1
        err = capsys.readouterr().err
        assert "there is no run directory" in err
        assert err.count("\n") == 1


NOTE = {"request": "same", "pid": 1, "host": "host"}
WORD = {"worker": "w", "host": "h", "pid": 1, "time": NOW, "run": "/r", "stages": {}, "work": []}
WORK = {"stage": "ranked", "unit": "pairs", "done": 1, "total": 2, "guess": 0, "rate": 1.0, "shards": [0, 1]}
HELD = {"name": "ranked-f-000000", "worker": "w", "host": "h", "pid": 1, "since": 1.0}
HUGE = {"in_flight": 1, "shards": [0, 10**12]}
STAGES = {"ranked": "/r/ranked/f"}
OUTPUT = {"path": "\x1b[31m", "examples": "5"}
DONE = {"rows": [1], "counts": {}, "seconds": 1.0}
MANIFEST = {"finished": "2026-01-01T00:00:00+00:00", "stages": {"ranked": {"fingerprint": "f"}}}


@pytest.mark.parametrize(
    "objects",
    [
        {"locks/x.held": {**HELD, "name": "x", "worker": []}},
        {"locks/5.held": {**HELD, "name": 5}},
        {"locks/ranked-f-000000.held": {**HELD, "since": "x"}},
        {"locks/deaths/ranked-f-000000.1.death": {"of": "x", "time": "soon"}},
        {"live/a.progress": {**WORD, "time": "x"}},
        {"live/a.progress": {**WORD, "stages": [1]}},
        {"live/a.progress": {**WORD, "stages": {"ranked": 5, "passages": "/r/passages/g"}}},
        {
            "live/a.progress": {
                **WORD,
                "stages": {"ranked": "/r/ranked/f"},
                "work": [{**WORK, "in_flight": "x"}],
            }
        },
        {"live/a.progress": {**WORD, "work": [{**WORK, "in_flight": 1, "shards": 5, "done": None}]}},
        {"live/a.json": [1], "live/a.progress": WORD},
        {"live/a.json": b"[" * 100_000},
        {"live/a.json": {**NOTE, "pid": "\x1b[31m", "host": "\x1b[2J"}},
        {"live/" + "a" * 300 + ".json": NOTE},
        {"live/x.json/y.json": NOTE, "live/x.json": NOTE, "live/../../evil.json": NOTE, "live//e.json": NOTE},
        {"ranked/f/journal.jsonl": b"\xff\xfe"},
        {"ranked/f/journal.jsonl": {"seconds": "x"}},
        {"ranked/f/journal.jsonl": {"shard": [], "rows": 1}},
        {"ranked/f/journal.jsonl": b"[" * 100_000},
        {"ranked/f/journal.jsonl": b'{"shard": 0, "rows": 1, "seconds": Infinity}'},
        {"live/a.progress": {**WORD, "time": -float("inf")}},
        {"live/a.progress": {**WORD, "stages": STAGES, "work": [{**WORK, **HUGE}]}},
        {"live/a\x00b.json": NOTE},
        {"manifest.json": MANIFEST, "manifest.json/x": b"x"},
        {"ranked/f/done.json": {}},
        {"ranked/f/done.json": {**DONE, "rows": "x"}},
        {"ranked/f/done.json": DONE, "manifest.json": {"stages": {"ranked": {"fingerprint": "/etc"}}}},
        {"ranked/f/done.json": DONE, "manifest.json": {"stages": {"ranked": 5}}},
        {"ranked/f/done.json": DONE, "manifest.json": {"stages": MANIFEST["stages"]}},
        {
            "ranked/f/done.json": DONE,
            "manifest.json": {**MANIFEST, "output": {"path": "\x1b[31m", "examples": "5"}},
        },
        {"ranked/\x1b[31m/000000.arrow": b"x", "ranked/g/000000.arrow": b"x"},
        {"passages": b"", "ranked/²/².arrow": b"x"},
    ],
)
def test_hostile_objects(objects: dict[str, Any], machine, bucket, capsys) -> None:
    system = machine("one").storage._system
    for name, content in {"ranked/f/000000.arrow": b"x", "live/a.json": NOTE, **objects}.items():
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        system.pipe_file(f"{bucket}/run/{name}", data)
    before = system.find(bucket, detail=True)
    assert main(["status", f"{bucket}/run"]) in {0, 1}
    said = capsys.readouterr()
    assert "unexpected" not in said.err
    assert said.err.count("\n") <= 1
    assert "\x1b" not in said.out + said.err
    system.invalidate_cache()
    assert system.find(bucket, detail=True) == before, "looking changes nothing"


def test_no_folder_of_this_machine_is_looked_at(machine, bucket, tmp_path) -> None:
    private = Stage(RunDirectory(tmp_path / "private"), "ranked", {})
    private.write(0, TABLE)
    system = machine("one").storage._system
    system.pipe_file(f"{bucket}/run/live/a.json", json.dumps(NOTE).encode())
    for run in (str(tmp_path / "private"), "/r"):
        word = {**WORD, "run": run, "stages": {"ranked": str(private.folder)}}
        system.pipe_file(f"{bucket}/run/live/a.progress", json.dumps(word).encode())
        assert [stage.shards for stage in status_at(f"{bucket}/run").stages] in ([], [0])
    system.rm(f"{bucket}/run/live", recursive=True)
    manifest = {"stages": {"ranked": {"fingerprint": str(private.folder)}}, "finished": MANIFEST["finished"]}
    system.pipe_file(f"{bucket}/run/manifest.json", json.dumps(manifest).encode())
    with pytest.raises(InputError, match="was not written by this version"):
        status_at(f"{bucket}/run")
