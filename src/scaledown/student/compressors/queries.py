"""Read each query once for all its documents, with a causal compressor.

A query stands before each of its documents, and causal attention does not look ahead. So the keys and values
of its tokens are the same for all of its documents. They are computed once, and the compressor continues
with each document's own tokens. This is for compression without gradients; training reads query and
document together.
"""

import inspect
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.cache_utils import DynamicCache, DynamicLayer

from scaledown.student.batch import FIXED_TOKENS, EncodedDocument, Group, group
from scaledown.student.compressors import layers


class ReadQueries(NamedTuple):
    """Queries that the compressor has read."""

    cache: Any
    """Keys and values of each layer, [queries, heads, length, size], padded on the left."""
    mask: torch.Tensor
    """[queries, length]: 0 at padding, else 1."""


def grouped(
    compressor: Any, documents: Sequence[EncodedDocument], most_tokens: int, device: Any
) -> list[Group]:
    """Group documents as `group` does; if it saves work, read their queries first.

    Args:
        compressor: A causal compressor.
        documents: The documents of one or more queries.
        most_tokens: The most tokens that are read at a time, and the most positions of a group's cache.
        device: The compressor's device.

    Returns:
        The groups. If they have `queries`, the states come from `states_after_queries`.
    """
    places_of: dict[tuple[int, ...], list[int]] = {}
    for place, one in enumerate(documents):
        places_of.setdefault(tuple(one.ids[: one.start]), []).append(place)
    longest = max(map(len, places_of), default=0)
    saved = sum(one.start for one in documents) - len(places_of) * longest
    # Positions of a row: the longest query, document and memory tokens, and the reranking token.
    positions = longest + max((len(one.ids) - one.start + one.memory for one in documents), default=0) + 1
    if saved <= FIXED_TOKENS or () in places_of or not _goes_on(compressor, positions):
        return group(documents, most_tokens)
    groups: list[Group] = []
    at_once = max(1, most_tokens // longest)
    for first in range(0, len(places_of), at_once):
        part = dict(itertools.islice(places_of.items(), first, first + at_once))
        places = [place for own in part.values() for place in own]
        asked = torch.tensor([number for number, own in enumerate(part.values()) for _ in own])
        queries = _read_queries(compressor, list(part), longest, device)
        for own in group([documents[place] for place in places], most_tokens, after_queries=longest):
            own["queries"], own["asked"] = queries, asked[own["places"]]
            own["places"] = torch.tensor(places)[own["places"]]
            groups.append(own)
    return groups


def states_after_queries(compressor: Any, own: Group, extra: torch.Tensor | None = None) -> torch.Tensor:
    """Compute the states of documents' tokens whose queries are already read.

    Args:
        compressor: The compressor that has read the queries.
        own: A group with `queries`.
        extra: [k, width]: embeddings of tokens that follow each document's last token.

    Returns:
        [documents, longest document + k, width]: states of each document's tokens, of the extra tokens, and
        of padding.
    """
    queries: ReadQueries = own["queries"]
    device = queries.mask.device
    ids, starts, lengths, asked = (own[name].to(device) for name in ("ids", "starts", "lengths", "asked"))
    lengths = lengths - starts
    steps = torch.arange(max(1, int(lengths.max())), device=device)
    ids = ids.gather(1, (starts[:, None] + steps).clamp(max=ids.shape[1] - 1))
    embedded = compressor.get_input_embeddings()(ids)  # [documents, tokens, width]
    if extra is not None:
        embedded = layers.with_extra(embedded, lengths, extra)
    steps = torch.arange(embedded.shape[1], device=device)
    cache = DynamicCache()
    for number, read in enumerate(queries.cache.layers):
        cache.update(read.keys[asked], read.values[asked], number)
    # Padding on the right needs no mask: causal attention does not look there.
    states: torch.Tensor = compressor(
        inputs_embeds=embedded,
        attention_mask=nn.functional.pad(queries.mask[asked], (0, len(steps)), value=1),
        position_ids=starts[:, None] + steps,
        past_key_values=cache,
        use_cache=True,
    ).last_hidden_state
    return states


def _read_queries(
    compressor: Any, queries: Sequence[Sequence[int]], longest: int, device: Any
) -> ReadQueries:
    ids = torch.zeros(len(queries), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, tokens in enumerate(queries):
        ids[row, longest - len(tokens) :] = torch.tensor(tokens, dtype=torch.long)
        mask[row, longest - len(tokens) :] = 1
    ids, mask = ids.to(device), mask.to(device)
    output = compressor(
        input_ids=ids,
        attention_mask=mask,
        position_ids=(mask.cumsum(1) - 1).clamp(min=0),
        use_cache=True,
    )
    return ReadQueries(output.past_key_values, mask)


def _goes_on(compressor: Any, positions: int) -> bool:
    """Whether the compressor takes `position_ids`, has enough positions, and keeps all keys and values.

    A sliding window drops old ones, and layers without attention keep other states.
    """
    most = getattr(compressor.config, "max_position_embeddings", None)
    kept = DynamicCache(config=compressor.config).layers
    takes_positions = "position_ids" in inspect.signature(compressor.forward).parameters
    keeps_all = all(type(layer) is DynamicLayer for layer in kept)
    has_positions = most is None or positions <= most
    return has_positions and takes_positions and keeps_all and not getattr(compressor, "_is_stateful", False)
