"""Adding articles to an index and removing them."""

import json
import logging
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from conftest import ROOT
from scaledown.cli import main
from scaledown.config.index import IndexCommandConfig
from scaledown.config.prepare import PrepareConfig
from scaledown.data.build_index import IndexResult, build_index, settled
from scaledown.data.retrieval import IndexRetriever
from scaledown.data.retrieval.parts import IndexState, kept_rows, only_state, open_stage, states
from scaledown.data.teacher.questions import write_questions
from scaledown.devices import choice
from scaledown.devices.halving import Halving
from scaledown.errors import InputError, UsageError
from scaledown.records import Answer, full_text
from scaledown.run.directory import RunDirectory
from scaledown.run.stage import Stage
from scaledown.run.storage import Storage

QUERIES = ["What is photosynthesis?", "Who wrote it?", "How tall is the tower?", "What causes tides?", "the"]
ARTICLES = [
    json.loads(line) for line in (ROOT / "examples" / "corpus.jsonl").read_text("utf-8").splitlines()[:14]
]
NEW = [ARTICLES[10], {**ARTICLES[2], "text": ARTICLES[11]["text"]}, ARTICLES[12]]


def name(number: int) -> str:
    return str(ARTICLES[number]["wikipedia_id"])


def written(path: Path, articles: list[dict]) -> str:
    path.write_text("".join(json.dumps(article) + "\n" for article in articles), "utf-8")
    return str(path)


def index(folder: Path, model: Path, corpus: str = "", **changes) -> IndexResult:
    return build_index(
        IndexCommandConfig(
            corpus_path=(corpus,) if corpus else (),
            index_dir=str(folder),
            retriever_model=str(model),
            device="cpu",
            passages_per_shard=20,
            **changes,
        )
    )


def found(folder: Path, top_k: int = 8) -> list[list[tuple[str, str, float]]]:
    """Texts and scores for all queries, best first."""
    documents = IndexRetriever(folder, device="cpu").retrieve(QUERIES, top_k)
    return [[(own["id"], own["text"], own["score"]) for own in one] for one in documents]


def assert_same(one: list, two: list, tolerance: float = 1e-3) -> None:
    for own, other in zip(one, two, strict=True):
        assert [document[:2] for document in own] == [document[:2] for document in other]
        np.testing.assert_allclose([d[2] for d in own], [d[2] for d in other], rtol=tolerance)


def make_changed(folder: Path, model: Path) -> IndexResult:
    """An index of eight articles; then two are added, two removed, and the text of one is replaced."""
    corpora = folder.parent
    index(folder, model, written(corpora / "old.jsonl", ARTICLES[:8]))
    index(folder, model, add=(written(corpora / "more.jsonl", ARTICLES[8:10]),))
    new = (written(corpora / "new.jsonl", NEW),)
    return index(folder, model, add=new, remove=(name(5), name(8)))


