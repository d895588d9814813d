"""Baselines of compression: tokens that are chosen by simple means, and answers without a generator.

`first`, `keywords` and `random` let the generator read as many tokens of each document as compression
takes. `echo` and `echo_span` answer with what a pointer finds, as it stands in the documents.
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from random import Random
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np
import scipy.sparse as sp

from scaledown.config.evaluate import EvaluateConfig
from scaledown.data.retrieval.encoders import load_encoder
from scaledown.models import ModelSource, choose_device, resolve

if TYPE_CHECKING:
    from scaledown.student.model import ScaleDownModel

READERS: Final = ("first", "keywords", "random")
"""Let the generator read tokens of the documents."""
ECHOES: Final = ("echo", "echo_span")
"""Have no generator, and need a pointer."""
OF_A_RATE: Final = ("pruned", *READERS, "echo")
"""Take as many tokens of the documents as compression does."""

_LONGEST_SPAN: Final = 8  # tokens
_LEAST_SHARE: Final = 1 / 4  # of the best token's probability


class Tokens(NamedTuple):
    """A document by the generator's tokenizer, as far as the model reads it."""

    text: str
    ids: list[int]
    """[tokens]."""
    spans: list[tuple[int, int]]
    """[tokens]: where each begins and ends in `text`, in characters."""


Weigh = Callable[[str, Sequence[Tokens]], list[list[float]]]
"""Weights [documents][tokens] of the tokens of a query's documents; the highest are read."""


def answer(
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
        model: Its generator reads the tokens; as a pointer, it finds what `ECHOES` say.
        queries: The questions.
        documents: The documents of each question.
        weigh: Gives how the tokens are chosen, of `READERS`.
        config: Its rate, budget, length of answers and size of batches.

    Returns:
        An answer for each question.

    Raises:
        InputError: A prompt does not fit the generator.
        UsageError: The model is no pointer and the system needs one, or does not have the rate.
    """
    pairs = list(zip(queries, documents, strict=True))
    if system == "echo":
        return [echo(model, *pair, rate=config.compression_rate, budget=config.budget) for pair in pairs]
    if system == "echo_span":
        return [echo_span(model, *pair) for pair in pairs]
    read = [[tokenised(model, document) for document in own] for own in documents]
    kept = [
        [
            best(weights, memory_tokens(model, one, config.compression_rate))
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


def tokenised(model: "ScaleDownModel", document: str) -> Tokens:
    """A document in the generator's tokens, cut where the compressor cuts it."""
    read = model.tokenizer(
        document,
        add_special_tokens=False,
        split_special_tokens=True,
        return_offsets_mapping=True,
        verbose=False,
    )
    longest = model.config.doc_max_length
    return Tokens(document, read["input_ids"][:longest], read["offset_mapping"][:longest])


def memory_tokens(model: "ScaleDownModel", document: Tokens, rate: int) -> int:
    """How many tokens compression takes of a document at a rate; 0 is the model's own."""
    return model.config.memory_tokens_of(len(document.ids), rate or model.config.compression_rate)


def best(weights: Sequence[float], count: int) -> list[int]:
    """Places of the `count` highest weights, in order; ties go to the earlier place."""
    return sorted(sorted(range(len(weights)), key=lambda place: -weights[place])[:count])


def weighing(system: str, config: EvaluateConfig) -> Weigh:
    """How one of `READERS` chooses tokens."""
    if system == "first":
        return lambda _, documents: [[-float(place) for place in range(len(one.ids))] for one in documents]
    if system == "random":
        return functools.partial(random_weights, config.seed)
    return Keywords(resolve(config.keyword_model), choose_device(config.device), config.dtype)


def random_weights(seed: int, query: str, documents: Sequence[Tokens]) -> list[list[float]]:
    """Weights that depend on the seed and the query alone."""
    random = Random(f"{seed} {query}")  # noqa: S311
    return [[random.random() for _ in one.ids] for one in documents]


class Keywords:
    """Weighs a token by the SPLADE vector of the query: the weight of the word-piece that it is part of.

    A token that overlaps several word-pieces has the highest of their weights.
    """

    def __init__(self, source: ModelSource, device: str, dtype: str) -> None:
        from scaledown.student.model import load_tokenizer

        self._encoder = load_encoder(source, device, dtype, batch_size=1)
        self._tokenizer = load_tokenizer(source)

    def __call__(self, query: str, documents: Sequence[Tokens]) -> list[list[float]]:
        """Weights [documents][tokens], 0 where the query's vector has none."""
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
    """The tokens that a pointer picks, as text, of all documents. Raises `UsageError` without a pointer."""
    found = model.point(query, documents, compression_rate=rate, budget=budget)
    return " ".join(filter(None, (text_of(model, own.ids, own.picked) for own in found)))


def echo_span(model: "ScaleDownModel", query: str, documents: Sequence[str]) -> str:
    """The likeliest token of all documents with its neighbours, as text.

    Probabilities are a softmax of a pointer's scores over all tokens of the documents. The span takes its
    likelier neighbour, up to 8 tokens, as long as that has at least a quarter of the first one's probability.
    Raises `UsageError` without a pointer.
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
    """Some of a document's tokens as text: neighbours as they stand there, others with a space between."""
    runs = itertools.groupby(enumerate(places), lambda pair: pair[1] - pair[0])
    texts = (model.tokenizer.decode([ids[place] for _, place in run]).strip() for _, run in runs)
    return " ".join(filter(None, texts))


def _embedded(model: "ScaleDownModel", ids: Sequence[int], places: Iterable[int]) -> Any:
    """The generator's own embeddings of tokens, [places, width]."""
    import torch

    chosen = torch.tensor([ids[place] for place in places], dtype=torch.long, device=model.device)
    return model.get_input_embeddings()(chosen).detach()
