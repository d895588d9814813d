"""The rankings of a run as TREC runs: `qid Q0 docid rank score tag`, with tabs."""

import logging
from pathlib import Path
from typing import Final

from scaledown.atomic import atomic, check_writable
from scaledown.data.corpus import PassageTable
from scaledown.data.manifest import manifest_of
from scaledown.data.reordering import finished_stages
from scaledown.data.seen import Ids, one_word
from scaledown.errors import InputError
from scaledown.stage import Stage
from scaledown.storage import Storage

log = logging.getLogger("scaledown")

_TAG: Final = "scaledown"


def export_trec(data: Path, output: Path) -> dict[str, int]:
    """Write `retrieved.run` and, if the run reranked, `reranked.run` to the folder `output`; lines of each.

    `data` is what the run made. Raises `InputError` where its run directory is gone.
    """
    manifest, work = manifest_of(data) or ({}, Storage(data.parent))
    written = {}
    for name, column, file in (
        ("candidates", "scores", "retrieved"),
        ("ranked", "reranking_scores", "reranked"),
    ):
        stages = finished_stages(manifest, work, (name, "passages"))
        if stages is None:
            continue
        path = output / f"{file}.run"
        check_writable(path)
        written[str(path)] = _write(path, stages[0], PassageTable(stages[1]), column)
    if not written:
        raise InputError(
            f"{data}: its run directory is not there, which has the rankings; name the run's output"
        )
    return written


def _write(path: Path, stage: Stage, passages: PassageTable, column: str) -> int:
    lines = 0
    queries, again = Ids(), 0
    with atomic(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        for table in stage.tables():
            for record in table.to_pylist():
                query = one_word(queries.own(record["query_id"]))
                places = [one_word(passages[row].passage_id) for row in record["rows"]]
                if len(set(places)) < len(places):
                    found = Ids()
                    places = [found.own(place) for place in places]
                    again += found.renamed
                for rank, (place, score) in enumerate(zip(places, record[column], strict=True), 1):
                    fields = (query, "Q0", place, str(rank), f"{score:.9g}", _TAG)
                    file.write("\t".join(fields) + "\n")
                    lines += 1
    if renamed := queries.renamed + again:
        log.warning("%s: %s ids of queries or passages come again: told apart by #2, #3 …", path, renamed)
    return lines
