"""Keeps the embeddings of documents that were compressed for a query before."""

from collections import OrderedDict
from hashlib import blake2b

import torch

from scaledown.serving.jobs import Job


class EmbeddingCache:
    """Embeddings of (query, document) pairs seen before; the least recently used are removed first.

    Args:
        gigabytes: The most memory of all embeddings, in 1e9 bytes.
    """

    def __init__(self, gigabytes: float) -> None:
        self._room = int(gigabytes * 1e9)
        self._kept: OrderedDict[bytes, torch.Tensor] = OrderedDict()
        self.size = 0
        """Bytes in use."""

    def get(self, key: bytes) -> torch.Tensor | None:
        """Return the embeddings, [memory tokens, width]; None if they are not in the cache.

        Args:
            key: The result of `key_of`.
        """
        if key in self._kept:
            self._kept.move_to_end(key)
        return self._kept.get(key)

    def clear(self) -> None:
        """Remove all embeddings."""
        self._kept.clear()
        self.size = 0

    def put(self, key: bytes, embeddings: torch.Tensor) -> None:
        """Keep embeddings, unless they alone are larger than the cache.

        Args:
            key: The result of `key_of`.
            embeddings: [memory tokens, width].
        """
        if embeddings.nbytes > self._room or key in self._kept:
            return
        self._kept[key] = embeddings.clone()  # a view would keep the whole batch in memory
        self.size += embeddings.nbytes
        while self.size > self._room:
            self.size -= self._kept.popitem(last=False)[1].nbytes


def key_of(job: Job, document: str) -> bytes:
    """Return the key of a document for a request: query, document and rate decide the embeddings.

    Args:
        job: The request; its query and its rate count.
        document: The document's text.

    Returns:
        A hash of 16 bytes.
    """
    hashed = blake2b(f"{job.rate} {len(job.query)} ".encode(), digest_size=16)
    hashed.update(job.query.encode())
    hashed.update(document.encode())
    return hashed.digest()
