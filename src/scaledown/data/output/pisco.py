"""Exports training files as the dataset that the authors' own trainer reads (github.com/naver/pisco)."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from scaledown.data.input.training_files import sound_records
from scaledown.errors import InputError, OutputError
from scaledown.run.atomic import atomic_folder
from scaledown.run.outputs import check_folder


def export_pisco(files: Sequence[Path], output: Path, *, overwrite: bool = False) -> int:
    """Write the records of training files to a folder that `datasets.load_from_disk` reads, split `train`.

    The folder appears in one step.

    Args:
        files: Training files.
        output: The folder.
        overwrite: Whether to replace an earlier export.

    Returns:
        The number of records.

    Raises:
        InputError: A record is not sound, or there is none.
        OutputError: The folder cannot be written, or exists and `overwrite` is off.
    """
    from datasets import Dataset, DatasetDict, Features, List, Value
    from datasets.exceptions import DatasetGenerationError
    from datasets.utils.logging import disable_progress_bar

    disable_progress_bar()
    made = _is_pisco_dataset(output)
    check_folder(output, files, made=made)
    if made and not overwrite:
        raise OutputError(f"--output_dir {output} already exists: name a new folder, or give --overwrite")
    text = Value("string")
    features = Features({"query": text, "docs": List(text), "mistral_label": text})
    with atomic_folder(output) as whole:
        cache = str(whole.with_name("cache"))
        try:
            dataset = Dataset.from_generator(
                _pisco_records, features=features, gen_kwargs={"files": list(files)}, cache_dir=cache
            )
        except ValueError as error:  # `datasets` raises it for a split without rows
            raise InputError(f"{files[0]}: the file has no record; give another file") from error
        except DatasetGenerationError as error:
            raise (error.__cause__ or error) from None
        DatasetDict({"train": dataset}).save_to_disk(whole)
    return len(dataset)


def _is_pisco_dataset(folder: Path) -> bool:
    """Whether a folder has the files of such a dataset and no others."""
    own = {"dataset_dict.json", "train"}
    return folder.is_dir() and {entry.name for entry in folder.iterdir()} == own


def _pisco_records(files: Sequence[Path]) -> Iterator[dict[str, Any]]:
    for record in sound_records(files):
        # The trainer's collator uses these names; its README has `queries` and `mistral_labels`.
        yield {"query": record["query"], "docs": record["documents"], "mistral_label": record["answer"]}
