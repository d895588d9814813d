"""Measures of answers. All are 0 to 1, higher is better, and take the best of several right answers."""

import collections
import re
import string
import unicodedata
from collections.abc import Sequence
from typing import Final

# Scripts that leave no space between words are taken by character: Thai to Myanmar, Khmer, Japanese, Chinese.
UNSPACED: Final = r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"
MINUS: Final = "\u2212"
"""What `folded` makes of the sign of a number, whatever dash it was: no punctuation."""

_SIGN: Final = re.compile(r"(?<![\w)\]-])[-\u2010-\u2013](?=\.?\d)")
_TOKEN: Final = re.compile(rf"[{UNSPACED}]|[^\s{UNSPACED}]+")
_LONG_DASHES: Final = "\u2014\u2015"  # which stand between words without a space


class _Punctuation(dict[int, int | None]):
    """What `str.translate` makes of each character: nothing of punctuation, in any script."""

    def __missing__(self, code: int) -> int | None:
        character = chr(code)
        dropped = character in string.punctuation or unicodedata.category(character)[0] == "P"
        self[code] = None if dropped and character not in _LONG_DASHES else code
        return self[code]


_punctuation: Final = _Punctuation()


def folded(text: str) -> str:
    """Text in which spellings of the same are one: case, composed and full-width letters, kinds of dashes.

    All comparisons of questions and answers begin with it.
    """
    return _SIGN.sub(MINUS, unicodedata.normalize("NFKC", text).replace(MINUS, "-")).casefold()


def normalized(text: str) -> str:
    """Without case, punctuation, articles and spare spaces, as in SQuAD (Rajpurkar et al. 2016).

    Beyond ASCII all punctuation goes but long dashes. The sign of a number stays: -5 is not 5.
    """
    plain = folded(text).translate(_punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", plain).split())


def tokens(text: str) -> list[str]:
    """The words of a text, normalized; characters where the script leaves no space between words."""
    return _TOKEN.findall(normalized(text))


def accuracy(answer: str, right: Sequence[str]) -> float:
    """1 if a right answer is a substring of the answer, both normalized (arXiv 2504.07109, section 4)."""
    text = normalized(answer)
    golds = filter(None, map(normalized, right))  # one that is only an article is in everything
    return float(any(gold in text for gold in golds))


def holds(document: str, right: Sequence[str]) -> bool:
    """Whether a right answer stands in the document as whole words, both normalized."""
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