@pytest.fixture(scope="module")
def template(models, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("changed")
    make_changed(folder / "index", models["splade"])
    return folder


@pytest.fixture
def changed(template, tmp_path) -> Path:
    shutil.copytree(template, tmp_path, dirs_exist_ok=True)
    return tmp_path / "index"


def kept() -> list[dict]:
    """The articles of `changed`, in its order."""
    return [*(ARTICLES[number] for number in (0, 1, 3, 4, 6, 7, 9)), *NEW]


@pytest.mark.parametrize("kind", ["splade", "dense"])
def test_changed_index_equals_new_index_of_the_same_articles(kind: str, models, tmp_path) -> None:
    folder, model = tmp_path / "index", models[kind]
    result = make_changed(folder, model)
    anew = index(tmp_path / "anew", model, written(tmp_path / "all.jsonl", kept()))
    for counted in ("articles", "passages"):
        assert result.stages["passages"].counts[counted] == anew.stages["passages"].counts[counted]
    assert result.stages["passages"].counts["removed"] > 0
    assert result.stages["vectors"].counts["passages"] == anew.stages["vectors"].counts["passages"]
    assert_same(found(folder), found(tmp_path / "anew"))
    assert_same(found(folder, 1000), found(tmp_path / "anew", 1000))


def test_added_article_replaces_the_one_with_its_id(changed, models, tmp_path, caplog) -> None:
    articles = [{"id": name(0), "title": "", "text": "The tower is tall."}, {"id": "a", "text": "New."}]
    with caplog.at_level(logging.INFO, "scaledown"):
        index(changed, models["splade"], add=(written(tmp_path / "a.jsonl", articles),))
    assert "2 articles added; 1 of them replace articles with the same id" in caplog.text
    (documents,) = IndexRetriever(changed, device="cpu").retrieve(["tower"], 1000)
    assert [own["text"] for own in documents if own["id"].startswith(f"{name(0)}_")] == ["The tower is tall."]
    result = index(changed, models["splade"])
    assert result.stages["passages"].counts["articles"] == len(kept()) + 1
    assert result.stages["passages"].counts["passages"] == len(documents)


def test_second_add_of_a_corpus_changes_nothing(changed, models, tmp_path, caplog) -> None:
    kinds = {"*.arrow", "done.json", "index.json"}
    before = {path: path.read_bytes() for kind in kinds for path in changed.rglob(kind)}
    with caplog.at_level(logging.INFO, "scaledown"):
        index(changed, models["splade"], add=(str(tmp_path / "new.jsonl"),))
    assert "all of its articles are in the index already" in caplog.text
    assert {path: path.read_bytes() for path in before} == before
    assert name(10) in ids_in(changed)
    index(changed, models["splade"], remove=(name(10),))
    assert name(10) not in ids_in(changed)
    index(changed, models["splade"], add=(str(tmp_path / "new.jsonl"),))
    assert name(10) in ids_in(changed)
    assert len(ids_in(changed)) == len(kept())


def ids_in(folder: Path) -> set[str]:
    """The ids of the articles that can be found."""
    return {own[0].rpartition("_")[0] for own in found(folder, 1000)[0]}


def test_remove_of_unknown_ids_changes_nothing(changed, models, tmp_path) -> None:
    before = found(changed)
    (tmp_path / "ids.txt").write_text(f"{name(0)}\nnobody\n\n{name(5)}\n")
    with pytest.raises(InputError, match=rf"--remove: 2 ids not found in the index.*: {name(5)}, nobody:"):
        index(changed, models["splade"], remove=(str(tmp_path / "ids.txt"),))
    with pytest.raises(InputError, match="no article would be left"):
        index(changed, models["splade"], remove=tuple(str(one["wikipedia_id"]) for one in kept()))
    assert found(changed) == before
    (tmp_path / "ids.txt").write_text(f"{name(0)}\n{name(10)}\n")
    index(changed, models["splade"], remove=(str(tmp_path / "ids.txt"),))
    assert ids_in(changed) == {str(one["wikipedia_id"]) for one in kept()} - {name(0), name(10)}


def test_open_retriever_keeps_the_state_it_opened(models, tmp_path) -> None:
    folder = tmp_path / "index"
    index(folder, models["splade"], written(tmp_path / "c.jsonl", ARTICLES[:4]))
    retriever = IndexRetriever(folder, device="cpu")
    before = retriever.retrieve(QUERIES, 100)
    index(folder, models["splade"], remove=(name(1),), add=(written(tmp_path / "d.jsonl", ARTICLES[4:6]),))
    assert retriever.retrieve(QUERIES, 100) == before
    assert IndexRetriever(folder, device="cpu").retrieve(QUERIES, 100) != before
    assert len(retriever) == len(before[0])


@pytest.mark.slow
def test_killed_change_leaves_the_old_state_and_continues(models, tmp_path) -> None:
    folder = tmp_path / "index"
    index(folder, models["splade"], written(tmp_path / "c.jsonl", ARTICLES[:4]))
    before = found(folder)
    add = written(tmp_path / "d.jsonl", ARTICLES[4:9])
    words = ["index", "--index_dir", str(folder), "--add", add, "--remove", name(1), "--device", "cpu"]
    words += ["--retriever_model", str(models["splade"]), "--passages_per_shard", "20"]
    for where in (
        "from scaledown.run.stage import Stage as owner; at = 'write'; last = 3",
        "from scaledown.data.retrieval.parts import IndexState as owner; at = 'write'; last = 1",
    ):
        code = (
            f"import os, sys; {where}\n"
            "count, real = 0, getattr(owner, at)\n"
            "def killed(*arguments, **keywords):\n"
            "    global count; count += 1\n"
            "    if count == last: os.kill(os.getpid(), 9)\n"
            "    return real(*arguments, **keywords)\n"
            "setattr(owner, at, killed)\n"
            "from scaledown.cli import main; sys.exit(main(sys.argv[1:]))"
        )
        done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, check=False)
        assert done.returncode == -signal.SIGKILL, done.stderr
        assert found(folder) == before
    assert main(words) == 0
    articles = [ARTICLES[0], *ARTICLES[2:9]]
    index(tmp_path / "anew", models["splade"], written(tmp_path / "all.jsonl", articles))
    assert_same(found(folder), found(tmp_path / "anew"))


