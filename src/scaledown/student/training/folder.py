"""The output folder of a training run, and its record of the run that writes into it."""

from collections.abc import Container, Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, Final, NamedTuple

from filelock import FileLock, Timeout

import scaledown
from scaledown.command import is_first
from scaledown.config.train import PretrainConfig, TrainConfig
from scaledown.data.build_index import corpus_identity
from scaledown.data.input.files import locate
from scaledown.errors import RunDirectoryError
from scaledown.models.sources import ModelSource
from scaledown.run.atomic import as_json, read_json
from scaledown.run.directory import RunDirectory
from scaledown.student.training.origin import Origin
from scaledown.urls import without_secrets

TrainingConfig = TrainConfig | PretrainConfig

SETTINGS_FILE: Final = "settings.json"
OWN_FOLDER: Final = ".train"
"""A folder in the output: hashes of the inputs, and a lock."""

_CHECKPOINTS: Final = "checkpoint-*"
# Patterns of the files that training writes.
_WRITTEN: Final = (
    *(_CHECKPOINTS, SETTINGS_FILE, "README.md", "config.json", "generation_config.json", "*.safetensors*"),
    *("tokenizer*", "special_tokens_map.json", "chat_template.jinja", "trainer_state.json"),
)
# Settings that may change when a run continues. For inputs and models the contents are compared instead.
_FREE: Final = frozenset(
    name
    for kind in (TrainConfig, PretrainConfig)
    for name in kind.named("input", "model", "place", "operation", "report")
)


@contextmanager
def alone(home: RunDirectory) -> Iterator[None]:
    """Lock the folder against a second run inside the block. The processes of one run share the lock.

    Args:
        home: The folder with the lock, inside the output folder.

    Raises:
        RunDirectoryError: Another run holds the lock.
    """
    lock = FileLock(home.path / ".lock")
    if is_first():
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise RunDirectoryError(
                f"--output_dir {home.path.parent} is in use by another run: wait for it, or choose another"
            ) from None
    try:
        yield
    finally:
        lock.release()


def identity_of(
    given: TrainingConfig, config: TrainingConfig, home: RunDirectory, origin: Origin
) -> dict[str, Any]:
    """Return everything that a run depends on.

    Args:
        given: The settings as the user gave them, which are recorded.
        config: The settings with URLs replaced by files.
        home: Caches hashes of files.
        origin: The models.

    Returns:
        Version, settings, and hashes of files and models.
    """
    return {
        "scaledown": scaledown.__version__,
        "parameters": without_secrets(asdict(given)) | origin.settled,
        "inputs": _input_identities(config, home),
        "models": origin.identity(home.content_hash),
    }


def _input_identities(config: TrainingConfig, home: RunDirectory) -> dict[str, Any]:
    inputs: dict[str, Any] = {}
    if isinstance(config, PretrainConfig):
        inputs["corpus_path"] = corpus_identity(
            home, [locate(name, "--corpus_path") for name in config.corpus_path]
        )
    for name in ("train_data", "eval_data", "leave_out"):
        if not hasattr(config, name):
            continue
        inputs[name] = [home.content_hash(Path(file)) for file in getattr(config, name)]
    inputs["gold"] = [home.content_hash(Path(str(locate(file, "--gold")))) for file in config.gold]
    return inputs


class Training(NamedTuple):
    """The data and the kind of examples that a model was trained on, from the record in its folder."""

    data: frozenset[str] = frozenset()
    """The hashes of its files of training data."""
    read_text: bool | None = None
    """Whether the generator was trained on documents' text, too; None if it is frozen or nothing is known."""


def training_of(source: ModelSource) -> Training:
    """Read the record of the run that made a model.

    Args:
        source: The model.

    Returns:
        What the record says; the defaults of `Training` if there is no record in its folder.
    """
    content = read_json(Path(source.location) / SETTINGS_FILE) if source.location else None
    if not isinstance(content, dict):
        return Training()
    inputs, parameters = content.get("inputs"), content.get("parameters")
    files = inputs.get("train_data") if isinstance(inputs, dict) else None
    share = None
    if isinstance(parameters, dict) and parameters.get("generator_training") != "frozen":
        share = parameters.get("text_fraction")
    data = frozenset(map(str, files)) if isinstance(files, list) else frozenset[str]()
    return Training(data, None if share is None else bool(share))


def read_record(
    output: Path,
    identity: dict[str, Any],
    settled: Container[str],
    kind: type[TrainingConfig],
    *,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Read the folder's record of this run; it must have the same identity.

    Args:
        output: The folder.
        identity: The result of `identity_of`.
        settled: Flags that a pretrained model decides; they are not compared.
        kind: The class of the settings.
        overwrite: Allow to replace files that no training has written. Checkpoints of unknown origin are
            never replaced, since the run would continue from them.

    Returns:
        The record; `identity` if there is none yet.

    Raises:
        RunDirectoryError: The folder holds another run, or files that may not be replaced.
    """
    memory = read_json(output / SETTINGS_FILE)
    if not isinstance(memory, dict) or not memory.keys() >= identity.keys():
        for pattern in (_CHECKPOINTS,) if overwrite else _WRITTEN:
            for path in output.glob(pattern):
                way = "" if pattern == _CHECKPOINTS else ", or give --overwrite to replace it"
                raise RunDirectoryError(
                    f"--output_dir {output} holds {path.name} but not a run: choose another{way}"
                )
        return identity
    defaults = {
        item.name: item.default for item in fields(kind)
    }  # of flags that the earlier run did not have
    compared = [
        {
            **{
                name: value
                for name, value in (as_json(defaults) | side["parameters"]).items()
                if name not in _FREE and name not in settled
            },
            "train_data": [],
            "leave_out": [],
            "gold": [],
            **side["inputs"],
            **side["models"],
        }
        for side in (as_json(memory), as_json(identity))
    ]
    there, here = compared
    different = sorted(name for name in there | here if there.get(name) != here.get(name))
    if different and (memory.get("result") or any(output.glob(_CHECKPOINTS))):
        name = different[0]
        values = "" if name in _FREE else f": {there.get(name)} there, {here.get(name)} here"
        if name in identity["inputs"]:
            values = " (other files, or their content has changed)"
        others = f", and {len(different) - 1} more" if different[1:] else ""
        raise RunDirectoryError(
            f"--output_dir {output} holds a run with another --{name}{values}{others}: use the same, or "
            "choose another folder"
        )
    if different:  # the other run ended before its first checkpoint: there is nothing to lose
        return identity
    return memory | {"parameters": identity["parameters"]}
