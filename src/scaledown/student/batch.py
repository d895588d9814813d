"""Questions with documents become token ids; examples become batches with little padding."""

from collections.abc import Sequence
from typing import Any, Final, NamedTuple, TypedDict

import torch

from scaledown.data.prompts import CLOSED_BOOK, Prompt, answer_prompt
from scaledown.data.teacher.base import Generation, Rejection
from scaledown.data.teacher.context import Context
from scaledown.errors import InputError, ModelError
from scaledown.records import document_text
from scaledown.student.labels import copied_spans
from scaledown.student.settings import ScaleDownConfig

IGNORED: Final = -100  # as a label: no loss there, by the convention of transformers
SEPARATOR: Final = "\n\n"  # between documents, as in `Prompt.user`

# Where the documents go while the chat template is applied: no text holds it.
_DOCUMENTS: Final = "\ue000documents\ue000"
# One more forward pass costs about as much as so many tokens: more on a GPU, fewer on two cores.
_PASS_TOKENS: Final = 128
PASS_TOKENS: Final = 1 << 15  # of one forward pass of the compressor, at most: bounds its memory
CPU_PASS_TOKENS: Final = 1 << 12  # more do not stay in its caches


class Document(NamedTuple):
    """A document with its query, as the compressor reads them."""

    ids: list[int]
    """Tokens, without memory tokens."""
    start: int
    """Where the document's own tokens begin in `ids`."""
    stop: int
    """Where they end."""
    memory: int
    """Memory tokens that stand for it."""
    copied: tuple[bool, ...] = ()
    """Which of its own tokens the answer copies; empty where that is not known."""


class Encoded(NamedTuple):
    """One example as token ids."""

    documents: list[Document]
    prompt_parts: list[list[int]]
    """The generator's tokens around the documents, one part more than documents; a pointer's pretraining has
    none."""
    answer_ids: list[int]
    """The answer with its end token; empty where there is none yet."""
    scores: list[float] | None
    """Relevance of each document by the teacher's reranker."""

    @property
    def prompt_length(self) -> int:
        """Positions of the generator's prompt."""
        embeddings = sum(document.memory for document in self.documents) if self.prompt_parts else 0
        return sum(map(len, self.prompt_parts)) + embeddings


class Question(NamedTuple):
    """A prompt, and what stands for its documents where that is known."""

    encoded: Encoded
    embeddings: torch.Tensor | None
    """[memory tokens of all documents, width] where they were given."""

    @property
    def length(self) -> int:
        """What a batch is sorted by: the generator's tokens that are text, and the documents."""
        return sum(map(len, self.encoded.prompt_parts)) + len(self.encoded.prompt_parts)


class Group(TypedDict):
    """Documents of similar length, padded on the right."""

    ids: torch.Tensor
    """[documents, length], of the compressor's vocabulary."""
    lengths: torch.Tensor
    """[documents]: tokens that are not padding."""
    starts: torch.Tensor
    """[documents]: where the document's own tokens begin."""
    stops: torch.Tensor
    """[documents]: where they end."""
    counts: torch.Tensor
    """[documents]: embeddings that stand for each."""
    places: torch.Tensor
    """[documents]: where each stands among all documents of the batch."""


class Batch(TypedDict):
    """What `ScaleDownModel.forward` takes by name. Documents count through the batch, example by example."""

    groups: list[Group]
    ids: torch.Tensor
    """[batch, length], prompt and answer, padded on the right; 0 where `is_memory`."""
    is_memory: torch.Tensor
    """[batch, length] bool: the places of memory embeddings, in the order of the documents."""
    labels: torch.Tensor
    """[batch, length]: the answer's tokens, -100 elsewhere."""
    scores: torch.Tensor
    """[documents] float32, NaN where an example has none."""
    copied: torch.Tensor
    """[documents, longest document] float32: 1 where a document's own token is copied by the answer."""
    sizes: torch.Tensor
    """[batch]: documents of each example."""


