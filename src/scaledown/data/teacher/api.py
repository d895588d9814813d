"""The teacher: prompts in, answers out. Engines live in `teachers/`."""

import importlib.util
import logging
from collections.abc import Sequence
from typing import Final

from scaledown.config.prepare import PrepareConfig
from scaledown.data.prompts import answer_prompt, load_template
from scaledown.data.teacher.base import Engine, Generation, Rejection, Teacher, answer_all
from scaledown.data.teacher.engines.openvino import EXPORT, is_exported, openvino_genai
from scaledown.data.teacher.engines.vllm import check_vllm
from scaledown.errors import MissingExtraError, ModelError, UsageError, install_command
from scaledown.gpus import OnDevice
from scaledown.models import ModelSource, choose_device, hub_errors, read_config_file, resolve
from scaledown.records import Example, QueryWithDocuments, check_records, document_text
from scaledown.run.progress import track

log = logging.getLogger("scaledown")

_AGAIN_TEMPERATURE: Final = 0.7
_WRITERS: Final = ("ForCausalLM", "LMHeadModel", "ModelWithLMHead", "ForConditionalGeneration")


def check_teacher(source: ModelSource, *, load_in_8bit: bool, load_in_4bit: bool) -> None:
    """Find out before any work, without loading it, whether a model can answer.

    Raises `ModelError` for one that does not write, `MissingExtraError` for bits that need one.
    """
    if load_in_8bit or load_in_4bit:
        flag = "--teacher_8bit" if load_in_8bit else "--teacher_4bit"
        if importlib.util.find_spec("bitsandbytes") is None:
            raise MissingExtraError(f"{flag} needs bitsandbytes: {install_command('quantization')}")
    if source.gguf_file or not source.location:
        return
    with hub_errors(source.name):
        config = read_config_file(source, "config.json") or {}
    kinds = config.get("architectures") or ["LMHeadModel"]  # who does not say may be one
    if config.get("is_encoder_decoder") or not any(kind.endswith(_WRITERS) for kind in kinds):
        raise ModelError(
            f"--teacher_model {source.name} is {kinds[0]}: a teacher is a causal LM (...ForCausalLM), "
            f"such as {PrepareConfig.teacher_model}"
        )


def find_teacher(name: str, engine: Engine) -> ModelSource:
    """The teacher's weights; behind a server only its name."""
    return ModelSource(name, "") if engine.endpoints else resolve(name)


def choose_backend(engine: Engine, source: ModelSource, device: str, generation: Generation) -> str:
    """`auto` becomes the fastest engine that is installed for `device` and can load the teacher.

    Raises `MissingExtraError` or `UsageError` for an engine that was named and cannot.
    """
    bits = generation.load_in_8bit or generation.load_in_4bit
    if bits and engine.backend not in {"auto", "transformers"}:
        raise UsageError(
            "--teacher_8bit and --teacher_4bit are for transformers: with --teacher_backend "
            f"{engine.backend} name a quantised checkpoint"
        )
    if engine.lora and engine.backend not in {"auto", "vllm"}:
        raise UsageError(
            f"--teacher_lora is for vllm: with --teacher_backend {engine.backend} merge it first"
        )
    if engine.backend == "vllm" or engine.lora:
        check_vllm()
        return "vllm"
    if engine.backend == "openvino":
        openvino_genai()
        if not is_exported(source):
            raise ModelError(f"{source.name} is not exported for OpenVINO: run {EXPORT} {source.name} once")
    if engine.backend != "auto":
        return engine.backend
    if engine.endpoints:
        return "endpoint"
    if device.startswith("cuda") and not bits and importlib.util.find_spec("vllm"):
        return "vllm"
    beyond_openvino = bits or generation.logprobs
    if device == "cpu" and not beyond_openvino and importlib.util.find_spec("openvino_genai"):
        if is_exported(source):
            return "openvino"
        log.info("OpenVINO would be faster: run %s %s once", EXPORT, source.name)
    return "transformers"


