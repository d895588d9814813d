"""Queries + corpus -> ranked passages, by SPLADE or by a dense bi-encoder."""

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, TypeAlias, cast

import numpy as np
import pyarrow as pa

from scaledown.config import PrepareConfig
from scaledown.data.index import Array, Ranking, Vectors, pack, search, unpack
from scaledown.data.splade import SpladeEncoder, by_length
from scaledown.errors import ModelError, UsageError
from scaledown.models import (
    ModelSource,
    choose_device,
    choose_dtype,
    loadable,
    loading,
    memory_errors,
    read_config_file,
    resolve,
)
from scaledown.progress import track
from scaledown.records import DocumentDict, RetrievedDict, document_text, full_text
from scaledown.store import Stage

log = logging.getLogger("scaledown")

Advance: TypeAlias = Callable[[int], None]


class Encoder(Protocol):
    """Turns texts into vectors whose inner product is their similarity."""

    def documents(self, texts: Sequence[str], advance: Advance) -> Vectors:
        """Vectors of documents [texts, dimensions]."""

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
        self._batch_size = batch_size

    def documents(self, texts: Sequence[str], advance: Advance) -> Array:
        """Vectors of documents, float32 [texts, dimensions]."""
        return self._encode(self._model.encode_document, texts, advance)

    def queries(self, texts: Sequence[str], advance: Advance) -> Array:
        """Vectors of queries, float32 [texts, dimensions]."""
        return self._encode(self._model.encode_query, texts, advance)

    def _encode(self, encode: Callable[..., Any], texts: Sequence[str], advance: Advance) -> Array:
        order, parts = by_length(texts), []
        for start in range(0, len(texts), self._batch_size):
            batch = [texts[i] for i in order[start : start + self._batch_size]]
            with memory_errors("--batch_size"):
                vectors = encode(
                    batch,
                    batch_size=self._batch_size,
                    show_progress_bar=False,
                    convert_to_tensor=True,
                    normalize_embeddings=self._normalize,
                )
            parts.append(vectors.float().cpu().numpy())
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
        documents = unpack(pack(self._encoder.documents(texts, _ignore)))
        ranking = search(self._encoder.queries(queries, _ignore), [documents], top_k)
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


def encode_passages(stage: Stage, passages: Stage, load: Callable[[], Encoder]) -> None:
    """Encode each shard of passages into a shard of vectors."""
    if stage.done():
        return
    rows = passages.finished().rows
    done = sum(count for shard, count in enumerate(rows) if stage.has(shard))
    with track("vectors", "passages", sum(rows), done) as tracker:

        def work(shard: int) -> dict[str, Array]:
            table = passages.table(shard).select(["title", "text"]).to_pylist()
            texts = [full_text(row["title"], row["text"]) for row in table]
            return pack(load().documents(texts, tracker.advance))

        stage.complete(len(rows), work)
    stage.finish(rows, {"passages": sum(rows)})


def retrieve(stage: Stage, queries: Stage, vectors: Stage, load: Callable[[], Encoder], top_k: int) -> None:
    """Rank the passages for each shard of queries: query, rows of passages and scores, best first."""
    if stage.done():
        return
    rows = queries.finished().rows
    shards = len(vectors.finished().rows)
    warn_about_top_k(top_k, sum(vectors.finished().rows))
    done = sum(count for shard, count in enumerate(rows) if stage.has(shard))
    with track("retrieve", "queries", sum(rows), done) as tracker:

        def work(shard: int) -> pa.Table:
            table = queries.table(shard)
            encoded = load().queries(table.column("query").to_pylist(), _ignore)
            ranking = search(encoded, _shards(vectors, shards), top_k)
            tracker.advance(table.num_rows)
            return candidates_table(table, ranking)

        stage.complete(len(rows), work)
    stage.finish(rows, {"queries": sum(rows), "candidates": sum(rows) * min(top_k, _total(vectors))})


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


def _shards(vectors: Stage, count: int) -> Iterator[Vectors]:
    for shard in range(count):
        yield unpack(vectors.arrays(shard))
