"""Compress documents with a trained model: embeddings, relevance, picked tokens."""

import contextlib
import contextvars
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, Final, NamedTuple, overload

import torch

from scaledown.devices.halving import Halving
from scaledown.errors import InputError, UsageError
from scaledown.student.batch import CPU_PASS_TOKENS, PASS_TOKENS, EncodedDocument, Group, Reader, group
from scaledown.student.compressors.queries import grouped
from scaledown.student.settings import ScaleDownConfig

log = logging.getLogger("scaledown")

_is_reading: Final = contextvars.ContextVar("is_reading", default=False)
"""Whether this thread is inside a block of `Compressing.reading`."""


class Compression(NamedTuple):
    """How documents are compressed, for models that support several ways."""

    rate: int = 0
    """Document tokens for each memory token; 0 is the model's own rate."""
    budget: str = "each"
    """`each` or `shared`."""


OWN_WAY: Final = Compression()


class Pointed(NamedTuple):
    """A document's tokens with the scores that a pointer gives them for a query."""

    ids: list[int]
    """[tokens] of the generator's vocabulary, without those that are cut."""
    scores: list[float]
    """[tokens]: logits, comparable across the documents of a query; higher is more relevant."""
    picked: list[int]
    """Indices in `ids` of the picked tokens, ascending."""


class StandIns(NamedTuple):
    """The embeddings of one query's documents, which stand in for their text."""

    embeddings: torch.Tensor
    """[memory tokens of all documents, width]."""
    counts: list[int]
    """Memory tokens of each document."""
    relevance: torch.Tensor | None
    """[documents]: relevance to the query; None if the model does not rank documents."""


