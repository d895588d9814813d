"""Exact search against SciPy's sparse product and a dense product; approximate search against exact.

Vectors are synthetic (see `common.synthetic`), queries are about some of them; the top 20 are searched.

With `--before DIR`, a checkout of an earlier version, only the exact search of both versions is compared, in
turns, one thread each: all real questions over real passages resampled to `--passages`:

    git worktree add /tmp/before d47fa64
    .venv/bin/python benchmarks/search.py --before /tmp/before
"""

import functools
import hashlib
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import scipy.sparse as sp
import torch
from common import (
    SHARD,
    child,
    close,
    machine,
    paired,
    parser,
    questions,
    real_texts,
    synthetic,
    synthetic_queries,
    verdict,
)

from scaledown.data.retrieval.index import pack, search
from scaledown.data.retrieval.seismic import CARES, SeismicIndex, recall_of_search
from scaledown.run.directory import RunDirectory
from scaledown.run.stage import Stage

TOP = 20


def stored(folder: Path, passages: int, shards: Iterable[sp.csr_matrix]) -> Stage:
    """Vectors in shards on disk, written if they are not there."""
    stage = Stage(RunDirectory(folder), "vectors", {"passages": passages})
    if stage.done():
        return stage
    rows = []
    for number, shard in enumerate(shards):
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


def resampled(real: sp.csr_matrix, passages: int) -> Iterator[sp.csr_matrix]:
    """Shards of real passages, drawn at random, whose vectors are changed.

    Three of ten terms become another term of about the same document frequency: of the order by frequency, at
    most an eighth of the place away, or 8 places. Weights are jittered by 20%.
    """
    frequency = np.bincount(real.indices, minlength=real.shape[1])
    order = np.argsort(-frequency, kind="stable")[: np.count_nonzero(frequency)]
    place = np.zeros(real.shape[1], np.int64)
    place[order] = np.arange(len(order))
    random = np.random.default_rng(0)
    for first in range(0, passages, SHARD):
        count = min(SHARD, passages - first)
        part = real[random.integers(0, real.shape[0], count)].tocoo()
        here = place[part.col]
        away = np.maximum(8, here // 8)
        other = order[(here + random.integers(-away, away + 1)).clip(0, len(order) - 1)]
        terms = np.where(random.random(part.nnz) < 0.3, other, part.col)
        weights = (part.data * np.exp(0.2 * random.standard_normal(part.nnz))).astype(np.float32)
        _, kept = np.unique(part.row.astype(np.int64) * real.shape[1] + terms, return_index=True)
        yield sp.csr_matrix((weights[kept], (part.row[kept], terms[kept])), shape=part.shape)


def search_once(folder: Path, side: str, asked: int, passages: int) -> None:
    """Search once, in a child process, the shards of its version, which it writes if there are none."""
    stage = stored(folder / side, passages, resampled(sp.load_npz(folder / "passages.npz"), passages))
    rows = stage.finished().rows
    load = [functools.partial(stage.table, number, check=True) for number in range(len(rows))]
    queries = sp.load_npz(folder / "queries.npz")
    chosen = queries[np.sort(np.random.default_rng(0).permutation(queries.shape[0])[:asked])]
    search(chosen[:1], load[:1], rows[:1], TOP, threads=1)  # compiles
    started, processor = time.perf_counter(), time.process_time()
    ranking = search(chosen, load, rows, TOP, threads=1)
    seconds, processor = time.perf_counter() - started, time.process_time() - processor
    digest = hashlib.sha256(ranking.rows.tobytes() + ranking.scores.tobytes()).hexdigest()
    print(json.dumps({"seconds": seconds, "processor": processor, "digest": digest}))


def compare(before: str, passages: int, *, quick: bool) -> None:
    """Compare the search of an earlier version with that of this one; a ratio of processor seconds."""
    from scaledown.data.retrieval.encoders import load_encoder
    from scaledown.models.sources import resolve

    folders = ("xquad-dev",) if quick else ("xquad-dev", "qed-dev", "cmu-dev")
    sources = {"before": f"{before}/src", "now": str(Path(__file__).resolve().parents[1] / "src")}
    with tempfile.TemporaryDirectory() as folder:
        encoder = load_encoder(resolve("bundled:splade-tiny"), "cpu", "float32", 32)
        texts, asked = real_texts(folders), questions(folders)
        sp.save_npz(Path(folder) / "passages.npz", encoder.documents(texts, lambda _: None))
        sp.save_npz(Path(folder) / "queries.npz", encoder.queries(asked, lambda _: None))
        for count in (1, 300, len(asked)):
            found: dict[str, list[dict]] = {side: [] for side in sources}
            for _ in range(3):
                for side, source in sources.items():
                    os.environ["PYTHONPATH"] = source
                    words = [__file__, "--search", folder, side, str(count), str(passages)]
                    found[side].append(child(words))
            same = len({one["digest"] for runs in found.values() for one in runs}) == 1
            median = {
                side: statistics.median(one["processor"] for one in runs) for side, runs in found.items()
            }
            ratio = median["before"] / median["now"]
            print(
                f"  {passages:,} passages, {count:,} queries: before {median['before']:.2f} s of CPU, "
                f"now {median['now']:.2f}, ratio {ratio:.2f}"
            )
            verdict("equal rows and scores", str(same).lower(), "true", met=same)
    close("search", ratio, 2, also=same)


def main() -> None:
    if sys.argv[1:2] == ["--search"]:
        search_once(Path(sys.argv[2]), sys.argv[3], *map(int, sys.argv[4:]))
        return
    made = parser(__doc__)
    made.add_argument("--before", metavar="DIR", help="compare with this checkout of an earlier version")
    made.add_argument("--passages", type=int, default=1_000_000, help="with --before (default: 1,000,000)")
    options = made.parse_args()
    print(machine())
    if options.before:
        compare(options.before, options.passages, quick=options.quick)
    queries = synthetic_queries(2000)
    few = synthetic_queries(200)
    repeats = 3 if options.quick else 5

    with tempfile.TemporaryDirectory() as folder:
        stage = stored(Path(folder), 200_000, synthetic(200_000))
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
        stage = stored(Path(folder), 20_000, synthetic(20_000))
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
        stage = stored(Path(folder), passages, synthetic(passages))
        index = SeismicIndex(RunDirectory(Path(folder)), stage, 8.0)
        started = time.perf_counter()
        index.build()
        print(f"  {passages:,} passages: Seismic built in {time.perf_counter() - started:.0f} s")
        exact = [_seconds(lambda: ours(stage, queries)) for _ in range(3)]
        best = ours(stage, queries)
        for care in CARES:  # as the command does: the least care that is enough
            found = recall_of_search(index.search(queries, TOP, care), best)
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
