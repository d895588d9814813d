"""The main command with tiny models: results, resuming, and errors of users."""

import dataclasses
import gzip
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from scaledown.config.prepare import PrepareConfig
from scaledown.data import build_index
from scaledown.data import prepare_dataset as command
from scaledown.data.input.training_files import validate
from scaledown.data.manifest import compared_settings
from scaledown.data.reranker.api import load_reranker, resolve_reranker
from scaledown.data.reranker.base import Pair
from scaledown.data.session import enter
from scaledown.data.session.summary import PrepareResult, _training_command, run_summary
from scaledown.devices import choice
from scaledown.devices.halving import Halving
from scaledown.errors import install_command

LOADING = (
    "scaledown.data.prepare_dataset.load_encoder",
    "scaledown.data.reranker.api.load_reranker",
    "scaledown.data.session.teachers.load_teacher",
)
"""The functions that load the models of a run."""

RERANK = ("--enable_reranking", "--top_k_retrieval", "6", "--top_k_reranking", "3")


def records(path: Path) -> list[dict]:
    return json.loads(path.read_text(encoding="utf-8"))


def test_basic_run(prepare, capsys) -> None:
    assert prepare("--top_k_retrieval", "4") == 0
    made = records(prepare.output)
    assert made[0]["query"] == "What is photosynthesis?"
    assert len(made) == 4
    for record in made:
        assert set(record) == {"query", "documents", "answer"}
        assert len(record["documents"]) == 4
    assert validate(prepare.output).records >= 3
    out, err = capsys.readouterr()
    assert f"{prepare.output}: 4 examples, 4 documents each" in out
    assert out.count("   answer") == 3
    assert f"train --train_data {prepare.output} --output_dir" in out.splitlines()[-1]
    for stage in ("queries", "passages", "vectors", "candidates", "answers"):
        assert any(line.strip().startswith(stage) and " s " in line for line in out.splitlines())
    assert "INFO" in err
    assert "\x1b" not in out + err, "no colours when piped"
    beside = sorted(path.name for path in prepare.output.parent.glob("*.json"))
    assert beside == ["train_data.json"]


def test_reranked_run_and_its_manifest(prepare, tmp_path) -> None:
    assert prepare(*RERANK) == 0
    for record in records(prepare.output):
        scores = record["reranking_scores"]
        assert len(scores) == len(record["documents"]) == 3
        assert scores == sorted(scores, reverse=True)
    manifest = json.loads((prepare.work / "manifest.json").read_text())
    assert manifest["parameters"]["top_k_reranking"] == 3
    assert set(manifest["models"]) == {"retriever", "reranker", "teacher"}
    assert all(identity.startswith("sha256:") for identity in manifest["models"].values())
    assert set(manifest["stages"]) == {
        "queries",
        "passages",
        "vectors",
        "candidates",
        "ranked",
        "answers",
        "reviewed",
    }
    assert manifest["stages"]["ranked"]["counts"] == {"queries": 4, "pairs": 24}
    assert manifest["output"]["examples"] == 4
    assert manifest["version"]
    assert not [path for path in prepare.work.rglob("*") if path.suffix in {".pkl", ".pt", ".tmp"}]


def test_scores_belong_to_their_documents(prepare, models) -> None:
    prepare(*RERANK)
    for record in records(prepare.output):
        pairs = [Pair(record["query"], document) for document in record["documents"]]
        source = resolve_reranker(str(models["cross_encoder"]))
        scores = load_reranker(source, "cpu", "float32", 1).score(pairs, lambda _: None)
        assert scores == pytest.approx(record["reranking_scores"], abs=1e-4)


def test_each_reranking_flag_works_without_the_other(prepare, monkeypatch, capsys) -> None:
    assert prepare("--top_k_retrieval", "6", "--top_k_reranking", "3") == 0
    filtered = records(prepare.output)
    assert all("reranking_scores" not in record and len(record["documents"]) == 3 for record in filtered)
    assert "--enable_reranking adds them without scoring again" in capsys.readouterr().out
    # The scores are kept: no model loads when they are asked for later.
    for name in LOADING:
        monkeypatch.setattr(name, lambda *_: pytest.fail("a model was loaded again"))
    assert prepare(*RERANK) == 0
    scored = records(prepare.output)
    assert [record["documents"] for record in scored] == [record["documents"] for record in filtered]
    assert all(len(record["reranking_scores"]) == 3 for record in scored)


def test_enable_reranking_alone_keeps_five(prepare) -> None:
    assert prepare("--enable_reranking") == 0
    assert {len(record["documents"]) for record in records(prepare.output)} == {5}
    assert {len(record["reranking_scores"]) for record in records(prepare.output)} == {5}


def test_sigmoid_changes_only_the_scale(prepare, monkeypatch) -> None:
    prepare(*RERANK)
    raw = records(prepare.output)
    monkeypatch.setattr(
        "scaledown.data.session.teachers.load_teacher", lambda *_: pytest.fail("a model was loaded again")
    )
    assert prepare(*RERANK, "--reranking_score_scale", "sigmoid") == 0
    for one, two in zip(raw, records(prepare.output), strict=True):
        assert two["reranking_scores"] == pytest.approx(
            [1 / (1 + np.exp(-s)) for s in one["reranking_scores"]]
        )


@pytest.mark.parametrize("ending", [".jsonl", ".parquet"])
def test_all_formats_have_the_same_records(ending: str, prepare, tmp_path) -> None:
    import pyarrow.parquet as pq

    prepare(*RERANK)
    other = tmp_path / f"other{ending}"
    assert prepare(*RERANK, "--output_file", str(other)) == 0
    if ending == ".jsonl":
        found = [json.loads(line) for line in other.read_text().splitlines()]
    else:
        found = pq.read_table(other).to_pylist()
    assert found == records(prepare.output)


