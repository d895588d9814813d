"""Every prompt, with its version and source. A changed text needs a new version: answers depend on it."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Final, NamedTuple

from scaledown.errors import InputError, UsageError

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

    @property
    def digest(self) -> str:
        """16 hex digits over all that the teacher is shown."""
        return hashlib.sha256(json.dumps(self[1:]).encode()).hexdigest()[:16]

    def user(self, documents: Sequence[str]) -> str:
        """The user turn with these documents."""
        return self.before + "\n\n".join(documents) + self.after


QUESTION: Final = "{question}"
DOCUMENTS: Final = "{documents}"


class Template(NamedTuple):
    """How a question about documents is asked: a system turn, and a user turn around the documents."""

    system: str
    before: str
    after: str


# OSCAR, arXiv 2504.07109, figure 14 (the prompt of BERGEN, arXiv 2407.01102).
PAPER: Final = Template(
    "You are a helpful assistant. Your task is to extract relevant information from provided documents and "
    "to answer to questions as briefly as possible.",
    "Background:\n",
    f"\n\nQuestion: {QUESTION}",
)
# Written for this project: answers in sentences, as the guide shows them.
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
# What pretraining asks in place of a question; the tasks are those of COCOM (arXiv 2407.09252).
REPEAT: Final = "Repeat the background word for word."
CONTINUE: Final = "How does the background go on?"

# Written for this project; a longer instruction makes small models write about the instruction.
QUESTION_SYSTEM: Final = "You write quiz questions."
QUESTION_AFTER: Final = "\n\nWrite a question that this answers."

JUDGE_VERSION: Final = 2
"""Of the two prompts below."""
# OSCAR, arXiv 2504.07109, figure 13, as its first author's arXiv 2504.02411 prints it (figure 7).
JUDGE_SYSTEM: Final = (
    "You are an evaluation tool. Answer with one of 1: Correct, 0.5: Partially correct, 0: wrong."
)
JUDGE_ASKS: Final = (
    "Here is a question, a golden answer, and an AI-generated answer. Can you judge whether the AI-generated "
    "answer is correct according to the question and golden answer? Simply answer with one of 1: correct, "
    "0.5: partially correct, 0: wrong.\n"
)
# Written for this project; asked in both orders: judges favour a place (Zheng et al. 2023, arXiv 2306.05685).
PREFERENCE_SYSTEM: Final = (
    "You compare answers to questions. You are given a question, the golden answer, and two answers, A and "
    "B. Write A if answer A is better, B if answer B is better, or C if neither is. Judge by what is said, "
    "not by length or order. Write only that letter."
)

# After UPR (Sachan et al. 2022, arXiv 2204.07496).
LIKELIHOOD_BEFORE: Final = "Passage: "
LIKELIHOOD_AFTER: Final = "\nPlease write a question based on this passage.\nQuestion:"


def load_template(name: str) -> Template:
    """The template behind `--prompt`: a known one, or the user turn in a text file.

    Raises `InputError` for a file that cannot be read, `UsageError` for one without its two places.
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
    for place in (DOCUMENTS, QUESTION):
        if (count := text.count(place)) != 1:
            raise UsageError(f"--prompt {name} has {place} {count} times: it stands there once")
    before, _, after = text.partition(DOCUMENTS)
    return Template("", before, after)


def answer_prompt(
    key: str, query: str, documents: Sequence[str], temperature: float, template: Template = PAPER
) -> Prompt:
    """What the teacher is asked."""
    before, after = (part.replace(QUESTION, query) for part in template[1:])
    return Prompt(key, template.system, before, tuple(documents), after, temperature)


def question_prompt(key: str, passage: str, temperature: float) -> Prompt:
    """How a question about a passage is asked for."""
    return Prompt(key, QUESTION_SYSTEM, "", (passage,), QUESTION_AFTER, temperature)


def judge_prompt(key: str, query: str, golden: Sequence[str], answer: str) -> Prompt:
    """How a grade is asked for: 1, 0.5 or 0. Several golden answers are right each."""
    asked = f"Question: {query}.\nGolden answer: {' or '.join(golden)}.\nGenerated answer: {answer}."
    return Prompt(key, JUDGE_SYSTEM, JUDGE_ASKS + asked, (), "")


def preference_prompt(key: str, query: str, golden: Sequence[str], one: str, other: str) -> Prompt:
    """How the better of two answers is asked for: A is `one`, B is `other`, C is neither."""
    asked = (
        f"Question: {query}\nGolden answer: {' or '.join(golden)}\nAnswer A: {one}\nAnswer B: {other}\n"
        "Better answer:"
    )
    return Prompt(key, PREFERENCE_SYSTEM, asked, (), "")
