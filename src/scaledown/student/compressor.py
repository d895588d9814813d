"""What every kind of compressor declares, and how it makes embeddings of documents."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch


class Compressed(NamedTuple):
    """What stands for the documents of a batch, in the order of their `places`."""

    embeddings: torch.Tensor
    """[memory tokens of all documents, generator width], document by document."""
    counts: list[int]
    """Memory tokens of each document."""
    relevance: torch.Tensor | None
    """[documents]: relevance to the query, where the model gives one."""
    token_scores: torch.Tensor | None = None
    """[documents, tokens]: of each document's own tokens, where the kind picks tokens."""
    chosen: torch.Tensor | None = None
    """[documents, tokens] bool: the tokens that were picked."""


class Compressor:
    """A kind of compressor, which an entry of `COMPRESSORS` is an object of.

    The weights belong to the `ScaleDownModel` that each method is given: `model.compressor` reads query and
    document, and `add_parts` adds what else the kind needs. A kind with a fixed number of memory tokens
    needs `states` alone.
    """

    label: str = ""
    """Its name in tables, where that says more than the layers or the model that it is made of."""
    of_generator: bool = True
    """Whether `model.compressor` is a copy of the generator's first layers; else it is a model of its own."""
    model_name: str = ""
    """That model; empty: the value of `--compressor` names it."""
    learning_rate: float = 1e-4
    """Of the compressor and its parts, where `--learning_rate_compressor` gives no other."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Of AdamW."""
    part_rates: Mapping[str, float] = {}
    """Learning rates of parts, as multiples of that of the compressor, by the beginnings of their weights'
    names. They have no weight decay."""
    float32_parts: tuple[str, ...] = ()
    """Parts that stay in float32 whatever the model's dtype is."""
    rates: tuple[int, ...] = ()
    """Compression rates that it is trained at, lowest first. It then compresses at any rate between them,
    each document by its own length, and the documents of a question can share their memory tokens. Empty: all
    documents have the same number of memory tokens, by `--compression_rate`."""
    ranks: bool = False
    """Whether it gives the relevance of documents by itself."""
    has_head: bool = False
    """Whether `--enable_reranking` gives it a reranking head (`model.rerank_token`, `model.score`)."""
    picks_tokens: bool = False
    """Whether some of a document's own tokens stand for it. It then learns from the tokens that answers copy,
    and in pretraining from cloze questions, which need no generator; others learn there to repeat and to
    continue text."""

    def add_parts(self, model: Any) -> None:
        """Add weights to a model, as attributes; `from_pretrained` or `start` gives them values."""

    def start(self, model: Any, tokenizer: Any) -> None:
        """Set the values that training begins with. `tokenizer` is the generator's."""

    def loaded(self, model: Any) -> None:
        """Correct what loading from a folder has changed."""

    def choose_pretrained(self, model: Any) -> None:
        """Turn off gradients of weights that training learns and pretraining does not."""

    def loss(self, compressed: Compressed, copied: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor | None:
        """A loss besides that of answers, summed over questions, []; None for none.

        Args:
            compressed: What `compress` gave.
            copied: [documents, tokens], 1 where an answer's token stands.
            sizes: How many documents each question has.
        """
        return None

    def states(self, model: Any, group: Any) -> torch.Tensor:
        """What stands for each document of a group: [documents, memory tokens, width].

        Args:
            model: The `ScaleDownModel`.
            group: A `Group` of `student/batch.py`: `ids` [documents, length] are query and document, padded
                on the right; the document's own tokens stand from `starts` to `stops` [documents].
        """
        raise NotImplementedError

    def embed(self, model: Any, states: torch.Tensor) -> Compressed:
        """The generator's input from the `states` of all documents, in order."""
        return Compressed(states.flatten(0, 1), [states.shape[1]] * len(states), None)

    def compress(self, model: Any, groups: Sequence[Any], shared: Sequence[int]) -> Compressed:
        """Compress documents.

        Args:
            model: The `ScaleDownModel`.
            groups: Documents of similar length, see `states`.
            shared: How many documents each question has, where these share their memory tokens; else empty.

        Returns:
            All documents in the order of their `places`.
        """
        if not groups:
            return nothing(model)
        states = torch.cat([self.states(model, group) for group in groups])
        return self.embed(model, states[in_order(groups).to(states.device)])


def nothing(model: Any) -> Compressed:
    """What stands for no documents."""
    embeddings = model.get_input_embeddings()
    none = embeddings.weight.new_zeros(0, embeddings.embedding_dim)
    return Compressed(none, [], none[:, 0].float() if model.config.ranks else None)


def in_order(groups: Sequence[Any]) -> torch.Tensor:
    """Where among the documents of the groups, one after the other, each document of the batch stands."""
    return torch.cat([group["places"] for group in groups]).argsort()
