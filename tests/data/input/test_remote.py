"""Corpora and queries behind URLs: an http server on loopback, and fsspec's memory:// where others have s3://."""

import bz2
import gzip
import io
import json
import logging
import os
import re
import subprocess
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from scaledown.cli import main as cli
from scaledown.config.prepare import PrepareConfig
from scaledown.data.build_index import corpus_identity
from scaledown.data.input import files, remote, tables
from scaledown.data.input.corpus import build_passages
from scaledown.data.session import resolve as inputs
from scaledown.errors import InputError, MissingExtraError, UsageError, install_command
from scaledown.models.sources import resolve
from scaledown.run.directory import RunDirectory
from scaledown.run.stage import Stage
from scaledown.urls import detail
from web import Server

RECORDS = [{"title": f"Title {i}", "text": f"Text number {i}, about things."} for i in range(40)]
LINES = "".join(json.dumps(record) + "\n" for record in RECORDS).encode()


@pytest.fixture
def memory() -> Iterator[Any]:
    system = fsspec.filesystem("memory")
    yield system
    system.store.clear()
    system.pseudo_dirs[:] = [""]


def packed(kind: str) -> bytes:
    if kind == "parquet":
        sink = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(RECORDS), sink, row_group_size=8)
        return sink.getvalue()
    if kind == "csv":
        return ("title,text\n" + "".join(f'{r["title"]},"{r["text"]}"\n' for r in RECORDS)).encode()
    if kind == "txt":
        return b"One article.\nIts second paragraph."
    return {
        "jsonl": bytes,
        "jsonl.gz": gzip.compress,
        "jsonl.bz2": bz2.compress,
        "jsonl.zst": lambda data: pa.compress(data, "zstd", asbytes=True),
    }[kind](LINES)


KINDS = ["jsonl", "jsonl.gz", "jsonl.bz2", "jsonl.zst", "parquet", "csv", "txt"]


def contents(source: files.Source) -> list[Any]:
    paths = files.sources(source, "--corpus_path")
    every = [row for path in paths for row in tables.rows(path, tables.CORPUS)]
    return [(row.line, row.content) for row in every]


def cut(source: files.Source, work: Path, models: dict[str, Path], **settings: Any) -> Stage:
    run = RunDirectory(work)
    stage = Stage(run, "passages", {"corpus": corpus_identity(run, [source])})
    config = PrepareConfig(queries_file=("q",), output_file="o.json", **settings)
    build_passages(stage, config, [source], resolve(str(models["splade"])))
    return stage


def failure(url: str) -> str:
    """The error of all that can be done with a corpus."""
    with pytest.raises(InputError) as caught:
        contents(files.locate(url, "--corpus_path"))
    shown = "".join(traceback.format_exception(caught.value))  # as --debug does
    assert "SECRET" not in shown
    return str(caught.value)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("where", ["http", "memory"])
def test_the_same_passages_as_from_the_local_file(kind, where, tmp_path, models, server, memory) -> None:
    name = f"my corpus.{kind}"
    local = tmp_path / name
    local.write_bytes(packed(kind))
    if where == "http":
        server.files["my%20corpus." + kind] = packed(kind)
        url = server.url("my%20corpus." + kind)
    else:
        memory.pipe(f"/bucket/{name}", packed(kind))
        url = f"memory://bucket/{name}"
    source = files.locate(url, "--corpus_path")
    assert isinstance(source, remote.Remote)
    assert contents(source) == contents(local)
    here = cut(local, tmp_path / "local", models)
    there = cut(source, tmp_path / "remote", models)
    columns = ["title", "text"] if where == "http" else ["passage_id", "title", "text"]
    for table, expected in zip(there.tables(), here.tables(), strict=True):
        assert table.select(columns) == expected.select(columns)


def test_a_stream_is_one_request_and_parquet_is_read_in_pieces(server: Server) -> None:
    server.files |= {"c.jsonl.gz": packed("jsonl.gz"), "c.parquet": packed("parquet")}
    contents(files.locate(server.url("c.jsonl.gz"), "--corpus_path"))
    assert server.requests == [("/c.jsonl.gz", None)] * 2  # to find it, to read it


