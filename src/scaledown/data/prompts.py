"""All prompts, with their sources. A changed text needs a new version, since answers depend on it."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Final, NamedTuple

from scaledown.errors import InputError, UsageError

PROMPT_VERSION: Final = 1


class Prompt(NamedTuple):
    """A prompt. Its documents can be shortened, beginning with the last; the other parts stay whole."""

    key: str
    """The name of the prompt. It seeds sampling, and reports have it."""
    system: str
    """The system turn; may be empty."""
    before: str
    """The text of the user turn before the documents."""
    documents: tuple[str, ...]
    """The texts of the documents, best first; may be empty."""
    after: str
    """The text of the user turn after the documents."""
    temperature: float = 0.0
    """0 means greedy decoding; above 0, sampling is seeded by `key`."""

    @property
    def digest(self) -> str:
        """A hash of everything that the teacher reads, 16 hex digits."""
        return hashlib.sha256(json.dumps(self[1:]).encode()).hexdigest()[:16]

    def user(self, documents: Sequence[str]) -> str:
        """Return the user turn.

        Args:
            documents: The texts of the documents; those of the prompt, perhaps shortened.
        """
        return self.before + "\n\n".join(documents) + self.after


QUESTION: Final = "{question}"
DOCUMENTS: Final = "{documents}"


class Template(NamedTuple):
    """A prompt for questions about documents; `QUESTION` stands for the question."""

    system: str
    """The system turn; may be empty."""
    before: str
    """The text of the user turn before the documents."""
    after: str
    """The text of the user turn after the documents."""


# OSCAR, arXiv 2504.07109, figure 14 (the prompt of BERGEN, arXiv 2407.01102).
PAPER: Final = Template(
    "You are a helpful assistant. Your task is to extract relevant information from provided documents and "
    "to answer to questions as briefly as possible.",
    "Background:\n",
    f"\n\nQuestion: {QUESTION}",
)
# Written for this project, for answers in sentences, as in the guide.
GUIDE: Final = Template(
    "You are a helpful assistant that answers questions from documents.",
    "Documents:\n\n",
    f"\n\nUsing these documents, answer in one or two full sentences: {QUESTION}",
)
TEMPLATES: Final = {"paper": PAPER, "guide": GUIDE}

# BERGEN's prompt without documents (arXiv 2407.01102).
CLOSED_BOOK: Final = Template(
    "You are a helpful assistant. Your task is to answer to questions as briefly as possible.",
    "",
    f"Question: {QUESTION}",
)
# The instructions of pretraining, used in place of a question; the tasks are from COCOM (arXiv 2407.09252).
REPEAT: Final = "Repeat the background word for word."
CONTINUE: Final = "How does the background go on?"

# Written for this project. With a longer instruction, small models write about the instruction.
QUESTION_SYSTEM: Final = "You write quiz questions."
QUESTION_AFTER: Final = "\n\nWrite a question that this answers."

JUDGE_VERSION: Final = 2
"""The version of the two prompts below."""
# OSCAR, arXiv 2504.07109, figure 13, with the wording of arXiv 2504.02411 by the same author (figure 7).
JUDGE_SYSTEM: Final = (
    "You are an evaluation tool. Answer with one of 1: Correct, 0.5: Partially correct, 0: wrong."
)
JUDGE_ASKS: Final = (
    "Here is a question, a golden answer, and an AI-generated answer. Can you judge whether the AI-generated "
    "answer is correct according to the question and golden answer? Simply answer with one of 1: correct, "
    "0.5: partially correct, 0: wrong.\n"
)
# Written for this project. It is asked in both orders, since judges prefer one position (Zheng et al. 2023,
# arXiv 2306.05685).
PREFERENCE_SYSTEM: Final = (
    "You compare answers to questions. You are given a question, the golden answer, and two answers, A and "
    "B. Write A if answer A is better, B if answer B is better, or C if neither is. Judge by what is said, "
    "not by length or order. Write only that letter."
)

# After UPR (Sachan et al. 2022, arXiv 2204.07496).
LIKELIHOOD_BEFORE: Final = "Passage: "
LIKELIHOOD_AFTER: Final = "\nPlease write a question based on this passage.\nQuestion:"


def load_template(name: str) -> Template:
    """Load the template of `--prompt`.

    Args:
        name: One of `TEMPLATES`, or a text file with the user turn.

    Raises:
        InputError: The file cannot be read.
        UsageError: The file does not have each placeholder exactly once.
    """
    if name in TEMPLATES:
        return TEMPLATES[name]
    try:
        text = Path(name).expanduser().read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise InputError(
            f"--prompt {name} cannot be read ({reason}): use {', '.join(TEMPLATES)}, or a text file with "
            f"{DOCUMENTS} and {QUESTION}"
        ) from error
    for placeholder in (DOCUMENTS, QUESTION):
        if (count := text.count(placeholder)) != 1:
            raise UsageError(f"--prompt {name} has {placeholder} {count} times: it must be there once")
    before, _, after = text.partition(DOCUMENTS)
    return Template("", before, after)


def answer_prompt(
    key: str, query: str, documents: Sequence[str], temperature: float, template: Template = PAPER
) -> Prompt:
    """Make the prompt for an answer to a query from documents.

    Args:
        key: The name of the prompt, different for each prompt.
        query: The question.
        documents: The texts of the documents, best first.
        temperature: 0 for greedy decoding.
        template: The text around question and documents, from `load_template`.
    """
    before, after = (part.replace(QUESTION, query) for part in template[1:])
    return Prompt(key, template.system, before, tuple(documents), after, temperature)


def question_prompt(key: str, passage: str, temperature: float) -> Prompt:
    """Make the prompt for a question about a passage.

    Args:
        key: The name of the prompt, different for each prompt.
        passage: The text of the passage, title included.
        temperature: 0 for greedy decoding.
    """
    return Prompt(key, QUESTION_SYSTEM, "", (passage,), QUESTION_AFTER, temperature)


def judge_prompt(key: str, query: str, golden: Sequence[str], answer: str) -> Prompt:
    """Make the prompt for a grade of an answer: 1, 0.5 or 0. It is answered greedily.

    Args:
        key: The name of the prompt, different for each prompt.
        query: The question.
        golden: The right answers; each of them is right.
        answer: The answer to grade.
    """
    asked = f"Question: {query}.\nGolden answer: {' or '.join(golden)}.\nGenerated answer: {answer}."
    return Prompt(key, JUDGE_SYSTEM, JUDGE_ASKS + asked, (), "")


def preference_prompt(key: str, query: str, golden: Sequence[str], one: str, other: str) -> Prompt:
    """Make the prompt for the better of two answers: A, B, or C for neither. It is answered greedily.

    Args:
        key: The name of the prompt, different for each prompt.
        query: The question.
        golden: The right answers; each of them is right.
        one: Answer A.
        other: Answer B.
    """
    asked = (
        f"Question: {query}\nGolden answer: {' or '.join(golden)}\nAnswer A: {one}\nAnswer B: {other}\n"
        "Better answer:"
    )
    return Prompt(key, PREFERENCE_SYSTEM, asked, (), "")
