"""What writes a student's answers, many at a time: the protocol, and which engine it is."""

from collections.abc import Callable, Sequence
from pkgutil import resolve_name
from typing import Any, Final, NamedTuple, Protocol

from scaledown.devices.vllm import check_vllm, runs_on
from scaledown.models import ModelSource
from scaledown.student.batch import Question


class Sampling(NamedTuple):
    """How the tokens of one answer are chosen."""

    max_new_tokens: int
    temperature: float = 0.0
    """0: the likeliest token each time."""
    top_p: float = 1.0
    seed: int | None = None
    """None: another answer each time."""


class Generation(Protocol):
    """Answers that are being written, one row each. Rows join and leave; each step gives them more tokens.

    Used by one thread. An `Exception` from any method may leave rows that are only good to be dropped.
    """

    def __len__(self) -> int:
        """Rows."""

    @property
    def can_grow(self) -> bool:
        """Whether rows may join those that are there."""

    def join(self, questions: Sequence[Question], samplings: Sequence[Sampling]) -> None:
        """Begin answers, which become the last rows."""

    def tokens(self) -> list[Sequence[int] | Exception]:
        """For each row what its answer goes on with, maybe nothing yet, or why it cannot be written."""

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows only, and in this order."""

    def close(self) -> None:
        """Give back what is held outside of this process."""


class StudentEngine(NamedTuple):
    """An engine that can write a student's answers."""

    suits: Callable[[str], bool]
    """Whether `auto` takes it on a device."""
    check: Callable[[str], None]
    """Raises `MissingExtraError` or `ModelError` where it cannot run on a device."""
    batch: int
    """Answers that `scaledown answer` asks it to write at once."""
    generation: str = ""
    """`module:Class` of the `Generation` that takes the place of the model's own generator."""

    def start(self, model: Any, source: ModelSource, device: str, batch_size: int) -> Generation | None:
        """What writes the answers; None is the model's own generator."""
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
"""By name; `auto` takes the first that suits."""


def choose_engine(name: str, device: str) -> StudentEngine:
    """The engine of that name, or for `auto` the first that suits the device.

    Raises `MissingExtraError` or `ModelError` where one is asked for and cannot run.
    """
    if name not in ENGINES:
        return next(engine for engine in ENGINES.values() if engine.suits(device))
    ENGINES[name].check(device)
    return ENGINES[name]
