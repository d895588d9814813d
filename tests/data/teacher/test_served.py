"""The endpoint engine against a real server: `transformers serve` with SmolLM2, on loopback."""

import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest

from scaledown.data.prompts import answer_prompt
from scaledown.data.teacher.base import Rejection, TeacherSettings, answer_all
from scaledown.data.teacher.engines.endpoint import EndpointTeacher
from scaledown.errors import ModelError
from scaledown.models.sources import resolve
from scaledown.models.weights import loadable

pytest.importorskip("fastapi", reason="needs transformers[serving]")

START_SECONDS = 120


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[tuple[str, str]]:
    """The base URL and the name of the model there."""
    try:
        model, _ = loadable(resolve("bundled:smollm2-135m"))
    except ModelError as error:
        pytest.skip(str(error))
    command = Path(sys.executable).with_name("transformers")
    if not command.exists() and not shutil.which("transformers"):
        pytest.skip("the command transformers is not installed")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    log = tmp_path_factory.mktemp("served") / "log.txt"
    with log.open("w") as output:
        process = subprocess.Popen([command, "serve", model, *place], stdout=output, stderr=output)
        try:
            url = f"http://127.0.0.1:{port}"
            deadline = time.monotonic() + START_SECONDS
            while True:
                try:
                    httpx2.get(f"{url}/health", trust_env=False)
                    break
                except httpx2.TransportError:
                    assert process.poll() is None and time.monotonic() < deadline, log.read_text()
                    time.sleep(0.2)
            yield f"{url}/v1", model
        finally:
            process.kill()
            process.wait()


def test_a_real_server_answers(server) -> None:
    url, model = server
    teacher = EndpointTeacher(model, [url], TeacherSettings(max_new_tokens=16))
    document = "Penicillin\nAlexander Fleming discovered penicillin in 1928."
    prompts = [
        answer_prompt(str(number), question, [document], 0.0)
        for number, question in enumerate(["Who discovered penicillin?", "When was penicillin discovered?"])
    ]
    answers = answer_all(teacher, prompts)
    given = [answer for answer in answers if not isinstance(answer, Rejection)]
    assert len(given) == 2, answers
    assert "Fleming" in given[0].text
    assert "1928" in given[1].text
    assert all(0 < answer.answer_tokens <= 16 and answer.prompt_tokens > 20 for answer in given)
