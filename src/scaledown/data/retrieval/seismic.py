"""Approximate top-k over sparse vectors: Seismic (Bruch et al. 2024, arXiv 2404.18812), group by group.

A group is a number of consecutive shards of vectors that fit into half of `--search_memory`. For each group
there is one Seismic index. A group belongs to one part of the index, so groups stay when a part is added. A
group may contain removed passages; it is then searched for more passages than needed.
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
from scaledown.data.retrieval.parts import parts_of, removed_rows
from scaledown.errors import MissingExtraError, OutputError, install_command
from scaledown.run.atomic import atomic
from scaledown.run.directory import RunDirectory
from scaledown.run.progress import track
from scaledown.run.stage import Stage

log = logging.getLogger("scaledown")

_BYTES_A_POSTING: Final = 24  # while an index is built: the vectors as integers and floats, and the index
_SEISMIC_QUERIES: Final = 1024  # few, because Seismic takes each term of a query as a string of 120 bytes
_INDEX_ENDING: Final = ".index.seismic"


class Care(NamedTuple):
    """Two settings of Seismic that trade speed for recall."""

    query_cut: int
    """The number of query terms that choose blocks."""
    heap_factor: float
    """How soon blocks are skipped; a lower value is more careful."""


# From fast to careful. The first that reaches --min_recall on a sample of the queries is used.
CARES: Final = (Care(5, 1.0), Care(8, 1.0), Care(8, 0.9), Care(12, 0.9), Care(20, 0.8), Care(60, 0.6))


def seismic() -> Any:
    """Import the library. Raises `MissingExtraError` if it is not installed."""
    try:
        import seismic as library
    except ImportError as error:
        raise MissingExtraError(
            f"--search approximate needs Seismic: {install_command('approximate')} (Linux, Python 3.11 or "
            "3.12), or use --search exact"
        ) from error
    return library


class _Group(NamedTuple):
    """Consecutive shards of one part of an index, with one Seismic index."""

    vectors: Stage
    shards: range
    start: int
    """Its first row in the part. Seismic's names of passages are rows in the part."""
    first: int
    """The same row in the whole index."""
    rows: int
    stage: Stage
    """The stage whose folder has the Seismic index."""
    number: int

    @property
    def path(self) -> Path:
        """The file of its Seismic index."""
        return self.stage.folder / f"{self.number:06d}{_INDEX_ENDING}"

    def is_made(self) -> bool:
        """Whether its Seismic index is finished."""
        return self.stage.storage.exists(self.path)