class Compressing:
    """The methods of `ScaleDownModel` that compress, rank and read documents."""

    halving: ClassVar = Halving("batch_size")
    config: ScaleDownConfig
    tokenizer: Any
    reader: Reader
    device: torch.device
    training: bool
    train: Callable[[bool], Any]
    compressor: Any
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
        """Compress documents for a query. `answer` accepts the embeddings instead of the documents.

        Embeddings are valid for this query only.

        Args:
            query: The question, or a list of questions.
            documents: Strings or `{"title", "text"}`; for a list of questions, a list of these for each.
            batch_size: Queries whose documents are compressed at a time; halved if memory does not suffice.
            compression_rate: For a pointer, document tokens for each memory token, 4 to 32; 0 is its own
                rate.
            budget: For a pointer, `each` or `shared`: whether the documents of a question share their memory
                tokens.

        Returns:
            For each document [memory tokens, generator width]; for a list of questions, a list of such lists.

        Raises:
            InputError: A document is of another type, or there are not as many lists of documents as
                questions.
            UsageError: The model does not support the rate or the budget, or `batch_size` is below 1.
            NoRoomError: The documents of one query do not fit into memory.
        """
        chosen_way = self._compression(compression_rate, budget)
        found = [
            [
                part.clone() for part in torch.split(own.embeddings, own.counts)
            ]  # a view would keep the whole batch in memory
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
        """Compute the relevance of each document to the query.

        Args:
            query: The question, or a list of questions.
            documents: Strings or `{"title", "text"}`; for a list of questions, a list of these for each.
            batch_size: Queries whose documents are read at a time; halved if memory does not suffice.

        Returns:
            A number for each document, higher is better; for a list of questions, a list of such lists. With
            a reranking head it is on the scale of the training data's scores. With a pointer it is the score
            of a document's best token.

        Raises:
            InputError: A document is of another type, or there are not as many lists of documents as
                questions.
            UsageError: The model has no reranking head and is not a pointer, or `batch_size` is below 1.
            NoRoomError: The documents of one query do not fit into memory.
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
        """Return the results of `compress` and `rerank` for each query; documents are read only once.

        Args:
            query: The questions.
            documents: For each question, strings or `{"title", "text"}`.
            batch_size: Queries whose documents are read at a time; halved if memory does not suffice.
            compression_rate: For a pointer, document tokens for each memory token, 4 to 32; 0 is its own
                rate.
            budget: For a pointer, `each` or `shared`.

        Returns:
            For each question its documents' embeddings, each [memory tokens, generator width], and their
            relevance, which is empty if the model does not rank documents.

        Raises:
            InputError: A document is of another type, or there are not as many lists of documents as
                questions.
            UsageError: The model does not support the rate or the budget, or `batch_size` is below 1.
            NoRoomError: The documents of one query do not fit into memory.
        """
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
        """Return the tokens of each document that a pointer picks for the query, as text.

        Args:
            query: The question.
            documents: Strings or `{"title", "text"}`.
            compression_rate: Document tokens for each picked token, 4 to 32; 0 is the model's own rate.
            budget: `each` or `shared`, see `point`.

        Returns:
            For each document the texts of its picked tokens, in their order in the document.

        Raises:
            InputError: A document is of another type.
            UsageError: The model is not a pointer, or does not support the rate or the budget.
        """
        found = self.point(query, documents, compression_rate=compression_rate, budget=budget)
        return [[self.tokenizer.decode([own.ids[place]]) for place in own.picked] for own in found]

    def point(
        self, query: str, documents: Sequence[object], *, compression_rate: int = 0, budget: str = "each"
    ) -> list[Pointed]:
        """Return the tokens of each document with the scores that a pointer gives them for the query.

        Args:
            query: The question.
            documents: Strings or `{"title", "text"}`.
            compression_rate: Document tokens for each picked token, 4 to 32; 0 is the model's own rate.
            budget: `each`: every document has its own number of picked tokens; `shared`: the documents share
                the sum of these numbers.

        Returns:
            A record for each document, in the order of `documents`.

        Raises:
            InputError: A document is of another type.
            UsageError: The model is not a pointer, or does not support the rate or the budget.
        """
        if not self.config.kind.picks_tokens:
            raise UsageError("only a pointer picks tokens: train one with --compressor pointer")
        chosen_way = self._compression(compression_rate, budget)
        with self.reading():
            read = self.reader.read(query, documents, rate=chosen_way.rate)
        if not read:
            return []
        with self.using():
            found = self.compress_ids(self._groups(read), [len(read)] if budget == "shared" else ())
        return [
            Pointed(
                one.ids[one.start : one.stop],
                scores[: one.stop - one.start].tolist(),
                picked.nonzero()[:, 0].tolist(),
            )
            for one, scores, picked in zip(read, found.token_scores, found.chosen, strict=True)
        ]

    def _compression(self, rate: int, budget: str) -> Compression:
        """Return rate and budget together. Raises `UsageError` if the model does not support them."""
        self.config.check_budget(budget)
        self.config.check_rate(rate or self.config.compression_rate)
        return Compression(rate, budget)

    def _compress(
        self, query: str | list[str], documents: Any, batch_size: int, way: Compression
    ) -> list[StandIns]:
        queries, many = as_lists(query, documents)
        check_positive(batch_size=batch_size)
        with self.reading():
            read = [
                self.reader.read(text, own, rate=way.rate) for text, own in zip(queries, many, strict=True)
            ]

        def work(batch: Sequence[list[EncodedDocument]]) -> list[StandIns]:
            return self.compress_read(batch, way.budget)

        return [
            found
            for start in range(0, len(read), batch_size)
            for part in self.halving(work, read[start : start + batch_size])
            for found in part
        ]

    def compress_read(self, read: Sequence[list[EncodedDocument]], budget: str) -> list[StandIns]:
        """Compress the tokenized documents of several queries together.

        Args:
            read: For each query the result of `Reader.read`.
            budget: `each` or `shared`; only a pointer supports `shared`.

        Returns:
            A record for each query.
        """
        sizes = [len(documents) for documents in read]
        with self.using():
            documents = [one for documents in read for one in documents]
            found = self.compress_ids(self._groups(documents), sizes if budget == "shared" else ())
        counts, first = [], 0
        for size in sizes:
            counts.append(found.counts[first : first + size])
            first += size
        embeddings = torch.split(found.embeddings, [sum(own) for own in counts])
        relevance = [None] * len(sizes) if found.relevance is None else torch.split(found.relevance, sizes)
        return [StandIns(*own) for own in zip(embeddings, counts, relevance, strict=True)]

    def _groups(self, documents: Sequence[EncodedDocument]) -> list[Group]:
        """Group documents for `compress_ids`; a causal compressor reads each query once."""
        most = CPU_PASS_TOKENS if self.device.type == "cpu" else PASS_TOKENS
        if self.config.kind.reads_queries_once:
            return grouped(self.compressor, documents, most, self.device)
        return group(documents, most)

    @contextlib.contextmanager
    def using(self) -> Iterator[None]:
        """Turn off gradients and dropout inside the block; afterwards restore the training mode."""
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
    def reading(self) -> Iterator[None]:
        """Warn about documents and queries that were cut inside the block.

        One warning counts those of all blocks inside.
        """
        if _is_reading.get():
            yield
            return
        documents, queries = self.reader.cut, self.reader.cut_queries
        token = _is_reading.set(True)
        try:
            yield
        finally:
            _is_reading.reset(token)
        for count, kind, limit in (
            (self.reader.cut - documents, "documents", self.config.doc_max_length),
            (self.reader.cut_queries - queries, "queries", self.config.query_max_length),
        ):
            if count:
                log.warning(
                    "%s cut to %s tokens, the most that this model compresses: %s; split them, or train with "
                    "longer ones",
                    kind,
                    limit,
                    count,
                )


def as_lists(query: str | list[str], documents: Any) -> tuple[list[str], list[Any]]:
    """Return lists of queries and of their documents.

    Args:
        query: A question, or a list of questions.
        documents: The documents of the question, or a list of documents for each question.

    Raises:
        InputError: The numbers of questions and of lists of documents differ.
    """
    queries, many = ([query], [documents]) if isinstance(query, str) else (query, documents)
    if len(queries) != len(many):
        raise InputError(f"{len(queries)} queries and documents for {len(many)}: give a list for each query")
    return list(queries), list(many)


def check_positive(**options: int) -> None:
    """Raise `UsageError` for an option below 1."""
    for name, value in options.items():
        if value < 1:
            raise UsageError(f"{name} {value}: must be at least 1")
