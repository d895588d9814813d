"""How texts are compared: spellings of the same made one, words, the key of a question."""

import re
import string
import unicodedata
from typing import Final

# Scripts that leave no space between words are taken by character: Thai to Myanmar, Khmer, Japanese, Chinese.
UNSPACED: Final = r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"
MINUS: Final = "\u2212"
"""What `folded` makes of the sign of a number, whatever dash it was: no punctuation."""

_SIGN: Final = re.compile(r"(?<![\w)\]-])[-\u2010-\u2013](?=\.?\d)")
_RAISED: Final = re.compile(r"(?<=\d)(?=[\u00b2\u00b3\u00b9\u00bc-\u00be\u2070-\u2079\u2150-\u215e])")
# What makes another question of numbers: operators, comparisons, currencies, per cent, degrees. A dash or
# slash only with spaces around: elsewhere it is that of a date or a range.
_OPERATOR: Final = re.compile(
    r"(?<=\d) *(?:!=|[×÷^<>=≤≥±%°$€£¥]|[+*](?= *\d)|!(?= *[?\w)]))|(?:!=|[×÷^<>=≤≥±√$€£¥]) *(?=\d)|"
    rf"(?<=\b[a-z]) *(?:!=|[<>=≤≥]) *(?=[a-z]\b)|(?<=\d) [-{MINUS}/] (?=\d)"
)
_FULL_WIDTH: Final = {ord(sign): ord(sign) + 0xFEE0 for sign in "*^<>=%$+!/-"}
_KEPT: Final = frozenset(f"+#{MINUS}×÷≤≥±√°€£¥") | frozenset(map(chr, _FULL_WIDTH.values()))
_TOKEN: Final = re.compile(rf"[{UNSPACED}]|[^\s{UNSPACED}]+")
_LONG_DASHES: Final = "\u2014\u2015"  # which stand between words without a space
_WORD: Final = re.compile(rf"[{UNSPACED}]|[^\s!-/:-@\[-`{{-~{UNSPACED}]+[+#]*")
_DROPPED: Final = re.compile(r"['’ʼ\u0300-\u036f]")  # apostrophes, accents
_ARTICLES: Final = frozenset(("a", "an", "the"))


class _Punctuation(dict[int, int | None]):
    """What `str.translate` makes of each character: nothing of punctuation, in any script."""

    def __missing__(self, code: int) -> int | None:
        character = chr(code)
        dropped = character in string.punctuation or unicodedata.category(character)[0] == "P"
        self[code] = None if dropped and character not in _LONG_DASHES else code
        return self[code]


_punctuation: Final = _Punctuation()


def writable(text: str) -> str:
    """Text without halves of surrogate pairs, which JSON may hold and no file does."""
    return text.encode(errors="replace").decode()


def folded(text: str) -> str:
    """Text in which spellings of the same are one: case, composed and full-width letters, kinds of dashes.

    All comparisons of questions and answers begin with it.
    """
    plain = unicodedata.normalize("NFKC", _RAISED.sub(" ", text))
    return _SIGN.sub(MINUS, plain.replace("\u2044", "/").replace(MINUS, "-")).casefold()


def normalized(text: str) -> str:
    """Without case, punctuation, articles and spare spaces, as in SQuAD (Rajpurkar et al. 2016).

    Beyond ASCII all punctuation goes but long dashes. The sign of a number stays: -5 is not 5.
    """
    plain = folded(text).translate(_punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", plain).split())


def tokens(text: str) -> list[str]:
    """The words of a text, normalized; characters where the script leaves no space between words."""
    return _TOKEN.findall(normalized(text))


def words(text: str) -> list[str]:
    """The words of a text in any language, without case, punctuation, accents and English articles.

    Operators and units of numbers are words: 3 < 4 is not 3 > 4.
    """
    plain = unicodedata.normalize("NFKD", folded(text).replace("≠", "!="))
    plain = _OPERATOR.sub(_as_word, _DROPPED.sub("", plain))
    if not plain.isascii():  # \w has no vowel signs
        plain = "".join(c if unicodedata.category(c)[0] in "LMN" or c in _KEPT else " " for c in plain)
    found = _WORD.findall(plain)
    return [word for word in found if word not in _ARTICLES] or found or text.split()


def _as_word(operator: re.Match[str]) -> str:
    """An operator, parted from its numbers, in signs that are no punctuation."""
    return f" {operator[0].strip().translate(_FULL_WIDTH)} "


def says_something(text: str) -> bool:
    """Whether a text has a letter, digit or symbol: not only marks, spaces and what is not seen."""
    return any(unicodedata.category(character)[0] in "LNS" for character in text)


def question_key(text: str) -> str:
    """What two questions share when they are the same: their words in their order."""
    return " ".join(words(text))
