"""Remembers queries and ids, to find repeated ones."""

import hashlib
import itertools
from collections.abc import Iterator
from typing import Final

_BYTES: Final = 12  # of a query's hash: among a billion, one chance in 10^11 that two are taken for one


class Seen:
    """The queries seen so far, without the spaces around them; about 80 bytes each, however long they are."""

    def __init__(self) -> None:
        self._hashes: set[bytes] = set()

    def add(self, query: str) -> bool:
        """Remember a query. Returns whether it is new."""
        text = query.strip().encode(errors="surrogatepass")
        before = len(self._hashes)
        self._hashes.add(hashlib.blake2b(text, digest_size=_BYTES).digest())
        return len(self._hashes) > before


class UniqueIds:
    """Gives each query or article a unique id. It stays unique as one word, as TREC's formats need it."""

    def __init__(self) -> None:
        self.renamed = 0
        self._seen = Seen()
        self._next: dict[str, Iterator[int]] = {}

    def own(self, given: str) -> str:
        """Return an id that was not returned before.

        Args:
            given: The wanted id.

        Returns:
            The wanted id; with `#2`, `#3` … if it was returned before.
        """
        found = given
        while not self._seen.add(one_word(found)):
            found = f"{given}#{next(self._next.setdefault(given, itertools.count(2)))}"
        self.renamed += found != given
        return found


def one_word(name: str) -> str:
    """Replace white space, because it separates the columns of TREC's formats."""
    return "_".join(name.split()) or "_"
