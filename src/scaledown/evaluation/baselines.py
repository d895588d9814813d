"""Baselines for compression: simple choices of tokens, and answers without a generator.

With `first`, `keywords` and `random` the generator reads as many tokens of each document as compression has
memory tokens for it. `echo` and `echo_span` answer with tokens of the documents that a pointer picks.
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from random import Random
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np
import scipy.sparse as sp

from scaledown.config.evaluate import SYSTEMS, EvaluateConfig
from scaledown.data.retrieval.encoders import load_encoder
from scaledown.devices.choice import choose_device
from scaledown.models.sources import ModelSource, resolve

if TYPE_CHECKING:
    from scaledown.student.model import ScaleDownModel

READERS: Final = tuple(name for name, system in SYSTEMS.items() if system.reads_tokens)
ECHOES: Final = tuple(name for name, system in SYSTEMS.items() if system.echoes)

_LONGEST_SPAN: Final = 8  # tokens
_LEAST_SHARE: Final = 1 / 4  # of the best token's probability


class DocumentTokens(NamedTuple):
    """A document in the generator's tokens, cut at the model's `doc_max_length`."""

    text: str
    """The whole text of the document."""
    ids: list[int]
    """[tokens]."""
    spans: list[tuple[int, int]]
    """[tokens]: first character and end of each token in `text`."""


Weigh = Callable[[str, Sequence[DocumentTokens]], list[list[float]]]
"""Weighs the tokens of a query's documents, [documents][tokens]; those with the highest weights are read."""


def answer_by_baseline(
    system: str,
    model: "ScaleDownModel",
    queries: list[str],
    documents: Sequence[Sequence[str]],
    *,
    weigh: Callable[[], Weigh],
    config: EvaluateConfig,
) -> list[str]:
    """Let a baseline answer.

    Args:
        system: One of `READERS` or `ECHOES`.
        model: Its generator reads the tokens of `READERS`; for `ECHOES` it is a pointer and picks them.
        queries: The questions.
        documents: The documents of each question.
        weigh: Returns the function that weighs the tokens; called for `READERS` alone.
        config: Its rate, budget, length of answers and size of batches are used.

    Returns:
        An answer for each question.

    Raises:
        InputError: A prompt does not fit the generator.
        UsageError: The system needs a pointer and the model is not one, or the model does not have the rate.
    """
    pairs = list(zip(queries, documents, strict=True))
    if system in ECHOES:
        with model.reading():
            if system == "echo_span":
                return [echo_span(model, *pair) for pair in pairs]
            return [echo(model, *pair, rate=config.compression_rate, budget=config.budget) for pair in pairs]
    read = [[tokenised(model, document) for document in own] for own in documents]
    kept = [
        [
            highest(weights, memory_tokens(model, one, config.compression_rate))
            for one, weights in zip(own, weigh()(query, own), strict=True)
        ]
        for query, own in zip(queries, read, strict=True)
    ]
    chosen = [list(zip(*own, strict=True)) for own in zip(read, kept, strict=True)]
    size: dict[str, Any] = {"max_new_tokens": config.max_new_tokens, "batch_size": config.batch_size}
    if model.config.kind.picks_tokens:
        embeddings = [[_embedded(model, one.ids, places) for one, places in own] for own in chosen]
        return model.answer(queries, embeddings, **size)
    texts = [[text_of(model, one.ids, places) for one, places in own] for own in chosen]
    return model.answer(queries, texts, compressed=False, **size)


def tokenised(model: "ScaleDownModel", document: str) -> DocumentTokens:
    """Tokenize a document for the generator, cut at the same length as for the compressor.

    Args:
        model: Its tokenizer and `doc_max_length` are used.
        document: The text.
    """
    read = model.tokenizer(
        document,
        add_special_tokens=False,
        split_special_tokens=True,
        return_offsets_mapping=True,
        verbose=False,
    )
    longest = model.config.doc_max_length
    return DocumentTokens(document, read["input_ids"][:longest], read["offset_mapping"][:longest])


def memory_tokens(model: "ScaleDownModel", document: DocumentTokens, rate: int) -> int:
    """Return how many memory tokens compression has for a document.

    Args:
        model: Its settings are used.
        document: The document's tokens.
        rate: Document tokens for each memory token; 0 is the model's own rate.
    """
    return model.config.memory_tokens_of(len(document.ids), rate or model.config.compression_rate)


def highest(weights: Sequence[float], count: int) -> list[int]:
    """Choose the highest weights. Of equal weights the first is chosen.

    Args:
        weights: [tokens].
        count: Number of weights to choose; all if there are fewer.

    Returns:
        Indices, ascending.
    """
    return sorted(sorted(range(len(weights)), key=lambda place: -weights[place])[:count])


