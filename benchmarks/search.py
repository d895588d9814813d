"""Exact search against SciPy's sparse product and a dense product; approximate search against exact.

Vectors are synthetic (see `common.synthetic`), queries are about some of them; the top 20 are searched.
"""

import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import scipy.sparse as sp
import torch
from common import arguments, close, machine, paired, synthetic, synthetic_queries, verdict

from scaledown.data.retrieval.index import pack, search
from scaledown.data.retrieval.seismic import CARES, SeismicIndex, recall
from scaledown.run.directory import RunDirectory
from scaledown.run.stage import Stage

TOP = 20


def stored(folder: str, passages: int) -> Stage:
    """Synthetic vectors in shards on disk."""
    stage = Stage(RunDirectory(Path(folder)), "vectors", {"passages": passages})
    rows = []
    for number, shard in enumerate(synthetic(passages)):
        stage.write(number, pack(shard))
        rows.append(shard.shape[0])
    stage.finish(rows, {"passages": passages})
    return stage


def ours(stage: Stage, queries: sp.csr_matrix) -> np.ndarray:
    rows = stage.finished().rows
    return search(queries, [lambda n=n: stage.table(n, check=True) for n in range(len(rows))], rows, TOP)


def by_scipy(matrix: sp.csr_matrix, queries: sp.csr_matrix) -> np.ndarray:
    """Top rows by a sparse product, a few queries at a time; ties in passage order."""
    best = []
    for low in range(0, queries.shape[0], 64):
        scores = (queries[low : low + 64] @ matrix).toarray()
        rows = np.argpartition(-scores, TOP + 5, axis=1)[:, : TOP + 5]  # a few more, for ties at the end
        rows.sort(axis=1)
        order = np.argsort(-np.take_along_axis(scores, rows, 1), axis=1, kind="stable")[:, :TOP]
        best.append(np.take_along_axis(rows, order, 1))
    return np.concatenate(best)


def by_dense_product(matrix: torch.Tensor, queries: torch.Tensor) -> np.ndarray:
    """Top rows by a product of dense float32 matrices, as the original implementation searches."""
    return torch.topk(queries @ matrix.T, TOP, dim=1).indices.numpy()


def agreement(
    found: np.ndarray, expected: np.ndarray, queries: sp.csr_matrix, passages: sp.csr_matrix
) -> float:
    """The share of places with the same passage, or one whose float64 score is the same but for rounding."""
    same = found == expected
    for query, place in zip(*np.nonzero(~same), strict=True):
        own, other = (
            (queries[query].astype(float) @ passages[rows[query, place]].T.astype(float))[0, 0]
            for rows in (found, expected)
        )
        same[query, place] = abs(own - other) <= 1e-5 * abs(other)
    return float(same.mean())


def main() -> None:
    options = arguments(__doc__)
    print(machine())
    queries = synthetic_queries(2000)
    few = synthetic_queries(200)
    repeats = 3 if options.quick else 5

    with tempfile.TemporaryDirectory() as folder:
        stage = stored(folder, 200_000)
        matrix = sp.vstack(list(synthetic(200_000)), format="csr")
        columns = matrix.T.tocsr()
        small = queries[:200]
        timed = paired(
            {"SciPy": lambda: by_scipy(columns, small), "ours": lambda: ours(stage, queries)}, repeats
        )
        rate = {"SciPy": 200 / timed["SciPy"].seconds, "ours": queries.shape[0] / timed["ours"].seconds}
        print(f"  200,000 passages: SciPy {rate['SciPy']:,.0f} queries/s, exact search {rate['ours']:,.0f}")
        same = agreement(timed["ours"].result.rows[:200], timed["SciPy"].result, small, matrix)
        ratio = rate["ours"] / rate["SciPy"]
        met = verdict("identical top 20", f"{same:.4f}", "1", met=same == 1)
    del columns, matrix

    with tempfile.TemporaryDirectory() as folder:
        stage = stored(folder, 20_000)
        matrix = sp.vstack(list(synthetic(20_000)), format="csr")
        dense = torch.from_numpy(matrix.toarray())
        asked = torch.from_numpy(few.toarray())
        timed = paired(
            {"dense": lambda: by_dense_product(dense, asked), "ours": lambda: ours(stage, few)}, repeats
        )
        rate = {side: few.shape[0] / result.seconds for side, result in timed.items()}
        print(
            f"  20,000 passages: dense product {rate['dense']:,.0f} queries/s, exact search "
            f"{rate['ours']:,.0f}"
        )
        same = agreement(timed["ours"].result.rows, timed["dense"].result, few, matrix)
        met &= verdict("identical top 20", f"{same:.4f}", "1", met=same == 1)
        faster = rate["ours"] / rate["dense"]
        met &= verdict("against the dense product", f"{faster:.1f}x", "20x", met=faster >= 20)
    del dense

    passages = 250_000 if options.quick else 1_000_000
    bar = 3 if options.quick else 5
    with tempfile.TemporaryDirectory() as folder:
        stage = stored(folder, passages)
        index = SeismicIndex(RunDirectory(Path(folder)), stage, 8.0)
        started = time.perf_counter()
        index.build()
        print(f"  {passages:,} passages: Seismic built in {time.perf_counter() - started:.0f} s")
        exact = [_seconds(lambda: ours(stage, queries)) for _ in range(3)]
        best = ours(stage, queries)
        for care in CARES:  # as the command does: the least care that is enough
            found = recall(index.search(queries, TOP, care), best)
            if found >= 0.99:
                break
        loading = _seconds(
            lambda: SeismicIndex(RunDirectory(Path(folder)), stage, 8.0).search(few[:1], TOP, care)
        )
        approximate = [_seconds(lambda: index.search(queries, TOP, care)) for _ in range(3)]
        count = queries.shape[0]
        print(
            f"  exact {count / statistics.median(exact):,.0f} queries/s, approximate "
            f"{count / statistics.median(approximate):,.0f} (query_cut {care.query_cut}, heap_factor "
            f"{care.heap_factor}; the index loaded, once in {loading:.1f} s)"
        )
        met &= verdict("recall@20", f"{found:.4f}", "0.99", met=found >= 0.99)
        faster = statistics.median(exact) / statistics.median(approximate)
        met &= verdict("approximate against exact", f"{faster:.1f}x", f"{bar}x", met=faster >= bar)
    close("search", ratio, 3, also=met)


def _seconds(work: object) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
