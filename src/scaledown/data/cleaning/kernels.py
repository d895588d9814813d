"""The compiled loop that compares questions: candidates by bands of MinHash, then Jaccard similarity."""

from typing import Any, TypeAlias

import numpy as np
from numba import njit

Array: TypeAlias = np.ndarray[Any, Any]


@njit(nogil=True, cache=True)
def jaccard(left: Array, right: Array) -> float:
    """Jaccard similarity of two sets, each sorted, without repetitions and not empty."""
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
    slots: Array,
    starts: Array,
    items: Array,
    numbers: Array,
    least: float,
    find: bool,
    add: bool,
    heads: Array,
    links: Array,
    known_starts: Array,
    known_items: Array,
    known_numbers: Array,
    count: int,
    rows: Array,
    scores: Array,
) -> None:
    """Compare questions with the first `count` known ones, in order.

    A question has a slot in each band, `slots` int64 [questions, bands], a sorted set, `items` uint64 from
    `starts` on, and `numbers` uint64, which must be equal. With `find`, the most similar known one that
    reaches `least` goes into `rows` int64, the earliest of several, with its similarity in `scores`
    float64; where there is none, -1. With `add`, questions without one become known.

    The known ones of a slot are a chain: `heads` int32 [bands, slots] has its last, `links` int32 [known,
    bands] the one before; 0 ends it, n is question n - 1. The arrays of the known have room for all.
    """
    asked = np.full(count + len(slots), -1, np.int64)  # which question a known one was last compared with
    for row in range(len(slots)):
        own = items[starts[row] : starts[row + 1]]
        best, score = -1, least
        for band in range(slots.shape[1] if find else 0):
            link = heads[band, slots[row, band]]
            while link:
                other = link - 1
                link = links[other, band]
                if asked[other] == row or known_numbers[other] != numbers[row]:
                    continue
                asked[other] = row
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
