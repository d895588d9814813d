"""The stages of vectors and of candidates: passages are encoded, and ranked for each query."""

import contextlib
import functools
import logging
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, NamedTuple, TypeAlias

import numpy as np
import pyarrow as pa

from scaledown.config.prepare import PrepareConfig
from scaledown.data.input.corpus import PassageTable
from scaledown.data.retrieval.encoders import Encoder
from scaledown.data.retrieval.index import (
    Array,
    Ranking,
    Vectors,
    check_finite,
    is_dense,
    pack,
    postings,
    search,
    stacked,
    warn_about_top_k,
    zero_vectors,
)
from scaledown.data.retrieval.parts import removed_rows
from scaledown.data.retrieval.seismic import CARES, Care, SeismicIndex, recall_of_search
from scaledown.errors import InputError, ScaleDownError
from scaledown.records import full_text
from scaledown.run.executor import threads_here
from scaledown.run.progress import no_progress, track, tracked
from scaledown.run.stage import Stage, together

log = logging.getLogger("scaledown")

Check: TypeAlias = Callable[[], None]
Find: TypeAlias = Callable[[Vectors, int, Callable[[float], None]], Ranking]

_QUERIES_AT_ONCE: Final = 8192
_DENSE_QUERIES_AT_ONCE: Final = 4096  # the last bits of dense scores depend on it
# The fewest queries in a search of a large index: reading it takes as long as a search of 600 queries.
_QUERIES_AT_LEAST: Final = 1024
_LARGE_INDEX: Final = 100_000  # passages
_QUERIES_COMPARED: Final = 256  # queries whose candidates' texts are compared at once
_RESULTS: Final = 1 << 22  # results in memory at once, where more passages than `top_k` are ranked
_COLLAPSED: Final = b"collapsed"
_SAMPLED: Final = 256  # queries on which the recall of approximate search is measured
_BYTES_A_QUERY: Final = 2048  # about a hundred terms, twice
_BYTES_A_RESULT: Final = 12  # a row and a score
# The size of a shard in memory divided by its size on disk: 3, or 5 if it has to be inverted.
_UNPACKED: Final = 5
_BYTES_OF_ROWS: Final = 8_000_000  # which a thread holds too: rows of weights of a block, and sums


def encode_passages(
    stage: Stage, passages: Stage, load: Callable[[], Encoder], weights: str, make: Callable[[Check], None]
) -> None:
    """Encode each shard of passages into a shard of vectors, while `make` makes further passages.

    Args:
        stage: The stage of vectors.
        passages: The stage of passages, which `make` finishes.
        load: Loads the encoder.
        weights: The type of sparse weights (see `pack`).
        make: Makes the passages, in its own thread. It is called with a function that raises when `make` must
            stop, and calls it often.
    """
    if stage.done():
        return
    with track("vectors", "passages", _total(passages) if passages.done() else None, stage=stage) as tracker:

        def work(shard: int) -> pa.Table:
            table = passages.table(shard)
            rows = table.select(["title", "text"]).to_pylist()
            texts = [full_text(row["title"], row["text"]) for row in rows]
            encoder = load()
            with stage.noting(shard, lambda: encoder.halving.count):
                vectors = encoder.documents(texts, tracker.advance, TokenLists(table.column("tokens")))
            return pack(vectors, weights)

        with _behind(make) as check:
            stage.complete_behind(
                passages, work, check, lambda like, shard: zero_vectors(like, passages.table(shard).num_rows)
            )
        tracker.total = _total(passages)
    rows = passages.finished().rows
    counts = {"passages": sum(rows)}
    if "terms" in stage.table(0).column_names:
        counts["postings"] = sum(postings(stage.table(shard)) for shard in range(len(rows)))
    stage.finish(rows, counts)


class TokenLists(Sequence[Array]):
    """A column of lists, as NumPy arrays without copies."""

    def __init__(self, column: pa.ChunkedArray) -> None:
        lists = column.combine_chunks()
        self._starts = lists.offsets.to_numpy()
        self._values = lists.values.to_numpy()

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __getitem__(self, row: Any) -> Any:
        return self._values[self._starts[row] : self._starts[row + 1]]


