"""Normalises texts for comparison: one form for different spellings, words, the key of a question."""

import hashlib
import re
import string
import unicodedata
from typing import Final

# Scripts without spaces between words (Thai to Myanmar, Khmer, Japanese, Chinese): each character is a word.
UNSPACED: Final = r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"
MINUS: Final = "\u2212"
"""The sign of a number in the result of `folded`, for every kind of dash. It is not punctuation."""

_SIGN: Final = re.compile(r"(?<![\w)\]-])[-\u2010-\u2013](?=\.?\d)")
_RAISED: Final = re.compile(r"(?<=\d)(?=[\u00b2\u00b3\u00b9\u00bc-\u00be\u2070-\u2079\u2150-\u215e])")
# Operators, comparisons, currencies, per cent and degrees, which tell questions apart. A dash or slash counts
# only between spaces, because others are in dates and ranges.
_OPERATOR: Final = re.compile(
    r"(?<=\d) *(?:!=|[×÷^<>=≤≥±%°$€£¥]|[+*](?= *\d)|!(?= *[?\w)]))|(?:!=|[×÷^<>=≤≥±√$€£¥]) *(?=\d)|"
    rf"(?<=\b[a-z]) *(?:!=|[<>=≤≥]) *(?=[a-z]\b)|(?<=\d) [-{MINUS}/] (?=\d)"
)
_FULL_WIDTH: Final = {ord(sign): ord(sign) + 0xFEE0 for sign in "*^<>=%$+!/-"}
_KEPT: Final = frozenset(f"+#{MINUS}×÷≤≥±√°€£¥") | frozenset(map(chr, _FULL_WIDTH.values()))
_TOKEN: Final = re.compile(rf"[{UNSPACED}]|[^\s{UNSPACED}]+")
_LONG_DASHES: Final = "\u2014\u2015"  # they separate words without spaces
_WORD: Final = re.compile(rf"[{UNSPACED}]|[^\s!-/:-@\[-`{{-~{UNSPACED}]+[+#]*")
_DROPPED: Final = re.compile(r"['’ʼ\u0300-\u036f]")  # apostrophes, accents
_ARTICLES: Final = frozenset(("a", "an", "the"))


class _Punctuation(dict[int, int | None]):
    """A table for `str.translate` that removes punctuation of all scripts, except long dashes."""

    def __missing__(self, code: int) -> int | None:
        character = chr(code)
        dropped = character in string.punctuation or unicodedata.category(character)[0] == "P"
        self[code] = None if dropped and character not in _LONG_DASHES else code
        return self[code]


_punctuation: Final = _Punctuation()


def writable(text: str) -> str:
    """Replace halves of surrogate pairs, which JSON can have but UTF-8 cannot, by question marks."""
    return text.encode(errors="replace").decode()


def folded(text: str) -> str:
    """Return one form for case, composed and full-width letters, and the dashes before numbers.

    All comparisons of questions and answers use it first.
    """
    plain = unicodedata.normalize("NFKC", _RAISED.sub(" ", text))
    return _SIGN.sub(MINUS, plain.replace("\u2044", "/").replace(MINUS, "-")).casefold()


def normalized(text: str) -> str:
    """Remove case, punctuation, articles and extra spaces, as SQuAD does (Rajpurkar et al. 2016).

    Punctuation of other scripts is removed, too, except long dashes. The sign of a number stays: -5 is not 5.
    """
    plain = folded(text).translate(_punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", plain).split())


def tokens(text: str) -> list[str]:
    """Return the words of a normalized text; its characters in scripts without spaces between words.

    Args:
        text: Any text; `normalized` is applied here.
    """
    return _TOKEN.findall(normalized(text))


def words(text: str) -> list[str]:
    """Return the words of a text in any language, without case, punctuation, accents and English articles.

    Operators and units of numbers are words: 3 < 4 is not 3 > 4. A text without words is split at spaces.
    """
    plain = unicodedata.normalize("NFKD", folded(text).replace("≠", "!="))
    plain = _OPERATOR.sub(_as_word, _DROPPED.sub("", plain))
    if not plain.isascii():  # by category, since \w does not match vowel signs
        plain = "".join(c if unicodedata.category(c)[0] in "LMN" or c in _KEPT else " " for c in plain)
    found = _WORD.findall(plain)
    return [word for word in found if word not in _ARTICLES] or found or text.split()


def _as_word(operator: re.Match[str]) -> str:
    """An operator between spaces, in full-width characters, which `words` does not remove."""
    return f" {operator[0].strip().translate(_FULL_WIDTH)} "


def has_content(text: str) -> bool:
    """Whether a text has a letter, digit or symbol, and not only marks, spaces and invisible characters."""
    return any(unicodedata.category(character)[0] in "LNS" for character in text)


def question_key(text: str) -> str:
    """Return the words of a question in their order. Equal questions have the same key."""
    return " ".join(words(text))


def text_hash(text: str) -> int:
    """Return a hash of a text, 64 bits, the same in every process. Half a surrogate pair is allowed."""
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little")
