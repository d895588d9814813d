"""Scores how relevant each document is to its query: from Python, and as a stage of a run."""

import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

import pyarrow as pa

from scaledown.config.prepare import PrepareConfig
from scaledown.data.input.corpus import PassageTable
from scaledown.data.reranker.base import Pair, Reranker
from scaledown.data.reranker.cross_encoder import CrossEncoderReranker
from scaledown.data.reranker.query_likelihood import QueryLikelihoodReranker
from scaledown.devices.choice import choose_device
from scaledown.devices.gpus import OnDevice
from scaledown.errors import UsageError
from scaledown.models.sources import ModelSource, resolve
from scaledown.records import QueryWithDocuments, check_records, document_text, full_text
from scaledown.run.progress import track, tracked
from scaledown.run.stage import Stage

log = logging.getLogger("scaledown")

LIKELIHOOD_PREFIX = "ql:"


def score_once(reranker: Reranker, pairs: Sequence[Pair], advance: Callable[[int], None]) -> list[float]:
    """Score pairs; equal pairs are scored once.

    Args:
        reranker: Scores the pairs.
        pairs: Pairs of a query and a document.
        advance: Called with the number of pairs that have been scored since the last call.

    Returns:
        A score for each pair, in their order.
    """
    unique = list(dict.fromkeys(pairs))
    scores = dict(zip(unique, reranker.score(unique, advance), strict=True))
    advance(len(pairs) - len(unique))
    return [scores[pair] for pair in pairs]


def load_reranker(source: ModelSource, device: str, dtype: str, batch_size: int) -> Reranker:
    """Load the model of `--reranker_model`. With `ql:` in front of its name, it scores query likelihood.

    Args:
        source: The model, from `resolve_reranker`.
        device: cpu, cuda, cuda:N or mps.
        dtype: auto, float32, bfloat16 or float16.
        batch_size: Pairs scored at once.

    Raises:
        ModelError: The model cannot be loaded, or gives several scores for a pair.
    """
    likelihood = source.name.startswith(LIKELIHOOD_PREFIX)
    log.info("reranker: %s, %s", source.name, "query likelihood" if likelihood else "cross-encoder")
    kind = QueryLikelihoodReranker if likelihood else CrossEncoderReranker
    return kind(source, device, dtype, batch_size)


def resolve_reranker(name: str) -> ModelSource:
    """Return `resolve(name)`, also for a name that begins with `ql:`."""
    return resolve(name.removeprefix(LIKELIHOOD_PREFIX))._replace(name=name)


def scaled(score: float, scale: str) -> float:
    """Convert a raw score to a scale.

    Args:
        score: The reranker's raw score.
        scale: `raw` leaves it unchanged; `sigmoid` applies the logistic function, which gives 0 to 1.
    """
    if scale == "raw":
        return score
    return 1 / (1 + math.exp(-score)) if score >= 0 else math.exp(score) / (1 + math.exp(score))


def best_first(scores: Sequence[float], top_k: int) -> list[int]:
    """Return the positions of the highest scores, best first; equal scores keep their order.

    Args:
        scores: The scores of the documents of a query.
        top_k: The most positions to return.
    """
    return sorted(range(len(scores)), key=lambda i: -scores[i])[:top_k]


