"""A training file as a dataset to share: a folder with its card and page, here and on the hub."""

import filecmp
import tempfile
from collections.abc import Sequence
from pathlib import Path

from scaledown.config.options import OUTPUT_SUFFIXES
from scaledown.data.input.training_files import format_of, sound_records
from scaledown.data.output.columns import columns_of
from scaledown.data.output.writers import write_examples
from scaledown.data.report.page import MADE, write_report
from scaledown.errors import InputError, OutputError, UsageError
from scaledown.models import hub_errors, reach_hub
from scaledown.run.atomic import put_in_place
from scaledown.run.outputs import check_folder


def export_dataset(files: Sequence[Path], form: str, output: Path, *, overwrite: bool = False) -> int:
    """Write the records of training files to the folder `output` in one of `OUTPUT_FORMATS`; their number.

    `datasets.load_dataset(output)` reads it. README.md, its card, and report.html come with it; they tell of
    the run where there is one file and its run directory is there. The folder appears when it is whole; one
    that has the same data already stays, one that an export made is replaced if `overwrite` allows. Raises
    `InputError` for a record that is not sound, `OutputError` where the folder cannot be made.
    """
    earlier = output / f"train.{form}"
    made = _is_made(output)
    check_folder(output, files, made=made)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.", suffix=".tmp") as folder:
        whole = Path(folder) / "whole"
        whole.mkdir()
        data = whole / f"train.{form}"
        columns = columns_of(files) if format_of(data).needs_columns else None
        count = write_examples(data, sound_records(files), columns)
        if not count:
            raise InputError(f"{files[0]}: there is no record in it; name another file")
        if made and earlier.is_file() and filecmp.cmp(earlier, data, shallow=False):
            return count
        if made and not overwrite:
            raise OutputError(
                f"--output_dir {output} holds other data: name a new folder, or give --overwrite"
            )
        write_report(
            data, whole / "report.html", whole / "README.md", origin=files[0] if len(files) == 1 else None
        )
        put_in_place(whole, output, Path(folder) / "before")
    return count


def _is_made(folder: Path) -> bool:
    """Whether a folder is an export, and nothing else is in it."""
    card = folder / "README.md"
    if not card.is_file() or MADE not in card.read_text(encoding="utf-8", errors="replace"):
        return False
    own = {"README.md", "report.html", *(f"train{ending}" for ending in OUTPUT_SUFFIXES)}
    return {entry.name for entry in folder.iterdir()} <= own


def push(folder: Path, repository: str, *, private: bool) -> str:
    """Upload an exported folder to a dataset repository of the hub, made if there is none; its address.

    Data of an earlier upload is replaced. Raises `ModelError` where the hub refuses, `UsageError` where what
    is to be `private` would be public.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    with hub_errors(repository, "dataset"):
        reach_hub()
        name = api.create_repo(repository, repo_type="dataset", private=private, exist_ok=True).repo_id
        if private and not api.repo_info(name, repo_type="dataset").private:
            raise UsageError(
                f"--private: {name} is there already and public; name another, or change it there"
            )
        api.upload_folder(
            repo_id=name,
            repo_type="dataset",
            folder_path=folder,
            delete_patterns=["train.*"],
            commit_message="Upload training data",
        )
        return f"{api.endpoint}/datasets/{name}"
