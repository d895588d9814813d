"""What of a folder is read, and what is passed over and why: links, other files, files about the data."""

import gzip
import json
import os
import shutil
from pathlib import Path

import fsspec
import pytest

from scaledown.cli import main
from scaledown.data.input import files, folders
from scaledown.errors import InputError

ARTICLE = '{"id": "1", "title": "Tides", "text": "The moon causes tides."}\n'


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "corpus"
    path.mkdir()
    (path / "part1.jsonl").write_text(ARTICLE)
    return path


def names(folder: Path) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in files.input_files(folder, "--corpus_path")]


def passed(folder: Path) -> dict[str, str]:
    return files.passed_over(folder, "--corpus_path")


def test_every_other_file_is_named_with_the_reason(folder: Path, caplog) -> None:
    for name in ("part5.jsonl.xz", "part4.jsonl.1", "part-00000", "_SUCCESS", ".DS_Store", "deep/photo.png"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(ARTICLE)
    (folder / ".git").mkdir()
    (folder / ".git" / "config").touch()
    (folder / "out.json.work").mkdir()
    (folder / "out.json.work" / "a.jsonl").write_text(ARTICLE)
    os.mkfifo(folder / "pipe.jsonl")
    folders._tell.cache_clear()
    assert names(folder) == ["part1.jsonl"]
    expected = {
        ".DS_Store": "is hidden",
        ".git": "is hidden",
        "_SUCCESS": "has no ending, which would tell its format",
        "deep/photo.png": "its ending .png names no format that is read",
        "out.json.work": "is a run directory",
        "part-00000": "has no ending, which would tell its format",
        "part4.jsonl.1": "its ending .1 names no format that is read",
        "part5.jsonl.xz": "its ending .xz names no format that is read",
        "pipe.jsonl": "is no regular file",
    }
    assert passed(folder) == expected
    (told,) = [record.getMessage() for record in caplog.records]
    assert told.startswith(f"--corpus_path {folder}: passed over 9: ")
    for name, reason in expected.items():
        assert f"{name} ({reason})" in told
    assert names(folder) == ["part1.jsonl"]
    assert len(caplog.records) == 1, "it is said once"


def test_links_are_followed_each_once(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    (other / "deeper").mkdir(parents=True)
    (other / "deeper" / "part2.jsonl").write_text(ARTICLE)
    (other / "part3.jsonl").write_text(ARTICLE)
    (folder / "a_link").symlink_to(other, target_is_directory=True)
    (folder / "b_link").symlink_to(other, target_is_directory=True)
    (folder / "a_part1.jsonl").symlink_to(folder / "part1.jsonl")
    (folder / "part4.jsonl").symlink_to(other / "part3.jsonl")
    (folder / "back").symlink_to(folder, target_is_directory=True)
    assert names(folder) == ["a_link/deeper/part2.jsonl", "a_link/part3.jsonl", "part1.jsonl"]
    assert passed(folder) == {
        "a_part1.jsonl": "is the same as part1.jsonl",
        "b_link": "is the same as a_link",
        "back": "is the same as .",
        "part4.jsonl": "is the same as a_link/part3.jsonl",
    }


def test_a_corpus_may_be_a_link(folder: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(folder, target_is_directory=True)
    assert names(link) == ["part1.jsonl"]


@pytest.mark.parametrize("target", ["nowhere.jsonl", "part0.jsonl"])
def test_a_link_that_leads_nowhere_is_an_error(target: str, folder: Path) -> None:
    (folder / "part0.jsonl").symlink_to(target)
    with pytest.raises(InputError, match=r"part0\.jsonl is a link that leads nowhere .*: repair or delete"):
        names(folder)


@pytest.mark.parametrize("name", ["README.md", "readme.txt", "LICENSE.txt", "LICENSE-APACHE.md", "Notice.md"])
def test_readme_and_licence_are_no_articles(name: str, folder: Path) -> None:
    (folder / "deep").mkdir()
    for place in (folder, folder / "deep"):
        (place / name).write_text("All rights reserved.")
    assert names(folder) == ["part1.jsonl"]
    assert passed(folder) == {name: "is about the data", f"deep/{name}": "is about the data"}


def test_files_that_programs_leave_beside_data_are_not_read(folder: Path) -> None:
    left = ("_temporary/0/part-1.json", "_delta_log/000.json", "__MACOSX/a.jsonl", "_spark_metadata/0")
    about = ("dataset_infos.json", "SHA256SUMS.txt", "requirements.txt", "CODE_OF_CONDUCT.md")
    for name in (*left, *about):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(ARTICLE)
    assert names(folder) == ["part1.jsonl"]
    assert passed(folder) == dict.fromkeys(about, "is about the data") | dict.fromkeys(
        (name.partition("/")[0] for name in left), "is what a program left, and no data"
    )


def test_queries_and_judgements_beside_a_corpus_are_no_articles(folder: Path) -> None:
    """As BEIR's folders have them."""
    (folder / "part1.jsonl").rename(folder / "corpus.jsonl")
    (folder / "queries.jsonl").write_text('{"_id": "1", "text": "Who?"}\n')
    (folder / "qrels").mkdir()
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n1\t1\t1\n")
    assert names(folder) == ["corpus.jsonl"]
    assert passed(folder) == dict.fromkeys(
        ("qrels/test.tsv", "queries.jsonl"), "holds no corpus, as its name says"
    )
    (queries,) = files.input_files(folder, "--queries_file")
    assert queries.name == "queries.jsonl"
    assert list(files.passed_over(folder, "--queries_file")) == ["corpus.jsonl", "qrels/test.tsv"]


def test_among_texts_only_names_in_capitals_are_left_out(folder: Path) -> None:
    (folder / "part1.jsonl").unlink()
    for name in ("README.md", "LICENSE", "Notice.md", "License.txt", "readme first.txt", "Tides.md"):
        (folder / name).write_text("A text.")
    assert names(folder) == ["License.txt", "Notice.md", "Tides.md", "readme first.txt"]


def test_where_there_is_nothing_else_they_are_the_data(folder: Path) -> None:
    (folder / "part1.jsonl").unlink()
    for place in ("a", "b"):
        (folder / place).mkdir()
        (folder / place / "README.md").write_text("A package.")
    assert names(folder) == ["a/README.md", "b/README.md"]


def test_documents_whose_text_is_not_extracted_are_passed_over(folder: Path) -> None:
    (folder / "a.PDF").write_bytes(b"%PDF-1.7")
    (folder / "b.docx").write_bytes(b"PK")
    reason = "its text is not extracted here: save it as .txt"
    assert {name: why for name, why in passed(folder).items() if why == reason}.keys() == {"a.PDF", "b.docx"}


def test_folders_of_stores_are_listed_like_local_ones(caplog) -> None:
    memory = fsspec.filesystem("memory")
    for name in ("part1.jsonl", "README.md", "part5.jsonl.xz", ".cache/x.jsonl"):
        memory.pipe(f"/passed/corpus/{name}", ARTICLE.encode())
    source = files.locate("memory://passed/corpus", "--corpus_path")
    assert len(files.sources(source, "")) == 1
    assert sorted(files.passed_over(source, "")) == [".cache", "README.md", "part5.jsonl.xz"]
    assert "passed over 3" in caplog.text


def test_run_reports_files_that_it_did_not_read(prepare, folder: Path, corpus: Path, capsys) -> None:
    shutil.copy(corpus, folder / "part1.jsonl")
    (folder / "part5.jsonl.xz").write_bytes(b"\xfd7zXZ")
    (folder / "LICENSE.txt").write_text("All rights reserved.")
    flags = ("--corpus_path", str(folder), "--top_k_retrieval", "2")
    said = (
        "passed over: 2 of --corpus_path: LICENSE.txt (is about the data), part5.jsonl.xz (its ending .xz "
        "names no format that is read)"
    )
    for _ in range(2):  # a finished run says so again
        assert prepare(*flags) == 0
        assert said in capsys.readouterr().out
    manifest = json.loads((prepare.work / "manifest.json").read_text())
    assert list(manifest["passed_over"]["--corpus_path"]) == ["LICENSE.txt", "part5.jsonl.xz"]
    for name in ("report.html", "README.md"):
        text = (prepare.work / name).read_text()
        assert "Files that were passed over" in text
        assert "names no format that is read" in text


def test_index_reports_files_that_it_did_not_read(tiny_flags, folder: Path, tmp_path: Path, capsys) -> None:
    (folder / "part5.jsonl.xz").write_bytes(b"\xfd7zXZ")
    (folder / "part6.tsv").write_text("7\tA text of some words, and more.\n8\tAnother text.\n")
    words = ["index", "--corpus_path", str(folder), "--index_dir", str(tmp_path / "index"), *tiny_flags[:2]]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert f"passed over: 1 of --corpus_path: {folder}/part5.jsonl.xz (its ending .xz names no format" in out
    assert f"{folder}/part6.tsv: tab-separated, no header, id = column 1, text = column 2" in out


# the same text


def documents(path: Path) -> list[list[str]]:
    return [record["documents"] for record in json.loads(path.read_text())]


@pytest.mark.parametrize("extra", [[], ["--search", "approximate", "--min_recall", "0.5"]])
def test_the_same_text_is_one_candidate(
    extra, prepare, folder: Path, corpus: Path, tmp_path: Path, capsys
) -> None:
    """A corpus, its copy and the same compressed find what the corpus alone finds."""
    if extra:
        pytest.importorskip("seismic")
    flags = ["--top_k_retrieval", "9", *extra]
    assert prepare(*flags, "--corpus_path", str(corpus), "--output_file", str(tmp_path / "once.json")) == 0
    out = capsys.readouterr().out
    assert "4 examples, 9 documents each" in out
    assert "collapsed" not in out
    shutil.copy(corpus, folder / "part1.jsonl")
    shutil.copy(corpus, folder / "part2.jsonl")
    (folder / "part3.jsonl.gz").write_bytes(gzip.compress(corpus.read_bytes()))
    assert prepare(*flags, "--corpus_path", str(folder), "--output_file", str(tmp_path / "thrice.json")) == 0
    out = capsys.readouterr().out
    assert "4 examples, 9 documents each" in out
    assert "candidates had the text of one that ranked above them" in out
    once, thrice = documents(tmp_path / "once.json"), documents(tmp_path / "thrice.json")
    assert [len(set(own)) for own in thrice] == [9] * 4
    if not extra:
        assert thrice == once
    counts = json.loads((tmp_path / "thrice.json.work" / "manifest.json").read_text())["stages"]["candidates"]
    assert counts["counts"]["candidates"] == 36
    assert counts["counts"]["collapsed"] >= 4 * 16, "two others of each but the last"


def test_summary_has_the_number_of_documents_if_texts_are_few(
    prepare, folder: Path, capsys, tmp_path: Path
) -> None:
    lines = [json.dumps({"id": str(n), "title": "T", "text": f"Text {n % 3}."}) for n in range(30)]
    (folder / "part1.jsonl").write_text("\n".join(lines))
    flags = ("--enable_reranking", "--top_k_retrieval", "8", "--top_k_reranking", "5")
    assert prepare("--corpus_path", str(folder), *flags) == 0
    assert "4 examples, 3 documents each" in capsys.readouterr().out
    assert [sorted(own) for own in documents(prepare.output)] == [
        ["T\nText 0.", "T\nText 1.", "T\nText 2."]
    ] * 4
    stages = json.loads((prepare.work / "manifest.json").read_text())["stages"]
    assert stages["ranked"]["counts"]["pairs"] == stages["candidates"]["counts"]["candidates"] == 12
    assert main(["export", str(prepare.output), "--format", "trec", "--output_dir", str(tmp_path / "r")]) == 0
    assert main(["validate", str(prepare.output)]) == 0
