"""The base class of all kinds of compressors: what a kind declares, and how it compresses documents."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch


class Compressed(NamedTuple):
    """The compressed documents of a batch, in the order of their `places`."""

    embeddings: torch.Tensor
    """[memory tokens of all documents, generator width], document by document."""
    counts: list[int]
    """Memory tokens of each document."""
    relevance: torch.Tensor | None
    """[documents]: relevance to the query; None if the model does not rank documents."""
    token_scores: torch.Tensor | None = None
    """[documents, tokens]: scores of each document's own tokens; None if the kind does not pick tokens."""
    chosen: torch.Tensor | None = None
    """[documents, tokens] bool: the tokens that were picked."""


class Compressor:
    """A kind of compressor. Each entry of `COMPRESSORS` is an object of a subclass.

    The object itself holds no weights: these belong to the `ScaleDownModel` that each method receives.
    `model.compressor` reads query and document, and `add_parts` adds the other weights that the kind needs. A
    kind with a fixed number of memory tokens needs to define `states` alone.
    """

    label: str = ""
    """Name in tables; if empty, tables name the layers or the model of the compressor."""
    of_generator: bool = True
    """Whether `model.compressor` is a copy of the generator's first layers, or else a separate model."""
    model_name: str = ""
    """Name of the separate model; if empty, the value of `--compressor` is the name."""
    learning_rate: float = 1e-4
    """Learning rate of the compressor and its parts, unless `--learning_rate_compressor` sets another."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's betas."""
    part_rates: Mapping[str, float] = {}
    """Learning rates of parts as multiples of the compressor's, by a prefix of the weights' names. These
    parts have no weight decay."""
    reads_queries_once: bool = False
    """Whether `states` and `compress` support groups with `queries`: these are already read, and
    `states_after_queries` of `student/compressors/queries.py` continues with the documents. Only for causal
    compressors. A subclass that reads `ids` by itself sets it to False."""
    float32_parts: tuple[str, ...] = ()
    """Parts that stay in float32 for any dtype of the model."""
    rates: tuple[int, ...] = ()
    """Compression rates used in training, lowest first. The kind compresses at any rate between the first and
    the last, each document by its own length, and the documents of a question can share their memory tokens.
    Empty: all documents have the same number of memory tokens, set by `--compression_rate`."""
    ranks: bool = False
    """Whether it computes the relevance of documents without a reranking head."""
    has_head: bool = False
    """Whether `--enable_reranking` adds a reranking head (`model.rerank_token`, `model.score`)."""
    picks_tokens: bool = False
    """Whether it represents a document by some of the document's own tokens. Such a kind learns from the
    tokens that answers copy, and its pretraining uses cloze questions, which need no generator. Other kinds
    learn in pretraining to repeat and to continue text."""

    def add_parts(self, model: Any) -> None:
        """Add weights to a model, as attributes. `from_pretrained` or `start` sets their values.

        Args:
            model: The `ScaleDownModel`; its `generator`, `compressor` and `config` are set.
        """

    def start(self, model: Any, tokenizer: Any) -> None:
        """Set the initial values of the kind's weights, for training.

        Args:
            model: The `ScaleDownModel`, with pretrained weights in `generator` and `compressor`.
            tokenizer: The generator's tokenizer.
        """

    def loaded(self, model: Any) -> None:
        """Correct what loading from a folder has changed in a model.

        Args:
            model: The `ScaleDownModel`; all weights are loaded, its tokenizers are not set yet.
        """

    def choose_pretrained(self, model: Any) -> None:
        """Turn off the gradients of weights that are trained later but not in pretraining.

        Args:
            model: The `ScaleDownModel`, before pretraining.
        """

    def loss(self, compressed: Compressed, copied: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor | None:
        """Compute an additional loss, besides the one on answers.

        Args:
            compressed: The result of `compress`.
            copied: [documents, longest document] float32: 1 for tokens that the answer copies, else 0.
            sizes: Number of documents of each question.

        Returns:
            The sum over questions, a scalar; None if the kind has no such loss.
        """
        return None

    def states(self, model: Any, group: Any) -> torch.Tensor:
        """Compute the states of the memory tokens of each document in a group.

        Args:
            model: The `ScaleDownModel`.
            group: A `Group` of `student/batch.py`: `ids` [documents, length] are query and document, padded
                on the right; the document's own tokens are from `starts` to `stops` [documents]. Lengths are
                similar, except if processes share a model.

        Returns:
            [documents, memory tokens, width].

        Raises:
            NotImplementedError: The kind defines `compress` instead.
        """
        raise NotImplementedError

    def embed(self, model: Any, states: torch.Tensor) -> Compressed:
        """Turn the `states` of all documents into embeddings for the generator.

        Args:
            model: The `ScaleDownModel`.
            states: [documents, memory tokens, width], in the order of the documents' `places`.

        Returns:
            The embeddings. Here they are the states themselves, without relevance.
        """
        return Compressed(states.flatten(0, 1), [states.shape[1]] * len(states), None)

    def compress(self, model: Any, groups: Sequence[Any], shared: Sequence[int]) -> Compressed:
        """Compress documents.

        Args:
            model: The `ScaleDownModel`.
            groups: Groups of documents of similar length, see `states`.
            shared: Number of documents of each question, if these share their memory tokens; else empty.

        Returns:
            All documents in the order of their `places`.
        """
        if not groups:
            return no_documents(model)
        states = torch.cat([self.states(model, group) for group in groups])
        return self.embed(model, states[document_order(groups).to(states.device)])


def no_documents(model: Any) -> Compressed:
    """Return the result of compressing no documents."""
    embeddings = model.get_input_embeddings()
    none = embeddings.weight.new_zeros(0, embeddings.embedding_dim)
    return Compressed(none, [], none[:, 0].float() if model.config.ranks else None)


def document_order(groups: Sequence[Any]) -> torch.Tensor:
    """Return the permutation that sorts the documents of all groups, concatenated, by their `places`.

    Args:
        groups: One or more groups.

    Returns:
        [documents] int64: indices into the concatenated groups.
    """
    return torch.cat([group["places"] for group in groups]).argsort()
