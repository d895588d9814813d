"""The summary of a run: counts and seconds of each stage, three examples, the next command."""

import itertools
import shlex
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final, NamedTuple

from scaledown.command import program_name
from scaledown.config.prepare import PrepareConfig
from scaledown.data.build_index import stage_line
from scaledown.data.input.folders import guessed_line, passed_over_line
from scaledown.data.input.queries import UNREAD
from scaledown.data.input.training_files import entries
from scaledown.data.planning.plan import compared, planned_seconds
from scaledown.data.teacher.api import is_served
from scaledown.data.teacher.base import EngineSettings
from scaledown.errors import one_line
from scaledown.records import Example
from scaledown.run.locations import File, output_of, run_of
from scaledown.run.progress import counted, duration
from scaledown.run.stage import StageResult
from scaledown.urls import is_url

_FEW_EXAMPLES: Final = 10_000
"""Examples. With 3,520 the paper's compressor learned nothing that shows in answers (docs/results.md)."""
_SPLIT: Final = 10
"""Number of examples from which it is worth holding out a part."""


class PrepareResult(NamedTuple):
    """The result of a run."""

    output: Path
    """The training data.

    For an output at a URL it is the path in the mirror, which exists if this machine wrote or read it.
    """
    examples: int
    """Number of its records."""
    stages: dict[str, StageResult]
    """The record of each finished stage, by name."""
    quarantined: int
    """Malformed lines, and queries that the teacher could not answer."""
    already_done: bool = False
    """Whether an earlier run made all of it."""
    given_up: int = 0
    """Shards given up after repeated deaths of workers."""
    documents: Sequence[int] = ()
    """The least and the most documents of a record; empty for runs of earlier versions."""
    missing: int = 0
    """Shards that other parts of the run have not made yet; until then there is no output."""


def run_summary(result: PrepareResult, config: PrepareConfig) -> str:
    """Return what the finished command prints: counts and seconds of each stage, examples, next command."""
    if result.missing:
        return (
            f"part {config.shard} is done; {result.missing:,} shards of other parts are missing: the part "
            f"that ends last writes {output_of(config)}"
        )
    lines = []
    if result.already_done:
        lines.append("nothing to do: this run is finished")
    output = output_of(config)
    lines.append(
        f"{output}: {counted(result.examples, 'examples')}{_documents_each(sorted({*result.documents}))}"
    )
    lines.append("")
    planned = planned_seconds(config)
    for name, stage in result.stages.items():
        expected = duration(planned[name]) if name in planned else "unknown"
        lines.append(stage_line(name, stage, f"   planned {expected:>10}" if planned else ""))
    if planned:
        lines += ["", compared(planned, result.stages)]
    for note in _missing(result, config):
        lines += ["", note]
    if config.top_k_reranking and not config.enable_reranking:
        lines += ["", "the reranker's scores are kept: --enable_reranking adds them without scoring again"]
    lines.append("")
    if result.output.exists():
        records = (entry.record for entry in itertools.islice(entries(result.output), 3))
        for number, record in enumerate(records, 1):
            lines += _example_lines(number, record)
    if (report := run_of(config).root / "report.html").exists():
        lines.append(f"look: {report}")
    if is_url(config.output_file) or result.examples < _SPLIT:
        return "\n".join(
            [*lines, f"next: {program_name()} {_training_command(config, output, result.examples)}"]
        )
    folder = output.path.parent / "split"
    splitting = shlex.join(["split", str(output), "--output_dir", str(folder)])
    lines.append(f"next, to hold out a part for an evaluation: {program_name()} {splitting}")
    training = _training_command(config, folder / f"train{output.path.suffix}", result.examples)
    lines.append(f"then: {program_name()} {training}")
    return "\n".join(lines)


def _documents_each(numbers: Sequence[int]) -> str:
    """Return how many documents the records have; `numbers` are the least and the most."""
    *least, most = numbers or [0]
    return (
        f", {''.join(f'{number:,} to ' for number in least)}{counted(most, 'documents')} each" if most else ""
    )


def _missing(result: PrepareResult, config: PrepareConfig) -> Iterator[str]:
    """Yield what is not in the output, and where the reasons are."""
    run = run_of(config)
    where = run.shown(run.root / "quarantine")
    if result.given_up:
        shards = "1 shard was" if result.given_up == 1 else f"{result.given_up:,} shards were"
        yield f"given up: {shards} not made, because each worker that tried died, see {where}"
    if result.quarantined:
        yield f"set aside: {result.quarantined:,} lines or queries, each with its reason, in {where}"
    manifest = run.read_json(run.root / "manifest.json") or {}
    for flag, files in (manifest.get("passed_over") or {}).items():
        yield passed_over_line(flag, files)
    for flag, files in (manifest.get("guessed") or {}).items():
        yield guessed_line(flag, files)

    def total(*kinds: str) -> int:
        return sum(stage.counts.get(kind, 0) for stage in result.stages.values() for kind in kinds)

    if collapsed := total("collapsed"):
        yield f"collapsed: {collapsed:,} candidates had the text of one that ranked above them"
    if unread := total(UNREAD):
        yield f"passed over: {unread:,} rows of --decontaminate hold no question, the log names them"
    if left_out := total("contaminated", "duplicates"):
        yield f"left out: {left_out:,} queries or answers, each with what it matches, in {where}"


def run_failure(result: PrepareResult, config: PrepareConfig) -> str | None:
    """Return why a run that has a summary failed; None if it did not."""
    run = run_of(config)
    if result.given_up:
        lacking = f"part {config.shard}" if result.missing else result.output
        return (
            f"{lacking} lacks what was given up: remove its cause, which the logs in {run.root / 'live'} "
            "show, and run the same command again: it tries again"
        )
    if not config.strict or not result.quarantined:
        return None
    one = result.quarantined == 1
    number = "1 line or query is" if one else f"{result.quarantined:,} lines or queries are"
    where = run.shown(run.root / "quarantine")
    return f"--strict: {number} in {where}, each with its reason: correct them"


def _training_command(config: PrepareConfig, data: File | Path, examples: int) -> str:
    """The command that trains on data: a generator that answers like its teacher is the teacher itself.

    Only a pointer learns from few examples; it ranks documents by its own scores.
    """
    words = ["train", "--train_data", str(data), "--output_dir", _model_folder(config)]
    if config.teacher_model != PrepareConfig.teacher_model and not is_served(EngineSettings.of(config)):
        words += ["--generator_model", config.teacher_model]
    if examples < _FEW_EXAMPLES:
        words += ["--compressor", "pointer", "--batch_size", "8", "--learning_rate_generator", "5e-4"]
    elif config.enable_reranking:
        words.append("--enable_reranking")
    return shlex.join(words)


def _model_folder(config: PrepareConfig) -> str:
    """Return the folder of a model in printed commands: beside the output."""
    return "model" if is_url(config.output_file) else str(output_of(config).path.parent / "model")


def _example_lines(number: int, example: Example) -> list[str]:
    width = min(shutil.get_terminal_size((100, 24)).columns, 120) - 15
    rows = [(f"{number}. query", example["query"]), ("   answer", example["answer"])]
    scores = example.get("reranking_scores")
    for place, document in enumerate(example["documents"][:3]):
        score = f"[{scores[place]:.2f}] " if scores else ""
        rows.append((f"   document {place + 1}", score + document))
    return [f"{label:<14} {one_line(text, width)}" for label, text in rows] + [""]
