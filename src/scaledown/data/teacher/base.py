"""Engines that answer prompts, one file each, and the contract they keep."""

import hashlib
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import NamedTuple, Protocol

from scaledown.config.prepare import PrepareConfig
from scaledown.config.shared import EngineConfig
from scaledown.data.prompts import Prompt
from scaledown.models import Halving
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


def answer_all(
    teacher: Teacher, prompts: Sequence[Prompt], advance: Callable[[int], None] = lambda _: None
) -> list[Answer | Rejection]:
    """One answer or rejection a prompt, in the order given."""
    results: dict[int, Answer | Rejection] = {}
    for place, answer in teacher.answers(prompts):
        results[place] = answer
        advance(1)
    return [results[place] for place in range(len(prompts))]
