"""Retrieval from a corpus in memory: `SPLADERetriever` and `DenseRetriever`."""

import logging
from collections.abc import Sequence
from typing import cast

from scaledown.config.prepare import PrepareConfig
from scaledown.data.retrieval.encoders import is_sparse, load_encoder
from scaledown.data.retrieval.index import pack, search, warn_about_top_k
from scaledown.errors import ModelError, UsageError
from scaledown.models import choose_device, resolve
from scaledown.records import DocumentDict, RetrievedDict, document_text
from scaledown.run.progress import no_progress

log = logging.getLogger(__name__)


class DenseRetriever:
    """Retrieves from a corpus in memory with a sentence-transformers bi-encoder.

    `device` is auto, cpu, cuda, cuda:N or mps; `dtype` is auto, float32, bfloat16 or float16.
    """

    _is_sparse = False

    def __init__(
        self,
        model_name: str,
        *,
        device: str = "auto",
        dtype: str = "auto",
        batch_size: int = PrepareConfig.batch_size,
    ) -> None:
        source = resolve(model_name)
        if is_sparse(source) != self._is_sparse:
            kind, right = ("SPLADE", "SPLADERetriever") if is_sparse(source) else ("dense", "DenseRetriever")
            raise ModelError(f"model {model_name} is a {kind} model: use {right}")
        device = choose_device(device)
        size = PrepareConfig.batch_for("batch_size", batch_size, device)
        self._encoder = load_encoder(source, device, dtype, size)

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
        documents = pack(self._encoder.documents(texts, no_progress))
        ranking = search(
            self._encoder.queries(queries, no_progress), [lambda: documents], [len(texts)], top_k
        )
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

    _is_sparse = True

    def __init__(
        self,
        model_name: str = PrepareConfig.retriever_model,
        *,
        device: str = "auto",
        dtype: str = "auto",
        batch_size: int = PrepareConfig.batch_size,
    ) -> None:
        super().__init__(model_name, device=device, dtype=dtype, batch_size=batch_size)
