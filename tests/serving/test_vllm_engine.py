"""The server's engine on vLLM itself, built for a CPU: in an environment of its own, by `make test-vllm`."""

import contextlib
import http.client
import importlib.util
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

import tiny
from asked import Asked
from scaledown.cli import main
from scaledown.config.serve import ServeConfig
from scaledown.models.sources import resolve
from scaledown.serving.engine import Engine
from scaledown.serving.jobs import End, Job, Piece
from scaledown.serving.protocol import RequestError
from scaledown.student.model import ScaleDownModel
from scaledown.student.settings import ScaleDownConfig

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("default"),  # vLLM's own
    pytest.mark.skipif(not importlib.util.find_spec("vllm"), reason="vLLM is not installed: make test-vllm"),
]

WORDS = ["tower", "river", "city", "tree", "bird", "stone", "book", "bridge", "moon", "tide", "iron", "bee"]
QUERIES = [f"What about the {word}?" for word in WORDS]
DOCUMENTS = [
    [f"A {word} by the {other} is old and tall." for other in WORDS[: n % 4 + 1]]
    for n, word in enumerate(WORDS)
]


@pytest.fixture(autouse=True, scope="module")
def _small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
        patch.setenv("VLLM_HOST_IP", "127.0.0.1")
        patch.setenv("SCALEDOWN_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student with LoRA, untrained, of a generator whose heads vLLM knows."""
    path = tmp_path_factory.mktemp("student")
    generator = tiny.causal_lm(path / "generator", width=128)
    settings = ScaleDownConfig(num_layers=1, doc_max_length=48)
    ScaleDownModel.build(settings, resolve(str(generator))).save_pretrained(path / "student")
    return path / "student"


@pytest.fixture(scope="module")
def model(folder: Path) -> ScaleDownModel:
    """The same on transformers, to compare with."""
    found: ScaleDownModel = ScaleDownModel.from_pretrained(folder)
    return found


def started(folder: Path, **settings: Any) -> Engine:
    from scaledown.student.engines.vllm import VllmGeneration

    student = ScaleDownModel.from_pretrained(folder)
    generation = VllmGeneration(student, resolve(str(folder)), "cpu", settings.get("batch_size", 8))
    engine = Engine(student, ServeConfig(model="x", **{"batch_size": 8, **settings}), generation)
    engine.start(lambda: None)
    return engine


@pytest.fixture(scope="module")
def engine(folder: Path) -> Iterator[Engine]:
    made = started(folder, max_waiting=5000, max_new_tokens=3_000)
    yield made
    made.stop(10)
    assert not made._thread.is_alive()
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("compressed", [True, False])
def test_answers_are_those_of_transformers(engine: Engine, model: ScaleDownModel, compressed: bool) -> None:
    """In float32; another order of sums may turn a tie, of which there are few."""
    expected = model.answer(QUERIES, DOCUMENTS, max_new_tokens=12, compressed=compressed)
    asked = [
        Asked(
            engine, query, own, compressed=compressed, max_new_tokens=12, rate=model.config.compression_rate
        )
        for query, own in zip(QUERIES, DOCUMENTS, strict=True)
    ]
    found = [one.text() for one in asked]
    assert len(set(expected)) > 6
    assert sum(ours == theirs for ours, theirs in zip(found, expected, strict=True)) >= len(expected) - 1


def test_tokens_and_embeddings_do_not_share_a_cache(engine: Engine) -> None:
    """The same beginning as text and as embeddings, again and again."""

    def ask(*, compressed: bool) -> str:
        return Asked(engine, QUERIES[0], DOCUMENTS[3], compressed=compressed, max_new_tokens=12).text()

    first = {way: ask(compressed=way) for way in (True, False)}
    for way in (False, True, True, False):
        assert ask(compressed=way) == first[way]


def test_an_answer_comes_in_pieces_and_stop_texts_end_it(engine: Engine) -> None:
    *pieces, end = Asked(engine, QUERIES[1], DOCUMENTS[1], max_new_tokens=24).all()
    assert isinstance(end, End)
    text = "".join(piece.text for piece in pieces if isinstance(piece, Piece))
    assert len(pieces) > 3
    stop = text[len(text) // 2 : len(text) // 2 + 2]
    cut = Asked(engine, QUERIES[1], DOCUMENTS[1], max_new_tokens=24, stops=(stop,)).text()
    assert cut == text.partition(stop)[0].strip()


def test_chance_depends_on_the_seed_alone(engine: Engine) -> None:
    def written(seed: int) -> str:
        return Asked(engine, "Why?", ["No."], temperature=1.5, seed=seed).text()

    assert written(1) == written(1)
    assert len({written(seed) for seed in range(6)}) > 3


def test_cancelled_request_makes_room(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine._model.generator.generation_config, "eos_token_id", [])
    long = [Asked(engine, "Why?", ["No."], max_new_tokens=3_000) for _ in range(8)]
    for one in long:
        assert isinstance(one.events.get(timeout=300), Piece)
        one.job.cancelled = True
    assert isinstance(Asked(engine, "Why?", ["No."], max_new_tokens=2).all()[-1], End)
    assert engine.running == 0


def test_a_request_that_cannot_be_read_fails_alone(engine: Engine) -> None:
    bad = Asked(engine, "very " * 5000, ["A."], compressed=False)
    good = Asked(engine, "Why?", ["No."])
    (error,) = bad.all()
    assert isinstance(error, RequestError)
    assert isinstance(good.all()[-1], End)


def test_killed_engine_ends_all_requests(folder: Path, engine: Engine) -> None:
    others = set(multiprocessing.active_children())
    own, failed = started(folder, max_new_tokens=3_000), threading.Event()
    own._on_failure = failed.set
    own._model.generator.generation_config.eos_token_id = []
    asked = [Asked(own, f"Why {n}?", ["No."], max_new_tokens=3_000) for n in range(12)]  # four of them wait
    assert isinstance(asked[0].events.get(timeout=300), Piece)
    (core,) = set(multiprocessing.active_children()) - others
    workers = psutil.Process(core.pid).children(recursive=True)
    os.kill(core.pid or 0, signal.SIGKILL)
    for one in asked:
        error = one.all()[-1]
        assert isinstance(error, RequestError)
        assert error.status == 503
    assert failed.wait(60)
    with pytest.raises(RequestError, match="start the server again"):
        own.submit(Job("Why?", [], lambda _: None))
    own.stop(10)
    _, alive = psutil.wait_procs(workers, timeout=60)
    assert not alive


def test_the_command_answers_on_standard_output_alone(
    folder: Path, model: ScaleDownModel, tmp_path: Path
) -> None:
    words = [sys.executable, "-m", "scaledown", "answer", "--model", str(folder), "--engine", "vllm"]
    asked = ["--query", QUERIES[0], "--document", DOCUMENTS[0][0], "--device", "cpu", "--max_new_tokens", "8"]
    asked += ["--dtype", "float32"]  # as `model`; `auto` is bfloat16 on some processors
    done = subprocess.run([*words, *asked], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == model.answer(QUERIES[0], DOCUMENTS[0][:1], max_new_tokens=8)
    records = [{"query": q, "documents": d, "answer": "-"} for q, d in zip(QUERIES, DOCUMENTS, strict=True)]
    (tmp_path / "data.json").write_text(json.dumps(records))
    flags = ["--data", str(tmp_path / "data.json"), "--output_file", str(tmp_path / "answers.json")]
    words = ["answer", "--model", str(folder), "--engine", "vllm", "--device", "cpu", "--max_new_tokens", "8"]
    assert main([*words, *flags]) == 0
    found = [row["answer"] for row in json.loads((tmp_path / "answers.json").read_text())]
    expected = model.answer(QUERIES, DOCUMENTS, max_new_tokens=8)
    assert sum(ours == theirs for ours, theirs in zip(found, expected, strict=True)) >= len(expected) - 1


def test_sigterm_finishes_running_requests(folder: Path) -> None:
    words = [sys.executable, "-m", "scaledown", "serve", "--model", str(folder), "--port", "0"]
    words += ["--device", "cpu", "--engine", "vllm"]
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        try:
            ready = next(line for line in iter(process.stderr.readline, "") if "ready" in line)
            assert "by vLLM" in ready
            port = int(re.findall(r":(\d+)/v1", ready)[0])
            with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=120)) as connection:
                turns = [{"role": "user", "content": "Why?"}]
                body = {"messages": turns, "max_tokens": 300, "stream": True, "temperature": 2, "seed": 1}
                connection.request("POST", "/v1/chat/completions", json.dumps(body))
                response = connection.getresponse()
                assert response.read(40)
                process.send_signal(signal.SIGTERM)
                assert response.read().decode().strip().endswith("data: [DONE]")
            rest = process.stderr.read()
            assert process.wait(60) == 0, rest[-2000:]
            assert "Traceback" not in rest
        finally:
            process.kill()