def test_parquet_without_ranges_names_the_next_step(server: Server, monkeypatch) -> None:
    monkeypatch.setattr(remote, "_BUFFER_BYTES", 64)
    large = io.BytesIO()
    texts = [f"{number}{number * 7919 % 10007}" * 5 for number in range(30_000)]
    pq.write_table(pa.table({"title": texts, "text": texts}), large)
    server.files["c.parquet"] = large.getvalue()
    source = files.locate(server.url("c.parquet"), "--corpus_path")
    assert len(contents(source)) == 30_000
    pieces = [wanted for _, wanted in server.requests if wanted]
    assert pieces
    assert len(server.requests) < 20
    server.ranges = False
    assert re.search(r"cannot send parts of files, .*download the file", failure(server.url("c.parquet")))
    server.length = False
    assert re.search(r"does not send the size, .*download the file", failure(server.url("c.parquet")))


def test_a_folder_is_listed_and_streams(memory, tmp_path: Path, models) -> None:
    names = [
        "a.jsonl",
        "sub/b.jsonl.gz",
        "sub/c.csv",
        "My Title.txt",
        ".hidden.jsonl",
        "x.work/d.jsonl",
        "no.png",
    ]
    for name in names:
        content = packed(name.partition(".")[2]) if name[0] in "as" else packed("txt")
        memory.pipe(f"/bucket/corpus/{name}", content)
        (tmp_path / "c" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "c" / name).write_bytes(content)
    for url in ("memory://bucket/corpus/", "memory://bucket/corpus"):
        source = files.locate(url, "--corpus_path")
        assert [str(file) for file in files.sources(source, "")] == [
            f"memory://bucket/corpus/{name}"
            for name in ("My Title.txt", "a.jsonl", "sub/b.jsonl.gz", "sub/c.csv")
        ]
        here = cut(tmp_path / "c", tmp_path / "local", models)
        there = cut(source, tmp_path / url.replace("/", "-"), models)
        assert list(there.tables()) == list(here.tables())
    memory.rm("/bucket/corpus", recursive=True)
    memory.pipe("/bucket/corpus/no.png", b"")
    with pytest.raises(InputError, match=r"memory://bucket/corpus: the folder holds none of"):
        files.locate("memory://bucket/corpus", "--corpus_path")


def test_a_file_url_is_a_local_path(tmp_path: Path) -> None:
    path = tmp_path / "my corpus.jsonl"
    path.write_bytes(LINES)
    assert files.locate(path.as_uri(), "--corpus_path") == path


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "parquet"])
def test_the_share_that_was_read_grows_to_the_whole(kind: str, server: Server, monkeypatch) -> None:
    monkeypatch.setattr(files, "_CHUNK_BYTES", 64)
    server.files[f"c.{kind}"] = packed(kind)
    meter = files.ReadingMeter([files.locate(server.url(f"c.{kind}"), "--corpus_path")])
    assert meter.size == len(packed(kind))
    seen = [
        meter.fraction(),
        *(meter.fraction() for _ in tables.rows(meter.paths[0], tables.CORPUS, meter=meter)),
    ]
    assert seen == sorted(seen)
    assert seen[0] == 0
    assert 0.5 < seen[-1] <= 1


def test_an_unknown_size_is_no_obstacle(server: Server) -> None:
    server.length = False
    server.files["c.jsonl.gz"] = packed("jsonl.gz")
    source = files.locate(server.url("c.jsonl.gz"), "--corpus_path")
    meter = files.ReadingMeter([source])
    assert len([meter.fraction() for _ in tables.rows(source, tables.CORPUS, meter=meter)]) == len(RECORDS)


# What names a corpus again


def identity(url: str) -> str:
    source = files.locate(url, "--corpus_path")
    assert isinstance(source, remote.Remote)
    return source.identity()


@pytest.mark.parametrize("header", ["ETag", "Last-Modified"])
def test_fingerprint_changes_with_the_servers_headers(header: str, server: Server) -> None:
    server.files["c.jsonl"] = LINES
    server.headers = {header: "one"}
    before = identity(server.url("c.jsonl"))
    assert identity(server.url("c.jsonl")) == before
    assert identity(server.url("c.jsonl?X-Amz-Signature=renewed", "user:secret@")) == identity(
        server.url("c.jsonl?X-Amz-Signature=another", "user:other@")
    )
    server.headers = {header: "two"}
    assert identity(server.url("c.jsonl")) != before
    assert [wanted for _, wanted in server.requests] == [None] * len(server.requests)


def test_missing_etag_and_date_are_logged_once(server: Server, caplog) -> None:
    server.files |= {"c.jsonl": LINES, "d.jsonl": LINES}
    server.headers = {}
    before = identity(server.url("c.jsonl"))
    assert identity(server.url("c.jsonl")) == before
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "changes of the file are not noticed" in caplog.text
    assert identity(server.url("c.jsonl?id=7")) != identity(server.url("c.jsonl?id=8"))
    assert identity(server.url("d.jsonl")) != before
    server.files["c.jsonl"] = LINES * 2
    assert identity(server.url("c.jsonl")) != before