def load_teacher(  # noqa: PLR0917
    source: ModelSource,
    device: str,
    dtype: str,
    generation: Generation,
    engine: Engine = Engine(),  # noqa: B008 (never changed)
    spent_tokens: int = 0,
) -> Teacher:
    """The teacher behind `--teacher_model`, on the engine that `choose_backend` gives.

    `spent_tokens` is what an earlier run of the same settings took from `--max_total_tokens`.
    """
    backend = choose_backend(engine, source, device, generation)
    if backend == "endpoint":
        from scaledown.data.teacher.engines.endpoint import EndpointTeacher

        log.info("teacher: %s at %s", source.name, ", ".join(engine.endpoints))
        return EndpointTeacher(
            source.name,
            engine.endpoints,
            generation,
            max_total_tokens=engine.max_total_tokens,
            max_requests_per_minute=engine.max_requests_per_minute,
            request_timeout=engine.request_timeout,
            spent_tokens=spent_tokens,
        )
    check_teacher(source, load_in_8bit=generation.load_in_8bit, load_in_4bit=generation.load_in_4bit)
    bits = " in 8 bits" if generation.load_in_8bit else " in 4 bits" if generation.load_in_4bit else ""
    log.info("teacher: %s%s, %s on %s", source.name, bits, backend, device)
    if backend == "vllm":
        from scaledown.data.teacher.engines.vllm import VllmTeacher

        return VllmTeacher(
            source,
            device,
            dtype,
            generation,
            lora=engine.lora,
            tensor_parallel=engine.tensor_parallel,
            memory=engine.memory,
        )
    if backend == "openvino":
        from scaledown.data.teacher.engines.openvino import OpenVINOTeacher

        return OpenVINOTeacher(source, generation)
    from scaledown.data.teacher.engines.transformers import TransformersTeacher

    return TransformersTeacher(source, device, dtype, generation)


def generate_teacher_answers(
    queries_with_docs: Sequence[QueryWithDocuments],
    teacher_model: str = PrepareConfig.teacher_model,
    *,
    max_new_tokens: int = PrepareConfig.max_new_tokens,
    temperature: float = 0.0,
    seed: int = 0,
    batch_size: int = PrepareConfig.teacher_batch_size,
    load_in_8bit: bool = False,
    load_in_4bit: bool = False,
    device: str = "auto",
    dtype: str = "auto",
    backend: str = "auto",
    endpoints: Sequence[str] = (),
    prompt: str = "paper",
) -> list[Example]:
    """Training records for queries whose documents are known; `json.dump` writes them as they are.

    Documents are strings or `{"title", "text"}` and come back as strings; `reranking_scores` are kept.
    A record that cannot be asked (its question alone exceeds the teacher's context) or whose answer is
    empty is left out, and a warning names it. `backend`, `endpoints` and `prompt` are as the flags
    `--teacher_backend`, `--teacher_endpoint` and `--prompt`.
    """
    if batch_size < 0 or max_new_tokens < 1:
        raise UsageError("batch_size must not be negative, max_new_tokens at least 1")
    queries_with_docs = list(queries_with_docs)
    check_records(queries_with_docs)
    generation = Generation(max_new_tokens, seed, batch_size, load_in_8bit, load_in_4bit)
    engine = Engine(backend, tuple(endpoints))
    source = find_teacher(teacher_model, engine)
    device = choose_device(device)
    teacher = OnDevice("the teacher", device, lambda: load_teacher(source, device, dtype, generation, engine))
    template = load_template(prompt)
    texts = [[document_text(document) for document in record["documents"]] for record in queries_with_docs]
    prompts = [
        answer_prompt(str(number), record["query"], documents, temperature, template)
        for number, (record, documents) in enumerate(zip(queries_with_docs, texts, strict=True))
    ]
    with track("teach", "answers", len(prompts)) as tracker:
        answers = answer_all(teacher(), prompts, tracker.advance)
    teacher.release()
    examples: list[Example] = []
    for record, documents, answer in zip(queries_with_docs, texts, answers, strict=True):
        if isinstance(answer, Rejection) or not answer.text:
            reason = answer.reason if isinstance(answer, Rejection) else "the teacher's answer is empty"
            log.warning("left out %r: %s", record["query"][:80], reason)
            continue
        example: Example = {"query": record["query"], "documents": documents, "answer": answer.text}
        if "reranking_scores" in record:
            example["reranking_scores"] = record["reranking_scores"]
        examples.append(example)
    return examples
