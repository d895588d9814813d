"""Approximate top-k over sparse vectors: Seismic (Bruch et al. 2024, arXiv 2404.18812), group by group.

A group is as many consecutive shards of vectors as half of `--search_memory` holds; each becomes one Seismic
index.
"""

import contextlib
import functools
import logging
import os
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import scipy.sparse as sp

from scaledown.data.retrieval.index import Array, Ranking, best_of, unpack
from scaledown.errors import MissingExtraError, OutputError, install_command
from scaledown.run.atomic import atomic
from scaledown.run.directory import RunDirectory
from scaledown.run.progress import track
from scaledown.run.stage import Stage

log = logging.getLogger("scaledown")

_BYTES_A_POSTING: Final = 24  # while building: the vectors as integers and floats, and the index
_QUERIES_AT_ONCE: Final = 1024  # Seismic takes a query's terms as strings of 120 bytes each
_ENDING: Final = ".index.seismic"


class Care(NamedTuple):
    """How carefully Seismic searches: query terms that choose blocks, and how soon blocks are skipped."""

    query_cut: int
    heap_factor: float


# From fast to careful; the first that reaches --min_recall on a sample of the queries is taken.
CARES: Final = (Care(5, 1.0), Care(8, 1.0), Care(8, 0.9), Care(12, 0.9), Care(20, 0.8), Care(60, 0.6))


def seismic() -> Any:
    """Import the library. Raises `MissingExtraError` where it is not installed."""
    try:
        import seismic as library
    except ImportError as error:
        raise MissingExtraError(
            f"--search approximate needs Seismic: {install_command('approximate')} (Linux, Python 3.11 or "
            "3.12), or use --search exact"
        ) from error
    return library


