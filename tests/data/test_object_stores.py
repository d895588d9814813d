"""Whole runs in object stores: an S3 server, and the Hub's buckets, both on loopback."""

import contextlib
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from scaledown.run import locations, object_store
from scaledown.run.stage import Stage

FLAGS = (
    *("--enable_reranking", "--top_k_retrieval", "6", "--top_k_reranking", "3"),
    *("--passages_per_shard", "20", "--queries_per_shard", "2", "--teacher_batch_size", "2"),
)
# Where a minute is too long for a test.
QUICK = (
    "from scaledown.run import object_store; object_store._BEAT_SECONDS = 0.3; object_store._DEAD_SECONDS = 4; "
    "from scaledown.run import hub; hub._SETTLE_SECONDS = 0.5; hub._SLOWEST_BEAT_SECONDS = 1.0; "
)
MAIN = "import sys; from scaledown.data.prepare_dataset import main; raise SystemExit(main(sys.argv[1:]))"


EVERY = pytest.mark.parametrize("bucket", ["s3", "gs", "hf"], indirect=True)


class Fresh:
    """A file system that remembers nothing."""

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
    """The names of objects from the bucket on."""
    return [key.removeprefix(f"{bucket.partition('://')[2]}/") for key in keys]


@pytest.fixture
def remote(prepare, bucket: str, tmp_path: Path) -> Any:
    """Run the command with all that it writes in the bucket; gives the status."""

    def run(*flags: str, cache: str = "cache", output: str = f"{bucket}/out/train.json") -> int:
        return prepare(*FLAGS, "--output_file", output, "--cache_dir", str(tmp_path / cache), *flags)

    return run


