"""The compiled loops of exact search: a block of passages and its part in the top-k of each query.

Scores are summed in float32, one query term after the other, as in a plain sparse product. There is no fused
multiply-add and no reordering, so equal vectors have equal scores at every position.

Most passages need no such sum: their bound is not above the lowest score of the top-k, and no score is above
its bound. Bounds are sums of 8-bit weights, rounded up, in 16-bit integers; a term that many passages have is
a row of such weights, and 32 of them are added at once. (Block-Max Pruning, Mallia et al., SIGIR 2024, has a
bound for several passages together.)
"""

from typing import Any, Final

import numpy as np
from numba import njit
from numpy.typing import NDArray

_STRIDE: Final = 64  # passages that are compared at once
_FEW_PASSAGES: Final = 8  # passages of a block that are scored one by one; for more of them all are scored
_STEPS: Final = 257  # the largest 16-bit integer divided by the largest 8-bit weight
_MOST_TERMS: Final = 128  # of a query that has bounds; for more of them the steps would be too rough


@njit(nogil=True, cache=True)
def look_up(table: NDArray[Any], codes: NDArray[Any], found: NDArray[Any]) -> None:
    """Write `table[codes]` to `found`, in a fifth of NumPy's time.

    Args:
        table: The value of each code, float32 [codes of the type].
        codes: uint8 or uint16 [n].
        found: Receives the values, float32 [n].
    """
    for place in range(len(codes)):
        found[place] = table[codes[place]]


@njit(nogil=True, cache=True)
def round_up(
    uses: NDArray[Any],
    starts: NDArray[Any],
    passages: NDArray[Any],
    weights: NDArray[Any],
    row_of: NDArray[Any],
    small: NDArray[Any],
    full_rows: NDArray[Any],
    small_rows: NDArray[Any],
) -> NDArray[Any]:
    """Round weights up to 255ths of the largest weight of their term; write some terms as rows of weights.

    Args:
        uses: How many queries have each term [dimensions]; terms without queries are passed over.
        starts: Where the postings of each term start, int64 [dimensions + 1].
        passages: The passages of the postings, counted from the first of the block, uint16 [postings].
        weights: Their weights, float32 [postings].
        row_of: The row of each term, or -1, int32 [dimensions].
        small: For the weights of the postings, rounded up, uint8 [postings].
        full_rows: For rows of weights, float32 [rows, passages], filled up to a multiple of 64 passages.
        small_rows: For rows of weights rounded up, uint8, likewise.

    Returns:
        The largest weight of each term, float32 [dimensions], or infinity if it has a weight below 0: then
        no query has bounds.
    """
    largest = np.zeros(len(uses), np.float32)
    full_rows[:] = 0
    small_rows[:] = 0
    for term in range(len(uses)):
        own = slice(starts[term], starts[term + 1])
        if uses[term] == 0 or own.start == own.stop:
            continue
        own_weights, own_small, own_passages = weights[own], small[own], passages[own]
        for weight in own_weights:
            largest[term] = max(largest[term], weight if weight >= 0 else np.float32(np.inf))
        steps = np.float32(255) / largest[term] if largest[term] > 0 else np.float32(0)
        for place in range(len(own_weights)):
            own_small[place] = np.uint8(min(np.ceil(own_weights[place] * steps), np.float32(255)))
        if row_of[term] >= 0:
            full_row, small_row = full_rows[row_of[term]], small_rows[row_of[term]]
            for place in range(len(own_weights)):
                full_row[own_passages[place]] = own_weights[place]
                small_row[own_passages[place]] = own_small[place]
    return largest


@njit(nogil=True, cache=True)
def search_block(
    query_starts: NDArray[Any],
    query_terms: NDArray[Any],
    query_weights: NDArray[Any],
    starts: NDArray[Any],
    passages: NDArray[Any],
    weights: NDArray[Any],
    row_of: NDArray[Any],
    largest: NDArray[Any],
    small: NDArray[Any],
    full_rows: NDArray[Any],
    small_rows: NDArray[Any],
    count: int,
    first: int,
    removed: NDArray[Any],
    rows: NDArray[Any],
    scores: NDArray[Any],
) -> None:
    """Update the top-k of each query with a block of passages.

    Blocks must come in passage order: then the earlier of two passages with equal scores stays.

    Args:
        query_starts: Where the terms of each query start (CSR), int64 [queries + 1].
        query_terms: Their term ids.
        query_weights: Their weights.
        starts: Where the postings of each term start, int64 [dimensions + 1].
        passages: The passages of the postings, counted from `first`, uint16 [postings].
        weights: Their weights, float32 [postings].
        row_of: The row of each term, or -1, int32 [dimensions].
        largest: The largest weight of each term, as `round_up` returned it.
        small: The weights of the postings as `round_up` wrote them; so are the next two.
        full_rows: Rows of weights.
        small_rows: Rows of weights rounded up.
        count: The number of passages in the block.
        first: The row of the first passage.
        removed: Passages that cannot be found, int64, counted from `first`.
        rows: The rows of the top-k, int64 [queries, k], changed in place.
        scores: The scores of the top-k, float32 [queries, k], changed in place.
    """
    width = full_rows.shape[1]
    sums = np.empty(width, np.float32)
    steps = np.empty(width, np.uint16)
    few, every = np.empty(_FEW_PASSAGES, np.int64), np.empty(width, np.int64)
    size = largest.max()
    for query in range(len(query_starts) - 1):
        own = slice(query_starts[query], query_starts[query + 1])
        terms, factors = query_terms[own], query_weights[own]
        # The rounding errors of a score and of its bound, more than doubled.
        slack = 2.0**-22 * (len(terms) + 8) * np.abs(factors).sum() * size
        unit = _unit(terms, factors, largest)
        found = -1
        if unit > 0 and scores[query, -1] - slack > 0:
            _add_steps(steps, terms, factors, starts, passages, row_of, largest, small, small_rows, unit)
            for passage in removed:
                steps[passage] = 0
            found = _above(steps, np.uint16(min((scores[query, -1] - slack) / unit, 65535.0)), few)
        if found < 0:
            _add(sums, terms, factors, starts, passages, weights, row_of, full_rows)
            sums[count:] = -np.inf
            for passage in removed:
                sums[passage] = -np.inf
            found = _above(sums, scores[query, -1], every)
            _take(sums, every[:found], first, rows[query], scores[query])
            continue
        for place in range(found):
            passage = few[place]
            sums[passage] = _passage_score(
                passage, terms, factors, starts, passages, weights, row_of, full_rows
            )
        _take(sums, few[:found], first, rows[query], scores[query])


