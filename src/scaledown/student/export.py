"""`scaledown export --format generator`: write a student's generator as an ordinary causal LM."""

from pathlib import Path
from typing import Final

from scaledown.errors import OutputError
from scaledown.run.atomic import atomic_folder, write_json
from scaledown.run.outputs import check_folder

_NOTE: Final = "scaledown_generator.json"  # in a folder that this command made


def export_generator(name: str, output: Path, *, overwrite: bool = False) -> None:
    """Write the generator of a trained model as an ordinary causal LM, LoRA merged, with its tokenizer.

    Args:
        name: Folder of the model, or its name on the hub.
        output: The folder to write. It appears when it is complete.
        overwrite: Replace an earlier export.

    Raises:
        ModelError: The model cannot be read.
        OutputError: The folder exists already, or cannot be written.
    """
    made = (output / _NOTE).exists()
    check_folder(output, [Path(name)], made=made)
    if made and not overwrite:
        raise OutputError(f"--output_dir {output} already exists: name a new folder, or give --overwrite")
    from scaledown.student.model import ScaleDownModel

    model = ScaleDownModel.from_pretrained(name, dtype="auto")
    with atomic_folder(output) as whole:
        model.save_generator(whole)
        write_json(whole / _NOTE, {"student": name})
