"""What every teacher engine is: the teacher that it loads, and what the engine declares about itself."""

import hashlib
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Final, NamedTuple, Protocol

from scaledown.config.prepare import PrepareConfig
from scaledown.config.shared import EngineConfig
from scaledown.data.prompts import Prompt
from scaledown.models import Halving, ModelSource
from scaledown.records import Answer


class Generation(NamedTuple):
    """How a teacher loads and decodes; `seed` matters where a prompt has a temperature."""

    max_new_tokens: int = PrepareConfig.max_new_tokens
    seed: int = 0
    batch_size: int = PrepareConfig.teacher_batch_size
    load_in_8bit: bool = False
    load_in_4bit: bool = False
    document_tokens: int = 0
    """Tokens that are shown of each document; 0 is all."""
    context: int = 0
    """Tokens of prompt and answer together; 0 is what the model takes."""
    logprobs: int = 0
    """How many log probabilities come with each answer token; 0 is none."""
    temperature: float | None = None
    """That of answers, where `--temperature` decides it."""
    if_cut_short: str = "raise --max_new_tokens, or let the model reason less"
    """What to do where a reply ends before its answer begins."""

    @property
    def bits(self) -> int:
        """8 or 4, or 0 for weights as they are stored."""
        return 8 if self.load_in_8bit else 4 if self.load_in_4bit else 0

    @classmethod
    def of(cls, config: PrepareConfig) -> "Generation":
        """As the settings of a run say."""
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
    """A seed for one prompt, below 2^31, so that its answer does not depend on what else is asked."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{key}".encode()).digest()[:4], "little") >> 1


class Engine(NamedTuple):
    """What runs a teacher, and what only one engine needs."""

    backend: str = PrepareConfig.teacher_backend
    endpoints: tuple[str, ...] = ()
    max_total_tokens: int = 0
    max_requests_per_minute: int = 0
    request_timeout: float = PrepareConfig.request_timeout
    lora: str = ""
    tensor_parallel: int = 1
    memory: float = 0.0
    """The share of its GPU that vLLM takes; 0 is what is free."""

    @classmethod
    def of(cls, config: EngineConfig) -> "Engine":
        """As the settings of a run say."""
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
    """A prompt that could not be asked, and why."""

    reason: str


class Teacher(Protocol):
    """Answers prompts."""

    halving: Halving

    def answers(
        self, prompts: Sequence[Prompt], have: Collection[int] = ()
    ) -> Iterator[tuple[int, Answer | Rejection]]:
        """Places in `prompts` and their answers, as these finish, in any order.

        Places in `have` are answered already: an engine asks them again only where equal bytes need it.
        Whoever takes the answers keeps each before the next is asked for, and may stop at any time.
        """


class Setup(NamedTuple):
    """What an engine loads a teacher from."""

    source: ModelSource
    """Its weights; without a location where the engine asks a server."""
    device: str
    """cpu, cuda, cuda:N or mps."""
    generation: Generation
    engine: Engine
    dtype: str = "auto"
    spent_tokens: int = 0
    """What an earlier run of the same settings took from `--max_total_tokens`."""


SHARDS_AT_ONCE: Final = 16
"""Of engines that schedule by themselves: so many shards of prompts keep them busy."""


def _no_check(setup: Setup) -> None:
    """Nothing can be missing."""


def _only_by_name(setup: Setup) -> bool:
    return False


class TeacherEngine(NamedTuple):
    """An entry of `TEACHER_ENGINES`: how teachers are loaded, and what the engine declares about itself."""

    load: Callable[[Setup], Teacher]
    """Gives a teacher that is ready. Raises `ModelError` for a model that cannot be loaded."""
    preflight: Callable[[Setup], None] = _no_check
    """Checks before any work, without loading the model: raises the `ScaleDownError` that `load` would."""
    suits: Callable[[Setup], bool] = _only_by_name
    """Whether `--teacher_backend auto` takes the engine here."""
    deterministic: bool = False
    """Whether two runs on the same kind of machine give the same bytes. Its batches then come from the plan
    of the run, and `--teacher_batch_size` is among what answers depend on."""
    shards_at_once: int = SHARDS_AT_ONCE
    """How many shards of prompts it is asked together."""
    full_load: int = 0
    """How many prompts keep it busy, if its speed is that of many prompts together: `plan` tries so many."""
    served: bool = False
    """Whether the model is behind a server, which alone knows its weights and its hardware."""
    has_bits: bool = False
    """Whether it loads a model in 8 or 4 bits."""
    has_lora: bool = False
    """Whether it loads a LoRA adapter beside the model."""
    has_logprobs: bool = False
    """Whether answers come with log probabilities."""
    library: str = ""
    """The distribution that it needs, whose version a run's manifest records."""


def answer_all(
    teacher: Teacher, prompts: Sequence[Prompt], advance: Callable[[int], None] = lambda _: None
) -> list[Answer | Rejection]:
    """One answer or rejection a prompt, in the order given."""
    results: dict[int, Answer | Rejection] = {}
    for place, answer in teacher.answers(prompts):
        results[place] = answer
        advance(1)
    return [results[place] for place in range(len(prompts))]
