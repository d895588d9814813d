"""Decoding: prompts as embeddings in, the scores of each next token out."""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import DynamicCache, DynamicLayer


class Decoding:
    """Answers that a causal LM writes at the same time, one row each, a token a step.

    Rows need not begin together: `join` adds some, `keep` leaves others out, `step` gives each its next
    token. What a row has read is kept in one cache, which holds a shorter row at its end.
    """

    def __init__(self, generator: Any) -> None:
        self._generator = generator
        self._takes_places = "position_ids" in inspect.signature(generator.forward).parameters
        self._clear()

    def _clear(self) -> None:
        self._cache: Any = None
        self._mask = torch.zeros(0, 0, dtype=torch.long)
        """[rows, length]: 0 where the cache holds nothing of a row."""
        self._places = torch.zeros(0, 1, dtype=torch.long)
        """[rows, 1]: the position of each row's last token."""
        self.logits = torch.zeros(0, 0)
        """[rows, vocabulary]: the scores of each row's next token."""

    def __len__(self) -> int:
        return len(self._mask)

    @property
    def can_grow(self) -> bool:
        """Whether rows may join those that are there; a cache that forgets old tokens holds none apart."""
        layers = getattr(self._cache, "layers", ())
        return not len(self) or (bool(layers) and all(type(layer) is DynamicLayer for layer in layers))

    def join(self, embedded: torch.Tensor, mask: torch.Tensor) -> None:
        """Read prompts, which become the last rows. What fails on the way may leave no row at all.

        Args:
            embedded: [rows, length, width], padded on the left.
            mask: [rows, length], 0 at padding.
        """
        places = (mask.cumsum(1) - 1).clamp(min=0)  # [rows, length]
        last = torch.tensor([mask.shape[1] - 1], device=mask.device)
        # As an index: of a slice, torch would copy the output layer's weights for every row.
        logits, cache = self._forward(mask, places, None, inputs_embeds=embedded, logits_to_keep=last)
        places = places[:, -1:]
        if len(self):
            length = max(self._mask.shape[1], mask.shape[1])
            mask = torch.cat([_widened(self._mask, length, 1), _widened(mask, length, 1)])
            places = torch.cat([self._places, places])
            logits = torch.cat([self.logits, logits])
            try:
                _join(self._cache, cache)
            except BaseException:  # some layers have the new rows, others do not
                self._clear()
                raise
            cache = self._cache
        self._cache, self._mask, self._places, self.logits = cache, mask, places, logits

    def step(self, tokens: torch.Tensor) -> None:
        """Give each row its next token, [rows]."""
        self._mask = torch.cat([self._mask, self._mask.new_ones(len(self), 1)], 1)
        self._places = self._places + 1
        self.logits, self._cache = self._forward(
            self._mask, self._places, self._cache, input_ids=tokens[:, None]
        )

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows only, and in this order."""
        if not rows:
            self._clear()
            return
        chosen = torch.tensor(list(rows), device=self._mask.device)
        self._mask, self._places = self._mask[chosen], self._places[chosen]
        self.logits = self.logits[chosen]
        self._cache.batch_select_indices(chosen)
        unused = int(self._mask.any(0).int().argmax())  # columns that were of longer rows
        if unused and self.can_grow:
            self._mask = self._mask[:, unused:]
            for layer in self._cache.layers:
                layer.keys, layer.values = layer.keys[:, :, unused:], layer.values[:, :, unused:]

    def _forward(
        self, mask: torch.Tensor, places: torch.Tensor, cache: Any, **read: Any
    ) -> tuple[torch.Tensor, Any]:
        if self._takes_places:
            read["position_ids"] = places
        output = self._generator(**read, attention_mask=mask, past_key_values=cache, use_cache=True)
        return output.logits[:, -1], output.past_key_values


def _join(first: DynamicCache, second: DynamicCache) -> None:
    """Let the first have the rows of both, layer by layer: both as a whole would need memory twice."""
    for own, other in zip(first.layers, second.layers, strict=True):
        length = max(own.keys.shape[2], other.keys.shape[2])
        own.keys = torch.cat([_widened(layer.keys, length, 2) for layer in (own, other)])
        own.values = torch.cat([_widened(layer.values, length, 2) for layer in (own, other)])
        other.keys = other.values = None


def _widened(rows: torch.Tensor, length: int, axis: int) -> torch.Tensor:
    """The same with `length` entries along an axis, the new ones 0 and in front."""
    after = [0, 0] * (rows.ndim - 1 - axis)  # torch counts axes from the last
    return nn.functional.pad(rows, [*after, length - rows.shape[axis], 0])
