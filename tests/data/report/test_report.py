"""`scaledown report`, by itself and at the end of a run: what stands on the page is what was counted."""

import json
from pathlib import Path

import pytest

from conftest import ROOT
from scaledown.cli import main
from scaledown.data.report.fidelity import UNKNOWN, allows, fidelity, licence_of, licences
from scaledown.data.session import result
from scaledown.errors import OutputError

pytestmark = pytest.mark.plots

GOLD = [
    {"question": "What is photosynthesis?", "answer": ["is"]},
    {"question": "no such question", "answer": ["x"]},
]
RERANK = ("--enable_reranking", "--top_k_retrieval", "6", "--top_k_reranking", "3")


def test_a_run_ends_with_its_page_and_card(prepare, capsys) -> None:
    assert prepare(*RERANK) == 0
    assert f"look: {prepare.work / 'report.html'}" in capsys.readouterr().out
    page = (prepare.work / "report.html").read_text()
    card = (prepare.work / "README.md").read_text()
    assert card.startswith("---\nlicense: other\n")
    for text in ("Where the first passage had stood before reranking", "Beside the paper", "cross_encoder"):
        assert text in page
    for row in (
        "| queries | 893,000 | 4 | differs |",
        "| longest answer | 128 tokens | 8 tokens | differs |",
    ):
        assert row in card
    manifest = json.loads((prepare.work / "manifest.json").read_text())
    for name in manifest["stages"]:
        assert f"| {name} |" in card


def test_left_out_records_are_shown_with_their_reason(prepare, queries: Path) -> None:
    more = prepare.output.parent / "more.txt"
    more.write_text("What is photosynthesis?\nSomething <b>else</b>?\n")
    assert (
        prepare("--queries_file", str(queries), str(more), "--deduplicate", "exact", "--top_k_retrieval", "2")
        == 0
    )
    page = (prepare.work / "report.html").read_text()
    assert "Left out by the run" in page
    assert "exact match of an earlier query" in page


def test_a_report_that_fails_takes_no_run_with_it(prepare, monkeypatch, capsys) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OutputError("no space left: free some")

    monkeypatch.setattr(result, "write_report", fail)
    assert prepare("--top_k_retrieval", "4") == 0
    assert "no report (no space left" in capsys.readouterr().err


def test_the_command_with_right_answers(prepare, tmp_path: Path, capsys) -> None:
    assert prepare(*RERANK) == 0
    record = next(
        one for one in json.loads(prepare.output.read_text()) if one["query"] == GOLD[0]["question"]
    )
    found = {"question": record["query"], "answer": record["documents"][0].split()[:1]}
    gold = tmp_path / "gold.jsonl"
    gold.write_text("".join(json.dumps(one) + "\n" for one in (found, GOLD[1])))
    page = tmp_path / "page.html"
    words = ["report", str(prepare.output), "--output", str(page), "--gold", str(gold)]
    assert main(words) == 0
    assert f"look: {page}, " in capsys.readouterr().out
    text = page.read_text()
    assert "R@k: share of 1 queries with a right answer" in text
    assert "retrieved" in text
    assert "<mark>" in text
    assert page.with_suffix(".md").exists()
    first = page.read_bytes()
    assert main(words) == 0
    assert page.read_bytes() == first


def test_answers_beside_the_queries_are_right_answers(prepare, tmp_path: Path) -> None:
    queries = tmp_path / "with_answers.jsonl"
    queries.write_text(json.dumps(GOLD[0]) + "\n")
    assert prepare("--queries_file", str(queries), "--top_k_retrieval", "4") == 0
    assert "First document that holds a right answer" in (prepare.work / "report.html").read_text()


