"""Finds equal and similar questions, by the Jaccard similarity of their words.

Candidates are found by MinHash (Broder 1997) in bands. Each is then checked by its exact Jaccard similarity,
so no result depends on a hash alone.
"""

import functools
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from scaledown.text import text_hash, words

EXACT: Final = 1.0
_MISSED: Final = 1e-6  # of the pairs at the least similarity, the share that has no band in common
_BAND_ROWS: Final = {EXACT: 1, 0.8: 5, 0.6: 3}
_SLOT_BITS: Final = 18  # of a hash; questions that share a slot by chance cost one comparison
_MIX: Final = np.uint64(0x9E3779B97F4A7C15)
_TEXTS_TOGETHER: Final = 1024
_word_hash = functools.lru_cache(1 << 16)(text_hash)  # most words come again


class Found(NamedTuple):
    """The most similar known question."""

    number: int
    """Its number, from 0, in the order in which questions were added."""
    similarity: float
    """The Jaccard similarity, 0 to 1."""


class Questions:
    """The known questions, with which others are compared; numbered in the order they were added.

    Two questions match if the Jaccard similarity of their words is at least `least` and they have the same
    numbers. A word that occurs twice counts twice. A million questions take about 0.5 GB.

    Args:
        least: 0.6, 0.8, or `EXACT`; with `EXACT` the order of words must be equal, too.
    """

    def __init__(self, least: float) -> None:
        self.texts: list[str] = []
        self._least = least
        self._rows = _BAND_ROWS[least]
        self._bands = 1 if least == EXACT else math.ceil(math.log(_MISSED, 1 - least**self._rows))
        self._heads = np.zeros((self._bands, 1 << _SLOT_BITS), np.int32)
        self._links = np.zeros((0, self._bands), np.int32)
        self._starts = np.zeros(1, np.int64)
        self._items = np.zeros(0, np.uint64)
        self._numbers = np.zeros(0, np.uint64)

    def add(self, texts: Sequence[str]) -> None:
        """Add `texts` to the known questions, also those that match one."""
        self._match(texts, find=False, add=True)

    def find(self, texts: Sequence[str]) -> list[Found | None]:
        """The most similar known question for each text; the earliest of several; None if none matches."""
        return self._match(texts, find=True, add=False)

    def find_or_add(self, texts: Sequence[str]) -> list[Found | None]:
        """Like `find`, text by text; a text without a match is added to the known questions."""
        return self._match(texts, find=True, add=True)

    def _match(self, texts: Sequence[str], *, find: bool, add: bool) -> list[Found | None]:
        blocks = (texts[low : low + _TEXTS_TOGETHER] for low in range(0, len(texts), _TEXTS_TOGETHER))
        return [found for block in blocks for found in self._match_block(block, find=find, add=add)]

    def _match_block(self, texts: Sequence[str], *, find: bool, add: bool) -> list[Found | None]:
        from scaledown.data.cleaning.kernels import match

        sets = [self._set(text) for text in texts]
        numbers = np.array([number for _, number in sets], np.uint64)
        starts = np.cumsum([0, *(len(items) for items, _ in sets)])
        items = np.concatenate([items for items, _ in sets])
        if add:
            self._make_room(len(texts), len(items))
        rows, scores = np.empty(len(texts), np.int64), np.empty(len(texts), np.float64)
        match(
            *(self._slots(sets, numbers), starts, items, numbers, self._least, find, add),
            *(self._heads, self._links, self._starts, self._items, self._numbers),
            *(len(self.texts), rows, scores),
        )
        if add:
            self.texts += [text for text, row in zip(texts, rows, strict=True) if row < 0]
        return [
            Found(row, score) if row >= 0 else None
            for row, score in zip(rows.tolist(), scores.tolist(), strict=True)
        ]

    def _set(self, text: str) -> tuple[NDArray[Any], int]:
        """The sorted set of a text, uint64, and a hash of its numbers."""
        found = words(text)
        if self._least == EXACT:
            return np.array([_word_hash(" ".join(found))], np.uint64), 0
        counts = Counter(found)
        each = {
            _word_hash(f"{word} {time}" if time else word): any(map(str.isdigit, word))
            for word, times in counts.items()
            for time in range(times)
        }
        numbers = sum(item for item, is_number in each.items() if is_number)
        return np.array(sorted(each), np.uint64), numbers % (1 << 64)

    def _slots(self, sets: Sequence[tuple[NDArray[Any], int]], numbers: NDArray[Any]) -> NDArray[Any]:
        """The slot of each set in each band, int64 [sets, bands]."""
        if self._least == EXACT:
            rows = np.array([items for items, _ in sets]).reshape(-1, 1, 1)
        else:
            hashed = _signatures((items for items, _ in sets), self._bands * self._rows)
            rows = hashed.reshape(-1, self._bands, self._rows)
        keys = np.repeat(numbers[:, None], self._bands, axis=1)
        for place in range(self._rows):
            keys = (keys ^ rows[:, :, place]) * _MIX
            keys ^= keys >> np.uint64(32)
        return (keys * _MIX >> np.uint64(64 - _SLOT_BITS)).astype(np.int64)

    def _make_room(self, questions: int, items: int) -> None:
        """Enlarge the arrays for `questions` more questions with `items` items in all."""
        used = int(self._starts[len(self.texts)])
        for name, size in (
            ("_links", len(self.texts) + questions),
            ("_numbers", len(self.texts) + questions),
            ("_starts", len(self.texts) + questions + 1),
            ("_items", used + items),
        ):
            array: NDArray[Any] = getattr(self, name)
            if size > len(array):
                more = max(size, len(array) + len(array) // 4)
                array.resize((more, *array.shape[1:]), refcheck=False)  # in place, without a second copy


def _signatures(sets: Iterable[NDArray[Any]], size: int) -> NDArray[Any]:
    """MinHash of sets, uint64 [sets, size]."""
    from datasketch import MinHash

    halves = ((items & np.uint64(0xFFFFFFFF)).tolist() for items in sets)
    made = MinHash.generator(halves, num_perm=size, hashfunc=int)
    return np.array([one.hashvalues for one in made]).astype(np.uint64)
