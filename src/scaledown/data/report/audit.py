"""Audit of training data: one pass over the file, and detailed checks of a sample of its records.

Nothing but counts, hashes and the sample is held: a million records need a few hundred megabytes.
"""

import collections
import random
import re
from array import array
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np

from scaledown.data.input.gold import Gold
from scaledown.data.input.training_files import entries, problems
from scaledown.data.teacher.review import answer_problem, content_words, groundedness
from scaledown.errors import InputError
from scaledown.metrics import accuracy
from scaledown.records import document_text
from scaledown.report.page import MarkedText
from scaledown.run.progress import track
from scaledown.text import question_key, text_hash

SAMPLE: Final = 20_000
SHOWN_EXAMPLES: Final = 200  # examples to browse, those with problems first
_SHOWN_OF_A_PROBLEM: Final = 15
_TOP: Final = 20
_MESSAGES: Final = 5
_SAMPLE_CHARACTERS: Final = 200_000_000
UNGROUNDED: Final = 0.5  # content words of an answer that its documents must have, to be called grounded


class Spread(NamedTuple):
    """Statistics of lengths, in words."""

    name: str
    """`queries`, `documents` or `answers`."""
    least: int
    """The minimum."""
    low: float
    """The 5th percentile."""
    median: float
    high: float
    """The 95th percentile."""
    most: int
    """The maximum."""
    counts: list[int]
    """The values of a histogram."""
    edges: list[float]
    """Edges of a histogram up to the 99th percentile; one more than counts."""


class Looked(NamedTuple):
    """A record of the sample, and the findings about it."""

    record: dict[str, Any]
    """The record, with documents as strings."""
    tags: tuple[str, ...]
    """The names of the findings, for example `truncated`."""
    right: tuple[str, ...]
    """Right answers; empty if they are not known."""


class Frequent(NamedTuple):
    """A document that occurs in the records of many queries."""

    queries: int
    """Number of records with it."""
    text: str
    """Empty if no record of the sample has it."""


class Audit(NamedTuple):
    """The findings about a file of training data. `places` count from 1; 0 means nowhere."""

    path: Path
    """The file."""
    records: int
    """Number of valid records, also those with an empty answer."""
    bad: int
    """Number of unusable records."""
    messages: list[str]
    """Reasons and line numbers of the first unusable records."""
    repeated_queries: int
    """Records whose query an earlier one has."""
    documents: int
    """Number of documents in all records."""
    different_documents: int
    """The same, without repeated ones."""
    frequent: list[Frequent]
    """The documents in the most records."""
    sampled: int
    """Number of records in the sample."""
    spreads: list[Spread]
    """Lengths of queries, documents and answers in the sample."""
    tags: dict[str, int]
    """Number of records of the sample with each tag."""
    scores: list[list[float]]
    """Reranking scores in the sample, by place of the document."""
    gold_places: list[int]
    """For each record of the sample with known answers, the first document that holds one."""
    answer_places: list[int]
    """For each record of the sample, the first document that has all content words of its answer."""
    finish_known: bool
    """Whether the file says which answers were cut at their limit."""
    shown: list[Looked]
    """Examples to browse, those with findings first."""


def audit(path: Path, gold: Gold | None = None, *, sample: int = SAMPLE, seed: int = 0) -> Audit:
    """Check the records of a training file.

    Args:
        path: The file.
        gold: Right answers, if they are known.
        sample: The most records that are checked in detail; a smaller number if they are long.
        seed: Draws the sample.

    Raises:
        InputError: The file has no valid record, or cannot be read.
    """
    chosen: list[dict[str, Any]] = []
    draw = random.Random(seed)  # noqa: S311 (no secret)
    queries, documents = array("Q"), array("Q")
    bad = total = size = 0
    messages: list[str] = []
    with track("audit", "records", None) as tracker:
        for entry in entries(path):
            tracker.advance(1)
            wrong = [entry.problem] if entry.problem else problems(entry.record)
            if wrong and wrong != ["answer is empty"]:  # the report shows empty answers
                bad += 1
                if len(messages) < _MESSAGES:
                    messages.append(f"line {entry.line}: {wrong[0]}")
                continue
            record = entry.record | {"documents": [document_text(one) for one in entry.record["documents"]]}
            if len(queries) < sample:
                chosen.append(record)
                size += _characters(record)
            elif (place := draw.randrange(len(queries) + 1)) < sample:
                size += _characters(record) - _characters(chosen[place])
                chosen[place] = record
            if size > _SAMPLE_CHARACTERS and len(chosen) > 1:  # a smaller sample is still random
                sample = (len(chosen) + 1) // 2
                chosen = draw.sample(chosen, sample)
                size = sum(map(_characters, chosen))
            queries.append(text_hash(question_key(record["query"])))
            total += len(record["documents"])
            documents.extend({text_hash(text) for text in record["documents"]})
    if not queries:
        raise InputError(f"{path}: holds no valid record; `scaledown validate {path}` says why")
    looked = [_look(record, gold) for record in chosen]
    counts = np.unique(np.frombuffer(documents, np.uint64), return_counts=True)
    return Audit(
        path=path,
        records=len(queries),
        bad=bad,
        messages=messages,
        repeated_queries=len(queries) - len(np.unique(np.frombuffer(queries, np.uint64))),
        documents=total,
        different_documents=len(counts[0]),
        frequent=_frequent(*counts, chosen),
        sampled=len(chosen),
        spreads=_spreads(chosen),
        tags=dict(collections.Counter(tag for one in looked for tag in one.tags).most_common()),
        scores=_by_place(chosen),
        gold_places=[_gold_place(one) for one in looked if one.right],
        answer_places=[_answer_place(one.record) for one in looked],
        finish_known=any("finish_reason" in record for record in chosen),
        shown=_examples_to_show(looked),
    )


