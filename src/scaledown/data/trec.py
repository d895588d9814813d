"""The rankings of a run as TREC runs: `qid Q0 docid rank score tag`, with tabs."""

from pathlib import Path
from typing import Final

from scaledown.atomic import atomic
from scaledown.data.corpus import PassageTable
from scaledown.data.manifest import manifest_of
from scaledown.data.reordering import finished_stages
from scaledown.errors import InputError
from scaledown.outputs import check_output, note_made
from scaledown.stage import Stage
from scaledown.storage import Storage

_TAG: Final = "scaledown"


def export_trec(data: Path, output: Path, *, overwrite: bool = False) -> dict[str, int]:
    """Write `retrieved.run` and, if the run reranked, `reranked.run` to the folder `output`; lines of each.

    `data` is what the run made. Raises `InputError` where its run directory is gone, `OutputError` where
    something is that no export made, unless `overwrite` allows.
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
            f"{data}: its run directory is not there, which has the rankings; name the run's output"
        )
    written = {}
    for path, (stages, column) in found.items():
        written[str(path)] = _write(path, stages[0], PassageTable(stages[1]), column)
        note_made(path, "export")
    return written


def _write(path: Path, stage: Stage, passages: PassageTable, column: str) -> int:
    lines = 0
    with atomic(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        for table in stage.tables():
            for record in table.to_pylist():
                for rank, (row, score) in enumerate(zip(record["rows"], record[column], strict=True), 1):
                    place = _plain(passages[row].passage_id)
                    fields = (_plain(record["query_id"]), "Q0", place, str(rank), f"{score:.9g}", _TAG)
                    file.write("\t".join(fields) + "\n")
                    lines += 1
    return lines


def _plain(name: str) -> str:
    """Without white space, which parts the columns."""
    return "_".join(name.split()) or "_"
