"""The result of a run: output, manifest, report; and how a later call of the same command finds it."""

import logging
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

from scaledown.data.input.training_files import validate
from scaledown.data.manifest import write_manifest
from scaledown.data.report.page import write_report
from scaledown.data.session.enter import Session
from scaledown.data.session.summary import PrepareResult
from scaledown.errors import OutputError
from scaledown.records import Example
from scaledown.run.directory import RunDirectory
from scaledown.run.locations import File, output_of
from scaledown.run.outputs import check_free
from scaledown.run.progress import counted
from scaledown.run.stage import StageResult

log = logging.getLogger("scaledown")


def earlier_or_free(session: Session, *, overwrite: bool) -> PrepareResult | None:
    """Return the result of an earlier run if it is finished; otherwise check that the output may be written.

    Args:
        session: The run.
        overwrite: Replace any present file.

    Returns:
        The earlier result; None if there is work to do.

    Raises:
        OutputError: The present file was not made by a run of this directory, or was changed after it.
    """
    if session.worker:
        return None
    output = output_of(session.given)
    if finished := earlier_result(session.run, session.request, output):
        return finished
    check_free("--output_file", output, lambda: is_ours(session.run, output), overwrite=overwrite)
    _check_replacing(session, output, overwrite=overwrite)
    return None


def _check_replacing(session: Session, output: File, *, overwrite: bool) -> None:
    """Log that the finished output of another run in this directory is going to be replaced.

    Raises `OutputError` if it was changed after that run wrote it.
    """
    run = session.run
    manifest = run.storage.read_json(run.manifest)
    written = manifest.get("output") if isinstance(manifest, dict) else None
    if not isinstance(written, dict) or manifest.get("request") == session.request:
        return
    state = output.storage.state(output.path)
    if not state or output.storage.address(output.path) != written["path"]:
        return
    changed = state != written.get("state") and _output_hash(run, output) != written.get("sha256")
    if changed and not state.startswith("0 ") and not overwrite:  # an empty file may be replaced
        raise OutputError(
            f"--output_file {output} was changed after a run with other settings wrote it: name another, or "
            "give --overwrite to replace it"
        )
    if not changed:
        log.warning(
            "%s has %s of a run with other settings, inputs or models: this run replaces it; what that run "
            "made stays in %s, so that its command, with its inputs, writes it again",
            *(output, counted(written["examples"], "examples"), run.storage.shown(run.path)),
        )


def part_result(session: Session) -> PrepareResult | None:
    """Return the result of a part or a worker; None if the run has all shards and can be exported."""
    path = output_of(session.given).path
    if session.worker:
        return PrepareResult(path, 0, {}, 0)
    last = next(reversed(session.stages.values()))
    missing = 0 if last.done() else last.missing()
    if not missing:
        return None
    done = {name: result for name, stage in session.stages.items() if (result := stage.done())}
    return PrepareResult(
        path, 0, done, quarantined(done), given_up=session.given_up(own=True), missing=missing
    )


def write_output(
    session: Session, records: Iterable[Example], write: Callable[[Path, Iterable[Example]], int]
) -> PrepareResult:
    """Write the training data, then the manifest and the report, unless another process has just done so.

    Args:
        session: The run, with all stages finished.
        records: The training records.
        write: Writes records to a path, and returns their number.

    Raises:
        OutputError: The output cannot be written.
    """
    output, run = output_of(session.given), session.run
    stages, given_up = session.stages, session.given_up()
    results = {name: stage.finished() for name, stage in stages.items()}
    with stages["answers"].lease("export", wait=True):
        if finished := earlier_result(run, session.request, output):
            return finished
        _remove_half_written(output.path)
        numbers: set[int] = set()
        count = write(output.path, _measured(records, numbers))
        documents = sorted({min(numbers), max(numbers)}) if numbers else []
        output.storage.publish(output.path)
        written = {
            "path": output.storage.address(output.path),
            "examples": count,
            "documents": documents,
            "sha256": run.content_hash(output.path),
            "state": output.storage.state(output.path),
        }
        made = {name: (stage, results[name]) for name, stage in stages.items()}
        write_manifest(
            *(run, session.given, session.sources, session.request, session.identities, session.inputs),
            *(made, written),
        )
        report_of(run, output)
    return PrepareResult(
        output.path, count, results, quarantined(results), given_up=given_up, documents=documents
    )


