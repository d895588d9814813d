"""Every command and snippet of the guide and the README runs, with tiny models under the guide's names."""

import contextlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from conftest import ROOT, SHARED
from scaledown import cli
from scaledown.data import prepare_dataset
from scaledown.data.input import queries
from shell import Fence, commands, fences

GUIDE = ROOT / "docs" / "dataset-preparation-guide.md"
FIRST_EDITION = SHARED / "dataset-preparation-guide.md"
PREPARE = ["python", "-m", "scaledown.data.prepare_dataset"]
# Fetching and installing need a network.
NOT_RUN = {"wget", "pip", "git", "cd"}
# Everything else stays as written; these only make it small.
SMALL = ["--max_new_tokens", "4", "--device", "cpu"]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hub_cache: Path) -> Path:
    """A folder with the files in the guide's commands, and a server on loopback for MS MARCO's host."""
    monkeypatch.chdir(tmp_path)
    articles = (ROOT / "examples" / "corpus.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (tmp_path / "kilt_knowledgesource.json").write_text("".join(articles[:8]), encoding="utf-8")
    (tmp_path / "queries.txt").write_text("What is machine learning?\nHow does photosynthesis work?\nWho?\n")
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    return tmp_path


def localized(words: list[str], place: Path) -> list[str]:
    corpus = str(place / "kilt_knowledgesource.json")
    return [corpus if word.endswith("kilt_knowledgesource.json") else word for word in words]


def run(words: list[str], place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run one command of a page in this process."""
    if words[:3] == PREPARE or words[:2] in (["scaledown", "prepare"], ["scaledown", "plan"]):
        flags = localized(words[3:] if words[0] == "python" else words[2:], place)
        if "--num_synthetic_queries" in flags:  # random weights write no questions: a real small teacher does
            flags[flags.index("--num_synthetic_queries") + 1] = "3"
            flags += [
                "--teacher_model",
                "bundled:smollm2-135m",
                "--max_new_tokens",
                "40",
                "--top_k_retrieval",
                "2",
            ]
            flags += ["--device", "cpu"]
        else:
            flags += SMALL
        if "--download_ms_marco" in flags:
            monkeypatch.setattr(queries, "MS_MARCO_QUERIES", 3)
            monkeypatch.setenv("SCALEDOWN_CACHE", str(place / "cache"))
            cached = place / "cache" / "msmarco" / "queries.dev.small.tsv"
            cached.parent.mkdir(parents=True, exist_ok=True)
            cached.write_text("1\twhat is it\n2\twho was it\n3\twhere is it\n")
        if "--query_dataset" in flags:
            use_local_datasets(monkeypatch)
        plans = words[1] == "plan"
        assert (cli.main(["plan", *flags]) if plans else prepare_dataset.main(flags)) == 0
    elif words[:2] == ["scaledown", "index"]:
        assert cli.main(["index", *localized(words[2:], place), "--device", "cpu"]) == 0
    elif words[:2] in (["python", "train.py"], ["scaledown", "train"], ["scaledown", "pretrain"]):
        if not Path("train_data.json").exists():
            shutil.copy(place / "mock_data.json", "train_data.json")
        if words[0] == "python":
            assert (ROOT / words[1]).read_text().count("from scaledown.student.train import main") == 1
        command = "pretrain" if words[1] == "pretrain" else "train"
        small = ["--device", "cpu", "--batch_size", "2"]
        small += [] if "--pretrained_model" in words else ["--num_layers", "1"]
        # bfloat16 is slow on a CPU without instructions for it
        for flag, value in {"--max_steps": "1", "--micro_batch_size": "2", "--dtype": "float32"}.items():
            small += [flag, value] if flag in words else []
        assert cli.main([command, *localized(words[2:], place), *small]) == 0
    elif words[:2] == ["scaledown", "compare"]:
        evaluated(place)
        for name in ("model-16x", "model-4x"):
            shutil.copytree("model", name, dirs_exist_ok=True)
        for layers in (5, 8):  # of a model that has two
            parameters = {"train_data": ["held_out.json"], "num_layers": layers - 4 if layers == 5 else 2}
            Path(f"layers-{layers}.json").write_text(
                json.dumps(parameters | {"batch_size": 1, "device": "cpu", "report_to": "none"})
            )
        small = ["--device", "cpu", "--max_new_tokens", "2", "--cost_batches", "1", "--cost_repeats", "1"]
        small += ["--cost_documents", "2", "--cost_document_tokens", "8", "--cost_query_tokens", "4"]
        assert cli.main([*words[1:], *small]) == 0
    elif words[:2] == ["scaledown", "evaluate"]:
        evaluated(place, "pointer" if "pointer" in words else "model")
        small = ["--device", "cpu", "--max_new_tokens", "4"] if "--model" in words else []
        assert cli.main([*words[1:], *small]) == 0
    elif words[0] == "scaledown":
        Path("questions_with_answers.jsonl").write_text('{"question": "q", "answer": ["a"]}\n')
        for word in words[1:]:
            makes = words[words.index("--output_file") + 1] if "--output_file" in words else ""
            if word.endswith(".json") and not Path(word).exists() and word != makes:
                shutil.copy(place / "mock_data.json", word)
        assert cli.main(words[1:]) == 0
    elif words[:2] == ["python", "-c"]:
        *command, into, target = words
        assert into == ">"
        done = subprocess.run([sys.executable, *command[1:]], capture_output=True, text=True, check=True)
        assert done.stdout == (place / target).read_text()
    elif words[:1] == ["python"] and words[1].startswith("examples/"):
        run_python((place / words[1]).read_text(), monkeypatch, words[1:])
    else:
        assert words[0] in NOT_RUN, f"nothing runs {words}"


def evaluation_files(folder: Path) -> None:
    """Files with the names and formats of `docs/cleaning.md`; BioASQ's is beside the folder, unconverted.

    Each has one question; BioASQ's is one of `queries.txt`.
    """
    folder.mkdir()
    passage = "Machine learning is the study of programs that become better with experience."
    (context, sentences) = ("Machine learning", [passage])
    tables = {
        "nq": {"question": "when was it", "answer": ["1999"]},
        "triviaqa": {
            **{"question": "Which one was it?", "question_id": "tc_2"},
            "answer": {"value": "That", "aliases": ["That", "this"], "normalized_aliases": ["that", "this"]},
        },
        "asqa": {
            **{"ambiguous_question": "Who was first?", "sample_id": "-1"},
            "qa_pairs": [{"context": "No context provided", "question": "q", "short_answers": ["Ada"]}],
        },
    }
    for name, row in tables.items():
        pq.write_table(pa.Table.from_pylist([row]), folder / f"{name}.parquet")
    (folder / "popqa.tsv").write_text(
        "id\tsubj\tquestion\tpossible_answers\n"
        '42\tAda\tWhat is Ada\'s occupation?\t"[""poet"", ""writer""]"\n'
    )
    hotpot = {"_id": "5a", "question": "Were both?", "answer": "yes", "context": [[context, sentences]]}
    (folder / "hotpotqa.json").write_text(json.dumps([hotpot]))
    snippets = [{"text": passage, "document": "http://www.ncbi.nlm.nih.gov/pubmed/1"}]
    question = {
        "id": "55",
        "body": "What is machine-learning?",
        "exact_answer": [["study"]],
        "snippets": snippets,
    }
    (folder.parent / "11B1_golden.json").write_text(json.dumps({"questions": [question]}, indent=1))
    (folder / "bioasq.jsonl").write_text(json.dumps(question) + "\n")


def evaluated(place: Path, name: str = "model") -> None:
    """The files in the commands of evaluation: a model, held-out data, right answers, rankings."""
    record = {"query": "Who painted it?", "documents": ["It\nAda painted it. It is red."], "answer": "Ada"}
    (place / "held_out.json").write_text(json.dumps([record]))
    right = {"who painted it": "Ada", "What is machine learning?": "learning", "Who?": "Ada"}
    lines = (json.dumps({"question": question, "answer": [answer]}) for question, answer in right.items())
    (place / "gold.jsonl").write_text("\n".join(lines))
    for ranking in ("splade.run", "reranked.run"):
        (place / ranking).write_text("q1 Q0 a 1 2.0 x\nq1 Q0 b 2 1.0 x\n")
    (place / "qrels.txt").write_text("q1 0 a 1\n")
    if not (place / name).exists():
        flags = ["--train_data", "held_out.json", "--output_dir", name, "--num_layers", "1"]
        flags += ["--compressor", "pointer"] if name == "pointer" else []
        assert cli.main(["train", *flags, "--batch_size", "1", "--device", "cpu"]) == 0


def use_local_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `datasets.load_dataset` return local rows with the columns of the hub's datasets."""
    import datasets

    rows = {
        "google-research-datasets/natural_questions": [{"question": {"text": "who is it"}}],
        "mandarjoshi/trivia_qa": [{"question": "Who is it?"}],
        "rajpurkar/squad": [{"question": "What is it?"}],
    }
    monkeypatch.setattr(
        datasets, "load_dataset", lambda name, *_, **__: datasets.Dataset.from_list(rows[name])
    )


def run_python(text: str, monkeypatch: pytest.MonkeyPatch, argv: list[str] | None = None) -> None:
    use_local_datasets(monkeypatch)
    monkeypatch.setattr(sys, "argv", argv or ["snippet"])
    exec(compile(text, "snippet", "exec"), {"__name__": "__main__"})


def titled(fence: Fence) -> str:
    return f"{fence.language}-{fence.line}"


def is_options(fence: Fence) -> bool:
    found = commands(fence.text)
    return bool(found) and all(words[0].startswith("--") for words in found)


GUIDE_FENCES = fences(GUIDE)
SCRIPTS = [fence for fence in GUIDE_FENCES if "for chunk" in fence.text or "python -c" in fence.text]
SHELL = [fence for fence in GUIDE_FENCES if fence.language == "bash" and fence not in SCRIPTS]
COMMANDS = [fence for fence in SHELL if not is_options(fence)]


@pytest.mark.parametrize("fence", COMMANDS, ids=titled)
def test_commands_of_the_guide_work(fence: Fence, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (place / "mock_data.json").write_text(json.dumps([{"query": "q", "documents": ["d"], "answer": "a"}]))
    for words in commands(fence.text):
        run(words, place, monkeypatch)


OPTIONS = [words for fence in SHELL if is_options(fence) for words in commands(fence.text)]


@pytest.mark.parametrize("words", OPTIONS, ids=" ".join)
def test_options_of_the_guide_work(words: list[str], place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each option of the configuration chapters, added to the basic command."""
    basic = [*PREPARE, "--queries_file", "queries.txt", "--corpus_path", "kilt_knowledgesource.json"]
    basic += ["--output_file", "train_data.json"]
    if "--top_k_retrieval" not in words:
        basic += ["--top_k_retrieval", "2"]
    if "--reranker_model" in words:
        basic += ["--enable_reranking"]
    if words[-1].endswith(".gguf"):
        from scaledown.models.sources import resolve

        bundled = resolve("bundled:smollm2-135m")
        words = [words[0], f"{bundled.location}/{bundled.gguf_file}"]
    run([*basic, *words], place, monkeypatch)
    made = json.loads((place / "train_data.json").read_text())
    assert len(made) == 3
    if "--reranker_model" in words:
        assert all(len(record["reranking_scores"]) == len(record["documents"]) for record in made)


@pytest.mark.slow
def test_parallel_processing_of_the_guide_works(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loop in a real shell: chunks at the same time, then both ways to merge."""
    loop, by_hand = SCRIPTS
    (place / "queries.txt").write_text("".join(f"What is number {n}?\n" for n in range(4)))
    (place / "bin").mkdir()
    for name, module in (("python", ""), ("scaledown", "-m scaledown ")):
        script = place / "bin" / name
        script.write_text(f'#!/bin/sh\nexec {sys.executable} {module}"$@"\n')
        script.chmod(0o755)
    environment = {**os.environ, "PATH": f"{place / 'bin'}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    text = loop.text.replace("split -l 1000", "split -l 2")
    done = subprocess.run(
        ["bash", "-e", "-c", text], cwd=place, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    merged = json.loads((place / "train_data_full.json").read_text())
    assert [record["query"] for record in merged] == [f"What is number {n}?" for n in range(4)]
    (place / "train_data_full.json").unlink()
    subprocess.run(["bash", "-e", "-c", by_hand.text], cwd=place, env=environment, check=True)
    again = json.loads((place / "train_data_full.json").read_text())
    assert sorted(record["query"] for record in again) == sorted(record["query"] for record in merged)


def test_loop_of_the_guide_uses_only_existing_gpus(tmp_path: Path) -> None:
    (tmp_path / "queries.txt").write_text("".join(f"What is number {n}?\n" for n in range(20)))
    (tmp_path / "bin").mkdir()
    for name, does in (("python", "echo $CUDA_VISIBLE_DEVICES >> gpus"), ("scaledown", ":")):
        script = tmp_path / "bin" / name
        script.write_text(f"#!/bin/sh\n{does}\n")
        script.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    text = SCRIPTS[0].text.replace("split -l 1000", "split -l 1")
    subprocess.run(["bash", "-e", "-c", text], cwd=tmp_path, env=environment, check=True)
    named = sorted(map(int, (tmp_path / "gpus").read_text().split()))
    assert named == sorted(number % 8 for number in range(20))


@pytest.mark.parametrize("fence", [f for f in GUIDE_FENCES if f.language == "python"], ids=titled)
def test_snippets_of_the_guide_work(fence: Fence, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with contextlib.redirect_stdout(io.StringIO()):
        run_python(fence.text, monkeypatch)
    for name in ("train_data.json", "mock_data.json"):
        if f'"{name}"' in fence.text:
            assert cli.main(["validate", name]) == 0
    if "kilt_small" in fence.text:
        assert (place / "kilt_small.json").read_text() == (place / "kilt_knowledgesource.json").read_text()


@pytest.mark.parametrize("fence", [f for f in GUIDE_FENCES if f.language == "json"], ids=titled)
def test_format_in_the_guide_is_sound(fence: Fence, place: Path) -> None:
    (place / "shown.json").write_text(fence.text)
    assert cli.main(["validate", "shown.json"]) == 0


@pytest.mark.skipif(not FIRST_EDITION.exists(), reason="needs the guide's first edition in ../shared")
def test_guide_has_all_commands_of_its_first_edition() -> None:
    """The commands are unchanged, except for comments after a backslash."""
    kept = [words for fence in SHELL for words in commands(fence.text)]
    kept_flags = {tuple(words) for words in kept if words[0].startswith("--")}
    for fence in fences(FIRST_EDITION):
        if fence.language != "bash" or "for chunk" in fence.text:
            continue
        for words in commands(fence.text):
            if words[:3] == PREPARE or words[1:2] == ["train.py"]:
                assert words in kept, words
            elif words[0].startswith("--"):
                assert tuple(words) in kept_flags, words


# README

README = fences(ROOT / "README.md")


STUDENT = fences(ROOT / "docs" / "student.md")
CLEANING = fences(ROOT / "docs" / "cleaning.md")
EVALUATION = fences(ROOT / "docs" / "evaluation.md")
SCALING = fences(ROOT / "docs" / "scaling.md")


@pytest.mark.parametrize(
    "fence",
    [f for f in README + STUDENT + CLEANING + EVALUATION + SCALING if f.language == "bash"],
    ids=titled,
)
def test_commands_of_the_pages_work(
    fence: Fence, place: Path, monkeypatch: pytest.MonkeyPatch, forked: None
) -> None:
    evaluation_files(place / "evaluation")
    mock = [{"query": query, "documents": [f"{query}\nd"], "answer": "a"} for query in ("q", "r")]
    (place / "mock_data.json").write_text(json.dumps(mock))
    makefile = (ROOT / "Makefile").read_text()
    articles = (ROOT / "examples" / "corpus.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    whole = [json.loads(line) for line in articles[:8]]
    # Short ones, because real models read them for the README.
    short = [article | {"text": article["text"][:2]} for article in whole]
    for corpus in ("kilt_knowledgesource.json", "corpus.jsonl"):
        (place / corpus).write_text("".join(f"{json.dumps(one)}\n" for one in short))
    (place / "queries.txt").write_text("What is machine learning?\nWho?\n")
    (place / "held_out_corpus.jsonl").write_text("".join(articles[8:12]), encoding="utf-8")
    (place / "held_out_queries.txt").write_text("Where?\n")
    (place / "today.jsonl").write_text("".join(articles[8:10]), encoding="utf-8")
    (place / "tomorrow.jsonl").write_text("".join(articles[9:12]), encoding="utf-8")
    (place / "gone.txt").write_text("1\n2\n")
    asked = ("What is machine learning?", "Who?", "q")
    right = (json.dumps({"question": question, "answers": ["learning"]}) for question in asked)
    (place / "gold.jsonl").write_text("\n".join(right))
    if "scaledown status" in fence.text:
        (place / "train_data.json.work" / "queries").mkdir(parents=True)
    with contextlib.ExitStack() as background:
        for words in commands(fence.text):
            if words[0] == "make":
                assert f"\n{words[1]}:" in makefile
            elif words[:2] == ["scaledown", "serve"]:
                port = background.enter_context(served(words))
            elif words[0] == "curl":
                ask(words, port)
            else:
                run(words, place, monkeypatch)


@contextlib.contextmanager
def served(words: list[str]) -> Iterator[int]:
    """Start a page's server in the background, at a free port instead of 8000. Returns the port."""
    *flags, port, behind = words[1:]
    assert (flags[-1], port, behind) == ("--port", "8000", "&")
    command = [sys.executable, "-m", "scaledown", *flags, "0", "--device", "cpu"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        try:
            ready = next((line for line in iter(process.stderr.readline, "") if "ready" in line), "")
            (found,) = re.findall(r":(\d+)/v1", ready)
            yield int(found)
        finally:
            process.terminate()
        assert process.wait(60) == 0


def ask(words: list[str], port: int) -> None:
    """Send a page's request, and check that the answer is from compressed documents."""
    if not shutil.which("curl"):
        pytest.skip("needs curl, which asks the server")
    words = [word.replace("127.0.0.1:8000", f"127.0.0.1:{port}") for word in words]
    done = subprocess.run(words, capture_output=True, check=True)
    told = json.loads(done.stdout)
    assert isinstance(told["choices"][0]["message"]["content"], str)
    assert told["usage"]["compression"]["embeddings"] > 0


def test_snippet_of_the_student_works(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (place / "train_data.json").write_text(json.dumps([{"query": "q", "documents": ["d"], "answer": "a"}]))
    assert (
        cli.main(["train", "--train_data", "train_data.json", "--num_layers", "1", "--output_dir", "model"])
        == 0
    )
    (snippet,) = [fence for fence in STUDENT if fence.language == "python"]
    with contextlib.redirect_stdout(io.StringIO()) as out:
        run_python(snippet.text, monkeypatch)
    assert out.getvalue()


def test_snippets_of_the_api_work(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them in order, in a folder with the files, the index and the model that they name."""
    evaluated(place, "pointer")
    Path("pointer").rename("model")
    articles = (place / "kilt_knowledgesource.json").read_text(encoding="utf-8").splitlines()[:2]
    (place / "corpus.jsonl").write_text("\n".join(articles), encoding="utf-8")
    (place / "queries.txt").write_text("What is machine learning?\n")
    assert (
        cli.main(["index", "--corpus_path", "corpus.jsonl", "--index_dir", "index", "--device", "cpu"]) == 0
    )
    snippets = [fence.text for fence in fences(ROOT / "docs" / "api.md") if fence.language == "python"]
    with contextlib.redirect_stdout(io.StringIO()) as out:
        for snippet in snippets:
            run_python(snippet, monkeypatch)
    assert f"1 records in {Path('train_data.json')}" in out.getvalue()
    first, *_, last = out.getvalue().splitlines()
    assert first.endswith("  Tides")
    assert last.startswith("[[")  # the picked tokens of each document


def test_snippet_of_the_index_works(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = ["--corpus_path", str(place / "kilt_knowledgesource.json"), "--index_dir", "index"]
    assert cli.main(["index", *flags, "--device", "cpu"]) == 0
    (snippet,) = [fence for fence in SCALING if fence.language == "python"]
    with contextlib.redirect_stdout(io.StringIO()) as out:
        run_python(snippet.text, monkeypatch)
    assert len(out.getvalue().splitlines()) == 5


@pytest.mark.parametrize("fence", [f for f in README if f.language == "python"], ids=titled)
def test_snippets_of_the_readme_work(fence: Fence, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with contextlib.redirect_stdout(io.StringIO()):
        run_python(fence.text, monkeypatch)


@pytest.mark.parametrize(
    "page", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], ids=lambda p: p.name
)
def test_links_between_pages_have_targets(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_flags_of_the_pages_exist() -> None:
    """Each `--flag` in README and docs is a flag of a command."""
    from dataclasses import fields

    from scaledown.config.compare import CompareConfig
    from scaledown.config.evaluate import EvaluateConfig
    from scaledown.config.prepare import PrepareConfig
    from scaledown.config.serve import ServeConfig
    from scaledown.config.train import PretrainConfig, TrainConfig

    commands = (PrepareConfig, TrainConfig, PretrainConfig, EvaluateConfig, CompareConfig, ServeConfig)
    known = {item.name for command in commands for item in fields(command)}
    known |= {"model", "query", "document", "data", "format"}  # of scaledown answer and export
    known |= {"add", "remove"}  # of scaledown index
    known |= {"push_to_hub", "output", "fraction"}  # of scaledown export, report and split
    known |= {"enable", "no"}  # --enable-…, --no-… of vLLM's own server
    known |= {"retry"}  # --retry and --retry-… of curl
    known |= {
        "nproc_per_node",
        "shutdown_timeout",
        "array",
        "gpus",
        "head",
        "address",
    }  # of torchrun, Slurm and Ray
    known |= {
        "config",
        "preset",
        "dry_run",
        "overwrite",
        "debug",
        "help",
        "log_level",
        "log_format",
        "json",
        "quick",
    }
    names = ("teachers", "student", "cleaning", "evaluation", "formats", "scaling", "serving")
    pages = [ROOT / "docs" / f"{name}.md" for name in names]
    for page in (ROOT / "README.md", *pages):
        for flag in re.findall(r"(?<![\w-])--([a-z][a-z0-9_]+)", page.read_text(encoding="utf-8")):
            assert flag.removeprefix("no_") in known, f"{page.name}: --{flag}"


def test_recipes_of_cleaning_leave_out_questions_of_every_file(place: Path) -> None:
    """The page's last command leaves out a question of each of its files, by this file."""
    evaluation_files(place / "evaluation")
    prepare = next(
        words for fence in CLEANING for words in commands(fence.text) if "--decontaminate_answers" in words
    )
    asked = ["When was it?", "which one was it", "both were", "who was first", "What is Ada's job?", "Why?"]
    (place / "queries.txt").write_text("\n".join([*asked, "what is machine learning"]))
    flags = ["--preset", "demo", "--teacher_model", "mistralai/Mistral-7B-Instruct-v0.2", *SMALL]
    flags += [
        "--retriever_model",
        "naver/splade-v3",
        "--reranker_model",
        "cross-encoder/ms-marco-MiniLM-L-6-v2",
    ]
    assert prepare_dataset.main([*localized(prepare[2:], place), *flags]) == 0
    made = json.loads((place / "train_data.json").read_text())
    assert [record["query"] for record in made] == ["Why?"]
    lines = "".join(path.read_text() for path in (place / "train_data.json.work" / "quarantine").iterdir())
    files = [Path(json.loads(line)["match"]["file"]).stem for line in lines.splitlines()]
    assert files == ["nq", "triviaqa", "hotpotqa", "asqa", "popqa", "bioasq"]
