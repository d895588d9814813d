"""The engine OpenVINO GenAI: continuous batching on a CPU, with 8-bit weights that are exported once."""

import contextlib
import importlib.util
import itertools
import logging
import sys
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np

from scaledown.data.prompts import Prompt
from scaledown.data.teacher.base import Rejection, Setup, TeacherEngine, TeacherSettings, seed_of
from scaledown.data.teacher.context import Context, context_tokens
from scaledown.data.teacher.reply import heard
from scaledown.devices.halving import Halving
from scaledown.devices.openvino import GRAPH, WHOLE_STATES, SignalStack, openvino, same_signal_stack
from scaledown.errors import MissingExtraError, ModelError, UsageError, install_command
from scaledown.models.hub import hub_errors
from scaledown.models.sources import ModelSource, kept_folder, written_once
from scaledown.models.weights import loadable, loading, quiet_libraries
from scaledown.records import Answer

log = logging.getLogger("scaledown")

_IN_FLIGHT: Final = 64  # requests in the engine: enough to keep it busy, with bounded memory
_CACHE_GB: Final = 4  # of keys and values; requests that do not fit wait
_TOKENS_A_STEP: Final = 1024


def openvino_genai() -> Any:
    """Import the library. Raises `MissingExtraError` if it is not installed."""
    openvino("--teacher_backend openvino")
    try:
        import openvino_genai as library
    except ImportError as error:
        raise MissingExtraError(
            f"--teacher_backend openvino needs OpenVINO GenAI: {install_command('openvino')}"
        ) from error
    return library


def exported(source: ModelSource) -> Path:
    """Return the path in the cache for the export of exactly these weights, even if it does not exist."""
    return kept_folder("openvino", source, "8 bits", GRAPH)


def is_exported(source: ModelSource) -> bool:
    """Whether the export exists; it appears only when it is complete."""
    return (exported(source) / "openvino_model.xml").exists()


def export_teacher(source: ModelSource) -> Path:
    """Return the folder of the exported model, with weights at 8 bits; the first call makes it.

    Args:
        source: The model.

    Raises:
        MissingExtraError: OpenVINO is not installed.
        ModelError: The model cannot be loaded, or OpenVINO cannot compute it.
    """
    folder = exported(source)
    if is_exported(source):
        return folder
    openvino_genai()
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from scaledown.models.openvino import write_graph

    def write(temporary: Path) -> None:
        log.info("model %s is exported once for OpenVINO: %s", source.name, folder)
        name, pinned = loadable(source)
        with loading(source):
            model = AutoModelForCausalLM.from_pretrained(
                name, **pinned, dtype=torch.float32, attn_implementation="sdpa"
            )
            tokenizer = AutoTokenizer.from_pretrained(name, **pinned)
        for part in (model.config, model.generation_config, tokenizer):
            part.save_pretrained(temporary)
        write_graph(model, temporary / "openvino_model.xml", reads="ids", eight_bits=True)
        del model
        _try(source, temporary)

    return written_once(folder, source, write)


def _try(source: ModelSource, folder: Path) -> None:
    """Raise `ModelError` unless OpenVINO GenAI, which changes the graph, writes two tokens with it."""
    from openvino import Tensor

    library, signals = openvino_genai(), SignalStack()
    signals.exchange()
    try:
        pipeline = _pipeline(library, folder)
        handle = pipeline.add_request(
            0, Tensor(np.array([[0, 1, 2]])), library.GenerationConfig(max_new_tokens=2, ignore_eos=True)
        )
        while handle.get_status() == library.GenerationStatus.RUNNING:
            pipeline.step()
        handle.read_all()
        del handle, pipeline
    except (RuntimeError, IndexError) as error:
        raise ModelError(
            f"model {source.name}: OpenVINO GenAI cannot run it ({_first_line(error)}): use "
            "--teacher_backend transformers"
        ) from error
    finally:
        SignalStack().exchange(signals)


def _pipeline(library: Any, folder: Path) -> Any:
    """Load an exported model."""
    scheduler = library.SchedulerConfig()
    scheduler.cache_size = _CACHE_GB
    scheduler.dynamic_split_fuse = True
    scheduler.enable_prefix_caching = True
    scheduler.max_num_batched_tokens = _TOKENS_A_STEP
    scheduler.max_num_seqs = _IN_FLIGHT
    with same_signal_stack():
        return library.ContinuousBatchingPipeline(str(folder), scheduler, "CPU", WHOLE_STATES)