def _measured(records: Iterable[Example], numbers: set[int]) -> Iterator[Example]:
    """Yield the records unchanged; their numbers of documents are added to `numbers`."""
    for record in records:
        numbers.add(len(record["documents"]))
        yield record


def _remove_half_written(output: Path) -> None:
    """Remove temporary files of a process that was killed while it wrote the output."""
    target = output.resolve()
    for path in target.parent.glob(f".{target.name}.*.tmp"):
        path.unlink(missing_ok=True)


def report_of(run: RunDirectory, output: File) -> None:
    """Write the run's page and card. The data is complete: an error here does not fail the run."""
    try:
        output.storage.fetch(output.path)
        write_report(output.path, run.report, run.card, work=run.storage)
        for path in (run.report, run.card):
            run.storage.publish(path)
    except Exception as error:  # no error of the report may fail the run
        log.debug("the report failed", exc_info=True)
        log.warning("no report (%s); `scaledown report %s` tries again", error, shlex.quote(str(output.path)))


def earlier_result(run: RunDirectory, request: str, output: File) -> PrepareResult | None:
    """Find the result of an earlier run with the same settings, models and inputs.

    Args:
        run: The run directory.
        request: The fingerprint of settings, models and inputs.
        output: The training data.

    Returns:
        The result; None if there is none, its output is missing or damaged, or shards were given up.
    """
    manifest = run.storage.read_json(run.manifest)
    if not isinstance(manifest, dict) or manifest.get("request") != request:
        return None
    if not (state := output.storage.state(output.path)):
        return None
    if any("given_up" in stage["counts"] for stage in manifest["stages"].values()):
        return None  # the run retries these shards
    written = manifest["output"]
    if state != written.get("state") and _output_hash(run, output) != written["sha256"]:
        if written["path"] != output.storage.address(output.path):
            return None
        if validate(output.path).problems:
            log.warning("%s is damaged: writing it again", output)
            return None
        log.warning("%s has changed since it was written and is kept; delete it to write it again", output)
    elif not run.storage.exists(run.report):  # the process was killed before it wrote the report
        report_of(run, output)
    stages = {
        name: StageResult([], stage["counts"], stage["seconds"], stage["measured"])
        for name, stage in manifest["stages"].items()
    }
    examples = manifest["output"]["examples"]
    return PrepareResult(
        output.path,
        examples,
        stages,
        quarantined(stages),
        already_done=True,
        documents=written.get("documents", ()),
    )


def _output_hash(run: RunDirectory, output: File) -> str:
    output.storage.fetch(output.path)
    return run.content_hash(output.path)


def is_ours(run: RunDirectory, output: File) -> bool:
    """Whether a run in this directory wrote the present output."""
    manifest = run.storage.read_json(run.manifest)
    written = manifest.get("output") if isinstance(manifest, dict) else None
    if isinstance(written, dict):
        named = output.storage.address(output.path) == written.get("path")
        return named or _output_hash(run, output) == written.get("sha256")
    # a run that was killed after it wrote the output and before the manifest
    return bool(run.storage.glob(run.path, "answers/*/done.json"))


def quarantined(stages: Mapping[str, StageResult]) -> int:
    """Count the lines and queries that the stages set aside."""
    own = [
        result.counts for name, result in stages.items() if name != "second"
    ]  # its rejections lose no record
    return sum(counts.get("bad", 0) + counts.get("rejected", 0) for counts in own)
