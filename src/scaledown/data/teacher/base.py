"""The interface of teacher engines: the teacher that an engine loads, and what the engine declares."""

import hashlib
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Final, NamedTuple, Protocol

from scaledown.config.prepare import PrepareConfig
from scaledown.config.shared import EngineConfig
from scaledown.data.prompts import Prompt
from scaledown.devices.halving import Halving
from scaledown.errors import ModelError, one_line
from scaledown.models.sources import ModelSource
from scaledown.records import Answer


class TeacherSettings(NamedTuple):
    """How a teacher is loaded and decodes."""

    max_new_tokens: int = PrepareConfig.max_new_tokens
    """The most tokens of an answer."""
    seed: int = 0
    """The seed for prompts with a temperature, see `seed_of`."""
    batch_size: int = PrepareConfig.teacher_batch_size
    """Prompts answered at once; 0 is the default of the device.

    Engines with their own scheduler ignore it.
    """
    load_in_8bit: bool = False
    """Whether weights are loaded in 8 bits."""
    load_in_4bit: bool = False
    """Whether weights are loaded in 4 bits."""
    document_tokens: int = 0
    """Tokens of each document in the prompt; 0 is all."""
    context: int = 0
    """The most tokens of prompt and answer together; 0 is the model's limit."""
    logprobs: int = 0
    """Number of log probabilities for each answer token; 0 is none."""
    temperature: float | None = None
    """The temperature of answers, if `--temperature` decides it."""
    if_cut_short: str = "raise --max_new_tokens, or let the model reason less"
    """Advice for the message about a reply that ends before its answer begins."""

    @property
    def bits(self) -> int:
        """8 or 4, or 0 for weights as they are stored."""
        return 8 if self.load_in_8bit else 4 if self.load_in_4bit else 0

    @classmethod
    def of(cls, config: PrepareConfig) -> "TeacherSettings":
        """Create it from the settings of a run."""
        return cls(
            max_new_tokens=config.max_new_tokens,
            seed=config.seed,
            batch_size=config.teacher_batch_size,
            load_in_8bit=config.teacher_8bit,
            load_in_4bit=config.teacher_4bit,
            document_tokens=config.teacher_document_tokens,
            context=config.teacher_context,
            logprobs=config.teacher_logprobs,
            temperature=config.temperature,
        )


def seed_of(seed: int, key: str) -> int:
    """Return a seed for one prompt, so that its answer does not depend on other prompts.

    Args:
        seed: The value of `--seed`.
        key: The key of the prompt.

    Returns:
        0 to 2^31 - 1.
    """
    return int.from_bytes(hashlib.sha256(f"{seed}:{key}".encode()).digest()[:4], "little") >> 1


class EngineSettings(NamedTuple):
    """The choice of an engine, and settings that only one engine needs."""

    backend: str = PrepareConfig.teacher_backend
    """`auto`, or the name of an entry of `TEACHER_ENGINES`."""
    endpoints: tuple[str, ...] = ()
    """URLs of OpenAI-compatible servers."""
    max_total_tokens: int = 0
    """The most tokens of all prompts and answers; 0 is no limit."""
    max_requests_per_minute: int = 0
    """The most requests to all servers together; 0 is no limit."""
    request_timeout: float = PrepareConfig.request_timeout
    """Seconds after which a request without a reply is given up."""
    lora: str = ""
    """The folder of a LoRA adapter; empty for none."""
    tensor_parallel: int = 1
    """GPUs that share the model."""
    memory: float = 0.0
    """The share of GPU memory that vLLM uses; 0 is all free memory."""

    @classmethod
    def of(cls, config: EngineConfig) -> "EngineSettings":
        """Create it from the settings of a run."""
        return cls(
            config.teacher_backend,
            config.teacher_endpoint,
            config.max_total_tokens,
            config.max_requests_per_minute,
            config.request_timeout,
            config.teacher_lora,
            config.tensor_parallel,
            config.teacher_memory,
        )


class Rejection(NamedTuple):
    """A prompt that could not be answered."""

    reason: str
    """The reason, for the quarantine."""


class Teacher(Protocol):
    """Answers prompts."""

    halving: Halving
    """Halves batches that run out of memory; a run records how often."""

    def answers(
        self, prompts: Sequence[Prompt], have: Collection[int] = ()
    ) -> Iterator[tuple[int, Answer | Rejection]]:
        """Yield answers as they finish, in any order.

        The caller stores each answer before it requests the next, and may stop at any time.

        Args:
            prompts: The prompts.
            have: Places in `prompts` that are answered already. An engine answers them again only if it must,
                to produce equal bytes.

        Yields:
            A place in `prompts` with its answer, or with a rejection: the query then goes to the quarantine.
            Every place outside `have` must occur.

        Raises:
            ModelError: The engine cannot continue.
        """


