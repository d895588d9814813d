"""Vectors on disk and exact top-k over them.

Sparse vectors are stored inverted, in blocks of consecutive passages: for each term of a block the passages
that have it, with their weights in float16, 8 bits or float32. Search is exact over the stored
weights; ties go to the earlier passage. Sparse scores do not depend on the sharding, except with 8-bit
weights, whose step depends on the shard. The last bits of dense scores depend on it, because those of a
matrix product depend on its shape.
"""

import functools
import json
import logging
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, NamedTuple, TypeAlias

import numpy as np
import pyarrow as pa
import scipy.sparse as sp

from scaledown.errors import ModelError
from scaledown.run.executor import cores

Array: TypeAlias = np.ndarray[Any, Any]
Vectors: TypeAlias = sp.csr_matrix | Array

_NO_ROWS: Final[Array] = np.empty(0, np.int64)
_DENSE: Final = "dense"  # the column of dense vectors
_BLOCK_PASSAGES: Final = 4096  # passages; their scores fit into the processor's first-level cache
# A term of a block becomes a row of weights, which is added without looking up passages, if at least one in
# `_ROW_SHARE` passages has it and `_ROW_USES` queries use it. The rows of a block take at most 5 MB.
_ROW_SHARE: Final = 8
_ROW_USES: Final = 4
_ROWS: Final = 256

log = logging.getLogger(__name__)


def pack(vectors: Vectors, weights: str = "float16") -> pa.Table:
    """Pack vectors as a shard: lists of terms and weights, or rows of float32 for dense vectors.

    Args:
        vectors: [n, dimensions], sparse or dense.
        weights: The type of sparse weights: float16, float32 or uint8. For uint8 a weight is rounded to one
            of 255 equal steps up to the shard's largest weight; postings whose weight becomes 0 are left out.

    Returns:
        A table with n rows.

    Raises:
        ModelError: A value is not finite.
    """
    check_finite(vectors)
    if not sp.issparse(vectors):
        values = pa.array(np.ascontiguousarray(vectors, dtype=np.float32).ravel())
        return pa.table({_DENSE: pa.FixedSizeListArray.from_arrays(values, vectors.shape[1])})
    csr = sp.csr_matrix(vectors, copy=True)
    csr.sum_duplicates()
    step = 1.0
    if weights == "uint8":
        step = float(csr.data.max(initial=0)) / 255 or 1.0
        csr = sp.csr_matrix((np.rint(csr.data / step), csr.indices, csr.indptr), shape=csr.shape)
        csr.eliminate_zeros()
    count, dimensions = csr.shape
    firsts = range(0, count, _BLOCK_PASSAGES)
    blocks = [_inverted(csr[first : first + _BLOCK_PASSAGES]) for first in firsts]

    def lists(**fields: tuple[Sequence[Array], str]) -> pa.LargeListArray:
        """A list for each passage: that of its block for the first passage of a block, else an empty one."""
        values = [
            np.concatenate([np.empty(0, kind), *(array.astype(kind) for array in arrays)])
            for arrays, kind in fields.values()
        ]
        ends = np.zeros(count + 1, np.int64)
        for first, own in zip(firsts, next(iter(fields.values()))[0], strict=True):
            ends[first + 1] = len(own)
        struct = pa.StructArray.from_arrays(list(map(pa.array, values)), list(fields))
        return pa.LargeListArray.from_arrays(pa.array(np.cumsum(ends)), struct)

    term = "uint16" if dimensions <= 1 << 16 else "uint32"
    table = pa.table(
        {
            "terms": lists(
                term=([block.terms for block in blocks], term),
                postings=([block.counts for block in blocks], "uint16"),
            ),
            "postings": lists(
                passage=([block.passages for block in blocks], "uint16"),
                weight=([block.weights for block in blocks], weights),
            ),
        }
    )
    described = {"dimensions": dimensions, "step": step, "block": _BLOCK_PASSAGES}
    return table.replace_schema_metadata({name: repr(own) for name, own in described.items()})


class _Block(NamedTuple):
    """The postings of consecutive passages, sorted by term, then by passage."""

    terms: Array
    """The terms that occur, ascending [terms]."""
    counts: Array
    """The number of postings of each [terms]."""
    passages: Array
    """Passages counted from the first of the block, uint16 [postings]."""
    weights: Array
    """Weights [postings]."""

    def starts(self, dimensions: int) -> Array:
        """Where the postings of each term of the vocabulary start, int64 [dimensions + 1]."""
        starts = np.zeros(dimensions + 1, np.int64)
        starts[1:][self.terms] = self.counts
        return np.cumsum(starts, out=starts)


