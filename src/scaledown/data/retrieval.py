"""Queries + corpus -> ranked passages, by SPLADE or by a dense bi-encoder."""

import contextlib
import functools
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, NamedTuple, Protocol, TypeAlias, cast

import numpy as np
import pyarrow as pa
import scipy.sparse as sp

from scaledown.config import PrepareConfig
from scaledown.data.index import Array, Ranking, Vectors, pack, search
from scaledown.data.splade import SpladeEncoder, by_length
from scaledown.errors import ModelError, UsageError
from scaledown.executor import cores
from scaledown.models import (
    Halving,
    ModelSource,
    choose_device,
    choose_dtype,
    loadable,
    loading,
    read_config_file,
    resolve,
)
from scaledown.progress import track
from scaledown.records import DocumentDict, RetrievedDict, document_text, full_text
from scaledown.store import Stage

log = logging.getLogger("scaledown")

Advance: TypeAlias = Callable[[int], None]
Check: TypeAlias = Callable[[], None]

_QUERIES_AT_ONCE: Final = 4096
_BYTES_A_QUERY: Final = 2048  # some hundred terms, twice
_BYTES_A_RESULT: Final = 12  # a row and a score
_UNPACKED: Final = 5  # a shard in memory, against its size on disk: terms, float32 weights, and both by term


class Encoder(Protocol):
    """Turns texts into vectors whose inner product is their similarity."""

    halving: Halving

    def documents(
        self, texts: Sequence[str], advance: Advance, tokens: Sequence[Array] | None = None
    ) -> Vectors:
        """Vectors of documents [texts, dimensions]; `tokens` are their token ids where they are known."""

    def queries(self, texts: Sequence[str], advance: Advance) -> Vectors:
        """Vectors of queries [texts, dimensions]."""


class DenseEncoder:
    """A sentence-transformers bi-encoder with cosine or inner-product similarity."""

    def __init__(self, source: ModelSource, device: str, dtype: str, batch_size: int) -> None:
        from sentence_transformers import SentenceTransformer

        name, pinned = loadable(source)
        arguments: dict[str, Any] = {"model_kwargs": {"dtype": choose_dtype(dtype, device)}}
        with loading(source):
            self._model = SentenceTransformer(name, device=device, **pinned, **arguments)
        similarity = self._model.similarity_fn_name
        if similarity not in {"cosine", "dot"}:
            raise ModelError(
                f"model {source.name}: similarity {similarity!r} is not supported; use cosine or dot"
            )
        self._normalize = similarity == "cosine"
        self.halving = Halving("--batch_size")
        self._batch_size = batch_size

    def documents(
        self, texts: Sequence[str], advance: Advance, tokens: Sequence[Array] | None = None
    ) -> Array:
        """Vectors of documents, float32 [texts, dimensions]; its model tokenises by itself."""
        return self._encode(self._model.encode_document, texts, advance)

    def queries(self, texts: Sequence[str], advance: Advance) -> Array:
        """Vectors of queries, float32 [texts, dimensions]."""
        return self._encode(self._model.encode_query, texts, advance)

    def _encode(self, encode: Callable[..., Any], texts: Sequence[str], advance: Advance) -> Array:
        def encode_batch(batch: Sequence[int]) -> Array:
            vectors = encode(
                [texts[i] for i in batch],
                batch_size=len(batch),
                show_progress_bar=False,
                convert_to_tensor=True,
                normalize_embeddings=self._normalize,
            )
            return cast("Array", vectors.float().cpu().numpy())

        order, parts = by_length(texts), []
        for start in range(0, len(texts), self._batch_size):
            batch = order[start : start + self._batch_size].tolist()
            parts += self.halving(encode_batch, batch)
            advance(len(batch))
        return cast("Array", np.concatenate(parts)[np.argsort(order)])


def is_sparse(source: ModelSource) -> bool:
    """Whether a retriever is SPLADE-like: a sparse sentence-transformers model or a bare masked LM."""
    modules = read_config_file(source, "modules.json")
    if modules:
        return any("sparse_encoder" in module["type"] for module in modules)
    config = read_config_file(source, "config.json") or {}
    return any(name.endswith("ForMaskedLM") for name in config.get("architectures") or ())