class SeismicIndex:
    """The Seismic indexes of a stage of sparse vectors, one for each group of shards.

    Args:
        home: The directory in which the indexes are made, once.
        vectors: The finished stage of vectors.
        memory: The memory for searching, in GB; half of it limits the size of a group.
    """

    def __init__(self, home: RunDirectory, vectors: Stage, memory: float) -> None:
        self._groups = list(_groups_of_parts(home, vectors, memory))
        self._part = home.part
        self._removed = removed_rows(vectors)
        self._dimensions = int(vectors.table(0).schema.metadata[b"dimensions"])
        self._wide = self._dimensions > 1 << 16
        self._loaded: tuple[Path | None, Any] = (None, None)

    def build(self) -> None:
        """Make the missing indexes. Other processes may make some of them at the same time."""
        # Each process starts at another group, so that they seldom wait for each other.
        first = self._part.of(len(self._groups)).start
        ordered = [*self._groups[first:], *self._groups[:first]]
        missing = [group for group in ordered if not group.is_made()]
        if not missing:
            return
        total = sum(group.rows for group in self._groups)
        done = total - sum(group.rows for group in missing)
        with track("seismic", "passages", total, done, missing[-1].stage) as tracker:
            for group in missing:
                with group.stage.lease(f"{group.number:06d}", wait=True):
                    if not group.is_made():
                        self._build(group)
                tracker.advance(group.rows)

    def _build(self, group: _Group) -> None:
        library = seismic()
        tables = [group.vectors.table(shard, check=True) for shard in group.shards]
        dataset = (library.SeismicDatasetLV if self._wide else library.SeismicDataset)(dim=self._dimensions)
        row = group.start
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
        with atomic(group.path) as temporary:
            written = temporary.with_name(temporary.name + _INDEX_ENDING)
            try:
                with _silence():
                    index.save(str(temporary))
                written.replace(temporary)
            except OSError as error:
                raise OutputError(f"{temporary} cannot be written ({error}): free some room") from error
            finally:
                written.unlink(missing_ok=True)
        group.stage.storage.publish(group.path, once=True)

    def search(self, queries: sp.csr_matrix, k: int, care: Care) -> Ranking:
        """Search for the best passages of each query, approximately.

        Args:
            queries: Vectors [queries, dimensions].
            k: Passages for each query.
            care: How carefully to search, one of `CARES`.

        Returns:
            A ranking [queries, k]. If fewer passages were found, the rows at the end are -1. The last row is
            also -1 if removed passages may have pushed out one of the best `k`.
        """
        count = queries.shape[0]
        best = Ranking(np.empty((count, 0), np.int64), np.empty((count, 0), np.float32))
        unsure = np.zeros(count, bool)
        for group in self._groups:
            index = self._load(group)
            low, high = np.searchsorted(self._removed, [group.first, group.first + group.rows])
            own = self._removed[low:high]
            depth = k + min(k, len(own))
            parts = [
                self._search(index, queries[first : first + _SEISMIC_QUERIES], depth, care)
                for first in range(0, count, _SEISMIC_QUERIES)
            ]
            rows, scores = map(np.concatenate, zip(*parts, strict=True))
            rows = np.where(rows < 0, -1, rows - group.start + group.first)
            removed = np.isin(rows, own)
            unsure |= (rows >= 0).all(axis=1) & (removed.sum(axis=1) > depth - k)
            rows[removed] = -1
            best = best_of([best, Ranking(rows, np.where(rows < 0, -np.inf, scores))], k)
        best.rows[unsure, -1] = -1
        return best

    def _search(self, index: Any, queries: sp.csr_matrix, k: int, care: Care) -> Ranking:
        names, ends = self._words[: queries.shape[0]], queries.indptr[1:-1]
        terms = np.split(self._words[queries.indices], ends)
        weights = np.split(queries.data.astype(np.float32), ends)
        answers = index.batch_search(names, terms, weights, k=k, **care._asdict())
        return _ranking(answers, queries.shape[0], k)

    @functools.cached_property
    def _words(self) -> Array:
        """Numbers as Seismic's strings, for terms and for positions of queries."""
        return np.arange(max(self._dimensions, _SEISMIC_QUERIES)).astype(seismic().get_seismic_string())

    def _load(self, group: _Group) -> Any:
        """The Seismic index of a group. One index is in memory at a time; it stays for the next search."""
        if self._loaded[0] != group.path:
            self._loaded = (None, None)  # free the other index before loading this one
            kind = seismic().SeismicIndexLV if self._wide else seismic().SeismicIndex
            group.stage.storage.fetch(group.path, once=True)
            with _silence():
                self._loaded = (group.path, kind.load(str(group.path)))
        return self._loaded[1]


def _groups_of_parts(home: RunDirectory, vectors: Stage, memory: float) -> Iterator[_Group]:
    """The groups of all parts. A Seismic index takes at most half of `memory` (GB) while it is built."""
    first = 0
    for part in parts_of(vectors):
        settings: dict[str, Any] = {"vectors": part.fingerprint, "search_memory": memory}
        if lost := part.lost():
            settings["without"] = lost
        stage = Stage(home, "approximate", {**settings, "seismic": version("pyseismic-lsr")}, beside=True)
        rows = part.finished().rows
        for number, shards in enumerate(_shard_ranges(part, len(rows), memory * 1e9 / 2)):
            start, count = sum(rows[: shards.start]), sum(rows[shards.start : shards.stop])
            yield _Group(part, shards, start, first + start, count, stage, number)
        first += sum(rows)


def _shard_ranges(vectors: Stage, shards: int, memory: float) -> Iterator[range]:
    """Split the shards into ranges whose Seismic index fits into `memory` bytes while it is built."""
    first, held = 0, 0.0
    for shard in range(shards):
        size = vectors.size(shard) / 4 * _BYTES_A_POSTING
        if held and held + size > memory:
            yield range(first, shard)
            first, held = shard, 0.0
        held += size
    yield range(first, shards)


def _ranking(answers: Sequence[Sequence[tuple[str, float, str]]], queries: int, k: int) -> Ranking:
    """Seismic's answers, which are in no particular order, as arrays [queries, k]; ties in passage order."""
    rows = np.full((queries, k), -1, np.int64)
    scores = np.full((queries, k), -np.inf, np.float32)
    for answer in answers:
        if answer:
            number = int(answer[0][0])
            rows[number, : len(answer)] = [int(row) for _, _, row in answer]
            scores[number, : len(answer)] = [score for _, score, _ in answer]
    return best_of([Ranking(rows, scores)], k)


def recall_of_search(found: Ranking, exact: Ranking) -> float:
    """Compute recall@k: the share of the exact top k that was found, averaged over queries.

    Args:
        found: The ranking to measure, [queries, k].
        exact: The exact ranking, [queries, k].

    Returns:
        0 to 1.
    """
    pairs: Iterator[tuple[Array, Array]] = zip(found.rows, exact.rows, strict=True)
    return float(np.mean([len(np.intersect1d(own, best)) / len(best) for own, best in pairs]))


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Suppress standard output and standard error, since Seismic writes to both."""
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