def _inverted(rows: sp.csr_matrix) -> _Block:
    columns = rows.tocsc()
    counts = np.diff(columns.indptr)
    terms = np.flatnonzero(counts)
    return _Block(terms, counts[terms], columns.indices.astype(np.uint16), columns.data)


def zero_vectors(like: pa.Table, count: int) -> pa.Table:
    """Return a shard of vectors that are all zero.

    Args:
        like: A shard with the same schema.
        count: Number of vectors.
    """
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


def is_dense(shard: pa.Table) -> bool:
    """Whether the vectors of a shard are from a dense bi-encoder."""
    return _DENSE in shard.column_names


def unpack(shard: pa.Table) -> Vectors:
    """Return the vectors of a shard; the inverse of `pack`.

    Args:
        shard: A shard of vectors, also of earlier versions.

    Returns:
        float32 [n, dimensions]: CSR for sparse vectors, else an array.
    """
    if is_dense(shard):
        column = shard.column(_DENSE).combine_chunks()
        return column.flatten().to_numpy().reshape(len(column), column.type.list_size)
    if "weights" in shard.column_names:
        return _rows_of_shard(shard)
    count, dimensions, size = _shard_shape(shard)
    rows = [sp.csr_matrix((0, dimensions), dtype=np.float32)]
    for first, block in _blocks(shard, range(math.ceil(count / size)), _Room()):
        parts = (block.weights, block.passages.astype(np.int32), block.starts(dimensions))
        rows.append(sp.csc_matrix(parts, shape=(min(size, count - first), dimensions)).tocsr())
    return sp.vstack(rows, format="csr")


def _rows_of_shard(shard: pa.Table) -> sp.csr_matrix:
    """The vectors of a sparse shard of version 0.6 and before, which has them row by row."""
    terms, weights = (shard.column(name).combine_chunks() for name in ("terms", "weights"))
    values = _float32(weights.values.to_numpy(), shard, _Room())
    parts = (values, terms.values.to_numpy().astype(np.int32), terms.offsets.to_numpy())
    return sp.csr_matrix(parts, shape=_shard_shape(shard)[:2])


def postings(shard: pa.Table) -> int:
    """The number of postings of a sparse shard."""
    lists = shard.column("weights" if "weights" in shard.column_names else "postings").chunk(0)
    return len(lists.flatten())


def _shard_shape(shard: pa.Table) -> tuple[int, int, int]:
    """The passages of a sparse shard, its dimensions, and the passages of a block."""
    metadata = shard.schema.metadata
    return shard.num_rows, int(metadata[b"dimensions"]), int(metadata.get(b"block", _BLOCK_PASSAGES))


class _Room:
    """Arrays that a thread uses for one block after the other: memory is slow when it is first written to."""

    def __init__(self) -> None:
        self._arrays: dict[str, Array] = {}

    def take(self, name: str, count: int, kind: type) -> Array:
        """An array with any content; it is valid until the same name is taken again."""
        own = self._arrays.get(name)
        if own is None or len(own) < count:
            own = self._arrays[name] = np.empty(count, kind)
        return own[:count]


def _float32(weights: Array, shard: pa.Table, room: _Room) -> Array:
    """Stored weights as numbers."""
    from scaledown.data.retrieval.search_kernels import look_up

    if weights.dtype == np.float32:
        return weights
    found = room.take("weights", len(weights), np.float32)
    codes = weights.view(np.uint8 if weights.itemsize == 1 else np.uint16)
    look_up(_weight_table(weights.dtype, shard.schema.metadata[b"step"]), codes, found)
    return found


@functools.lru_cache(maxsize=8)
def _weight_table(kind: "np.dtype[Any]", step: bytes) -> Array:
    """The numbers that all codes of a type of weights mean, in multiples of `step`."""
    codes = np.arange(1 << 8 * kind.itemsize, dtype=f"u{kind.itemsize}")
    with np.errstate(invalid="ignore"):  # not a number, which no weight is
        table: Array = codes.view(kind).astype(np.float32) * np.float32(json.loads(step))
    return table


def _blocks(shard: pa.Table, numbers: range, room: _Room) -> Iterator[tuple[int, _Block]]:
    """Some blocks of a sparse shard, with float32 weights, each with its first passage.

    A block is valid until the next one is taken.
    """
    size = _shard_shape(shard)[2]
    if "weights" in shard.column_names:
        rows = _rows_of_shard(shard)
        for number in numbers:
            block = _inverted(rows[number * size : (number + 1) * size])
            block.passages.flags.writeable = False  # as in a mapped file: else the kernels are compiled twice
            yield number * size, block
        return
    terms, postings = (shard.column(name).chunk(0) for name in ("terms", "postings"))
    fields = [(terms, name) for name in ("term", "postings")] + [
        (postings, name) for name in ("passage", "weight")
    ]
    arrays = [(lists.offsets, lists.values.field(name).to_numpy()) for lists, name in fields]
    for number in numbers:
        first = number * size
        term, count, passage, weight = (
            values[offsets[first].as_py() : offsets[first + 1].as_py()] for offsets, values in arrays
        )
        yield first, _Block(term, count, passage, _float32(weight, shard, room))