def _characters(record: dict[str, Any]) -> int:
    return len(record["query"]) + len(record["answer"]) + sum(map(len, record["documents"]))


def _look(record: dict[str, Any], gold: Gold | None) -> Looked:
    answer, documents = record["answer"], record["documents"]
    right = gold.answers(record["query"]) if gold else ()
    tags = [answer_problem(answer, record["query"])]
    if record.get("finish_reason") == "length":
        tags.append("truncated")
    if groundedness(answer, documents) < UNGROUNDED:
        tags.append("ungrounded")
    if len(set(documents)) < len(documents):
        tags.append("document twice")
    if right:
        tags.append("right" if accuracy(answer, right) else "wrong")
        if not any(accuracy(document, right) for document in documents):
            tags.append("right answer in no document")
    return Looked(record, tuple(filter(None, tags)), right)


def _gold_place(looked: Looked) -> int:
    return _first_hit(accuracy(document, looked.right) for document in looked.record["documents"])


def _answer_place(record: dict[str, Any]) -> int:
    words = set(content_words(record["answer"]))
    return _first_hit(bool(words) and words <= set(content_words(one)) for one in record["documents"])


def _first_hit(found: Iterable[float]) -> int:
    return next((place for place, value in enumerate(found, 1) if value), 0)


def recall_by_depth(places: Sequence[int], depth: int) -> list[float]:
    """Compute R@1 to R@depth: the share of queries whose first k documents contain a right answer.

    Args:
        places: For each query, the place of the first document with a right answer, from 1; 0 for none.
        depth: The largest k.

    Returns:
        [depth], 0 to 1.
    """
    found = np.asarray(places)
    return [float(((found > 0) & (found <= k)).mean()) for k in range(1, depth + 1)]


def _spreads(records: Sequence[dict[str, Any]]) -> list[Spread]:
    words = {
        "queries": [len(record["query"].split()) for record in records],
        "documents": [len(text.split()) for record in records for text in record["documents"]],
        "answers": [len(record["answer"].split()) for record in records],
    }
    return [_spread(name, np.asarray(lengths)) for name, lengths in words.items()]


def _spread(name: str, lengths: np.ndarray) -> Spread:
    low, median, high, end = np.percentile(lengths, [5, 50, 95, 99])
    bins = int(min(24, max(1, end - lengths.min())))
    counts, edges = np.histogram(lengths, bins=bins, range=(lengths.min(), max(end, lengths.min() + 1)))
    return Spread(
        name,
        int(lengths.min()),
        float(low),
        float(median),
        float(high),
        int(lengths.max()),
        counts.tolist(),
        edges.tolist(),
    )


def _by_place(records: Sequence[dict[str, Any]]) -> list[list[float]]:
    places: list[list[float]] = []
    for record in records:
        for place, score in enumerate(record.get("reranking_scores") or ()):
            if place == len(places):
                places.append([])
            places[place].append(float(score))
    return places


def _frequent(hashes: np.ndarray, counts: np.ndarray, records: Sequence[dict[str, Any]]) -> list[Frequent]:
    """Return the documents that occur with the most queries, and with more than one."""
    order = np.lexsort((hashes, -counts.astype(np.int64)))[:_TOP]
    wanted = {int(hashes[place]): int(counts[place]) for place in order if counts[place] > 1}
    texts: dict[int, str] = {}
    for text in (text for record in records for text in record["documents"]):
        if wanted.keys() <= texts.keys():
            break
        if (key := text_hash(text)) in wanted:
            texts[key] = text
    return [Frequent(count, texts.get(key, "")) for key, count in wanted.items()]


def _examples_to_show(looked: Sequence[Looked]) -> list[Looked]:
    """Choose examples to show: first some with each tag, then any others."""
    of_tag: collections.Counter[str] = collections.Counter()
    chosen: dict[int, None] = {}
    for number, one in enumerate(looked):
        if len(chosen) < SHOWN_EXAMPLES and any(of_tag[tag] < _SHOWN_OF_A_PROBLEM for tag in one.tags):
            chosen[number] = None
            of_tag.update(one.tags)
    for number in range(len(looked)):
        if len(chosen) >= SHOWN_EXAMPLES:
            break
        chosen.setdefault(number)
    return [looked[number] for number in chosen]


def marked(text: str, phrases: Sequence[str], words: Iterable[str]) -> list[MarkedText]:
    """Split a text into marked and other parts.

    Args:
        text: The text.
        phrases: Phrases to mark, in any case.
        words: Words to mark, in any case, if no phrase occurs.

    Returns:
        The parts, which together are the text.
    """
    for wanted in (sorted(filter(None, phrases), key=len, reverse=True), sorted(set(words))):
        if wanted:
            pattern = re.compile(f"({'|'.join(map(_bounded, wanted))})", re.IGNORECASE)
            parts = [
                MarkedText(part, place % 2 == 1) for place, part in enumerate(pattern.split(text)) if part
            ]
            if any(part.marked for part in parts):
                return parts
    return [MarkedText(text, marked=False)]


def _bounded(phrase: str) -> str:
    """Return a pattern for whole words; Chinese and Japanese have no spaces between words."""
    unspaced = re.compile(r"[\u3040-\u30ff\u4e00-\u9fff]")
    before = "" if unspaced.match(phrase) else r"(?<!\w)"
    after = "" if unspaced.match(phrase[-1:]) else r"(?!\w)"
    return f"{before}{re.escape(phrase)}{after}"
