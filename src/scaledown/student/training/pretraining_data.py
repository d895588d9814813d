"""Make pretraining examples of a corpus: cloze questions for a pointer, passages to repeat for others."""

import itertools
import logging
import math
from array import array
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from pathlib import Path
from random import Random
from typing import Any, Final

from scaledown.config.train import PretrainConfig
from scaledown.data.input import files, tables
from scaledown.data.input.chunking import Chunker
from scaledown.data.input.corpus import ROWS_AT_ONCE, cut_rows, plain
from scaledown.data.input.gold import read_gold
from scaledown.data.input.training_files import sound_records
from scaledown.data.prompts import CONTINUE, REPEAT
from scaledown.errors import InputError, ModelError
from scaledown.extensions import COMPRESSORS
from scaledown.records import Passage, full_text, title_of
from scaledown.student.compressor import Compressor
from scaledown.student.labels import copied_spans
from scaledown.student.training.cloze import cloze_questions
from scaledown.student.training.training_data import (
    Examples,
    Parts,
    TrainingExample,
    read_examples,
    split_parts,
    store_examples,
    with_key,
)

log = logging.getLogger("scaledown")

_LONG_TITLE: Final = 8
"""Words; a title that takes more than half of a passage is shortened in it, and these are longer."""
_MESSAGES: Final = 20  # messages about unusable rows; the others are counted


def pretraining_parts(config: PretrainConfig, tokenizer: Any, folder: Path) -> Parts:
    """Read the corpus as examples. They are in a file in `folder` until the process ends.

    Args:
        config: The corpus and the size of the run.
        tokenizer: The compressor's; it cuts the passages.
        folder: Where examples are stored.

    Returns:
        The examples to train on, and those held out.

    Raises:
        InputError: The corpus has no text.
        ModelError: The tokenizer is not a fast one.
    """
    if not tokenizer.is_fast:
        raise ModelError(f"{tokenizer.name_or_path}: has no fast tokenizer, which cutting passages needs")
    bad: list[str] = []
    left_out = _LeftOut(config.leave_out)
    found = pretraining_examples(config, tokenizer, bad, left_out)
    records = None
    if config.train_data:
        gold = read_gold(config.gold, "--gold") if config.gold else None
        records = read_examples(config.train_data, folder, gold=gold)
        found = _alternating(found, records)
    if config.max_steps:
        found = itertools.islice(
            found, math.ceil(config.max_steps * config.batch_size / (1 - config.eval_fraction))
        )
    examples = store_examples(found, folder)
    if config.leave_out:
        left_out.report()
    for message in bad[:_MESSAGES]:
        log.warning("%s; skipped", message)
    if len(bad) > _MESSAGES:
        log.warning("%s more rows are unusable", f"{len(bad) - _MESSAGES:,}")
    if not len(examples):
        picks = COMPRESSORS.find(config.compressor).picks_tokens
        asked = " in which a name or a number can be hidden" if picks else ""
        left = " after those of --leave_out" if left_out.number else ""
        raise InputError(
            f"--corpus_path {' '.join(config.corpus_path)}: no article with text{asked}{left}; check the file"
        )
    examples.skipped = len(bad) + (records.skipped if records else 0)
    return split_parts(examples, config)


class _LeftOut:
    """The articles of held-out records, by the titles of their documents."""

    def __init__(self, files: Sequence[str]) -> None:
        self._titles: set[str] = set()
        self._starts: set[str] = set()
        self.number = self._read = 0
        untitled = 0
        for record in sound_records([Path(file) for file in files]):
            for document in record["documents"]:
                words = title_of(document).split()
                untitled += not words
                self._titles.add(" ".join(words))
                self._starts.update(_starts(words))
        self._titles.discard("")
        if untitled:
            log.warning(
                "--leave_out: %s documents have no title line: their articles are not left out",
                f"{untitled:,}",
            )

    def has(self, title: str) -> bool:
        """Whether an article is left out. It is counted."""
        words = title.split()
        whole = " ".join(words)
        found = whole in self._titles or whole in self._starts or not self._titles.isdisjoint(_starts(words))
        self._read += 1
        self.number += found
        return found

    def report(self) -> None:
        """Log how much of the corpus was left out."""
        write = log.warning if 2 * self.number > self._read else log.info
        write(
            "--leave_out: %s of the %s articles that were read are left out",
            *(f"{self.number:,}", f"{self._read:,}"),
        )


