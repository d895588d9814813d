"""Retrieval from Python: from a corpus in memory, or from an index that `scaledown index` made."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import cast

from scaledown.config.prepare import PrepareConfig
from scaledown.data.input.corpus import PassageTable
from scaledown.data.retrieval.encoders import is_sparse, load_encoder
from scaledown.data.retrieval.index import Ranking, check_finite, pack, search, warn_about_top_k
from scaledown.data.retrieval.parts import dtype_of, only_state, open_stage
from scaledown.data.retrieval.stages import distinct, find_exactly, searched
from scaledown.devices.choice import choose_device
from scaledown.errors import ModelError, UsageError
from scaledown.models.sources import resolve
from scaledown.records import DocumentDict, RetrievedDict, document_text
from scaledown.run.directory import RunDirectory
from scaledown.run.locations import storage_at
from scaledown.run.progress import no_progress

log = logging.getLogger(__name__)


class DenseRetriever:
    """Retrieves from a corpus in memory with a sentence-transformers bi-encoder.

    Args:
        model_name: A model of the hub, a folder, or `bundled:NAME`.
        device: auto, cpu, cuda, cuda:N or mps.
        dtype: auto, float32, bfloat16 or float16.
        batch_size: Texts encoded at once; 0 is 32, on CUDA 256.

    Raises:
        ModelError: The model is a SPLADE model, or cannot be loaded.
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
        """Find the best documents for each query, best first; ties in corpus order.

        Args:
            queries: The texts of the queries.
            corpus: Dictionaries with `text` and optionally `id` and `title`.
            top_k: Documents for each query; all documents if there are fewer.

        Returns:
            For each query its documents: the dictionaries of `corpus`, with `score`.

        Raises:
            UsageError: `top_k` is below 1, or `queries` is one string.
            InputError: A document has no text.
            ModelError: The model gave vectors that are not numbers, or a text alone does not fit into memory.
        """
        _check_queries(queries, top_k)
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
    """Retrieves from a corpus in memory with SPLADE, by exact search.

    Args:
        model_name: A model of the hub, a folder, or `bundled:NAME`.
        device: auto, cpu, cuda, cuda:N or mps.
        dtype: auto, float32, bfloat16 or float16.
        batch_size: Texts encoded at once; 0 is 32, on CUDA 256.

    Raises:
        ModelError: The model is a dense model, or cannot be loaded.
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
    """Retrieves from an index that `scaledown index` made, by exact search.

    A retriever keeps the state of the index that it opened: changes of the index need a new retriever. The
    vectors stay on disk; a search reads them shard by shard.

    Args:
        index_dir: The directory or URL of the index, as in `--index_dir`.
        device: auto, cpu, cuda, cuda:N or mps, for encoding queries.
        dtype: auto, float32, bfloat16 or float16; auto is that of the passages if they were encoded on this
            kind of device.
        batch_size: Queries encoded at once; 0 is 32, on CUDA 256.

    Raises:
        UsageError: `index_dir` has no index, or several.
        ModelError: The model that encoded the passages is missing, or has changed.
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
                f"model {state.retriever} has changed since it encoded the passages in {storage}: use the "
                "earlier model, or make a new index"
            )
        device = choose_device(device)
        size = PrepareConfig.batch_for("batch_size", batch_size, device)
        made = dtype_of([state], device) if dtype == "auto" else ""
        self._encoder = load_encoder(source, device, made or dtype, size)

    def __len__(self) -> int:
        """The number of passages that can be found."""
        return self._count

    def retrieve(self, queries: Sequence[str], top_k: int = 5) -> list[list[RetrievedDict]]:
        """Find the best passages for each query, best first; ties in the order of the index.

        Of several passages with the same text, only the first is returned.

        Args:
            queries: The texts of the queries.
            top_k: Passages for each query; all passages if there are fewer.

        Returns:
            For each query its passages: dictionaries with `id`, `title`, `text` and `score`.

        Raises:
            UsageError: `top_k` is below 1, or `queries` is one string.
            ModelError: The model gave vectors that are not numbers, or a query does not fit into memory.
            RunDirectoryError: A shard of the index is missing or damaged.
        """
        _check_queries(queries, top_k)
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


def _check_queries(queries: Sequence[str], top_k: int) -> None:
    if top_k < 1:
        raise UsageError(f"top_k {top_k}: must be at least 1")
    if isinstance(queries, str):
        raise UsageError("queries is one string: give a list of queries")
