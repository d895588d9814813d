"""Approximate search: its recall, the record of the recall, and the errors of a run."""

import json
import sys

import numpy as np
import pyarrow as pa
import pytest
import scipy.sparse as sp

from scaledown.data.retrieval.index import Ranking, pack, search
from scaledown.data.retrieval.parts import open_stage
from scaledown.data.retrieval.seismic import CARES, SeismicIndex, recall_of_search
from scaledown.errors import install_command
from scaledown.run.directory import RunDirectory
from scaledown.run.stage import Stage

pytest.importorskip("seismic", reason="Seismic has wheels for Linux and Python up to 3.12")


def vectors(rows: int, seed: int = 0) -> sp.csr_matrix:
    """Passages of a few topics, so that neighbours exist."""
    random = np.random.default_rng(seed)
    topics = random.random((12, 400)) * (random.random((12, 400)) < 0.15)
    mixed = topics[random.integers(0, 12, rows)] * (random.random((rows, 400)) < 0.7)
    return sp.csr_matrix(mixed.astype(np.float16).astype(np.float32))


@pytest.fixture
def stage(tmp_path) -> Stage:
    stage = Stage(RunDirectory(tmp_path / "run"), "vectors", {})
    for shard in range(4):
        stage.write(shard, pack(vectors(300, shard)))
    stage.finish([300] * 4, {})
    return stage


def exact(stage: Stage, queries: sp.csr_matrix, k: int) -> Ranking:
    return search(queries, [lambda n=n: stage.table(n) for n in range(4)], [300] * 4, k)


@pytest.mark.parametrize("memory", [1.0, 1e-6])
def test_search_finds_most_of_the_exact_top_k_for_any_number_of_groups(stage, tmp_path, memory) -> None:
    index = SeismicIndex(RunDirectory(tmp_path / "home"), stage, memory)
    index.build()
    files = list((tmp_path / "home" / "approximate").glob("*/*.seismic"))
    assert len(files) == (1 if memory == 1.0 else 4)
    queries = vectors(50, 99)
    best = exact(stage, queries, 10)
    found = index.search(queries, 10, CARES[-1])
    assert recall_of_search(found, best) > 0.8  # many scores are nearly the same
    assert found.scores.sum() > 0.98 * best.scores.sum()
    same = found.rows == best.rows
    np.testing.assert_allclose(found.scores[same], best.scores[same], rtol=1e-3)


def test_index_is_built_once(stage, tmp_path, monkeypatch) -> None:
    home = RunDirectory(tmp_path / "home")
    SeismicIndex(home, stage, 1.0).build()
    monkeypatch.setattr(SeismicIndex, "_build", lambda *_: pytest.fail("built again"))
    SeismicIndex(home, stage, 1.0).build()


def test_recall_is_the_share_of_the_exact_top_k() -> None:
    scores = np.zeros((2, 3), np.float32)
    best = Ranking(np.array([[1, 2, 3], [4, 5, 6]]), scores)
    assert recall_of_search(best, best) == 1
    assert recall_of_search(Ranking(np.array([[3, 1, 9], [7, 8, 9]]), scores), best) == pytest.approx(1 / 3)


def test_prepare_records_the_recall_and_stops_below_min_recall(prepare, capsys, monkeypatch) -> None:
    flags = ("--search", "approximate", "--top_k_retrieval", "5")
    assert prepare(*flags) == 0
    stages = json.loads((prepare.work / "manifest.json").read_text())["stages"]
    assert stages["candidates"]["measured"]["recall"] >= 0.99
    assert "recall 1.0000" in capsys.readouterr().out
    approximate = json.loads(prepare.output.read_text())
    assert prepare("--top_k_retrieval", "5", "--output_file", str(prepare.output) + ".exact.json") == 0
    best = json.loads((prepare.output.parent / (prepare.output.name + ".exact.json")).read_text())
    assert [set(r["documents"]) for r in approximate] == [set(r["documents"]) for r in best]

    wrong = Ranking(np.zeros((4, 4), np.int64), np.zeros((4, 4), np.float32))
    monkeypatch.setattr(SeismicIndex, "search", lambda *_: wrong)
    assert prepare("--search", "approximate", "--top_k_retrieval", "4") == 1
    assert "below --min_recall 0.99: use --search exact" in capsys.readouterr().err


def test_missing_library_is_reported_before_any_work(prepare, capsys, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "seismic", None)
    assert prepare("--search", "approximate") == 1
    assert install_command("approximate") in capsys.readouterr().err
    assert not list(prepare.work.glob("passages/*"))


def test_dense_vectors_are_refused(prepare, models, capsys) -> None:
    flags = ("--search", "approximate", "--retriever_model", str(models["dense"]))
    assert prepare(*flags) == 2
    assert "use --search exact" in capsys.readouterr().err
    assert not list(prepare.work.glob("passages/*"))


@pytest.mark.parametrize("memory", [1.0, 1e-6])
def test_removed_passages_are_replaced_or_the_query_is_marked_unsure(stage, tmp_path, memory) -> None:
    home = RunDirectory(stage.folder.parents[1])
    queries, k = vectors(20, 99), 10
    best = exact(stage, queries, 40).rows
    few = np.unique(best[:, :3])  # some of the best passages
    many = np.unique(best)  # all of the best passages
    for number, removed in enumerate((few, many)):
        Stage(home, "removed", {"rows": str(number)}).write(0, pa.table({"row": removed}))
        settings = {"parts": [stage.settings], "removed": str(number)}
        open_stage(home, "vectors", settings).finish([300] * 4, {})
        changed = open_stage(home, "vectors", settings)
        index = SeismicIndex(RunDirectory(tmp_path / "home"), changed, memory)
        index.build()
        found = index.search(queries, k, CARES[-1])
        assert not np.isin(found.rows, removed).any()
        loads = [lambda n=n: stage.table(n) for n in range(4)]
        expected = search(queries, loads, [300] * 4, k, removed=removed)
        whole = (found.rows >= 0).all(axis=1)
        if number == 0:
            assert whole.mean() > 0.8
            sure = [Ranking(*(own[whole] for own in ranking)) for ranking in (found, expected)]
            assert recall_of_search(*sure) > 0.8
        else:
            assert not whole.all(), "a caller searches the others exactly"
    assert len({path.parent for path in (tmp_path / "home").rglob("*.seismic")}) == 1, (
        "nothing is built again"
    )
