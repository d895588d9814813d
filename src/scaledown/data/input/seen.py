"""Remembers queries and ids in about 20 bytes each; a Python set takes 80."""

import hashlib
import itertools
from collections.abc import Iterator
from typing import Final

_BYTES: Final = 12  # of a query's hash: among a billion, one chance in 10^11 that two are taken for one
_EMPTY: Final = bytes(_BYTES)
_FULL: Final = 0.7
_GROWTH: Final = 1.5
_PARTS: Final = 256  # which grow one at a time


class Seen:
    """The queries seen so far, without the spaces around them."""

    def __init__(self) -> None:
        self._parts = [_Table() for _ in range(_PARTS)]

    def add(self, query: str) -> bool:
        """Remember a query. Returns whether it is new."""
        key = hashlib.blake2b(query.strip().encode(errors="surrogatepass"), digest_size=_BYTES).digest()
        return self._parts[key[0] % _PARTS].add(key)

    @property
    def size(self) -> int:
        """Its memory in bytes."""
        return sum(len(part.places) for part in self._parts)


class Ids:
    """Gives each query or article an id that no other has, also as one word, as TREC's formats need it."""

    def __init__(self) -> None:
        self.renamed = 0
        self._seen = Seen()
        self._next: dict[str, Iterator[int]] = {}

    def own(self, given: str) -> str:
        """The id that was given; with `#2`, `#3` … where others came before that have it."""
        found = given
        while not self._seen.add(one_word(found)):
            found = f"{given}#{next(self._next.setdefault(given, itertools.count(2)))}"
        self.renamed += found != given
        return found


def one_word(name: str) -> str:
    """Replace white space, because it separates the columns of TREC's formats."""
    return "_".join(name.split()) or "_"


class _Table:
    """Hashes by open addressing: one is at the place its bytes name, or at the next that was free."""

    def __init__(self) -> None:
        self.places = bytearray(16 * _BYTES)
        self._count = 0

    def add(self, key: bytes) -> bool:
        found = self._find(key)
        if self.places[found : found + _BYTES] == key:
            return False
        self.places[found : found + _BYTES] = key
        self._count += 1
        if self._count * _BYTES > _FULL * len(self.places):
            self._grow()
        return True

    def _find(self, key: bytes) -> int:
        """Return the place of a hash, or the place where it belongs."""
        places = self.places
        at = int.from_bytes(key[1:9]) % (len(places) // _BYTES) * _BYTES
        while places[at : at + _BYTES] not in (key, _EMPTY):
            at = (at + _BYTES) % len(places)
        return at

    def _grow(self) -> None:
        old = self.places
        self.places = bytearray(int(len(old) // _BYTES * _GROWTH) * _BYTES)
        for at in range(0, len(old), _BYTES):
            if (key := bytes(old[at : at + _BYTES])) != _EMPTY:
                found = self._find(key)
                self.places[found : found + _BYTES] = key
