"""Every prompt, with its version and source. A changed text needs a new version: answers depend on it."""

from collections.abc import Sequence
from typing import Final, NamedTuple

VERSION: Final = 1


class Prompt(NamedTuple):
    """A prompt whose documents can be shortened, from the last one, without touching the rest."""

    key: str
    """Names the prompt: seeds sampling and stands in reports."""
    system: str
    before: str
    documents: tuple[str, ...]
    after: str
    temperature: float = 0.0
    """0 is greedy; above, sampling is seeded by `key`."""

    def user(self, documents: Sequence[str]) -> str:
        """The user turn with these documents."""
        return self.before + "\n\n".join(documents) + self.after


# OSCAR, arXiv 2504.07109, figure 14 (the prompt of BERGEN, arXiv 2407.01102).
ANSWER_SYSTEM: Final = (
    "You are a helpful assistant. Your task is to extract relevant information from provided documents and "
    "to answer to questions as briefly as possible."
)
ANSWER_BEFORE: Final = "Background:\n"
ANSWER_AFTER: Final = "\n\nQuestion: "

# Written for this project; a longer instruction makes small models write about the instruction.
QUESTION_SYSTEM: Final = "You write quiz questions."
QUESTION_AFTER: Final = "\n\nWrite a question that this answers."

# After UPR (Sachan et al. 2022, arXiv 2204.07496).
LIKELIHOOD_BEFORE: Final = "Passage: "
LIKELIHOOD_AFTER: Final = "\nPlease write a question based on this passage.\nQuestion:"


def answer_prompt(key: str, query: str, documents: Sequence[str], temperature: float) -> Prompt:
    """What the teacher is asked."""
    return Prompt(key, ANSWER_SYSTEM, ANSWER_BEFORE, tuple(documents), ANSWER_AFTER + query, temperature)


def question_prompt(key: str, passage: str, temperature: float) -> Prompt:
    """How a question about a passage is asked for."""
    return Prompt(key, QUESTION_SYSTEM, "", (passage,), QUESTION_AFTER, temperature)
