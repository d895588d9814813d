"""Measures of answers. All are 0 to 1, higher is better, and take the best of several right answers."""

import collections
import re
import string
from collections.abc import Sequence


def normalized(text: str) -> str:
    """Without case, punctuation, articles and spare spaces, as in SQuAD (Rajpurkar et al. 2016)."""
    plain = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", plain).split())


def accuracy(answer: str, right: Sequence[str]) -> float:
    """1 if a right answer is a substring of the answer, both normalized (arXiv 2504.07109, section 4)."""
    text = normalized(answer)
    golds = filter(None, map(normalized, right))  # one that is only an article is in everything
    return float(any(gold in text for gold in golds))


def f1(answer: str, right: Sequence[str]) -> float:
    """Harmonic mean of precision and recall over words, as in SQuAD (Rajpurkar et al. 2016)."""
    return max((_f1(normalized(answer).split(), normalized(one).split()) for one in right), default=0.0)


def _f1(answer: list[str], right: list[str]) -> float:
    if not answer or not right:
        return float(answer == right)
    common = (collections.Counter(answer) & collections.Counter(right)).total()
    return 2 * common / (len(answer) + len(right))
