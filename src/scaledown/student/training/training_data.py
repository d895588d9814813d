"""Training data: examples on disk, those held out, the order of training."""

import functools
import itertools
import logging
import uuid
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import pyarrow as pa

from scaledown.config.train import StudentConfig, TrainConfig
from scaledown.data.input.gold import Gold, read_gold
from scaledown.data.input.training_files import entries, problems
from scaledown.errors import InputError, UsageError
from scaledown.records import document_text
from scaledown.run.progress import track
from scaledown.student.labels import occurrences
from scaledown.student.split import Keys, Split, question, split

log = logging.getLogger("scaledown")

_ROWS_PER_BATCH: Final = 1024  # in a batch on disk
_MESSAGES: Final = 20  # about unusable records; the others are counted
_EXAMPLE_COLUMNS: Final = pa.schema(
    {
        "query": pa.string(),
        "documents": pa.list_(pa.string()),
        "answer": pa.string(),
        "scores": pa.list_(pa.float64()),
    }
)


class TrainingExample(NamedTuple):
    """A training record; its documents are texts as the models read them."""

    query: str
    documents: list[str]
    answer: str
    scores: list[float] | None
    """Relevance of each document by the teacher's reranker; None if the data has none."""


class Examples:
    """Training examples in order. They are on disk and are read one by one.

    `skipped` is the number of records that could not be used.
    """

    def __init__(self, content: pa.RecordBatchFileReader, keys: Keys) -> None:
        self._content = content
        self._keys = keys
        self.skipped = 0

    def __len__(self) -> int:
        return len(self._keys.questions)

    def __getitem__(self, row: int) -> TrainingExample:
        batch = self._content.get_batch(row // _ROWS_PER_BATCH)
        return TrainingExample(**batch.slice(row % _ROWS_PER_BATCH, 1).to_pylist()[0])

    def documents(self) -> Iterator[list[str]]:
        """Yield all documents, those of about a thousand examples at a time."""
        for number in range(self._content.num_record_batches):
            yield self._content.get_batch(number).column("documents").flatten().to_pylist()

    @property
    def document_count(self) -> int:
        """Number of documents of all examples."""
        return len(self._keys.documents)

    @property
    def untitled(self) -> int:
        """Number of documents without a title line; their article is not known."""
        return self._keys.untitled

    def shared_by(self, others: "Examples") -> int:
        """Count the examples of `others` that share an article or the question with an example here."""
        return self._keys.shared_by(others._keys)

    def split(self, fraction: float, seed: int) -> Split:
        """Hold out about a fraction of the examples, at least one if possible; see `Split`.

        Args:
            fraction: Share of the examples to hold out, 0 to 1. 0 holds out nothing.
            seed: Decides which examples are held out.
        """
        return split(self._keys, fraction, seed)


def read_examples(
    files: Sequence[str],
    folder: Path,
    *,
    needs_scores: bool = False,
    gold: Gold | None = None,
    needs_gold: bool = True,
) -> Examples:
    """Read the usable records of `files`. Others are skipped, and logged with file and line.

    Args:
        files: Paths of the training data.
        folder: Where examples are stored until the process ends.
        needs_scores: Skip records without reranking scores.
        gold: Right answers, which replace the teacher's.
        needs_gold: Refuse records of which none has a right answer in `gold`.

    Returns:
        The examples.

    Raises:
        InputError: A file cannot be read, or no record is usable.
        UsageError: No record has scores, and they are needed.
    """
    bad = unscored = known = 0

    def found() -> Iterator[tuple[str, TrainingExample]]:
        nonlocal bad, unscored, known
        for file in files:
            for number, entry in enumerate(entries(Path(file)), 1):
                wrong = [entry.problem] if entry.problem else problems(entry.record)
                if not wrong and needs_scores and entry.record.get("reranking_scores") is None:
                    wrong = ["has no reranking_scores, which --enable_reranking needs"]
                    unscored += 1
                if not wrong:
                    known += bool(gold and gold.answers(entry.record["query"]))
                    yield _keyed_example(entry.record, gold)
                    continue
                bad += 1
                if bad <= _MESSAGES:
                    log.warning("%s:%s: record %s: %s; skipped", file, entry.line, number, wrong[0])

    examples = store_examples(found(), folder)
    if gold is not None:
        log.info("%s of %s questions have a right answer in --gold", f"{known:,}", f"{len(examples):,}")
        if len(examples) and not known and needs_gold:
            raise InputError(
                f"none of {len(examples):,} records of {', '.join(files)} has a right answer: --gold is "
                "matched by the question's words: give the gold of these questions, or leave the flag out"
            )
    if bad > _MESSAGES:
        log.warning("%s more records are unusable; `scaledown validate` lists all", f"{bad - _MESSAGES:,}")
    if unscored and not len(examples):
        raise UsageError(
            f"--enable_reranking needs reranking_scores, and {', '.join(files)} has none: make the data "
            "with scaledown prepare --enable_reranking, or leave the flag out"
        )
    if not len(examples):
        raise InputError(
            f"{', '.join(files)}: no usable record; `scaledown validate {files[0]}` says what is wrong"
        )
    examples.skipped = bad
    return examples


def _keyed_example(record: dict[str, Any], gold: Gold | None) -> tuple[str, TrainingExample]:
    documents = [document_text(document) for document in record["documents"]]
    answer = record["answer"]
    if gold is not None and (right := gold.answers(record["query"])):
        # The first right answer that occurs in a document: a pointer learns its place there.
        occurring = (text for text in right if any(occurrences(document, text) for document in documents))
        answer = next(occurring, right[0])
    return with_key(TrainingExample(record["query"], documents, answer, record.get("reranking_scores")))


def with_key(example: TrainingExample) -> tuple[str, TrainingExample]:
    """Return an example with a key; examples with the same question have equal keys."""
    return question(example.query), example


def store_examples(found: Iterable[tuple[str, TrainingExample]], folder: Path) -> Examples:
    """Store examples on disk.

    The file has no name in the folder, so that it is deleted when the process ends.

    Args:
        found: Examples with their keys, see `with_key`. Examples with equal keys are never on both sides of a
            split.
        folder: Must have room for all examples.

    Returns:
        The examples, in the same order.
    """
    keys = Keys()
    path = (
        folder / f".examples.{uuid.uuid4().hex}.tmp"
    )  # processes on several machines may write into the folder
    try:
        with (
            track("read", "records", None) as tracker,
            pa.OSFile(str(path), "wb") as sink,
            pa.ipc.new_file(sink, _EXAMPLE_COLUMNS) as writer,
        ):
            source = iter(found)
            while block := list(itertools.islice(source, _ROWS_PER_BATCH)):
                for text, example in block:
                    keys.add(text, example.documents, example.scores)
                rows = [example._asdict() for _, example in block]
                writer.write_batch(pa.RecordBatch.from_pylist(rows, _EXAMPLE_COLUMNS))
                tracker.advance(len(block))
        return Examples(pa.ipc.open_file(pa.memory_map(str(path))), keys)
    finally:
        path.unlink(missing_ok=True)


class Subset(NamedTuple):
    """Examples to train on, or those held out."""

    examples: Examples
    rows: Sequence[int]
    """Indices of the examples, ascending."""


class Parts(NamedTuple):
    """The examples that a run trains on, and those it holds out."""

    train: Subset
    held_out: Subset | None
    """None if nothing is held out."""
    shared: int
    """Held-out examples that share an article with the training examples."""


def load_parts(config: TrainConfig, folder: Path) -> Parts:
    """Read the training data as examples, and choose those to hold out.

    Args:
        config: Files, and the settings for held-out examples.
        folder: The examples are in a file in this folder until the process ends.

    Returns:
        The examples to train on and the held-out ones.

    Raises:
        InputError: A file cannot be read, or has no usable record.
        UsageError: No record has scores, and they are needed.
    """
    gold = read_gold(config.gold, "--gold") if config.gold else None
    read = functools.partial(read_examples, folder=folder, needs_scores=config.enable_reranking, gold=gold)
    examples = read(config.train_data)
    if config.eval_data:
        held = read(config.eval_data, needs_gold=False)
        if shared := examples.shared_by(held):
            log.warning(
                "%s of %s records of --eval_data share an article or the question with training: their loss "
                "may be too low to choose by",
                *(f"{shared:,}", f"{len(held):,}"),
            )
        return Parts(Subset(examples, range(len(examples))), Subset(held, range(len(held))), shared)
    return split_parts(examples, config)


def split_parts(examples: Examples, config: StudentConfig) -> Parts:
    """Hold out `config.eval_fraction` of the examples, and warn about what they share with the others.

    Args:
        examples: All examples.
        config: `eval_fraction` and `seed` are used.
    """
    split = examples.split(config.eval_fraction, config.seed)
    if config.eval_fraction and not len(split.held_out):
        log.warning("nothing is held out: all records ask the same question")
    if examples.untitled:
        log.warning(
            "%s of %s documents have no title line: their articles are not known, and held-out examples may "
            "share articles with training",
            *(f"{examples.untitled:,}", f"{examples.document_count:,}"),
        )
    if split.shared:
        log.warning(
            "held out by %s: %s of %s held-out records share an article with training (nearly all records "
            "are connected by their articles)",
            *(split.by, f"{split.shared:,}", f"{len(split.held_out):,}"),
        )
    held_part = Subset(examples, split.held_out.tolist()) if len(split.held_out) else None
    return Parts(Subset(examples, split.train.tolist()), held_part, split.shared)


def training_order(rows: np.ndarray, examples: int, seed: int) -> np.ndarray:
    """Return the rows in the order of training. Each pass over the rows has its own random order.

    Args:
        rows: [rows]: the examples to train on.
        examples: Number of examples of the whole training, all passes together.
        seed: Seed of the orders.

    Returns:
        [examples].
    """
    passes = [
        np.random.default_rng([seed, number]).permutation(rows) for number in range(-(-examples // len(rows)))
    ]
    return np.concatenate(passes)[:examples]


def shares(order: np.ndarray, batch_size: int, rank: int, ranks: int) -> list[list[int]]:
    """Divide the rows of each step among processes.

    Args:
        order: [examples]: the result of `training_order`.
        batch_size: Examples of a step, all processes together.
        rank: The number of this process, from 0.
        ranks: Number of processes.

    Returns:
        For each step the rows of this process. In a smaller last step there may be none.
    """
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    return [batch[rank::ranks].tolist() for batch in batches]


class Lengths(NamedTuple):
    """Lengths of documents, in tokens."""

    number: int
    """Number of documents."""
    longest: int
    """Length of the longest document, before it is cut."""
    most: int
    """99% of the documents have at most this length."""
    cut: int
    """Documents that are longer than the limit."""


def measure_documents(examples: Sequence[Examples], tokenizer: Any, limit: int) -> Lengths:
    """Measure the lengths of all documents.

    Args:
        examples: One or more sets of examples.
        tokenizer: The compressor's tokenizer.
        limit: Longer documents count as cut, in tokens; 0 is no limit.
    """
    total = sum(part.document_count for part in examples)
    lengths = array("l")
    with track("measure", "documents", total) as tracker:
        for part in examples:
            for texts in part.documents():
                found = tokenizer(texts, add_special_tokens=False, split_special_tokens=True, verbose=False)
                lengths.extend(len(ids) for ids in found["input_ids"])
                tracker.advance(len(texts))
    most = int(np.quantile(lengths, 0.99, method="lower"))
    return Lengths(total, max(lengths), most, sum(length > limit > 0 for length in lengths))
