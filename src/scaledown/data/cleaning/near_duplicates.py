"""Questions that are the same, or nearly: words in any order, all but one or so.

Candidates are found by MinHash (Broder 1997) in bands, and kept by the exact Jaccard similarity of their sets
of words, so that no hash decides.
"""

import functools
import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, Final, NamedTuple, TypeAlias

import numpy as np

from scaledown.text import words

Array: TypeAlias = np.ndarray[Any, Any]

EXACT: Final = 1.0
_MISSED: Final = 1e-6  # share of pairs at the least similarity that have no band in common
_BAND_ROWS: Final = {EXACT: 1, 0.8: 5, 0.6: 3}
_SLOT_BITS: Final = 18  # of a hash: what shares a slot by chance costs one comparison
_MIX: Final = np.uint64(0x9E3779B97F4A7C15)
_BLOCK: Final = 1024


class Found(NamedTuple):
    """The most similar of the known questions, and how similar it is, 0..1."""

    number: int
    similarity: float


class Questions:
    """Questions that others are compared with, numbered in the order in which they were added.

    Two are similar when the Jaccard similarity of their words is `least` at least, and their numbers are the
    same: `EXACT`, where order counts too, or one of 0.8 and 0.6. A word that comes again counts again. A
    million take about 0.5 GB.
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
        """Make `texts` known, similar to others or not."""
        self._match(texts, find=False, add=True)

    def find(self, texts: Sequence[str]) -> list[Found | None]:
        """The known question that is most similar to each text, the earliest of several."""
        return self._match(texts, find=True, add=False)

    def find_or_add(self, texts: Sequence[str]) -> list[Found | None]:
        """Like `find`, one after the other; a text that is similar to none becomes known."""
        return self._match(texts, find=True, add=True)

    def _match(self, texts: Sequence[str], *, find: bool, add: bool) -> list[Found | None]:
        blocks = (texts[low : low + _BLOCK] for low in range(0, len(texts), _BLOCK))
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

    def _set(self, text: str) -> tuple[Array, int]:
        """The sorted set of a text, uint64, and a hash of its numbers."""
        found = words(text)
        if self._least == EXACT:
            return np.array([_hash(" ".join(found))], np.uint64), 0
        counts = Counter(found)
        each = {
            _hash(f"{word} {time}" if time else word): any(map(str.isdigit, word))
            for word, times in counts.items()
            for time in range(times)
        }
        numbers = sum(item for item, is_number in each.items() if is_number)
        return np.array(sorted(each), np.uint64), numbers % (1 << 64)

    def _slots(self, sets: Sequence[tuple[Array, int]], numbers: Array) -> Array:
        """Which slot of each band a set has, int64 [sets, bands]."""
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
        used = int(self._starts[len(self.texts)])
        for name, size in (
            ("_links", len(self.texts) + questions),
            ("_numbers", len(self.texts) + questions),
            ("_starts", len(self.texts) + questions + 1),
            ("_items", used + items),
        ):
            array: Array = getattr(self, name)
            if size > len(array):
                more = max(size, len(array) + len(array) // 4)
                array.resize((more, *array.shape[1:]), refcheck=False)  # in place: no second copy of it


@functools.lru_cache(1 << 16)
def _hash(text: str) -> int:
    """64 bits of a text."""
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def _signatures(sets: Iterable[Array], size: int) -> Array:
    """MinHash of sets, uint64 [sets, size]."""
    from datasketch import MinHash

    halves = ((items & np.uint64(0xFFFFFFFF)).tolist() for items in sets)
    made = MinHash.generator(halves, num_perm=size, hashfunc=int)
    return np.array([one.hashvalues for one in made]).astype(np.uint64)
