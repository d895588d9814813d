"""Cloze questions: a name, a number or a date is hidden in a sentence, and is the answer."""

import re
from collections.abc import Iterator
from random import Random
from typing import Final, NamedTuple

from scaledown.data.teacher.review import sentences

ASK: Final = "Fill the gap:"
GAP: Final = "____"

# Capitalised words that no sentence begins with, also joined ("University of Oxford"); numbers; dates.
_NAME: Final = r"[A-Z][\w'’-]+(?: (?:of |the |de |von )?[A-Z][\w'’-]+){0,3}"
_NUMBER: Final = r"\d+(?:[.,]\d+)*(?:st|nd|rd|th|%)?"
_MONTH: Final = r"(?:January|February|March|April|May|June|July|August|September|October|November|December)"
_DATE: Final = rf"(?:\d{{1,2}} {_MONTH} \d{{4}}|{_MONTH} \d{{1,2}}, \d{{4}}|{_MONTH} \d{{4}})"
_HIDDEN: Final = re.compile(rf"(?<!\w)(?:{_DATE}|{_NAME}|{_NUMBER})(?!\w)")
_WORDS: Final = range(6, 41)  # of a sentence that is asked about
_BEFORE: Final = (4, 9)  # words kept before the gap, at least and at most
_AFTER: Final = (3, 8)


class Cloze(NamedTuple):
    """A question and its answer."""

    query: str
    answer: str


def cloze_questions(text: str, random: Random, title: str = "") -> Iterator[Cloze]:
    """At most one question of each sentence of `text`, whose answer occurs nowhere else in text and title.

    What is asked is a window of words around the gap: real questions are no whole sentences.
    """
    whole = f"{title}\n{text}".lower()
    for sentence in sentences(text):
        if len(sentence.split()) not in _WORDS:
            continue
        found = [
            match
            for match in _HIDDEN.finditer(sentence)
            if match.start() and whole.count(match.group().lower()) == 1
        ]
        if found:
            match = random.choice(found)
            before = sentence[: match.start()].split()[-random.randint(*_BEFORE) :]
            after = sentence[match.end() :].split()[: random.randint(*_AFTER)]
            yield Cloze(" ".join([ASK, *before, GAP, *after]), match.group())
