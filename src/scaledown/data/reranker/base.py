"""What all rerankers share: the interface, and scoring in batches that are halved if memory is full."""

import contextlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from scaledown.devices.halving import Halving
from scaledown.errors import ModelError


class Pair(NamedTuple):
    """A query and a document."""

    query: str
    """The text of the query."""
    document: str
    """The text of the document, title included."""


class Reranker(Protocol):
    """Scores pairs: a higher score is more relevant. Scores are logits or mean log-probabilities."""

    name: str
    """The model's name, for messages."""
    halving: Halving
    """Halves batches that run out of memory; a run records how often."""

    def score(self, pairs: Sequence[Pair], advance: Callable[[int], None]) -> list[float]:
        """Score pairs.

        Args:
            pairs: Pairs of a query and a document.
            advance: Called with the number of pairs that have been scored since the last call.

        Returns:
            One score for each pair, in their order.
        """


def scores_of(  # noqa: PLR0917
    reranker: Reranker,
    batches: Iterable[Sequence[int]],
    launch: Callable[[Sequence[int]], Any],
    read: Callable[[Any], Any],
    device: str,
    advance: Callable[[int], None],
    at_once: int = 1,
) -> list[float]:
    """Score pairs in batches, for an implementation of `Reranker.score`.

    Args:
        reranker: Has the name for messages, and halves batches that run out of memory.
        batches: Indices of pairs; each index is in one batch.
        launch: Starts to compute a batch.
        read: Waits for what `launch` returned, and returns its scores [batch].
        device: cpu, cuda, cuda:N or mps.
        advance: Called with the number of pairs in each finished batch.
        at_once: Batches computed at the same time on a CPU, see `Halving.each`.

    Returns:
        The scores of all pairs, in their order.

    Raises:
        ModelError: A score is not finite, or one pair alone does not fit into memory.
    """
    found: dict[int, float] = {}
    with contextlib.closing(reranker.halving.each(batches, launch, read, device, at_once)) as scored:
        for batch, made in scored:
            found |= zip(batch, np.concatenate(made), strict=True)
            advance(len(batch))
    scores = np.array([found[i] for i in range(len(found))], np.float32)
    if not np.isfinite(scores).all():
        raise ModelError(f"model {reranker.name} gave scores that are not numbers: try --dtype float32")
    return [float(value) for value in scores]
