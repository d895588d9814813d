"""Faults of the public original, a test for each: scaledown-team/soft_compression, `scaledown/data/`."""

import inspect
import json
import tracemalloc
from pathlib import Path

import pytest

import tiny
from scaledown.config.prepare import PrepareConfig
from scaledown.data import prepare_dataset as command
from scaledown.data.input import files
from scaledown.data.input.chunking import Chunker
from scaledown.data.input.corpus import parse_article
from scaledown.data.prompts import answer_prompt
from scaledown.data.reranker import add_reranking_scores
from scaledown.data.retrieval import SPLADERetriever
from scaledown.data.teacher import generate_teacher_answers
from scaledown.data.teacher.api import load_teacher
from scaledown.data.teacher.base import TeacherSettings
from scaledown.models.sources import resolve


def records(path: Path) -> list[dict]:
    return json.loads(path.read_text(encoding="utf-8"))


def test_retriever_model_changes_the_result(prepare, models) -> None:
    assert prepare("--top_k_retrieval", "3") == 0
    sparse = records(prepare.output)
    assert prepare("--top_k_retrieval", "3", "--retriever_model", str(models["dense"])) == 0
    assert [r["documents"] for r in records(prepare.output)] != [r["documents"] for r in sparse]


def test_teacher_8bit_does_not_crash(prepare) -> None:
    pytest.importorskip("bitsandbytes", reason="needs the extra: quantization")
    assert prepare("--teacher_8bit", "--teacher_model", "bundled:smollm2-135m", "--top_k_retrieval", "1") == 0
    manifest = json.loads((prepare.work / "manifest.json").read_text())
    assert manifest["stages"]["answers"]["settings"]["bits"] == 8


def test_whole_article_is_kept(prepare, corpus) -> None:
    prepare("--top_k_retrieval", "1000")
    documents = " ".join(" ".join(records(prepare.output)[0]["documents"]).split())
    for line in corpus.read_text(encoding="utf-8").splitlines():
        for paragraph in json.loads(line)["text"][1:]:
            words = paragraph.removeprefix("BULLET::::").split()
            if not paragraph.startswith("Section::::"):
                assert " ".join(words[:8]) in documents


def test_teacher_without_inst_template_answers(models) -> None:
    asked = [{"query": "What?", "documents": ["This."]}]
    for kind in ("causal_lm", "instruct", "phi"):
        (made,) = generate_teacher_answers(asked, str(models[kind]), max_new_tokens=8, device="cpu")
        assert made["answer"], kind


def test_decoding_is_greedy_by_default_and_seeded_otherwise(prepare) -> None:
    assert PrepareConfig.temperature == 0
    prepare("--top_k_retrieval", "2")
    greedy = prepare.output.read_bytes()
    for path in (prepare.output, prepare.work / "manifest.json"):
        path.unlink()
    prepare("--top_k_retrieval", "2", "--teacher_batch_size", "1")
    assert prepare.output.read_bytes() == greedy
    sampled = []
    for seed in ("1", "2"):
        assert prepare("--top_k_retrieval", "2", "--temperature", "1.5", "--seed", seed) == 0
        sampled.append(prepare.output.read_bytes())
    assert len({greedy, *sampled}) == 3
    assert prepare("--top_k_retrieval", "2", "--temperature", "1.5", "--seed", "1") == 0
    assert prepare.output.read_bytes() == sampled[0]


def test_long_prompt_keeps_instruction_and_question(tmp_path) -> None:
    teacher = load_teacher(
        resolve(str(tiny.causal_lm(tmp_path / "m", positions=2048))),
        "cpu",
        "float32",
        TeacherSettings(max_new_tokens=8),
    )
    prompt = answer_prompt("1", "What is the question at the end?", ["word " * 900] * 5, 0.0)
    ids, dropped = teacher._context.fit(prompt)  # type: ignore[attr-defined]
    text = teacher._tokenizer.decode(ids)  # type: ignore[attr-defined]
    assert dropped > 0
    assert len(ids) <= 2040
    assert "What is the question at the end?" in text
    assert text.rstrip().endswith("<|im_start|>assistant")


def test_teacher_answers_in_batches(models, monkeypatch) -> None:
    from scaledown.data.teacher.engines.transformers import TransformersTeacher

    sizes = []
    generate = TransformersTeacher._generate

    def counting(self, batch, prompts):
        sizes.append(len(batch))
        return generate(self, batch, prompts)

    monkeypatch.setattr(TransformersTeacher, "_generate", counting)
    asked = [{"query": f"What {n}?", "documents": ["This."]} for n in range(10)]
    generate_teacher_answers(asked, str(models["causal_lm"]), max_new_tokens=2, batch_size=4, device="cpu")
    assert sizes == [4, 4, 2]


