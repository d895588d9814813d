"""Whole runs in object stores: an S3 server, and one of Google's protocol, both on loopback."""

import contextlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from scaledown.data import build_index
from scaledown.run import object_store
from scaledown.run.stage import Stage

FLAGS = (
    *("--enable_reranking", "--top_k_retrieval", "6", "--top_k_reranking", "3"),
    *("--passages_per_shard", "20", "--queries_per_shard", "2", "--teacher_batch_size", "2"),
)


class Fresh:
    """A file system without a cache."""

    def __init__(self, system: Any) -> None:
        self._system = system

    def __getattr__(self, name: str) -> Any:
        self._system.invalidate_cache()
        return getattr(self._system, name)


@pytest.fixture
def system(bucket: str) -> Any:
    import fsspec

    return Fresh(fsspec.filesystem(bucket.partition("://")[0], skip_instance_cache=True))


def inside(bucket: str, keys: Iterable[str]) -> list[str]:
    """The names of objects, beginning with the bucket."""
    return [key.removeprefix(f"{bucket.partition('://')[2]}/") for key in keys]


@pytest.fixture
def remote(prepare, bucket: str, tmp_path: Path) -> Any:
    """Run the command with all its output in the bucket. Returns the exit status."""

    def run(*flags: str, cache: str = "cache", output: str = f"{bucket}/out/train.json") -> int:
        return prepare(*FLAGS, "--output_file", output, "--cache_dir", str(tmp_path / cache), *flags)

    return run


@pytest.fixture
def words(tiny_flags: list[str], corpus: Path, queries: Path, bucket: str) -> list[str]:
    """Run the same in another process, without this process's cache."""
    given = ["--corpus_path", str(corpus), "--queries_file", str(queries)]
    return [
        *(sys.executable, "-m", "scaledown.data.prepare_dataset", *tiny_flags, *FLAGS, *given),
        *("--output_file", f"{bucket}/out/train.json", "--cache_dir"),
    ]


