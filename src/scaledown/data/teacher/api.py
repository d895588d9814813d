"""The teacher: answers prompts, by one of the engines in `TEACHER_ENGINES`."""

import importlib.util
import logging
from collections.abc import Sequence
from typing import Final

from scaledown.config.prepare import PrepareConfig
from scaledown.config.shared import AUTO
from scaledown.data.prompts import answer_prompt, load_template
from scaledown.data.teacher.base import (
    EngineSettings,
    Rejection,
    Setup,
    Teacher,
    TeacherEngine,
    TeacherSettings,
    answer_all,
)
from scaledown.devices.choice import choose_device
from scaledown.devices.gpus import OnDevice
from scaledown.errors import MissingExtraError, ModelError, UsageError, install_command
from scaledown.extensions import TEACHER_ENGINES
from scaledown.models.hub import hub_errors
from scaledown.models.sources import ModelSource, resolve
from scaledown.models.weights import read_config_file
from scaledown.records import Example, QueryWithDocuments, check_records, document_text
from scaledown.run.progress import track

log = logging.getLogger("scaledown")

_WRITERS: Final = ("ForCausalLM", "LMHeadModel", "ModelWithLMHead", "ForConditionalGeneration")


def check_teacher(source: ModelSource, *, load_in_8bit: bool, load_in_4bit: bool) -> None:
    """Check before any work, without loading it, that a model can write answers.

    Args:
        source: The model; without a location, as on a server, it is not checked.
        load_in_8bit: Whether it is loaded with weights in 8 bits.
        load_in_4bit: Whether it is loaded with weights in 4 bits.

    Raises:
        ModelError: The model is not a causal LM.
        MissingExtraError: Weights in 8 or 4 bits need an extra that is not installed.
    """
    if load_in_8bit or load_in_4bit:
        flag = "--teacher_8bit" if load_in_8bit else "--teacher_4bit"
        if importlib.util.find_spec("bitsandbytes") is None:
            raise MissingExtraError(f"{flag} needs bitsandbytes: {install_command('quantization')}")
    if source.gguf_file or not source.location:
        return
    with hub_errors(source.name):
        config = read_config_file(source, "config.json") or {}
    kinds = config.get("architectures") or ["LMHeadModel"]  # without this entry it may be a causal LM
    if config.get("is_encoder_decoder") or not any(kind.endswith(_WRITERS) for kind in kinds):
        raise ModelError(
            f"--teacher_model {source.name} is {kinds[0]}: a teacher is a causal LM (...ForCausalLM), "
            f"such as {PrepareConfig.teacher_model}"
        )


def engine_of(backend: str) -> TeacherEngine:
    """Return an engine.

    Args:
        backend: The value of `--teacher_backend`, but not `auto`.

    Raises:
        UsageError: There is no such engine, or it cannot be imported.
    """
    if backend not in TEACHER_ENGINES:
        raise UsageError(f"--teacher_backend {backend}: use auto, {', '.join(TEACHER_ENGINES)}")
    engine: TeacherEngine = TEACHER_ENGINES[backend]
    return engine


def is_served(engine: EngineSettings) -> bool:
    """Whether the teacher is behind a server."""
    return bool(engine.endpoints) if engine.backend == AUTO else engine_of(engine.backend).served


def find_teacher(name: str, engine: EngineSettings) -> ModelSource:
    """Find the teacher's weights; for a server only its name.

    Args:
        name: The value of `--teacher_model`.
        engine: The choice of the engine.

    Raises:
        ModelError: There is no such model.
        UsageError: There is no such engine.
    """
    return ModelSource(name, "") if is_served(engine) else resolve(name)


def check_options(engine: EngineSettings, generation: TeacherSettings) -> None:
    """Check that an engine supports the settings.

    Args:
        engine: The choice of the engine. For `auto`, one engine must support all settings.
        generation: How the teacher decodes.

    Raises:
        UsageError: The engine does not support them.
    """
    if engine.backend == AUTO and not _able(engine, generation):
        raise UsageError(
            "no --teacher_backend has all that is asked of --teacher_endpoint, --teacher_lora, "
            "--teacher_logprobs, --teacher_8bit and --teacher_4bit: leave some out"
        )
    if engine.backend == AUTO:
        return
    own, backend = engine_of(engine.backend), f"--teacher_backend {engine.backend}"
    if engine.endpoints and not own.served:
        raise UsageError(f"--teacher_endpoint and {backend} exclude each other")
    if generation.bits and not own.has_bits:
        instead = "a server loads its model itself" if own.served else "name a quantised checkpoint"
        raise UsageError(f"--teacher_8bit and --teacher_4bit: {backend} has neither: {instead}")
    if engine.lora and not own.has_lora:
        raise UsageError(f"--teacher_lora: {backend} has none: merge it into the model first")
    if generation.logprobs and not own.has_logprobs:
        others = ", ".join(name for name in TEACHER_ENGINES if engine_of(name).has_logprobs)
        raise UsageError(f"--teacher_logprobs: {backend} gives none: use one of {others}")