def test_a_file_of_others_needs_no_run(tmp_path: Path, capsys) -> None:
    data = tmp_path / "theirs.json"
    data.write_text(json.dumps([{"query": "q?", "documents": ["d"], "answer": "d"}]))
    assert (
        main(["report", str(data), "--output", str(tmp_path / "r.html"), "--card", str(tmp_path / "C.md")])
        == 0
    )
    assert "Beside the paper" not in (tmp_path / "r.html").read_text()
    assert (tmp_path / "C.md").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere.json"], "there is no such file"),
        (["{data}", "--output", "data.json/r.html"], "data.json/r.html cannot be written"),
        (["{data}", "--card", "report.html"], "are one file"),
        (["{data}", "--gold", "missing.jsonl"], "--gold missing.jsonl"),
        (["{empty}"], "holds no valid record"),
        (["{data}", "--output", "data.json"], "data.json is also read"),
        (["{data}", "--card", "notes.md"], "notes.md already exists"),
    ],
)
def test_user_errors_are_reported_in_one_line(words, message, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data.json").write_text(json.dumps([{"query": "q?", "documents": ["d"], "answer": "d"}]))
    (tmp_path / "empty.json").write_text("[]")
    (tmp_path / "notes.md").write_text("mine")
    named = [word.format(data="data.json", empty="empty.json") for word in words]
    assert main(["report", *named]) in {1, 2}
    shown = capsys.readouterr().err
    assert message in shown
    assert "Traceback" not in shown


def manifest(**changes: object) -> dict:
    used = {
        "passages": "tokens",
        "passage_tokens": 128,
        "retriever_model": "naver/splade-v3@abc",
        "reranker_model": "naver/trecdl22-crossencoder-debertav3",
        "teacher_model": "mistralai/Mistral-7B-Instruct-v0.2",
        "enable_reranking": True,
        "top_k_retrieval": 20,
        "top_k_reranking": 5,
        "max_new_tokens": 128,
        "corpus_path": "kilt.json",
    }
    stages = {"queries": {"counts": {"queries": 893_000}}}
    return {"parameters": used | changes, "stages": stages, "models": {"retriever": "commit:" + "a" * 40}}


def test_the_papers_own_settings_differ_in_nothing() -> None:
    assert not [one for one in fidelity(manifest()) if one.same is False]


def test_other_settings_are_seen() -> None:
    other = manifest(passage_tokens=64, teacher_model="x", top_k_reranking=3, enable_reranking=False)
    differs = {one.name for one in fidelity(other) if one.same is False}
    assert differs == {"passages", "teacher", "documents to a query", "reranking scores kept"}


def test_report_names_no_folder_of_this_machine(tmp_path: Path) -> None:
    secret = tmp_path / "alice" / "secret"
    secret.mkdir(parents=True)
    names = {
        "teacher_model": str(secret / "x"),
        "prompt": str(secret / "p.txt"),
        "query_dataset": str(secret),
    }
    names |= {"reranker_model": f"ql:{secret}", "corpus_path": str(secret / "c.jsonl")}
    names |= {"decontaminate": [str(secret / "nq.jsonl")], "retriever_model": "./alice/model"}
    shown = [*fidelity(manifest(**names)), *licences(manifest(**names))]
    assert "alice" not in str(shown)
    assert "ql:secret" in str(shown)


def test_settings_that_the_paper_does_not_have_are_listed() -> None:
    names = {one.name for one in fidelity(manifest(bad_answers="retry", deduplicate="near"))}
    assert {"bad answers", "repeated queries left out", "learning rates", "passages retrieved"} <= names


def test_licences(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\nlicense: cc-by-nc-4.0\nlanguage: en\n---\n# A model\n")
    assert licence_of(str(tmp_path)) == "cc-by-nc-4.0"
    assert licence_of("naver/splade-v3@abc") == "cc-by-nc-sa-4.0"
    assert licence_of("bundled:splade-tiny").lower() == "apache-2.0"
    assert licence_of("nobody/knows") == UNKNOWN
    assert licence_of(str(tmp_path / "nowhere")) == UNKNOWN
    assert allows("cc-by-nc-sa-4.0").startswith("no commercial use")
    assert "same licence" in allows("cc-by-nc-sa-4.0")
    assert allows("cc-by-nd-4.0").startswith("nothing made of it")
    assert [one.licence for one in licences(manifest(query_dataset="squad")) if one.part == "queries"] == [
        "cc-by-sa-4.0"
    ]
    assert allows("Apache-2.0").startswith("any use")
    retriever, corpus = licences(manifest())
    assert retriever.revision == "commit:aaaaaaaaaaaa"
    assert corpus.licence == UNKNOWN


def test_the_card_loads_as_the_hub_reads_it(prepare) -> None:
    from huggingface_hub import DatasetCard

    assert prepare("--top_k_retrieval", "4") == 0
    data = DatasetCard((prepare.work / "README.md").read_text()).data
    assert data.license == "other"
    assert data.size_categories == ["n<1K"]


def test_the_readme_names_the_command() -> None:
    assert "scaledown report train_data.json" in (ROOT / "README.md").read_text()