def test_bi_encoder_is_used_for_dense_retrieval(prepare, models, capsys) -> None:
    assert prepare("--retriever_model", str(models["dense"]), "--top_k_retrieval", "3") == 0
    assert "dense" in capsys.readouterr().err
    assert len(records(prepare.output)[0]["documents"]) == 3


def test_query_likelihood_reranking(prepare, models) -> None:
    flags = ("--reranker_model", f"ql:{models['causal_lm']}", "--reranking_score_scale", "sigmoid")
    assert prepare(*RERANK, *flags) == 0
    assert all(0 < score < 1 for record in records(prepare.output) for score in record["reranking_scores"])


def test_run_without_corpus_uses_the_sample(prepare, queries, capsys) -> None:
    assert prepare("--queries_file", str(queries), "--top_k_retrieval", "2", inputs=False) == 0
    assert "using the sample corpus" in capsys.readouterr().err
    manifest = json.loads((prepare.work / "manifest.json").read_text())
    assert manifest["stages"]["passages"]["counts"]["articles"] == 60


def test_top_k_above_the_corpus_warns_and_returns_all(prepare, corpus, capsys) -> None:
    corpus.write_text("".join(corpus.read_text().splitlines(keepends=True)[:1]))
    assert prepare("--top_k_retrieval", "500") == 0
    assert "every query gets all of them" in capsys.readouterr().err
    manifest = json.loads((prepare.work / "manifest.json").read_text())
    passages = manifest["stages"]["passages"]["counts"]["passages"]
    assert {len(record["documents"]) for record in records(prepare.output)} == {passages}


# Resuming


def test_finished_run_has_nothing_to_do(prepare, monkeypatch, capsys) -> None:
    prepare(*RERANK)
    before = prepare.output.stat()
    for name in (*LOADING, "scaledown.data.prepare_dataset.open_index", f"{enter.__name__}.choose_device"):
        monkeypatch.setattr(name, lambda *_: pytest.fail("work was done"))
    assert prepare(*RERANK) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert prepare.output.stat().st_mtime_ns == before.st_mtime_ns


def test_finished_run_imports_no_heavy_library(prepare, corpus, queries) -> None:
    prepare(*RERANK)
    code = (
        "import sys; from scaledown.data.prepare_dataset import main; "
        "status = main(sys.argv[1:]); heavy = {'torch', 'transformers', 'datasets'} & set(sys.modules); "
        "sys.exit(f'imported {heavy}' if heavy else status)"
    )
    manifest = prepare.work / "manifest.json"
    subprocess.run([sys.executable, "-c", code, "--config", str(manifest)], check=True, capture_output=True)


def test_lost_output_is_written_again_without_a_model(prepare, monkeypatch) -> None:
    prepare(*RERANK)
    content = prepare.output.read_bytes()
    for name in LOADING:
        monkeypatch.setattr(name, lambda *_: pytest.fail("a model was loaded again"))
    prepare.output.unlink()
    assert prepare(*RERANK) == 0
    assert prepare.output.read_bytes() == content


def test_edited_output_is_not_changed(prepare, capsys) -> None:
    prepare(*RERANK)
    prepare.output.write_text(json.dumps([{"query": "mine", "documents": ["d"], "answer": "a"}]))
    assert prepare(*RERANK) == 0
    assert "has changed since it was written" in capsys.readouterr().err
    assert records(prepare.output)[0]["query"] == "mine"


def test_edited_output_is_not_replaced_by_other_settings(prepare, capsys) -> None:
    prepare("--top_k_retrieval", "2")
    prepare.output.write_text(json.dumps([{"query": "mine", "documents": ["d"], "answer": "a"}]))
    assert prepare("--top_k_retrieval", "3") == 1
    assert f"{prepare.output} was changed after a run with other settings wrote it" in capsys.readouterr().err
    assert records(prepare.output)[0]["query"] == "mine"
    assert prepare("--top_k_retrieval", "3", "--overwrite") == 0
    assert len(records(prepare.output)[0]["documents"]) == 3


@pytest.mark.parametrize("content", ["", "garbage", "[{}]", '[{"query": "a"'])
def test_damaged_output_is_written_again(content, prepare) -> None:
    prepare(*RERANK)
    whole = prepare.output.read_bytes()
    prepare.output.write_text(content)
    assert prepare(*RERANK) == 0
    assert prepare.output.read_bytes() == whole


def test_output_that_is_a_link_stays_a_link(prepare, tmp_path) -> None:
    target = tmp_path / "disk" / "data"
    prepare.output.symlink_to(target)
    assert prepare("--top_k_retrieval", "2") == 0
    assert prepare.output.is_symlink()
    (target.parent / ".data.99999.tmp").write_text("half")
    assert prepare("--top_k_retrieval", "3") == 0
    assert prepare.output.is_symlink()
    assert os.listdir(target.parent) == ["data"]
    assert len(records(target)[0]["documents"]) == 3


