"""What must not be trained on: questions of evaluation sets, and queries that come again.

Everything that is left out is recorded with what it matched.
"""

import functools
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, Final

from scaledown.config.shared import CleanConfig
from scaledown.data.cleaning.near_duplicates import EXACT, Questions
from scaledown.data.input.gold import GoldQuestion, gold_questions
from scaledown.errors import InputError
from scaledown.text import words, writable
from scaledown.urls import is_url, redacted

log = logging.getLogger("scaledown")

VERSION: Final = 3  # of what counts as a match
# Least similarity, chosen from data (docs/cleaning.md): one word of four replaced, or one of nine.
_LIKE_EVALUATION: Final = 0.6
_LIKE_EARLIER: Final = 0.8
_RUN: Final = 8  # words in a row that are hardly shared by chance
_BLOCK: Final = 1024

Left = dict[str, Any]
"""Why something is left out: a `reason`, the `problem` (`contaminated` or `duplicate`), and its `match`."""


class Cleaner:
    """Says which queries and answers are left out; evaluation files are read when they are needed."""

    def __init__(self, config: CleanConfig) -> None:
        self._config = config
        self.counts: Counter[str] = Counter()
        """Rows of the evaluation files in which there is no question, as `unread`, once they were read."""

    def check(self) -> None:
        """Find out before any work whether the evaluation files are of use. Raises `InputError`."""
        for name in self._config.decontaminate:
            next(gold_questions(name, "--decontaminate", tell=False))
        if self._config.decontaminate_answers and not any(
            question.answers and question.passages for _, question in self._questions()
        ):
            raise InputError(
                "--decontaminate_answers: no question of the --decontaminate files has both answers and "
                "passages: give a file that has, or leave the flag out"
            )

    def queries(self, texts: Sequence[str]) -> list[Left | None]:
        """Why each query is left out, or None where it stays. Queries are to come in their order, once."""
        left: list[Left | None] = [None] * len(texts)
        if self._config.decontaminate:
            known, origins = self._evaluation
            for number, found in enumerate(known.find(texts)):
                if found:
                    match = _match(texts[number], known.texts[found.number], found.similarity)
                    reason = f"{match['kind']} match of an evaluation question"
                    left[number] = _left("contaminated", reason, match | origins[found.number])
        if self._config.deduplicate:
            rest = [number for number, why in enumerate(left) if why is None]
            for number, found in zip(rest, self._earlier.find_or_add([texts[n] for n in rest]), strict=True):
                if found:
                    match = _match(texts[number], self._earlier.texts[found.number], found.similarity)
                    left[number] = _left("duplicate", f"{match['kind']} match of an earlier query", match)
        return left

    def answer(self, text: str, documents: Sequence[str]) -> Left | None:
        """Why a record with this answer is left out, or None where it stays.

        It is when it holds the right answer to an evaluation question, and a document shares eight words in
        a row with a passage of that question.
        """
        if not self._config.decontaminate_answers:
            return None
        said = f" {_as_words(text)} "
        for run in (run for document in documents for run in _runs(document)):
            for right, question in self._passages.get(run, ()):
                if f" {right} " in said:
                    return _left("contaminated", "answer and passage of an evaluation question", question)
        return None

    def _questions(self, counts: Counter[str] | None = None) -> Iterator[tuple[str, GoldQuestion]]:
        """All evaluation questions with the name of their file."""
        for name in self._config.decontaminate:
            for question in gold_questions(name, "--decontaminate", counts, tell=counts is not None):
                yield redacted(name) if is_url(name) else name, question

    @functools.cached_property
    def _evaluation(self) -> tuple[Questions, list[dict[str, str]]]:
        """The evaluation questions, and where each is from."""
        known, block = Questions(_LIKE_EVALUATION), list[str]()
        origins = []
        for file, question in self._questions(self.counts):
            block.append(writable(question.query))
            origins.append({"query_id": question.query_id, "file": file})
            if len(block) == _BLOCK:
                known.add(block)
                block = []
        known.add(block)
        log.info("decontaminate: %s evaluation questions", f"{len(origins):,}")
        return known, origins

    @functools.cached_property
    def _earlier(self) -> Questions:
        """The queries that stay."""
        return Questions(EXACT if self._config.deduplicate == "exact" else _LIKE_EARLIER)

    @functools.cached_property
    def _passages(self) -> dict[str, list[tuple[str, dict[str, Any]]]]:
        """Right answers, each with its question, by all runs of words in the passages that hold them."""
        found: dict[str, list[tuple[str, dict[str, Any]]]] = {}
        for file, question in self._questions():
            runs = {run for passage in question.passages for run in _runs(passage)}
            for answer in filter(_as_words, question.answers):
                own = {"kind": "answer", "question": writable(question.query), "answer": writable(answer)}
                own |= {"query_id": question.query_id, "file": file}
                for run in runs:
                    found.setdefault(run, []).append((_as_words(answer), own))
        return found


def _runs(text: str) -> Iterator[str]:
    """Each eight words in a row, as `words` has them."""
    found = words(text)
    for place in range(len(found) - _RUN + 1):
        yield " ".join(found[place : place + _RUN])


def _left(problem: str, reason: str, match: dict[str, Any]) -> Left:
    return {"reason": reason, "problem": problem, "match": match}


def _match(text: str, known: str, similarity: float) -> dict[str, Any]:
    kind = "exact" if words(text) == words(known) else "near"
    return {"kind": kind, "question": known, "similarity": round(similarity, 4)}


def _as_words(text: str) -> str:
    return " ".join(words(text))
