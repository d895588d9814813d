"""What every engine that writes a student's answers has: its protocol, and what it declares."""

import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

from scaledown.config.shared import AUTO
from scaledown.errors import ModelError
from scaledown.models.sources import ModelSource
from scaledown.student.batch import EncodedQuestion

log = logging.getLogger("scaledown")


class Sampling(NamedTuple):
    """How the tokens of one answer are chosen."""

    max_new_tokens: int
    """The most tokens of the answer, at least 1."""
    temperature: float = 0.0
    """0 takes the most probable token each time."""
    top_p: float = 1.0
    """Tokens are drawn from the most probable ones with this sum of probabilities; above 0, at most 1."""
    seed: int | None = None
    """None draws another answer each time."""


class Generation(Protocol):
    """A batch of answers that are being written, one row for each. Rows join and leave between steps.

    Only one thread uses it. After an `Exception` from any method the rows can only be dropped.
    """

    def __len__(self) -> int:
        """Number of rows."""

    @property
    def can_grow(self) -> bool:
        """Whether rows may join now."""

    def join(self, questions: Sequence[EncodedQuestion], samplings: Sequence[Sampling]) -> None:
        """Begin answers, which become the last rows.

        Args:
            questions: The prompts.
            samplings: For each question, how its tokens are chosen.

        Raises:
            ModelError: The process that writes the answers has ended.
        """

    def tokens(self) -> list[Sequence[int] | Exception]:
        """Return for each row its next tokens, possibly none, or the error that ended it."""

    def keep(self, rows: Sequence[int]) -> None:
        """Keep some rows, and end the others.

        Args:
            rows: Indices of the rows to keep, in their new order.
        """

    def check(self) -> None:
        """Raise `ModelError` if the process that writes the answers has ended. It takes no time."""

    def close(self) -> None:
        """Free what is held outside of this process, for example a process of vLLM."""


class StudentEngine(NamedTuple):
    """An engine that can write a student's answers."""

    title: str
    """Its name in messages."""
    generation: Callable[..., Generation] | None
    """Makes the `Generation` that replaces the model's own generator, from the model, its source, the device
    and the most answers at the same time; None if the model's own generator writes the answers."""
    suits: Callable[[str, ModelSource], bool] = lambda device, source: False
    """Whether `auto` may choose it for a device and a model."""
    check: Callable[[str], None] = lambda device: None
    """Raises `MissingExtraError`, `ModelError` or `UsageError` if it cannot run on a device."""
    batch: int = 8
    """Default number of answers that `scaledown answer` writes at a time."""
    has_8bit: bool = False
    """Whether it can round the generator's weights to 8 bits."""
    is_optional: bool = False
    """Whether `auto` uses the model's own generator if this engine cannot run the model."""

    def start(
        self,
        model: Any,
        source: ModelSource,
        device: str,
        batch_size: int,
        *,
        asked: str,
        eight_bits: bool = False,
    ) -> tuple[Generation | None, str]:
        """Start the engine.

        Args:
            model: The `ScaleDownModel`.
            source: Where it comes from.
            device: cpu, cuda or cuda:N.
            batch_size: The most answers written at the same time.
            asked: The name that the user gave, or auto.
            eight_bits: Whether to round the generator's weights to 8 bits; only if `has_8bit`.

        Returns:
            The `Generation` that writes the answers, None if the model's own generator does; and its title.

        Raises:
            ModelError: The engine cannot run the model.
            NoRoomError: The device has too little free memory.
        """
        if not self.generation:
            return None, self.title
        try:
            options = {"eight_bits": True} if eight_bits else {}
            return self.generation(model, source, device, batch_size, **options), self.title
        except ModelError as error:
            if asked != AUTO or eight_bits or not self.is_optional:
                raise
            log.warning("%s: transformers writes the answers", str(error).rpartition(": use ")[0] or error)
            return None, "transformers"
