"""Compressing with a trained model: embeddings to keep, relevance of documents, tokens that are picked."""

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, Final, NamedTuple, overload

import torch

from scaledown.errors import InputError, UsageError
from scaledown.models import Halving
from scaledown.student.batch import CPU_PASS_TOKENS, PASS_TOKENS, Document, Reader, group
from scaledown.student.settings import ScaleDownConfig

log = logging.getLogger("scaledown")


class Compression(NamedTuple):
    """How documents are compressed, where a model leaves a choice."""

    rate: int = 0
    """Document tokens to one memory token; 0 is the model's own."""
    budget: str = "each"
    """`each` or `shared`."""


OWN_WAY: Final = Compression()


class Pointed(NamedTuple):
    """A document's own tokens, as a pointer reads them for a query."""

    ids: list[int]
    """[tokens], of the generator's vocabulary; what is cut is not among them."""
    scores: list[float]
    """[tokens]: logits, which compare across the documents of a query; higher is more relevant."""
    picked: list[int]
    """Places in `ids` of the tokens that stand for the document, in order."""


class StandIns(NamedTuple):
    """What stands for the documents of one query."""

    embeddings: torch.Tensor
    """[memory tokens of all documents, width]."""
    counts: list[int]
    relevance: torch.Tensor | None


class Compressing:
    """What `ScaleDownModel` offers for its documents alone."""

    halving: ClassVar = Halving("batch_size")
    config: ScaleDownConfig
    tokenizer: Any
    reader: Reader
    device: torch.device
    training: bool
    train: Callable[[bool], Any]
    compress_ids: Callable[..., Any]

    @overload
    def compress(
        self,
        query: str,
        documents: Sequence[object],
        *,
        batch_size: int = ...,
        compression_rate: int = ...,
        budget: str = ...,
    ) -> list[torch.Tensor]: ...

    @overload
    def compress(
        self,
        query: list[str],
        documents: Sequence[Sequence[object]],
        *,
        batch_size: int = ...,
        compression_rate: int = ...,
        budget: str = ...,
    ) -> list[list[torch.Tensor]]: ...

    def compress(
        self,
        query: str | list[str],
        documents: Any,
        *,
        batch_size: int = 8,
        compression_rate: int = 0,
        budget: str = "each",
    ) -> list[torch.Tensor] | list[list[torch.Tensor]]:
        """Embeddings of each document, [memory tokens, generator width], that `answer` takes in its place.

        They hold for this query. For a list of queries, a list of such lists; `batch_size` queries at once.
        """
        chosen_way = self._compression(compression_rate, budget)
        found = [
            [part.clone() for part in torch.split(own.embeddings, own.counts)]  # to be kept apart
            for own in self._compress(query, documents, batch_size, chosen_way)
        ]
        return found[0] if isinstance(query, str) else found

    @overload
    def rerank(self, query: str, documents: Sequence[object], *, batch_size: int = ...) -> list[float]: ...

    @overload
    def rerank(
        self, query: list[str], documents: Sequence[Sequence[object]], *, batch_size: int = ...
    ) -> list[list[float]]: ...

    def rerank(
        self, query: str | list[str], documents: Any, *, batch_size: int = 8
    ) -> list[float] | list[list[float]]:
        """Relevance of each document to the query, higher is better.

        A reranking head gives it on the scale of the training data; of a pointer it is the score of the best
        token. Raises `UsageError` where the model has neither.
        """
        if not self.config.ranks:
            raise UsageError("this model has no reranking head: train one with --enable_reranking")
        found = [
            own.relevance.tolist() if own.relevance is not None else []
            for own in self._compress(query, documents, batch_size, OWN_WAY)
        ]
        return found[0] if isinstance(query, str) else found

    def compress_and_rerank(
        self,
        query: list[str],
        documents: Sequence[Sequence[object]],
        *,
        batch_size: int = 8,
        compression_rate: int = 0,
        budget: str = "each",
    ) -> list[tuple[list[torch.Tensor], list[float]]]:
        """What `compress` and `rerank` give for each query, by reading its documents once."""
        chosen_way = self._compression(compression_rate, budget)
        return [
            (
                list(torch.split(own.embeddings, own.counts)),
                own.relevance.tolist() if own.relevance is not None else [],
            )
            for own in self._compress(query, documents, batch_size, chosen_way)
        ]

    def pick(
        self, query: str, documents: Sequence[object], *, compression_rate: int = 0, budget: str = "each"
    ) -> list[list[str]]:
        """The tokens of each document that a pointer picks for the query, as text, in order.

        Raises `UsageError` for a model of another kind.
        """
        found = self.point(query, documents, compression_rate=compression_rate, budget=budget)
        return [[self.tokenizer.decode([own.ids[place]]) for place in own.picked] for own in found]

    def point(
        self, query: str, documents: Sequence[object], *, compression_rate: int = 0, budget: str = "each"
    ) -> list[Pointed]:
        """The tokens of each document with the scores that a pointer gives them for the query.

        Args:
            query: The question.
            documents: Strings or `{"title", "text"}`.
            compression_rate: Document tokens to one that is picked, 4 to 32; 0 is the model's own.
            budget: `each`: every document has its own number of picked tokens; `shared`: the documents share
                the sum of these numbers.

        Returns:
            One record a document, in the order of `documents`.

        Raises:
            UsageError: The model is no pointer, or does not have the rate or budget.
        """
        if not self.config.kind.picks_tokens:
            raise UsageError("only a pointer picks tokens: train one with --compressor pointer")
        chosen_way = self._compression(compression_rate, budget)
        with self._reading():
            read = self.reader.read(query, documents, rate=chosen_way.rate)
        if not read:
            return []
        with self.using():
            found = self.compress_ids(group(read), [len(read)] if budget == "shared" else ())
        return [
            Pointed(
                one.ids[one.start : one.stop],
                scores[: one.stop - one.start].tolist(),
                picked.nonzero()[:, 0].tolist(),
            )
            for one, scores, picked in zip(read, found.token_scores, found.chosen, strict=True)
        ]

    def _compression(self, rate: int, budget: str) -> Compression:
        """What was asked for, if the model has it. Raises `UsageError`."""
        self.config.check_budget(budget)
        self.config.check_rate(rate or self.config.compression_rate)
        return Compression(rate, budget)

    def _compress(
        self, query: str | list[str], documents: Any, batch_size: int, way: Compression
    ) -> list[StandIns]:
        queries, many = as_lists(query, documents)
        check_positive(batch_size=batch_size)
        with self._reading():
            read = [
                self.reader.read(text, own, rate=way.rate) for text, own in zip(queries, many, strict=True)
            ]

        def work(batch: Sequence[list[Document]]) -> list[StandIns]:
            return self.compress_read(batch, way.budget)

        return [
            found
            for start in range(0, len(read), batch_size)
            for part in self.halving(work, read[start : start + batch_size])
            for found in part
        ]

    def compress_read(self, read: Sequence[list[Document]], budget: str) -> list[StandIns]:
        """What stands for each query's documents, compressed together."""
        sizes = [len(documents) for documents in read]
        with self.using():
            most = CPU_PASS_TOKENS if self.device.type == "cpu" else PASS_TOKENS
            documents = [one for documents in read for one in documents]
            found = self.compress_ids(group(documents, most), sizes if budget == "shared" else ())
        counts, first = [], 0
        for size in sizes:
            counts.append(found.counts[first : first + size])
            first += size
        embeddings = torch.split(found.embeddings, [sum(own) for own in counts])
        relevance = [None] * len(sizes) if found.relevance is None else torch.split(found.relevance, sizes)
        return [StandIns(*own) for own in zip(embeddings, counts, relevance, strict=True)]

    @contextlib.contextmanager
    def using(self) -> Iterator[None]:
        """Without gradients and dropout; afterwards the model trains on if it did."""
        was_training = self.training
        if was_training:
            self.train(False)
        try:
            with torch.no_grad():
                yield
        finally:
            if was_training:
                self.train(True)

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        """Warn of what the compressor does not see."""
        documents, queries = self.reader.cut, self.reader.cut_queries
        yield
        for count, kind, limit in (
            (self.reader.cut - documents, "documents", self.config.doc_max_length),
            (self.reader.cut_queries - queries, "queries", self.config.query_max_length),
        ):
            if count:
                log.warning(
                    "%s %s are longer than the %s tokens that this model compresses and were cut: split "
                    "them, or train with longer ones",
                    count,
                    kind,
                    limit,
                )


def as_lists(query: str | list[str], documents: Any) -> tuple[list[str], list[Any]]:
    """Queries and, for each, its documents. Raises `InputError` where they are not so many."""
    queries, many = ([query], [documents]) if isinstance(query, str) else (query, documents)
    if len(queries) != len(many):
        raise InputError(f"{len(queries)} queries and documents for {len(many)}: give a list for each query")
    for own in many:
        if isinstance(own, str):
            raise InputError("the documents of a query are a text: put it into a list")
    return list(queries), list(many)


def check_positive(**options: int) -> None:
    """Raise `UsageError` for an option below 1."""
    for name, value in options.items():
        if value < 1:
            raise UsageError(f"{name} {value}: must be at least 1")
