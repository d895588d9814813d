"""The inner loops of exact search, compiled: postings of a block of passages, and its part in the top-k.

Scores are summed in float32, query term by query term, as a plain sparse product does: no fused
multiply-add, no reordering, so that equal vectors have equal scores wherever they stand.
"""

from typing import Any, TypeAlias

import numpy as np
from numba import njit

Array: TypeAlias = np.ndarray[Any, Any]


@njit(nogil=True, cache=True)
def invert(
    starts: Array, terms: Array, weights: Array, low: int, high: int, dimensions: int
) -> tuple[Array, Array, Array]:
    """Postings by term of passages `low` to `high`, at most 65,536 of them.

    `starts` int64 [passages + 1], `terms` and `weights` [postings] are rows. Gives where each term's
    postings start, int64 [dimensions + 1], then passages counted from `low` and weights [postings].
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
    """Put a block's passages into the top-k of each query: `rows` int64, `scores` float32 [queries, k].

    Queries are rows (CSR); the block holds `count` passages, the first of which is passage `first`. Those of
    `removed`, int64, counted from `first`, are not found. Blocks must come in passage order, so that of equal
    scores the earlier passage stays.
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
            for passage in range(start, stop):  # without a branch: it becomes one comparison of 16 at once
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
