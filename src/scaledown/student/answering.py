"""Using a trained model: answers, embeddings to keep, relevance scores, tokens as they come."""

import contextlib
import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, Final, NamedTuple, overload

import torch

from scaledown.errors import InputError, UsageError
from scaledown.models import Halving
from scaledown.student.batch import (
    CPU_PASS_TOKENS,
    PASS_TOKENS,
    Document,
    Encoded,
    Reader,
    collate,
    group,
)
from scaledown.student.decoding import Decoding
from scaledown.student.settings import ScaleDownConfig

log = logging.getLogger("scaledown")

Documents = Sequence[object]
"""Documents of one query: strings or `{"title", "text"}`, or what `compress` made of them."""


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


class Question(NamedTuple):
    """A prompt, and what stands for its documents where that is known."""

    encoded: Encoded
    embeddings: torch.Tensor | None
    """[memory tokens of all documents, width] where they were given."""

    @property
    def length(self) -> int:
        """What a batch is sorted by: the generator's tokens that are text, and the documents."""
        return sum(map(len, self.encoded.prompt_parts)) + len(self.encoded.prompt_parts)


class Answering:
    """What `ScaleDownModel` offers those who use it. Decoding is greedy."""

    halving: ClassVar = Halving("batch_size")
    config: ScaleDownConfig
    generator: Any
    tokenizer: Any
    reader: Reader
    device: torch.device
    training: bool
    train: Callable[[bool], Any]
    compress_ids: Callable[..., Any]
    embed: Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]

    @overload
    def answer(
        self,
        query: str,
        documents: Documents,
        *,
        max_new_tokens: int = ...,
        batch_size: int = ...,
        compressed: bool = ...,
        compression_rate: int = ...,
        budget: str = ...,
    ) -> str: ...

    @overload
    def answer(
        self,
        query: list[str],
        documents: Sequence[Documents],
        *,
        max_new_tokens: int = ...,
        batch_size: int = ...,
        compressed: bool = ...,
        compression_rate: int = ...,
        budget: str = ...,
    ) -> list[str]: ...

    def answer(
        self,
        query: str | list[str],
        documents: Any,
        *,
        max_new_tokens: int = 128,
        batch_size: int = 8,
        compressed: bool = True,
        compression_rate: int = 0,
        budget: str = "each",
    ) -> str | list[str]:
        """The answer to a query about its documents, or the answers to many.

        Documents are strings or `{"title", "text"}`, or embeddings from `compress`. Without any, the
        generator answers from memory; with `compressed=False` it reads their text. `batch_size` queries are
        answered at once, halved where memory does not suffice. A pointer compresses at any
        `compression_rate` from 4 to 32 document tokens a memory token (0: the one it was trained with as its
        own), and with `budget="shared"` the documents of a question share their memory tokens. Raises
        `InputError` for a prompt that does not fit the generator, `UsageError` for a rate or budget that the
        model does not have.
        """
        queries, many = _many(query, documents)
        _check_positive(max_new_tokens=max_new_tokens, batch_size=batch_size)
        chosen_way = self._compression(compression_rate, budget)
        with self._reading():
            questions = [
                self._question(text, own, max_new_tokens, chosen_way, compressed=compressed)
                for text, own in zip(queries, many, strict=True)
            ]
        order = sorted(range(len(questions)), key=lambda number: -questions[number].length)
        answers = [""] * len(questions)

        def work(batch: Sequence[int]) -> list[str]:
            return self._generate([questions[number] for number in batch], max_new_tokens, budget)

        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            written = [text for part in self.halving(work, chosen) for text in part]
            for number, text in zip(chosen, written, strict=True):
                answers[number] = text
        return answers[0] if isinstance(query, str) else answers

    def stream(
        self,
        query: str,
        documents: Documents,
        *,
        max_new_tokens: int = 128,
        compressed: bool = True,
        compression_rate: int = 0,
        budget: str = "each",
    ) -> Iterator[str]:
        """The answer piece by piece, as it is written; joined and stripped they are what `answer` gives."""
        _check_positive(max_new_tokens=max_new_tokens)
        chosen_way = self._compression(compression_rate, budget)
        with self._reading():
            question = self._question(query, documents, max_new_tokens, chosen_way, compressed=compressed)
        with self.using():
            embedded, mask = self.prompts([question], budget)
        ids, shown = [], ""
        for (token,) in self._write(embedded, mask, max_new_tokens):
            if token in self.stops:
                break
            ids.append(token)
            text = self.tokenizer.decode(ids, skip_special_tokens=True)
            if not text.endswith("\ufffd"):  # a character whose bytes are not all there yet
                yield text[len(shown) :]
                shown = text
        if len(text := self.tokenizer.decode(ids, skip_special_tokens=True)) > len(shown):
            yield text[len(shown) :]

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
    ) -> list["StandIns"]:
        queries, many = _many(query, documents)
        _check_positive(batch_size=batch_size)
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

    def compress_read(self, read: Sequence[list[Document]], budget: str) -> list["StandIns"]:
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

    def _question(
        self,
        query: str,
        documents: Documents,
        max_new_tokens: int,
        way: Compression = OWN_WAY,
        *,
        compressed: bool,
    ) -> Question:
        embeddings = None
        given = [isinstance(document, torch.Tensor) for document in documents]
        if any(given):
            if not compressed:
                raise InputError("embeddings are no text to be read uncompressed: give the documents")
            if not all(given):
                raise InputError("embeddings and documents together: compress all documents, or none")
            embeddings, counts = self._joined(documents)
            read = [Document([], 0, 0, count) for count in counts]
            parts = self.reader.prompt_parts(query, len(documents))
            question = Question(Encoded(read, parts, [], None), embeddings)
        elif compressed and len(documents):
            question = Question(self.reader.encode(query, documents, rate=way.rate), None)
        else:
            return Question(self.reader.encode_text(query, documents, max_new_tokens), None)
        length = question.encoded.prompt_length
        if length + max_new_tokens > self.reader.context:
            raise InputError(
                f"query {query[:80]!r}: {length:,} positions and {max_new_tokens:,} new tokens; the "
                f"generator takes {self.reader.context:,}: give fewer documents or a shorter query"
            )
        return question

    def _joined(self, documents: Sequence[Any]) -> tuple[torch.Tensor, list[int]]:
        """Embeddings of several documents as one, and how many each has. Raises `InputError`."""
        width = self.generator.get_input_embeddings().embedding_dim
        varies = bool(self.config.kind.rates)
        most = self.config.doc_max_length if varies else self.config.memory_tokens
        least = 0 if varies else most
        for own in documents:
            if own.ndim != 2 or own.shape[1] != width or not least <= len(own) <= most:
                number = most if least else f"at most {most}"
                raise InputError(
                    f"embeddings of shape {list(own.shape)} are not this model's, which are [{number}, "
                    f"{width}] a document: compress the documents with it"
                )
        return torch.cat(list(documents)), [len(own) for own in documents]

    def _generate(
        self, questions: Sequence[Question], max_new_tokens: int, budget: str = "each"
    ) -> list[str]:
        with self.using():
            embedded, mask = self.prompts(questions, budget)
        written = zip(*self._write(embedded, mask, max_new_tokens), strict=True)
        return [
            self.tokenizer.decode(
                list(itertools.takewhile(lambda token: token not in self.stops, tokens)),
                skip_special_tokens=True,
            ).strip()
            for tokens in written
        ]

    def _write(self, embedded: torch.Tensor, mask: torch.Tensor, max_new_tokens: int) -> Iterator[list[int]]:
        """The likeliest token of each row of [batch, length, width], step by step, until all rows have ended.

        The mask [batch, length] is 0 where a prompt is padded, on its left.
        """
        decoding, ended = Decoding(self.generator), [False] * len(mask)
        chosen: torch.Tensor | None = None
        for _ in range(max_new_tokens):
            # No gradients within a step only: between two, the caller's own code runs.
            with self.using():
                if chosen is None:
                    decoding.join(embedded, mask)
                else:
                    decoding.step(chosen)
                chosen = decoding.logits.argmax(-1)  # [batch]
            tokens: list[int] = chosen.tolist()
            yield tokens
            ended = [was or token in self.stops for was, token in zip(ended, tokens, strict=True)]
            if all(ended):
                return

    @property
    def stops(self) -> list[int]:
        """Tokens that end an answer."""
        stops: list[int] = self.generator.generation_config.eos_token_id
        return stops

    def prompts(
        self, questions: Sequence[Question], budget: str = "each"
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Embeddings of prompts [batch, length, width], padded on the left, and the mask [batch, length]."""
        new = [question.encoded.documents for question in questions if _is_new(question)]
        compressed = iter(self.compress_read(new, budget) if new else [])
        device = self.device
        encoded, given = [], []
        for question in questions:
            one = question.encoded
            if _is_new(question):
                own = next(compressed)
                documents = zip(one.documents, own.counts, strict=True)
                one = one._replace(documents=[read._replace(memory=count) for read, count in documents])
                given.append(own.embeddings)
            elif question.embeddings is not None:
                given.append(question.embeddings.to(device))
            encoded.append(one)
        batch = collate([one._replace(documents=[_laid(read) for read in one.documents]) for one in encoded])
        right = self.embed(
            batch["ids"].to(device), batch["is_memory"].to(device), torch.cat(given) if given else None
        )
        lengths = [one.prompt_length for one in encoded]
        left = torch.zeros_like(right)
        mask = torch.zeros(right.shape[:2], dtype=torch.long, device=device)
        for row, length in enumerate(lengths):
            left[row, right.shape[1] - length :] = right[row, :length]
            mask[row, right.shape[1] - length :] = 1
        return left, mask

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


class StandIns(NamedTuple):
    """What stands for the documents of one query."""

    embeddings: torch.Tensor
    """[memory tokens of all documents, width]."""
    counts: list[int]
    relevance: torch.Tensor | None


def _is_new(question: Question) -> bool:
    """Whether its documents are still to be compressed."""
    return question.embeddings is None and bool(question.encoded.documents)


def _laid(read: Document) -> Document:
    """A document that only takes its place in a prompt: it was compressed before."""
    return Document([], 0, 0, read.memory)


def _many(query: str | list[str], documents: Any) -> tuple[list[str], list[Any]]:
    """Queries and, for each, its documents. Raises `InputError` where they are not so many."""
    queries, many = ([query], [documents]) if isinstance(query, str) else (query, documents)
    if len(queries) != len(many):
        raise InputError(f"{len(queries)} queries and documents for {len(many)}: give a list for each query")
    for own in many:
        if isinstance(own, str):
            raise InputError("the documents of a query are a text: put it into a list")
    return list(queries), list(many)


def _check_positive(**options: int) -> None:
    for name, value in options.items():
        if value < 1:
            raise UsageError(f"{name} {value}: must be at least 1")