class _RunningPrompt(NamedTuple):
    """A prompt that the engine works on."""

    place: int
    handle: Any
    prompt_tokens: int
    dropped: int


class OpenVINOTeacher:
    """A causal LM in OpenVINO's engine, which schedules prompts itself.

    Args:
        source: The model. It is exported to the cache once, see `export_teacher`.
        generation: How it decodes.

    Raises:
        MissingExtraError: OpenVINO GenAI is not installed.
        ModelError: The model cannot be loaded, or OpenVINO cannot run it.
    """

    def __init__(self, source: ModelSource, generation: TeacherSettings) -> None:
        library = openvino_genai()
        folder = export_teacher(source)
        from transformers import AutoConfig, AutoTokenizer

        quiet_libraries()
        self._library, self._folder, self._generation = library, folder, generation
        with hub_errors(source.name):
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
            self._tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
            self._stops = _stops(folder, config, self._tokenizer)
            self._signals = SignalStack()
            self._signals.exchange()
            self._pipeline = _pipeline(self._library, self._folder)
        self._context = Context(
            source.name, self._tokenizer, context_tokens(config, self._tokenizer), generation
        )
        self._numbers = itertools.count()
        self.halving = Halving("--teacher_batch_size")

    def __del__(self) -> None:
        if hasattr(self, "_pipeline") and not sys.is_finalizing():
            self._unload()

    def answers(
        self, prompts: Sequence[Prompt], have: Collection[int] = ()
    ) -> Iterator[tuple[int, Answer | Rejection]]:
        """Yield answers as they finish.

        A prompt that the engine fails on is a `Rejection`; others continue.

        Args:
            prompts: The prompts.
            have: Places that are answered already; they are not answered again.

        Yields:
            A place in `prompts` with its answer or rejection.
        """
        waiting = iter([place for place in range(len(prompts)) if place not in have])
        asked: list[_RunningPrompt] = []
        again: list[int] = []  # prompts that ran when the engine failed: one of them may be the cause
        try:
            while True:
                while len(asked) < _IN_FLIGHT and not again and (place := next(waiting, None)) is not None:
                    request = self._ask(place, prompts[place])
                    if isinstance(request, Rejection):
                        yield place, request
                    else:
                        asked.append(request)
                if not asked and not again:
                    return
                if not asked:
                    place = again.pop(0)
                    yield place, self._alone(place, prompts[place])
                    continue
                try:
                    self._pipeline.step()
                except (RuntimeError, MemoryError) as error:
                    log.warning("OpenVINO failed on one of %s prompts: %s", len(asked), _first_line(error))
                    again += [one.place for one in asked]
                    asked = []
                    self._restart()
                done = [one for one in asked if not self._is_running(one)]
                asked = [one for one in asked if self._is_running(one)]
                for one in done:
                    if self._is_finished(one):
                        yield one.place, self._answer(one)
                    else:  # the cache was full
                        again.append(one.place)
        finally:
            self._cancel(asked)  # if the caller has stopped early

    def _cancel(self, asked: Sequence[_RunningPrompt]) -> None:
        for one in asked:
            one.handle.cancel()
        if asked and not sys.is_finalizing():
            # The engine notices it in a step; otherwise it prints that it has lost memory.
            with contextlib.suppress(RuntimeError, MemoryError):
                self._pipeline.step()

    def _alone(self, place: int, prompt: Prompt) -> Answer | Rejection:
        """Answer a prompt while no other one is running."""
        asked = self._ask(place, prompt)
        if isinstance(asked, Rejection):
            return asked
        try:
            while self._is_running(asked):
                self._pipeline.step()
        except (RuntimeError, MemoryError) as error:
            self._restart()
            return Rejection(f"OpenVINO failed on the prompt: {_first_line(error)}")
        if self._is_finished(asked):
            return self._answer(asked)
        return Rejection(
            f"the prompt has {asked.prompt_tokens:,} tokens, more than OpenVINO's cache of {_CACHE_GB} GB "
            "holds: lower --teacher_document_tokens or use --teacher_backend transformers"
        )

    def _is_running(self, asked: _RunningPrompt) -> bool:
        return bool(asked.handle.get_status() == self._library.GenerationStatus.RUNNING)

    def _is_finished(self, asked: _RunningPrompt) -> bool:
        return bool(asked.handle.get_status() == self._library.GenerationStatus.FINISHED)

    def _restart(self) -> None:
        """Create a new engine, since the state of a failed engine is not known."""
        self._unload()  # first, for its memory
        self._pipeline = _pipeline(self._library, self._folder)

    def _unload(self) -> None:
        del self._pipeline
        # When the engine ends, it frees the stack on which this thread handles signals: Ctrl-C would crash.
        SignalStack().exchange(self._signals)

    def _ask(self, place: int, prompt: Prompt) -> _RunningPrompt | Rejection:
        from openvino import Tensor

        fitted = self._context.fit(prompt)
        if isinstance(fitted, Rejection):
            return fitted
        ids, dropped = fitted
        settings: dict[str, Any] = {
            "max_new_tokens": self._generation.max_new_tokens,
            "stop_token_ids": self._stops,
            "apply_chat_template": False,
            "do_sample": bool(prompt.temperature),
        }
        if prompt.temperature:
            seed = seed_of(self._generation.seed, prompt.key)
            settings |= {"temperature": prompt.temperature, "rng_seed": seed}
        try:
            handle = self._pipeline.add_request(
                next(self._numbers), Tensor(np.array([ids])), self._library.GenerationConfig(**settings)
            )
        except (RuntimeError, ValueError) as error:
            return Rejection(f"OpenVINO refused the prompt: {_first_line(error)}")
        return _RunningPrompt(place, handle, len(ids), dropped)

    def _answer(self, asked: _RunningPrompt) -> Answer | Rejection:
        (output,) = asked.handle.read_all()
        tokens = list(output.generated_ids)
        stop = next((i for i, token in enumerate(tokens) if token in self._stops), len(tokens))
        text = self._tokenizer.decode(tokens[:stop], skip_special_tokens=True).strip()
        cut = output.finish_reason == self._library.GenerationFinishReason.LENGTH and stop == len(tokens)
        answer = Answer(text, "length" if cut else "stop", asked.prompt_tokens, stop, asked.dropped)
        return heard(answer, self._generation)


