"""Exports the rankings of a run as TREC runs: `qid Q0 docid rank score tag`, separated by tabs."""

import logging
from pathlib import Path
from typing import Final

from scaledown.data.input.corpus import PassageTable
from scaledown.data.input.seen import UniqueIds, one_word
from scaledown.data.manifest import manifest_of
from scaledown.data.report.rerank_effect import finished_stages
from scaledown.errors import InputError
from scaledown.run.atomic import atomic
from scaledown.run.outputs import check_output, note_made
from scaledown.run.stage import Stage
from scaledown.run.storage import Storage

log = logging.getLogger("scaledown")

_TAG: Final = "scaledown"


def export_trec(data: Path, output: Path, *, overwrite: bool = False) -> dict[str, int]:
    """Write `retrieved.run` and, if the run reranked, `reranked.run`.

    Args:
        data: The output of the run.
        output: The folder.
        overwrite: Whether to replace files that no export made.

    Returns:
        The number of lines of each file, by its path.

    Raises:
        InputError: The run directory is missing.
        OutputError: There is a file that no export made.
    """
    manifest, work = manifest_of(data) or ({}, Storage(data.parent))
    found = {}
    for name, column, file in (
        ("candidates", "scores", "retrieved"),
        ("ranked", "reranking_scores", "reranked"),
    ):
        stages = finished_stages(manifest, work, (name, "passages"))
        if stages is None:
            continue
        path = output / f"{file}.run"
        check_output("--output_dir", path, [data, work.root], made="export", overwrite=overwrite)
        found[path] = stages, column
    if not found:
        raise InputError(
            f"{data}: its run directory, which has the rankings, is missing: give the output of a run"
        )
    written = {}
    for path, (stages, column) in found.items():
        written[str(path)] = _write_rows(path, stages[0], PassageTable(stages[1]), column)
        note_made(path, "export")
    return written


def _write_rows(path: Path, stage: Stage, passages: PassageTable, column: str) -> int:
    lines = 0
    queries, again = UniqueIds(), 0
    with atomic(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        for table in stage.tables():
            for record in table.to_pylist():
                query = one_word(queries.own(record["query_id"]))
                places = [one_word(passages[row].passage_id) for row in record["rows"]]
                if len(set(places)) < len(places):
                    found = UniqueIds()
                    places = [found.own(place) for place in places]
                    again += found.renamed
                for rank, (place, score) in enumerate(zip(places, record[column], strict=True), 1):
                    fields = (query, "Q0", place, str(rank), f"{score:.9g}", _TAG)
                    file.write("\t".join(fields) + "\n")
                    lines += 1
    if renamed := queries.renamed + again:
        log.warning("%s: %s repeated ids of queries or passages: made unique by #2, #3 …", path, renamed)
    return lines