def test_output_of_another_program_is_not_changed(prepare, tmp_path, capsys) -> None:
    prepare.output.write_text("mine")
    assert prepare("--top_k_retrieval", "2") == 1
    assert f"error: --output_file {prepare.output} already exists" in capsys.readouterr().err
    assert prepare.output.read_text() == "mine"
    prepare.output.unlink()
    assert prepare("--top_k_retrieval", "2") == 0
    (prepare.work / "manifest.json").unlink()  # killed between the output and the manifest
    assert prepare("--top_k_retrieval", "2") == 0
    other = tmp_path / "my other.json"
    other.write_text("mine")
    flags = ("--output_file", str(other), "--work_dir", str(prepare.work))
    assert prepare("--top_k_retrieval", "2", *flags) == 1
    assert other.read_text() == "mine"
    other.unlink()
    capsys.readouterr()
    assert prepare("--top_k_retrieval", "2", *flags) == 0
    following = capsys.readouterr().out.splitlines()[-1]
    assert f"train --train_data '{other}' --output_dir" in following
    assert "--compressor pointer" in following, "there are few examples"


def test_changed_setting_repeats_its_stage_and_later_stages(prepare, monkeypatch) -> None:
    prepare(*RERANK)
    stages = {
        stage: os.listdir(prepare.work / stage) for stage in ("vectors", "candidates", "ranked", "answers")
    }
    assert prepare(*RERANK, "--max_new_tokens", "4") == 0
    for stage, before in stages.items():
        now = os.listdir(prepare.work / stage)
        assert len(now) == (2 if stage == "answers" else 1)
        assert set(before) <= set(now), "earlier work is kept"
    monkeypatch.setattr(
        "scaledown.data.session.teachers.load_teacher", lambda *_: pytest.fail("a model was loaded again")
    )
    assert prepare(*RERANK) == 0, "changing it back finds the earlier shards"


def test_finished_data_is_replaced_by_other_settings_only_with_a_warning(prepare, capsys) -> None:
    prepare()
    first = prepare.output.read_bytes()
    assert "this run replaces it" not in capsys.readouterr().err
    prepare("--top_k_retrieval", "2")
    err = capsys.readouterr().err
    assert f"WARNING {prepare.output} has 4 examples of a run with other settings, inputs or models" in err
    prepare()
    assert prepare.output.read_bytes() == first


def test_changed_corpus_repeats_all_stages_except_queries(prepare, corpus) -> None:
    prepare(*RERANK)
    corpus.write_text("".join(corpus.read_text().splitlines(keepends=True)[:6]))
    assert prepare(*RERANK) == 0
    assert len(os.listdir(prepare.work / "answers")) == 2
    assert len(os.listdir(prepare.work / "queries")) == 1


SHARDS = ("--passages_per_shard", "20", "--queries_per_shard", "2", "--teacher_batch_size", "2")


def shards(work: Path) -> list[Path]:
    return [path for path in work.rglob("*") if path.suffix in {".arrow", ".npz"}]


class Undisturbed(NamedTuple):
    """The results of a run without a crash."""

    output: bytes
    shards: int
    counts: dict[str, Any]


@pytest.fixture(scope="module")
def known() -> dict[tuple[str, ...], Undisturbed]:
    return {}


@pytest.fixture
def undisturbed(prepare, tmp_path, known, monkeypatch) -> Callable[..., Undisturbed]:
    """A run for some flags, made once, since it does not depend on paths. Reports are not drawn."""
    monkeypatch.setattr("scaledown.data.session.result.report_of", lambda *_: None)

    def made(*flags: str) -> Undisturbed:
        if flags not in known:
            whole = tmp_path / "whole.json"
            assert prepare(*flags, "--output_file", str(whole)) == 0
            work = Path(f"{whole}.work")
            known[flags] = Undisturbed(whole.read_bytes(), len(shards(work)), stage_counts(work))
        return known[flags]

    return made


def stage_counts(work: Path) -> dict[str, Any]:
    stages = json.loads((work / "manifest.json").read_text())["stages"]
    return {name: stage["counts"] for name, stage in stages.items()}


