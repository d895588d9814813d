"""Models that turn texts into vectors: their kinds, how the kind of a model is found, dense bi-encoders."""

import logging
from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple, Protocol, TypeAlias, cast

import numpy as np

from scaledown.data.retrieval.index import Array, Vectors
from scaledown.data.retrieval.splade import SpladeEncoder, by_length, in_batches
from scaledown.devices.choice import dtype_to_run
from scaledown.devices.halving import Halving
from scaledown.errors import ModelError
from scaledown.extensions import RETRIEVER_KINDS
from scaledown.models.sources import ModelSource
from scaledown.models.weights import loadable, loading, onto, read_config_file

log = logging.getLogger("scaledown")

Advance: TypeAlias = Callable[[int], None]


class Encoder(Protocol):
    """Turns texts into vectors whose inner product is their similarity."""

    halving: Halving
    """Halves batches that run out of memory; a run records how often."""

    def documents(
        self, texts: Sequence[str], advance: Advance, tokens: Sequence[Array] | None = None
    ) -> Vectors:
        """Encode documents.

        Args:
            texts: The texts, title included.
            advance: Called with the number of texts that have been encoded since the last call.
            tokens: The ids of each text in the model's own tokenizer, without special tokens; None if they
                are not known. An encoder may ignore them.

        Returns:
            Vectors [texts, dimensions]: CSR if the kind `is_sparse`, else a float32 array.
        """

    def queries(self, texts: Sequence[str], advance: Advance) -> Vectors:
        """Encode queries.

        Args:
            texts: The texts of the queries.
            advance: Called with the number of texts that have been encoded since the last call.

        Returns:
            Vectors [texts, dimensions] of the same type and width as those of documents.
        """


class DenseEncoder:
    """A sentence-transformers bi-encoder with cosine or inner-product similarity.

    Args:
        source: The model.
        device: cpu, cuda, cuda:N or mps.
        dtype: auto, float32, bfloat16 or float16.
        batch_size: Texts encoded at once.

    Raises:
        ModelError: The model cannot be loaded, or has another similarity.
    """

    def __init__(self, source: ModelSource, device: str, dtype: str, batch_size: int) -> None:
        from sentence_transformers import SentenceTransformer

        name, pinned = loadable(source)
        arguments: dict[str, Any] = {"model_kwargs": {"dtype": dtype_to_run(dtype, device), **onto(device)}}
        with loading(source):
            self._model = SentenceTransformer(name, device=device, **pinned, **arguments)
        similarity = self._model.similarity_fn_name
        if similarity not in {"cosine", "dot"}:
            raise ModelError(
                f"model {source.name}: similarity {similarity!r} is not supported; use cosine or dot"
            )
        self._device = device
        self._normalize = similarity == "cosine"
        self.halving = Halving("--batch_size")
        self._batch_size = batch_size

    def documents(
        self, texts: Sequence[str], advance: Advance, tokens: Sequence[Array] | None = None
    ) -> Array:
        """Encode documents. Vectors are normalized if the model's similarity is cosine.

        Args:
            texts: The texts, title included.
            advance: Called with the number of texts in each finished batch.
            tokens: Not used: the model tokenises the texts itself.

        Returns:
            float32 [texts, dimensions].
        """
        return self._encode(self._model.encode_document, texts, advance)

    def queries(self, texts: Sequence[str], advance: Advance) -> Array:
        """Encode queries. Vectors are normalized if the model's similarity is cosine.

        Args:
            texts: The texts of the queries.
            advance: Called with the number of texts in each finished batch.

        Returns:
            float32 [texts, dimensions].
        """
        return self._encode(self._model.encode_query, texts, advance)

    def _encode(self, encode: Callable[..., Any], texts: Sequence[str], advance: Advance) -> Array:
        def launch(batch: Sequence[int]) -> Any:
            return encode(
                [texts[i] for i in batch],
                batch_size=len(batch),
                show_progress_bar=False,
                convert_to_tensor=True,
                normalize_embeddings=self._normalize,
            )

        def read(vectors: Any) -> Array:
            return cast("Array", vectors.float().cpu().numpy())

        order, parts = by_length(texts), []
        batches = in_batches(order, self._batch_size)
        for batch, made in self.halving.each(batches, launch, read, self._device):
            parts += made
            advance(len(batch))
        return cast("Array", np.concatenate(parts)[np.argsort(order)])


class RetrieverKind(NamedTuple):
    """An entry of `RETRIEVER_KINDS`: a kind of model that turns texts into vectors."""

    takes: Callable[[ModelSource], bool]
    """Whether a model is of this kind. Reads its files and does not load it."""
    load: Callable[[ModelSource, str, str, int], Encoder]
    """Load an encoder, given a model, a device, a dtype and a batch size. Raises `ModelError`."""
    is_sparse: bool
    """Whether vectors are sparse (CSR). `--weights` and `--search approximate` need sparse vectors."""


def kind_of(source: ModelSource) -> str:
    """Find the kind of a retriever: the last entry of `RETRIEVER_KINDS` that accepts the model.

    Args:
        source: The model; its files are read, and it is not loaded.

    Returns:
        The name of the entry.

    Raises:
        ModelError: No kind accepts the model.
    """
    for name in reversed(list(RETRIEVER_KINDS)):
        kind: RetrieverKind = RETRIEVER_KINDS[name]
        if kind.takes(source):
            return name
    raise ModelError(f"model {source.name}: no kind of retriever can load it; use another model")


def is_sparse(source: ModelSource) -> bool:
    """Whether the vectors of a retriever are sparse."""
    kind: RetrieverKind = RETRIEVER_KINDS[kind_of(source)]
    return kind.is_sparse


def load_encoder(source: ModelSource, device: str, dtype: str, batch_size: int) -> Encoder:
    """Load the encoder of `--retriever_model`, by the model's kind.

    Args:
        source: The model.
        device: cpu, cuda, cuda:N or mps.
        dtype: auto, float32, bfloat16 or float16.
        batch_size: Texts encoded at once.

    Raises:
        ModelError: No kind accepts the model, or it cannot be loaded.
    """
    name = kind_of(source)
    kind: RetrieverKind = RETRIEVER_KINDS[name]
    log.info("retriever: %s, %s", source.name, name)
    return kind.load(source, device, dtype, batch_size)


def _is_splade(source: ModelSource) -> bool:
    """Whether a model is a sparse sentence-transformers model or a plain masked language model."""
    modules = read_config_file(source, "modules.json")
    if modules:
        return any("sparse_encoder" in module["type"] for module in modules)
    config = read_config_file(source, "config.json") or {}
    return any(name.endswith("ForMaskedLM") for name in config.get("architectures") or ())


SPLADE: Final = RetrieverKind(_is_splade, SpladeEncoder, is_sparse=True)
DENSE: Final = RetrieverKind(lambda _: True, DenseEncoder, is_sparse=False)
