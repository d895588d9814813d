"""Holds out records of training data by article: inside a training, and in files by `scaledown split`."""

import filecmp
import logging
from array import array
from collections.abc import Collection, Iterator, Mapping, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from scaledown.data.input.training_files import output_format, sound_records
from scaledown.data.output.columns import columns_of_files
from scaledown.data.output.writers import write_examples
from scaledown.errors import OutputError, UsageError
from scaledown.records import title_of
from scaledown.run.atomic import atomic_folder
from scaledown.run.outputs import check_folder

TRAIN: Final = "train"
HELD_OUT: Final = "held_out"
MOST: Final = 1_000
"""Held-out records unless a fraction is given: enough for intervals of 3 points."""

log = logging.getLogger("scaledown")


class Keys:
    """64-bit hashes of questions and articles, to find records about the same thing."""

    def __init__(self) -> None:
        self.questions = array("Q")
        """The question's hash, for each record."""
        self.documents = array("Q")
        """For each document, the hash of its title, or of its text if it has no title."""
        self.ends = array("q")
        """For each record, the end of its documents in `documents`."""
        self.best = array("Q")
        """For each record, the hash of the document with the highest score; without scores, of the first."""
        self.untitled = 0
        """Documents without a title: their articles are not known."""

    def add(self, name: str, documents: Sequence[str], scores: Sequence[float] | None) -> None:
        """Add a record.

        Args:
            name: The result of `question`, equal for records that ask the same question.
            documents: Texts, at least one; a title is on the first line.
            scores: The relevance of each document, if known.
        """
        titles = [title_of(document) for document in documents]
        own = [key(title or text) for title, text in zip(titles, documents, strict=True)]
        self.untitled += titles.count("")
        self.questions.append(key(name))
        self.documents.extend(own)
        self.ends.append(len(self.documents))
        self.best.append(own[max(range(len(own)), key=scores.__getitem__) if scores else 0])

    def shared_by(self, others: "Keys") -> int:
        """Count the records of `others` that share an article or the question with a record here."""
        documents = _among(others.documents, self.documents)
        questions = _among(others.questions, self.questions)
        return len(np.union1d(_owners(others)[documents], np.flatnonzero(questions)))


def question(text: str) -> str:
    """Return the name of a question: case and spaces at its ends do not count."""
    return "query: " + text.strip().lower()


def key(text: str) -> int:
    """Return a hash of 64 bits; spaces at the ends do not count."""
    return int.from_bytes(blake2b(text.strip().encode(), digest_size=8).digest(), "big")


class Split(NamedTuple):
    """Rows to train on and rows held out.

    Examples that share an article or the question are on the same side. If this connects nearly all examples,
    only those that share the article of their best document, or the question, are kept together; if this
    fails too, only those that share the question.
    """

    train: np.ndarray
    """[examples to train on] int64, ascending."""
    held_out: np.ndarray
    """[held-out examples] int64, ascending; empty if the examples cannot be split."""
    by: str
    """What examples on the same side share: `article`, `best document` or `question`; `nothing` without a
    split."""
    shared: int
    """Number of held-out examples that share an article with the training rows."""


def split(keys: Keys, fraction: float, seed: int) -> Split:
    """Hold out about a fraction of the records, at least one if possible.

    Args:
        keys: The hashes of all records.
        fraction: Share of the records to hold out, 0 to 1. 0 holds out nothing.
        seed: Decides which records are held out.

    Returns:
        The rows of both sides. Nothing is held out if fewer than half of the wanted records can be.
    """
    count = len(keys.questions)
    everything, nothing = np.arange(count), np.arange(0)
    if not fraction or count < 2:
        return Split(everything, nothing, "nothing", 0)
    questions = np.frombuffer(keys.questions, np.uint64)
    documents = np.frombuffer(keys.documents, np.uint64)
    owners = _owners(keys)
    wanted = min(max(1, round(fraction * count)), count - 1)
    both = np.concatenate([everything, everything])
    attempts = (
        ("article", np.concatenate([everything, owners]), np.concatenate([questions, documents])),
        ("best document", both, np.concatenate([questions, np.frombuffer(keys.best, np.uint64)])),
        ("question", everything, questions),
    )
    for by, rows, values in attempts:
        chosen = _choose(_group_of_rows(rows, values, count), wanted, seed)
        if chosen.sum() * 2 >= wanted:
            held_out = np.flatnonzero(chosen)
            of_training = documents[~chosen[owners]]
            leaks = np.isin(documents, of_training) & chosen[owners]
            return Split(np.flatnonzero(~chosen), held_out, by, len(np.unique(owners[leaks])))
    return Split(everything, nothing, "nothing", 0)