def _stops(folder: Path, config: Any, tokenizer: Any) -> set[int]:
    """Return the tokens that end an answer: those of the model, and the end of a chat model's turn."""
    from transformers import GenerationConfig

    decoding = GenerationConfig.from_model_config(config)
    with contextlib.suppress(OSError):  # a model need not have the file
        decoding = GenerationConfig.from_pretrained(folder)
    stops = decoding.eos_token_id
    stops = stops if isinstance(stops, list) else [stops]
    return {stop for stop in [*stops, tokenizer.eos_token_id] if stop is not None}


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _preflight(setup: Setup) -> None:
    openvino_genai()
    if setup.device != "cpu":
        raise UsageError(
            f"--teacher_backend openvino --device {setup.device}: it runs on a CPU only: give --device cpu"
        )
    if not is_exported(setup.source) and not _can_run(setup.source):
        from scaledown.models.openvino import CANNOT

        raise ModelError(
            f"--teacher_backend openvino cannot run {setup.source.name}: {CANNOT}: use --teacher_backend "
            "transformers"
        )


def _can_run(source: ModelSource) -> bool:
    from transformers import AutoConfig

    from scaledown.models.openvino import can_run

    name, pinned = loadable(source)
    with loading(source):
        return can_run(AutoConfig.from_pretrained(name, **pinned))


def _suits(setup: Setup) -> bool:
    if setup.device != "cpu" or importlib.util.find_spec("openvino_genai") is None:
        return False
    if not (found := is_exported(setup.source)) and _can_run(setup.source):
        log.info(
            "OpenVINO would be faster: --teacher_backend openvino; two runs may then differ in some words"
        )
    return found


ENGINE: Final = TeacherEngine(
    lambda setup: OpenVINOTeacher(setup.source, setup.generation),
    preflight=_preflight,
    suits=_suits,
    library="openvino-genai",
)
