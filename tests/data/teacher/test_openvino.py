"""The OpenVINO teacher: its scheduling on a stand-in for the library, its answers on the real one."""

import importlib.util
import json
import os
import re
import shutil
import string
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from enum import Enum
from itertools import islice
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from scaledown.cli import main
from scaledown.data.prompts import answer_prompt
from scaledown.data.teacher.base import EngineSettings, Rejection, Setup, TeacherSettings
from scaledown.data.teacher.engines import openvino as engine
from scaledown.data.teacher.engines.openvino import (
    OpenVINOTeacher,
    export_teacher,
    exported,
    is_exported,
    openvino_genai,
)
from scaledown.data.teacher.engines.transformers import TransformersTeacher
from scaledown.errors import MissingExtraError, ModelError, UsageError, install_command
from scaledown.models.sources import resolve
from scaledown.records import Answer

REAL = Path(os.environ.get("SCALEDOWN_CACHE") or Path.home() / ".cache" / "scaledown")
XQUAD = Path(__file__).resolve().parents[4] / "shared" / "data" / "xquad-dev"

STOP, REFUSED, FATAL, TOO_LONG, WRITES_ON = 1, "refused", "fatal", "toolong", "writeson"


class Status(Enum):
    RUNNING, FINISHED, IGNORED, CANCEL, STOP = range(5)


class Reason(Enum):
    NONE, STOP, LENGTH, TOOL_CALL = range(4)


class Handle:
    def __init__(self, text: str, settings: SimpleNamespace) -> None:
        self.text, self.settings = text, settings
        self.status, self.tokens = Status.RUNNING, 0

    def get_status(self) -> Status:
        return self.status

    def cancel(self) -> None:
        self.status = Status.CANCEL

    def read_all(self) -> list[SimpleNamespace]:
        ran_on = self.tokens == self.settings.max_new_tokens
        ids = [5] * self.tokens if ran_on else [*[5] * self.tokens, STOP]
        return [SimpleNamespace(generated_ids=ids, finish_reason=Reason.LENGTH if ran_on else Reason.STOP)]


