"""Merges training files of several runs, without repeated queries and records of evaluation sets."""

import contextlib
import itertools
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import orjson

from scaledown.config.options import check_ending
from scaledown.config.prepare import PrepareConfig
from scaledown.config.shared import CleanConfig
from scaledown.data.cleaning.decontaminate import Cleaner, Exclusion
from scaledown.data.input.seen import Seen
from scaledown.data.input.training_files import check_file, output_format, sound_records
from scaledown.data.manifest import dtypes_of, manifest_of
from scaledown.data.output.columns import columns_of_files
from scaledown.data.output.writers import write_examples
from scaledown.errors import UsageError
from scaledown.records import Example
from scaledown.run.atomic import atomic
from scaledown.run.outputs import check_output, note_made

log = logging.getLogger("scaledown")

# Settings that must be equal for runs to be merged. Corpus and models must be equal, too, by their content.
_COMPARED_SETTINGS: Final = tuple(name for name, about in PrepareConfig.options().items() if about.in_records)
_RECORDS_AT_ONCE: Final = 256  # records cleaned at once


class Merged(NamedTuple):
    """The counts of a merge."""

    records: int
    """Records written."""
    duplicates: int
    """Records left out because of a repeated query."""
    contaminated: int = 0
    """Records left out because of an evaluation set."""
    unread: int = 0
    """Rows of the evaluation sets without a question."""


def removed_file(output: Path) -> Path:
    """The file in which a merge with cleaning lists each record that it left out."""
    return output.with_name(output.name + ".removed.jsonl")


def merge(
    paths: Sequence[Path],
    output: Path,
    *,
    allow_different_settings: bool = False,
    cleaning: CleanConfig = CleanConfig(),  # noqa: B008 (frozen)
    overwrite: bool = False,
) -> Merged:
    """Merge training files in the given order. Of several records with the same query, the first is kept.

    Args:
        paths: Training files.
        output: The file to write.
        allow_different_settings: Whether to merge files of runs with different settings.
        cleaning: What else to leave out. If it is given, `removed_file` lists all records left out.
        overwrite: Whether to replace files that no merge made.

    Returns:
        The counts.

    Raises:
        UsageError: The runs had different settings, by their manifests.
        InputError: A record is not sound.
        OutputError: There is a file that no merge made, or `output` cannot be written.
    """
    check_ending("--output_file", output)
    written = [output, *([removed_file(output)] if cleaning != CleanConfig() else [])]
    for path in written:
        reads = (*paths, *cleaning.decontaminate)
        check_output("--output_file", path, reads, made="merge", overwrite=overwrite)
    for path in paths:  # check all files before the first is read, which can take hours
        check_file(path)
    if not allow_different_settings:
        _check_same_settings(paths)
    cleaner = Cleaner(cleaning)
    cleaner.check()
    counts: Counter[str] = Counter()
    with contextlib.ExitStack() as stack:
        record_removed: Callable[[bytes], Any] = len
        if cleaning != CleanConfig():
            temporary = stack.enter_context(atomic(removed_file(output)))
            record_removed = stack.enter_context(temporary.open("wb")).write

        def kept() -> Iterator[Example]:
            for record, why in _with_exclusions(sound_records(paths, task="merge", alike=True), cleaner):
                if why is None:
                    yield record
                else:
                    counts[why["problem"]] += 1
                    removed = {"query": record["query"], **why, "answer": record["answer"]}
                    record_removed(orjson.dumps(removed) + b"\n")

        columns = columns_of_files(paths) if output_format(output).needs_columns else None
        number = write_examples(output, kept(), columns)
    for path in written:
        note_made(path, "merge")
    return Merged(number, counts["duplicate"], counts["contaminated"], cleaner.counts["unread"])


def _with_exclusions(
    records: Iterator[Example], cleaner: Cleaner
) -> Iterator[tuple[Example, Exclusion | None]]:
    """Records, each with the reason why it is left out, or None if it is kept."""
    seen = Seen()
    while block := list(itertools.islice(records, _RECORDS_AT_ONCE)):
        for record, unwanted in zip(block, cleaner.queries([one["query"] for one in block]), strict=True):
            why = unwanted or cleaner.answer(record["answer"], _passages(record["documents"]))
            if not seen.add(record["query"]) and why is None:
                match = {"kind": "exact", "question": record["query"], "similarity": 1.0}
                why = {"reason": "exact match of an earlier query", "problem": "duplicate", "match": match}
            yield record, why


def _passages(documents: Sequence[str]) -> list[str]:
    """The documents, then the same without their first lines, which may be titles."""
    return [*documents, *(rest for document in documents if (rest := document.partition("\n")[2]))]


def _check_same_settings(paths: Sequence[Path]) -> None:
    first: tuple[Path, dict[str, Any]] | None = None
    dtypes: dict[str, tuple[Path, str]] = {}
    for path in paths:
        found = manifest_of(path)
        if not found:
            log.warning("%s: it has no run directory, so its settings are not compared", path)
            continue
        manifest, _ = found
        settings = {name: manifest["parameters"].get(name) for name in _COMPARED_SETTINGS}
        settings |= {f"{name} (weights)": identity for name, identity in manifest["models"].items()}
        settings["corpus (content)"] = manifest["inputs"].get("corpus")
        settings["prompt (content)"] = manifest["inputs"].get("prompt")
        for device, dtype in dtypes_of(manifest).items():
            other = dtypes.setdefault(device, (path, dtype))
            if other[1] != dtype:
                log.warning("%s was computed in %s, %s in %s", path, dtype, *other)
        answers = (manifest.get("stages") or {}).get("answers") or {}
        settings["teacher_backend"] = (answers.get("settings") or {}).get("backend")
        if first is None:
            first = path, settings
            continue
        different = sorted(k for k in settings | first[1] if settings.get(k) != first[1].get(k))
        if different:
            name = different[0]
            raise UsageError(
                f"{path} and {first[0]} were made with different settings ({', '.join(different)}; {name}: "
                f"{settings.get(name)!r} and {first[1].get(name)!r}): make both with the same settings, or "
                "give --allow_different_settings"
            )
