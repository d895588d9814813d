"""Turn questions with documents into token ids, and examples into batches with little padding."""

from collections.abc import Sequence
from typing import Any, Final, NamedTuple, NotRequired, TypedDict

import torch

from scaledown.data.prompts import CLOSED_BOOK, Prompt, answer_prompt
from scaledown.data.teacher.base import Rejection, TeacherSettings
from scaledown.data.teacher.context import Context
from scaledown.errors import InputError, ModelError
from scaledown.records import document_text
from scaledown.student.labels import copied_spans
from scaledown.student.settings import ScaleDownConfig

IGNORED: Final = -100  # a label without loss, by the convention of transformers
SEPARATOR: Final = "\n\n"  # between documents, as in `Prompt.user`

# Marks the place of the documents while the chat template is applied. It is removed from texts of users.
_DOCUMENTS_MARK: Final = "\ue000documents\ue000"
FIXED_TOKENS: Final = 128  # tokens that take as long as a pass itself; more on a GPU, fewer on two CPU cores
PASS_TOKENS: Final = 1 << 15  # in one forward pass of the compressor, at most: bounds its memory
CPU_PASS_TOKENS: Final = 1 << 12  # more do not fit into a CPU's caches


class EncodedDocument(NamedTuple):
    """A query with one document, in the compressor's tokens."""

    ids: list[int]
    """Tokens of query and document, without memory tokens."""
    start: int
    """Index in `ids` of the document's first token."""
    stop: int
    """Index in `ids` after the document's last token."""
    memory: int
    """Number of memory tokens for the document."""
    copied: tuple[bool, ...] = ()
    """For each of the document's tokens, whether the answer copies it; empty if that is not known."""


_STAND_IN: Final = EncodedDocument([0], 0, 1, 1)
"""One token, for a pass without documents."""


class Encoded(NamedTuple):
    """One example as token ids."""

    documents: list[EncodedDocument]
    prompt_parts: list[list[int]]
    """The generator's tokens before, between and after the documents; empty in a pointer's pretraining."""
    answer_ids: list[int]
    """The answer's tokens with the end token; empty before it is written."""
    scores: list[float] | None
    """Relevance of each document by the teacher's reranker."""

    @property
    def prompt_length(self) -> int:
        """Number of positions of the generator's prompt."""
        embeddings = sum(document.memory for document in self.documents) if self.prompt_parts else 0
        return sum(map(len, self.prompt_parts)) + embeddings


class EncodedQuestion(NamedTuple):
    """A prompt, and the embeddings of its documents if they are already compressed."""

    encoded: Encoded
    embeddings: torch.Tensor | None
    """[memory tokens of all documents, width]; None if the documents are not compressed yet."""

    @property
    def length(self) -> int:
        """Length for sorting: tokens of the prompt's text, plus the number of its parts."""
        return sum(map(len, self.encoded.prompt_parts)) + len(self.encoded.prompt_parts)


class Group(TypedDict):
    """Documents of similar length, padded on the right."""

    ids: torch.Tensor
    """[documents, length]: tokens of the compressor's vocabulary."""
    lengths: torch.Tensor
    """[documents]: number of tokens without padding."""
    starts: torch.Tensor
    """[documents]: index of the document's first token."""
    stops: torch.Tensor
    """[documents]: index after the document's last token."""
    counts: torch.Tensor
    """[documents]: number of memory tokens of each document."""
    places: torch.Tensor
    """[documents]: index of each document among all documents of the batch."""
    queries: NotRequired[Any]
    """The `ReadQueries` of the batch, if the compressor has read the queries before the documents."""
    asked: NotRequired[torch.Tensor]
    """[documents]: index of each document's query in `queries`."""


class Batch(TypedDict):
    """The arguments of `ScaleDownModel.forward`. Documents are numbered through the batch, by example."""

    groups: list[Group]
    """All documents; or one that stands in, while `scores` are empty."""
    ids: torch.Tensor
    """[batch, length]: prompt and answer, padded on the right; 0 where `is_memory` is true."""
    is_memory: torch.Tensor
    """[batch, length] bool: positions of memory embeddings, in the order of the documents."""
    labels: torch.Tensor
    """[batch, length]: the answer's tokens, -100 at other positions."""
    scores: torch.Tensor
    """[documents] float32: the teacher's scores, NaN for an example without scores."""
    copied: torch.Tensor
    """[documents, longest document] float32: 1 for tokens that the answer copies, else 0."""
    sizes: torch.Tensor
    """[batch]: number of documents of each example."""


