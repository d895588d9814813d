"""Retrieval from Python: `SPLADERetriever`, `DenseRetriever` from a corpus in memory, `IndexRetriever`."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import cast

from scaledown.config.prepare import PrepareConfig
from scaledown.data.input.corpus import PassageTable
from scaledown.data.retrieval.encoders import is_sparse, load_encoder
from scaledown.data.retrieval.index import Ranking, check_finite, pack, search, warn_about_top_k
from scaledown.data.retrieval.parts import only_state, open_stage
from scaledown.data.retrieval.stages import distinct, find_exactly, searched
from scaledown.errors import ModelError, UsageError
from scaledown.models import choose_device, resolve
from scaledown.records import DocumentDict, RetrievedDict, document_text
from scaledown.run.directory import RunDirectory
from scaledown.run.locations import storage_at
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
        _check(queries, top_k)
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


class IndexRetriever:
    """Retrieves from an index that `scaledown index` made, as `scaledown prepare` does; exact.

    It sees the index as it is when it is opened: what is added or removed later needs a new `IndexRetriever`.
    The vectors stay on disk; a search reads them shard by shard.

    Args:
        index_dir: The directory or URL of the index, the `--index_dir` of its command.
        device: auto, cpu, cuda, cuda:N or mps, for encoding queries.
        dtype: auto, float32, bfloat16 or float16.
        batch_size: Queries encoded at once; 0 is 32, on CUDA 256.

    Raises:
        UsageError: There is no index in `index_dir`, or there are several.
        ModelError: The model that encoded the passages is missing, or has changed since.
        RunDirectoryError: The index is unfinished.
    """

    def __init__(
        self,
        index_dir: str | Path,
        *,
        device: str = "auto",
        dtype: str = "auto",
        batch_size: int = PrepareConfig.batch_size,
    ) -> None:
        storage = storage_at(str(index_dir))
        state = only_state(storage)
        home = RunDirectory(storage)
        self._vectors = open_stage(home, "vectors", state.vectors)
        self._passages = PassageTable(open_stage(home, "passages", state.passages))
        self._count = searched(self._vectors)
        source = resolve(state.retriever)
        if source.identity(home.content_hash) != state.first[1]["retriever"]:
            raise ModelError(
                f"model {state.retriever} has changed since it encoded the passages in {storage}: use it as "
                "it was, or make a new index"
            )
        device = choose_device(device)
        size = PrepareConfig.batch_for("batch_size", batch_size, device)
        self._encoder = load_encoder(source, device, dtype, size)

    def __len__(self) -> int:
        """How many passages can be found."""
        return self._count

    def retrieve(self, queries: Sequence[str], top_k: int = 5) -> list[list[RetrievedDict]]:
        """The best passages for each query, best first; ties in the order of the index.

        The same text is found once, however many passages have it.

        Args:
            queries: The texts of the queries.
            top_k: Passages for each; all of them where there are fewer.

        Returns:
            For each query its passages: dictionaries with `id`, `title`, `text` and `score`.

        Raises:
            UsageError: `top_k` is below 1, or `queries` is one string.
        """
        _check(queries, top_k)
        if not queries:
            return []
        warn_about_top_k(top_k, self._count)
        encoded = self._encoder.queries(queries, no_progress)
        check_finite(encoded)

        def find(places: Sequence[int], depth: int) -> Ranking:
            return find_exactly(self._vectors, 0, encoded[places], depth, no_progress)

        ranking = find([*range(len(queries))], top_k)
        found = distinct(ranking, top_k, self._count, self._passages, find)
        return [
            [
                self._document(row, score)
                for row, score in zip(own.rows.tolist(), own.scores.tolist(), strict=True)
            ]
            for own in found
        ]

    def _document(self, row: int, score: float) -> RetrievedDict:
        passage = self._passages[row]
        return {"id": passage.passage_id, "title": passage.title, "text": passage.text, "score": score}


def _check(queries: Sequence[str], top_k: int) -> None:
    if top_k < 1:
        raise UsageError(f"top_k {top_k}: must be at least 1")
    if isinstance(queries, str):
        raise UsageError("queries is one string: give a list of queries")