def weighing(system: str, config: EvaluateConfig) -> Weigh:
    """Return the function that weighs tokens for a baseline.

    Args:
        system: One of `READERS`.
        config: `seed` for `random`; for `keywords` its model, device and dtype.

    Raises:
        ModelError: The model for `keywords` cannot be loaded.
    """
    if system == "first":
        return lambda _, documents: [[-float(place) for place in range(len(one.ids))] for one in documents]
    if system == "random":
        return functools.partial(random_weights, config.seed)
    return Keywords(resolve(config.keyword_model), choose_device(config.device), config.dtype)


def random_weights(seed: int, query: str, documents: Sequence[DocumentTokens]) -> list[list[float]]:
    """Draw weights that depend on the seed and the query alone.

    Args:
        seed: The seed of the evaluation.
        query: The question.
        documents: The tokens of its documents.

    Returns:
        [documents][tokens], from 0 to 1.
    """
    random = Random(f"{seed} {query}")  # noqa: S311
    return [[random.random() for _ in one.ids] for one in documents]


class Keywords:
    """Weighs a token by the query's SPLADE vector, which has a weight for each word-piece.

    A token that overlaps several word-pieces has the highest of their weights.
    """

    def __init__(self, source: ModelSource, device: str, dtype: str) -> None:
        from scaledown.student.model import load_tokenizer

        self._encoder = load_encoder(source, device, dtype, batch_size=1)
        self._tokenizer = load_tokenizer(source)

    def __call__(self, query: str, documents: Sequence[DocumentTokens]) -> list[list[float]]:
        """Return weights, [documents][tokens]; 0 for word-pieces that the query's vector does not have."""
        vector = sp.csr_matrix(self._encoder.queries([query], lambda _: None)).toarray()[0]  # [vocabulary]
        found = []
        for one in documents:
            read = self._tokenizer(
                one.text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
            )
            weights = np.zeros(len(one.text))  # of each character
            for piece, (begin, end) in zip(read["input_ids"], read["offset_mapping"], strict=True):
                weights[begin:end] = vector[piece]
            found.append([float(weights[begin:end].max(initial=0.0)) for begin, end in one.spans])
        return found


def echo(model: "ScaleDownModel", query: str, documents: Sequence[str], *, rate: int, budget: str) -> str:
    """Answer with the tokens that a pointer picks in all documents.

    Args:
        model: A pointer.
        query: The question.
        documents: The texts of its documents.
        rate: Document tokens for each picked token; 0 is the model's own rate.
        budget: `each` or `shared`, see `ScaleDownModel.point`.

    Returns:
        The tokens as text; empty if nothing is picked.

    Raises:
        UsageError: The model is not a pointer, or does not support the rate or the budget.
    """
    found = model.point(query, documents, compression_rate=rate, budget=budget)
    return " ".join(filter(None, (text_of(model, own.ids, own.picked) for own in found)))


def echo_span(model: "ScaleDownModel", query: str, documents: Sequence[str]) -> str:
    """Answer with the most probable token of all documents and its neighbours.

    Probabilities are a softmax of a pointer's scores over all tokens of the documents. The span grows by its
    more probable neighbour, up to 8 tokens, while that neighbour has at least a quarter of the probability of
    the first token.

    Args:
        model: A pointer.
        query: The question.
        documents: The texts of its documents.

    Returns:
        The span as text; empty if the documents have no tokens.

    Raises:
        UsageError: The model is not a pointer.
    """
    found = model.point(query, documents)
    tokens = [(number, place) for number, own in enumerate(found) for place in range(len(own.ids))]
    if not tokens:
        return ""
    number, start = max(tokens, key=lambda token: found[token[0]].scores[token[1]])
    ids, scores, _ = found[number]
    least = scores[start] + math.log(_LEAST_SHARE)  # the softmax's denominator is the same
    span = [start]
    while len(span) < _LONGEST_SPAN:
        sides = [place for place in (span[0] - 1, span[-1] + 1) if 0 <= place < len(ids)]
        likely = [place for place in sides if scores[place] >= least]
        if not likely:
            break
        span = sorted([*span, max(likely, key=scores.__getitem__)])
    return text_of(model, ids, span)


def text_of(model: "ScaleDownModel", ids: Sequence[int], places: Iterable[int]) -> str:
    """Decode some tokens of a document: adjacent tokens together, others joined by a space.

    Args:
        model: Its tokenizer is used.
        ids: [tokens] of the document.
        places: Indices in `ids`, ascending.
    """
    runs = itertools.groupby(enumerate(places), lambda pair: pair[1] - pair[0])
    texts = (model.tokenizer.decode([ids[place] for _, place in run]).strip() for _, run in runs)
    return " ".join(filter(None, texts))


def _embedded(model: "ScaleDownModel", ids: Sequence[int], places: Iterable[int]) -> Any:
    """Return the generator's input embeddings of tokens, [places, width]."""
    import torch

    chosen = torch.tensor([ids[place] for place in places], dtype=torch.long, device=model.device)
    return model.get_input_embeddings()(chosen).detach()
