"""Exact search beside Block-Max Pruning (BMP) and Seismic, one thread each, and its cost as a corpus grows.

Real questions over real passages that are resampled to --passages (`search.resampled`); the top 20. Sides in
turns, medians. Exact search reads the index from disk, checksums included, once for all queries. BMP and
Seismic have theirs in memory; BMP is asked query by query. It is not a dependency: `make bench` installs it
in .bench. It keeps weights as integers, here of 8 bits, so its overlap with exact search is printed.
"""

import itertools
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

os.environ["RAYON_NUM_THREADS"] = "1"  # Seismic's threads

import numpy as np
import scipy.sparse as sp
from common import close, machine, paired, parser, questions, real_texts
from search import resampled, stored

from scaledown.data.retrieval.encoders import load_encoder
from scaledown.data.retrieval.index import Ranking, search
from scaledown.data.retrieval.seismic import CARES, SeismicIndex, recall_of_search
from scaledown.models.sources import resolve
from scaledown.run.directory import RunDirectory
from scaledown.run.stage import Stage

TOP = 20
FEW = 300
CARELESS = 0.85  # BMP's alpha of its paper's fast setting
LEVELS = 255


def ours(stage: Stage, queries: sp.csr_matrix) -> Ranking:
    rows = stage.finished().rows
    load = [partial(stage.table, number, check=True) for number in range(len(rows))]
    return search(queries, load, rows, TOP, threads=1)


class BMP:
    """Its index of the same passages."""

    def __init__(self, path: Path, real: sp.csr_matrix, passages: int, block: int) -> None:
        try:
            import bmp
        except ImportError:
            sys.exit("BMP is not installed: make .bench/ready")
        largest, number = real.data.max() * np.exp(0.4), 0  # the jitter is seldom above two deviations
        names = np.array([str(term) for term in range(real.shape[1])])
        indexer = bmp.Indexer(str(path), bsize=block, compress_range=False)
        for shard in resampled(real, passages):
            terms = names[shard.indices].tolist()
            weights = np.round(shard.data / largest * LEVELS).clip(1, LEVELS).astype(int).tolist()
            for low, high in itertools.pairwise(shard.indptr.tolist()):
                vector = dict(zip(terms[low:high], weights[low:high], strict=True))
                indexer.add_document(str(number), vector)
                number += 1
        indexer.finish()
        self.searcher = bmp.Searcher(str(path))
        self.names = names

    def search(self, queries: sp.csr_matrix, alpha: float) -> Ranking:
        """The best passages of each query; alpha 1 is exact on its integers."""
        found = np.full((queries.shape[0], TOP), -1)
        terms, weights = self.names[queries.indices].tolist(), queries.data.tolist()
        for row, (low, high) in enumerate(itertools.pairwise(queries.indptr.tolist())):
            query = dict(zip(terms[low:high], weights[low:high], strict=True))
            names, _ = self.searcher.search(query, k=TOP, alpha=alpha, beta=1.0)
            found[row, : len(names)] = list(map(int, names))
        return Ranking(found, np.zeros(found.shape, np.float32))


def careful(index: SeismicIndex, queries: sp.csr_matrix, exact: Ranking) -> Callable[..., Ranking]:
    """Seismic's fastest setting with a recall of 0.99, as `--search approximate` finds it."""
    for care in CARES:
        if recall_of_search(index.search(queries, TOP, care), exact) >= 0.99:
            break
    print(f"  Seismic: query_cut {care.query_cut}, heap_factor {care.heap_factor}")
    return partial(index.search, k=TOP, care=care)


def growth(folder: Path, real: sp.csr_matrix, sets: dict[int, sp.csr_matrix], sizes: Sequence[int]) -> None:
    """Print seconds as a line through the sizes: what a million passages more cost."""
    points: dict[int, list[float]] = {count: [] for count in sets}
    for size in sizes:
        stage = stored(folder / str(size), size, resampled(real, size))
        for count, queries in sets.items():
            timed = paired({"ours": partial(ours, stage, queries)}, 3)
            points[count].append(timed["ours"].seconds)
    for count, seconds in points.items():
        slope, start = np.polyfit(np.array(sizes) / 1e6, seconds, 1)
        shown = ", ".join(f"{one:.2f}" for one in seconds)
        print(
            f"  exact, {count:,} queries, {', '.join(f'{size:,}' for size in sizes)} passages: {shown} s; "
            f"fitted: {start:.2f} s + {slope:.2f} s for each million"
        )


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--passages", type=int, default=1 << 19)
    options.add_argument("--seismic", action="store_true", help="with Seismic, built by one thread (slow)")
    options.add_argument("--growth", action="store_true", help="also with twice and three times as many")
    options.add_argument("--block", type=int, default=8, help="passages of a block of BMP (default: 8)")
    options = options.parse_args()
    passages = 100_000 if options.quick else options.passages
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / ".bench"))
    print(f"{machine()}, one thread a side")
    encoder = load_encoder(resolve("bundled:splade-tiny"), "cpu", "float32", 32)
    folders = ("xquad-dev",) if options.quick else ("xquad-dev", "qed-dev", "cmu-dev")
    texts, real_questions = real_texts(folders), questions(folders)
    real = sp.csr_matrix(encoder.documents(texts, lambda _: None))
    queries = sp.csr_matrix(encoder.queries(real_questions, lambda _: None))
    few = queries[np.sort(np.random.default_rng(0).permutation(queries.shape[0])[:FEW])]
    print(f"  {real.shape[0]:,} real passages, {real.nnz / real.shape[0]:.0f} postings each", flush=True)
    sets = {1: few[:1], few.shape[0]: few, queries.shape[0]: queries}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        stage = stored(folder / str(passages), passages, resampled(real, passages))
        sides: dict[str, Callable[[sp.csr_matrix], Ranking]] = {"exact": partial(ours, stage)}
        if options.seismic:
            index = SeismicIndex(RunDirectory(folder / "seismic"), stage, 16.0)
            started = time.perf_counter()
            index.build()
            print(f"  Seismic built in {time.perf_counter() - started:.0f} s", flush=True)
            sides["Seismic"] = careful(index, few, ours(stage, few))
        started = time.perf_counter()
        block_max = BMP(folder / "bmp", real, passages, options.block)
        print(f"  BMP built in {time.perf_counter() - started:.0f} s, blocks of {options.block}", flush=True)
        sides |= {f"BMP alpha {alpha}": partial(block_max.search, alpha=alpha) for alpha in (1.0, CARELESS)}
        ratio = 0.0
        for count, own in sets.items():
            timed = paired(
                {name: partial(side, own) for name, side in sides.items()}, 1 if count > FEW else 3
            )
            for name, (seconds, found) in timed.items():
                print(
                    f"  {passages:,} passages, {count:,} queries, {name}: {count / seconds:,.0f} queries/s, "
                    f"overlap {recall_of_search(found, timed['exact'].result):.3f}",
                    flush=True,
                )
            against = timed["BMP alpha 1.0"].seconds / timed["exact"].seconds
            if count == FEW:
                ratio = against
            print(f"  exact against BMP exact: {against:.2f}x")
        sides.clear()
        del block_max
        if options.growth:
            growth(folder, real, sets, [passages, 2 * passages, 3 * passages])
    close("search_rivals", ratio, 1)


if __name__ == "__main__":
    main()