class Setup(NamedTuple):
    """The arguments for loading a teacher."""

    source: ModelSource
    """The weights; without a location if the engine uses a server."""
    device: str
    """cpu, cuda, cuda:N or mps."""
    generation: TeacherSettings
    """How it decodes."""
    engine: EngineSettings
    """The values of the flags for engines."""
    dtype: str = "auto"
    """auto, float32, bfloat16 or float16."""
    spent_tokens: int = 0
    """Tokens of `--max_total_tokens` that earlier runs with the same settings used."""


SHARDS_AT_ONCE: Final = 16
"""Shards of prompts that keep an engine with its own scheduler busy."""


def _no_check(setup: Setup) -> None:
    """Check nothing: this engine always can load the teacher."""


def _only_by_name(setup: Setup) -> bool:
    return False


class TeacherEngine(NamedTuple):
    """An entry of `TEACHER_ENGINES`: how teachers are loaded, and what the engine declares about itself."""

    load: Callable[[Setup], Teacher]
    """Returns a loaded teacher. Raises `ModelError` if the model cannot be loaded."""
    preflight: Callable[[Setup], None] = _no_check
    """Checks before any work, without loading the model; raises the `ScaleDownError` that `load` would
    raise."""
    suits: Callable[[Setup], bool] = _only_by_name
    """Whether `--teacher_backend auto` may choose the engine here."""
    deterministic: bool = False
    """Whether two runs on the same kind of machine produce the same bytes. Batches are then fixed by the
    run's settings, and answers depend on `--teacher_batch_size`."""
    shards_at_once: int = SHARDS_AT_ONCE
    """Number of shards whose prompts are sent together."""
    full_load: int = 0
    """Number of prompts that keep it busy, if it answers many together; `plan` tries that many."""
    served: bool = False
    """Whether the model is on a server; its weights and hardware are then not known."""
    has_bits: bool = False
    """Whether it loads a model in 8 or 4 bits."""
    has_lora: bool = False
    """Whether it loads a LoRA adapter beside the model."""
    has_logprobs: bool = False
    """Whether answers come with log probabilities."""
    library: str = ""
    """The Python distribution that it needs; a run's manifest records its version."""

    def dtype(self, asked: str, kept: str) -> str:
        """Choose the dtype for `load`.

        Args:
            asked: The value of `--dtype`.
            kept: The dtype that all processes of the run use.

        Returns:
            `kept` if the engine is deterministic, since equal bytes depend on it. Otherwise `asked`: the
            engine itself decides what `auto` means, by the model and the device.
        """
        return kept if self.deterministic else asked


def answers_of(
    teacher: Teacher, prompts: Sequence[Prompt], have: Collection[int] = ()
) -> Iterator[tuple[int, Answer | Rejection]]:
    """Yield the answers of a teacher, and check that they are complete.

    Args:
        teacher: The teacher.
        prompts: The prompts.
        have: Places in `prompts` that are answered already.

    Yields:
        A place in `prompts` with its answer or rejection.

    Raises:
        ModelError: The teacher yielded something else, or a prompt outside `have` has no answer.
    """
    name = type(teacher).__name__
    left = set(range(len(prompts))) - set(have)
    for place, answer in teacher.answers(prompts, have):
        if place not in range(len(prompts)) or not isinstance(answer, Answer | Rejection):
            raise ModelError(
                f"{name}.answers yielded {type(answer).__name__} for place {one_line(repr(place), 20)} of "
                f"{len(prompts)} prompts: an engine yields a place and an Answer or a Rejection "
                "(docs/extending.md)"
            )
        left.discard(place)
        yield place, answer
    if left:
        raise ModelError(
            f"{name}.answers ended without an answer to {len(left)} of {len(prompts)} prompts, the first at "
            f"place {min(left)}: an engine yields an Answer or a Rejection for each (docs/extending.md)"
        )


def answer_all(
    teacher: Teacher, prompts: Sequence[Prompt], advance: Callable[[int], None] = lambda _: None
) -> list[Answer | Rejection]:
    """Answer prompts.

    Args:
        teacher: The teacher.
        prompts: The prompts.
        advance: Called with 1 at each answer or rejection.

    Returns:
        An answer or a rejection for each prompt, in order.

    Raises:
        ModelError: The teacher cannot continue, or left out a prompt.
    """
    results: dict[int, Answer | Rejection] = {}
    for place, answer in answers_of(teacher, prompts):
        results[place] = answer
        advance(1)
    return [results[place] for place in range(len(prompts))]
