"""Make pretraining examples of a corpus: cloze questions for a pointer, passages to repeat for others."""

import itertools
import logging
import math
from array import array
from collections import Counter
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
from scaledown.records import Passage, full_text
from scaledown.student.compressor import Compressor
from scaledown.student.labels import copied_spans
from scaledown.student.split import Keys, key
from scaledown.student.training.cloze import cloze_questions
from scaledown.student.training.training_data import (
    Examples,
    Parts,
    TrainingExample,
    named,
    read_examples,
    split_parts,
    store_examples,
)

log = logging.getLogger("scaledown")

_MESSAGES: Final = 20  # about unusable rows; the others are counted


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
    left_out = _articles_of(config.leave_out)
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
    if left_out:
        number = sum(map(bool, left_out.values()))
        write = log.info if number else log.warning
        write(
            "--leave_out: %s of its %s articles were in the corpus, and are left out", number, len(left_out)
        )
    for message in bad[:_MESSAGES]:
        log.warning("%s; skipped", message)
    if len(bad) > _MESSAGES:
        log.warning("%s more rows are unusable", f"{len(bad) - _MESSAGES:,}")
    if not len(examples):
        picks = COMPRESSORS.find(config.compressor).picks_tokens
        asked = " in which a name or a number can be hidden" if picks else ""
        raise InputError(
            f"--corpus_path {' '.join(config.corpus_path)}: no article with text{asked}; check the file"
        )
    examples.skipped = len(bad) + (records.skipped if records else 0)
    return split_parts(examples, config)


def _articles_of(files: Sequence[str]) -> Counter[int]:
    """Return a count of 0 for each article in records, by the key of its title."""
    keys = Keys()
    for record in sound_records([Path(file) for file in files]):
        keys.add(record["query"], record["documents"], None)
    if keys.untitled:
        log.warning(
            "--leave_out: %s of %s documents have no title line: their articles are not left out",
            *(f"{keys.untitled:,}", f"{len(keys.documents):,}"),
        )
    return Counter(dict.fromkeys(keys.documents, 0))


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
            yield named(record)
        elif teaching:
            record = _copied(records[teaching[again % len(teaching)]])
            again += 1
            if record is not None:
                yield named(record)
    while (record := _next_copied(records, places, teaching)) is not None:
        yield named(record)


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
    config: PretrainConfig, tokenizer: Any, bad: list[str], left_out: Counter[int] | None = None
) -> Iterator[tuple[str, TrainingExample]]:
    """Yield an example for each passage, with the passage's id.

    A compressor that picks tokens gets a cloze question about one sentence, if there is a suitable one. Other
    kinds get one of two tasks: to repeat the passage, or to write the next one; the last passage of an
    article is always repeated. The choice depends only on `config.seed` and the passage's id.

    Args:
        config: The corpus.
        tokenizer: Cuts the passages.
        bad: Receives a message for each row that is not an article.
        left_out: The keys of the titles of articles to leave out; counts what is left out.
    """
    kind: Compressor = COMPRESSORS.find(config.compressor)
    examples = _questions if kind.picks_tokens else _of_article
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
            if own and left_out and (title := key(own[0].title)) in left_out:
                left_out[title] += 1
            else:
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


def _questions(passages: list[Passage], seed: int) -> Iterator[tuple[str, TrainingExample]]:
    for passage in passages:
        name = passage.passage_id
        random = Random(f"{seed} {name}")  # noqa: S311
        if found := list(cloze_questions(passage.text, random, passage.title)):
            cloze = random.choice(found)
            document = full_text(passage.title, passage.text)
            yield name, TrainingExample(cloze.query, [document], cloze.answer, None)
