"""Using a trained model: answers, embeddings to keep, relevance scores, tokens as they come."""

import contextlib
import inspect
import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, overload

import torch

from scaledown.errors import InputError, UsageError
from scaledown.models import Halving
from scaledown.student.batch import CPU_PASS_TOKENS, PASS_TOKENS, Encoded, Group, Reader, collate, group
from scaledown.student.settings import ScaleDownConfig

log = logging.getLogger("scaledown")

Documents = Sequence[object] | torch.Tensor
"""Documents of one query: strings or `{"title", "text"}`, or what `compress` made of them."""


class _Question(NamedTuple):
    encoded: Encoded
    embeddings: torch.Tensor | None
    """[documents, memory tokens, width] where they were given."""

    @property
    def length(self) -> int:
        """What a batch is sorted by: the generator's tokens that are text, and the documents."""
        return sum(map(len, self.encoded.prompt_parts)) + len(self.encoded.prompt_parts)


class Answering:
    """What `ScaleDownModel` offers those who use it. Decoding is greedy."""

    config: ScaleDownConfig
    generator: Any
    tokenizer: Any
    reader: Reader
    device: torch.device
    training: bool
    train: Callable[[bool], Any]
    compress_ids: Callable[[Sequence[Group]], tuple[torch.Tensor, torch.Tensor | None]]
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
    ) -> list[str]: ...

    def answer(
        self,
        query: str | list[str],
        documents: Any,
        *,
        max_new_tokens: int = 128,
        batch_size: int = 8,
        compressed: bool = True,
    ) -> str | list[str]:
        """The answer to a query about its documents, or the answers to many.

        Documents are strings or `{"title", "text"}`, or embeddings from `compress`. Without any, the
        generator answers from memory; with `compressed=False` it reads their text. `batch_size` queries are
        answered at once, halved where memory does not suffice. Raises `InputError` for a prompt that does
        not fit the generator.
        """
        queries, many = _many(query, documents)
        _check_positive(max_new_tokens=max_new_tokens, batch_size=batch_size)
        with self._reading():
            questions = [
                self._question(text, own, max_new_tokens, compressed=compressed)
                for text, own in zip(queries, many, strict=True)
            ]
        order = sorted(range(len(questions)), key=lambda number: -questions[number].length)
        halving = Halving("batch_size")
        answers = [""] * len(questions)

        def work(batch: Sequence[int]) -> list[str]:
            return self._generate([questions[number] for number in batch], max_new_tokens)

        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            written = [text for part in halving(work, chosen) for text in part]
            for number, text in zip(chosen, written, strict=True):
                answers[number] = text
        return answers[0] if isinstance(query, str) else answers

    def stream(
        self, query: str, documents: Documents, *, max_new_tokens: int = 128, compressed: bool = True
    ) -> Iterator[str]:
        """The answer piece by piece, as it is written; joined and stripped they are what `answer` gives."""
        _check_positive(max_new_tokens=max_new_tokens)
        with self._reading():
            question = self._question(query, documents, max_new_tokens, compressed=compressed)
        with self._using():
            embedded, mask = self._prompts([question])
        ids, shown = [], ""
        for (token,) in self._write(embedded, mask, max_new_tokens):
            if token in self._stops:
                break
            ids.append(token)
            text = self.tokenizer.decode(ids, skip_special_tokens=True)
            if not text.endswith("\ufffd"):  # a character whose bytes are not all there yet
                yield text[len(shown) :]
                shown = text
        if len(text := self.tokenizer.decode(ids, skip_special_tokens=True)) > len(shown):
            yield text[len(shown) :]

    @overload
    def compress(self, query: str, documents: Sequence[object], *, batch_size: int = ...) -> torch.Tensor: ...

    @overload
    def compress(
        self, query: list[str], documents: Sequence[Sequence[object]], *, batch_size: int = ...
    ) -> list[torch.Tensor]: ...

    def compress(
        self, query: str | list[str], documents: Any, *, batch_size: int = 8
    ) -> torch.Tensor | list[torch.Tensor]:
        """Embeddings [documents, memory tokens, generator width] that `answer` takes for the documents.

        They hold for this query. For a list of queries, a list of them; `batch_size` queries at once.
        """
        found = [embeddings.contiguous() for embeddings, _ in self._compress(query, documents, batch_size)]
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
        """Relevance of each document to the query, higher is better, on the scale of the training data.

        Raises `UsageError` where the model was trained without the reranking head.
        """
        if not self.config.enable_reranking:
            raise UsageError("this model has no reranking head: train one with --enable_reranking")
        found = [
            scores.tolist() if scores is not None else []
            for _, scores in self._compress(query, documents, batch_size)
        ]
        return found[0] if isinstance(query, str) else found

    def _compress(
        self, query: str | list[str], documents: Any, batch_size: int
    ) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
        queries, many = _many(query, documents)
        _check_positive(batch_size=batch_size)
        with self._reading():
            read = [self.reader.document_ids(text, own) for text, own in zip(queries, many, strict=True)]
        halving = Halving("batch_size")
        return [
            found
            for start in range(0, len(read), batch_size)
            for part in halving(self._compress_read, read[start : start + batch_size])
            for found in part
        ]

    def _compress_read(
        self, read: Sequence[list[list[int]]]
    ) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
        """Embeddings and scores of each query's documents, compressed together."""
        sizes = [len(documents) for documents in read]
        with self._using():
            most = CPU_PASS_TOKENS if self.device.type == "cpu" else PASS_TOKENS
            documents = [ids for documents in read for ids in documents]
            embeddings, scores = self.compress_ids(group(documents, most))
        by_query = torch.split(scores, sizes) if scores is not None else [None] * len(sizes)
        return list(zip(torch.split(embeddings, sizes), by_query, strict=True))

    def _question(
        self, query: str, documents: Documents, max_new_tokens: int, *, compressed: bool
    ) -> _Question:
        if isinstance(documents, torch.Tensor):
            if not compressed:
                raise InputError("embeddings are no text to be read uncompressed: give the documents")
            expected = (self.config.memory_tokens, self.generator.get_input_embeddings().embedding_dim)
            if documents.ndim != 3 or tuple(documents.shape[1:]) != expected:
                raise InputError(
                    f"embeddings of shape {list(documents.shape)} are not this model's, which are "
                    f"[documents, {expected[0]}, {expected[1]}]: compress the documents with it"
                )
            if not len(documents):
                return _Question(self.reader.encode_text(query, [], max_new_tokens), None)
            parts = self.reader.prompt_parts(query, len(documents))
            question = _Question(Encoded([], parts, [], None), documents)
        elif compressed and documents:
            question = _Question(self.reader.encode(query, documents), None)
        else:
            return _Question(self.reader.encode_text(query, documents, max_new_tokens), None)
        length = question.encoded.prompt_length(self.config.memory_tokens)
        if length + max_new_tokens > self.reader.context:
            raise InputError(
                f"query {query[:80]!r}: {length:,} positions and {max_new_tokens:,} new tokens; the "
                f"generator takes {self.reader.context:,}: give fewer documents or a shorter query"
            )
        return question

    def _generate(self, questions: Sequence[_Question], max_new_tokens: int) -> list[str]:
        with self._using():
            embedded, mask = self._prompts(questions)
        written = zip(*self._write(embedded, mask, max_new_tokens), strict=True)
        return [
            self.tokenizer.decode(
                list(itertools.takewhile(lambda token: token not in self._stops, tokens)),
                skip_special_tokens=True,
            ).strip()
            for tokens in written
        ]

    def _write(self, embedded: torch.Tensor, mask: torch.Tensor, max_new_tokens: int) -> Iterator[list[int]]:
        """The likeliest token of each row of [batch, length, width], step by step, until all rows have ended.

        The mask [batch, length] is 0 where a prompt is padded, on its left.
        """
        places = (mask.cumsum(1) - 1).clamp(min=0)  # [batch, length]
        # As an index: of a slice, torch would copy the output layer's weights for every row.
        step: dict[str, Any] = {
            "inputs_embeds": embedded,
            "logits_to_keep": torch.tensor([mask.shape[1] - 1], device=mask.device),
        }
        takes_places = "position_ids" in inspect.signature(self.generator.forward).parameters
        cache, ended = None, [False] * len(mask)
        for _ in range(max_new_tokens):
            # No gradients within a step only: between two, the caller's own code runs.
            with self._using():
                if takes_places:
                    step["position_ids"] = places
                output = self.generator(**step, attention_mask=mask, past_key_values=cache, use_cache=True)
                chosen = output.logits[:, -1].argmax(-1)  # [batch]
            tokens: list[int] = chosen.tolist()
            yield tokens
            ended = [was or token in self._stops for was, token in zip(ended, tokens, strict=True)]
            if all(ended):
                return
            cache = output.past_key_values
            step = {"input_ids": chosen[:, None]}
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
            places = places[:, -1:] + 1

    @property
    def _stops(self) -> list[int]:
        """Tokens that end an answer."""
        stops: list[int] = self.generator.generation_config.eos_token_id
        return stops

    def _prompts(self, questions: Sequence[_Question]) -> tuple[torch.Tensor, torch.Tensor]:
        """Embeddings of prompts [batch, length, width], padded on the left, and the mask [batch, length]."""
        encoded = [question.encoded for question in questions]
        new = [one.document_ids for one in encoded if one.document_ids]
        compressed = iter(self._compress_read(new) if new else [])
        embeddings = [
            next(compressed)[0] if question.encoded.document_ids else question.embeddings
            for question in questions
        ]
        device = self.device
        given = [own.to(device) for own in embeddings if own is not None]
        batch = collate(encoded, self.config.memory_tokens)
        right = self.embed(
            batch["ids"].to(device), batch["is_memory"].to(device), torch.cat(given) if given else None
        )
        lengths = [one.prompt_length(self.config.memory_tokens) for one in encoded]
        left = torch.zeros_like(right)
        mask = torch.zeros(right.shape[:2], dtype=torch.long, device=device)
        for row, length in enumerate(lengths):
            left[row, right.shape[1] - length :] = right[row, :length]
            mask[row, right.shape[1] - length :] = 1
        return left, mask

    @contextlib.contextmanager
    def _using(self) -> Iterator[None]:
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
