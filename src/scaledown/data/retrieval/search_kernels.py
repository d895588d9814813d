"""The compiled loops of exact search: inverting a block of passages, and updating the top-k with it.

Scores are summed in float32, one query term after the other, as in a plain sparse product. There is no fused
multiply-add and no reordering, so equal vectors have equal scores at every position.
"""

from typing import Any, TypeAlias

import numpy as np
from numba import njit

Array: TypeAlias = np.ndarray[Any, Any]


@njit(nogil=True, cache=True)
def invert(
    starts: Array, terms: Array, weights: Array, low: int, high: int, dimensions: int
) -> tuple[Array, Array, Array]:
    """Sort the postings of the passages in [low, high), at most 65,536 passages, by term.

    Args:
        starts: Where the postings of each passage start, int64 [passages + 1].
        terms: Term ids of the postings, passage by passage [postings].
        weights: Their weights [postings].
        low: The first passage.
        high: The end of the passages.
        dimensions: The size of the vocabulary.

    Returns:
        Where the postings of each term start, int64 [dimensions + 1]; then, term by term, passages counted
        from `low` and weights [postings of the block].
    """
    begin = np.zeros(dimensions + 1, np.int64)
    for place in range(starts[low], starts[high]):
        begin[terms[place] + 1] += 1
    for term in range(dimensions):
        begin[term + 1] += begin[term]
    passages = np.empty(begin[dimensions], np.uint16)
    sorted_weights = np.empty(begin[dimensions], np.float32)
    free = begin[:-1].copy()
    for passage in range(low, high):
        for place in range(starts[passage], starts[passage + 1]):
            term = terms[place]
            target = free[term]
            passages[target] = passage - low
            sorted_weights[target] = weights[place]
            free[term] = target + 1
    return begin, passages, sorted_weights


@njit(nogil=True, cache=True)
def search_block(
    query_starts: Array,
    query_terms: Array,
    query_weights: Array,
    begin: Array,
    passages: Array,
    weights: Array,
    count: int,
    first: int,
    removed: Array,
    rows: Array,
    scores: Array,
) -> None:
    """Update the top-k of each query with a block of passages.

    Blocks must come in passage order: then the earlier of two passages with equal scores stays.

    Args:
        query_starts: Where the terms of each query start (CSR), int64 [queries + 1].
        query_terms: Their term ids.
        query_weights: Their weights.
        begin: Where the postings of each term start, as `invert` returns it.
        passages: Passages of the postings, counted from `first`.
        weights: Weights of the postings.
        count: The number of passages in the block.
        first: The row of the first passage.
        removed: Passages that cannot be found, int64, counted from `first`.
        rows: The rows of the top-k, int64 [queries, k], changed in place.
        scores: The scores of the top-k, float32 [queries, k], changed in place.
    """
    k = rows.shape[1]
    sums = np.empty(count, np.float32)
    for query in range(len(query_starts) - 1):
        sums[:] = 0
        for place in range(query_starts[query], query_starts[query + 1]):
            weight = query_weights[place]
            term = query_terms[place]
            for posting in range(begin[term], begin[term + 1]):
                sums[passages[posting]] += weight * weights[posting]
        for passage in removed:
            sums[passage] = -np.inf
        lowest = scores[query, k - 1]
        for start in range(0, count, 64):
            stop = min(start + 64, count)
            any_better = False
            for passage in range(start, stop):  # no branch, so that the compiler compares 16 at once
                any_better |= sums[passage] > lowest
            if not any_better:
                continue
            for passage in range(start, stop):
                score = sums[passage]
                if score > lowest:
                    rank = k - 1
                    while rank > 0 and scores[query, rank - 1] < score:
                        scores[query, rank] = scores[query, rank - 1]
                        rows[query, rank] = rows[query, rank - 1]
                        rank -= 1
                    scores[query, rank] = score
                    rows[query, rank] = first + passage
                    lowest = scores[query, k - 1]
