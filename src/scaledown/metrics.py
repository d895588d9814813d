"""Measures of answers, from 0 to 1 (best). With several right answers, the best score counts."""

import collections
import re
from collections.abc import Sequence

from scaledown.text import normalized, tokens


def accuracy(answer: str, right: Sequence[str]) -> float:
    """Whether a right answer is a substring of the answer, both normalized (arXiv 2504.07109, section 4).

    Args:
        answer: The answer to measure.
        right: The right answers; one that is empty after normalization does not count.

    Returns:
        1 or 0.
    """
    text = normalized(answer)
    golds = filter(None, map(normalized, right))  # an empty one would be in every answer
    return float(any(gold in text for gold in golds))


def has_answer(document: str, right: Sequence[str]) -> bool:
    """Whether a document has a right answer, in whole words, both normalized.

    Args:
        document: The document's text.
        right: The right answers.
    """
    text = f" {' '.join(tokens(document))} "
    return any(f" {' '.join(gold)} " in text for gold in filter(None, map(tokens, right)))


def exact_match(answer: str, right: Sequence[str]) -> float:
    """Whether the answer is a right answer, both normalized, as in SQuAD (Rajpurkar et al. 2016).

    Args:
        answer: The answer to measure.
        right: The right answers.

    Returns:
        1 or 0.
    """
    return float(normalized(answer) in map(normalized, right))


def f1(answer: str, right: Sequence[str]) -> float:
    """Harmonic mean of precision and recall over words, as in SQuAD (Rajpurkar et al. 2016).

    In Chinese, Japanese, Thai and other scripts without spaces between words, characters are compared.

    Args:
        answer: The answer to measure.
        right: The right answers; the best value counts.

    Returns:
        0 to 1; 0 without right answers.
    """
    return max((_f1(tokens(answer), tokens(one)) for one in right), default=0.0)


def _f1(answer: list[str], right: list[str]) -> float:
    if not answer or not right:
        return float(answer == right)
    common = (collections.Counter(answer) & collections.Counter(right)).total()
    return 2 * common / (len(answer) + len(right))


def rouge_l(answer: str, right: Sequence[str]) -> float:
    """ROUGE-L (Lin 2004): F-measure of the longest common subsequence of words, without stemming.

    For ASCII text it equals Google's rouge_score. Words of other scripts count, too.

    Args:
        answer: The answer to measure.
        right: The right answers; the best value counts.

    Returns:
        0 to 1; 0 without right answers.
    """
    return max((_rouge_l(_answer_words(answer), _answer_words(one)) for one in right), default=0.0)


def _answer_words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", text.lower())


def _rouge_l(answer: list[str], right: list[str]) -> float:
    if not answer or not right:
        return 0.0
    longest = [0] * (len(right) + 1)  # for the answer up to `word`, and the first `place` words of `right`
    for word in answer:
        before = 0  # the length without both last words
        for place, other in enumerate(right, 1):
            both = before + 1 if word == other else max(longest[place], longest[place - 1])
            before, longest[place] = longest[place], both
    return 2 * longest[-1] / (len(answer) + len(right))
