"""Decoding: reads prompts as embeddings, and computes the scores of each next token."""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import DynamicCache, DynamicLayer


class Decoding:
    """A batch of answers that a causal LM writes: one row for each answer, one token in each step.

    Rows need not begin at the same time: `join` adds rows, `keep` removes the others, `step` feeds each row
    its next token. All rows share one cache. A shorter row occupies the end of it, as if padded on the left.
    """

    def __init__(self, generator: Any) -> None:
        self._generator = generator
        self._takes_places = "position_ids" in inspect.signature(generator.forward).parameters
        self._clear()

    def _clear(self) -> None:
        self._cache: Any = None
        self._mask = torch.zeros(0, 0, dtype=torch.long)
        """[rows, length]: 0 at positions of the cache that a row does not use."""
        self._places = torch.zeros(0, 1, dtype=torch.long)
        """[rows, 1]: the position of each row's last token."""
        self.logits = torch.zeros(0, 0)
        """[rows, vocabulary]: the scores of each row's next token."""

    def __len__(self) -> int:
        return len(self._mask)

    @property
    def can_grow(self) -> bool:
        """Whether rows may join.

        They may not if a layer's cache drops old tokens (sliding windows): it cannot align rows of different
        lengths.
        """
        layers = getattr(self._cache, "layers", ())
        return not len(self) or (bool(layers) and all(type(layer) is DynamicLayer for layer in layers))

    def join(self, embedded: torch.Tensor, mask: torch.Tensor) -> None:
        """Read prompts, which become the last rows. After an error there may be no rows left.

        Args:
            embedded: [rows, length, width], padded on the left.
            mask: [rows, length], 0 at padding.
        """
        places = (mask.cumsum(1) - 1).clamp(min=0)  # [rows, length]
        last = torch.tensor([mask.shape[1] - 1], device=mask.device)
        # A tensor of indices: with a slice, torch would copy the output layer's weights for every row.
        logits, cache = self._forward(mask, places, None, inputs_embeds=embedded, logits_to_keep=last)
        places = places[:, -1:]
        if len(self):
            length = max(self._mask.shape[1], mask.shape[1])
            mask = torch.cat([_padded_rows(self._mask, length, 1), _padded_rows(mask, length, 1)])
            places = torch.cat([self._places, places])
            logits = torch.cat([self.logits, logits])
            try:
                _join(self._cache, cache)
            except BaseException:  # some layers may have the new rows while others do not
                self._clear()
                raise
            cache = self._cache
        self._cache, self._mask, self._places, self.logits = cache, mask, places, logits

    def step(self, tokens: torch.Tensor) -> None:
        """Compute the scores of each row's token after the next one.

        Args:
            tokens: [rows]: the next token of each row.
        """
        self._mask = torch.cat([self._mask, self._mask.new_ones(len(self), 1)], 1)
        self._places = self._places + 1
        self.logits, self._cache = self._forward(
            self._mask, self._places, self._cache, input_ids=tokens[:, None]
        )

    def keep(self, rows: Sequence[int]) -> None:
        """Keep only these rows, in this order."""
        if not rows:
            self._clear()
            return
        chosen = torch.tensor(list(rows), device=self._mask.device)
        self._mask, self._places = self._mask[chosen], self._places[chosen]
        self.logits = self.logits[chosen]
        self._cache.reorder_cache(chosen)  # the only method that all kinds of layers have
        unused = int(self._mask.any(0).int().argmax())  # columns that only removed rows used
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
    """Append the second cache's rows to the first, layer by layer: all at once needs twice the memory."""
    for own, other in zip(first.layers, second.layers, strict=True):
        length = max(own.keys.shape[2], other.keys.shape[2])
        own.keys = torch.cat([_padded_rows(layer.keys, length, 2) for layer in (own, other)])
        own.values = torch.cat([_padded_rows(layer.values, length, 2) for layer in (own, other)])
        other.keys = other.values = None


def _padded_rows(rows: torch.Tensor, length: int, axis: int) -> torch.Tensor:
    """Pad `rows` with zeros in front to `length` entries along an axis."""
    after = [0, 0] * (rows.ndim - 1 - axis)  # torch counts axes from the last
    return nn.functional.pad(rows, [*after, length - rows.shape[axis], 0])
