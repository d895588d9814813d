"""The compiled loops that compare questions: candidates from bands of MinHash, then Jaccard similarity."""

from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray


@njit(nogil=True, cache=True)
def jaccard(left: NDArray[Any], right: NDArray[Any]) -> float:
    """Compute the Jaccard similarity of two sets.

    Args:
        left: Ascending, without duplicates, not empty, uint64.
        right: The same.

    Returns:
        0 to 1.
    """
    one = other = common = 0
    while one < len(left) and other < len(right):
        if left[one] == right[other]:
            common += 1
            one += 1
            other += 1
        elif left[one] < right[other]:
            one += 1
        else:
            other += 1
    return common / (len(left) + len(right) - common)


@njit(nogil=True, cache=True)
def match(  # noqa: PLR0917
    slots: NDArray[Any],
    starts: NDArray[Any],
    items: NDArray[Any],
    numbers: NDArray[Any],
    least: float,
    find: bool,
    add: bool,
    heads: NDArray[Any],
    links: NDArray[Any],
    known_starts: NDArray[Any],
    known_items: NDArray[Any],
    known_numbers: NDArray[Any],
    count: int,
    rows: NDArray[Any],
    scores: NDArray[Any],
) -> None:
    """Compare questions with the known ones, in order.

    A question has a slot in each band. The known questions of a slot are a linked list: `heads` has the last
    of them, and `links` the one before each. In both, n stands for question n - 1, and 0 for the end. The
    arrays of known questions must have room for all questions.

    Args:
        slots: The slot of each question in each band, int64 [questions, bands].
        starts: Where the set of each question starts in `items`, int64 [questions + 1].
        items: The sorted sets, one after the other, uint64.
        numbers: A hash of the numbers in each question, uint64 [questions]. Only questions with the same hash
            can match.
        least: The least Jaccard similarity of a match.
        find: Whether to look for matches.
        add: Whether questions without a match become known.
        heads: int32 [bands, slots], changed in place.
        links: int32 [known, bands], changed in place.
        known_starts: The `starts` of known questions, changed in place.
        known_items: Their `items`, changed in place.
        known_numbers: Their `numbers`, changed in place.
        count: The number of known questions.
        rows: Results, int64 [questions]: the most similar known question, the earliest of several, or -1.
        scores: Results, float64 [questions]: its similarity.
    """
    compared = np.full(count + len(slots), -1, np.int64)  # the last question each known one was compared with
    for row in range(len(slots)):
        own = items[starts[row] : starts[row + 1]]
        best, score = -1, least
        for band in range(slots.shape[1] if find else 0):
            link = heads[band, slots[row, band]]
            while link:
                other = link - 1
                link = links[other, band]
                if compared[other] == row or known_numbers[other] != numbers[row]:
                    continue
                compared[other] = row
                low, high = known_starts[other], known_starts[other + 1]
                if min(len(own), high - low) < least * max(len(own), high - low):
                    continue
                share = jaccard(own, known_items[low:high])
                if share > score or (share == score and (best < 0 or other < best)):
                    best, score = other, share
        rows[row], scores[row] = best, score
        if add and best < 0:
            low = known_starts[count]
            known_items[low : low + len(own)] = own
            known_starts[count + 1] = low + len(own)
            known_numbers[count] = numbers[row]
            for band in range(slots.shape[1]):
                links[count, band] = heads[band, slots[row, band]]
                heads[band, slots[row, band]] = count + 1
            count += 1