def _starts(words: Sequence[str]) -> list[str]:
    """Return the beginnings of a long title: a passage may have only its first words."""
    return [" ".join(words[:count]) for count in range(_LONG_TITLE, len(words))]


def _alternating(
    questions: Iterator[tuple[str, TrainingExample]], records: Examples
) -> Iterator[tuple[str, TrainingExample]]:
    """Yield a record after each cloze question.

    Records repeat if there are fewer; the rest comes at the end.
    """
    places = iter(range(len(records)))
    teaching = array("q")  # indices of records whose answer copies something
    again = 0
    for question in questions:
        yield question
        if (record := _next_copied(records, places, teaching)) is not None:
            yield with_key(record)
        elif teaching:
            record = _copied(records[teaching[again % len(teaching)]])
            again += 1
            if record is not None:
                yield with_key(record)
    while (record := _next_copied(records, places, teaching)) is not None:
        yield with_key(record)


def _next_copied(records: Examples, places: Iterator[int], teaching: "array[int]") -> TrainingExample | None:
    """Return the next record whose answer copies something; its index is added to `teaching`."""
    for place in places:
        if (record := _copied(records[place])) is not None:
            teaching.append(place)
            return record
    return None


def _copied(example: TrainingExample) -> TrainingExample | None:
    """Reduce a record to the documents that the answer copies from; None if there are none.

    The other documents do not help in pretraining, and a pass over reduced records costs a third as much. The
    model learns to compare documents in training.
    """
    spans = copied_spans(example.query, example.documents, example.answer)
    copied = [text for text, own in zip(example.documents, spans, strict=True) if own]
    return example._replace(documents=copied, scores=None) if copied else None


def pretraining_examples(
    config: PretrainConfig, tokenizer: Any, bad: list[str], left_out: "_LeftOut | None" = None
) -> Iterator[tuple[str, TrainingExample]]:
    """Yield an example for each passage, with the passage's id.

    A compressor that picks tokens gets a cloze question about one sentence, if there is a suitable one. Other
    kinds get one of two tasks: to repeat the passage, or to write the next one; the last passage of an
    article is always repeated. The choice depends only on `config.seed` and the passage's id.

    Args:
        config: The corpus.
        tokenizer: Cuts the passages.
        bad: Receives a message for each row that is not an article.
        left_out: The articles to leave out; counts them.
    """
    kind: Compressor = COMPRESSORS.find(config.compressor)
    examples = _cloze_questions if kind.picks_tokens else _of_article
    corpus = [files.locate(name, "--corpus_path") for name in config.corpus_path]
    meaning = tables.CORPUS._replace(flag="")
    paths = files.every(corpus, "--corpus_path")
    rows = itertools.chain.from_iterable(tables.rows(path, meaning) for path in paths)
    chunker = Chunker(plain(tokenizer), "tokens", config.doc_max_length)
    articles = 0
    while batch := list(itertools.islice(rows, ROWS_AT_ONCE)):
        cut = cut_rows(batch, chunker, files.folders_of(corpus))
        bad += [f"{row.source}:{row.line}: {reason}" for row, reason in cut.rejected]
        passages = iter(cut.passages.select(Passage._fields).to_pylist())
        for count in cut.pieces:
            own = [Passage(**next(passages)) for _ in range(count)]
            if not (own and left_out and left_out.has(own[0].title)):
                yield from examples(own, config.seed)
            articles += 1
            if articles == config.max_corpus_size:
                return


def _of_article(passages: list[Passage], seed: int) -> Iterator[tuple[str, TrainingExample]]:
    for passage, following in itertools.zip_longest(passages, passages[1:]):
        name = passage.passage_id
        coin = blake2b(f"{seed} {name}".encode(), digest_size=1).digest()[0] & 1
        text = full_text(passage.title, passage.text)
        task, answer = (CONTINUE, following.text) if following and coin else (REPEAT, text)
        yield name, TrainingExample(task, [text], answer, None)


def _cloze_questions(passages: list[Passage], seed: int) -> Iterator[tuple[str, TrainingExample]]:
    for passage in passages:
        name = passage.passage_id
        random = Random(f"{seed} {name}")  # noqa: S311
        if found := list(cloze_questions(passage.text, random, passage.title)):
            cloze = random.choice(found)
            document = full_text(passage.title, passage.text)
            yield name, TrainingExample(cloze.query, [document], cloze.answer, None)