def load_encoder(source: ModelSource, device: str, dtype: str, batch_size: int) -> Encoder:
    """The encoder behind `--retriever_model`, sparse or dense by what the model is."""
    kind = SpladeEncoder if is_sparse(source) else DenseEncoder
    log.info("retriever: %s, %s", source.name, "SPLADE" if kind is SpladeEncoder else "dense")
    return kind(source, device, dtype, batch_size)


class DenseRetriever:
    """Retrieves from a corpus in memory with a sentence-transformers bi-encoder.

    `device` is auto, cpu, cuda, cuda:N or mps; `dtype` is auto, float32, bfloat16 or float16.
    """

    _encoder_type: type[SpladeEncoder] | type[DenseEncoder] = DenseEncoder

    def __init__(
        self,
        model_name: str,
        *,
        device: str = "auto",
        dtype: str = "auto",
        batch_size: int = PrepareConfig.batch_size,
    ) -> None:
        source = resolve(model_name)
        if is_sparse(source) != (self._encoder_type is SpladeEncoder):
            kind, right = ("SPLADE", "SPLADERetriever") if is_sparse(source) else ("dense", "DenseRetriever")
            raise ModelError(f"model {model_name} is a {kind} model: use {right}")
        self._encoder: Encoder = self._encoder_type(source, choose_device(device), dtype, batch_size)

    def retrieve(
        self, queries: Sequence[str], corpus: Sequence[DocumentDict], top_k: int = 5
    ) -> list[list[RetrievedDict]]:
        """For each query its `top_k` documents with their scores, best first; ties in corpus order.

        `corpus` holds dictionaries with `text` and, if any, `id` and `title`; they come back with `score`.
        All of them come back when `top_k` exceeds their number. Raises `UsageError` for `top_k` below 1.
        """
        if top_k < 1:
            raise UsageError(f"top_k {top_k}: must be at least 1")
        if isinstance(queries, str):
            raise UsageError("queries is one string: give a list of queries")
        if not corpus or not queries:
            return [[] for _ in queries]
        warn_about_top_k(top_k, len(corpus))
        texts = [document_text(document) for document in corpus]
        documents = pack(self._encoder.documents(texts, _ignore))
        ranking = search(self._encoder.queries(queries, _ignore), [lambda: documents], [len(texts)], top_k)
        return [
            [
                cast("RetrievedDict", {**corpus[row], "score": float(score)})
                for row, score in zip(rows, scores, strict=True)
            ]
            for rows, scores in zip(ranking.rows, ranking.scores, strict=True)
        ]


class SPLADERetriever(DenseRetriever):
    """Retrieves from a corpus in memory with SPLADE; exact.

    `device` is auto, cpu, cuda, cuda:N or mps; `dtype` is auto, float32, bfloat16 or float16.
    """

    _encoder_type = SpladeEncoder

    def __init__(
        self,
        model_name: str = PrepareConfig.retriever_model,
        *,
        device: str = "auto",
        dtype: str = "auto",
        batch_size: int = PrepareConfig.batch_size,
    ) -> None:
        super().__init__(model_name, device=device, dtype=dtype, batch_size=batch_size)


def _ignore(_: int) -> None:
    pass


def warn_about_top_k(top_k: int, passages: int) -> None:
    """Say that fewer passages exist than were asked for."""
    if top_k > passages:
        log.warning(
            "top-k %s is above the %s passages there are: every query gets all of them", top_k, passages
        )


def encode_passages(
    stage: Stage, passages: Stage, load: Callable[[], Encoder], weights: str, make: Callable[[Check], None]
) -> None:
    """Encode each shard of passages into a shard of vectors, while `make` still makes further passages.

    `make` runs in a thread of its own and calls the `Check` it is given, which raises when it shall stop.
    """
    if stage.done():
        return
    with track("vectors", "passages", _total(passages) if passages.done() else None) as tracker:

        def work(shard: int) -> pa.Table:
            table = passages.table(shard)
            rows = table.select(["title", "text"]).to_pylist()
            texts = [full_text(row["title"], row["text"]) for row in rows]
            encoder = load()
            with stage.noting(shard, lambda: encoder.halving.count):
                vectors = encoder.documents(texts, tracker.advance, TokenLists(table.column("tokens")))
            return pack(vectors, weights)

        with _behind(make) as check:
            stage.complete_behind(passages, work, check)
        tracker.total = _total(passages)
    vector_rows = [stage.table(shard) for shard in range(len(passages.finished().rows))]
    counts = {"passages": _total(passages)}
    if "terms" in vector_rows[0].column_names:
        counts["postings"] = sum(len(table.column("terms").combine_chunks().values) for table in vector_rows)
    stage.finish(passages.finished().rows, counts)


