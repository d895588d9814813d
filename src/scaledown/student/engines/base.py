"""The protocol of engines that write a student's answers."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from scaledown.student.batch import Question


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

    def join(self, questions: Sequence[Question], samplings: Sequence[Sampling]) -> None:
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