def test_a_file_of_a_folder_that_changes_is_noticed(memory) -> None:
    memory.pipe({"/b/a.jsonl": LINES, "/b/b.jsonl": LINES})
    before = identity("memory://b/")
    assert identity("memory://b/") == before
    memory.pipe("/b/b.jsonl", LINES)  # the same bytes at another time: nothing was read that could tell
    assert identity("memory://b/") != before


def test_a_file_that_changes_between_finding_and_reading_is_refused(server: Server, memory) -> None:
    memory.pipe("/b/c.jsonl", LINES)
    source = files.locate("memory://b/c.jsonl", "--corpus_path")
    memory.pipe("/b/c.jsonl", LINES)
    with pytest.raises(InputError, match="changed while it was read; run the same command again"):
        contents(source)
    server.files["c.jsonl"] = LINES
    source = files.locate(server.url("c.jsonl"), "--corpus_path")
    server.headers = {"ETag": '"2"'}
    with pytest.raises(InputError, match="changed while it was read; run the same command again"):
        contents(source)


# What goes wrong


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "csv"])
def test_a_connection_that_breaks_is_no_end(kind: str, server: Server) -> None:
    server.files[f"c.{kind}"] = packed(kind)
    server.drop_after = len(packed(kind)) // 2
    message = failure(server.url(f"c.{kind}"))
    assert re.search(rf"c\.{kind}: the connection broke after .*; run the same command again", message)
    assert message.count("\n") == 0
    assert contents(files.locate(server.url(f"c.{kind}"), "--corpus_path"))


def test_after_a_broken_connection_the_same_call_continues(
    server: Server, tmp_path: Path, models, monkeypatch
) -> None:
    monkeypatch.setattr(files, "_CHUNK_BYTES", 1 << 14)
    monkeypatch.setattr(remote, "_BUFFER_BYTES", 1 << 14)
    lines = [json.dumps({"title": f"T{i}", "text": f"Text number {i}. " * 20}) + "\n" for i in range(2000)]
    server.files["c.jsonl"] = "".join(lines).encode()
    settings = {"passages_per_shard": 500, "workers": 1}
    whole = cut(files.locate(server.url("c.jsonl"), ""), tmp_path / "whole", models, **settings)
    server.requests.clear()
    server.drop_after = len(server.files["c.jsonl"]) * 2 // 3
    with pytest.raises(InputError, match="run the same command again"):
        cut(files.locate(server.url("c.jsonl"), ""), tmp_path / "broken", models, **settings)
    begun = sorted((tmp_path / "broken" / "passages" / whole.fingerprint).glob("*.arrow"))
    assert 0 < len(begun) < len(whole.finished().rows)
    kept = begun[0].stat().st_mtime_ns
    again = cut(files.locate(server.url("c.jsonl"), ""), tmp_path / "broken", models, **settings)
    assert begun[0].stat().st_mtime_ns == kept
    assert shards(again) == shards(whole)


def shards(stage: Stage) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in stage.folder.glob("*.arrow")}


@pytest.mark.parametrize("kind", ["jsonl.gz", "jsonl.bz2", "jsonl.zst"])
def test_compressed_data_that_ends_early_is_noticed_without_a_length(kind: str, server: Server) -> None:
    server.length = False
    server.files[f"c.{kind}"] = packed(kind)[:-12]
    assert re.search("cut short or damaged.*put a whole file there", failure(server.url(f"c.{kind}")))


def test_another_file_system_that_ends_early_is_noticed(memory) -> None:
    memory.pipe("/b/c.jsonl", LINES)
    source = files.locate("memory://b/c.jsonl", "--corpus_path")
    memory.store["/b/c.jsonl"].truncate(100)
    with pytest.raises(InputError, match="the connection broke after 100 bytes"):
        contents(source)


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (404, "there is no such file; check the URL"),
        (403, "access is refused; check the URL and the login or signature in it"),
        (401, "access is refused"),
        (503, "the server answers HTTP 503; try again later"),
    ],
)
def test_refusals_of_a_server_are_one_line(status: int, message: str, server: Server) -> None:
    server.status["c.jsonl"] = status
    assert f"--corpus_path {server.url('c.jsonl')}: {message}" in failure(server.url("c.jsonl"))


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("nosuch://bucket/c.jsonl", "nosuch:// cannot be read; use https://, s3:// or a local path"),
        ("https://host/folder/", "cannot be listed over http; give the URL of one file"),
        ("https://host", "cannot be listed over http"),
        ("http://127.0.0.1:9/c.jsonl", "cannot be reached .*check the URL and the network"),
        ("http://host:port/c.jsonl", "cannot be reached .*check the URL"),
        ("memory://bucket/none.jsonl", "there is no such file; check the URL"),
        ("https://host/c.jsonl?…", "was stored without its secrets; give the flag again"),
        ("https://…@host/c.jsonl", "was stored without its secrets; give the flag again"),
    ],
)
def test_urls_that_lead_nowhere(url: str, message: str, memory) -> None:
    found = failure(url)
    assert re.search(f"^--corpus_path {re.escape(url)}: .*{message}", found)
    assert "\n" not in found