def _able(engine: EngineSettings, generation: TeacherSettings) -> dict[str, TeacherEngine]:
    """Return the engines that support the settings, by name."""
    engines = {name: engine_of(name) for name in TEACHER_ENGINES}
    return {
        name: own
        for name, own in engines.items()
        if own.served >= bool(engine.endpoints)
        and own.has_bits >= bool(generation.bits)
        and own.has_lora >= bool(engine.lora)
        and own.has_logprobs >= bool(generation.logprobs)
    }


def choose_backend(
    engine: EngineSettings, source: ModelSource, device: str, generation: TeacherSettings
) -> str:
    """Choose the engine. `auto` chooses the last one that supports the settings and suits the device.

    Args:
        engine: The choice of the engine.
        source: The teacher's weights.
        device: cpu, cuda, cuda:N or mps.
        generation: How the teacher decodes.

    Returns:
        The name of an entry of `TEACHER_ENGINES`.

    Raises:
        UsageError: The named engine does not support the settings; for `auto`, none does.
    """
    check_options(engine, generation)
    if engine.backend != AUTO:
        return engine.backend
    able, setup = _able(engine, generation), Setup(source, device, generation, engine)
    suited = (name for name, own in reversed(able.items()) if own.suits(setup))
    return next(suited, [*able][-1])  # if none suits, the check of the last says why


def preflight(engine: EngineSettings, source: ModelSource, device: str, generation: TeacherSettings) -> None:
    """Check before any work that the engine can load the teacher here.

    Args:
        engine: The choice of the engine, not `auto`.
        source: The teacher's weights.
        device: cpu, cuda, cuda:N or mps.
        generation: How the teacher decodes.

    Raises:
        ScaleDownError: It cannot, for example because a library is missing or a server does not answer.
    """
    engine_of(engine.backend).preflight(Setup(source, device, generation, engine))


def load_teacher(  # noqa: PLR0917
    source: ModelSource,
    device: str,
    dtype: str,
    generation: TeacherSettings,
    engine: EngineSettings = EngineSettings(),  # noqa: B008 (never changed)
    spent_tokens: int = 0,
) -> Teacher:
    """Load the teacher of `--teacher_model`, on the engine that `choose_backend` returns.

    Args:
        source: The teacher's weights.
        device: cpu, cuda, cuda:N or mps.
        dtype: auto, float32, bfloat16 or float16.
        generation: How it decodes.
        engine: The choice of the engine.
        spent_tokens: Tokens of `--max_total_tokens` that earlier runs with the same settings used.

    Raises:
        UsageError: The engine does not support the settings.
        ModelError: The model cannot be loaded, or is not a causal LM.
        MissingExtraError: The engine or the quantisation needs an extra that is not installed.
    """
    backend = choose_backend(engine, source, device, generation)
    own = engine_of(backend)
    if own.served:
        log.info("teacher: %s", ", ".join([source.name, backend, *engine.endpoints]))
    else:
        check_teacher(source, load_in_8bit=generation.load_in_8bit, load_in_4bit=generation.load_in_4bit)
        bits = f" in {generation.bits} bits" if generation.bits else ""
        log.info("teacher: %s%s, %s on %s", source.name, bits, backend, device)
    return own.load(Setup(source, device, generation, engine, dtype, spent_tokens))


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
    """Answer queries whose documents are known.

    Args:
        queries_with_docs: Records with `query` and `documents`, which are strings or `{"title", "text"}`;
            `reranking_scores` are kept.
        teacher_model: A name on the hub, a folder, a .gguf file or `bundled:NAME`.
        max_new_tokens: The most tokens of an answer.
        temperature: 0 is greedy decoding; otherwise answers are drawn by `seed`.
        seed: Seed of the drawing.
        batch_size: Prompts at a time; 0 is the default of the device.
        load_in_8bit: Keep weights in 8 bits (extra quantization).
        load_in_4bit: Keep weights in 4 bits (extra quantization).
        device: `auto`, `cpu`, `cuda` or `mps`.
        dtype: `auto`, `float32`, `bfloat16` or `float16`.
        backend: The engine, as `--teacher_backend`.
        endpoints: Addresses of OpenAI-compatible servers, as `--teacher_endpoint`.
        prompt: As `--prompt`.

    Returns:
        Training records, which `json.dump` can write, with documents as strings. A record that cannot be
        asked (its question alone exceeds the teacher's context) or whose answer is empty is left out, and a
        warning names it.

    Raises:
        UsageError: A setting is out of bounds, or the engine does not support it.
        InputError: A record is not sound.
        ModelError: The teacher cannot be loaded.
    """
    if batch_size < 0 or max_new_tokens < 1:
        raise UsageError("batch_size must not be negative, max_new_tokens at least 1")
    queries_with_docs = list(queries_with_docs)
    check_records(queries_with_docs)
    generation = TeacherSettings(max_new_tokens, seed, batch_size, load_in_8bit, load_in_4bit)
    engine = EngineSettings(backend, tuple(endpoints))
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