@njit(nogil=True, cache=True)
def _unit(terms: NDArray[Any], factors: NDArray[Any], largest: NDArray[Any]) -> float:
    """What a step of the bounds of a query is worth; 0 if the query has no bounds."""
    most = 0.0
    for place in range(len(terms)):
        if factors[place] < 0:
            return 0.0
        most += np.float64(factors[place]) * largest[terms[place]]
    if len(terms) > _MOST_TERMS or not most < np.inf:
        return 0.0
    return most / ((_STEPS - len(terms)) * 255.0)


@njit(nogil=True, cache=True)
def _add_steps(
    steps: NDArray[Any],
    terms: NDArray[Any],
    factors: NDArray[Any],
    starts: NDArray[Any],
    passages: NDArray[Any],
    row_of: NDArray[Any],
    largest: NDArray[Any],
    small: NDArray[Any],
    small_rows: NDArray[Any],
    unit: float,
) -> None:
    """Write the bounds of all passages of the block, in units. None is above 65,535."""
    steps[:] = 0
    for place in range(len(terms)):
        term = terms[place]
        times = np.uint16(np.ceil(np.float64(factors[place]) * largest[term] / (unit * 255.0)))
        if times == 0:
            continue
        if row_of[term] >= 0:
            row = small_rows[row_of[term]]
            for passage in range(len(steps)):
                steps[passage] += times * np.uint16(row[passage])
        else:
            # In slices the compiler knows that no index is negative.
            own_passages = passages[starts[term] : starts[term + 1]]
            own_small = small[starts[term] : starts[term + 1]]
            for posting in range(len(own_passages)):
                steps[own_passages[posting]] += times * np.uint16(own_small[posting])


@njit(nogil=True, cache=True)
def _add(
    sums: NDArray[Any],
    terms: NDArray[Any],
    factors: NDArray[Any],
    starts: NDArray[Any],
    passages: NDArray[Any],
    weights: NDArray[Any],
    row_of: NDArray[Any],
    full_rows: NDArray[Any],
) -> None:
    """Write the scores of all passages of the block."""
    sums[:] = 0
    for place in range(len(terms)):
        term, factor = terms[place], factors[place]
        if row_of[term] >= 0:
            row = full_rows[row_of[term]]
            for passage in range(len(sums)):
                sums[passage] += factor * row[passage]
        else:
            own_passages = passages[starts[term] : starts[term + 1]]
            own_weights = weights[starts[term] : starts[term + 1]]
            for posting in range(len(own_passages)):
                sums[own_passages[posting]] += factor * own_weights[posting]


@njit(nogil=True, cache=True)
def _passage_score(
    passage: int,
    terms: NDArray[Any],
    factors: NDArray[Any],
    starts: NDArray[Any],
    passages: NDArray[Any],
    weights: NDArray[Any],
    row_of: NDArray[Any],
    full_rows: NDArray[Any],
) -> Any:
    """The score of one passage: the same sum as that of `_add`."""
    score = np.float32(0)
    for place in range(len(terms)):
        term = terms[place]
        if row_of[term] >= 0:
            score += factors[place] * full_rows[row_of[term], passage]
            continue
        own = passages[starts[term] : starts[term + 1]]
        low, left = np.int64(0), len(own)
        while left > 1:  # halving without a branch, which the processor could not foresee
            half = left >> 1
            low += half * np.int64(own[low + half] <= passage)
            left -= half
        if left and own[low] == passage:
            score += factors[place] * weights[starts[term] + low]
    return score


@njit(nogil=True, cache=True)
def _above(values: NDArray[Any], lowest: Any, found: NDArray[Any]) -> int:
    """Write the places of the values above `lowest`, and give their number; -1 if they are too many."""
    count = 0
    for start in range(0, len(values), _STRIDE):
        above = np.int32(0)
        part = values[start : start + _STRIDE]
        for place in range(_STRIDE):  # no branch and a known length: many are compared at once
            above |= np.int32(part[place] > lowest)
        if above:
            for place in range(_STRIDE):
                if part[place] > lowest:
                    if count == len(found):
                        return -1
                    found[count] = start + place
                    count += 1
    return count


@njit(nogil=True, cache=True)
def _take(
    sums: NDArray[Any], places: NDArray[Any], first: int, rows: NDArray[Any], scores: NDArray[Any]
) -> None:
    """Put passages of a block into the top-k of a query; the first row of the block is `first`."""
    last = len(scores) - 1
    lowest = scores[last]
    for number in range(len(places)):
        score = sums[places[number]]
        if score > lowest:
            rank = last
            while rank > 0 and scores[rank - 1] < score:
                scores[rank] = scores[rank - 1]
                rows[rank] = rows[rank - 1]
                rank -= 1
            scores[rank] = score
            rows[rank] = first + places[number]
            lowest = scores[last]
