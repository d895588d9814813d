"""Finds queries and records that must not be trained on: those of evaluation sets, and duplicates.

Each is recorded with its match.
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
from scaledown.text import question_key, words, writable
from scaledown.urls import is_url, redacted

log = logging.getLogger("scaledown")

MATCH_VERSION: Final = 3  # of the rules for a match
# Least similarity of a match. Both were chosen from data (docs/cleaning.md): 0.6 is one word of four
# replaced, 0.8 is one word of nine.
_LIKE_EVALUATION: Final = 0.6
_LIKE_EARLIER: Final = 0.8
_NGRAM: Final = 8  # words; unrelated texts seldom share eight consecutive ones
_TEXTS_A_BLOCK: Final = 1024

Exclusion = dict[str, Any]
"""Why something is left out: a `reason`, the `problem` (`contaminated` or `duplicate`), and its `match`."""


class Cleaner:
    """Decides which queries and answers are left out. It reads evaluation files when it needs them.

    Args:
        config: Which evaluation files there are, and what is left out.
    """

    def __init__(self, config: CleanConfig) -> None:
        self._config = config
        self.counts: Counter[str] = Counter()
        """`unread`: the rows of the evaluation files without a question, as soon as the files were read."""

    def check(self) -> None:
        """Check before any work that the evaluation files have what is needed. Raises `InputError`."""
        for name in self._config.decontaminate:
            next(gold_questions(name, "--decontaminate", tell=False))
        if self._config.decontaminate_answers and not any(
            question.answers and question.passages for _, question in self._questions()
        ):
            raise InputError(
                "--decontaminate_answers: no question of the --decontaminate files has both answers and "
                "passages: give a file that has both, or leave the flag out"
            )

    def queries(self, texts: Sequence[str]) -> list[Exclusion | None]:
        """Find the queries that are left out.

        Give each query once, in order: with `--deduplicate`, the cleaner remembers the queries that it kept.

        Args:
            texts: The queries that follow those of earlier calls.

        Returns:
            For each query why it is left out, or None if it is kept.

        Raises:
            InputError: An evaluation file cannot be read, or has no question.
        """
        excluded: list[Exclusion | None] = [None] * len(texts)
        if self._config.decontaminate:
            known, origins = self._evaluation
            for number, found in enumerate(known.find(texts)):
                if found:
                    match = _match(texts[number], known.texts[found.number], found.similarity)
                    reason = f"{match['kind']} match of an evaluation question"
                    excluded[number] = _exclusion("contaminated", reason, match | origins[found.number])
        if self._config.deduplicate:
            rest = [number for number, why in enumerate(excluded) if why is None]
            for number, found in zip(rest, self._earlier.find_or_add([texts[n] for n in rest]), strict=True):
                if found:
                    match = _match(texts[number], self._earlier.texts[found.number], found.similarity)
                    reason = f"{match['kind']} match of an earlier query"
                    excluded[number] = _exclusion("duplicate", reason, match)
        return excluded

    def answer(self, text: str, documents: Sequence[str]) -> Exclusion | None:
        """Find out whether a record with this answer is left out.

        A record is left out if its answer contains the right answer of an evaluation question, and one of its
        documents shares eight consecutive words with a passage of the same question.

        Args:
            text: The answer.
            documents: The texts of the record's documents, without titles.

        Returns:
            Why it is left out; None if it is kept.
        """
        if not self._config.decontaminate_answers:
            return None
        answer = f" {question_key(text)} "
        for ngram in (ngram for document in documents for ngram in _ngrams(document)):
            for right, question in self._passages.get(ngram, ()):
                if f" {right} " in answer:
                    reason = "answer and passage of an evaluation question"
                    return _exclusion("contaminated", reason, question)
        return None

    def _questions(self, counts: Counter[str] | None = None) -> Iterator[tuple[str, GoldQuestion]]:
        """All evaluation questions, each with the name of its file."""
        for name in self._config.decontaminate:
            for question in gold_questions(name, "--decontaminate", counts, tell=counts is not None):
                yield redacted(name) if is_url(name) else name, question

    @functools.cached_property
    def _evaluation(self) -> tuple[Questions, list[dict[str, str]]]:
        """The evaluation questions, and the id and file of each."""
        known, block = Questions(_LIKE_EVALUATION), list[str]()
        origins = []
        for file, question in self._questions(self.counts):
            block.append(writable(question.query))
            origins.append({"query_id": question.query_id, "file": file})
            if len(block) == _TEXTS_A_BLOCK:
                known.add(block)
                block = []
        known.add(block)
        log.info("decontaminate: %s evaluation questions", f"{len(origins):,}")
        return known, origins

    @functools.cached_property
    def _earlier(self) -> Questions:
        """The queries that are kept."""
        return Questions(EXACT if self._config.deduplicate == "exact" else _LIKE_EARLIER)

    @functools.cached_property
    def _passages(self) -> dict[str, list[tuple[str, dict[str, Any]]]]:
        """Right answers with their questions, by the n-grams of the questions' passages."""
        found: dict[str, list[tuple[str, dict[str, Any]]]] = {}
        for file, question in self._questions():
            ngrams = {ngram for passage in question.passages for ngram in _ngrams(passage)}
            for answer in filter(question_key, question.answers):
                own = {"kind": "answer", "question": writable(question.query), "answer": writable(answer)}
                own |= {"query_id": question.query_id, "file": file}
                for ngram in ngrams:
                    found.setdefault(ngram, []).append((question_key(answer), own))
        return found


def _ngrams(text: str) -> Iterator[str]:
    """All sequences of eight consecutive words of a text."""
    found = words(text)
    for start in range(len(found) - _NGRAM + 1):
        yield " ".join(found[start : start + _NGRAM])


def _exclusion(problem: str, reason: str, match: dict[str, Any]) -> Exclusion:
    return {"reason": reason, "problem": problem, "match": match}


def _match(text: str, known: str, similarity: float) -> dict[str, Any]:
    kind = "exact" if words(text) == words(known) else "near"
    return {"kind": kind, "question": known, "similarity": round(similarity, 4)}