def collate(examples: Sequence[Encoded]) -> Batch:
    """Examples as one batch."""
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
    copied = torch.zeros(len(documents), max((one.stop - one.start for one in documents), default=1) or 1)
    for row, document in enumerate(documents):
        copied[row, : len(document.copied)] = torch.tensor(document.copied, dtype=torch.float32)
    return {
        "groups": group(documents),
        "ids": ids,
        "is_memory": is_memory,
        "labels": labels,
        "scores": torch.tensor(scores),
        "copied": copied,
        "sizes": torch.tensor([len(example.documents) for example in examples]),
    }


def group(documents: Sequence[Document], most_tokens: int = PASS_TOKENS) -> list[Group]:
    """Documents in groups of similar length, so that padding and forward passes together cost least.

    A group has at most `most_tokens`, padding included, but for a longer document alone.
    """
    groups: list[Group] = []
    for places in _partition([len(document.ids) for document in documents], most_tokens):
        chosen = [documents[place] for place in places]
        lengths = torch.tensor([len(document.ids) for document in chosen])
        ids = torch.zeros(len(places), int(lengths.max()), dtype=torch.long)  # [documents, length]
        for row, document in enumerate(chosen):
            ids[row, : len(document.ids)] = torch.tensor(document.ids, dtype=torch.long)
        groups.append(
            {
                "ids": ids,
                "lengths": lengths,
                "starts": torch.tensor([document.start for document in chosen]),
                "stops": torch.tensor([document.stop for document in chosen]),
                "counts": torch.tensor([document.memory for document in chosen]),
                "places": torch.tensor(places),
            }
        )
    return groups


