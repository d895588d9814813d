"""Vectors on disk and exact top-k over them.

Sparse vectors are stored row by row (CSR): term ids in the smallest unsigned type, weights in float16, 8 bits
or float32. Search is exact over the stored vectors; ties go to the earlier passage. Sparse scores do not
depend on the sharding, except with 8-bit weights, because each shard has its own step. The last bits of dense
scores depend on it, because the rounding of a matrix product depends on its shape.
"""

import json
import logging
import math
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, NamedTuple, TypeAlias

import numpy as np
import pyarrow as pa
import scipy.sparse as sp

from scaledown.errors import ModelError
from scaledown.run.executor import cores

Array: TypeAlias = np.ndarray[Any, Any]
Vectors: TypeAlias = sp.csr_matrix | Array

_NONE: Final[Array] = np.empty(0, np.int64)
_BLOCK: Final = 4096  # passages; their scores fit into the processor's first-level cache

log = logging.getLogger(__name__)


def pack(vectors: Vectors, weights: str = "float16") -> pa.Table:
    """Vectors [n, dimensions] as a shard: lists of terms and weights, or rows of float32 for dense ones.

    With `weights="uint8"` a weight is rounded to one of 255 equal steps up to the shard's largest weight;
    postings whose weight becomes 0 are left out. Raises `ModelError` for values that are not finite.
    """
    check_finite(vectors)
    if not sp.issparse(vectors):
        values = pa.array(np.ascontiguousarray(vectors, dtype=np.float32).ravel())
        return pa.table({"dense": pa.FixedSizeListArray.from_arrays(values, vectors.shape[1])})
    csr = sp.csr_matrix(vectors, copy=True)
    step = 1.0
    if weights == "uint8":
        step = float(csr.data.max(initial=0)) / 255 or 1.0
        csr = sp.csr_matrix((np.rint(csr.data / step), csr.indices, csr.indptr), shape=csr.shape)
        csr.eliminate_zeros()
    csr.sort_indices()
    terms = np.uint16 if csr.shape[1] <= 1 << 16 else np.uint32
    starts = pa.array(csr.indptr, pa.int64())
    columns = {
        "terms": pa.LargeListArray.from_arrays(starts, pa.array(csr.indices.astype(terms))),
        "weights": pa.LargeListArray.from_arrays(starts, pa.array(csr.data.astype(weights))),
    }
    return pa.table(columns).replace_schema_metadata({"dimensions": str(csr.shape[1]), "step": repr(step)})


def nothing(like: pa.Table, count: int) -> pa.Table:
    """A shard of `count` vectors that are all zero, with the schema of `like`."""
    column = like.schema.field(0).type
    if isinstance(column, pa.FixedSizeListType):
        return pack(np.zeros((count, column.list_size), np.float32))
    return pa.table(
        {name: pa.array([[]] * count, like.schema.field(name).type) for name in like.column_names}
    ).replace_schema_metadata(like.schema.metadata)


def stacked(parts: Sequence[Vectors]) -> Vectors:
    """Concatenate the vectors of several parts to [n, dimensions]."""
    return sp.vstack(parts, format="csr") if sp.issparse(parts[0]) else np.concatenate(parts)


def check_finite(vectors: Vectors) -> None:
    """Raise `ModelError` for vectors with NaN or infinity, since a search cannot rank them."""
    values = vectors if isinstance(vectors, np.ndarray) else vectors.data
    if not np.isfinite(values).all():
        raise ModelError("the retriever gave vectors that are not numbers: try --dtype float32")


def unpack(shard: pa.Table) -> Vectors:
    """The inverse of `pack`, in float32."""
    if "dense" in shard.column_names:
        column = shard.column("dense").combine_chunks()
        return column.flatten().to_numpy().reshape(len(column), column.type.list_size)
    starts, terms, weights = _postings(shard)
    parts = (weights, terms.astype(np.int32), starts)
    return sp.csr_matrix(parts, shape=(len(starts) - 1, int(shard.schema.metadata[b"dimensions"])))


def _postings(shard: pa.Table) -> tuple[Array, Array, Array]:
    """The arrays of a sparse shard: starts int64 [n + 1], terms (a view) and weights float32 [postings]."""
    terms, weights = (shard.column(name).combine_chunks() for name in ("terms", "weights"))
    starts = terms.offsets.to_numpy()
    step = np.float32(json.loads(shard.schema.metadata[b"step"]))
    values = weights.values.to_numpy()[starts[0] : starts[-1]].astype(np.float32)
    if step != 1:
        values *= step
    return starts - starts[0], terms.values.to_numpy()[starts[0] : starts[-1]], values


class Ranking(NamedTuple):
    """Top-k of a block of queries, best first: rows of passages int64 and scores float32 [queries, k]."""

    rows: Array
    scores: Array


