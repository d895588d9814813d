"""Vectors on disk and exact top-k over them.

Sparse vectors are stored as CSR: term ids in the smallest unsigned type, weights in float16. Search is
exact over what is stored; ties go to the earlier passage. Sparse scores do not depend on the sharding; dense
ones do in their last bits, because a matrix product does.
"""

import os
from collections.abc import Iterable, Mapping
from typing import Any, Final, NamedTuple, TypeAlias

import numpy as np
import scipy.sparse as sp

Array: TypeAlias = np.ndarray[Any, Any]
Vectors: TypeAlias = sp.csr_matrix | Array


def pack(vectors: Vectors) -> dict[str, Array]:
    """Vectors [n, dimensions] as the arrays of a shard: CSR for sparse ones, a matrix for dense ones."""
    if not sp.issparse(vectors):
        return {"dense": np.ascontiguousarray(vectors, dtype=np.float32)}
    csr = sp.csr_matrix(vectors)
    csr.sort_indices()
    terms = np.uint16 if csr.shape[1] <= 1 << 16 else np.uint32
    return {
        "indptr": csr.indptr.astype(np.int64),
        "indices": csr.indices.astype(terms),
        "data": csr.data.astype(np.float16),
        "dimensions": np.array(csr.shape[1], dtype=np.int64),
    }


def unpack(arrays: Mapping[str, Array]) -> Vectors:
    """The inverse of `pack`, in float32."""
    if "dense" in arrays:
        return arrays["dense"]
    shape = (len(arrays["indptr"]) - 1, int(arrays["dimensions"]))
    parts = (arrays["data"].astype(np.float32), arrays["indices"].astype(np.int32), arrays["indptr"])
    return sp.csr_matrix(parts, shape=shape)


_THREADS: Final = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


class Ranking(NamedTuple):
    """Top-k of a block of queries, best first: passage rows int64 [queries, k], scores float32 likewise."""

    rows: Array
    scores: Array


def search(queries: Vectors, shards: Iterable[Vectors], k: int) -> Ranking:
    """The `k` best passages of each query by inner product, over shards in passage order.

    Gives min(k, passages) columns; where fewer passages share a term with the query, the rest follow with
    score 0 in passage order. One shard is in memory at a time.
    """
    count = queries.shape[0]
    best = Ranking(np.empty((count, 0), np.int64), np.empty((count, 0), np.float32))
    total = 0
    for shard in shards:
        found = _sparse_top(queries, shard, k) if sp.issparse(shard) else _dense_top(queries, shard, k)
        best = _merge(best, Ranking(found.rows + total, found.scores), k)
        total += shard.shape[0]
    return best


def _merge(a: Ranking, b: Ranking, k: int) -> Ranking:
    rows = np.concatenate([a.rows, b.rows], axis=1)
    scores = np.concatenate([a.scores, b.scores], axis=1)
    order = np.lexsort((rows, -scores), axis=1)[:, :k]
    return Ranking(np.take_along_axis(rows, order, 1), np.take_along_axis(scores, order, 1))


def _dense_top(queries: Array, shard: Array, k: int) -> Ranking:
    scores = queries @ shard.T  # [queries, passages]
    k = min(k, scores.shape[1])
    rows = np.empty((len(scores), k), np.int64)
    threshold = np.partition(scores, -k, axis=1)[:, -k]
    for number, row in enumerate(scores):
        candidates = np.flatnonzero(row >= threshold[number])  # all of a tie, so that the earlier ones win
        rows[number] = candidates[np.argsort(-row[candidates], kind="stable")[:k]]
    return Ranking(rows, np.take_along_axis(scores, rows, 1))


def _sparse_top(queries: sp.csr_matrix, shard: sp.csr_matrix, k: int) -> Ranking:
    from sparse_dot_topn import sp_matmul, sp_matmul_topn

    passages = shard.shape[0]
    k = min(k, passages)
    columns = shard.T.tocsr()
    # One more than asked: where number k and k+1 tie, which of them came out is arbitrary, and the row is
    # done again in full.
    wanted = min(k + 1, passages)
    product = sp_matmul_topn(queries, columns, top_n=wanted, sort=True, n_threads=_THREADS)
    rows = np.empty((queries.shape[0], k), np.int64)
    scores = np.zeros((queries.shape[0], k), np.float32)
    for number in range(queries.shape[0]):
        low, high = product.indptr[number], product.indptr[number + 1]
        found, values = product.indices[low:high], product.data[low:high]
        if len(values) > k and values[k] == values[k - 1]:
            full = sp_matmul(queries[number], columns)
            found, values = full.indices, full.data
        order = np.lexsort((found, -values))[:k]
        rows[number, : len(order)] = found[order]
        scores[number, : len(order)] = values[order]
        if len(order) < k:
            rows[number, len(order) :] = _first_without(found, k - len(order))
    return Ranking(rows, scores)


def _first_without(taken: Array, count: int) -> Array:
    """The `count` smallest row numbers that are not in `taken`."""
    return np.setdiff1d(np.arange(len(taken) + count), taken)[:count]
