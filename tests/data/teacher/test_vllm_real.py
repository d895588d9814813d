"""The vLLM teacher on vLLM itself, built for a CPU: in an environment of its own, by `make test-vllm`."""

import importlib.util
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil
import pytest

from conftest import ROOT
from scaledown.data.prompts import answer_prompt
from scaledown.data.teacher.api import choose_backend, load_teacher
from scaledown.data.teacher.base import EngineSettings, Rejection, Teacher, TeacherSettings, answer_all
from scaledown.errors import ModelError
from scaledown.models.sources import resolve
from scaledown.records import Answer

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("default"),  # vLLM's own
    pytest.mark.skipif(not importlib.util.find_spec("vllm"), reason="vLLM is not installed: make test-vllm"),
]

MODEL = "bundled:smollm2-135m"
DTYPE = "float32"  # in bfloat16, sampled words depend on what vLLM computes in the same step
DOCUMENT = "Penicillin\nAlexander Fleming discovered penicillin in 1928."


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    monkeypatch.setenv("VLLM_HOST_IP", "127.0.0.1")


@pytest.fixture(scope="module")
def teacher() -> Iterator[Teacher]:
    generation = TeacherSettings(max_new_tokens=16, logprobs=3)
    made = load_teacher(resolve(MODEL), "cpu", DTYPE, generation, EngineSettings(backend="vllm"))
    yield made
    made.close()  # type: ignore[attr-defined]


def prompts(document: str = DOCUMENT, temperature: float = 0.0):
    questions = ["Who discovered penicillin?", "When was penicillin discovered?"]
    return [answer_prompt(str(n), text, [document], temperature) for n, text in enumerate(questions)]


def given(answers: Sequence[Answer | Rejection]) -> list[Answer]:
    """Return the answers, none of which may be missing."""
    assert not [answer for answer in answers if isinstance(answer, Rejection)]
    return [answer for answer in answers if isinstance(answer, Answer)]


def test_vllm_is_the_engine_of_a_cpu_where_it_is_installed() -> None:
    assert choose_backend(EngineSettings(), resolve(MODEL), "cpu", TeacherSettings()) == "vllm"


def test_answers_come_from_the_documents_with_log_probabilities(teacher: Teacher) -> None:
    answers = given(answer_all(teacher, prompts()))
    assert "Fleming" in answers[0].text
    assert "1928" in answers[1].text
    for answer in answers:
        assert 0 < answer.answer_tokens <= 16
        found = answer.answer_logprobs
        assert found is not None
        assert len(found["tokens"]) == answer.answer_tokens
        assert all(
            len(row) == 3 and row == sorted(row, reverse=True) and row[0] <= 0
            for row in found["top_logprobs"]
        )


def test_longer_prompts_start_the_engine_again_and_leave_no_process(teacher: Teacher) -> None:
    before = set(multiprocessing.active_children())
    long = DOCUMENT + " It is a medicine against bacteria." * 60
    answers = answer_all(teacher, [*prompts(), *prompts(long)])
    assert not [answer for answer in answers if isinstance(answer, Rejection)]
    assert len(set(multiprocessing.active_children()) - before) <= 1
    assert len(multiprocessing.active_children()) == 1


def test_a_seed_repeats_a_sampled_answer(teacher: Teacher) -> None:
    """The last digits of log probabilities depend on what vLLM computes in the same step."""
    first, second = (given(answer_all(teacher, prompts(temperature=1.5))) for _ in range(2))
    assert [answer.text for answer in first] == [answer.text for answer in second]
    for one, other in zip(first, second, strict=True):
        assert one.answer_logprobs is not None and other.answer_logprobs is not None
        assert one.answer_logprobs["tokens"] == other.answer_logprobs["tokens"]
        rows = zip(one.answer_logprobs["top_logprobs"], other.answer_logprobs["top_logprobs"], strict=True)
        assert all(row == pytest.approx(again, abs=0.01) for row, again in rows)
    greedy = given(answer_all(teacher, prompts()))
    assert [answer.text for answer in first] != [answer.text for answer in greedy]


def test_many_long_prompts_are_sampled_with_seeds(teacher: Teacher) -> None:
    """More than are read in one step: in parts, they would end vLLM 0.32 on a CPU."""
    long = DOCUMENT + " It is a medicine against bacteria." * 60
    many = [prompt._replace(key=f"{n}") for n in range(8) for prompt in prompts(long, temperature=1.0)]
    assert not [answer for answer in answer_all(teacher, many) if isinstance(answer, Rejection)]


def test_an_engine_that_is_killed_is_an_error_and_no_run_waits_for_it() -> None:
    others = set(multiprocessing.active_children())
    generation = TeacherSettings(max_new_tokens=400)
    one = load_teacher(resolve(MODEL), "cpu", DTYPE, generation, EngineSettings(backend="vllm"))
    many = [answer_prompt(str(n), f"Write a long story about {n}.", [DOCUMENT], 1.0) for n in range(64)]
    answers = one.answers(many)
    next(answers)
    (core,) = set(multiprocessing.active_children()) - others
    timer = threading.Timer(0.5, lambda: os.kill(core.pid or 0, signal.SIGKILL))
    timer.start()
    with pytest.raises(ModelError, match="ended"):
        list(answers)
    one.close()  # type: ignore[attr-defined]


SCRIPT = """
import sys
from scaledown.data.teacher import generate_teacher_answers

if __name__ == "__main__":
    record = {"query": "Who discovered penicillin?", "documents": [sys.argv[1]]}
    options = {"max_new_tokens": 12, "backend": "vllm", "device": "cpu"}
    print(generate_teacher_answers([record] * 3, sys.argv[2], **options))
"""


def test_a_script_of_ones_own_gets_answers_from_spawned_processes(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, str(tmp_path / "own.py"), DOCUMENT, MODEL],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("Fleming") >= 3
    assert done.stdout.startswith("[{"), "standard output is for results"


def is_computing(pid: int) -> bool:
    """Whether a process has a vLLM worker that has worked for longer than it takes to start."""
    workers = [one for one in psutil.Process(pid).children(recursive=True) if one.name().startswith("VLLM")]
    return any(one.cpu_times().user > 20 for one in workers)  # seconds


def test_ctrl_c_ends_a_run_in_one_line_and_its_processes(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "scaledown", "prepare", "--preset", "demo", "--teacher_backend", "vllm"]
    words += ["--corpus_path", str(ROOT / "examples" / "corpus.jsonl")]
    words += ["--queries_file", str(ROOT / "examples" / "queries.txt"), "--max_new_tokens", "4000"]
    words += ["--temperature", "1.2", "--output_file", str(tmp_path / "data.json")]
    interruptible = "import signal, runpy, sys; signal.signal(signal.SIGINT, signal.default_int_handler)"
    code = f"{interruptible}; sys.argv = {words[2:]!r}; runpy.run_module('scaledown', run_name='__main__')"
    with subprocess.Popen(
        [sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        try:
            deadline = time.monotonic() + 600
            while not is_computing(process.pid) and time.monotonic() < deadline:
                assert process.poll() is None, process.stderr and process.stderr.read()
                time.sleep(0.2)
            children = psutil.Process(process.pid).children(recursive=True)
            assert children
            os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all of them
            assert process.stderr is not None
            printed = process.stderr.read()
            assert process.wait(60) == 130, printed[-2000:]
            assert "Traceback" not in printed
            _, alive = psutil.wait_procs(children, timeout=30)
            assert not alive
        finally:
            process.kill()