@contextlib.contextmanager
def _behind(make: Callable[[Check], None]) -> Iterator[Check]:
    """Run `make` in a thread. Yields a function that raises the exception of `make`, if there is one."""
    leave = threading.Event()

    def check() -> None:
        if leave.is_set():
            raise _EncodingStopped

    with ThreadPoolExecutor(1) as executor:
        making = executor.submit(make, check)
        try:
            yield lambda: making.result() if making.done() else None
            making.result()
        finally:
            leave.set()


class _EncodingStopped(ScaleDownError):  # noqa: N818 (not an error)
    """Making passages was stopped, because encoding has failed."""


def rank_passages(
    stage: Stage,
    queries: Stage,
    passages: Stage,
    vectors: Stage,
    load: Callable[[], Encoder],
    *,
    config: PrepareConfig,
    approximate: Callable[[float], SeismicIndex],
) -> None:
    """Rank the passages for each query: columns query_id, query, rows of passages and scores, best first.

    Of several passages with the same text, only the first is a candidate (see `distinct`).

    Several shards of queries are searched together, so that reading the vectors takes a small part of the
    time. Their number is limited by `--search_memory`, and to 8,192 queries (4,096 with dense vectors, 65,536
    in approximate search), which are searched again after a crash.

    Args:
        stage: The stage of candidates.
        queries: The stage of queries.
        passages: The stage of passages.
        vectors: The stage of their vectors.
        load: Loads the encoder.
        config: The run's settings.
        approximate: Opens the Seismic indexes, given a memory in GB.

    Raises:
        InputError: Approximate search does not reach `--min_recall`.
    """
    if stage.done():
        return
    rows = queries.finished().rows
    warn_about_top_k(config.top_k_retrieval, searched(vectors))
    plan = SearchPlan.of(vectors, config, len(config.part.of(len(rows))))
    top_k = config.top_k_retrieval
    exact = functools.partial(find_exactly, vectors, plan.threads)
    find: Find = exact
    depth = top_k + top_k // 4  # with some more, repeated texts seldom need a second search
    if config.search == "approximate":
        index = approximate(config.search_memory)
        sample = functools.cache(lambda: _sample_queries(queries, load))
        care = _care(stage, index, exact, sample, config)
        find, depth = functools.partial(_approximate, index, care, exact), top_k
    with tracked(stage, "retrieve", "queries", rows) as tracker:

        def work(group: range) -> list[pa.Table]:
            tables = [queries.table(shard) for shard in group]
            encoder = load()
            with stage.noting(group.start, lambda: encoder.halving.count):
                encoded = [
                    encoder.queries(table.column("query").to_pylist(), no_progress) for table in tables
                ]
            count = sum(table.num_rows for table in tables)
            before = tracker.done
            together = stacked(encoded)
            check_finite(together)
            ranking = find(
                together, depth, lambda share: tracker.advance(before + int(share * count) - tracker.done)
            )

            def deeper(some: Sequence[int], more: int) -> Ranking:
                return find(together[some], more, no_progress)

            found = distinct(ranking, top_k, searched(vectors), PassageTable(passages), deeper)
            made, first = [], 0
            for table in tables:
                own = found[first : first + table.num_rows]
                made.append(candidates_table(table, own))
                first += table.num_rows
            return made

        whole = stage.complete_together(len(rows), plan.shards_at_once, work)
    if whole:
        rows = stage.made()
        counts = {"queries": sum(rows), "candidates": 0, "collapsed": 0}
        for table in map(stage.table, range(len(rows))):
            counts["candidates"] += len(table.column("rows").combine_chunks().flatten())
            counts["collapsed"] += int((table.schema.metadata or {}).get(_COLLAPSED, 0))
        stage.finish(rows, {name: count for name, count in counts.items() if count or name != "collapsed"})


class Candidates(NamedTuple):
    """The passages found for a query, best first."""

    rows: Array
    """Rows of passages, int64 [passages]."""
    scores: Array
    """Their scores, float32 [passages]."""
    collapsed: int = 0
    """The number of passages left out because a better one has the same text."""


