"""What writes a student's answers, many at a time: the protocol, and which engine it is."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from scaledown.devices.vllm import check_vllm, runs_on
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


def choose_engine(name: str, device: str) -> str:
    """`auto` becomes vLLM where it is installed for `device`, else transformers.

    Raises `MissingExtraError` or `ModelError` where vLLM is asked for and cannot run.
    """
    if name == "vllm":
        check_vllm(device, "--engine vllm")
    if name == "auto":
        return "vllm" if runs_on(device) else "transformers"
    return name