def test_change_with_other_settings_is_refused(changed, models, tmp_path) -> None:
    add = (str(tmp_path / "new.jsonl"),)
    with pytest.raises(UsageError, match="--passage_tokens 64: the index in .* --passage_tokens 128"):
        index(changed, models["splade"], add=add, passage_tokens=64)
    with pytest.raises(UsageError, match="--weights uint8: the index in .* --weights float16"):
        index(changed, models["splade"], remove=(name(0),), weights="uint8")
    with pytest.raises(UsageError, match="is not the model that the index .*splade"):
        index(changed, models["dense"], add=add)
    with pytest.raises(UsageError, match="there is no index in"):
        index(tmp_path / "none", models["splade"], add=add)
    with pytest.raises(UsageError, match="there is no index in"):
        IndexRetriever(tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_corpus_path_chooses_one_of_several_indexes(models, tmp_path) -> None:
    folder, corpora = tmp_path / "index", [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    for path, articles in zip(corpora, (ARTICLES[:2], ARTICLES[2:4]), strict=True):
        index(folder, models["splade"], written(path, articles))
    with pytest.raises(UsageError, match="holds 2 indexes: choose one by --corpus_path"):
        index(folder, models["splade"], remove=(name(0),))
    index(folder, models["splade"], str(corpora[0]), remove=(name(0),))
    storage = Storage(folder)
    sizes = sorted(
        open_stage(RunDirectory(storage), "passages", state.passages).finished().counts["articles"]
        for state in states(storage)
    )
    assert sizes == [1, 2]


def test_new_index_is_recommended_when_much_is_removed(changed, models, caplog) -> None:
    with caplog.at_level(logging.WARNING, "scaledown"):
        index(changed, models["splade"], remove=tuple(name(number) for number in (0, 1, 3, 4)))
    assert "of its passages are removed: a new index of the same articles is smaller" in caplog.text


def test_kept_rows_skip_removed_rows() -> None:
    removed = np.array([0, 1, 4, 9])
    assert kept_rows(range(6), removed) == [2, 3, 5, 6, 7, 8]
    assert kept_rows([6, 0], removed) == [10, 2]
    assert kept_rows([3, 1], removed[:0]) == [3, 1]


def test_state_of_another_version_is_ignored(changed) -> None:
    (path,) = changed.glob("vectors/*/index.json")
    state = only_state(Storage(changed))
    for content in ("", "[]", '{"base": "x"}', json.dumps({**state._asdict(), "base": "../../evil"})):
        path.write_text(content)
        assert IndexState.read(Storage(changed), path) is None
        assert states(Storage(changed)) == []


# Runs over a changed index


def test_run_keeps_the_state_of_the_index_it_began_with(prepare, models, queries, tmp_path, capsys) -> None:
    folder = tmp_path / "index"
    index(folder, models["splade"], written(tmp_path / "old.jsonl", ARTICLES[:8]))
    flags = ["--queries_file", str(queries), "--index_dir", str(folder), "--top_k_retrieval", "4"]
    assert prepare(*flags, inputs=False) == 0, "without the corpus, over the index that is there"
    made = prepare.output.read_bytes()
    index(folder, models["splade"], remove=(name(0),), add=(written(tmp_path / "n.jsonl", ARTICLES[8:12]),))
    capsys.readouterr()
    assert prepare(*flags, inputs=False) == 0
    out, err = capsys.readouterr()
    assert "nothing to do" in out
    assert "the run goes on with the earlier state" in err
    prepare.output.unlink()
    (prepare.work / "manifest.json").unlink()
    shutil.rmtree(prepare.work / "candidates")
    shutil.rmtree(prepare.work / "answers")
    again = ["--corpus_path", str(tmp_path / "old.jsonl"), "--passages_per_shard", "20"]
    assert prepare(*flags, *again, inputs=False) == 0
    assert "the run goes on with the earlier state" in capsys.readouterr().err
    assert prepare.output.read_bytes() == made, "and goes on over the same passages"

    new = tmp_path / "new.json"
    assert prepare(*flags, "--output_file", str(new), inputs=False) == 0
    out, err = capsys.readouterr()
    assert "the run goes on" not in err
    documents = IndexRetriever(folder, device="cpu").retrieve([json.loads(new.read_text())[0]["query"]], 4)
    texts = [full_text(own["title"], own["text"]) for own in documents[0]]
    assert json.loads(new.read_text())[0]["documents"] == texts
    assert new.read_bytes() != made
    manifest = json.loads((tmp_path / "new.json.work" / "manifest.json").read_text())
    assert manifest["stages"]["passages"]["counts"]["articles"] == 11
    assert manifest["stages"]["passages"]["counts"]["removed"] > 0
    assert main(["export", str(new), "--format", "trec", "--output_dir", str(tmp_path / "trec")]) == 0
    lines = (tmp_path / "trec" / "retrieved.run").read_text().splitlines()
    assert lines[0].split("\t")[2] == documents[0][0]["id"]
    assert main(["status", str(new)]) == 0
    assert main(["status", str(folder)]) == 0
    out = capsys.readouterr().out
    total = manifest["stages"]["passages"]["counts"]["passages"]
    assert out.count(f"{total} passages") >= 3
    assert out.count("finished") == 2


def test_approximate_search_works_in_a_changed_index(changed, prepare, models, queries, tmp_path) -> None:
    pytest.importorskip("seismic", reason="Seismic has wheels for Linux and Python up to 3.12")
    index(tmp_path / "anew", models["splade"], written(tmp_path / "all.jsonl", kept()))
    made = []
    for folder in (changed, tmp_path / "anew"):
        output = tmp_path / f"{folder.name}.json"
        flags = ["--queries_file", str(queries), "--index_dir", str(folder), "--search", "approximate"]
        assert prepare(*flags, "--output_file", str(output), "--min_recall", "1", inputs=False) == 0
        made.append(json.loads(output.read_text()))
    assert [one["documents"] for one in made[0]] == [one["documents"] for one in made[1]]


def test_dry_run_without_corpus_plans_for_the_index(changed, prepare, queries, tmp_path, capsys) -> None:
    flags = ["--queries_file", str(queries), "--index_dir", str(changed), "--dry_run"]
    assert prepare(*flags, inputs=False) == 0
    total = IndexRetriever(changed, device="cpu")
    assert f"{len(total)} passages" in capsys.readouterr().out


def test_no_question_is_written_about_a_removed_passage(changed, models) -> None:
    home = RunDirectory(changed)
    passages = open_stage(home, "passages", only_state(Storage(changed)).passages)
    asked: list[str] = []

    class Curious:
        halving = Halving("--teacher_batch_size")

        def answers(self, prompts, have=()):
            for place, prompt in enumerate(prompts):
                asked.append(prompt.documents[0])
                yield place, Answer("No question.", "stop", 1, 1, 0)

    config = PrepareConfig(num_synthetic_queries=1000, output_file="o.json")
    with pytest.raises(InputError, match="wrote no usable question"):
        write_questions(Stage(home, "synthetic", {}), passages, Curious, config)
    (kept_texts,) = IndexRetriever(changed, device="cpu").retrieve(["the"], 1000)
    assert {*asked} == {full_text(own["title"], own["text"]) for own in kept_texts}


def test_runs_compute_in_the_dtype_of_the_index(
    prepare, models, corpus, tmp_path, monkeypatch, capsys
) -> None:
    """An index that was made where nothing has bfloat16 is not made again elsewhere."""
    folder = tmp_path / "index"
    index(folder, models["splade"], str(corpus), dtype="float32")
    monkeypatch.setattr(choice, "multiplies_bfloat16", lambda: True)
    flags = ["--index_dir", str(folder), "--passages_per_shard", "20", "--dtype", "auto"]
    assert prepare(*flags) == 0
    assert "made again" not in capsys.readouterr().err
    assert len([*(folder / "vectors").iterdir()]) == 1
    assert not (folder / "dtype-cpu.json").exists(), "the index says it"
    index(tmp_path / "new", models["splade"], str(corpus))
    (settings,) = (tmp_path / "new" / "vectors").glob("*/settings.json")
    assert json.loads(settings.read_text())["dtype"] == "torch.bfloat16"


def test_index_in_bfloat16_warns_where_that_is_slow(
    prepare, models, corpus, queries, tmp_path, monkeypatch, capsys, caplog
) -> None:
    folder = tmp_path / "index"
    index(folder, models["splade"], str(corpus), dtype="bfloat16")
    assert not caplog.text
    IndexRetriever(folder, device="cpu", dtype="float32")
    assert not caplog.text
    IndexRetriever(folder, device="cpu")
    assert "which is very slow here: give --dtype float32 without --corpus_path" in caplog.text
    flags = ["--index_dir", str(folder), "--passages_per_shard", "20", "--dtype"]
    assert prepare(*flags, "auto") == 0
    assert "very slow here" in capsys.readouterr().err
    assert len([*(folder / "vectors").iterdir()]) == 1
    flags += ["float32", "--queries_file", str(queries)]  # the advice
    prepare.output.unlink()
    assert prepare(*flags, inputs=False) == 0
    assert "very slow here" not in capsys.readouterr().err
    assert len([*(folder / "vectors").iterdir()]) == 1
    monkeypatch.setattr(choice, "multiplies_bfloat16", lambda: True)
    IndexRetriever(folder, device="cpu")
    assert caplog.text.count("very slow here") == 1


def test_index_of_another_device_is_only_read(models, corpus, tmp_path) -> None:
    folder = tmp_path / "index"
    index(folder, models["splade"], str(corpus))
    (path,) = (folder / "vectors").glob("*/index.json")
    state = json.loads(path.read_text())
    state["vectors"]["device"] = "cuda"
    path.write_text(json.dumps(state))
    (folder / "dtype-cpu.json").unlink()
    home, run = RunDirectory(folder), RunDirectory(tmp_path / "run")
    config = PrepareConfig(output_file="o.json", index_dir=str(folder), num_synthetic_queries=1)
    assert settled(config, home, "cpu", run).dtype == "float32"
    assert (run.path / "dtype-cpu.json").exists()
    assert not (folder / "dtype-cpu.json").exists()
