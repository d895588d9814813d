"""What a finished run leaves, and how a later call of the same command knows it."""

import logging
import shlex
from collections.abc import Mapping

from scaledown.data.input.training_files import validate
from scaledown.data.report.page import write_report
from scaledown.data.session.summary import Result
from scaledown.run.directory import RunDirectory
from scaledown.run.locations import File
from scaledown.run.stage import StageResult

log = logging.getLogger("scaledown")


def report_of(run: RunDirectory, output: File) -> None:
    """The run's page and card. The data is whole by now: without them the run has not failed."""
    try:
        output.storage.fetch(output.path)
        write_report(output.path, run.report, run.card, work=run.storage)
        for path in (run.report, run.card):
            run.storage.publish(path)
    except Exception as error:  # whatever it is, the data is not to blame
        log.debug("the report failed", exc_info=True)
        log.warning("no report (%s); `scaledown report %s` tries again", error, shlex.quote(str(output.path)))


def earlier_result(run: RunDirectory, request: str, output: File) -> Result | None:
    """The result of an earlier run with these settings whose output is still as it was written."""
    manifest = run.storage.read_json(run.manifest)
    if not isinstance(manifest, dict) or manifest.get("request") != request:
        return None
    if not (state := output.storage.state(output.path)):
        return None
    if any("given_up" in stage["counts"] for stage in manifest["stages"].values()):
        return None  # and is tried again
    written = manifest["output"]
    if state != written.get("state") and _content(run, output) != written["sha256"]:
        if written["path"] != output.storage.address(output.path):
            return None
        if validate(output.path).problems:
            log.warning("%s is damaged: writing it again", output)
            return None
        log.warning("%s was changed since it was written and is left so; delete it to have it again", output)
    elif not run.storage.exists(run.report):  # of a process that was killed right before
        report_of(run, output)
    stages = {
        name: StageResult([], stage["counts"], stage["seconds"], stage["measured"])
        for name, stage in manifest["stages"].items()
    }
    examples = manifest["output"]["examples"]
    return Result(
        output.path,
        examples,
        stages,
        quarantined(stages),
        already_done=True,
        documents=written.get("documents", ()),
    )


def _content(run: RunDirectory, output: File) -> str:
    output.storage.fetch(output.path)
    return run.content_hash(output.path)


def is_ours(run: RunDirectory, output: File) -> bool:
    """Whether a run of this directory wrote the output that is there."""
    manifest = run.storage.read_json(run.manifest)
    written = manifest.get("output") if isinstance(manifest, dict) else None
    if isinstance(written, dict):
        named = output.storage.address(output.path) == written.get("path")
        return named or _content(run, output) == written.get("sha256")
    # a run that was killed after it wrote the output and before the manifest
    return bool(run.storage.glob(run.path, "answers/*/done.json"))


def quarantined(stages: Mapping[str, StageResult]) -> int:
    """Lines and queries that the stages set aside."""
    own = [result.counts for name, result in stages.items() if name != "second"]  # no record is lost there
    return sum(counts.get("bad", 0) + counts.get("rejected", 0) for counts in own)