@pytest.fixture
def words(tiny_flags: list[str], corpus: Path, queries: Path, bucket: str) -> list[str]:
    """The same as a command of its own, without its cache."""
    given = ["--corpus_path", str(corpus), "--queries_file", str(queries)]
    return [
        *(sys.executable, "-c", QUICK + MAIN, *tiny_flags, *FLAGS, *given),
        *("--output_file", f"{bucket}/out/train.json", "--cache_dir"),
    ]


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The shards that this process makes."""
    write, names = Stage.write, []

    def counting(self: Stage, shard: int, *arguments: Any, **keywords: Any) -> None:
        names.append(f"{self.name}/{self.path(shard).name}")
        write(self, shard, *arguments, **keywords)

    monkeypatch.setattr(Stage, "write", counting)
    return names


@EVERY
def test_a_run_in_a_bucket_gives_the_bytes_of_a_local_one(
    remote,
    prepare,
    system,
    bucket,
    tmp_path,
    capsys,
    made,
) -> None:
    assert prepare(*FLAGS) == 0
    here = sorted(made)
    made.clear()
    there = ("--index_dir", f"{bucket}/index", "--work_dir", f"{bucket}/run")
    assert remote(*there) == 0
    assert sorted(made) == here
    out, err = capsys.readouterr()
    assert f"{bucket}/out/train.json: 4 examples" in out
    assert "New Data Upload" not in err
    assert f"train --train_data {bucket}/out/train.json --output_dir model" in out.splitlines()[-1]
    assert system.cat_file(f"{bucket}/out/train.json") == prepare.output.read_bytes()
    assert {key.split("/")[0] for key in inside(bucket, system.find(bucket))} == {"index", "run", "out"}
    index = inside(bucket, system.ls(f"{bucket}/index", detail=False))
    assert sorted(index) == ["index/passages", "index/vectors"]
    manifest = json.loads(system.cat_file(f"{bucket}/run/manifest.json"))
    assert manifest["output"]["path"] == f"{bucket}/out/train.json"
    assert manifest["parameters"]["work_dir"] == f"{bucket}/run"
    assert b"secret-of-the-tests" not in system.cat_file(f"{bucket}/run/manifest.json")
    assert "Where the answer stands" in system.cat_file(f"{bucket}/run/report.html").decode()
    mirrored = [path.relative_to(tmp_path / "cache") for path in (tmp_path / "cache").rglob("*")]
    assert not [path for path in mirrored if bucket.split("/")[-1] in str(path)], (
        "no name in the cache comes from a URL"
    )

    made.clear()
    assert remote(*there) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert remote(*there, cache="elsewhere") == 0
    out = capsys.readouterr().out
    assert "nothing to do" in out
    assert "1. query" not in out, "and nothing large was fetched for it"
    assert not list((tmp_path / "elsewhere").rglob("*.arrow"))
    assert not made


@EVERY
def test_corpus_and_queries_in_a_bucket(prepare, corpus, queries, system, bucket, tmp_path) -> None:
    assert prepare(*FLAGS) == 0
    system.pipe_file(f"{bucket}/in/corpus.jsonl", corpus.read_bytes())
    system.pipe_file(f"{bucket}/in/queries.txt", queries.read_bytes())
    there = ("--corpus_path", f"{bucket}/in/corpus.jsonl", "--queries_file", f"{bucket}/in/queries.txt")
    output = tmp_path / "other.json"
    assert prepare(*FLAGS, *there, "--output_file", str(output), inputs=False) == 0
    assert output.read_bytes() == prepare.output.read_bytes()


def test_a_lost_or_changed_output_in_a_bucket(remote, system, bucket, made, caplog, capsys) -> None:
    output = f"{bucket}/out/train.json"
    assert remote() == 0
    content = system.cat_file(output)
    made.clear()
    system.rm_file(output)
    assert remote(cache="elsewhere") == 0
    assert system.cat_file(output) == content
    assert not made
    system.pipe_file(output, content[:-20])
    assert remote() == 0
    assert system.cat_file(output) == content
    system.pipe_file(f"{bucket}/other.json", b"mine")
    capsys.readouterr()
    assert remote("--work_dir", f"{output}.work", output=f"{bucket}/other.json") == 1
    assert f"--output_file {bucket}/other.json is there already" in capsys.readouterr().err


@EVERY
def test_killed_and_continued_by_another_machine(
    words,
    remote,
    prepare,
    system,
    bucket,
    tmp_path,
    made,
    monkeypatch,
) -> None:
    """The other has a cache of its own, and finds only what is in the bucket."""
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
    monkeypatch.setattr(object_store, "_DEAD_SECONDS", 4)
    assert remote(cache="second") == 0
    assert system.cat_file(f"{bucket}/out/train.json") == prepare.output.read_bytes()
    again = set(made) & kept
    assert not {name for name in again if not name.startswith("queries")}, "no finished shard is made again"
    assert set(made) | kept == set(every)


@pytest.mark.parametrize("bucket", ["s3", "gs"], indirect=True)
@pytest.mark.slow
def test_two_machines_share_a_run(words, prepare, queries, system, bucket, tmp_path) -> None:
    queries.write_text("".join(f"What is number {n}?\n" for n in range(24)))
    assert prepare(*FLAGS) == 0
    both = [
        subprocess.Popen([*words, str(tmp_path / name)], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for name in ("first", "second")
    ]
    for process in both:
        _, err = process.communicate(timeout=300)
        assert process.returncode == 0, err.decode()[-2000:]
    assert system.cat_file(f"{bucket}/out/train.json") == prepare.output.read_bytes()
    keys = system.find(bucket)
    notes = [line for key in keys if "/journal-" in key for line in system.cat_file(key).splitlines()]
    assert len(notes) == len([key for key in keys if key.endswith(".arrow")]), "no shard was made twice"
    assert not [key for key in keys if "/locks/" in key or "/live/" in key], "and nobody is there any more"


def test_a_server_that_is_away_for_some_seconds(
    remote,
    prepare,
    s3_server,
    system,
    bucket,
    monkeypatch,
    caplog,
) -> None:
    assert prepare(*FLAGS) == 0
    write, back = Stage.write, []

    def interrupted(self: Stage, *arguments: Any, **keywords: Any) -> None:
        if self.name == "ranked" and not back:
            s3_server.stop()
            back.append(threading.Timer(3, s3_server.start))
            back[0].start()
        write(self, *arguments, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(Stage, "write", interrupted)
        assert remote() == 0
    assert system.cat_file(f"{bucket}/out/train.json") == prepare.output.read_bytes()


def test_a_server_that_stays_away(remote, prepare, s3_server, bucket, monkeypatch, capsys, made) -> None:
    monkeypatch.setattr(object_store, "_PATIENCE_SECONDS", 2)
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
    """A server that knows no keys."""
    import requests

    host, port = s3_server.get_host_and_port()
    with contextlib.ExitStack() as after:
        for number in (b"inf", b"0"):
            call = (f"http://{host}:{port}/moto-api/reset-auth", number)
            after.callback(requests.post, *call) if number == b"inf" else requests.post(*call)
        yield


def test_wrong_keys(remote, bucket, strict, capsys) -> None:
    assert remote() == 1
    err = capsys.readouterr().err
    assert f"error: {bucket}/out/train.json: access is refused" in err
    assert "secret-of-the-tests" not in err
    assert "check the bucket and the keys in the environment" in err.splitlines()[-1]


@pytest.mark.parametrize("bucket", ["hf"], indirect=True)
def test_no_such_bucket_of_the_hub(remote, bucket, monkeypatch, capsys) -> None:
    assert remote(output="hf://buckets/tests/nothing/train.json") == 1
    err = capsys.readouterr().err
    assert "error: hf://buckets/tests/nothing/train.json: there is no such bucket" in err
    assert err.endswith("check the URL and HF_TOKEN\n")
    monkeypatch.setenv("HF_TOKEN", "hf_another")
    assert remote() == 1
    err = capsys.readouterr().err
    assert f"error: {bucket}/out/train.json: access is refused" in err
    assert "hf_another" not in err


@pytest.mark.parametrize("bucket", ["hf"], indirect=True)
def test_a_token_of_the_hub_that_may_only_read(remote, bucket, hub, capsys) -> None:
    hub.answer("xet-write-token", 403)
    try:
        assert remote() == 1
    finally:
        hub.answer("xet-write-token", 0)
    assert f"error: {bucket}/out/train.json: access is refused" in capsys.readouterr().err


@pytest.mark.parametrize("bucket", ["hf"], indirect=True)
def test_a_hub_out_of_reach_by_choice(remote, bucket, monkeypatch, capsys) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert remote() == 1
    assert "error: HF_HUB_OFFLINE=1 keeps the Hub's buckets out of reach" in capsys.readouterr().err


def test_no_such_bucket(remote, prepare, bucket, capsys) -> None:
    assert remote(output="s3://not-there-at-all/train.json") == 1
    assert "error: s3://not-there-at-all/train.json: there is no such bucket" in capsys.readouterr().err
    assert prepare("--work_dir", "s3://not-there-at-all/run") == 1
    assert "there is no such bucket" in capsys.readouterr().err


def test_a_live_run_with_other_settings(remote, bucket, tmp_path, capsys) -> None:
    from scaledown.run.directory import RunDirectory

    there = locations.storage_at(f"{bucket}/out/train.json.work", str(tmp_path / "other machine"))
    with RunDirectory(there).claim("other settings"):
        assert remote() == 1
    assert f"{bucket}/out/train.json.work is in use by a live run" in capsys.readouterr().err
    assert remote() == 0


def test_a_bucket_with_hostile_names(remote, prepare, system, bucket, tmp_path) -> None:
    assert prepare(*FLAGS) == 0
    assert remote(cache="first") == 0
    output, name = f"{bucket}/out/train.json", bucket.removeprefix("s3://")
    folders = {key.removeprefix(f"{name}/").rpartition("/")[0] for key in system.find(f"{output}.work")}
    folders -= {"out/train.json.work"}  # where a run directory refuses what is not its own
    assert len(folders) == 7
    system.rm_file(output)
    for folder in (*folders, "out/train.json.work/live", "out/train.json.work/locks"):
        for hostile in ("../../../evil.json", "a/../../../evil.absent.json", "..", ".json", "../evil.held"):
            system.pipe_file(f"{bucket}/{folder}/{hostile}", b'["hostile"]')
        for junk in ("evil.json", "evil.absent.json", "evil.part.jsonl", "journal-evil.jsonl", "evil.held"):
            system.pipe_file(f"{bucket}/{folder}/{junk}", b'["hostile"]')
    before = {path for path in tmp_path.rglob("*") if (tmp_path / "cache") not in path.parents}
    assert remote() == 0
    assert system.cat_file(output) == prepare.output.read_bytes()
    after = {path for path in tmp_path.rglob("*") if (tmp_path / "cache") not in path.parents}
    assert after - before == {tmp_path / "cache"}
    assert len(list((tmp_path / "cache" / "runs").iterdir())) == 2


def test_the_index_command_fills_a_bucket(models, corpus, bucket, tmp_path, capsys, system) -> None:
    from scaledown.data import build_index

    flags = ["--retriever_model", str(models["splade"]), "--device", "cpu", "--corpus_path", str(corpus)]
    flags += ["--index_dir", f"{bucket}/index", "--cache_dir", str(tmp_path / "cache")]
    assert build_index.main(flags) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"{bucket}/index: ")
    assert not out.startswith(f"{bucket}/index: 0.0 MB")
    assert f"--index_dir {bucket}/index" in out.splitlines()[-1]


def test_an_index_in_a_bucket_changes(models, corpus, bucket, tmp_path, monkeypatch) -> None:
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


def test_a_plan_is_kept_in_the_bucket(remote, system, bucket, capsys) -> None:
    assert remote("--dry_run") == 0
    assert system.exists(f"{bucket}/out/train.json.work/plan.json")
    assert not system.exists(f"{bucket}/out/train.json")
    capsys.readouterr()
    assert remote(cache="elsewhere") == 0
    assert "the plan said" in capsys.readouterr().out
