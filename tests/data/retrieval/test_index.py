import numpy as np
import pyarrow as pa
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st

from scaledown.data.retrieval.index import Ranking, nothing, pack, search, unpack
from scaledown.run.directory import RunDirectory
from scaledown.run.stage import Stage


def search_all(queries, vectors, k: int, threads: int = 0) -> Ranking:
    """Search shards given as vectors."""
    packed = [pack(part, "float32") for part in vectors]
    shards = [lambda table=table: table for table in packed]
    return search(queries, shards, [len(t) for t in packed], k, threads=threads)


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
@given(problems(), st.booleans(), st.integers(1, 7))
def test_search_equals_brute_force_for_any_sharding(problem, sparse, threads) -> None:
    queries, passages, k, cuts = problem
    make = sp.csr_matrix if sparse else np.asarray
    shards = [make(part) for part in np.split(passages, cuts[:-1])]
    ranking = search_all(make(queries), shards, k, threads)
    np.testing.assert_array_equal(ranking.rows, brute_force(queries, passages, k))
    np.testing.assert_array_equal(
        ranking.scores, np.take_along_axis(queries @ passages.T, ranking.rows, axis=1)
    )


@settings(max_examples=100, deadline=None)
@given(problems(), st.booleans(), st.integers(1, 7), st.data())
def test_removed_passages_are_left_out_before_the_top_k(problem, sparse, threads, data) -> None:
    queries, passages, k, cuts = problem
    removed = np.array(sorted(data.draw(st.sets(st.integers(0, len(passages) - 1)))), np.int64)
    make = sp.csr_matrix if sparse else np.asarray
    packed = [pack(make(part), "float32") for part in np.split(passages, cuts[:-1])]
    sizes = [len(table) for table in packed]
    shards = [lambda table=table: table for table in packed]
    ranking = search(make(queries), shards, sizes, k, threads=threads, removed=removed)
    kept = np.setdiff1d(np.arange(len(passages)), removed)
    np.testing.assert_array_equal(ranking.rows, kept[brute_force(queries, passages[kept], k)])
    np.testing.assert_array_equal(
        ranking.scores, np.take_along_axis(queries @ passages.T, ranking.rows, axis=1)
    )


def test_search_equals_brute_force_on_random_vectors() -> None:
    random = np.random.default_rng(0)
    passages = random.random((3000, 200), np.float32) * (random.random((3000, 200)) < 0.05)
    passages[1000:2000] = passages[:1000]  # every passage of the first third has a twin
    passages = passages.astype(np.float16).astype(np.float32)
    queries = (random.random((40, 200)) < 0.05).astype(np.float32)
    shards = [sp.csr_matrix(part) for part in np.split(passages, [700, 1500])]
    ranking = search_all(sp.csr_matrix(queries), shards, 20)
    scores = np.asarray((sp.csr_matrix(queries) @ sp.csr_matrix(passages).T).todense())
    expected = np.argsort(-scores, axis=1, kind="stable")[:, :20]
    np.testing.assert_array_equal(ranking.rows, expected)


@pytest.mark.parametrize(("weights", "error"), [("float16", 1e-3), ("uint8", 4e-3), ("float32", 0)])
@pytest.mark.parametrize("dimensions", [30_522, 70_000])
def test_unpack_returns_packed_sparse_vectors(dimensions: int, weights: str, error: float) -> None:
    vectors = sp.random(50, dimensions, density=0.002, format="csr", dtype=np.float32, rng=0)
    table = pack(vectors, weights)
    assert table.column("terms").type.value_type == (pa.uint16() if dimensions < 1 << 16 else pa.uint32())
    assert table.column("weights").type.value_type.to_pandas_dtype() == np.dtype(weights)
    back = unpack(table)
    assert back.shape == vectors.shape
    np.testing.assert_allclose(back.toarray(), vectors.toarray(), atol=error, rtol=error)


def test_unpack_accepts_a_slice_of_a_shard() -> None:
    vectors = sp.random(50, 300, density=0.05, format="csr", dtype=np.float32, rng=0)
    part = pack(vectors, "float32").slice(10, 20)
    assert (unpack(part) != vectors[10:30]).nnz == 0


def test_unpack_returns_packed_dense_vectors() -> None:
    vectors = np.arange(12, dtype=np.float32).reshape(3, 4)
    np.testing.assert_array_equal(unpack(pack(vectors)), vectors)


def test_posting_takes_at_most_four_and_a_half_bytes(tmp_path) -> None:
    vectors = sp.random(2000, 30_522, density=120 / 30_522, format="csr", dtype=np.float32, rng=0)
    stage = Stage(RunDirectory(tmp_path / "run"), "vectors", {})
    stage.write(0, pack(vectors))
    assert stage.path(0).stat().st_size / vectors.nnz <= 4.5


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
    stand_in = nothing(tables[0], 4)
    assert unpack(stand_in).shape == (4, 30)
    assert stand_in.schema.equals(tables[0].schema)