def collate(examples: Sequence[Encoded], *, one_group: bool = False) -> Batch:
    """Make one batch of examples.

    Args:
        examples: One or more examples.
        one_group: Whether all documents are one group, as processes need that share a model: each must run
            the compressor as often as the others. Without documents the group has one that stands in.
    """
    length = max(example.prompt_length + len(example.answer_ids) for example in examples)
    ids = torch.zeros(len(examples), length, dtype=torch.long)  # [batch, length]
    is_memory = torch.zeros_like(ids, dtype=torch.bool)
    labels = torch.full_like(ids, IGNORED)
    scores: list[float] = []
    for row, example in enumerate(examples):
        place = 0
        for number, part in enumerate(example.prompt_parts):
            if number:
                count = example.documents[number - 1].memory
                is_memory[row, place : place + count] = True
                place += count
            ids[row, place : place + len(part)] = torch.tensor(part, dtype=torch.long)
            place += len(part)
        answer = torch.tensor(example.answer_ids, dtype=torch.long)
        ids[row, place : place + len(answer)] = answer
        labels[row, place : place + len(answer)] = answer
        scores += example.scores if example.scores is not None else [float("nan")] * len(example.documents)
    documents = [document for example in examples for document in example.documents]
    groups = [_one_group(documents or [_STAND_IN])] if one_group else group(documents)
    copied = torch.zeros(len(documents), max((one.stop - one.start for one in documents), default=1) or 1)
    for row, document in enumerate(documents):
        copied[row, : len(document.copied)] = torch.tensor(document.copied, dtype=torch.float32)
    return {
        "groups": groups,
        "ids": ids,
        "is_memory": is_memory,
        "labels": labels,
        "scores": torch.tensor(scores),
        "copied": copied,
        "sizes": torch.tensor([len(example.documents) for example in examples]),
    }


def group(
    documents: Sequence[EncodedDocument], most_tokens: int = PASS_TOKENS, *, after_queries: int = 0
) -> list[Group]:
    """Group documents of similar length, so that padding and forward passes together cost least.

    Args:
        documents: The documents of a batch.
        most_tokens: The most tokens of a group, padding and queries included. A document that is longer is a
            group by itself.
        after_queries: If the queries are already read, the length of the longest: only documents' own tokens
            are then read.

    Returns:
        The groups; each document is in one of them.
    """
    groups: list[Group] = []
    read = [len(document.ids) - (document.start if after_queries else 0) for document in documents]
    kept = [after_queries + length for length in read]
    for places in _partition(read, kept, most_tokens):
        own = _one_group([documents[place] for place in places])
        groups.append(own | {"places": torch.tensor(places)})
    return groups


def _one_group(documents: Sequence[EncodedDocument]) -> Group:
    """Make one group of all documents, in their order."""
    lengths = torch.tensor([len(document.ids) for document in documents])
    ids = torch.zeros(len(documents), int(lengths.max()), dtype=torch.long)  # [documents, length]
    for row, document in enumerate(documents):
        ids[row, : len(document.ids)] = torch.tensor(document.ids, dtype=torch.long)
    return {
        "ids": ids,
        "lengths": lengths,
        "starts": torch.tensor([document.start for document in documents]),
        "stops": torch.tensor([document.stop for document in documents]),
        "counts": torch.tensor([document.memory for document in documents]),
        "places": torch.arange(len(documents)),
    }


