"""Exports training files as a dataset folder with a card and a report, and uploads it to the hub."""

import filecmp
from collections.abc import Sequence
from pathlib import Path

from scaledown.config.options import OUTPUT_SUFFIXES
from scaledown.data.input.training_files import output_format, sound_records
from scaledown.data.output.columns import columns_of_files
from scaledown.data.output.writers import write_examples
from scaledown.data.report.page import MADE, write_report
from scaledown.errors import InputError, OutputError, UsageError
from scaledown.models.hub import hub_errors, reach_hub
from scaledown.run.atomic import atomic_folder
from scaledown.run.outputs import check_folder


def export_dataset(files: Sequence[Path], form: str, output: Path, *, overwrite: bool = False) -> int:
    """Write the records of training files to a folder that `datasets.load_dataset` reads.

    The folder also has README.md (the dataset's card) and report.html. They describe the run if there is only
    one file and its run directory still exists. The folder appears in one step. If an earlier export has the
    same data, nothing is written.

    Args:
        files: Training files.
        form: One of `OUTPUT_FORMATS`.
        output: The folder.
        overwrite: Whether to replace an earlier export with other data.

    Returns:
        The number of records.

    Raises:
        InputError: A record is not sound, or there is none.
        OutputError: The folder cannot be written, or has other data and `overwrite` is off.
    """
    earlier = output / f"train.{form}"
    made = _is_own_dataset(output)
    check_folder(output, files, made=made)
    with atomic_folder(output) as whole:
        whole.mkdir()
        data = whole / f"train.{form}"
        columns = columns_of_files(files) if output_format(data).needs_columns else None
        count = write_examples(data, sound_records(files), columns)
        if not count:
            raise InputError(f"{files[0]}: the file has no record; give another file")
        same = earlier.is_file() and filecmp.cmp(earlier, data, shallow=False)
        if made and not same and not overwrite:
            raise OutputError(f"--output_dir {output} has other data: name a new folder, or give --overwrite")
        write_report(
            data, whole / "report.html", whole / "README.md", origin=files[0] if len(files) == 1 else None
        )
    return count


def _is_own_dataset(folder: Path) -> bool:
    """Whether a folder has the files of an export and no others."""
    card = folder / "README.md"
    if not card.is_file() or MADE not in card.read_text(encoding="utf-8", errors="replace"):
        return False
    own = {"README.md", "report.html", *(f"train{ending}" for ending in OUTPUT_SUFFIXES)}
    return {entry.name for entry in folder.iterdir()} <= own


def push(folder: Path, repository: str, *, private: bool) -> str:
    """Upload an exported folder to a dataset repository of the hub, and replace an earlier upload.

    Args:
        folder: The folder that `export_dataset` wrote.
        repository: The name of the repository. It is created if it does not exist.
        private: Whether the repository must be private.

    Returns:
        The URL of the dataset.

    Raises:
        ModelError: The hub refuses the upload.
        UsageError: The data is to be `private`, but the repository is public.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    with hub_errors(repository, "dataset"):
        reach_hub()
        name = api.create_repo(repository, repo_type="dataset", private=private, exist_ok=True).repo_id
        if private and not api.repo_info(name, repo_type="dataset").private:
            raise UsageError(
                f"--private: {name} exists and is public: give another name, or make it private on the hub"
            )
        api.upload_folder(
            repo_id=name,
            repo_type="dataset",
            folder_path=folder,
            delete_patterns=["train.*"],
            commit_message="Upload training data",
        )
        return f"{api.endpoint}/datasets/{name}"