def split_files(
    files: Sequence[Path], output: Path, *, fraction: float | None, seed: int, overwrite: bool = False
) -> Split:
    """Write the records of training files to `train` and `held_out` in a folder, which appears in one step.

    Args:
        files: Training files. The first one decides the format.
        output: The folder.
        fraction: The share of the records to hold out; None is a tenth, but at most `MOST` records.
        seed: Decides which.
        overwrite: Replace an earlier split.

    Returns:
        The rows of both parts.

    Raises:
        InputError: A record is not sound.
        UsageError: The records cannot be split.
        OutputError: The folder cannot be written, or has another split and `overwrite` is off.
    """
    names = [f"{part}{files[0].suffix}" for part in (TRAIN, HELD_OUT)]
    made = output.is_dir() and sorted(path.name for path in output.iterdir()) == sorted(names)
    check_folder(output, files, made=made)
    keys = Keys()
    for record in sound_records(files):
        keys.add(question(record["query"]), record["documents"], record.get("reranking_scores"))
    if keys.untitled:
        log.warning(
            "%s of %s documents have no title line: their articles are not known, and may be in both parts",
            *(f"{keys.untitled:,}", f"{len(keys.documents):,}"),
        )
    number = len(keys.questions)
    parts = split(keys, fraction or min(0.1, MOST / max(1, number)), seed)
    if not len(parts.held_out):
        raise UsageError(
            f"the {number:,} records cannot be split: records with one question stay together, and each "
            "question has more of them than the part to hold out: give a larger --fraction, or more records"
        )
    columns = columns_of_files(files) if output_format(Path(names[0])).needs_columns else None
    with atomic_folder(output) as folder:
        folder.mkdir()
        for name, rows in zip(names, (parts.train, parts.held_out), strict=True):
            write_examples(folder / name, _chosen_records(files, set(rows.tolist())), columns)
        same = made and all(filecmp.cmp(folder / name, output / name, shallow=False) for name in names)
        if made and not same and not overwrite:
            raise OutputError(
                f"--output_dir {output} has another split: name a new folder, or give --overwrite"
            )
    return parts


def _chosen_records(files: Sequence[Path], rows: Collection[int]) -> Iterator[Mapping[str, Any]]:
    return (record for row, record in enumerate(sound_records(files)) if row in rows)


def _among(hashes: "array[int]", others: "array[int]") -> np.ndarray:
    """Return a mask of the hashes that are among the others."""
    return np.isin(np.frombuffer(hashes, np.uint64), np.frombuffer(others, np.uint64))


def _owners(keys: Keys) -> np.ndarray:
    """Return the row of each document."""
    ends = np.frombuffer(keys.ends, np.int64)
    return np.searchsorted(ends, np.arange(len(keys.documents)), side="right")


def _group_of_rows(rows: np.ndarray, values: np.ndarray, count: int) -> np.ndarray:
    """Return the group of each of `count` rows.

    Rows that share a value, directly or indirectly, are a group.
    """
    _, columns = np.unique(values, return_inverse=True)
    size = count + int(columns.max()) + 1
    graph = coo_array((np.ones(len(rows), np.int8), (rows, columns + count)), shape=(size, size))
    return np.asarray(connected_components(graph, directed=False)[1][:count])


def _choose(groups: np.ndarray, wanted: int, seed: int) -> np.ndarray:
    """Choose random whole groups of at most `wanted` rows together. Returns a mask of rows."""
    names, sizes = np.unique(groups, return_counts=True)
    room, chosen = wanted, []
    for place in np.random.default_rng(seed).permutation(len(names)):
        if sizes[place] <= room:
            chosen.append(names[place])
            room -= sizes[place]
        if not room:
            break
    return np.isin(groups, chosen)
