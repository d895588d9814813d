"""Answer questions with a trained model, as whole answers or token by token."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, overload

import torch

from scaledown.errors import InputError, ModelError
from scaledown.student.batch import Encoded, EncodedDocument, EncodedQuestion, check_documents, collate
from scaledown.student.decoding import Decoding
from scaledown.student.engines.base import Generation, Sampling
from scaledown.student.engines.steps import StepGeneration
from scaledown.student.inference.compressing import (
    OWN_WAY,
    Compressing,
    Compression,
    as_lists,
    check_positive,
)

Documents = Sequence[object]
"""Documents of one query: strings, `{"title", "text"}`, or embeddings from `compress`."""


class Answering(Compressing):
    """The methods of `ScaleDownModel` that answer questions. Decoding is greedy."""

    engine: Generation | None = None
    """Writes the answers; None if the model's own generator does."""

    generator: Any
    embed: Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]

    def close(self) -> None:
        """End the engine. The model cannot answer after that, if it has given its generator to the engine."""
        if self.engine is not None:
            self.engine.close()

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
        """Answer a query about its documents, or many queries.

        Args:
            query: The question, or a list of questions.
            documents: Strings, `{"title", "text"}`, or embeddings from `compress`; for a list of questions, a
                list of these for each. Without documents the generator answers from its own knowledge.
            max_new_tokens: The most tokens of an answer.
            batch_size: Queries answered at a time; halved if memory does not suffice.
            compressed: Whether documents are compressed; otherwise the generator reads their text.
            compression_rate: For a pointer, document tokens for each memory token, 4 to 32; 0 is its own
                rate.
            budget: For a pointer, `each` or `shared`: whether the documents of a question share their memory
                tokens.

        Returns:
            The answer, or a list of answers.

        Raises:
            InputError: A prompt does not fit into the generator's context, a document is of another type, or
                embeddings are of another model.
            UsageError: The model does not support the rate or the budget, or a number is below 1.
            ModelError: The engine fails; `NoRoomError` if not even one query fits into memory.
        """
        queries, many = as_lists(query, documents)
        check_positive(max_new_tokens=max_new_tokens, batch_size=batch_size)
        chosen_way = self._compression(compression_rate, budget)
        with self.reading():
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
        """Yield the answer piece by piece. The pieces, joined and stripped, are the result of `answer`.

        Args:
            query: The question.
            documents: Strings, `{"title", "text"}`, or embeddings from `compress`; may be empty.
            max_new_tokens: The most tokens of the answer.
            compressed: Whether documents are compressed; otherwise the generator reads their text.
            compression_rate: For a pointer, document tokens for each memory token, 4 to 32; 0 is its own
                rate.
            budget: For a pointer, `each` or `shared`.

        Yields:
            The next piece of text. Errors are raised when the first piece is requested.

        Raises:
            InputError: The prompt does not fit into the generator's context, or a document is of another
                type.
            UsageError: The model does not support the rate or the budget, or `max_new_tokens` is below 1.
            ModelError: The engine fails.
        """
        check_positive(max_new_tokens=max_new_tokens)
        chosen_way = self._compression(compression_rate, budget)
        with self.reading():
            question = self._question(query, documents, max_new_tokens, chosen_way, compressed=compressed)
        ids: list[int] = []
        shown = ""
        for _, token in self._tokens([question], max_new_tokens, budget):
            if token in self.stops:
                break
            ids.append(token)
            text = self.tokenizer.decode(ids, skip_special_tokens=True)
            if not text.endswith("\ufffd"):  # the bytes of a character are incomplete
                yield text[len(shown) :]
                shown = text
        if len(text := self.tokenizer.decode(ids, skip_special_tokens=True)) > len(shown):
            yield text[len(shown) :]

    def prompt_embeddings(
        self, query: str, documents: Documents, *, compression_rate: int = 0, budget: str = "each"
    ) -> torch.Tensor:
        """Return the embeddings of the whole prompt, for a server that accepts prompt embeddings.

        Args:
            query: The question.
            documents: Strings, `{"title", "text"}`, or embeddings from `compress`.
            compression_rate: For a pointer, document tokens for each memory token; 0 is its own rate.
            budget: For a pointer, `each` or `shared`.

        Returns:
            [positions, generator width], on the CPU.

        Raises:
            InputError: The prompt does not fit into the generator's context.
            UsageError: The model does not support the rate or the budget.
        """
        way = self._compression(compression_rate, budget)
        with self.reading():
            question = self._question(query, documents, 1, way, compressed=True)
        with self.using():
            embedded, _ = self.prompts([question], budget)
        return embedded[0].cpu()

    def _question(
        self,
        query: str,
        documents: Documents,
        max_new_tokens: int,
        way: Compression = OWN_WAY,
        *,
        compressed: bool,
    ) -> EncodedQuestion:
        check_documents(documents)
        embeddings = None
        given = [isinstance(document, torch.Tensor) for document in documents]
        if any(given):
            if not compressed:
                raise InputError("embeddings cannot be read as text: give the documents")
            if not all(given):
                raise InputError("embeddings and texts are mixed: compress all documents, or none")
            embeddings, counts = self._joined(documents)
            read = [EncodedDocument([], 0, 0, count) for count in counts]
            parts = self.reader.prompt_parts(query, len(documents))
            question = EncodedQuestion(Encoded(read, parts, [], None), embeddings)
        elif compressed and len(documents):
            question = EncodedQuestion(self.reader.encode(query, documents, rate=way.rate), None)
        else:
            return EncodedQuestion(self.reader.encode_text(query, documents, max_new_tokens), None)
        length = question.encoded.prompt_length
        if length + max_new_tokens > self.reader.context:
            raise InputError(
                f"query {query[:80]!r}: {length:,} positions and {max_new_tokens:,} new tokens; the "
                f"generator takes {self.reader.context:,}: give fewer documents or a shorter query"
            )
        return question

    def _joined(self, documents: Sequence[Any]) -> tuple[torch.Tensor, list[int]]:
        """Concatenate the embeddings of documents. Returns them and the number of rows of each document.

        Raises `InputError` for embeddings whose shape is not of this model.
        """
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
        self, questions: Sequence[EncodedQuestion], max_new_tokens: int, budget: str = "each"
    ) -> list[str]:
        written: list[list[int]] = [[] for _ in questions]
        for place, token in self._tokens(questions, max_new_tokens, budget):
            written[place].append(token)
        return [
            self.tokenizer.decode(
                list(itertools.takewhile(lambda token: token not in self.stops, tokens)),
                skip_special_tokens=True,
            ).strip()
            for tokens in written
        ]

    def _tokens(
        self, questions: Sequence[EncodedQuestion], max_new_tokens: int, budget: str
    ) -> Iterator[tuple[int, int]]:
        """Yield the tokens of all answers as they are written, each with the index of its question."""
        engine: Generation | None = self.engine
        if engine is None:
            engine = StepGeneration(self, Decoding(self.generator))
        engine.join(self.compressed(questions, budget), [Sampling(max_new_tokens)] * len(questions))
        rows, left = list(range(len(questions))), [max_new_tokens] * len(questions)
        try:
            while rows:
                going: list[int] = []
                for number, tokens in enumerate(engine.tokens()):
                    if isinstance(tokens, Exception):
                        raise ModelError(f"the engine failed on a prompt: {tokens}") from tokens
                    ended = False
                    for token in tokens:
                        yield rows[number], token
                        left[rows[number]] -= 1
                        if ended := token in self.stops or not left[rows[number]]:
                            break
                    if not ended:
                        going.append(number)
                rows = [rows[number] for number in going]
                engine.keep(going)
        finally:
            if rows:  # the caller has stopped early
                engine.keep([])

    @property
    def stops(self) -> list[int]:
        """Tokens that end an answer."""
        stops: list[int] = self.generator.generation_config.eos_token_id
        return stops

    def compressed(self, questions: Sequence[EncodedQuestion], budget: str = "each") -> list[EncodedQuestion]:
        """Compress the documents of all questions together.

        Args:
            questions: Questions; those with embeddings, or without documents, stay as they are.
            budget: For a pointer, `each` or `shared`.

        Returns:
            The questions with their embeddings, in order.
        """
        new = [question.encoded.documents for question in questions if _is_new(question)]
        found = iter(self.compress_read(new, budget) if new else [])
        made: list[EncodedQuestion] = []
        for question in questions:
            if _is_new(question):
                own = next(found)
                documents = zip(question.encoded.documents, own.counts, strict=True)
                laid = [read._replace(memory=count) for read, count in documents]
                made.append(EncodedQuestion(question.encoded._replace(documents=laid), own.embeddings))
            else:
                made.append(question)
        return made

    def prompts(
        self, questions: Sequence[EncodedQuestion], budget: str = "each"
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return embeddings of whole prompts, for the generator.

        Args:
            questions: Questions; documents that are not compressed yet are compressed here.
            budget: For a pointer, `each` or `shared`.

        Returns:
            Embeddings [batch, length, width], padded on the left, and their mask [batch, length], 0 at
            padding; both on the model's device.
        """
        questions = self.compressed(questions, budget)
        device = self.device
        encoded = [question.encoded for question in questions]
        given = [one.embeddings.to(device) for one in questions if one.embeddings is not None]
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


def _is_new(question: EncodedQuestion) -> bool:
    """Whether a question has documents that are not compressed yet."""
    return question.embeddings is None and bool(question.encoded.documents)


def _laid(read: EncodedDocument) -> EncodedDocument:
    """Return a document without tokens, which only reserves the place of its embeddings in a prompt."""
    return EncodedDocument([], 0, 0, read.memory)