def _partition(lengths: Sequence[int], kept: Sequence[int], most_tokens: int) -> list[list[int]]:
    """Sort the indices of `lengths` by length and cut them into parts of the least total cost.

    `kept` are the lengths that must fit into `most_tokens`, with those of a part padded to the longest. The
    cost is the number of tokens with padding, plus a fixed cost for each part. The best cuts are found by
    dynamic programming: `best[n]` is the least cost of the documents before the n-th possible cut.
    """
    order = sorted(range(len(lengths)), key=lambda place: lengths[place])
    # Documents of equal length stay together: a cut between them never helps.
    ends = [
        end
        for end in range(1, len(order) + 1)
        if end == len(order) or lengths[order[end]] > lengths[order[end - 1]]
    ]
    best: list[tuple[int, int]] = [(0, 0)]  # (cost, previous cut) for the documents before a cut
    cuts = [0, *ends]
    for number, end in enumerate(ends, 1):
        longest = lengths[order[end - 1]]
        best.append(
            min(
                (best[before][0] + (end - cuts[before]) * longest + FIXED_TOKENS, before)
                for before in range(number)
            )
        )
    parts: list[list[int]] = []
    number = len(ends)
    while number:
        before = best[number][1]
        part = order[cuts[before] : cuts[number]]
        size = max(1, most_tokens // max(1, *(kept[place] for place in part)))
        parts = [part[start : start + size] for start in range(0, len(part), size)] + parts
        number = before
    return parts


class _Pieces(Context):
    """The teacher's prompt, cut into pieces around documents that the generator reads as embeddings."""

    def spelled(self, text: str) -> str:
        """Remove the mark of the documents, then neutralize special tokens: the mark may have split one."""
        return self.spelled_apart(text.replace(_DOCUMENTS_MARK[0], ""))

    def around(self, prompt: Prompt, documents: int) -> list[list[int]]:
        """Return the token ids before, between and after `documents` documents, tokenized piece by piece."""
        user = self.spelled(prompt.before) + _DOCUMENTS_MARK + self.spelled(prompt.after)
        special = self._tokenizer.chat_template is None
        if special:
            text = f"{prompt.system}\n\n{user}\nAnswer:".lstrip()
        else:
            text = self._render(prompt.system, user, fold=self._folds_system)
        before, _, after = text.partition(_DOCUMENTS_MARK)
        pieces = [before, *[SEPARATOR] * (documents - 1), after]
        return [
            self._tokenizer(piece, add_special_tokens=special and not number, verbose=False)["input_ids"]
            for number, piece in enumerate(pieces)
        ]


class Reader:
    """Turns text into `Encoded` examples, with the tokenizers of the generator and of the compressor.

    `cut` counts documents and `cut_queries` counts queries that were cut for the compressor because they were
    longer than the settings allow. `context` is the generator's context, in tokens.

    Raises:
        ModelError: The generator's context is too short, or a pointer's tokenizer is not a fast one.
    """

    def __init__(
        self, config: ScaleDownConfig, tokenizer: Any, compressor_tokenizer: Any, context: int
    ) -> None:
        if config.kind.picks_tokens and not compressor_tokenizer.is_fast:
            raise ModelError(
                f"{config.generator_name}: has no fast tokenizer, which a pointer needs; use another model"
            )
        self.cut = 0
        self.cut_queries = 0
        self.context = context
        self._config = config
        self._tokenizer = tokenizer
        self._compressor = compressor_tokenizer
        self._pieces = _Pieces(config.generator_name, tokenizer, context, TeacherSettings(max_new_tokens=1))
        special = compressor_tokenizer("")["input_ids"]
        first = {compressor_tokenizer.cls_token_id, compressor_tokenizer.bos_token_id}
        self._start = [token for token in special[:1] if token in first]
        self._end = special[len(self._start) :]  # [SEP] for encoders, nothing for most decoders

    def encode(
        self,
        query: str,
        documents: Sequence[object],
        answer: str | None = None,
        scores: Sequence[float] | None = None,
        *,
        rate: int = 0,
    ) -> Encoded:
        """Encode an example whose documents will be compressed.

        Args:
            query: The question.
            documents: Strings or `{"title", "text"}`.
            answer: The answer to learn; None if it is to be written.
            scores: The teacher's relevance of each document, if known.
            rate: Document tokens for each memory token; 0 is the model's own rate.

        Raises:
            InputError: There are no documents, or a document is of another type.
        """
        if not documents:
            raise InputError("there are no documents to compress: give at least one")
        copied = answer if self._config.kind.picks_tokens else None
        return Encoded(
            self.read(query, documents, copied or "", rate=rate),
            self._pieces.around(self._prompt(query), len(documents)),
            [] if answer is None else self.answer_ids(answer),
            None if scores is None else list(scores),
        )

    def prompt_parts(self, query: str, documents: int, system: str = "") -> list[list[int]]:
        """Return the generator's prompt around documents that are already embeddings.

        Args:
            query: The question.
            documents: Number of documents, at least 1.
            system: Replaces the system message of the template; empty keeps it.

        Returns:
            Token ids before, between and after the documents: one list more than there are documents.
        """
        return self._pieces.around(self._instructed(self._prompt(query), system), documents)

    def encode_text(
        self, query: str, documents: Sequence[object], max_new_tokens: int, system: str = ""
    ) -> Encoded:
        """Encode a prompt with the documents' text, as the teacher reads it.

        Args:
            query: The question.
            documents: Strings or `{"title", "text"}`; without any, the prompt has no documents.
            max_new_tokens: Tokens of the context that are left free for the answer.
            system: Replaces the system message of the template; empty keeps it.

        Raises:
            InputError: The question alone does not fit into the context, or a document is of another type.
        """
        fitted = self.fit_text(query, documents, max_new_tokens, system)
        if isinstance(fitted, Rejection):
            raise InputError(f"query {query[:80]!r}: {fitted.reason}; shorten it")
        return Encoded([], [fitted[0]], [], None)

    def fit_text(
        self, query: str, documents: Sequence[object], max_new_tokens: int, system: str = ""
    ) -> tuple[list[int], int] | Rejection:
        """Tokenize a prompt with the documents' text; if it is too long, the last documents are cut.

        Args:
            query: The question.
            documents: Strings or `{"title", "text"}`; without any, the prompt has no documents.
            max_new_tokens: Tokens of the context that are left free for the answer.
            system: Replaces the system message of the template; empty keeps it.

        Returns:
            Token ids and the number of document tokens cut; if the question alone does not fit, a
            `Rejection`.
        """
        texts = [document_text(document) for document in documents]
        template = self._config.template if texts else CLOSED_BOOK
        prompt = self._instructed(answer_prompt("", query, texts, 0.0, template), system)
        generation = TeacherSettings(max_new_tokens=max_new_tokens)
        return Context(self._config.generator_name, self._tokenizer, self.context, generation).fit(prompt)

    def read(
        self, query: str, documents: Sequence[object], answer: str = "", *, rate: int = 0
    ) -> list[EncodedDocument]:
        """Tokenize the query with each document for the compressor.

        Args:
            query: The question; if it is empty, the compressor reads the document alone.
            documents: Strings or `{"title", "text"}`.
            answer: If given, the tokens that it copies from the documents are marked.
            rate: Document tokens for each memory token; 0 is the model's own rate.

        Returns:
            A record for each document.
        """
        check_documents(documents)
        config = self._config
        asked: list[int] = []
        if query:
            asked = self._plain_ids(query)
            self.cut_queries += len(asked) > config.query_max_length
            asked = asked[: config.query_max_length] + (self._end or self._plain_ids("\n"))
        start = len(self._start) + len(asked)
        found, texts, offsets = [], [], []
        for document in documents:
            text = document_text(document)
            read = self._compressor(
                text,
                add_special_tokens=False,
                split_special_tokens=True,
                verbose=False,
                return_offsets_mapping=bool(answer),
            )
            tokens = read["input_ids"]
            self.cut += len(tokens) > config.doc_max_length
            tokens = tokens[: config.doc_max_length]
            memory = config.memory_tokens_of(len(tokens), rate or config.compression_rate)
            ids = [*self._start, *asked, *tokens, *self._end]
            found.append(EncodedDocument(ids, start, start + len(tokens), memory))
            if answer:
                offsets.append(read["offset_mapping"][: len(tokens)])
                texts.append(
                    text[: max((end for _, end in offsets[-1]), default=0)]
                )  # without the part that is cut
        if not answer:
            return found
        return [
            one._replace(copied=tuple(any(a < end and b > begin for begin, end in spans) for a, b in own))
            for one, own, spans in zip(found, offsets, copied_spans(query, texts, answer), strict=True)
        ]

    def answer_ids(self, answer: str) -> list[int]:
        """Return the answer's tokens and the end token."""
        # After a chat template the answer begins a line; after the plain prompt it follows `Answer:`.
        text = answer.strip() if self._tokenizer.chat_template is not None else f" {answer.strip()}"
        ids: list[int] = self._tokenizer(
            text, add_special_tokens=False, split_special_tokens=True, verbose=False
        )["input_ids"]
        return [*ids, self._tokenizer.eos_token_id]

    def _prompt(self, query: str) -> Prompt:
        return answer_prompt("", query, (), 0.0, self._config.template)

    def _instructed(self, prompt: Prompt, system: str) -> Prompt:
        """Replace the prompt's system message, if one is given. It is a user's text and is neutralized."""
        return prompt._replace(system=self._pieces.spelled(system)) if system else prompt

    def _plain_ids(self, text: str) -> list[int]:
        return plain_ids(self._compressor, text)


def check_documents(documents: object) -> None:
    """Raise `InputError` if the documents of a query are one text, which is a sequence of characters."""
    if isinstance(documents, str):
        raise InputError("the documents of a query are a text: put it into a list")


def plain_ids(tokenizer: Any, text: str) -> list[int]:
    """Tokenize a text from data; special tokens in it are read as ordinary text."""
    ids: list[int] = tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)[
        "input_ids"
    ]
    return ids
