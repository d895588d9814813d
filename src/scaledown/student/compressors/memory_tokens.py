"""Memory tokens (arXiv 2504.07109): trained tokens after each document, whose states replace its text."""

from typing import Any, Final

import torch
from torch import nn

from scaledown.student.batch import Group
from scaledown.student.compressor import Compressed, Compressor
from scaledown.student.compressors import layers
from scaledown.student.compressors.queries import states_after_queries


class MemoryTokens(Compressor):
    """A compressor that reads query, document and memory tokens, in this order.

    Args:
        learning_rate: Learning rate of the compressor and its parts.
        of_generator: Whether it is made of the generator's first layers; otherwise it is a separate model.
        model_name: Name of the separate model; if empty, the value of `--compressor` is the name.
    """

    has_head = True

    def __init__(self, learning_rate: float, *, of_generator: bool = False, model_name: str = "") -> None:
        self.learning_rate = learning_rate
        self.of_generator = self.reads_queries_once = of_generator
        self.model_name = model_name

    def add_parts(self, model: Any) -> None:
        """Add the memory tokens; for a separate model the map to the generator; if enabled, the head."""
        config = model.config
        width = model.compressor.get_input_embeddings().embedding_dim
        model.memory = nn.Parameter(torch.empty(config.memory_tokens, width))
        if not self.of_generator:
            model.mapping = layers.mapping(config, width, model.get_input_embeddings().embedding_dim)
        if config.enable_reranking:
            model.rerank_token = nn.Parameter(torch.empty(width))
            model.score = nn.Linear(width, 1)

    def start(self, model: Any, tokenizer: Any) -> None:
        """Initialize the new tokens with embeddings that are distributed like the vocabulary's."""
        model.memory.data = layers.token_like(model.compressor, model.config.memory_tokens)
        if model.config.enable_reranking:
            model.rerank_token.data = layers.token_like(model.compressor, 1)[0]

    def states(self, model: Any, group: Group) -> torch.Tensor:
        """Compute the states of the memory tokens and of the reranking token after them.

        Args:
            model: The `ScaleDownModel`.
            group: Queries and documents of similar length.

        Returns:
            [documents, tokens, width]: the memory tokens, then the reranking token if the model has a head.
        """
        extra = model.memory
        if model.config.enable_reranking:
            extra = torch.cat([extra, model.rerank_token[None]])
        ids, lengths = group["ids"].to(model.device), group["lengths"].to(model.device)
        if "queries" in group:
            states = states_after_queries(model.compressor, group, extra)
            return layers.states_of_extra(states, lengths - group["starts"].to(model.device), len(extra))
        return layers.compress(model.compressor, extra, ids, lengths, causal=self.of_generator)

    def embed(self, model: Any, states: torch.Tensor) -> Compressed:
        """Compute embeddings from the memory tokens' states, and relevance if the model has a head.

        Args:
            model: The `ScaleDownModel`.
            states: The result of `states` for all documents, in their order.

        Returns:
            `memory_tokens` embeddings of each document, and relevance, [documents], or None.
        """
        memory = states[:, : model.config.memory_tokens]
        embeddings = memory if self.of_generator else model.mapping(memory)
        relevance = model.score(states[:, -1])[:, 0] if model.config.enable_reranking else None
        return Compressed(embeddings.flatten(0, 1), [memory.shape[1]] * len(memory), relevance)


N_LAYERS: Final = MemoryTokens(5e-5, of_generator=True)
"""The generator's first layers, with the paper's learning rate for them; the generator has another rate."""
SEPARATE: Final = MemoryTokens(1e-4)
"""Any encoder or decoder, by its name."""
MODERNBERT: Final = MemoryTokens(1e-4, model_name="answerdotai/ModernBERT-base")