def search(
    queries: Vectors,
    shards: Sequence[Callable[[], pa.Table] | None],
    sizes: Sequence[int],
    k: int,
    *,
    threads: int = 0,
    removed: Array = _NONE,
    advance: Callable[[float], None] = lambda _: None,
) -> Ranking:
    """The `k` best passages of each query by inner product.

    If fewer than `k` passages share a term with a query, others follow with score 0 in passage order.

    Args:
        queries: Vectors [queries, dimensions].
        shards: Functions that load the packed vectors of a shard, in passage order; None for a shard whose
            passages cannot be found.
        sizes: The number of passages of each shard.
        k: Passages for each query.
        threads: Threads; 0 is one for each core. Each holds one shard at a time; if there are more threads
            than shards, each holds a part of a shard. Dense vectors are searched by one thread.
        removed: Rows of passages that cannot be found, int64, ascending.
        advance: Called with the share of all passages searched so far.

    Returns:
        A ranking with min(k, passages that can be found) columns.
    """
    queries = _canonical(queries)
    firsts = np.concatenate([[0], np.cumsum(sizes)])
    loaded = [number for number, load in enumerate(shards) if load]
    k = min(k, sum(sizes[number] - len(_within(removed, *firsts[number : number + 2])) for number in loaded))
    # A dense product uses all cores itself.
    threads = (threads or cores()) if sp.issparse(queries) else 1
    parts = math.ceil(threads / len(shards))
    spans = iter(
        [
            (number, size * part // parts, size * (part + 1) // parts)
            for number, size in enumerate(sizes)
            for part in range(parts)
        ]
    )
    lock, failed = threading.Lock(), threading.Event()
    searched = 0

    def work(_: int) -> Ranking:
        nonlocal searched
        best = _nothing(queries.shape[0], k)
        while True:
            with lock:
                number, low, high = next(spans, (None, 0, 0))
            if number is None or failed.is_set():
                return best
            if (load := shards[number]) is None:
                continue
            shard = load().slice(low, high - low)
            first = int(firsts[number]) + low
            own = _within(removed, first, first + shard.num_rows)
            if "dense" in shard.column_names:
                best = _dense(queries, unpack(shard), first, own, best)
            else:
                _sparse(queries, shard, first, own, best)
            with lock:
                searched += high - low
                advance(searched / firsts[-1])

    with ThreadPoolExecutor(threads) as executor:
        try:
            found = list(executor.map(work, range(threads)))
        except BaseException:
            failed.set()  # the other threads end after their present shard
            raise
    return best_of(found, k)


def _within(rows: Array, first: int, end: int) -> Array:
    """The part of ascending `rows` in [first, end), counted from `first`."""
    return rows[np.searchsorted(rows, first) : np.searchsorted(rows, end)] - first


def _canonical(queries: Vectors) -> Vectors:
    """Sparse queries with the types that the kernels are compiled for."""
    if isinstance(queries, np.ndarray):
        return queries
    types = ((queries.data, np.float32), (queries.indices, np.int32), (queries.indptr, np.int64))
    return sp.csr_matrix(tuple(array.astype(kind) for array, kind in types), shape=queries.shape)


def _nothing(queries: int, k: int) -> Ranking:
    return Ranking(np.full((queries, k), -1, np.int64), np.full((queries, k), -np.inf, np.float32))


def best_of(rankings: Sequence[Ranking], k: int) -> Ranking:
    """The `k` best of several rankings of the same queries; ties in passage order."""
    rows = np.concatenate([ranking.rows for ranking in rankings], axis=1)
    scores = np.concatenate([ranking.scores for ranking in rankings], axis=1)
    order = np.lexsort((rows, -scores), axis=1)[:, :k]
    return Ranking(np.take_along_axis(rows, order, 1), np.take_along_axis(scores, order, 1))


def _dense(queries: Array, shard: Array, first: int, removed: Array, best: Ranking) -> Ranking:
    scores = queries @ shard.T  # [queries, passages]
    scores[:, removed] = -np.inf
    k = min(best.rows.shape[1], scores.shape[1])
    rows = np.empty((len(scores), k), np.int64)
    threshold = np.partition(scores, -k, axis=1)[:, -k]
    for number, row in enumerate(scores):
        candidates = np.flatnonzero(row >= threshold[number])  # all ties, so that the earlier passages win
        rows[number] = candidates[np.argsort(-row[candidates], kind="stable")[:k]]
    found = Ranking(rows + first, np.take_along_axis(scores, rows, 1))
    return best_of([best, found], best.rows.shape[1])


def _sparse(queries: sp.csr_matrix, shard: pa.Table, first: int, removed: Array, best: Ranking) -> None:
    """Search a shard of sparse vectors and change `best`, which has only passages of earlier rows."""
    from scaledown.data.retrieval.search_kernels import invert, search_block

    starts, terms, weights = _postings(shard)
    dimensions = int(shard.schema.metadata[b"dimensions"])
    for low in range(0, shard.num_rows, _BLOCK):
        high = min(low + _BLOCK, shard.num_rows)
        inverted = invert(starts, terms, weights, low, high, dimensions)
        block = (*inverted, high - low, first + low, _within(removed, low, high))
        search_block(queries.indptr, queries.indices, queries.data, *block, *best)


def warn_about_top_k(top_k: int, passages: int) -> None:
    """Log a warning if `top_k` is greater than the number of passages."""
    if top_k > passages:
        log.warning(
            "top-k %s is above the number of passages, %s: every query gets all of them", top_k, passages
        )