class Ranking(NamedTuple):
    """The best passages of each query, best first."""

    rows: Array
    """Rows of passages, int64 [queries, k]."""
    scores: Array
    """Inner products, float32 [queries, k]."""


def search(
    queries: Vectors,
    shards: Sequence[Callable[[], pa.Table] | None],
    sizes: Sequence[int],
    k: int,
    *,
    threads: int = 0,
    removed: Array = _NO_ROWS,
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
    tasks = iter([(number, part) for number in range(len(shards)) for part in range(parts)])
    lock, failed = threading.Lock(), threading.Event()
    searched = 0.0

    def work(_: int) -> Ranking:
        nonlocal searched
        best, room = _nothing(queries.shape[0], k), _Room()
        while True:
            with lock:
                number, part = next(tasks, (None, 0))
            if number is None or failed.is_set():
                return best
            if (load := shards[number]) is None:
                continue
            shard = load()
            first, end = map(int, firsts[number : number + 2])
            own = _within(removed, first, end)
            if is_dense(shard):
                best = _dense(queries, unpack(shard), first, own, best)
            else:
                blocks = math.ceil(shard.num_rows / _shard_shape(shard)[2])
                mine = range(blocks * part // parts, blocks * (part + 1) // parts)
                _sparse(queries, shard, mine, best, room, first=first, removed=own)
            with lock:
                searched += sizes[number] / parts
                advance(searched / firsts[-1])

    def guarded(thread: int) -> Ranking:
        try:
            return work(thread)
        except BaseException:
            failed.set()  # the other threads end after their present shard
            raise

    with ThreadPoolExecutor(threads) as executor:
        try:
            found = list(executor.map(guarded, range(threads)))
        except BaseException:
            failed.set()  # also at Ctrl-C, which only this thread gets
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
    """Return the best passages of several rankings of the same queries; ties in passage order.

    Args:
        rankings: Rankings [queries, any number]. A row -1 stands for no passage.
        k: Passages for each query.

    Returns:
        [queries, k], or fewer columns if the rankings have fewer together.
    """
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


def _sparse(
    queries: sp.csr_matrix,
    shard: pa.Table,
    blocks: range,
    best: Ranking,
    room: _Room,
    *,
    first: int,
    removed: Array,
) -> None:
    """Search some blocks of a shard of sparse vectors that follow those in `best`, which changes."""
    from scaledown.data.retrieval.search_kernels import round_up, search_block

    count, dimensions, size = _shard_shape(shard)
    uses = np.bincount(queries.indices, minlength=dimensions)
    for low, block in _blocks(shard, blocks, room):
        high = min(low + size, count)
        postings = (block.starts(dimensions), block.passages, block.weights)
        saved = np.where(block.counts * _ROW_SHARE >= high - low, uses[block.terms], 0)
        some = np.flatnonzero(saved >= _ROW_USES)
        some = some[np.argsort(-saved[some] * block.counts[some], kind="stable")[:_ROWS]]
        row_of = np.full(dimensions, -1, np.int32)
        row_of[block.terms[some]] = np.arange(len(some))
        rows = _rows_for(len(some), high - low, room)
        small = room.take("small", len(block.weights), np.uint8)
        largest = round_up(uses, *postings, row_of, small, *rows)
        bounds = (row_of, largest, small, *rows)
        where = (high - low, first + low, _within(removed, low, high))
        search_block(queries.indptr, queries.indices, queries.data, *postings, *bounds, *where, *best)


def _rows_for(count: int, passages: int, room: _Room) -> tuple[Array, Array]:
    """Rows of weights, float32 and uint8, of passages filled up to a multiple of 64."""
    width = math.ceil(passages / 64) * 64
    return (
        room.take("full rows", count * width, np.float32).reshape(count, width),
        room.take("small rows", count * width, np.uint8).reshape(count, width),
    )


def warn_about_top_k(top_k: int, passages: int) -> None:
    """Log a warning if `top_k` is greater than the number of passages."""
    if top_k > passages:
        log.warning(
            "top-k %s is above the number of passages, %s: every query gets all of them", top_k, passages
        )