def test_a_host_that_is_not_found(monkeypatch) -> None:
    import socket

    def nothing(*_: Any, **__: Any) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", nothing)
    assert failure("https://no.such.host/c.jsonl").endswith("the host is not found; check the URL")


@pytest.mark.parametrize(("scheme", "package"), [("s3", "s3fs"), ("gs", "gcsfs"), ("az", "adlfs")])
def test_a_store_without_its_package_names_the_extra(scheme: str, package: str, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, scheme, raising=False)  # another test's
    with pytest.raises(
        MissingExtraError, match=re.escape(f"needs another package: {install_command(scheme)}")
    ):
        files.locate(f"{scheme}://bucket/c.jsonl", "--corpus_path")


def test_no_secret_of_an_address_to_which_a_server_sent_us_on() -> None:
    error = OSError("Max retries exceeded with url: /c.jsonl?X-Amz-Signature=SECRET (Caused by 'x')")
    said = "OSError: Max retries exceeded with url: /c.jsonl?… (Caused by 'x')"
    assert detail("https://host/c.jsonl", error) == said


def test_a_json_array_and_an_archive_say_how_to_convert_them(server: Server) -> None:
    server.files |= {"c.json": json.dumps(RECORDS).encode(), "c.zip": b"PK\x03\x04" + bytes(600)}
    message = failure(server.url("c.json"))
    assert message.endswith("Fetch it and convert it with `jq -c '.[]' c.json > c.lines.jsonl`")
    assert "fetch it and unpack it (`unzip c.zip`)" in failure(server.url("c.zip"))


@pytest.mark.parametrize("flag", ["output_file", "work_dir", "index_dir"])
def test_http_is_only_read(flag: str) -> None:
    given = {"queries_file": ("q",), "output_file": "o.json", flag: "https://host/o.json"}
    with pytest.raises(
        UsageError, match="https://host/o.json: https:// cannot be written to; use a local path"
    ):
        PrepareConfig(**given)


@pytest.mark.parametrize("flag", ["output_file", "work_dir", "index_dir"])
def test_nothing_is_written_into_a_folder_that_is_read(flag: str) -> None:
    fsspec.filesystem("memory").pipe_file("/read/corpus/c.jsonl", b"{}")
    given = {"output_file": "memory://read/o.json", flag: "memory://read/corpus/o.json"}
    config = PrepareConfig(corpus_path=("memory://read/corpus",), queries_file=("q",), **given)
    with pytest.raises(UsageError, match="memory://read/corpus/o.json.* lies in memory://read/corpus, which"):
        inputs.find_inputs(config)


def test_training_data_is_local(capsys) -> None:
    assert cli(["validate", "https://host/train.json"]) == 2
    assert "is a URL: fetch the file and give its path" in capsys.readouterr().err