def test_top_k_reranking_alone_does_not_lose_the_scores(prepare) -> None:
    """Scores are in the run directory, and --enable_reranking writes them without scoring again."""
    import pyarrow as pa

    prepare("--top_k_retrieval", "6", "--top_k_reranking", "3")
    (shard,) = prepare.work.glob("ranked/*/*.arrow")
    kept = pa.ipc.open_stream(str(shard)).read_all().column("reranking_scores").to_pylist()
    assert [len(scores) for scores in kept] == [6] * 4
    prepare("--top_k_retrieval", "6", "--top_k_reranking", "3", "--enable_reranking")
    assert [r["reranking_scores"] for r in records(prepare.output)] == [scores[:3] for scores in kept]


def test_ties_go_to_the_earlier_document(models) -> None:
    corpus = [{"id": str(n), "title": "T", "text": "The same text."} for n in range(30)]
    (found,) = SPLADERetriever(str(models["splade"]), device="cpu").retrieve(["same"], corpus, top_k=7)
    assert [document["id"] for document in found] == [str(n) for n in range(7)]


def test_top_k_of_zero_is_refused(prepare) -> None:
    assert prepare("--top_k_retrieval", "0") == 2


@pytest.mark.parametrize("content", ["\n{}\n\n", "", "\n"])
def test_corpus_without_articles_is_an_error_without_traceback(content, prepare, corpus, capsys) -> None:
    corpus.write_text(content.format(""))
    assert prepare() == 1
    assert "Traceback" not in capsys.readouterr().err


def test_blank_lines_are_ignored(prepare, corpus) -> None:
    corpus.write_text("\n" + corpus.read_text() + "\n \n")
    assert prepare("--top_k_retrieval", "2") == 0
    assert not (prepare.work / "quarantine").exists()


def test_missing_network_is_an_error_without_traceback(prepare, capsys) -> None:
    assert prepare("--retriever_model", "org/somewhere-else") == 1
    error = capsys.readouterr().err
    assert "hub cannot be reached" in error
    assert "Traceback" not in error


def test_unwritable_output_is_refused_before_the_teacher_runs(prepare, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(
        "scaledown.data.session.teachers.load_teacher", lambda *_: pytest.fail("the teacher ran")
    )
    (tmp_path / "file").touch()
    assert prepare("--output_file", str(tmp_path / "file" / "train.json")) == 1


def test_run_resumes(prepare, monkeypatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(command, "teach", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        assert prepare("--top_k_retrieval", "2") == 130
    monkeypatch.setattr(command, "load_encoder", lambda *_: pytest.fail("the corpus was encoded again"))
    assert prepare("--top_k_retrieval", "2") == 0


def test_corpus_and_vectors_are_not_kept_in_memory(tmp_path, models, monkeypatch) -> None:
    """A corpus of four times the size takes no more memory."""
    monkeypatch.setattr(files, "_CHUNK_BYTES", 1 << 16)
    from scaledown.data.input.corpus import build_passages
    from scaledown.run.directory import RunDirectory
    from scaledown.run.stage import Stage

    line = (tiny.EXAMPLES / "corpus.jsonl").read_text(encoding="utf-8")
    peaks = []
    for copies in (5, 5, 20):  # the first run pays for imports
        path = tmp_path / f"{copies}-{len(peaks)}.jsonl"
        path.write_text(line * copies, encoding="utf-8")
        config = PrepareConfig(queries_file=("q",), output_file="o.json", passages_per_shard=500)
        stage = Stage(RunDirectory(tmp_path / f"w{len(peaks)}"), "passages", {})
        tracemalloc.start()
        build_passages(stage, config, [path], resolve(str(models["splade"])))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[2] < 1.3 * peaks[1]


def test_reranker_reads_titles(models) -> None:
    """The reranker reads the same text as the retriever, with its title."""
    with_title = [{"query": "What is it?", "documents": [{"title": "A certain title", "text": "Some text."}]}]
    written_out = [{"query": "What is it?", "documents": ["A certain title\nSome text."]}]
    without = [{"query": "What is it?", "documents": ["Some text."]}]
    scores = [
        add_reranking_scores(given, str(models["cross_encoder"]), device="cpu")[0]["reranking_scores"]
        for given in (with_title, written_out, without)
    ]
    assert scores[0] == scores[1] != scores[2]


def test_function_and_command_have_the_same_defaults() -> None:
    parameters = inspect.signature(add_reranking_scores).parameters
    assert parameters["reranker_model"].default == PrepareConfig.reranker_model
    parameters = inspect.signature(generate_teacher_answers).parameters
    assert parameters["teacher_model"].default == PrepareConfig.teacher_model
    assert parameters["max_new_tokens"].default == PrepareConfig.max_new_tokens
    parameters = inspect.signature(SPLADERetriever).parameters
    assert parameters["model_name"].default == PrepareConfig.retriever_model


def test_no_passage_crosses_articles_or_the_limit(models) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(models["splade"])
    lines = (tiny.EXAMPLES / "corpus.jsonl").read_text(encoding="utf-8").splitlines()
    articles = [parse_article(json.loads(line), "x") for line in lines]
    for passages in Chunker(tokenizer.backend_tokenizer, "tokens", 128).passages(articles):
        for passage, _ in passages:
            ids = tokenizer(f"{passage.title}\n{passage.text}", add_special_tokens=False)["input_ids"]
            assert len(ids) <= 128