def add_reranking_scores(
    queries_with_docs: Sequence[QueryWithDocuments],
    reranker_model: str = PrepareConfig.reranker_model,
    *,
    top_k: int | None = None,
    score_scale: str = "raw",
    device: str = "auto",
    dtype: str = "auto",
    batch_size: int = PrepareConfig.reranker_batch_size,
) -> list[QueryWithDocuments]:
    """Add `reranking_scores` to each record: one score for each document.

    Args:
        queries_with_docs: Records with `query` and `documents`; a document is a string or
            `{"title", "text"}`. They are not changed.
        reranker_model: A cross-encoder, or `ql:` and a causal language model.
        top_k: Keep only this many documents of each record, best first; None keeps all, in their order.
        score_scale: `raw`, or `sigmoid` for scores from 0 to 1.
        device: `auto`, `cpu`, `cuda`, `cuda:N` or `mps`.
        dtype: `auto`, `float32`, `bfloat16` or `float16`.
        batch_size: Pairs at once; 0 chooses by the device.

    Returns:
        New records, with `reranking_scores` in the order of their documents.

    Raises:
        UsageError: An argument has a value that is not allowed.
        InputError: A record is not usable.
        ModelError: The model cannot be loaded, or does not fit into memory.
    """
    if top_k is not None and top_k < 1:
        raise UsageError(f"top_k {top_k}: must be at least 1")
    if batch_size < 0:
        raise UsageError(f"batch_size {batch_size}: must not be negative; 0 suits the device")
    queries_with_docs = list(queries_with_docs)
    if score_scale not in {"raw", "sigmoid"}:
        raise UsageError(f"score_scale {score_scale!r}: use raw or sigmoid")
    check_records(queries_with_docs)
    device, source = choose_device(device), resolve_reranker(reranker_model)
    batch_size = PrepareConfig.batch_for("reranker_batch_size", batch_size, device)
    reranker = OnDevice("the reranker", device, lambda: load_reranker(source, device, dtype, batch_size))
    pairs = [
        Pair(record["query"], document_text(document))
        for record in queries_with_docs
        for document in record["documents"]
    ]
    with track("rerank", "pairs", len(pairs)) as tracker:
        scores = iter(score_once(reranker(), pairs, tracker.advance))
    reranker.release()
    result = []
    for record in queries_with_docs:
        documents: list[Any] = list(record["documents"])
        own = [next(scores) for _ in documents]
        kept = range(len(own)) if top_k is None else best_first(own, top_k)
        changed = {
            **record,
            "documents": [documents[i] for i in kept],
            "reranking_scores": [scaled(own[i], score_scale) for i in kept],
        }
        result.append(changed)
    return result  # type: ignore[return-value]  # the record's own further keys stay


def rerank_candidates(
    stage: Stage, candidates: Stage, passages: Stage, load: Callable[[], Reranker], per_query: int
) -> None:
    """Score the candidates of each shard and sort them, best first.

    All are kept, so that a run with another `--top_k_reranking` does not score them again.

    Args:
        stage: The stage of ranked candidates: columns as those of candidates, and `reranking_scores`,
            list<float32>, raw scores.
        candidates: The stage of candidates.
        passages: The stage of passages.
        load: Loads the reranker; called for each shard.
        per_query: Candidates of a query, for the progress.
    """
    if stage.done():
        return
    rows = candidates.planned()
    with tracked(stage, "rerank", "pairs", rows, per_query) as tracker:

        def work(shard: int) -> pa.Table:
            texts = PassageTable(passages)
            table = candidates.table(shard)
            records = table.to_pylist()
            pairs = []
            for record in records:
                for row in record["rows"]:
                    passage = texts[row]
                    pairs.append(Pair(record["query"], full_text(passage.title, passage.text)))
            reranker = load()
            with stage.noting(shard, lambda: reranker.halving.count):
                scores = iter(score_once(reranker, pairs, tracker.advance))
            tracker.advance(len(records) * per_query - len(pairs))  # of queries with fewer candidates
            columns: dict[str, list[Any]] = {"rows": [], "scores": [], "reranking_scores": []}
            for record in records:
                own = [next(scores) for _ in record["rows"]]
                kept = best_first(own, len(own))
                columns["rows"].append([record["rows"][i] for i in kept])
                columns["scores"].append([record["scores"][i] for i in kept])
                columns["reranking_scores"].append([own[i] for i in kept])
            return pa.table(
                {
                    "query_id": table.column("query_id"),
                    "query": table.column("query"),
                    "rows": pa.array(columns["rows"], pa.list_(pa.int64())),
                    "scores": pa.array(columns["scores"], pa.list_(pa.float32())),
                    "reranking_scores": pa.array(columns["reranking_scores"], pa.list_(pa.float32())),
                }
            )

        whole = stage.complete(len(rows), work)
    if whole:
        rows = stage.made()
        found = (stage.table(shard).column("rows").combine_chunks() for shard in range(len(rows)))
        stage.finish(rows, {"queries": sum(rows), "pairs": sum(len(lists.flatten()) for lists in found)})