def test_files_of_a_hub(server: Server) -> None:
    """By huggingface_hub's own file system, which reads its address when it is imported."""
    file = {"type": "file", "oid": "1" * 40, "size": len(LINES), "path": "c.jsonl"}
    server.files = {
        "api/datasets/org/name/revision/main": json.dumps({"id": "org/name", "sha": "2" * 40}).encode(),
        "api/datasets/org/name/tree/main": json.dumps([file]).encode(),
        "datasets/org/name/resolve/main/c.jsonl": LINES,
    }
    code = (
        "import sys; from scaledown.data.input import files, tables\n"
        "path = files.locate(sys.argv[1], '--corpus_path')\n"
        "print(path, path.size, *(row.content.decode() for row in tables.rows(path, tables.CORPUS)))"
    )
    hub = {"HF_ENDPOINT": server.url("").rstrip("/"), "HF_HUB_OFFLINE": "0"}
    done = subprocess.run(
        [sys.executable, "-c", code, "hf://datasets/org/name@main/c.jsonl"],
        env={**os.environ, **hub},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[:2] == ["hf://datasets/org/name@main/c.jsonl", str(len(LINES))]
    assert "Text number 39, about things." in done.stdout


# Secrets


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("https://host/c.jsonl.gz", "https://host/c.jsonl.gz"),
        ("https://host:8080/a@b.jsonl", "https://host:8080/a@b.jsonl"),
        ("https://user:secret@host:80/c.jsonl", "https://…@host:80/c.jsonl"),
        ("https://user:se@cret@host/c.jsonl", "https://…@host/c.jsonl"),
        ("https://secret@host/c.jsonl", "https://…@host/c.jsonl"),
        ("s3://key:sec/ret@bucket/c.jsonl", "s3://…@bucket/c.jsonl"),
        ("https://host/c.jsonl?X-Amz-Signature=secret&a=/b", "https://host/c.jsonl?…"),
        ("https://user:secret@host/c?secret", "https://…@host/c?…"),
        ("hf://datasets/a/b@main/c.parquet", "hf://datasets/a/b@main/c.parquet"),
    ],
)
def test_redacted(url: str, shown: str) -> None:
    assert remote.redacted(url) == shown
    assert remote.redacted(shown) == shown


@pytest.mark.parametrize("status", [200, 403, 404, 500])
def test_errors_show_no_secrets(status: int, server: Server) -> None:
    server.status["c.jsonl"] = status
    server.files["c.jsonl"] = LINES
    server.drop_after = 10
    url = server.url("c.jsonl?X-Amz-Signature=SECRET", "user:SECRET@")
    assert "SECRET" not in failure(url)
    assert "SECRET" not in failure(url.replace(str(server.server_port), "9"))
    assert "SECRET" not in repr(remote.Remote(url, remote.redacted(url)))


def test_a_run_with_remote_input_gives_the_same_bytes_and_keeps_no_secret(
    server: Server, prepare, corpus: Path, queries: Path, tmp_path: Path, capsys, caplog
) -> None:
    content = corpus.read_bytes().replace(b'"id"', b'"no_id"') + b'{"id": "secret-free, malformed\n'
    corpus.write_bytes(content)
    flags = ["--top_k_retrieval", "3", "--max_bad_fraction", "0.1"]
    evaluation = tmp_path / "dev.jsonl"
    evaluation.write_text('{"question": "what causes tides"}\n')
    assert prepare(*flags, "--decontaminate", str(evaluation)) == 0
    local = prepare.output.read_bytes()
    server.files |= {"corpus.jsonl": gzip.compress(content), "queries.txt": queries.read_bytes()}
    server.files["dev.jsonl"] = evaluation.read_bytes()
    signed = "?X-Amz-Signature=SECRET"
    given = ["--corpus_path", server.url(f"corpus.jsonl{signed}", "user:SECRET@")]
    given += ["--queries_file", server.url(f"queries.txt{signed}", "user:SECRET@")]
    given += ["--decontaminate", server.url(f"dev.jsonl{signed}", "user:SECRET@")]
    output = tmp_path / "remote.json"
    assert prepare(*flags, *given, "--output_file", str(output), inputs=False) == 0
    assert output.read_bytes() == local
    work = tmp_path / "remote.json.work"
    kept = [path.read_bytes() for path in work.rglob("*") if path.is_file()]
    assert len(kept) > 10
    assert not [content for content in kept if b"SECRET" in content]
    assert any(b"127.0.0.1" in path.read_bytes() for path in (work / "quarantine").iterdir())
    parameters = json.loads((work / "manifest.json").read_text())["parameters"]
    assert parameters["corpus_path"] == [f"http://…@127.0.0.1:{server.server_port}/corpus.jsonl?…"]
    out, err = capsys.readouterr()
    assert "SECRET" not in out + err + caplog.text
    again = ["--config", str(work / "manifest.json"), "--output_file", str(output)]
    assert prepare(*again, inputs=False) == 1
    assert "give the flag again with the complete URL" in capsys.readouterr().err
    assert prepare(*again, *given, inputs=False) == 0
    assert "nothing to do" in capsys.readouterr().out


def test_the_next_command_of_an_index_shows_the_url_without_its_secrets(
    server: Server, models, tmp_path: Path, capsys
) -> None:
    server.files["c.jsonl"] = LINES
    flags = ["--corpus_path", server.url("c.jsonl?s=SECRET"), "--index_dir", str(tmp_path / "i")]
    assert cli(["index", *flags, "--retriever_model", str(models["splade"]), "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert f"--corpus_path '{server.url('c.jsonl')}?…'" in out
    assert "SECRET" not in out