def distinct(
    ranking: Ranking,
    top_k: int,
    most: int,
    texts: PassageTable,
    deeper: Callable[[Sequence[int], int], Ranking],
) -> list[Candidates]:
    """The `top_k` best passages with different texts, for each query. Of equal texts, the first is kept.

    Args:
        ranking: The best passages of each query.
        top_k: Passages to keep for each query.
        most: The number of passages that can be found.
        texts: The passages.
        deeper: Ranks more passages, given the positions of some queries and the number of passages. It is
            called until each query has `top_k` texts, or all `most` passages are ranked.

    Returns:
        The candidates of each query.
    """
    found: list[Candidates] = [Candidates(*own) for own in zip(ranking.rows, ranking.scores, strict=True)]

    def keep(places: Sequence[int], ranking: Ranking) -> list[int]:
        """Keep passages with different texts; returns the positions of the queries that need more."""
        short = []
        for start in range(0, len(places), _QUERIES_COMPARED):
            block = slice(start, start + _QUERIES_COMPARED)
            names = texts.same(np.unique(ranking.rows[block]))
            parts = (places[block], ranking.rows[block], ranking.scores[block])
            for place, rows, scores in zip(*parts, strict=True):
                _, first = np.unique([names[row] for row in rows.tolist()], return_index=True)
                kept = np.sort(first)[:top_k]
                last = int(kept[-1]) + 1 if len(kept) == top_k else len(rows)
                found[place] = Candidates(rows[kept], scores[kept], last - len(kept))
                if len(kept) < min(top_k, most) and len(rows) < most:
                    short.append(place)
        return short

    short, depth = keep(range(len(found)), ranking), ranking.rows.shape[1]
    while short:
        depth = min(2 * depth, most)
        at_once = max(1, _RESULTS // depth)
        groups = [short[start : start + at_once] for start in range(0, len(short), at_once)]
        short = [place for group in groups for place in keep(group, deeper(group, depth))]
    return found


def find_exactly(
    vectors: Stage, threads: int, encoded: Vectors, top_k: int, advance: Callable[[float], None]
) -> Ranking:
    """Search the finished vectors of an index exactly.

    Args:
        vectors: The stage of vectors. Removed rows and shards that were given up are not found.
        threads: As for `search`.
        encoded: Vectors of queries [queries, dimensions].
        top_k: Passages for each query.
        advance: Called with the share of all passages searched so far, 0 to 1.

    Returns:
        [queries, min(top_k, passages that can be found)].
    """
    rows = vectors.finished().rows
    shards = [
        None if vectors.absent(shard) else functools.partial(vectors.table, shard, check=True)
        for shard in range(len(rows))
    ]
    removed = removed_rows(vectors)
    return search(encoded, shards, rows, top_k, threads=threads, removed=removed, advance=advance)


def _care(
    stage: Stage, index: SeismicIndex, exact: Find, sample: Callable[[], Vectors], config: PrepareConfig
) -> Care:
    """The fastest of `CARES` that reaches `--min_recall` on a sample of the queries.

    The measured recall is written to the stage's journal. Raises `InputError` if none of them reaches it.
    """
    index.build()
    top_k = config.top_k_retrieval
    with stage.lease("recall", wait=True):
        known = [event for event in stage.journal() if "recall" in event]
        if known and known[-1]["recall"] >= config.min_recall:
            return Care(known[-1]["query_cut"], known[-1]["heap_factor"])
        best = exact(sample(), top_k, no_progress)
        count = len(best.rows)
        for care in CARES:
            found = recall_of_search(_approximate(index, care, exact, sample(), top_k, no_progress), best)
            if found >= config.min_recall:
                log.info("approximate search: recall@%s %.4f on %s queries", top_k, found, count)
                stage.note({"recall": round(found, 6), "sample": count, **care._asdict()})
                return care
    raise InputError(
        f"--search approximate: recall@{top_k} is {found:.4f} on {count} queries, below --min_recall "
        f"{config.min_recall:g}: use --search exact, or lower the flag"
    )


def _approximate(  # noqa: PLR0917
    index: SeismicIndex,
    care: Care,
    exact: Find,
    encoded: Vectors,
    top_k: int,
    advance: Callable[[float], None],
) -> Ranking:
    ranking = index.search(encoded, top_k, care)
    # If too few passages share a term with a query, exact search adds others.
    short = np.flatnonzero((ranking.rows < 0).any(axis=1))
    if len(short):
        filled = exact(encoded[short], top_k, no_progress)
        width = filled.rows.shape[1]
        ranking = Ranking(ranking.rows[:, :width], ranking.scores[:, :width])
        ranking.rows[short], ranking.scores[short] = filled
    advance(1.0)
    return ranking


def _sample_queries(queries: Stage, load: Callable[[], Encoder]) -> Vectors:
    """Vectors of a sample of queries, evenly spaced."""
    rows = queries.finished().rows
    wanted = np.unique(np.linspace(0, sum(rows) - 1, min(sum(rows), _SAMPLED)).astype(int))
    ends = np.cumsum(rows)
    texts = []
    for shard in range(len(rows)):
        first = ends[shard] - rows[shard]
        own = wanted[(wanted >= first) & (wanted < ends[shard])] - first
        if len(own):
            texts += queries.table(shard).column("query").take(pa.array(own)).to_pylist()
    return load().queries(texts, no_progress)


class SearchPlan(NamedTuple):
    """How many threads search, and for how many queries, so that search fits `--search_memory`."""

    threads: int
    """Number of threads."""
    shards_at_once: int
    """Shards of queries searched together."""

    @classmethod
    def of(cls, vectors: Stage, config: PrepareConfig, shards: int) -> "SearchPlan":
        """Plan a search.

        Half of the memory is for vectors (a shard for each thread, or a Seismic index), the other half for
        queries and their results.

        Args:
            vectors: The finished stage of vectors.
            config: The run's settings.
            shards: Number of shards of queries to search.
        """
        half = config.search_memory * 1e9 / 2
        rows = vectors.finished().rows
        shard = max(vectors.size(number) for number in range(len(rows)))
        dense = is_dense(vectors.table(0))  # a dense product uses all cores itself
        per_thread = _UNPACKED * shard + _BYTES_OF_ROWS
        threads = 1 if dense else int(max(1, min(threads_here(), half // per_thread)))
        per_query = config.top_k_retrieval * _BYTES_A_RESULT * (threads + 2) + _BYTES_A_QUERY
        per_query += max(rows) * 4 if dense else 0
        most = _DENSE_QUERIES_AT_ONCE if dense else _QUERIES_AT_ONCE
        # Loading a Seismic index takes longer than loading vectors.
        most *= 8 if config.search == "approximate" else 1
        queries = min(most, half / per_query)
        at_once = int(max(1, queries // config.queries_per_shard))
        if dense:
            return cls(threads, at_once)
        least = math.ceil(_QUERIES_AT_LEAST / config.queries_per_shard) if sum(rows) >= _LARGE_INDEX else 1
        return cls(threads, max(together(shards, at_once), min(at_once, least, shards)))


def candidates_table(queries: pa.Table, found: Sequence[Candidates]) -> pa.Table:
    """Make the shard of candidates.

    Args:
        queries: The shard of queries: columns query_id and query.
        found: The candidates of each query.

    Returns:
        Columns query_id, query, rows list<int64>, scores list<float32>.
    """
    table = pa.table(
        {
            "query_id": queries.column("query_id"),
            "query": queries.column("query"),
            "rows": pa.array([own.rows for own in found], pa.list_(pa.int64())),
            "scores": pa.array([own.scores for own in found], pa.list_(pa.float32())),
        }
    )
    collapsed = sum(own.collapsed for own in found)
    return table.replace_schema_metadata({_COLLAPSED: str(collapsed)}) if collapsed else table


def searched(vectors: Stage) -> int:
    """The number of passages that can be found: without shards that were given up and removed passages."""
    present = sum(rows for shard, rows in enumerate(vectors.finished().rows) if not vectors.absent(shard))
    return present - len(removed_rows(vectors))


def _total(stage: Stage) -> int:
    return sum(stage.finished().rows)