@pytest.fixture
def index(models, corpus: Path, bucket: str, tmp_path: Path) -> list[str]:
    """Make an index in the bucket. Returns its flag."""
    flags = ["--retriever_model", str(models["splade"]), "--device", "cpu", "--corpus_path", str(corpus)]
    flags += ["--passages_per_shard", "20", "--cache_dir", str(tmp_path / "index machine")]
    assert build_index.main([*flags, "--index_dir", f"{bucket}/index"]) == 0
    return ["--index_dir", f"{bucket}/index"]


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The shards that this process makes."""
    write, names = Stage.write, []

    def counting(self: Stage, shard: int, *arguments: Any, **keywords: Any) -> None:
        names.append(f"{self.name}/{self.path(shard).name}")
        write(self, shard, *arguments, **keywords)

    monkeypatch.setattr(Stage, "write", counting)
    return names


def test_run_in_bucket_gives_the_bytes_of_a_local_one(
    remote, prepare, corpus, queries, system, bucket, tmp_path, capsys, made
) -> None:
    assert prepare(*FLAGS) == 0
    here = sorted(made)
    made.clear()
    system.pipe_file(f"{bucket}/in/corpus.jsonl", corpus.read_bytes())
    system.pipe_file(f"{bucket}/in/queries.txt", queries.read_bytes())
    there = [*FLAGS, "--corpus_path", f"{bucket}/in/corpus.jsonl", "--index_dir", f"{bucket}/index"]
    there += ["--queries_file", f"{bucket}/in/queries.txt", "--work_dir", f"{bucket}/run"]
    there += ["--output_file", f"{bucket}/out/train.json", "--cache_dir"]
    assert prepare(*there, str(tmp_path / "cache"), "--dry_run", inputs=False) == 0
    assert system.exists(f"{bucket}/run/plan.json")
    assert not system.exists(f"{bucket}/out/train.json")
    capsys.readouterr()
    assert prepare(*there, str(tmp_path / "cache"), inputs=False) == 0
    assert sorted(made) == here
    out, err = capsys.readouterr()
    assert "the plan said" in out
    assert f"{bucket}/out/train.json: 4 examples" in out
    assert "another process may be at work" not in err
    assert f"train --train_data {bucket}/out/train.json --output_dir model" in out.splitlines()[-1]
    assert system.cat_file(f"{bucket}/out/train.json") == prepare.output.read_bytes()
    assert {key.split("/")[0] for key in inside(bucket, system.find(bucket))} == {"in", "index", "run", "out"}
    index = inside(bucket, system.ls(f"{bucket}/index", detail=False))
    assert sorted(index) == ["index/passages", "index/vectors"]
    manifest = json.loads(system.cat_file(f"{bucket}/run/manifest.json"))
    assert manifest["output"]["path"] == f"{bucket}/out/train.json"
    assert manifest["parameters"]["work_dir"] == f"{bucket}/run"
    assert b"secret-of-the-tests" not in system.cat_file(f"{bucket}/run/manifest.json")
    assert "Where the answer is" in system.cat_file(f"{bucket}/run/report.html").decode()
    mirrored = [path.relative_to(tmp_path / "cache") for path in (tmp_path / "cache").rglob("*")]
    assert not [path for path in mirrored if bucket.split("/")[-1] in str(path)], (
        "no name in the cache comes from a URL"
    )

    made.clear()
    assert prepare(*there, str(tmp_path / "elsewhere"), inputs=False) == 0
    out = capsys.readouterr().out
    assert "nothing to do" in out
    assert "1. query" not in out, "and nothing large was fetched for it"
    assert not list((tmp_path / "elsewhere").rglob("*.arrow"))
    assert not made


def test_output_in_bucket_is_written_again_if_lost_or_damaged(
    remote, system, bucket, tmp_path, made, capsys
) -> None:
    """Also if the bucket has objects with hostile names, or notes of an earlier version."""
    output, name = f"{bucket}/out/train.json", bucket.removeprefix("s3://")
    assert remote() == 0
    content = system.cat_file(output)
    made.clear()
    system.rm_file(output)
    assert remote() == 0
    assert system.cat_file(output) == content
    assert not made
    folders = {key.removeprefix(f"{name}/").rpartition("/")[0] for key in system.find(f"{output}.work")}
    folders -= {"out/train.json.work"}  # where a run directory refuses what is not its own
    assert len(folders) == 7
    for folder in (*folders, "out/train.json.work/live", "out/train.json.work/locks"):
        for hostile in ("../../../evil.json", "a/../../../evil.absent.json", ".json", "../evil.held"):
            system.pipe_file(f"{bucket}/{folder}/{hostile}", b'["hostile"]')
        for junk in ("evil.json", "evil.absent.json", "evil.part.jsonl", "journal-evil.jsonl", "evil.start"):
            system.pipe_file(f"{bucket}/{folder}/{junk}", b'["hostile"]')
    system.pipe_file(output, content[:-20])
    before = {path for path in tmp_path.rglob("*") if (tmp_path / "elsewhere") not in path.parents}
    assert remote(cache="elsewhere") == 0
    after = {path for path in tmp_path.rglob("*") if (tmp_path / "elsewhere") not in path.parents}
    assert after - before == {tmp_path / "elsewhere"}
    assert len(list((tmp_path / "elsewhere" / "runs").iterdir())) == 2
    assert system.cat_file(output) == content
    system.pipe_file(f"{bucket}/other.json", b"mine")
    capsys.readouterr()
    assert remote("--work_dir", f"{output}.work", output=f"{bucket}/other.json") == 1
    assert f"--output_file {bucket}/other.json already exists" in capsys.readouterr().err


@pytest.mark.slow
def test_killed_run_is_continued_by_another_machine(
    words, remote, prepare, system, bucket, tmp_path, made, capsys, forked
) -> None:
    """The other machine has its own cache, and finds only the content of the bucket."""
    assert prepare(*FLAGS) == 0
    every = sorted(made)
    made.clear()
    process = subprocess.Popen([*words, str(tmp_path / "first")], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 200
    while not [key for key in system.find(bucket) if "/vectors/" in key and key.endswith(".arrow")]:
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = {
        "/".join((key.split("/")[-3], key.split("/")[-1])) for key in system.find(bucket) if ".arrow" in key
    }
    assert not system.exists(f"{bucket}/out/train.json")
    capsys.readouterr()
    assert remote(cache="second") == 0
    assert "another process may be at work" in capsys.readouterr().err
    assert system.cat_file(f"{bucket}/out/train.json") == prepare.output.read_bytes()
    again = set(made) & kept
    assert not {name for name in again if not name.startswith("queries")}, "no finished shard is made again"
    assert set(made) | kept == set(every)
    assert not [key for key in system.find(bucket) if key.endswith((".start", ".part.jsonl"))]


@pytest.mark.parametrize("bucket", ["s3", "gs"], indirect=True)
@pytest.mark.slow
def test_machines_share_a_run_by_parts(
    words, prepare, queries, index, system, bucket, tmp_path, forked
) -> None:
    queries.write_text("".join(f"What is number {n}?\n" for n in range(8)))
    assert prepare(*FLAGS) == 0
    parts = [
        subprocess.Popen(
            [*words, str(tmp_path / f"machine {part}"), *index, "--shard", f"{part}/2"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for part in range(2)
    ]
    for process in parts:
        _, err = process.communicate(timeout=600)
        assert process.returncode == 0, err.decode()[-2000:]
        assert b"another process" not in err
    assert system.cat_file(f"{bucket}/out/train.json") == prepare.output.read_bytes()
    keys = inside(bucket, system.find(bucket))
    notes = [
        (key.split("/")[-3], json.loads(line)["shard"])
        for key in keys
        if "/journal-" in key
        for line in system.cat_file(f"{bucket}/{key}").splitlines()
    ]
    by_part = [note for note in notes if note[0] not in {"queries", "passages", "vectors"}]
    assert len(by_part) == len(set(by_part)) == 4 * 4, "no shard of a part was made twice"
    assert not [key for key in keys if "/locks/" in key or "/live/" in key]


def test_parts_need_a_finished_index(remote, bucket, capsys) -> None:
    for flags in (["--shard", "0/2"], ["--executor", "ray", "--ray_address", "local"]):
        assert remote(*flags) == 2
        err = capsys.readouterr().err
        assert f"{flags[0]}{' ray' * (flags[1] == 'ray')}: in a bucket the index comes first" in err
        assert "run `scaledown index --index_dir URL` with the same settings" in err.splitlines()[-1]


def test_parts_need_finished_synthetic_questions(prepare, corpus, index, bucket, tmp_path, capsys) -> None:
    flags = [*FLAGS, *index, "--corpus_path", str(corpus), "--output_file", f"{bucket}/out/train.json"]
    flags += ["--num_synthetic_queries", "4", "--cache_dir", str(tmp_path / "cache")]
    assert prepare(*flags, "--shard", "1/2", inputs=False) == 2
    assert "the questions of --num_synthetic_queries come first" in capsys.readouterr().err
    assert prepare(*flags, "--executor", "ray", inputs=False) == 2
    assert "the questions of --num_synthetic_queries come first" in capsys.readouterr().err
    assert prepare(*flags, "--executor", "ray", "--shard", "1/2", inputs=False) == 2
    assert "in a bucket Ray gives each worker its part" in capsys.readouterr().err


def test_index_command_fills_a_bucket_from_one_machine(capsys, index, models, corpus, bucket, system) -> None:
    out = capsys.readouterr().out
    assert out.startswith(f"{bucket}/index: ")
    assert not out.startswith(f"{bucket}/index: 0.0 MB")
    assert f"--index_dir {bucket}/index" in out.splitlines()[-1]
    assert system.find(f"{bucket}/index")
    flags = ["--retriever_model", str(models["splade"]), "--corpus_path", str(corpus), "--executor", "ray"]
    assert build_index.main([*flags, "--index_dir", f"{bucket}/other"]) == 2
    assert "--executor ray: in a bucket one machine makes the index" in capsys.readouterr().err


def test_unreachable_server_ends_the_run_with_one_line(
    remote, s3_server, bucket, monkeypatch, capsys, made
) -> None:
    monkeypatch.setattr(object_store, "_PATIENCE_SECONDS", 1)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")  # botocore's own, with pauses between them
    finish = Stage.finish

    def interrupted(self: Stage, *arguments: Any, **keywords: Any) -> Any:
        if self.name == "ranked":
            s3_server.stop()
        return finish(self, *arguments, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(Stage, "finish", interrupted)
        try:
            assert remote() == 1
        finally:
            s3_server.start()
    err = capsys.readouterr().err
    assert "the store cannot be reached" in err
    assert "finished work is kept: run the same command again" in err.splitlines()[-1]
    assert "Traceback" not in err
    made.clear()
    monkeypatch.setattr(object_store, "_PATIENCE_SECONDS", 60)
    assert remote() == 0
    assert {name.split("/")[0] for name in made} == {"answers", "reviewed"}


@pytest.fixture
def strict(s3_server) -> Iterator[None]:
    """A server that accepts no keys."""
    import requests

    host, port = s3_server.get_host_and_port()
    with contextlib.ExitStack() as after:
        for number in (b"inf", b"0"):
            call = (f"http://{host}:{port}/moto-api/reset-auth", number)
            after.callback(requests.post, *call) if number == b"inf" else requests.post(*call)
        yield


def test_wrong_keys_are_an_error(remote, bucket, strict, capsys) -> None:
    assert remote() == 1
    err = capsys.readouterr().err
    assert f"error: {bucket}/out/train.json: access is refused" in err
    assert "secret-of-the-tests" not in err
    assert "check the bucket and the keys in the environment" in err.splitlines()[-1]


def test_missing_bucket_is_an_error(remote, prepare, bucket, capsys) -> None:
    assert remote(output="s3://not-there-at-all/train.json") == 1
    assert "error: s3://not-there-at-all/train.json: there is no such bucket" in capsys.readouterr().err
    assert prepare("--work_dir", "s3://not-there-at-all/run") == 1
    assert "there is no such bucket" in capsys.readouterr().err
    assert remote(output="hf://buckets/owner/name/train.json") == 2
    assert "hf:// cannot be written to" in capsys.readouterr().err


def test_index_in_bucket_can_be_changed(models, corpus, bucket, tmp_path, monkeypatch) -> None:
    from scaledown.cli import main
    from scaledown.data.retrieval import IndexRetriever

    flags = ["--retriever_model", str(models["splade"]), "--device", "cpu"]
    articles = corpus.read_text(encoding="utf-8").splitlines(keepends=True)
    (tmp_path / "old.jsonl").write_text("".join(articles[:4]), encoding="utf-8")
    (tmp_path / "new.jsonl").write_text("".join(articles[4:6]), encoding="utf-8")
    there = ["index", *flags, "--index_dir", f"{bucket}/index", "--cache_dir"]
    assert main([*there, str(tmp_path / "one"), "--corpus_path", str(tmp_path / "old.jsonl")]) == 0
    words = ["--add", str(tmp_path / "new.jsonl"), "--remove", "2"]
    assert main([*there, str(tmp_path / "two"), *words]) == 0, "from another machine, without the corpus"
    monkeypatch.setenv("SCALEDOWN_CACHE", str(tmp_path / "three"))
    (found,) = IndexRetriever(f"{bucket}/index", device="cpu").retrieve(["the"], 1000)
    assert {own["id"].partition("_")[0] for own in found} == {"1", "3", "4", "5", "6"}