class SeismicIndex:
    """The Seismic indexes of a stage of sparse vectors, one a group, made once in `home`."""

    def __init__(self, home: RunDirectory, vectors: Stage, memory: float) -> None:
        self._vectors = vectors
        self._part = home.part
        settings: dict[str, Any] = {"vectors": vectors.fingerprint, "search_memory": memory}
        if lost := vectors.lost():
            settings["without"] = lost
        self._stage = Stage(home, "approximate", {**settings, "seismic": version("pyseismic-lsr")})
        self._rows = vectors.finished().rows
        self._groups = list(self._grouped(memory * 1e9 / 2))
        self._dimensions = int(vectors.table(0).schema.metadata[b"dimensions"])
        self._wide = self._dimensions > 1 << 16
        self._loaded: tuple[int, Any] = (-1, None)

    def _grouped(self, memory: float) -> Iterator[range]:
        first, held = 0, 0.0
        for shard in range(len(self._rows)):
            size = self._vectors.size(shard) / 4 * _BYTES_A_POSTING
            if held and held + size > memory:
                yield range(first, shard)
                first, held = shard, 0.0
            held += size
        yield range(first, len(self._rows))

    def _path(self, group: int) -> Path:
        return self._stage.folder / f"{group:06d}{_ENDING}"

    def _has(self, group: int) -> bool:
        return self._stage.storage.exists(self._path(group))

    def build(self) -> None:
        """Make the missing indexes; other processes may make some of them."""
        groups = range(len(self._groups))
        first = self._part.of(len(groups)).start  # parts start at different groups, and meet what others made
        missing = [group for group in (*groups[first:], *groups[:first]) if not self._has(group)]
        if not missing:
            return
        total = sum(self._rows)
        done = total - sum(self._rows[shard] for group in missing for shard in self._groups[group])
        with track("seismic", "passages", total, done, self._stage) as tracker:
            for group in missing:
                with self._stage.lease(f"{group:06d}", wait=True):
                    if not self._has(group):
                        self._build(group)
                tracker.advance(sum(self._rows[shard] for shard in self._groups[group]))

    def _build(self, group: int) -> None:
        library = seismic()
        shards = self._groups[group]
        tables = [self._vectors.table(shard, check=True) for shard in shards]
        dataset = (library.SeismicDatasetLV if self._wide else library.SeismicDataset)(dim=self._dimensions)
        row = sum(self._rows[: shards.start])
        for table in tables:
            part = sp.csr_matrix(unpack(table))
            names = [str(number) for number in range(row, row + part.shape[0])]
            dataset.add_documents_by_id(
                names, part.indices.astype(np.int64), part.data, part.indptr.astype(np.int64)
            )
            row += part.shape[0]
        kind = library.SeismicIndexLV if self._wide else library.SeismicIndex
        with _silence():
            index = kind.build_from_dataset(dataset)
        with atomic(self._path(group)) as temporary:
            written = temporary.with_name(temporary.name + _ENDING)
            try:
                with _silence():
                    index.save(str(temporary))
                written.replace(temporary)
            except OSError as error:
                raise OutputError(f"{temporary} cannot be written ({error}): free some room") from error
            finally:
                written.unlink(missing_ok=True)
        self._stage.storage.publish(self._path(group), once=True)

    def search(self, queries: sp.csr_matrix, k: int, care: Care) -> Ranking:
        """About the `k` best passages of each query; where fewer were found, rows are -1 at the end."""
        count = queries.shape[0]
        best = Ranking(np.empty((count, 0), np.int64), np.empty((count, 0), np.float32))
        for group in range(len(self._groups)):
            index = self._load(group)
            parts = [
                self._search(index, queries[first : first + _QUERIES_AT_ONCE], k, care)
                for first in range(0, count, _QUERIES_AT_ONCE)
            ]
            best = best_of([best, Ranking(*map(np.concatenate, zip(*parts, strict=True)))], k)
        return best

    def _search(self, index: Any, queries: sp.csr_matrix, k: int, care: Care) -> Ranking:
        names, ends = self._words[: queries.shape[0]], queries.indptr[1:-1]
        terms = np.split(self._words[queries.indices], ends)
        weights = np.split(queries.data.astype(np.float32), ends)
        answers = index.batch_search(names, terms, weights, k=k, **care._asdict())
        return _ranking(answers, queries.shape[0], k)

    @functools.cached_property
    def _words(self) -> Array:
        """Numbers as Seismic's strings: terms, and places of queries."""
        return np.arange(max(self._dimensions, _QUERIES_AT_ONCE)).astype(seismic().get_seismic_string())

    def _load(self, group: int) -> Any:
        """A group's index; one is in memory at a time, and stays for the next search."""
        if self._loaded[0] != group:
            self._loaded = (-1, None)  # let the other go first
            kind = seismic().SeismicIndexLV if self._wide else seismic().SeismicIndex
            self._stage.storage.fetch(self._path(group), once=True)
            with _silence():
                self._loaded = (group, kind.load(str(self._path(group))))
        return self._loaded[1]


def _ranking(answers: Sequence[Sequence[tuple[str, float, str]]], queries: int, k: int) -> Ranking:
    """Seismic's answers, which come in any order, as arrays [queries, k]; ties in passage order."""
    rows = np.full((queries, k), -1, np.int64)
    scores = np.full((queries, k), -np.inf, np.float32)
    for answer in answers:
        if answer:
            number = int(answer[0][0])
            rows[number, : len(answer)] = [int(row) for _, _, row in answer]
            scores[number, : len(answer)] = [score for _, score, _ in answer]
    return best_of([Ranking(rows, scores)], k)


def recall(found: Ranking, exact: Ranking) -> float:
    """The share of the exact top k that was found, mean over queries (recall@k)."""
    pairs: Iterator[tuple[Array, Array]] = zip(found.rows, exact.rows, strict=True)
    return float(np.mean([len(np.intersect1d(own, best)) / len(best) for own, best in pairs]))


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Nothing on standard output and error meanwhile: Seismic writes there by itself."""
    kept = [os.dup(number) for number in (1, 2)]
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        for number in (1, 2):
            os.dup2(nowhere, number)
        yield
    finally:
        for number, old in zip((1, 2), kept, strict=True):
            os.dup2(old, number)
            os.close(old)
        os.close(nowhere)
