"""`scaledown status s3://…`: what any machine sees of a run in a bucket, and of other things there."""

import json
import os
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from scaledown.cli import main
from scaledown.errors import InputError
from scaledown.run.directory import RunDirectory
from scaledown.run.heartbeat import publishing
from scaledown.run.locations import storage_at
from scaledown.run.progress import track
from scaledown.run.stage import Stage
from scaledown.run.status import status_at

TABLE = pa.table({"n": list(range(100))})
MEMORY = pytest.mark.parametrize("bucket", ["memory"], indirect=True)


@pytest.mark.parametrize("bucket", ["s3", "gs"], indirect=True)
def test_status_counts_shards_of_an_unfinished_run(machine, bucket, capsys) -> None:
    run = machine("one")
    queries, stage = Stage(run, "queries", {}), Stage(run, "candidates", {})
    for shard in range(3):
        queries.write(shard, TABLE)
    queries.finish([100] * 3, {"queries": 300})
    with run.claim("same") as place, publishing(place, "worker-1", run):
        with track("retrieve", "queries", 300, 0, stage) as tracker:
            for shard in range(2):
                stage.write(shard, TABLE, seconds=4.0)
                tracker.advance(100)
            found = status_at(f"{bucket}/run")
    assert (found.path, found.finished, found.workers) == (f"{bucket}/run", False, ())
    own = found.stages[-1]
    assert (own.name, own.shards, own.shards_planned) == ("candidates", 2, 3)
    assert (own.rows, own.rows_in_progress, own.rows_planned) == (200, 0, 300)
    assert (own.seconds, own.rate) == (8.0, 25.0), "from the logs"
    assert main(["status", f"{bucket}/run"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(
        f"{bucket}/run: unfinished (whether a process is at work cannot be seen in a bucket)\n"
    )
    assert "candidates  2/3     200/300 queries  8.0 s  25.0/s\n" in out


@MEMORY
def test_status_of_an_index(machine, bucket) -> None:
    run = machine("one")
    for name in ("passages", "vectors"):
        stage = Stage(run, name, {})
        stage.write(0, TABLE)
        stage.finish([100], {"passages": 100})
    found = status_at(f"{bucket}/run")
    assert found.finished
    assert found.finished_time == pytest.approx(time.time(), abs=600)


def test_file_url_is_a_local_path(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    Stage(run, "queries", {}).write(0, TABLE)
    with run.claim("same") as place:
        os.utime(place.with_suffix(".json"), (time.time() - 3600,) * 2)  # an hour into the run
        for url in (str(run.path), f"file://{run.path}"):
            assert [worker.alive for worker in status_at(url).workers] == [True]


@MEMORY
def test_other_folders_are_not_fetched(bucket, monkeypatch, capsys) -> None:
    system = storage_at(f"{bucket}/data")._system
    system.pipe_file(f"{bucket}/data/set/part.jsonl", b"x")
    monkeypatch.setattr(type(storage_at(f"{bucket}/data")), "_cat", None)
    for url in (f"{bucket}/data", f"{bucket}/none", "memory://no-such-bucket/run"):
        assert main(["status", url]) == 1
        err = capsys.readouterr().err
        assert "there is no run directory" in err
        assert err.count("\n") == 1


DONE = {"rows": [1], "counts": {}, "seconds": 1.0}
MANIFEST = {"finished": "2026-01-01T00:00:00+00:00", "stages": {"ranked": {"fingerprint": "f"}}}


@pytest.mark.parametrize(
    ("bucket", "objects"),
    [
        ("s3", {"manifest.json": MANIFEST, "manifest.json/x": b"x", "passages": b"", "live//e.json": {}}),
        *(
            ("memory", objects)
            for objects in (
                {"live/a.json": b"[" * 100_000, "locks/x.held": {"name": 5}, "live/../../evil.json": {}},
                {"ranked/f/journal.jsonl": b"\xff\xfe"},
                {"ranked/f/journal.jsonl": {"seconds": "x"}},
                {"ranked/f/journal.jsonl": {"shard": [], "rows": 1}},
                {"ranked/f/journal.jsonl": b"[" * 100_000},
                {"ranked/f/journal.jsonl": b'{"shard": 0, "rows": 1, "seconds": Infinity}'},
                {"ranked/" + "a" * 300 + "/done.json": DONE},
                {"ranked/f/done.json": {}},
                {"ranked/f/done.json": {**DONE, "rows": "x"}},
                {
                    "ranked/f/done.json": DONE,
                    "manifest.json": {"stages": {"ranked": {"fingerprint": "/etc"}}},
                },
                {"ranked/f/done.json": DONE, "manifest.json": {"stages": {"ranked": 5}}},
                {"ranked/f/done.json": DONE, "manifest.json": {"stages": MANIFEST["stages"]}},
                {
                    "ranked/f/done.json": DONE,
                    "manifest.json": {**MANIFEST, "output": {"path": "\x1b[31m", "examples": "5"}},
                },
                {"ranked/\x1b[31m/000000.arrow": b"x", "ranked/g/000000.arrow": b"x"},
                {"passages": b"", "ranked/²/².arrow": b"x"},
            )
        ),
    ],
    indirect=["bucket"],
)
def test_status_survives_hostile_objects(objects: dict[str, Any], machine, bucket, capsys) -> None:
    system = machine("one").storage._system
    for name, content in {"ranked/f/000000.arrow": b"x", **objects}.items():
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        system.pipe_file(f"{bucket}/run/{name}", data)
    before = system.find(bucket, detail=True)
    assert main(["status", f"{bucket}/run"]) in {0, 1}
    output = capsys.readouterr()
    assert "unexpected" not in output.err
    assert output.err.count("\n") <= 1
    assert "\x1b" not in output.out + output.err
    assert system.find(bucket, detail=True) == before, "looking changes nothing"


@MEMORY
def test_no_folder_of_this_machine_is_read(machine, bucket, tmp_path) -> None:
    private = Stage(RunDirectory(tmp_path / "private"), "ranked", {})
    private.write(0, TABLE)
    system = machine("one").storage._system
    system.pipe_file(f"{bucket}/run/ranked/f/done.json", json.dumps(DONE).encode())

    def status_with(manifest: dict[str, Any]) -> list[tuple[str, str]]:
        system.pipe_file(f"{bucket}/run/manifest.json", json.dumps(manifest).encode())
        return [(stage.name, stage.fingerprint) for stage in status_at(f"{bucket}/run").stages]

    parameters = {"index_dir": str(tmp_path / "private")}
    named = {"ranked": {"fingerprint": private.fingerprint}}
    assert status_with({"stages": named, "parameters": parameters, "finished": MANIFEST["finished"]}) == [
        ("ranked", "f")
    ]
    path = {"ranked": {"fingerprint": str(private.folder)}}
    with pytest.raises(InputError, match="was not written by this version"):
        status_with({"stages": path, "finished": MANIFEST["finished"]})
