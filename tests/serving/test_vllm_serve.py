"""`vllm serve` on a student's exported generator: as a teacher, and for prompts that are embeddings."""

import importlib.util
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from conftest import ROOT
from scaledown.cli import main
from scaledown.data.prompts import answer_prompt
from scaledown.data.teacher.base import Rejection, TeacherSettings, answer_all
from scaledown.data.teacher.engines.endpoint import EndpointTeacher
from scaledown.models.sources import resolve
from scaledown.student.model import ScaleDownModel
from scaledown.student.settings import ScaleDownConfig

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("default"),  # vLLM's own
    pytest.mark.skipif(not importlib.util.find_spec("vllm"), reason="vLLM is not installed: make test-vllm"),
]

START_SECONDS = 900


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student of SmolLM2, untrained: its generator answers as ever, its embeddings say nothing."""
    folder = tmp_path_factory.mktemp("served") / "model"
    settings = ScaleDownConfig(num_layers=1, doc_max_length=48)
    ScaleDownModel.build(settings, resolve("bundled:smollm2-135m")).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def server(student: Path) -> Iterator[tuple[str, str]]:
    """The base URL, and the name of the model there."""
    generator = student.with_name("generator")
    assert main(["export", str(student), "--format", "generator", "--output_dir", str(generator)]) == 0
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # What `vllm serve` runs; the command itself wants a package that is called vllm.
    words = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(generator)]
    words += ["--enable-prompt-embeds"]
    words += ["--host", "127.0.0.1", "--port", str(port), "--enforce-eager", "--dtype", "float32"]
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_HOST_IP": "127.0.0.1", "VLLM_NO_USAGE_STATS": "1"}
    log = student.with_name("log.txt")
    with log.open("w") as output:
        process = subprocess.Popen(words, stdout=output, stderr=output, env={**os.environ, **environment})
        try:
            deadline = time.monotonic() + START_SECONDS
            while True:
                try:
                    if httpx2.get(f"http://127.0.0.1:{port}/health", trust_env=False).status_code == 200:
                        break
                except httpx2.TransportError:
                    pass
                assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
                time.sleep(0.5)
            yield f"http://127.0.0.1:{port}/v1", str(generator)
        finally:
            process.terminate()
            process.wait(60)


def test_an_endpoint_answers_as_a_teacher(server: tuple[str, str]) -> None:
    url, model = server
    teacher = EndpointTeacher(model, [url], TeacherSettings(max_new_tokens=16, logprobs=2))
    document = "Penicillin\nAlexander Fleming discovered penicillin in 1928."
    questions = ["Who discovered penicillin?", "When was penicillin discovered?"]
    prompts = [answer_prompt(str(n), text, [document], 0.0) for n, text in enumerate(questions)]
    answers = answer_all(teacher, prompts)
    given = [answer for answer in answers if not isinstance(answer, Rejection)]
    assert len(given) == 2, answers
    assert "Fleming" in given[0].text
    assert "1928" in given[1].text
    assert all(answer.answer_logprobs for answer in given)


def test_the_pages_client_sends_embeddings_and_gets_the_models_answer(
    server: tuple[str, str],
    student: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    url, generator = server
    page = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    (snippet,) = [
        text for text in re.findall(r"^```python\n(.*?)^```", page, re.M | re.S) if "prompt_embeds" in text
    ]
    snippet = snippet.replace("http://gpu1:8000/v1", url).replace('"generator"', repr(generator))
    monkeypatch.chdir(student.parent)
    found: dict[str, Any] = {}
    exec(compile(snippet, "serving.md", "exec"), found)
    model = ScaleDownModel.from_pretrained(student)
    expected = model.answer(found["query"], found["documents"], max_new_tokens=32)
    assert expected
    assert capsys.readouterr().out.strip() == expected
