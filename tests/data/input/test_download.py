"""Training data behind URLs: fetched once, and again when it is another."""

import json
from pathlib import Path
from typing import Any

import fsspec
import pytest

from scaledown.data.input import download
from scaledown.data.input.download import fetched
from scaledown.data.input.training_files import entries
from scaledown.errors import InputError, OutputError
from web import Server

RECORDS = [{"query": f"question {n}", "documents": ["a\nb"], "answer": "b"} for n in range(3)]
CONTENT = json.dumps(RECORDS).encode()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SCALEDOWN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def again(url: str) -> Path:
    return fetched(url, "--train_data")


def test_a_file_here_is_where_it_is(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no such file; check the path"):
        again(str(tmp_path / "x.json"))
    (tmp_path / "x.json").write_bytes(CONTENT)
    assert again(str(tmp_path / "x.json")) == tmp_path / "x.json"
    assert again(f"file://{tmp_path}/x.json") == tmp_path / "x.json"


def test_a_file_is_fetched_once_and_again_when_it_is_another(server: Server, cache: Path) -> None:
    server.files["a/train.json"] = CONTENT
    url = server.url("a/train.json?signature=secret", "user:secret@")
    path = again(url)
    assert path.suffix == ".json"
    assert [entry.record for entry in entries(path)] == RECORDS
    asked = len(server.requests)
    assert again(url) == path
    assert len(server.requests) == asked + 1, "asked whether it is the same, and not for it"
    server.files["a/train.json"] = CONTENT.replace(b"question", b"Question")
    server.headers = {"ETag": '"2"'}
    assert again(url) != path
    assert again(url).read_bytes() == server.files["a/train.json"]
    assert not [found for found in cache.rglob("*") if "secret" in str(found)]


def test_file_without_etag_and_date_is_fetched_each_time(server: Server, caplog, monkeypatch) -> None:
    server.files["train.jsonl"], server.headers = b"one", {}
    path = again(server.url("train.jsonl"))
    server.files["train.jsonl"] = b"two"
    assert again(server.url("train.jsonl")) == path
    assert path.read_bytes() == b"two"
    assert "changes of the file are not noticed" in caplog.text
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="sends no size, ETag or time"):
        again(server.url("train.jsonl"))


def test_a_file_of_unknown_size_is_fetched_each_time(server: Server) -> None:
    server.files["train.jsonl"], server.length = b"some", False
    assert again(server.url("train.jsonl")).read_bytes() == b"some"
    server.files["train.jsonl"] = b"all of it"
    assert again(server.url("train.jsonl")).read_bytes() == b"all of it"


def test_a_file_that_changes_meanwhile_is_not_kept(server: Server, cache: Path, monkeypatch) -> None:
    server.files["train.json"] = CONTENT
    fetch = download._fetch

    def changing(*arguments: Any) -> None:
        fetch(*arguments)
        server.headers = {"ETag": '"2"'}

    monkeypatch.setattr(download, "_fetch", changing)
    with pytest.raises(InputError, match="changed while it was read; run the same command again"):
        again(server.url("train.json"))
    assert not list(cache.rglob("*.json"))


def test_a_file_cut_short_is_not_kept(server: Server, cache: Path) -> None:
    server.files["train.json"], server.drop_after = CONTENT, 20
    with pytest.raises(InputError, match="train.json"):
        again(server.url("train.json"))
    assert not [path for path in cache.rglob("*") if path.is_file() and path.name != ".lock"]
    assert again(server.url("train.json")).read_bytes() == CONTENT


def test_failed_downloads_are_one_line(server: Server, cache: Path) -> None:
    fsspec.filesystem("memory").pipe_file("/fetching/train.json", CONTENT)
    assert again("memory://fetching/train.json").read_bytes() == CONTENT
    server.files["train.json.gz"] = b"no matter"
    for url, said in (
        ("memory://fetching", "--train_data memory://fetching: is a folder; name a file in it"),
        ("memory://fetching/none.json", "there is no such file"),
        (server.url("train.json.gz"), "train.json.gz: training data ends in .json, .jsonl, .parquet"),
        (server.url("none.json"), "--train_data .*none.json"),
    ):
        with pytest.raises(InputError, match=said):
            again(url)
    (cache.parent / "file").touch()
    with pytest.MonkeyPatch.context() as patch, pytest.raises(OutputError, match="SCALEDOWN_CACHE"):
        patch.setenv("SCALEDOWN_CACHE", str(cache.parent / "file"))
        again("memory://fetching/train.json")
