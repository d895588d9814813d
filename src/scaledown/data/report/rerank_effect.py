"""What reranking changed in a run, from its stages `candidates` and `ranked`."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple

from scaledown.data.input.corpus import PassageTable
from scaledown.data.input.gold import Gold
from scaledown.data.retrieval.parts import open_stage
from scaledown.errors import RunDirectoryError
from scaledown.metrics import accuracy
from scaledown.records import full_text
from scaledown.run.directory import RunDirectory
from scaledown.run.locations import storage_at
from scaledown.run.stage import Stage
from scaledown.run.storage import Storage

MOST_QUERIES: Final = 2_000  # the most queries that are read


class Reordering(NamedTuple):
    """Effects of reranking on the first queries of a run. Places count from 1; lists are indexed by place."""

    queries: int
    """Number of queries."""
    firsts: list[int]
    """For each place, how often the passage that is now first was there before reranking."""
    before: list[float]
    """Mean reranking score at each place in the retriever's order."""
    after: list[float]
    """The same in the reranker's order."""
    gold_before: list[int]
    """For each query with known answers, the place of the first passage with an answer; 0 means nowhere."""
    gold_after: list[int]
    """The same after reranking."""


def reordering(manifest: Mapping[str, Any], work: Storage, gold: Gold | None = None) -> Reordering | None:
    """Compute what reranking changed in a run.

    Args:
        manifest: The manifest of the run.
        work: The run directory.
        gold: Right answers, if they are known.

    Returns:
        The changes; None if the run has no reranker, or its stages are deleted.
    """
    stages = finished_stages(manifest, work, ("candidates", "ranked", "passages"))
    if stages is None:
        return None
    candidates, ranked, passages = stages
    texts = PassageTable(passages)
    firsts: list[int] = []
    before: list[float] = []
    after: list[float] = []
    golds: tuple[list[int], list[int]] = ([], [])
    there: list[int] = []
    queries = 0
    for old, new in _pairs(candidates, ranked):
        scores = dict(zip(new["rows"], new["reranking_scores"], strict=True))
        for sums in (before, after, firsts, there):
            sums.extend([0] * (len(scores) - len(sums)))
        for sums, order in ((before, old["rows"]), (after, new["rows"])):
            for place, row in enumerate(order):
                sums[place] += scores[row]
        for place in range(len(scores)):
            there[place] += 1
        if new["rows"]:
            firsts[old["rows"].index(new["rows"][0])] += 1
        right = gold.answers(new["query"]) if gold else ()
        if right:
            for found, order in zip(golds, (old["rows"], new["rows"]), strict=True):
                found.append(_first_right(order, texts, right))
        queries += 1
    mean_before, mean_after = (
        [total / count for total, count in zip(sums, there, strict=True)] for sums in (before, after)
    )
    return Reordering(queries, firsts, mean_before, mean_after, *golds)


def _first_right(rows: list[int], texts: PassageTable, right: tuple[str, ...]) -> int:
    for place, row in enumerate(rows, 1):
        passage = texts[row]
        if accuracy(full_text(passage.title, passage.text), right):
            return place
    return 0


def finished_stages(manifest: Mapping[str, Any], work: Storage, names: Sequence[str]) -> list[Stage] | None:
    """Open stages of a finished run.

    Args:
        manifest: The manifest of the run.
        work: The run directory.
        names: The names of the stages.

    Returns:
        The stages, in the order of `names`; None if one of them does not exist.
    """
    recorded = manifest.get("stages") or {}
    parameters = manifest.get("parameters") or {}
    index, cache = parameters.get("index_dir"), parameters.get("cache_dir") or ""
    found = []
    for name in names:
        home = storage_at(index, cache) if index and name == "passages" else work
        if name not in recorded or not home.exists(
            home.root / name / str(recorded[name].get("fingerprint")) / "done.json"
        ):
            return None
        try:
            stage = open_stage(RunDirectory(home), name, recorded[name]["settings"])
        except RunDirectoryError:
            return None
        if stage.fingerprint != recorded[name]["fingerprint"] or stage.done() is None:
            return None
        found.append(stage)
    return found


def _pairs(candidates: Stage, ranked: Stage) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    number = 0
    for old, new in zip(candidates.tables(), ranked.tables(), strict=True):
        for pair in zip(old.to_pylist(), new.to_pylist(), strict=True):
            yield pair
            number += 1
            if number == MOST_QUERIES:
                return
