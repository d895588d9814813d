import threading
from unittest import mock

import numpy as np
import pyarrow as pa
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st

from scaledown.config.prepare import PrepareConfig
from scaledown.data.retrieval import index, search_kernels, stages
from scaledown.data.retrieval.index import Ranking, pack, postings, search, unpack, zero_vectors
from scaledown.data.retrieval.stages import SearchPlan, find_exactly
from scaledown.errors import RunDirectoryError
from scaledown.run.directory import RunDirectory
from scaledown.run.progress import no_progress
from scaledown.run.stage import Stage


def in_memory(tables, queries, k: int, threads: int = 0, removed=()) -> Ranking:
    """Search packed shards."""
    shards = [lambda table=table: table for table in tables]
    sizes = [len(table) for table in tables]
    return search(queries, shards, sizes, k, threads=threads, removed=np.array(removed, np.int64))


def in_blocks(passages: int):
    """Pack with blocks of so few passages, and search with rows of weights for terms of any query."""
    return mock.patch.multiple(index, _BLOCK_PASSAGES=passages, _ROW_USES=1)


def by_rows(vectors: sp.csr_matrix, weights: str = "float16", step: float = 1.0) -> pa.Table:
    """A shard as version 0.6 wrote it; `vectors` are in multiples of `step`."""
    starts = pa.array(vectors.indptr, pa.int64())
    columns = {
        "terms": pa.LargeListArray.from_arrays(starts, pa.array(vectors.indices.astype(np.uint16))),
        "weights": pa.LargeListArray.from_arrays(starts, pa.array(vectors.data.astype(weights))),
    }
    metadata = {"dimensions": str(vectors.shape[1]), "step": repr(step)}
    return pa.table(columns).replace_schema_metadata(metadata)


def summed_in_order(queries: sp.csr_matrix, passages: sp.csr_matrix, k: int) -> Ranking:
    """The definition: float32 sums, term by term in the query's order; ties in passage order."""
    columns = passages.tocsc()
    scores = np.zeros((queries.shape[0], passages.shape[0]), np.float32)
    for query, sums in enumerate(scores):
        own = slice(queries.indptr[query], queries.indptr[query + 1])
        for term, weight in zip(queries.indices[own], queries.data[own], strict=True):
            having = slice(columns.indptr[term], columns.indptr[term + 1])
            sums[columns.indices[having]] += weight * columns.data[having]
    rows = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return Ranking(rows, np.take_along_axis(scores, rows, 1))


def assert_same(found: Ranking, expected: Ranking) -> None:
    np.testing.assert_array_equal(found.rows, expected.rows)
    np.testing.assert_array_equal(found.scores.view(np.int32), expected.scores.view(np.int32))


def brute_force(queries: np.ndarray, passages: np.ndarray, k: int) -> np.ndarray:
    """The rows of the `k` best scores, ties in passage order."""
    scores = queries @ passages.T
    return np.argsort(-scores, axis=1, kind="stable")[:, :k]


@st.composite
def problems(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, int, list[int]]:
    """Small integer vectors, so that ties are common and sums exact."""
    terms = draw(st.integers(1, 6))
    passages = draw(st.integers(1, 20))
    values = st.integers(0, 2)
    matrix = lambda n: np.array(  # noqa: E731
        draw(st.lists(st.lists(values, min_size=terms, max_size=terms), min_size=n, max_size=n)), np.float32
    )
    cuts = sorted({*draw(st.lists(st.integers(1, passages), max_size=3)), passages})
    return matrix(draw(st.integers(1, 4))), matrix(passages), draw(st.integers(1, 25)), cuts


@settings(max_examples=150, deadline=None)
@given(problems(), st.booleans(), st.integers(1, 7), st.sampled_from([3, 4096]))
def test_equals_brute_force_with_ties_however_the_shards_are_cut(problem, sparse, threads, block) -> None:
    queries, passages, k, cuts = problem
    make = sp.csr_matrix if sparse else np.asarray
    with in_blocks(block):
        shards = [pack(make(part), "float32") for part in np.split(passages, cuts[:-1])]
        ranking = in_memory(shards, make(queries), k, threads)
    np.testing.assert_array_equal(ranking.rows, brute_force(queries, passages, k))
    np.testing.assert_array_equal(
        ranking.scores, np.take_along_axis(queries @ passages.T, ranking.rows, axis=1)
    )


