"""Measures of answers. All are 0 to 1, higher is better, and take the best of several right answers."""

import collections
import re
from collections.abc import Sequence

from scaledown.text import normalized, tokens


def accuracy(answer: str, right: Sequence[str]) -> float:
    """1 if a right answer is a substring of the answer, both normalized (arXiv 2504.07109, section 4)."""
    text = normalized(answer)
    golds = filter(None, map(normalized, right))  # one that is only an article is in everything
    return float(any(gold in text for gold in golds))


def holds(document: str, right: Sequence[str]) -> bool:
    """Whether a right answer occurs in the document as whole words, both normalized."""
    text = f" {' '.join(tokens(document))} "
    return any(f" {' '.join(gold)} " in text for gold in filter(None, map(tokens, right)))


def exact_match(answer: str, right: Sequence[str]) -> float:
    """1 if the answer is a right answer, both normalized, as in SQuAD (Rajpurkar et al. 2016)."""
    return float(normalized(answer) in map(normalized, right))


def f1(answer: str, right: Sequence[str]) -> float:
    """Harmonic mean of precision and recall over words, as in SQuAD (Rajpurkar et al. 2016).

    Over characters in Chinese, Japanese, Thai and other scripts that leave no space between words.
    """
    return max((_f1(tokens(answer), tokens(one)) for one in right), default=0.0)


def _f1(answer: list[str], right: list[str]) -> float:
    if not answer or not right:
        return float(answer == right)
    common = (collections.Counter(answer) & collections.Counter(right)).total()
    return 2 * common / (len(answer) + len(right))


def rouge_l(answer: str, right: Sequence[str]) -> float:
    """ROUGE-L (Lin 2004): F-measure of the longest common subsequence of words, not stemmed.

    On ASCII that of Google's rouge_score; words of other scripts count, too.
    """
    return max((_rouge_l(_words(answer), _words(one)) for one in right), default=0.0)


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", text.lower())


def _rouge_l(answer: list[str], right: list[str]) -> float:
    if not answer or not right:
        return 0.0
    longest = [0] * (len(right) + 1)  # of the answer so far and each beginning of the right one
    for word in answer:
        before = 0  # as long without this word and without the right one's
        for place, other in enumerate(right, 1):
            both = before + 1 if word == other else max(longest[place], longest[place - 1])
            before, longest[place] = longest[place], both
    return 2 * longest[-1] / (len(answer) + len(right))
