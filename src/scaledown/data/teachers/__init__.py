"""Engines that answer prompts, one file each, and the contract they keep."""

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

from scaledown.config import PrepareConfig
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

    @classmethod
    def of(cls, config: PrepareConfig) -> "Generation":
        """As the settings of a run say."""
        return cls(
            max_new_tokens=config.max_new_tokens,
            seed=config.seed,
            batch_size=config.teacher_batch_size,
            load_in_8bit=config.teacher_8bit,
            load_in_4bit=config.teacher_4bit,
        )


class Rejection(NamedTuple):
    """A prompt that could not be asked, and why."""

    reason: str


class Teacher(Protocol):
    """Answers prompts."""

    halving: Halving

    def answer(self, prompts: Sequence[Prompt], advance: Callable[[int], None]) -> list[Answer | Rejection]:
        """One answer or rejection a prompt, in the order given."""
