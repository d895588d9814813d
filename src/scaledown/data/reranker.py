"""Relevance of each document to its query: cross-encoders, and query likelihood under a causal LM."""

import logging
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import pyarrow as pa

from scaledown.config.prepare import PrepareConfig
from scaledown.data.input.corpus import PassageTable
from scaledown.data.prompts import LIKELIHOOD_AFTER, LIKELIHOOD_BEFORE
from scaledown.data.retrieval.splade import by_length
from scaledown.devices.gpus import OnDevice
from scaledown.errors import ModelError, UsageError
from scaledown.models import (
    Halving,
    ModelSource,
    choose_device,
    dtype_to_run,
    loadable,
    loading,
    onto,
    resolve,
)
from scaledown.records import QueryWithDocuments, check_records, document_text, full_text
from scaledown.run.progress import track, tracked
from scaledown.run.stage import Stage

log = logging.getLogger("scaledown")

LIKELIHOOD_PREFIX = "ql:"


class Pair(NamedTuple):
    """A query and the text of a document, title included."""

    query: str
    document: str


class Reranker(Protocol):
    """Scores pairs; higher is more relevant. Scores are raw: logits, or mean log-probabilities."""

    halving: Halving

    def score(self, pairs: Sequence[Pair], advance: Callable[[int], None]) -> list[float]:
        """One score a pair, in the order given."""


class CrossEncoderReranker:
    """A sentence-transformers cross-encoder with one output; scores are its logits."""

    def __init__(self, source: ModelSource, device: str, dtype: str, batch_size: int) -> None:
        import torch
        from sentence_transformers import CrossEncoder

        name, pinned = loadable(source)
        arguments: dict[str, Any] = {"model_kwargs": {"dtype": dtype_to_run(dtype, device), **onto(device)}}
        with loading(source):
            self._model = CrossEncoder(name, device=device, **pinned, **arguments)
        if self._model.num_labels != 1:
            raise ModelError(
                f"model {source.name} gives {self._model.num_labels} scores a pair; a reranker gives one"
            )
        _score_in_float32(self._model.model)
        self.name = source.name
        self._batch_size = batch_size
        self._raw = torch.nn.Identity()
        self.halving = Halving("--reranker_batch_size")

    def score(self, pairs: Sequence[Pair], advance: Callable[[int], None]) -> list[float]:
        """Logits, in the order of `pairs`."""

        def score(batch: Sequence[int]) -> Any:
            return self._model.predict(
                [tuple(pairs[i]) for i in batch],
                batch_size=len(batch),
                show_progress_bar=False,
                activation_fn=self._raw,
            )

        order = by_length([pair.document + pair.query for pair in pairs])
        return _in_batches(self, score, order, self._batch_size, advance)