def _partition(lengths: Sequence[int], most_tokens: int) -> list[list[int]]:
    """Places in `lengths`, by rising length, cut where the sum of padded tokens and passes is least."""
    order = sorted(range(len(lengths)), key=lambda place: lengths[place])
    # Documents of one length stay together: only the ends of such runs are worth a cut.
    ends = [
        end
        for end in range(1, len(order) + 1)
        if end == len(order) or lengths[order[end]] > lengths[order[end - 1]]
    ]
    best: list[tuple[int, int]] = [(0, 0)]  # cost of the documents up to a cut, and the cut before it
    cuts = [0, *ends]
    for number, end in enumerate(ends, 1):
        longest = lengths[order[end - 1]]
        best.append(
            min(
                (best[before][0] + (end - cuts[before]) * longest + _PASS_TOKENS, before)
                for before in range(number)
            )
        )
    parts: list[list[int]] = []
    number = len(ends)
    while number:
        before = best[number][1]
        part = order[cuts[before] : cuts[number]]
        size = max(1, most_tokens // max(1, lengths[part[-1]]))
        parts = [part[start : start + size] for start in range(0, len(part), size)] + parts
        number = before
    return parts


class _Pieces(Context):
    """The teacher's prompt in pieces, around documents that the generator sees as embeddings."""

    def spelled(self, text: str) -> str:
        """Text from outside, in which special tokens and the place of the documents are nothing special."""
        return self.spelled_apart(text).replace(_DOCUMENTS[0], "")

    def around(self, prompt: Prompt, documents: int) -> list[list[int]]:
        """Token ids before, between and after `documents` documents, tokenised piece by piece."""
        user = self.spelled(prompt.before) + _DOCUMENTS + self.spelled(prompt.after)
        special = self._tokenizer.chat_template is None
        if special:
            text = f"{prompt.system}\n\n{user}\nAnswer:".lstrip()
        else:
            text = self._render(prompt.system, user, fold=self._folds_system)
        before, _, after = text.partition(_DOCUMENTS)
        pieces = [before, *[SEPARATOR] * (documents - 1), after]
        return [
            self._tokenizer(piece, add_special_tokens=special and not number, verbose=False)["input_ids"]
            for number, piece in enumerate(pieces)
        ]


class Reader:
    """Turns text into `Encoded` examples, by the generator's tokenizer and the compressor's.

    `cut` counts the documents and `cut_queries` the queries (as the compressor reads them) that were longer
    than the settings allow. `context` is what the generator takes, in tokens. Raises `ModelError` for a
    generator whose context is too short.
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
        self._pieces = _Pieces(config.generator_name, tokenizer, context, Generation(max_new_tokens=1))
        special = compressor_tokenizer("")["input_ids"]
        first = {compressor_tokenizer.cls_token_id, compressor_tokenizer.bos_token_id}
        self._start = [token for token in special[:1] if token in first]
        self._end = special[len(self._start) :]  # [SEP] of encoders, nothing of most decoders

    def encode(
        self,
        query: str,
        documents: Sequence[object],
        answer: str | None = None,
        scores: Sequence[float] | None = None,
        *,
        rate: int = 0,
    ) -> Encoded:
        """An example whose documents will be compressed: strings or `{"title", "text"}`.

        `rate` is that of compression, in tokens a memory token; 0 is the model's own. Raises `InputError` for
        a document that is neither, or none at all.
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
        """The generator's prompt around documents that are embeddings already.

        A `system` message takes the place of the template's.
        """
        return self._pieces.around(self._instructed(self._prompt(query), system), documents)

    def encode_text(
        self, query: str, documents: Sequence[object], max_new_tokens: int, system: str = ""
    ) -> Encoded:
        """A prompt in plain text, as the teacher reads it: the documents themselves, or none.

        Documents that do not fit the context lose their ends, from the last one. A `system` message takes the
        place of the template's. Raises `InputError` where the question alone does not fit.
        """
        texts = [document_text(document) for document in documents]
        template = self._config.template if texts else CLOSED_BOOK
        prompt = self._instructed(answer_prompt("", query, texts, 0.0, template), system)
        generation = Generation(max_new_tokens=max_new_tokens)
        fitted = Context(self._config.generator_name, self._tokenizer, self.context, generation).fit(prompt)
        if isinstance(fitted, Rejection):
            raise InputError(f"query {query[:80]!r}: {fitted.reason}; shorten it")
        return Encoded([], [fitted[0]], [], None)

    def read(
        self, query: str, documents: Sequence[object], answer: str = "", *, rate: int = 0
    ) -> list[Document]:
        """Query and document as the compressor reads them, for each document; without a query if empty.

        With an `answer`, each tells which of its tokens that copies.
        """
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
            found.append(Document(ids, start, start + len(tokens), memory))
            if answer:
                offsets.append(read["offset_mapping"][: len(tokens)])
                texts.append(text[: max((end for _, end in offsets[-1]), default=0)])  # what is not cut
        if not answer:
            return found
        return [
            one._replace(copied=tuple(any(a < end and b > begin for begin, end in spans) for a, b in own))
            for one, own, spans in zip(found, offsets, copied_spans(query, texts, answer), strict=True)
        ]

    def answer_ids(self, answer: str) -> list[int]:
        """The answer's tokens with the token that ends it."""
        # A chat template leaves the generator at the start of a line, the bare prompt after `Answer:`.
        text = answer.strip() if self._tokenizer.chat_template is not None else f" {answer.strip()}"
        ids: list[int] = self._tokenizer(
            text, add_special_tokens=False, split_special_tokens=True, verbose=False
        )["input_ids"]
        return [*ids, self._tokenizer.eos_token_id]

    def _prompt(self, query: str) -> Prompt:
        return answer_prompt("", query, (), 0.0, self._config.template)

    def _instructed(self, prompt: Prompt, system: str) -> Prompt:
        """The prompt with another system message, if there is one; it comes from outside, as a query does."""
        return prompt._replace(system=self._pieces.spelled(system)) if system else prompt

    def _plain_ids(self, text: str) -> list[int]:
        return plain_ids(self._compressor, text)


def plain_ids(tokenizer: Any, text: str) -> list[int]:
    """The tokens of a text from data, in which special tokens are nothing special."""
    ids: list[int] = tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)[
        "input_ids"
    ]
    return ids