@settings(max_examples=100, deadline=None)
@given(problems(), st.booleans(), st.integers(1, 7), st.sampled_from([3, 4096]), st.data())
def test_removed_passages_are_left_out_before_the_top_k(problem, sparse, threads, block, data) -> None:
    queries, passages, k, cuts = problem
    removed = sorted(data.draw(st.sets(st.integers(0, len(passages) - 1))))
    make = sp.csr_matrix if sparse else np.asarray
    with in_blocks(block):
        shards = [pack(make(part), "float32") for part in np.split(passages, cuts[:-1])]
        ranking = in_memory(shards, make(queries), k, threads, removed)
    kept = np.setdiff1d(np.arange(len(passages)), removed)
    np.testing.assert_array_equal(ranking.rows, kept[brute_force(queries, passages[kept], k)])
    np.testing.assert_array_equal(
        ranking.scores, np.take_along_axis(queries @ passages.T, ranking.rows, axis=1)
    )


def text_like(count: int, seed: int, terms: float = 30) -> sp.csr_matrix:
    """Vectors over 300 terms of which some are in most passages; a twin of every third comes later."""
    random = np.random.default_rng(seed)
    share = np.minimum(1, terms / 5 / (np.arange(300) + 1))
    dense = random.gamma(2, 0.5, (count, 300)) * (random.random((count, 300)) < share)
    dense[2 * count // 3 :][: count // 3] = dense[: count // 3]
    dense[::50] = 0
    return sp.csr_matrix(dense.astype(np.float16).astype(np.float32))


@pytest.mark.parametrize("weights", ["float16", "uint8", "float32"])
@pytest.mark.parametrize("threads", [1, 3])
def test_scores_are_those_of_sums_in_order_to_the_last_bit(weights: str, threads: int) -> None:
    passages, queries = text_like(6000, 0), text_like(60, 1)
    with in_blocks(512):
        shards = [pack(passages[:2500], weights), pack(passages[2500:2501], weights)]
        shards.append(pack(passages[2501:], weights))
        found = in_memory(shards, queries, 20, threads)
    stored = sp.vstack([unpack(shard) for shard in shards], format="csr")
    assert_same(found, summed_in_order(queries, stored, 20))


def changed(vectors: sp.csr_matrix, change) -> sp.csr_matrix:
    dense = vectors.toarray()
    change(dense)
    return sp.csr_matrix(dense)


def negative(dense: np.ndarray) -> None:
    dense[:, ::7] *= -1


def far_apart(dense: np.ndarray) -> None:
    dense[:, ::2] *= 1e-6
    dense[3] *= 1e5


def alike(dense: np.ndarray) -> None:
    dense[:] = dense[0] = dense[1]


def one_posting(dense: np.ndarray) -> None:
    dense[1:] = 0


def nothing_shared(dense: np.ndarray) -> None:
    dense[:, :290] = 0


@pytest.mark.parametrize("change", [negative, far_apart, alike, one_posting, nothing_shared])
@pytest.mark.parametrize("of", ["passages", "queries", "both"])
def test_unusual_vectors_have_the_same_ranking(change, of: str) -> None:
    passages, queries = text_like(2000, 0), text_like(20, 1)
    passages = passages if of == "queries" else changed(passages, change)
    queries = queries if of == "passages" else changed(queries, change)
    with in_blocks(128):
        found = in_memory([pack(passages[:900], "float32"), pack(passages[900:], "float32")], queries, 7, 1)
    assert_same(found, summed_in_order(queries, passages, 7))


def test_queries_of_many_terms_are_searched_without_bounds() -> None:
    passages, queries = text_like(2000, 0), text_like(8, 1, terms=220)
    most = int(np.diff(queries.indptr).max())
    assert most > search_kernels._MOST_TERMS > int(np.diff(queries.indptr)[1:].min())
    with in_blocks(128):
        assert_same(in_memory([pack(passages)], queries, 7), summed_in_order(queries, passages, 7))


def test_zero_weights_and_repeated_postings_are_as_in_a_product() -> None:
    parts = ([1.5, 0, 2, 1, 3], [0, 1, 0, 0, 2], [0, 2, 2, 5])  # the third passage has term 0 twice
    passages = sp.csr_matrix(tuple(map(np.array, parts)), shape=(3, 4))
    queries = sp.csr_matrix(np.array([[1, 0, 0, 5], [0, 0, 0, 1]], np.float32))
    queries.data[1] = 0
    found = in_memory([pack(passages, "float32")], queries, 3)
    assert found.rows.tolist() == [[2, 0, 1], [0, 1, 2]]
    assert found.scores.tolist() == [[3, 1.5, 0], [0, 0, 0]]


def test_no_score_is_above_its_bound_and_few_bounds_are_far_above() -> None:
    passages, queries = text_like(4000, 0), index._canonical(text_like(50, 1))
    ((_, block),) = index._blocks(pack(passages), range(1), index._Room())
    starts, uses = block.starts(300), np.ones(300, np.int64)
    row_of = np.full(300, -1, np.int32)
    row_of[:20] = np.arange(20)
    postings = (starts, block.passages, block.weights)
    _, rows = both = index._rows_for(20, 4000, index._Room())
    small = np.empty(len(block.weights), np.uint8)
    largest = search_kernels.round_up(uses, *postings, row_of, small, *both)
    exact = summed_in_order(queries, passages, 4000)
    for query in range(50):
        own = slice(queries.indptr[query], queries.indptr[query + 1])
        asked = (queries.indices[own], queries.data[own])
        if not (unit := search_kernels._unit(*asked, largest)):
            assert not queries[query].nnz
            continue
        bounds = np.empty(4032, np.uint16)
        search_kernels._add_steps(bounds, *asked, starts, block.passages, row_of, largest, small, rows, unit)
        reached = bounds[exact.rows[query]].astype(float) * unit
        assert (reached >= exact.scores[query] * (1 - 1e-6)).all()
        assert reached[0] <= exact.scores[query][0] * 1.1
        assert not bounds[4000:].any()


def test_most_passages_are_left_out_by_their_bounds() -> None:
    passages, queries = text_like(6000, 0), text_like(4, 1)[1:]
    names = ("search_block", "_take", "_above", "_add", "_add_steps", "_unit", "_passage_score")
    plain = {name: getattr(search_kernels, name).py_func for name in names}
    counted = {name: mock.Mock(side_effect=plain[name]) for name in ("_add", "_passage_score")}
    with in_blocks(512), mock.patch.multiple(search_kernels, **{**plain, **counted}):
        assert_same(in_memory([pack(passages)], queries, 3, 1), summed_in_order(queries, passages, 3))
    assert counted["_add"].call_count <= 9, "of 3 queries in 12 blocks"
    assert 0 < counted["_passage_score"].call_count < 100


@pytest.mark.parametrize(("weights", "error"), [("float16", 1e-3), ("uint8", 4e-3), ("float32", 0)])
@pytest.mark.parametrize("dimensions", [30_522, 70_000])
def test_unpack_returns_packed_sparse_vectors(dimensions: int, weights: str, error: float) -> None:
    vectors = sp.random(50, dimensions, density=0.002, format="csr", dtype=np.float32, rng=0)
    table = pack(vectors, weights)
    terms, lists = (table.column(name).type.value_type for name in ("terms", "postings"))
    assert terms.field("term").type == (pa.uint16() if dimensions < 1 << 16 else pa.uint32())
    assert lists.field("weight").type.to_pandas_dtype() == np.dtype(weights)
    back = unpack(table)
    assert back.shape == vectors.shape
    np.testing.assert_allclose(back.toarray(), vectors.toarray(), atol=error, rtol=error)


def test_vectors_of_several_blocks_come_back() -> None:
    vectors = sp.random(50, 300, density=0.05, format="csr", dtype=np.float32, rng=0)
    with in_blocks(16):
        table = pack(vectors, "float32")
    assert (unpack(table) != vectors).nnz == 0
    assert (len(table), postings(table)) == (50, vectors.nnz)
    empty = pack(vectors[:0])
    assert unpack(empty).shape == (0, 300)


@pytest.mark.parametrize(("weights", "step"), [("float16", 1.0), ("uint8", 0.01), ("float32", 1.0)])
def test_shards_of_version_0_6_are_searched(weights: str, step: float, tmp_path) -> None:
    vectors, queries = text_like(900, 0), text_like(20, 1)
    if step != 1:
        vectors.data = np.rint(vectors.data / step).clip(1, 255).astype(np.float32)
    stage = Stage(RunDirectory(tmp_path / "run"), "vectors", {})
    with in_blocks(128):
        stage.write(0, by_rows(vectors[:500], weights, step))
        stage.write(1, by_rows(vectors[500:600], weights, step))
        vectors.data *= np.float32(step)
        stage.write(2, pack(vectors[600:], "float32"))  # a run that the next version continued
        stage.finish([500, 100, 300], {})
        assert (unpack(stage.table(0)) != vectors[:500]).nnz == 0
        assert postings(stage.table(0)) == vectors[:500].nnz
        for threads in (1, 4):
            found = find_exactly(stage, threads, queries, 10, no_progress)
            assert_same(found, summed_in_order(queries, vectors, 10))


def test_thread_that_fails_stops_the_others() -> None:
    searched = []
    queries = sp.csr_matrix(np.ones((2, 4), np.float32))
    table = pack(sp.csr_matrix(np.ones((3, 4), np.float32)))
    started = threading.Event()

    def slow() -> pa.Table:
        started.wait(10)  # until the second thread has failed
        searched.append(1)
        return table

    def damaged() -> pa.Table:
        threading.Timer(0.2, started.set).start()
        raise RunDirectoryError("damaged")

    with pytest.raises(RunDirectoryError, match="damaged"):
        search(queries, [slow, damaged, *[slow] * 20], [3] * 22, 2, threads=2)
    assert len(searched) == 1


@pytest.mark.parametrize("place", [0.1, 0.5, 0.9])
def test_a_damaged_shard_is_noticed_before_it_is_searched(place: float, tmp_path) -> None:
    stage = Stage(RunDirectory(tmp_path / "run"), "vectors", {})
    stage.write(0, pack(text_like(900, 0)))
    stage.finish([900], {})
    find_exactly(stage, 1, text_like(3, 1), 5, no_progress)
    content = bytearray(stage.path(0).read_bytes())
    content[int(len(content) * place)] ^= 1
    stage.path(0).write_bytes(content)
    with pytest.raises(RunDirectoryError, match="damaged"):
        find_exactly(stage, 1, text_like(3, 1), 5, no_progress)


def plan(vectors: Stage, memory: float, shards: int) -> SearchPlan:
    config = PrepareConfig(queries_file=("q",), output_file="o.json", search_memory=memory)
    return SearchPlan.of(vectors, config, shards)


def test_search_holds_no_more_than_its_memory(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(stages, "threads_here", lambda: 64)
    stage = Stage(RunDirectory(tmp_path / "run"), "vectors", {})
    stage.write(0, pack(sp.random(4096, 3000, density=0.05, format="csr", dtype=np.float32, rng=0)))
    stage.finish([4096], {})
    monkeypatch.setattr(index, "_ROW_SHARE", 3000)
    monkeypatch.setattr(index, "_ROW_USES", 1)
    asked = index._canonical(sp.csr_matrix(np.ones((1, 3000), np.float32)))  # so that there are most rows
    for memory in (0.05, 0.1, 1.0):
        chosen = plan(stage, memory, 10_000)
        room, table = index._Room(), stage.table(0)
        nothing = index._nothing(1, 20)
        index._sparse(asked, table, range(1), nothing, room, first=0, removed=np.empty(0, np.int64))
        held = table.nbytes + sum(array.nbytes for array in room._arrays.values())
        queries = chosen.shards_at_once * PrepareConfig.queries_per_shard
        results = queries * 20 * 12 * (chosen.threads + 2)
        assert chosen.threads * held <= memory * 1e9 / 2
        assert results <= memory * 1e9 / 2
        assert queries == min(8192, queries)
    assert plan(stage, 1.0, 10_000) > plan(stage, 0.05, 10_000)


def test_a_large_index_is_not_read_for_a_few_queries(tmp_path) -> None:
    stage = Stage(RunDirectory(tmp_path / "run"), "vectors", {})
    stage.write(0, pack(sp.csr_matrix((4, 30), dtype=np.float32)))
    stage.finish([4], {})
    assert plan(stage, 1.0, 14).shards_at_once == 1
    stage.finish([100_000], {})
    assert plan(stage, 1.0, 14).shards_at_once == 4
    assert plan(stage, 1.0, 2).shards_at_once == 2
    assert plan(stage, 1.0, 160).shards_at_once == 10


def test_unpack_returns_packed_dense_vectors() -> None:
    vectors = np.arange(12, dtype=np.float32).reshape(3, 4)
    np.testing.assert_array_equal(unpack(pack(vectors)), vectors)


def test_a_posting_takes_at_most_five_bytes(tmp_path) -> None:
    vectors = sp.random(2000, 30_522, density=120 / 30_522, format="csr", dtype=np.float32, rng=0)
    stage = Stage(RunDirectory(tmp_path / "run"), "vectors", {})
    stage.write(0, pack(vectors))
    assert stage.path(0).stat().st_size / vectors.nnz <= 5


@pytest.mark.parametrize("kind", ["sparse", "dense"])
def test_passages_of_a_given_up_shard_are_not_found(kind: str) -> None:
    chance = np.random.default_rng(0)
    dense = chance.standard_normal((12, 30)).astype(np.float32)
    vectors = sp.csr_matrix(np.maximum(dense, 0)) if kind == "sparse" else dense
    tables = [pack(vectors[first : first + 4], "float32") for first in (0, 4, 8)]
    queries = vectors[:3]
    found = search(queries, [lambda: tables[0], None, lambda: tables[2]], [4, 4, 4], 20)
    assert found.rows.shape == (3, 8), "no more than can be found"
    assert {*found.rows.ravel()} == {0, 1, 2, 3, 8, 9, 10, 11}
    scores = np.asarray((vectors @ queries.T).todense() if kind == "sparse" else vectors @ queries.T).T
    np.testing.assert_allclose(found.scores, np.take_along_axis(scores, found.rows, 1), rtol=1e-5)
    stand_in = zero_vectors(tables[0], 4)
    assert unpack(stand_in).shape == (4, 30)
    assert stand_in.schema.equals(tables[0].schema)