class QueryLikelihoodReranker:
    """Mean log-probability of the question's tokens given the passage (UPR, Sachan et al. 2022).

    Works with any causal LM; needs no training for relevance.
    """

    def __init__(self, source: ModelSource, device: str, dtype: str, batch_size: int) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        name, pinned = loadable(source)
        with loading(source):
            self._tokenizer = AutoTokenizer.from_pretrained(name, **pinned)
            model = AutoModelForCausalLM.from_pretrained(
                name, dtype=dtype_to_run(dtype, device), **pinned, **onto(device)
            )
        self._model = model.eval()
        self.name = source.name
        self._device = device
        self._batch_size = batch_size
        self.halving = Halving("--reranker_batch_size")
        self._limit = int(getattr(model.config, "max_position_embeddings", 0) or 2048)
        self._after = self._ids(LIKELIHOOD_AFTER)

    def _ids(self, text: str, *, special: bool = False) -> list[int]:
        ids: list[int] = self._tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
        return ids

    def score(self, pairs: Sequence[Pair], advance: Callable[[int], None]) -> list[float]:
        """Mean log-probabilities, at most 0, in the order of `pairs`."""
        questions = [self._ids(" " + pair.query.strip())[: self._limit // 2] for pair in pairs]
        prompts = []
        for pair, question in zip(pairs, questions, strict=True):
            room = self._limit - len(question) - len(self._after)
            prompts.append(self._ids(LIKELIHOOD_BEFORE + pair.document, special=True)[:room] + self._after)

        def score(batch: Sequence[int]) -> list[float]:
            return self._batch([prompts[i] for i in batch], [questions[i] for i in batch])

        order = by_length([prompt + question for prompt, question in zip(prompts, questions, strict=True)])
        return _in_batches(self, score, order, self._batch_size, advance)

    def _batch(self, prompts: list[list[int]], questions: list[list[int]]) -> list[float]:
        import torch

        sequences = [prompt + question for prompt, question in zip(prompts, questions, strict=True)]
        length = max(map(len, sequences))
        longest = max(map(len, questions))
        ids = torch.zeros(len(sequences), length, dtype=torch.long)  # [batch, length], padded on the left
        mask = torch.zeros_like(ids)
        for row, sequence in enumerate(sequences):
            ids[row, length - len(sequence) :] = torch.tensor(sequence)
            mask[row, length - len(sequence) :] = 1
        with torch.inference_mode():
            logits = self._model(
                input_ids=ids.to(self._device),
                attention_mask=mask.to(self._device),
                position_ids=(mask.cumsum(1) - 1).clamp(min=0).to(self._device),
                logits_to_keep=longest + 1,
                use_cache=False,
            ).logits[:, :-1]  # [batch, longest, vocabulary]: each predicts the token after it
            targets = ids[:, -longest:].to(self._device)  # [batch, longest]
            chosen = torch.log_softmax(logits.float(), -1).gather(-1, targets[..., None])[..., 0].cpu()
        return [
            float(row[-len(question) :].mean()) if question else -math.inf
            for row, question in zip(chosen, questions, strict=True)
        ]


def _score_in_float32(model: Any) -> None:
    """Let the last layers of a classifier compute in float32: in bfloat16 many scores are the same number."""
    for name in ("classifier", "score"):
        if (head := getattr(model, name, None)) is not None:
            head.float()
            head.register_forward_pre_hook(lambda _, given: tuple(part.float() for part in given))


def _in_batches(
    reranker: "CrossEncoderReranker | QueryLikelihoodReranker",
    score: Callable[[Sequence[int]], Any],
    order: np.ndarray[Any, Any],
    batch_size: int,
    advance: Callable[[int], None],
) -> list[float]:
    """Scores of pairs, in their order, by batches of similar length."""
    parts: list[Any] = []
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size].tolist()
        parts += reranker.halving(score, batch)
        advance(len(batch))
    scores = np.empty(len(order), np.float32)
    if parts:
        scores[order] = np.concatenate(parts)
    if not np.isfinite(scores).all():
        raise ModelError(f"model {reranker.name} gave scores that are not numbers: try --dtype float32")
    return [float(value) for value in scores]


def score_once(reranker: Reranker, pairs: Sequence[Pair], advance: Callable[[int], None]) -> list[float]:
    """`reranker.score`, with pairs that come again scored once."""
    unique = list(dict.fromkeys(pairs))
    scores = dict(zip(unique, reranker.score(unique, advance), strict=True))
    advance(len(pairs) - len(unique))
    return [scores[pair] for pair in pairs]


def load_reranker(source: ModelSource, device: str, dtype: str, batch_size: int) -> Reranker:
    """The reranker behind `--reranker_model`. `source.name` begins with `ql:` for query likelihood."""
    likelihood = source.name.startswith(LIKELIHOOD_PREFIX)
    log.info("reranker: %s, %s", source.name, "query likelihood" if likelihood else "cross-encoder")
    kind = QueryLikelihoodReranker if likelihood else CrossEncoderReranker
    return kind(source, device, dtype, batch_size)


def resolve_reranker(name: str) -> ModelSource:
    """`resolve`, for names that may begin with `ql:`."""
    return resolve(name.removeprefix(LIKELIHOOD_PREFIX))._replace(name=name)


def scaled(score: float, scale: str) -> float:
    """A raw score on the scale asked for: as it is, or through the logistic function to 0..1."""
    if scale == "raw":
        return score
    return 1 / (1 + math.exp(-score)) if score >= 0 else math.exp(score) / (1 + math.exp(score))


def best_first(scores: Sequence[float], top_k: int) -> list[int]:
    """Positions of the `top_k` highest scores, best first; ties keep their order."""
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
    """Add `reranking_scores` to each record, one a document, in the order of its documents.

    Documents stay in their order, or with `top_k` the best so many are kept, best first. Documents are
    strings or `{"title", "text"}`. The records given are not changed.
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


def rerank(
    stage: Stage, candidates: Stage, passages: Stage, load: Callable[[], Reranker], per_query: int
) -> None:
    """Score the candidates of each shard and sort them, best first.

    All are kept, so that another `--top_k_reranking` needs no scoring. Adds the column reranking_scores
    list<float32>, raw.
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
            tracker.advance(len(records) * per_query - len(pairs))  # of queries with fewer
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