@pytest.mark.parametrize("crash_at", range(13))
def test_run_continues_to_the_same_bytes_after_any_crash(
    crash_at: int, prepare, monkeypatch, undisturbed
) -> None:
    """The process dies after its n-th shard; then the same command makes the expected bytes."""
    from scaledown.run.stage import Stage

    whole = undisturbed(*RERANK, *SHARDS)
    assert whole.shards == 12
    write, written = Stage.write, []

    def dying(self, *arguments, **keywords):
        if len(written) == crash_at:
            raise KeyboardInterrupt
        written.append(self.name)
        write(self, *arguments, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(Stage, "write", dying)
        assert prepare(*RERANK, *SHARDS) == (130 if crash_at < 12 else 0)
    assert prepare.output.exists() == (crash_at == 12)
    kept = list(written)
    assert len(kept) == crash_at
    written.clear()

    def counting(self, *arguments, **keywords):
        written.append(self.name)
        write(self, *arguments, **keywords)

    monkeypatch.setattr(Stage, "write", counting)
    assert prepare(*RERANK, *SHARDS) == 0
    assert prepare.output.read_bytes() == whole.output
    # Queries are read again from the start when their stage is unfinished: they cost nothing.
    again = kept.count("queries") if crash_at < 2 else 0
    assert len(written) == 12 - crash_at + again


@pytest.mark.parametrize(
    "stage", ["queries", "passages", "vectors", "candidates", "ranked", "answers", "reviewed"]
)
@pytest.mark.parametrize("flags", [(), ("--max_corpus_size", "7")], ids=["all", "limited"])
def test_run_continues_after_a_crash_before_a_stage_is_marked_as_done(
    stage, flags, prepare, monkeypatch, undisturbed
) -> None:
    from scaledown.run.stage import Stage

    whole = undisturbed(*RERANK, *SHARDS, *flags)
    finish = Stage.finish

    def dying(self, *arguments):
        if self.name == stage:
            raise KeyboardInterrupt
        return finish(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Stage, "finish", dying)
        assert prepare(*RERANK, *SHARDS, *flags) == 130
    assert prepare(*RERANK, *SHARDS, *flags) == 0
    assert prepare.output.read_bytes() == whole.output
    assert stage_counts(prepare.work) == whole.counts


def test_crash_while_writing_leaves_no_partial_output(prepare, monkeypatch) -> None:
    assert prepare("--top_k_retrieval", "2") == 0
    content = prepare.output.read_bytes()
    prepare.output.unlink()
    (prepare.output.parent / ".train_data.json.99999.tmp").write_text("half")
    (prepare.work / "answers" / ".x.99999.tmp").write_text("half")
    assert prepare("--top_k_retrieval", "2") == 0
    assert prepare.output.read_bytes() == content
    assert not list(prepare.output.parent.rglob(".*.tmp"))


@pytest.mark.slow
def test_two_commands_in_one_run_directory_share_the_work(
    tmp_path, tiny_flags, corpus, queries, prepare, forked
) -> None:
    queries.write_text("".join(f"What is number {n}?\n" for n in range(24)))
    whole = tmp_path / "whole.json"
    assert prepare(*RERANK, *SHARDS, "--output_file", str(whole)) == 0
    words = [sys.executable, "-m", "scaledown.data.prepare_dataset", *tiny_flags, *RERANK, *SHARDS]
    words += [
        "--corpus_path",
        str(corpus),
        "--queries_file",
        str(queries),
        "--output_file",
        str(prepare.output),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    both = [
        subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment)
        for _ in range(2)
    ]
    for process in both:
        _, err = process.communicate(timeout=200)
        assert process.returncode == 0, err.decode()[-2000:]
    assert prepare.output.read_bytes() == whole.read_bytes()
    lines = [path.read_text().splitlines() for path in prepare.work.glob("*/*/journal.jsonl")]
    assert sum(map(len, lines)) == len(shards(prepare.work)), "no shard was made twice"


@pytest.mark.slow
def test_same_command_after_sigkill_makes_the_same_bytes(
    tmp_path, tiny_flags, corpus, queries, prepare, forked
) -> None:
    whole = tmp_path / "whole.json"
    assert prepare(*RERANK, *SHARDS, "--output_file", str(whole)) == 0
    words = [sys.executable, "-m", "scaledown.data.prepare_dataset", *tiny_flags, *RERANK, *SHARDS]
    words += [
        "--corpus_path",
        str(corpus),
        "--queries_file",
        str(queries),
        "--output_file",
        str(prepare.output),
    ]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list(prepare.work.glob("vectors/*/*.arrow")):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not prepare.output.exists()
    subprocess.run(words, check=True, capture_output=True)
    assert prepare.output.read_bytes() == whole.read_bytes()


def test_manifest_repeats_its_run_from_any_folder(prepare, tmp_path, monkeypatch, corpus, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    flags = ("--seed", "3", "--corpus_path", corpus.name, "--output_file", prepare.output.name)
    assert prepare(*RERANK, *flags) == 0
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    other = tmp_path / "again.json"
    manifest = prepare.work / "manifest.json"
    assert command.main(["--config", str(manifest), "--output_file", str(other)]) == 0
    assert other.read_bytes() == prepare.output.read_bytes()
    assert "this run does not repeat" not in capsys.readouterr().err
    with corpus.open("a") as file:
        file.write('{"id": "new", "title": "New", "text": "New text."}\n')
    assert command.main(["--config", str(manifest), "--output_file", str(other)]) == 0
    assert "this run does not repeat" in capsys.readouterr().err


def test_manifest_of_another_dtype_is_not_repeated_silently(prepare, tmp_path, monkeypatch, capsys) -> None:
    assert prepare("--dtype", "auto") == 0
    flags = ["--config", str(prepare.work / "manifest.json"), "--output_file", str(tmp_path / "again.json")]
    monkeypatch.setattr(choice, "multiplies_bfloat16", lambda: True)
    capsys.readouterr()
    assert command.main(flags) == 0
    warning = "it computes in torch.bfloat16, that one in torch.float32: give --dtype float32"
    assert warning in capsys.readouterr().err
    assert command.main([*flags, "--dtype", "float32"]) == 0
    assert "this run does not repeat" not in capsys.readouterr().err


def test_manifest_pins_revisions_of_hub_models(prepare, hub_cache, tiny_flags, corpus, queries) -> None:
    from tiny import COMMIT

    names = ["--retriever_model", "naver/splade-v3", "--teacher_model", "microsoft/phi-2"]
    reranker_flags = ["--reranker_model", "ql:HuggingFaceTB/SmolLM2-135M-Instruct"]
    assert prepare(*RERANK, *names, *reranker_flags) == 0
    parameters = json.loads((prepare.work / "manifest.json").read_text())["parameters"]
    assert parameters["retriever_model"] == f"naver/splade-v3@{COMMIT}"
    assert parameters["reranker_model"] == f"ql:HuggingFaceTB/SmolLM2-135M-Instruct@{COMMIT}"
    assert command.main(["--config", str(prepare.work / "manifest.json")]) == 0


def test_changed_top_k_reranking_needs_no_scoring(prepare, monkeypatch) -> None:
    assert prepare("--top_k_retrieval", "6", "--top_k_reranking", "2") == 0
    monkeypatch.setattr(
        "scaledown.data.reranker.api.load_reranker", lambda *_: pytest.fail("a model was loaded again")
    )
    assert prepare("--top_k_retrieval", "6", "--top_k_reranking", "4") == 0
    assert {len(record["documents"]) for record in records(prepare.output)} == {4}


def test_run_directory_is_the_same_for_every_gpu() -> None:
    base = {"queries_file": ("q",), "output_file": "o.json"}
    assert compared_settings(PrepareConfig(**base, device="cuda:0")) == compared_settings(
        PrepareConfig(**base, device="cuda:1")
    )


def test_function_makes_the_same_bytes_as_the_command(prepare, models, corpus, queries, tmp_path) -> None:
    prepare(*RERANK)
    manifest = json.loads((prepare.work / "manifest.json").read_text())
    settings = manifest["parameters"] | {"output_file": str(tmp_path / "f.json")}
    settings |= {name: tuple(settings[name]) for name in ("queries_file", "decontaminate")}
    result = command.prepare_dataset(PrepareConfig(**settings))
    assert result.examples == 4
    assert result.output.read_bytes() == prepare.output.read_bytes()
    assert dataclasses.asdict(PrepareConfig(**settings))["seed"] == 0


# Bad input: one line that says what to do, the right status, nothing half-written


def refused(prepare, capsys, *flags: str, status: int = 1, inputs: bool = True) -> str:
    assert prepare(*flags, inputs=inputs) == status
    out, err = capsys.readouterr()
    assert out == ""
    assert "Traceback" not in err
    (error,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert err.splitlines()[-1] == error
    assert not prepare.output.exists()
    return error


@pytest.mark.parametrize(
    ("flags", "match"),
    [
        (("--top_k_reranking", "6", "--top_k_retrieval", "5"), "above --top_k_retrieval 5"),
        (("--top_k_retrieval", "0"), "must be at least 1"),
        (("--top_k_reranking", "0"), "must be at least 1"),
        (("--num_synthetic_queries", "3"), "exclude each other"),
        (("--top_k_retrieval", "many"), "invalid int value"),
        (("--no_such_flag",), "unrecognized arguments"),
        (("--preset", "none"), "invalid choice"),
        (("--output_file", "out.csv"), "ending chooses the format"),
    ],
)
def test_wrong_usage_exits_with_2(flags, match, prepare, capsys) -> None:
    assert match in refused(prepare, capsys, *flags, status=2)
    assert not prepare.work.exists()


def test_run_without_queries_is_refused(prepare, capsys, corpus) -> None:
    error = refused(prepare, capsys, "--corpus_path", str(corpus), status=2, inputs=False)
    assert "give --queries_file" in error


@pytest.mark.parametrize(
    ("flags", "match"),
    [
        (("--corpus_path", "/no/such.jsonl"), "--corpus_path /no/such.jsonl: there is no such file"),
        (("--queries_file", "/no/such.txt"), "--queries_file /no/such.txt: there is no such file"),
        (("--retriever_model", "/no/such/model"), "no such folder"),
        (("--teacher_model", "org/unknown-model"), "hub cannot be reached"),
        (("--device", "cuda:77"), "no such device"),
        (("--config", "/no/such.json"), "cannot be read as JSON"),
    ],
)
def test_missing_inputs_exit_with_1(flags, match, prepare, capsys) -> None:
    assert match in refused(prepare, capsys, *flags)


def test_unusable_teacher_is_refused_before_any_work(prepare, models, capsys, monkeypatch) -> None:
    import importlib.util

    model = ("--teacher_model", str(models["splade"]))
    assert "is BertForMaskedLM: a teacher is a causal LM" in refused(prepare, capsys, *model)
    find = importlib.util.find_spec
    absent = {"bitsandbytes": None}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: absent.get(name, name) and find(name))
    command = install_command("quantization")
    assert f"needs bitsandbytes: {command}" in refused(prepare, capsys, "--teacher_4bit")
    assert not prepare.work.exists()


def test_empty_queries_file_is_refused(prepare, queries, capsys) -> None:
    queries.write_text("\n\n")
    assert "no queries" in refused(prepare, capsys)


def test_corpus_without_valid_lines_is_refused(prepare, corpus, capsys) -> None:
    corpus.write_bytes(b"nonsense\n\xff\xfe\n")
    error = refused(prepare, capsys)
    assert "2 of 2 lines are malformed" in error
    assert "line 1" in error


def test_too_many_bad_lines_end_the_run_and_are_in_the_quarantine(prepare, corpus, capsys) -> None:
    corpus.write_text(corpus.read_text() + "broken\n" * 3)
    assert "3 of 15 lines" in refused(prepare, capsys)
    (file,) = (prepare.work / "quarantine").iterdir()
    assert len(file.read_text().splitlines()) == 3
    assert prepare("--max_bad_fraction", "0.5") == 0


def test_few_bad_lines_at_the_start_do_not_end_the_run(prepare, corpus, queries) -> None:
    lines = [json.dumps({"id": str(n), "title": "T", "text": f"Text {n}."}) for n in range(300)]
    corpus.write_text("broken\n" * 12 + "\n".join(lines) + "\n")
    assert prepare("--top_k_retrieval", "1") == 0


def test_output_inside_the_corpus_is_refused(prepare, tmp_path, capsys) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.txt").write_text("A text.")
    flags = ("--corpus_path", str(folder), "--output_file", str(folder / "o.json"))
    assert f"lies in {folder}, which is read" in refused(prepare, capsys, *flags, status=2)
    for flag in ("--queries_file", "--query_dataset"):
        flags = (flag, str(folder), "--output_file", str(folder / "o.json"))
        assert f"lies in {folder}, which is read" in refused(prepare, capsys, *flags, status=2)
    flags = ("--corpus_path", str(folder), "--work_dir", str(folder / "run"))
    assert f"run directory {folder / 'run'} lies in {folder}" in refused(prepare, capsys, *flags, status=2)
    assert len(os.listdir(folder)) == 1


@pytest.mark.parametrize("place", ["corpus", "queries", "run directory"])
def test_output_that_is_an_input_is_refused(place, prepare, corpus, queries, tmp_path, capsys) -> None:
    content = corpus.read_bytes()
    queries.rename(tmp_path / "q.jsonl")
    (tmp_path / "q.jsonl").write_text('{"query": "What?"}\n')
    output = {"corpus": corpus, "queries": tmp_path / "q.jsonl", "run directory": tmp_path / "w" / "o.json"}[
        place
    ]
    flags = ("--queries_file", str(tmp_path / "q.jsonl"), "--corpus_path", str(corpus))
    flags += ("--output_file", str(output), "--work_dir", str(tmp_path / "w"))
    error = refused(prepare, capsys, *flags, status=2, inputs=False)
    assert "is also read" in error or "lies in the run directory" in error
    assert corpus.read_bytes() == content


def test_file_name_that_is_not_unicode_is_read(prepare, corpus, tmp_path, capsys) -> None:
    name = os.fsdecode(b"caf\xe9.jsonl")
    try:
        corpus = corpus.rename(tmp_path / name)
    except OSError:
        pytest.skip("this file system has only Unicode names")
    error = refused(prepare, capsys, "--corpus_path", str(corpus))
    assert "rename it" in error
    assert "PosixPath" not in error


def test_other_files_in_a_corpus_folder_change_nothing(prepare, tmp_path, monkeypatch) -> None:
    folder = tmp_path / "texts"
    (folder / "deeper").mkdir(parents=True)
    for name in ("a.txt", "deeper/a.txt"):
        (folder / name).write_text(f"The text of {name}.")
    assert prepare("--corpus_path", str(folder), "--top_k_retrieval", "2") == 0
    assert len(set(records(prepare.output)[0]["documents"])) == 2
    (folder / "notes.log").touch()
    (folder / ".DS_Store").touch()
    (prepare.work / ".DS_Store").touch()
    monkeypatch.setattr(
        "scaledown.data.session.teachers.load_teacher", lambda *_: pytest.fail("a model was loaded again")
    )
    assert prepare("--corpus_path", str(folder), "--top_k_retrieval", "2") == 0


def test_escapes_in_data_do_not_reach_the_terminal_in_errors(prepare, queries, tmp_path, capsys) -> None:
    path = tmp_path / "q.jsonl"
    path.write_text(json.dumps({"\x1b[31mEVIL\x07\nline2": "x"}) + "\n")
    queries.unlink()
    error = refused(prepare, capsys, "--queries_file", str(path), inputs=False)
    assert "\x1b" not in error


def test_scores_that_are_not_finite_are_an_error(prepare, models, tmp_path, capsys) -> None:
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    AutoTokenizer.from_pretrained(models["cross_encoder"]).save_pretrained(tmp_path / "nan")
    model = AutoModelForSequenceClassification.from_pretrained(models["cross_encoder"])
    torch.nn.init.constant_(model.classifier.weight, float("nan"))
    model.save_pretrained(tmp_path / "nan")
    assert "not numbers" in refused(prepare, capsys, *RERANK, "--reranker_model", str(tmp_path / "nan"))


def too_little_memory(monkeypatch: pytest.MonkeyPatch, stage: str, fits: int) -> str:
    """Let the model of a stage run out of memory with more than `fits` texts. Returns the stage's flag."""
    import torch
    from sentence_transformers import SparseEncoder
    from transformers import BertForSequenceClassification, LlamaForCausalLM

    from scaledown.data.retrieval import splade

    flag, owner, name = {
        "vectors": ("--batch_size", SparseEncoder, "encode_document"),
        "ranked": ("--reranker_batch_size", BertForSequenceClassification, "forward"),
        "answers": ("--teacher_batch_size", LlamaForCausalLM, "generate"),
    }[stage]
    if stage == "vectors":
        monkeypatch.setattr(splade, "_fast", lambda _: ("in this test", None))
    original = getattr(owner, name)

    def full(self: object, *texts: object, **keywords: object) -> object:
        if len(texts[0] if texts else keywords["input_ids"]) > fits:  # type: ignore[arg-type]
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB\nmore")
        return original(self, *texts, **keywords)

    monkeypatch.setattr(owner, name, full)
    return flag


def test_index_in_the_run_directory_is_refused(prepare, capsys) -> None:
    assert "name another folder" in refused(prepare, capsys, "--index_dir", str(prepare.work), status=2)


def test_output_that_links_to_itself_is_refused(prepare, capsys) -> None:
    prepare.output.symlink_to(prepare.output)
    assert "link to itself" in refused(prepare, capsys)


@pytest.mark.parametrize("stage", ["vectors", "ranked", "answers"])
def test_batch_that_runs_out_of_memory_is_halved_and_recorded(stage, prepare, monkeypatch) -> None:
    too_little_memory(monkeypatch, stage, fits=2)
    assert prepare(*RERANK) == 0
    counts = json.loads((prepare.work / "manifest.json").read_text())["stages"]
    assert counts[stage]["counts"]["halved_batches"] > 0
    assert all("halved_batches" not in counts[other]["counts"] for other in counts if other != stage)


@pytest.mark.parametrize("stage", ["vectors", "ranked", "answers"])
def test_too_little_memory_for_one_text_is_an_error_with_the_flag(
    stage, prepare, monkeypatch, capsys
) -> None:
    flag = too_little_memory(monkeypatch, stage, fits=0)
    assert f"out of memory with one text at a time ({flag} 1)" in refused(prepare, capsys, *RERANK)


def test_run_without_any_answer_is_an_error(prepare, queries, tmp_path, capsys) -> None:
    import tiny

    model = tiny.causal_lm(tmp_path / "short", positions=300)
    queries.write_text("why " * 1000 + "\n")
    error = refused(prepare, capsys, "--teacher_model", str(model), "--top_k_retrieval", "1")
    assert "no query was answered" in error


def test_truncated_gzip_is_an_error(prepare, tmp_path, corpus, capsys) -> None:
    path = tmp_path / "c.jsonl.gz"
    path.write_bytes(gzip.compress(corpus.read_bytes())[:-100])
    assert "cut short" in refused(prepare, capsys, "--corpus_path", str(path))


def test_malformed_lines_are_counted_and_the_run_continues(prepare, corpus, capsys) -> None:
    with corpus.open("ab") as file:
        file.write(b'{"id": "x"\n')
    flags = ("--top_k_retrieval", "2", "--max_bad_fraction", "0.2")
    assert prepare(*flags) == 0
    assert "set aside: 1 lines" in capsys.readouterr().out
    (file,) = (prepare.work / "quarantine").iterdir()
    assert json.loads(file.read_text())["line"] == 13
    capsys.readouterr()
    assert prepare(*flags, "--strict") == 1
    quarantine = prepare.work / "quarantine"
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == f"error: --strict: 1 line or query is in {quarantine}, each with its reason: correct them"


@pytest.mark.parametrize("place", ["folder", "under a file", "no permission"])
def test_unwritable_output_is_refused_before_any_model_is_loaded(
    place, prepare, tmp_path, capsys, monkeypatch
):
    for module, name in ((enter, "find_sources"), (command, "load_encoder")):
        monkeypatch.setattr(module, name, lambda *_: pytest.fail("a model was looked for"))
    if place == "folder":
        output = tmp_path / "o.json"
        output.mkdir()
    elif place == "under a file":
        (tmp_path / "file").touch()
        output = tmp_path / "file" / "o.json"
    else:
        output = Path("/proc/o.json")
        if not output.parent.exists():
            pytest.skip("needs /proc")
    error = refused(prepare, capsys, "--output_file", str(output))
    assert f"--output_file {output}" in error


def test_run_directory_in_use_with_other_settings_is_refused(prepare, capsys) -> None:
    from scaledown.run.directory import RunDirectory

    with RunDirectory(prepare.work).claim("other settings"):
        assert "in use by a live run" in refused(prepare, capsys)


def test_unexpected_error_is_one_line_unless_debug(prepare, capsys, monkeypatch) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("a bug\nof two lines")

    monkeypatch.setattr(build_index, "build_passages", broken)
    error = refused(prepare, capsys)
    assert re.search(
        r"ZeroDivisionError: a bug of two lines \(unexpected, in \w+\.py:\d+; --debug shows", error
    )
    with pytest.raises(ZeroDivisionError):
        prepare("--debug")


def test_failed_teacher_loses_no_earlier_work(prepare, capsys, monkeypatch) -> None:
    def no_memory(*_: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr("scaledown.data.session.teachers.load_teacher", no_memory)
        assert prepare(*RERANK) == 1
    assert list(prepare.work.glob("ranked/*/done.json"))
    for name in LOADING[:2]:
        monkeypatch.setattr(name, lambda *_: pytest.fail("a model was loaded again"))
    assert prepare(*RERANK) == 0


def test_query_that_does_not_fit_does_not_end_the_run(prepare, queries, tmp_path, capsys) -> None:
    import tiny

    model = tiny.causal_lm(tmp_path / "short", positions=300)
    with queries.open("a") as file:
        file.write("why " * 1000 + "\n")
    flags = ("--teacher_model", str(model), "--top_k_retrieval", "3")
    assert prepare(*flags) == 0
    assert len(records(prepare.output)) == 4
    assert "1 rejected" in capsys.readouterr().out
    (file,) = (prepare.work / "quarantine").iterdir()
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [row["query_id"] for row in rows] == ["q5"]
    assert prepare(*flags, "--strict") == 1


def test_hostile_text_is_in_the_output_but_not_on_the_terminal(prepare, corpus, queries, capsys) -> None:
    evil = '\x1b[31mred\x1b[0m <script>alert("x")</script> \u202e \x00end'
    corpus.write_text(json.dumps({"id": "../../x", "title": evil, "text": [evil, evil + "."]}) + "\n")
    queries.write_text(evil.replace("\n", " ") + "\n")
    assert prepare("--top_k_retrieval", "1") == 0
    out, err = capsys.readouterr()
    assert "\x1b" not in out + err
    assert "\u202e" not in out
    assert "<script>" in records(prepare.output)[0]["documents"][0]
    assert "\x1b[31m" in records(prepare.output)[0]["documents"][0]


class Scripted:
    """Writes a usable question for two of three passages, and example topics for the third."""

    halving = Halving("--teacher_batch_size")

    def answers(self, prompts, have=()):
        from scaledown.records import Answer

        for place, prompt in enumerate(prompts):
            number = int.from_bytes(prompt.key.encode(), "little") % 97
            good = f"What is {number} of {prompt.documents[0].splitlines()[0]}?"
            asks = prompt.after.startswith("\n\nWrite a question")
            text = good if asks and number % 3 else "What is example topic 7?"
            yield place, Answer(text, "stop", 1, 1, 0)


def test_synthetic_queries_are_checked_and_different(prepare, corpus, monkeypatch) -> None:
    monkeypatch.setattr("scaledown.data.session.teachers.load_teacher", lambda *_: Scripted())
    flags = ("--corpus_path", str(corpus), "--num_synthetic_queries", "9", "--top_k_retrieval", "2")
    assert prepare(*flags, inputs=False) == 0
    asked = [record["query"] for record in records(prepare.output)]
    assert len(asked) == len(set(asked)) == 9
    assert all(query.startswith("What is ") for query in asked)
    assert prepare(*flags, "--seed", "1", inputs=False) == 0
    assert [record["query"] for record in records(prepare.output)] != asked


def test_halved_batches_of_synthetic_queries_are_recorded(prepare, corpus, monkeypatch) -> None:
    class Halved(Scripted):
        def answers(self, prompts, have=()):
            self.halving.count += 1
            return super().answers(prompts, have)

    monkeypatch.setattr("scaledown.data.session.teachers.load_teacher", lambda *_: Halved())
    flags = ("--corpus_path", str(corpus), "--num_synthetic_queries", "9", "--top_k_retrieval", "2")
    assert prepare(*flags, inputs=False) == 0
    stages = json.loads((prepare.work / "manifest.json").read_text())["stages"]
    assert stages["synthetic"]["counts"]["halved_batches"] > 0


@pytest.mark.parametrize("crash_at", range(1, 5))
def test_synthetic_queries_are_the_same_after_a_crash(
    crash_at: int, prepare, corpus, monkeypatch, tmp_path
) -> None:
    from scaledown.run.stage import Stage

    monkeypatch.setattr("scaledown.data.session.teachers.load_teacher", lambda *_: Scripted())
    flags = ("--corpus_path", str(corpus), "--num_synthetic_queries", "9", "--top_k_retrieval", "2")
    small = ("--queries_per_shard", "4")
    whole = tmp_path / "whole.json"
    assert prepare(*flags, *small, "--output_file", str(whole), inputs=False) == 0
    write, written = Stage.write, []

    def dying(self, *arguments, **keywords):
        if len(written) == crash_at:
            raise KeyboardInterrupt
        written.append(self.name)
        write(self, *arguments, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(Stage, "write", dying)
        assert prepare(*flags, *small, inputs=False) == 130
    other = ("--queries_per_shard", "5")  # shards of another size are not taken for these
    assert prepare(*flags, *other, inputs=False) == 0
    assert prepare(*flags, *small, inputs=False) == 0
    assert prepare.output.read_bytes() == whole.read_bytes()


@pytest.mark.slow
def test_real_teacher_writes_questions(prepare, corpus) -> None:
    flags = ("--teacher_model", "bundled:smollm2-135m", "--max_new_tokens", "40", "--top_k_retrieval", "1")
    assert prepare("--corpus_path", str(corpus), "--num_synthetic_queries", "6", *flags, inputs=False) == 0
    made = records(prepare.output)
    questions = [record["query"] for record in made]
    assert len(set(questions)) == len(questions) >= 5
    assert all(question.endswith("?") and "example topic" not in question for question in questions)


def test_teacher_that_writes_no_question_is_an_error(prepare, corpus, capsys) -> None:
    flags = ("--corpus_path", str(corpus), "--num_synthetic_queries", "2")
    assert "no usable question" in refused(prepare, capsys, *flags, inputs=False)


def stages_made(work: Path) -> list[str]:
    """The folders of stages of models, whose settings have a dtype."""
    folders = (
        path.parent for name in ("vectors", "ranked", "answers") for path in work.glob(f"{name}/*/done.json")
    )
    return sorted(f"{path.parent.name}/{path.name}" for path in folders)


@pytest.mark.parametrize("first", [True, False])
def test_run_keeps_the_dtype_that_its_first_processor_chose(
    first: bool, prepare, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    """A node with other instructions goes on with the same shards."""
    begun, other = ("bfloat16", "float32") if first else ("float32", "bfloat16")
    monkeypatch.setattr(choice, "multiplies_bfloat16", lambda: first)
    assert prepare(*RERANK, "--dtype", "auto") == 0
    made = stages_made(prepare.work)
    assert len(made) == 3
    settings = json.loads((prepare.work / made[0] / "settings.json").read_text())
    assert settings["dtype"] == f"torch.{begun}"
    monkeypatch.setattr(choice, "multiplies_bfloat16", lambda: not first)
    prepare.output.unlink()
    capsys.readouterr()
    assert prepare(*RERANK, "--dtype", "auto") == 0
    assert stages_made(prepare.work) == made
    assert ("Here it is very slow" in capsys.readouterr().err) == first
    prepare.output.unlink()
    assert prepare(*RERANK, "--dtype", other) == 0
    assert len(stages_made(prepare.work)) == 6, "a dtype that is given counts"


@pytest.mark.parametrize(
    ("examples", "ending"), [(9_999, "--learning_rate_generator 5e-4"), (10_000, "--enable_reranking")]
)
def test_next_command_trains_a_pointer_on_few_examples(examples: int, ending: str) -> None:
    config = PrepareConfig(queries_file=("q.txt",), output_file="t.json", enable_reranking=True)
    assert _training_command(config, Path("split/train.json"), examples).endswith(ending)


@pytest.mark.parametrize(("examples", "splits"), [(9, False), (10, True)])
def test_summary_names_the_split_before_the_training(
    examples: int, splits: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = PrepareConfig(queries_file=("q.txt",), output_file="t.jsonl")
    *_, split, train = run_summary(PrepareResult(Path("t.jsonl"), examples, {}, 0), config).splitlines()
    data = "split/train.jsonl" if splits else "t.jsonl"
    assert f"train --train_data {data} --output_dir model" in train
    assert train.startswith("then: " if splits else "next: ")
    assert (" split t.jsonl --output_dir split" in split) == splits
