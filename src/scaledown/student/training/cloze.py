"""Cloze questions: a name, number or date of a sentence is hidden and becomes the answer."""

import re
from collections.abc import Iterator
from random import Random
from typing import Final, NamedTuple

from scaledown.data.teacher.review import sentences

CLOZE_PROMPT: Final = "Fill the gap:"
GAP: Final = "____"

# Capitalised words, also several ("University of Oxford"); numbers; dates. The first word of a sentence is
# never hidden.
_NAME: Final = r"[A-Z][\w'’-]+(?: (?:of |the |de |von )?[A-Z][\w'’-]+){0,3}"
_NUMBER: Final = r"\d+(?:[.,]\d+)*(?:st|nd|rd|th|%)?"
_MONTH: Final = r"(?:January|February|March|April|May|June|July|August|September|October|November|December)"
_DATE: Final = rf"(?:\d{{1,2}} {_MONTH} \d{{4}}|{_MONTH} \d{{1,2}}, \d{{4}}|{_MONTH} \d{{4}})"
_HIDDEN_TEXT: Final = re.compile(rf"(?<!\w)(?:{_DATE}|{_NAME}|{_NUMBER})(?!\w)")
_WORDS: Final = range(6, 41)  # in a sentence that becomes a question
_BEFORE: Final = (4, 9)  # words kept before the gap, at least and at most
_AFTER: Final = (3, 8)


class Cloze(NamedTuple):
    """A question and its answer."""

    query: str
    """`CLOZE_PROMPT`, then words of a sentence with a `GAP`."""
    answer: str
    """The words of the gap."""


def cloze_questions(text: str, random: Random, title: str = "") -> Iterator[Cloze]:
    """Yield at most one question for each sentence of a text.

    The question is a window of words around the gap: real questions are shorter than whole sentences.

    Args:
        text: Sentences of 6 to 40 words become questions.
        random: Chooses the gap and the width of the window.
        title: The title of the text.

    Yields:
        A question whose answer occurs only once in text and title, ignoring case.
    """
    whole = f"{title}\n{text}".lower()
    for sentence in sentences(text):
        if len(sentence.split()) not in _WORDS:
            continue
        found = [
            match
            for match in _HIDDEN_TEXT.finditer(sentence)
            if match.start() and whole.count(match.group().lower()) == 1
        ]
        if found:
            match = random.choice(found)
            before = sentence[: match.start()].split()[-random.randint(*_BEFORE) :]
            after = sentence[match.end() :].split()[: random.randint(*_AFTER)]
            yield Cloze(" ".join([CLOZE_PROMPT, *before, GAP, *after]), match.group())
