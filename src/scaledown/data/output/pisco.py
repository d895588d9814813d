"""Training records -> the dataset that the authors' own trainer reads (github.com/naver/pisco)."""

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from scaledown.data.input.training_files import sound_records
from scaledown.errors import InputError, OutputError
from scaledown.run.atomic import put_in_place
from scaledown.run.outputs import check_folder


def export_pisco(files: Sequence[Path], output: Path, *, overwrite: bool = False) -> int:
    """Write the records of training files to the folder `output`; gives their number.

    `datasets.load_from_disk(output)["train"]` reads it. The folder appears when it is whole, in the place of
    an earlier one if `overwrite` allows. Raises `InputError` for a record that is not sound, `OutputError`
    where the folder cannot be made.
    """
    from datasets import Dataset, DatasetDict, Features, List, Value
    from datasets.exceptions import DatasetGenerationError
    from datasets.utils.logging import disable_progress_bar

    disable_progress_bar()
    made = _is_made(output)
    check_folder(output, files, made=made)
    if made and not overwrite:
        raise OutputError(f"--output_dir {output} is there already: name a new folder, or give --overwrite")
    text = Value("string")
    features = Features({"query": text, "docs": List(text), "mistral_label": text})
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.", suffix=".tmp") as folder:
        whole = Path(folder) / "whole"
        try:
            dataset = Dataset.from_generator(
                _records, features=features, gen_kwargs={"files": list(files)}, cache_dir=f"{folder}/cache"
            )
        except ValueError as error:  # from `datasets`, of a split without a row
            raise InputError(f"{files[0]}: there is no record in it; name another file") from error
        except DatasetGenerationError as error:
            raise (error.__cause__ or error) from None
        DatasetDict({"train": dataset}).save_to_disk(whole)
        count = len(dataset)
        put_in_place(whole, output, Path(folder) / "before")
    return count


def _is_made(folder: Path) -> bool:
    """Whether a folder is such a dataset, and nothing else is in it."""
    own = {"dataset_dict.json", "train"}
    return folder.is_dir() and {entry.name for entry in folder.iterdir()} == own


def _records(files: Sequence[Path]) -> Iterator[dict[str, Any]]:
    for record in sound_records(files):
        # Its collator takes these names; the README there has `queries` and `mistral_labels`.
        yield {"query": record["query"], "docs": record["documents"], "mistral_label": record["answer"]}
