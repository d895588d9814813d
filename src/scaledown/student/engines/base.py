"""The protocol of engines that write a student's answers, and the choice of an engine."""

from collections.abc import Callable, Sequence
from pkgutil import resolve_name
from typing import Any, Final, NamedTuple, Protocol

from scaledown.devices.vllm import check_vllm, runs_on
from scaledown.models.sources import ModelSource
from scaledown.student.batch import Question


class Sampling(NamedTuple):
    """How the tokens of one answer are chosen."""

    max_new_tokens: int
    temperature: float = 0.0
    """0 takes the most probable token each time."""
    top_p: float = 1.0
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

    def join(self, questions: Sequence[Question], samplings: Sequence[Sampling]) -> None:
        """Begin answers, which become the last rows."""

    def tokens(self) -> list[Sequence[int] | Exception]:
        """Return for each row its next tokens, possibly none, or the error that ended it."""

    def keep(self, rows: Sequence[int]) -> None:
        """Keep only these rows, in this order."""

    def close(self) -> None:
        """Free what is held outside of this process."""


class StudentEngine(NamedTuple):
    """An engine that can write a student's answers."""

    suits: Callable[[str], bool]
    """Whether `auto` may choose it for a device."""
    check: Callable[[str], None]
    """Raises `MissingExtraError` or `ModelError` if it cannot run on a device."""
    batch: int
    """Default number of answers that `scaledown answer` writes at a time."""
    generation: str = ""
    """`module:Class` of the `Generation` that replaces the model's own generator; empty if none does."""

    def start(self, model: Any, source: ModelSource, device: str, batch_size: int) -> Generation | None:
        """Start the `Generation` that writes the answers; None if the model's own generator does."""
        if not self.generation:
            return None
        made: Generation = resolve_name(self.generation)(model, source, device, batch_size)
        return made


ENGINES: Final = {
    "vllm": StudentEngine(
        runs_on,
        lambda device: check_vllm(device, "--engine vllm"),
        batch=256,
        generation="scaledown.student.engines.vllm:VllmGeneration",
    ),
    "transformers": StudentEngine(lambda _: True, lambda _: None, batch=8),
}
"""Engines by name; `auto` takes the first that suits the device."""


def choose_engine(name: str, device: str) -> StudentEngine:
    """Return the engine of that name; for `auto` the first that suits the device.

    Raises:
        MissingExtraError: The named engine is not installed.
        ModelError: The named engine cannot run on the device.
    """
    if name not in ENGINES:
        return next(engine for engine in ENGINES.values() if engine.suits(device))
    ENGINES[name].check(device)
    return ENGINES[name]