class TokenLists(Sequence[Array]):
    """A column of lists as NumPy arrays, without copies."""

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
    """Run `make` in a thread; gives a function that raises what went wrong there."""
    leave = threading.Event()

    def check() -> None:
        if leave.is_set():
            raise _Left

    with ThreadPoolExecutor(1) as executor:
        making = executor.submit(make, check)
        try:
            yield lambda: making.result() if making.done() else None
            making.result()
        finally:
            leave.set()


class _Left(Exception):  # noqa: N818
    """Whoever needed this work has gone."""


def retrieve(
    stage: Stage, queries: Stage, vectors: Stage, load: Callable[[], Encoder], config: PrepareConfig
) -> None:
    """Rank the passages for each shard of queries: query, rows of passages and scores, best first.

    So many shards of queries are searched together as `--search_memory` allows, at most 4,096 queries:
    that is what a crash can cost, and reading the vectors is then a small part of searching them.
    """
    if stage.done():
        return
    rows = queries.finished().rows
    top_k = config.top_k_retrieval
    found = vectors.finished()
    warn_about_top_k(top_k, sum(found.rows))
    done = sum(count for shard, count in enumerate(rows) if stage.has(shard))
    plan = SearchPlan.of(vectors, config)
    with track("retrieve", "queries", sum(rows), done) as tracker:

        def work(group: range) -> list[pa.Table]:
            tables = [queries.table(shard) for shard in group]
            encoded = [load().queries(table.column("query").to_pylist(), _ignore) for table in tables]
            count = sum(table.num_rows for table in tables)
            before = tracker.done
            ranking = search(
                sp.vstack(encoded, format="csr") if sp.issparse(encoded[0]) else np.concatenate(encoded),
                [functools.partial(vectors.table, shard, check=True) for shard in range(len(found.rows))],
                found.rows,
                top_k,
                threads=plan.threads,
                advance=lambda share: tracker.advance(before + int(share * count) - tracker.done),
            )
            ends = np.cumsum([table.num_rows for table in tables])[:-1]
            parts = zip(np.split(ranking.rows, ends), np.split(ranking.scores, ends), strict=True)
            return [
                candidates_table(table, Ranking(*part)) for table, part in zip(tables, parts, strict=True)
            ]

        stage.complete_together(len(rows), plan.shards_at_once, work)
    stage.finish(rows, {"queries": sum(rows), "candidates": sum(rows) * min(top_k, _total(vectors))})


class SearchPlan(NamedTuple):
    """How a search keeps within `--search_memory`."""

    threads: int
    shards_at_once: int

    @classmethod
    def of(cls, vectors: Stage, config: PrepareConfig) -> "SearchPlan":
        """Half of the memory for the vectors of one shard per thread, half for queries and their top k."""
        half = config.search_memory * 1e9 / 2
        rows = vectors.finished().rows
        shard = max(vectors.path(number).stat().st_size for number in range(len(rows)))
        threads = int(max(1, min(cores(), len(rows), half // (_UNPACKED * shard))))
        dense = "dense" in vectors.table(0).column_names
        per_query = config.top_k_retrieval * _BYTES_A_RESULT * (threads + 2) + _BYTES_A_QUERY
        per_query += max(rows) * 4 if dense else 0
        queries = min(_QUERIES_AT_ONCE, half / per_query)
        return cls(threads, int(max(1, queries // config.queries_per_shard)))


def candidates_table(queries: pa.Table, ranking: Ranking) -> pa.Table:
    """Columns query_id, query, rows list<int64>, scores list<float32>."""
    return pa.table(
        {
            "query_id": queries.column("query_id"),
            "query": queries.column("query"),
            "rows": pa.array(list(ranking.rows), pa.list_(pa.int64())),
            "scores": pa.array(list(ranking.scores), pa.list_(pa.float32())),
        }
    )


def _total(stage: Stage) -> int:
    return sum(stage.finished().rows)
