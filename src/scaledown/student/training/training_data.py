"""Training files -> examples on disk; a split that does not leak; the order they are seen in."""

import functools
import itertools
import logging
import uuid
from array import array
from collections.abc import Iterable, Iterator, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import pyarrow as pa
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from scaledown.config.train import StudentConfig, TrainConfig
from scaledown.data.input.gold import Gold, read_gold
from scaledown.data.input.training_files import entries, problems
from scaledown.errors import InputError, UsageError
from scaledown.records import document_text, title_of
from scaledown.run.progress import track
from scaledown.student.labels import occurrences

log = logging.getLogger("scaledown")

_ROWS: Final = 1024  # of a batch on disk
_MESSAGES: Final = 20  # about bad records; the rest is counted
_SCHEMA: Final = pa.schema(
    {
        "query": pa.string(),
        "documents": pa.list_(pa.string()),
        "answer": pa.string(),
        "scores": pa.list_(pa.float64()),
    }
)


class TrainingExample(NamedTuple):
    """A training record, its documents as the models see them."""

    query: str
    documents: list[str]
    answer: str
    scores: list[float] | None


class Examples:
    """Training examples in their order; on disk, and read from there one by one.

    `skipped` counts the records that were unusable.
    """

    def __init__(self, content: pa.RecordBatchFileReader, keys: "_Keys") -> None:
        self._content = content
        self._keys = keys
        self.skipped = 0

    def __len__(self) -> int:
        return len(self._keys.queries)

    def __getitem__(self, row: int) -> TrainingExample:
        batch = self._content.get_batch(row // _ROWS)
        return TrainingExample(**batch.slice(row % _ROWS, 1).to_pylist()[0])

    def documents(self) -> Iterator[list[str]]:
        """All documents, a thousand examples at a time."""
        for number in range(self._content.num_record_batches):
            yield self._content.get_batch(number).column("documents").flatten().to_pylist()

    @property
    def document_count(self) -> int:
        """Documents of all examples together."""
        return len(self._keys.documents)

    @property
    def untitled(self) -> int:
        """Documents without a title line, whose article is not known."""
        return self._keys.untitled

    def shared_by(self, others: "Examples") -> int:
        """How many of the `others` have a document of an article that is here, too, or ask the same."""
        documents = _among(others._keys.documents, self._keys.documents)
        queries = _among(others._keys.queries, self._keys.queries)
        return len(np.union1d(_owners(others._keys)[documents], np.flatnonzero(queries)))

    def split(self, fraction: float, seed: int) -> "Split":
        """Hold out about `fraction` of the examples, at least one if there is a way; see `Split`."""
        return _split(self._keys, fraction, seed)


class _Keys:
    """What tells whether two examples are about the same: 64-bit hashes."""

    def __init__(self) -> None:
        self.queries = array("Q")
        """One an example."""
        self.documents = array("Q")
        """Of each document's title, or of its text where it has none."""
        self.ends = array("q")
        """Where each example's documents end in `documents`."""
        self.best = array("Q")
        """Of each example, the document with the highest score; the first one without scores."""
        self.untitled = 0
        """Documents without a title."""


def read_examples(
    files: Sequence[str], folder: Path, *, needs_scores: bool = False, gold: Gold | None = None
) -> Examples:
    """The usable records of `files`; the others are named with file and line, and skipped.

    A right answer of `gold` takes the place of the teacher's.

    Raises `InputError` where a file cannot be read or no record is usable, `UsageError` where no record has
    the scores it needs.
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
                    yield _example(entry.record, gold)
                    continue
                bad += 1
                if bad <= _MESSAGES:
                    log.warning("%s:%s: record %s: %s; skipped", file, entry.line, number, wrong[0])

    examples = store_examples(found(), folder)
    if gold is not None:
        told = log.info if known else log.warning
        told("%s of %s questions have a right answer in --gold", f"{known:,}", f"{len(examples):,}")
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


def _example(record: dict[str, Any], gold: Gold | None) -> tuple[str, TrainingExample]:
    documents = [document_text(document) for document in record["documents"]]
    answer = record["answer"]
    if gold is not None and (right := gold.answers(record["query"])):
        # Of several, the first that a document has: a pointer learns where it stands.
        answer = next((one for one in right if any(occurrences(text, one) for text in documents)), right[0])
    return named(TrainingExample(record["query"], documents, answer, record.get("reranking_scores")))


def named(example: TrainingExample) -> tuple[str, TrainingExample]:
    """An example behind what tells that two ask the same."""
    return "query: " + example.query.strip().lower(), example


def store_examples(found: Iterable[tuple[str, TrainingExample]], folder: Path) -> Examples:
    """Examples, each behind a text: those with an equal one are never on both sides of a split.

    They lie in a file in `folder` that has no name, so that it goes with the process.
    """
    keys = _Keys()
    path = folder / f".examples.{uuid.uuid4().hex}.tmp"  # processes of several machines may write here
    try:
        with (
            track("read", "records", None) as tracker,
            pa.OSFile(str(path), "wb") as sink,
            pa.ipc.new_file(sink, _SCHEMA) as writer,
        ):
            source = iter(found)
            while block := list(itertools.islice(source, _ROWS)):
                for text, example in block:
                    _note(text, example, keys)
                rows = [example._asdict() for _, example in block]
                writer.write_batch(pa.RecordBatch.from_pylist(rows, _SCHEMA))
                tracker.advance(len(block))
        return Examples(pa.ipc.open_file(pa.memory_map(str(path))), keys)
    finally:
        path.unlink(missing_ok=True)


def _note(text: str, example: TrainingExample, keys: _Keys) -> None:
    """Remember what an example is about."""
    titles = [title_of(document) for document in example.documents]
    documents = [_key(title or text) for title, text in zip(titles, example.documents, strict=True)]
    keys.untitled += titles.count("")
    scores = example.scores
    best = max(range(len(documents)), key=scores.__getitem__) if scores else 0
    keys.queries.append(_key(text))
    keys.documents.extend(documents)
    keys.ends.append(len(keys.documents))
    keys.best.append(documents[best])


def _key(text: str) -> int:
    return int.from_bytes(blake2b(text.strip().encode(), digest_size=8).digest(), "big")


class Split(NamedTuple):
    """Rows to train on and rows held out, both rising.

    Examples that share an article, or their question, are on the same side. Where all of them hang together
    that way, those that share their best document's article are, and where even that fails only questions
    are kept apart; `shared` counts the held-out examples of which some document's article is trained on.
    """

    train: np.ndarray
    held_out: np.ndarray
    by: str
    shared: int


def _split(keys: _Keys, fraction: float, seed: int) -> Split:
    count = len(keys.queries)
    everything, nothing = np.arange(count), np.arange(0)
    if not fraction or count < 2:
        return Split(everything, nothing, "nothing", 0)
    queries = np.frombuffer(keys.queries, np.uint64)
    documents = np.frombuffer(keys.documents, np.uint64)
    owners = _owners(keys)
    wanted = min(max(1, round(fraction * count)), count - 1)
    both = np.concatenate([everything, everything])
    attempts = (
        ("article", np.concatenate([everything, owners]), np.concatenate([queries, documents])),
        ("best document", both, np.concatenate([queries, np.frombuffer(keys.best, np.uint64)])),
        ("question", everything, queries),
    )
    for by, rows, values in attempts:
        chosen = _choose(_groups(rows, values, count), wanted, seed)
        if chosen.sum() * 2 >= wanted:
            held_out = np.flatnonzero(chosen)
            of_training = documents[~chosen[owners]]
            leaks = np.isin(documents, of_training) & chosen[owners]
            return Split(np.flatnonzero(~chosen), held_out, by, len(np.unique(owners[leaks])))
    return Split(everything, nothing, "nothing", 0)


def _among(hashes: "array[int]", others: "array[int]") -> np.ndarray:
    """Which of the hashes are among the others."""
    return np.isin(np.frombuffer(hashes, np.uint64), np.frombuffer(others, np.uint64))


def _owners(keys: _Keys) -> np.ndarray:
    """The row that each document belongs to."""
    ends = np.frombuffer(keys.ends, np.int64)
    return np.searchsorted(ends, np.arange(len(keys.documents)), side="right")


def _groups(rows: np.ndarray, values: np.ndarray, count: int) -> np.ndarray:
    """Number of the group of each of `count` rows: those that share a value, directly or by others."""
    _, columns = np.unique(values, return_inverse=True)
    size = count + int(columns.max()) + 1
    graph = coo_array((np.ones(len(rows), np.int8), (rows, columns + count)), shape=(size, size))
    return np.asarray(connected_components(graph, directed=False)[1][:count])


def _choose(groups: np.ndarray, wanted: int, seed: int) -> np.ndarray:
    """Whole groups, by chance, that together have at most `wanted` rows: a mask of rows."""
    names, sizes = np.unique(groups, return_counts=True)
    room, chosen = wanted, []
    for place in np.random.default_rng(seed).permutation(len(names)):
        if sizes[place] <= room:
            chosen.append(names[place])
            room -= sizes[place]
        if not room:
            break
    return np.isin(groups, chosen)


class Subset(NamedTuple):
    """Examples to train on, or those held out."""

    examples: Examples
    rows: Sequence[int]


class Parts(NamedTuple):
    """What a run trains on and what it holds out, if anything."""

    train: Subset
    held_out: Subset | None
    shared: int
    """Held-out examples of which some article is trained on."""


def load_parts(config: TrainConfig, folder: Path) -> Parts:
    """The training data as examples, which lie in `folder` while the process lives."""
    gold = read_gold(config.gold, "--gold") if config.gold else None
    read = functools.partial(read_examples, folder=folder, needs_scores=config.enable_reranking, gold=gold)
    examples = read(config.train_data)
    if config.eval_data:
        held = read(config.eval_data)
        shared = examples.shared_by(held)
        return Parts(Subset(examples, range(len(examples))), Subset(held, range(len(held))), shared)
    return split_parts(examples, config)


def split_parts(examples: Examples, config: StudentConfig) -> Parts:
    """Hold out `config.eval_fraction` of the examples."""
    split = examples.split(config.eval_fraction, config.seed)
    if config.eval_fraction and not len(split.held_out):
        log.warning("nothing is held out: all records ask the same question")
    if examples.untitled:
        log.warning(
            "%s of %s documents have no title line: which are of one article is not known, and held-out "
            "examples may share theirs with training",
            *(f"{examples.untitled:,}", f"{examples.document_count:,}"),
        )
    if split.shared:
        log.warning(
            "held out by %s: %s of %s held-out records share an article with training (nearly all records "
            "hang together by their articles)",
            *(split.by, f"{split.shared:,}", f"{len(split.held_out):,}"),
        )
    held_part = Subset(examples, split.held_out.tolist()) if len(split.held_out) else None
    return Parts(Subset(examples, split.train.tolist()), held_part, split.shared)


def training_order(rows: np.ndarray, examples: int, seed: int) -> np.ndarray:
    """The rows as training sees them, `examples` in all: pass after pass, each in an order of its own."""
    passes = [
        np.random.default_rng([seed, number]).permutation(rows) for number in range(-(-examples // len(rows)))
    ]
    return np.concatenate(passes)[:examples]


def shares(order: np.ndarray, batch_size: int, rank: int, ranks: int) -> list[list[int]]:
    """For each step the rows that process `rank` of `ranks` takes; of a last, smaller step it may be none."""
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    return [batch[rank::ranks].tolist() for batch in batches]


class Lengths(NamedTuple):
    """Of documents, in tokens."""

    number: int
    """How many documents there are."""
    longest: int
    most: int
    """What 99 of 100 do not exceed."""
    cut: int
    """How many exceed the limit."""


def measure_documents(examples: Sequence[Examples], tokenizer: Any, limit: int) -> Lengths:
    """Lengths by the compressor's `tokenizer`; documents above `limit` are cut, 0 is no limit."""
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