class Pipeline:
    """Writes a token a step for each request; fails, refuses or gives up on prompts that say so."""

    made: list["Pipeline"]
    tokenizer: Any

    def __init__(
        self, models_path: str, scheduler_config: SimpleNamespace, device: str, properties: dict[str, Any]
    ) -> None:
        assert properties == {"DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
        assert (Path(models_path) / "openvino_model.xml").exists()
        assert device == "CPU"
        assert 0 < scheduler_config.cache_size < 64
        self.running: list[Handle] = []
        self.asked: list[str] = []
        self.most = 0
        self.numbers: set[int] = set()
        Pipeline.made.append(self)

    def add_request(
        self, request_id: int, input_ids: np.ndarray, generation_config: SimpleNamespace
    ) -> Handle:
        assert request_id not in self.numbers
        self.numbers.add(request_id)
        assert input_ids.dtype == np.int64
        assert input_ids.shape[0] == 1
        text = Pipeline.tokenizer.decode(input_ids[0])
        self.asked.append(text)
        if REFUSED in text:
            raise RuntimeError("Check failed\nat somewhere")
        handle = Handle(text, generation_config)
        self.running.append(handle)
        self.most = max(self.most, sum(one.status == Status.RUNNING for one in self.running))
        return handle

    def step(self) -> None:
        self.running = [handle for handle in self.running if handle.status == Status.RUNNING]
        assert self.running, "a step with nothing to do"
        if any(FATAL in handle.text for handle in self.running):
            raise RuntimeError("Exception from src/inference")
        full = any(TOO_LONG in handle.text for handle in self.running)
        for handle in self.running:
            handle.tokens += 1
            limit = handle.settings.max_new_tokens
            if full:
                handle.status = Status.IGNORED
            elif handle.tokens == (limit if WRITES_ON in handle.text else len(handle.text) % (limit - 1) + 1):
                handle.status = Status.FINISHED


@pytest.fixture
def library(monkeypatch, tmp_path, models) -> type[Pipeline]:
    """The stand-in, and an export of the tiny model in the cache."""
    fake, tensors = ModuleType("openvino_genai"), ModuleType("openvino")
    fake.__dict__.update(
        ContinuousBatchingPipeline=Pipeline,
        SchedulerConfig=SimpleNamespace,
        GenerationConfig=SimpleNamespace,
        GenerationStatus=Status,
        GenerationFinishReason=Reason,
    )
    tensors.__dict__["Tensor"] = np.asarray
    monkeypatch.setitem(sys.modules, "openvino_genai", fake)
    monkeypatch.setitem(sys.modules, "openvino", tensors)
    monkeypatch.setenv("SCALEDOWN_CACHE", str(tmp_path / "cache"))
    folder = exported(resolve(str(models["causal_lm"])))
    shutil.copytree(models["causal_lm"], folder)
    (folder / "openvino_model.xml").touch()
    monkeypatch.setattr(Pipeline, "made", [], raising=False)
    return Pipeline


@pytest.fixture
def teacher(library, models, monkeypatch) -> OpenVINOTeacher:
    one = OpenVINOTeacher(resolve(str(models["causal_lm"])), TeacherSettings(max_new_tokens=8))
    monkeypatch.setattr(library, "tokenizer", one._tokenizer, raising=False)
    return one


def prompts(*queries: str) -> list[Any]:
    return [answer_prompt(str(n), query, ["The tower is tall."], 0.0) for n, query in enumerate(queries)]


def test_answers_come_as_they_finish_with_their_finish_reason(teacher, library) -> None:
    given = dict(teacher.answers(prompts("Why?", f"How {WRITES_ON}?", "Who was it then?")))
    assert set(given) == {0, 1, 2}
    assert [given[place].finish_reason for place in range(3)] == ["stop", "length", "stop"]
    assert given[1].answer_tokens == 8
    assert all(answer.answer_tokens < 8 for place, answer in given.items() if place != 1)
    assert all(answer.prompt_tokens > 10 and not answer.dropped_tokens for answer in given.values())
    (pipeline,) = library.made
    assert pipeline.asked[0].endswith("assistant\n"), "the chat template's own generation prompt"


def test_known_answers_are_not_asked_again(teacher, library) -> None:
    given = dict(teacher.answers(prompts(*(f"Who {n}?" for n in range(10))), have={0, 3, 9}))
    assert set(given) == {1, 2, 4, 5, 6, 7, 8}
    assert not any("Who 3?" in text for text in library.made[0].asked)


def test_in_flight_is_bounded_and_nothing_is_asked_ahead(teacher, library, monkeypatch) -> None:
    monkeypatch.setattr(engine, "_IN_FLIGHT", 4)
    many = prompts(*(f"Who was number {n}?" for n in range(50)))
    assert len(list(islice(teacher.answers(many), 3))) == 3
    assert len(library.made[0].asked) < 20
    assert set(dict(teacher.answers(many))) == set(range(50))
    assert library.made[0].most == 4


def test_one_bad_prompt_does_not_end_the_others(teacher, library) -> None:
    asked = prompts("Why?", f"Is it {REFUSED}?", f"Is it {FATAL}?", "Who?", "why " * 5000)
    given = dict(teacher.answers(asked))
    assert {place for place, answer in given.items() if isinstance(answer, Answer)} == {0, 3}
    assert given[1] == Rejection("OpenVINO refused the prompt: Check failed")
    assert given[2] == Rejection("OpenVINO failed on the prompt: Exception from src/inference")
    assert "without documents" in given[4].reason
    assert len(library.made) == 3, "once after the failure, once after it came again"


def test_a_prompt_that_fills_the_cache_takes_no_other_with_it(teacher) -> None:
    given = dict(teacher.answers(prompts("Why?", f"Is it {TOO_LONG}?", "Who?")))
    assert isinstance(given[0], Answer)
    assert isinstance(given[2], Answer)
    assert "--teacher_document_tokens" in given[1].reason


def test_caller_that_stops_early_leaves_nothing_behind(teacher, library) -> None:
    answers = teacher.answers(prompts(*(f"Who was number {n}?" for n in range(9))))
    next(answers)
    answers.close()
    assert all(handle.status != Status.RUNNING for handle in library.made[0].running)
    assert len(dict(teacher.answers(prompts("Why?")))) == 1


def test_decoding_is_greedy_or_seeded_by_prompt(teacher, monkeypatch) -> None:
    seen = []
    monkeypatch.setattr(
        teacher._library,
        "GenerationConfig",
        lambda **settings: seen.append(settings) or SimpleNamespace(**settings),
    )
    warm = [answer_prompt(key, "Who?", ["It."], 0.7) for key in "ab"]
    list(teacher.answers([*prompts("Why?"), *warm]))
    assert seen[0]["stop_token_ids"] == {STOP}
    assert not seen[0]["do_sample"]
    assert "temperature" not in seen[0]
    assert seen[1]["do_sample"]
    assert seen[1]["temperature"] == 0.7
    assert seen[1]["rng_seed"] != seen[2]["rng_seed"]


def test_without_the_library_the_error_names_the_extra(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino_genai", None)
    with pytest.raises(MissingExtraError, match=re.escape(install_command("openvino"))):
        openvino_genai()


def test_other_weights_are_another_export(models, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("SCALEDOWN_CACHE", str(tmp_path))
    shutil.copytree(models["causal_lm"], tmp_path / "model")
    source = resolve(str(tmp_path / "model"))
    first = exported(source)
    assert first == exported(resolve(f"{tmp_path}/model/"))
    assert first.parent == tmp_path / "openvino"
    assert not is_exported(source)
    os.utime(tmp_path / "model" / "model.safetensors", (1, 1))
    assert exported(source) != first
    hub = [source._replace(name="org/model", location="org/model", revision=revision) for revision in "ab"]
    assert exported(hub[0]) != exported(hub[1])


def test_an_export_that_is_there_is_only_named(library, models, capsys) -> None:
    assert main(["export-openvino", str(models["causal_lm"])]) == 0
    output = capsys.readouterr().out
    assert "already exists" in output
    assert "next: scaledown prepare --teacher_backend openvino" in output
    assert main(["export-openvino"]) == 2
    assert "--help" in capsys.readouterr().err


needs_openvino = pytest.mark.skipif(
    not importlib.util.find_spec("openvino_genai"), reason="needs the extra openvino"
)


@needs_openvino
def test_first_use_exports_once(models, tmp_path, monkeypatch, caplog) -> None:
    monkeypatch.setenv("SCALEDOWN_CACHE", str(tmp_path))
    caplog.set_level("INFO")
    source, generation = resolve(str(models["causal_lm"])), TeacherSettings(max_new_tokens=5)
    asked = [answer_prompt(str(n), "Why?", ["It is."], 0.0) for n in range(3)]
    for _ in range(2):
        given = [answer for _, answer in OpenVINOTeacher(source, generation).answers(asked)]
        assert [type(answer) for answer in given] == [Answer] * 3
    assert caplog.text.count("is exported once for OpenVINO") == 1
    weights = sum(file.stat().st_size for file in models["causal_lm"].glob("*.safetensors"))
    assert (exported(source) / "openvino_model.bin").stat().st_size < weights / 2


@needs_openvino
def test_interrupted_export_is_made_again_by_one_of_two(models, tmp_path, monkeypatch, caplog) -> None:
    monkeypatch.setenv("SCALEDOWN_CACHE", str(tmp_path))
    caplog.set_level("INFO")
    source = resolve(str(models["causal_lm"]))

    def half(model: Any, file: Path, **_: Any) -> None:
        file.write_text("<half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("scaledown.models.openvino.write_graph", half)
        with pytest.raises(KeyboardInterrupt):
            export_teacher(source)
    assert not is_exported(source)
    caplog.clear()
    with ThreadPoolExecutor(2) as both:
        first, second = both.map(export_teacher, [source, source])
    assert first == second == exported(source)
    assert caplog.text.count("is exported once") == 1
    assert not [*first.parent.glob("*.tmp")]
    assert OpenVINOTeacher(source, TeacherSettings(max_new_tokens=2))


@needs_openvino
def test_export_that_the_engine_cannot_run_is_not_kept(models, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("SCALEDOWN_CACHE", str(tmp_path))
    source = resolve(str(models["causal_lm"]))

    def refused(*_: object) -> None:
        raise RuntimeError("no paged attention\nat somewhere")

    monkeypatch.setattr(engine, "_pipeline", refused)
    with pytest.raises(ModelError, match=r"cannot run it \(no paged attention\): use --teacher_"):
        export_teacher(source)
    assert not is_exported(source)


@needs_openvino
def test_other_devices_than_a_cpu_are_refused(models) -> None:
    setup = Setup(
        resolve(str(models["causal_lm"])), "cuda", TeacherSettings(), EngineSettings(backend="openvino")
    )
    with pytest.raises(UsageError, match="runs on a CPU only"):
        engine.ENGINE.preflight(setup)


@needs_openvino
def test_teacher_that_reads_a_window_is_refused_before_any_work(models, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("SCALEDOWN_CACHE", str(tmp_path))
    model = tmp_path / "model"
    shutil.copytree(models["causal_lm"], model)
    config = json.loads((model / "config.json").read_text())
    changed = {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 4}
    (model / "config.json").write_text(json.dumps(config | changed))
    setup = Setup(resolve(str(model)), "cpu", TeacherSettings(), EngineSettings(backend="openvino"))
    with pytest.raises(ModelError, match="does not keep all positions.*use --teacher_backend transformers"):
        engine.ENGINE.preflight(setup)


@needs_openvino
@pytest.mark.slow
def test_engine_that_is_stopped_early_prints_nothing(models, tmp_path, monkeypatch, capfd) -> None:
    """It said `[ERROR] BlockManager leaked sequence block tables` after Ctrl-C."""
    monkeypatch.setenv("SCALEDOWN_CACHE", str(tmp_path))
    teacher = OpenVINOTeacher(resolve(str(models["causal_lm"])), TeacherSettings(max_new_tokens=40))
    asked = [answer_prompt(str(n), f"Who is {n}?", ["She wrote it. " * n], 0.0) for n in range(12)]
    answers = teacher.answers(asked)
    assert next(answers)
    answers.close()
    del answers, teacher
    assert not re.findall("leaked.*", "".join(capfd.readouterr()))


def normalised(text: str) -> str:
    return " ".join(text.lower().translate(str.maketrans("", "", string.punctuation)).split())


GONE = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
from scaledown.data.teacher import generate_teacher_answers
records = [{"query": "Who?", "documents": ["I."]}]
generate_teacher_answers(records, "bundled:smollm2-135m", max_new_tokens=2, backend="openvino")
try:
    signal.raise_signal(signal.SIGINT)
except KeyboardInterrupt:
    print("interrupted")
"""


@needs_openvino
@pytest.mark.slow
def test_a_signal_after_the_engine_is_gone() -> None:
    """OpenVINO GenAI 2026.4 left a stack for signals that it had freed: Ctrl-C was a segmentation fault."""
    words, where = [sys.executable, "-c", GONE], os.environ | {"SCALEDOWN_CACHE": str(REAL)}
    done = subprocess.run(words, env=where, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "interrupted\n"), done.stderr


@needs_openvino
@pytest.mark.slow
def test_answers_agree_with_those_of_transformers(monkeypatch) -> None:
    """Real weights at 8 bits against float32: answers mostly equal, and no fewer of them right.

    Of paragraphs that are short, which are read sooner. States are float32 on both sides: by default
    OpenVINO's are bfloat16 on some processors.
    """
    monkeypatch.setattr(engine, "WHOLE_STATES", {**engine.WHOLE_STATES, "INFERENCE_PRECISION_HINT": "f32"})
    if not XQUAD.exists():
        pytest.skip("needs the questions of shared/data")
    monkeypatch.setenv("SCALEDOWN_CACHE", str(REAL))
    source = resolve("bundled:smollm2-135m")
    articles = {
        article["wikipedia_id"]: article["text"]
        for article in map(json.loads, (XQUAD / "kilt.jsonl").read_text(encoding="utf-8").splitlines())
    }
    lines = (XQUAD / "questions.jsonl").read_text(encoding="utf-8").splitlines()
    every = [(one, articles[one["wikipedia_id"]][one["paragraph"]]) for one in map(json.loads, lines)]
    short = [(one, paragraph) for one, paragraph in every if len(paragraph) < 400]
    chosen = short[:: len(short) // 8][:8]
    questions = [one for one, _ in chosen]
    asked = [answer_prompt(one["id"], one["question"], [paragraph], 0.0) for one, paragraph in chosen]
    generation = TeacherSettings(max_new_tokens=24, batch_size=8)
    texts = [
        [normalised(answer.text) for _, answer in sorted(one.answers(asked))]
        for one in (
            OpenVINOTeacher(source, generation),
            TransformersTeacher(source, "cpu", "float32", generation),
        )
    ]
    equal = sum(ours == theirs for ours, theirs in zip(*texts, strict=True))
    right = [
        sum(normalised(one["answers"][0]) in text for one, text in zip(questions, given, strict=True))
        for given in texts
    ]
    assert equal >= 3
    assert right[0] >= right[1] - 1
