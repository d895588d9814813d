"""The output folder of a training run: what it remembers of the run that writes into it."""

import json
from collections.abc import Container, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, Final

from filelock import FileLock, Timeout

import scaledown
from scaledown.command import is_first
from scaledown.config.train import PretrainConfig, TrainConfig
from scaledown.data.build_index import corpus_identity
from scaledown.data.input.files import locate
from scaledown.errors import RunDirectoryError, UsageError
from scaledown.run.atomic import read_json
from scaledown.run.directory import RunDirectory
from scaledown.student.training.origin import Origin
from scaledown.urls import without_secrets

Config = TrainConfig | PretrainConfig

SETTINGS_FILE: Final = "settings.json"
OWN_FOLDER: Final = ".train"
"""In the output: hashes of what was read, and a lock."""

_CHECKPOINTS: Final = "checkpoint-*"
# What training writes into its folder, as patterns.
_WRITTEN: Final = (
    *(_CHECKPOINTS, SETTINGS_FILE, "README.md", "config.json", "generation_config.json", "*.safetensors*"),
    *("tokenizer*", "special_tokens_map.json", "chat_template.jinja", "trainer_state.json"),
)
# Settings that a run may change when it goes on; of inputs and models the contents are compared.
_FREE: Final = frozenset(
    name
    for kind in (TrainConfig, PretrainConfig)
    for name in kind.named("input", "model", "place", "operation", "report")
)


@contextmanager
def alone(home: RunDirectory) -> Iterator[None]:
    """Keep a second run out of the folder; processes of one run count as one."""
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


def identity_of(given: Config, config: Config, home: RunDirectory, origin: Origin) -> dict[str, Any]:
    """All that a run depends on, files and models by their contents; `given` is kept of its settings."""
    return {
        "scaledown": scaledown.__version__,
        "parameters": without_secrets(asdict(given)) | origin.settled,
        "inputs": _inputs(config, home),
        "models": origin.identity(home.content_hash),
    }


def _inputs(config: Config, home: RunDirectory) -> dict[str, Any]:
    inputs: dict[str, Any] = {}
    if isinstance(config, PretrainConfig):
        inputs["corpus_path"] = corpus_identity(
            home, [locate(name, "--corpus_path") for name in config.corpus_path]
        )
    for name in ("train_data", "eval_data"):
        if not hasattr(config, name):
            continue
        paths = [Path(file) for file in getattr(config, name)]
        for path in paths:
            if not path.is_file():
                raise UsageError(f"--{name} {path}: there is no such file; check the path")
        inputs[name] = [home.content_hash(path) for path in paths]
    inputs["gold"] = [home.content_hash(Path(str(locate(file, "--gold")))) for file in config.gold]
    return inputs


def recall(
    output: Path,
    identity: dict[str, Any],
    settled: Container[str],
    kind: type[Config],
    *,
    overwrite: bool = False,
) -> dict[str, Any]:
    """What the folder remembers of this same run, at least `identity`; its models settle some flags.

    Raises `RunDirectoryError` where it holds another run, or files of another origin which `overwrite` does
    not allow to replace; foreign checkpoints stay, for they would be gone on from.
    """
    memory = read_json(output / SETTINGS_FILE)
    if not isinstance(memory, dict) or not memory.keys() >= identity.keys():
        for pattern in (_CHECKPOINTS,) if overwrite else _WRITTEN:
            for path in output.glob(pattern):
                way = "" if pattern == _CHECKPOINTS else ", or give --overwrite to replace it"
                raise RunDirectoryError(
                    f"--output_dir {output} holds {path.name}, and no run: choose another{way}"
                )
        return identity
    defaults = {
        item.name: item.default for item in fields(kind)
    }  # of flags that a run of before did not have
    compared = [
        {
            **{
                name: value
                for name, value in (_as_json(defaults) | side["parameters"]).items()
                if name not in _FREE and name not in settled
            },
            "train_data": [],
            "gold": [],
            **side["inputs"],
            **side["models"],
        }
        for side in (_as_json(memory), _as_json(identity))
    ]
    there, here = compared
    different = sorted(name for name in there | here if there.get(name) != here.get(name))
    if different:
        name = different[0]
        values = "" if name in _FREE else f": {there.get(name)} there, {here.get(name)} here"
        others = f", and {len(different) - 1} more" if different[1:] else ""
        raise RunDirectoryError(
            f"--output_dir {output} holds a run with another --{name}{values}{others}: use the same, or "
            "choose another folder"
        )
    return memory | {"parameters": identity["parameters"]}


def _as_json(content: Mapping[str, Any]) -> dict[str, Any]:
    """As it comes back from JSON."""
    plain: dict[str, Any] = json.loads(json.dumps(content))
    return plain
