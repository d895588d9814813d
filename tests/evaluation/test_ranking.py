"""Rankings against values computed by hand, and errors that name file and line."""

import json
import math
from pathlib import Path

import pytest

from scaledown.cli import main
from scaledown.errors import InputError, UsageError
from scaledown.evaluation.ranking import parse_measures, per_query, read_qrels, read_run
from scaledown.evaluation.results import read_results

RUN = "q1 Q0 a 1 3.0 x\nq1\tQ0\tb\t2\t2.0\tx\nq1 Q0 c 3 1.0 x\nq2 Q0 b 1 9 x\nq9 Q0 a 1 1 x\n"
QRELS = "q1 0 b 1\nq1 0 c 2\nq1 0 d 0\nq2 0 a 1\nq3 0 a 1\n"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    path = tmp_path / "a.run"
    path.write_text(RUN)
    return path


@pytest.fixture
def qrels(tmp_path: Path) -> Path:
    path = tmp_path / "qrels.txt"
    path.write_text(QRELS)
    return path


def test_measures_computed_by_hand(run: Path, qrels: Path) -> None:
    found = per_query(read_run(run), read_qrels(qrels), parse_measures(["nDCG@10", "R@2", "RR@10"]))
    # q1: grades 0, 1, 2 at ranks 1 to 3; ideal is 2, 1. q2: nothing right. q3: not in the run.
    dcg = 1 / math.log2(3) + 2 / math.log2(4)
    ideal = 2 / math.log2(2) + 1 / math.log2(3)
    assert found["nDCG@10"] == pytest.approx([dcg / ideal, 0, 0])
    assert found["R@2"] == pytest.approx([0.5, 0, 0])
    assert found["RR@10"] == pytest.approx([0.5, 0, 0])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("q1 Q0 a 1 3.0 x\nq1 Q0 b 2 2.0\n", ":2: 5 fields, expected 6: qid Q0 docid rank score tag"),
        ("q1 Q0 a 1 high x\n", ":1: score 'high' is not a number"),
        ("q1 Q0 a 1 nan x\n", ":1: score 'nan' is not a number"),
        ("q1 Q0 a 1 3 x\n\nq1 Q0 a 2 2 x\n", ":3: document a occurs twice for query q1"),
        ("\n", "is empty"),
    ],
)
def test_malformed_runs_are_named_with_their_line(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.run"
    path.write_text(text)
    with pytest.raises(InputError, match=r"--run .*bad\.run") as error:
        read_run(path)
    assert message in str(error.value)


def test_malformed_qrels_are_named_with_their_line(tmp_path: Path) -> None:
    path = tmp_path / "qrels.txt"
    path.write_text("q1 0 a 1\nq1 0 b 1.5\n")
    with pytest.raises(InputError, match=r"--qrels .*qrels\.txt:2: relevance '1\.5' is not a whole number"):
        read_qrels(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("q1 0 a 1\nq1 0 a 0\n", "occurs twice"),
        ("q1 0 a 1e300\n", "use small grades"),
        ("q1 0 a 1 x\n", "5 fields, expected 4: qid 0 docid relevance or 3: query-id corpus-id score"),
        ("q1 0 a inf\n", "is not a whole number"),
        ("query-id\tcorpus-id\tscore\n", "is empty"),
    ],
)
def test_qrels_that_cannot_be_used_are_refused(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "qrels.txt"
    path.write_text(text)
    with pytest.raises(InputError) as error:
        read_qrels(path)
    assert message in str(error.value)


def test_qrels_of_other_forms(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    expected = {"q1": {"b": 1, "c": 2, "d": 0}, "q2": {"a": 1}}
    for name, text in {
        "floats": "q1 0 b 1.0\nq1 0 c 2.0\nq1 0 d 0.0\nq2 0 a 1.0\n",
        "again": "q1 0 b 1\nq1 0 b 1\nq1 0 c 2\nq1 0 d 0\nq2 0 a 1\n",
        "beir": "query-id\tcorpus-id\tscore\nq1\tb\t1\nq1\tc\t2\nq1\td\t0\nq2\ta\t1\n",
        "quoted": '"query-id"\t"corpus-id"\t"score"\nq1\t"b"\t1\n"q1"\tc\t2\nq1\td\t"0"\nq2\ta\t1\n',
        "plain": "q1\tb\t1\nq1\tc\t2\nq1\td\t0\nq2\ta\t1\n",
        "below": "q1 0 b 1\nq1 0 c 2\nq1 0 d -1\nq2 0 a 1\n",
    }.items():
        (tmp_path / name).write_text(text)
        caplog.clear()
        with caplog.at_level("INFO"):
            assert read_qrels(tmp_path / name) == expected, name
        assert ("read as query-id corpus-id score, after a line" in caplog.text) == (
            name in {"beir", "quoted"}
        )
        assert ("1 relevances below 0 count as 0" in caplog.text) == (name == "below")
    (tmp_path / "tabs").write_text("query-id\tcorpus-id\tscore\nq 1\ta b\t1\n")
    assert read_qrels(tmp_path / "tabs") == {"q 1": {"a b": 1}}


def test_a_run_with_ranks_alone(qrels: Path, run: Path, tmp_path: Path) -> None:
    path = tmp_path / "msmarco.tsv"
    path.write_text("q1\ta\t1\nq1\tb\t2\nq1\tc\t3\nq2\tb\t1\n")
    measures = parse_measures(["nDCG@10", "R@2", "RR@10"])
    assert read_run(path) == {"q1": {"a": -1, "b": -2, "c": -3}, "q2": {"b": -1}}
    judged = read_qrels(qrels)
    assert per_query(read_run(path), judged, measures) == per_query(read_run(run), judged, measures)
    path.write_text("q1\ta\t0.93\n")
    with pytest.raises(InputError, match=r"rank '0\.93' is not a whole number"):
        read_run(path)


def test_scores_in_the_place_of_ranks_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.run"
    path.write_text("q1\ta\t30\nq1\tb\t20\nq1\tc\t10\n")
    with pytest.raises(
        InputError, match="its third column holds no ranks: query q1 has none of 0 or 1; give"
    ):
        read_run(path)
    path.write_text("query-id\tcorpus-id\tscore\nq1\ta\t1\nq1\tb\t2\n")
    with pytest.raises(InputError, match=r":1: its last column is called score, expected rank"):
        read_run(path)
    path.write_text("qid\tdocid\trank\nq1\ta\t0\nq1\tb\t1\n")
    assert read_run(path) == {"q1": {"a": 0, "b": -1}}


def test_ranks_that_contradict_scores_are_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "a.run"
    lines = ("q1 Q0 a 1 1.0", "q1 Q0 b 2 2.0", "q2 Q0 a 1 2", "q2 Q0 b 2 1", "q3 Q0 a 0 1", "q3 Q0 b 0 2")
    path.write_text("".join(f"{line} x\n" for line in lines))
    read_run(path)
    assert "the ranks of 1 of 3 queries contradict their scores: scores count" in caplog.text


def test_no_judgement_ends_the_process_and_ids_may_be_anything() -> None:
    measures = parse_measures(["nDCG@10", "R@20", "RR@10", "AP", "P@5", "Judged@10", "Bpref"])
    run = {"q\0": {"a\0b": 2.0, "a": 1.0}, "\U0001f989": {"a": 1e300, "b": -1e300}}
    found = per_query(run, {"q\0": {"a": 1, "z": 0}, "\U0001f989": {"b": 0}, "q": {"a": 3}}, measures)
    assert found["RR@10"] == [0.5, 0, 0]
    assert found["AP"] == [0.5, 0, 0]


def test_ties_are_broken_in_one_way_by_all_measures(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As trec_eval does: of equal scores, the larger id first, whatever the rank says."""
    path = tmp_path / "a.run"
    path.write_text("q1 Q0 a 1 1 x\nq1 Q0 b 2 1 x\nq2 Q0 b 1 1 x\nq2 Q0 a 2 1 x\n")
    measures = parse_measures(["nDCG@1", "R@1", "RR@10", "P@1", "AP"])
    with caplog.at_level("INFO"):
        run = read_run(path)
    assert "2 ties, broken as trec_eval does" in caplog.text
    found = per_query(run, {"q1": {"a": 1}, "q2": {"b": 1}}, measures)
    assert found == {"nDCG@1": [0, 1], "R@1": [0, 1], "RR@10": [0.5, 1], "P@1": [0, 1], "AP": [0.5, 1]}


@pytest.mark.parametrize("name", ["nDCG@ten", "goodness", "", "__import__('os')"])
def test_unknown_measures_are_refused(name: str) -> None:
    with pytest.raises(UsageError, match="ir_measures knows no such measure"):
        parse_measures([name])


def test_queries_missing_from_a_ranking_are_reported(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "a.run").write_text("q1 Q0 a 1 1 x\nq1 Q0 b 2 2 x\nq1 Q0 c 3 1 x\n")
    (tmp_path / "qrels").write_text("q1 0 a 1\nq1 0 b -2\n")
    words = ["evaluate", "--run", str(tmp_path / "a.run"), "--qrels", str(tmp_path / "qrels")]
    assert main([*words, "--output_dir", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert "1 judgements below 0 count as 0" in out
    assert "a.run: the ranks of 1 queries contradict their scores" in out
    assert "a.run: 1 scores are tied" in out
    results = read_results(tmp_path / "out")
    assert results.counts == {"queries": 1, "below_0": 1}
    assert results.systems["a.run"].counts == {"missing": 0, "contradicted": 1, "tied": 1}
    assert results.systems["a.run"].measures["RR@10"].mean == pytest.approx(1 / 3)


def test_two_runs_are_compared(run: Path, qrels: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    other = tmp_path / "b.run"
    other.write_text("q1 Q0 c 1 2 x\nq1 Q0 b 2 1 x\nq2 Q0 a 1 9 x\n")
    output = tmp_path / "evaluation"
    words = ["evaluate", "--run", str(run), "--run", str(other), "--qrels", str(qrels)]
    assert main([*words, "--output_dir", str(output)]) == 0
    out = capsys.readouterr().out
    assert "3 judged queries" in out
    assert "against a.run" in out
    assert "a.run: 1 judged queries are not in the run" in out
    results = read_results(output)
    assert results.kind == "rankings"
    assert results.systems["b.run"].measures["RR@10"].mean == pytest.approx(2 / 3)
    assert results.systems["b.run"].differences["RR@10"].mean == pytest.approx(0.5)
    assert results.systems["a.run"].differences == {}
    lines = [json.loads(line) for line in (output / "queries.jsonl").read_text().splitlines()]
    assert [line["query_id"] for line in lines] == ["q1", "q2", "q3"]
    assert lines[1]["runs"]["b.run"]["RR@10"] == 1
    before = (output / "results.json").read_bytes()
    assert main([*words, "--output_dir", str(output)]) == 0
    assert (output / "results.json").read_bytes() == before
