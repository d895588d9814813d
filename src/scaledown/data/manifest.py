"""The manifest of a run has everything that the run depends on; `--config manifest.json` repeats the run."""

import importlib.metadata
import logging
import os
import platform
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import scaledown
from scaledown.config.options import Option
from scaledown.config.prepare import PrepareConfig
from scaledown.data.input.files import Source
from scaledown.data.prompts import TEMPLATES, load_template
from scaledown.data.reranker.api import LIKELIHOOD_PREFIX
from scaledown.extensions import TEACHER_ENGINES
from scaledown.models.sources import ModelSource
from scaledown.run.atomic import read_json, write_json
from scaledown.run.directory import RUN_LAYOUT, RunDirectory
from scaledown.run.stage import Stage, StageResult
from scaledown.run.storage import Storage
from scaledown.urls import is_url, redacted

log = logging.getLogger("scaledown")


class Sources(NamedTuple):
    """The inputs and models of a run, found but not loaded."""

    retriever: ModelSource
    """The model of `--retriever_model`."""
    reranker: ModelSource | None
    """The model of `--reranker_model`; None if the run does not rerank."""
    teacher: ModelSource
    """The model of `--teacher_model`; without a location if it is on a server."""
    second_teacher: ModelSource | None
    """The same for `--second_teacher_model`; None if there is none."""
    corpus: list[Source]
    """Empty if the index replaces the corpus."""
    queries: list[Source]
    """Files of queries, and the dataset if it is a local path."""
    evaluation: list[Source]
    """Files of `--decontaminate`."""
    passed_over: dict[str, dict[str, str]]
    """For each flag, the files of folders that are not read, with the reason."""
    guessed: dict[str, dict[str, str]]
    """For each flag, the files whose format or columns were found by their content, and how they are read."""

    def models(self) -> dict[str, ModelSource]:
        """The models by their role in the run."""
        found = {"retriever": self.retriever, "teacher": self.teacher}
        optional = {"reranker": self.reranker, "second_teacher": self.second_teacher}
        return found | {part: model for part, model in optional.items() if model}


def write_manifest(  # noqa: PLR0917
    run: RunDirectory,
    config: PrepareConfig,
    sources: Sources,
    request: str,
    models: Mapping[str, str],
    inputs: Mapping[str, Any],
    stages: Mapping[str, tuple[Stage, StageResult]],
    output: Mapping[str, Any],
) -> None:
    """Write the manifest of a finished run; it is the last file that a run writes.

    Args:
        run: The run directory.
        config: The settings as the user gave them.
        sources: The inputs and models.
        request: The fingerprint of settings, models and inputs.
        models: The identity of each model, by its role.
        inputs: The identity of each input, by its role.
        stages: Each stage and its record, by name.
        output: `path`, `examples`, `documents`, `sha256` and `state` of the training data.

    Raises:
        OutputError: The disk is full, or the store refuses the file.
    """
    content = {
        "schema": RUN_LAYOUT,
        "version": scaledown.__version__,
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "request": request,
        "parameters": repeatable(config, sources),
        "models": models,
        "inputs": inputs,
        "passed_over": sources.passed_over,
        "guessed": sources.guessed,
        "stages": {
            name: {
                "fingerprint": stage.fingerprint,
                "settings": stage.settings,
                "counts": result.counts,
                "seconds": result.seconds,
                "measured": result.measured,
            }
            for name, (stage, result) in stages.items()
        },
        "output": output,
        "environment": environment(),
    }
    write_json(run.manifest, content)
    run.storage.publish(run.manifest)


def manifest_of(path: Path) -> tuple[dict[str, Any], Storage] | None:
    """Find the manifest of the run that made a file, and its run directory.

    The run directory is `<path>.work`, or a folder beside the file whose manifest has the file as its output.

    Args:
        path: The training data.

    Returns:
        The manifest and the run directory; None if there is none.
    """
    own = Path(f"{path}.work") / "manifest.json"
    for place in (own, *sorted(path.resolve().parent.glob("*/manifest.json"))):
        manifest = read_json(place)
        if not isinstance(manifest, dict):
            continue
        whole = all(isinstance(manifest.get(name), dict) for name in ("parameters", "models", "inputs"))
        written = manifest.get("output")
        named = isinstance(written, dict) and written.get("path") == str(path.resolve())
        if whole and (place == own or named):
            return manifest, Storage(place.parent)
    return None


def repeatable(config: PrepareConfig, sources: Sources) -> dict[str, Any]:
    """Return settings that repeat the run from any folder: with full paths and pinned revisions.

    Secrets in URLs are removed, so such a URL must be given again beside `--config`.

    Args:
        config: The settings as the user gave them.
        sources: The models, with their revisions.
    """
    settings = {name: _full(getattr(config, name), about) for name, about in config.options().items()}
    if config.prompt in TEMPLATES:
        settings["prompt"] = config.prompt
    for name, model in sources.models().items():
        if model.revision and "@" not in model.name:
            settings[f"{name}_model"] = f"{model.name}@{model.revision}"
    return settings


def _full(value: Any, about: Option) -> Any:
    """A setting, as a full path if it is a path. The name of a model is a path if there is such a path."""
    if isinstance(value, tuple) and about.role == "input":
        return [_full(one, about) for one in value]
    is_path = about.role in {"input", "place"} or (about.path and Path(value).expanduser().exists())
    if not value or not is_path:
        return value
    return redacted(value) if is_url(value) else str(Path(value).expanduser().resolve())


def warn_about_differences(repeats: Path, identities: Mapping[str, str], inputs: Mapping[str, Any]) -> None:
    """Log a warning with the models and inputs that differ from those of an earlier run.

    Args:
        repeats: The manifest of the earlier run.
        identities: The identity of each model, by its role.
        inputs: The identity of each input, by its role.
    """
    manifest = read_json(repeats)
    before = manifest if isinstance(manifest, dict) else {}
    then = {**(before.get("models") or {}), **(before.get("inputs") or {})}
    now = {**identities, **inputs}
    different = [name for name in sorted(then.keys() & now.keys()) if then[name] != now[name]]
    if different:
        log.warning("this run does not repeat %s: these inputs differ: %s", repeats, ", ".join(different))


def warn_about_dtype(repeats: Path, machine: Mapping[str, str]) -> None:
    """Log a warning if an earlier run had another dtype on the same kind of device.

    Args:
        repeats: The manifest of the earlier run.
        machine: `device` (its kind) and `dtype` of this run.
    """
    manifest = read_json(repeats)
    then = dtypes_of(manifest if isinstance(manifest, dict) else {}).get(machine["device"])
    if then and then != machine["dtype"]:
        log.warning(
            "this run does not repeat %s: it computes in %s, that one in %s: give --dtype %s",
            *(repeats, machine["dtype"], then, then.removeprefix("torch.")),
        )


def dtypes_of(manifest: Mapping[str, Any]) -> dict[str, str]:
    """The dtype of a run's models, by kind of device: `--dtype auto` differs between processors."""
    stages = (stage.get("settings") or {} for stage in (manifest.get("stages") or {}).values())
    return {own["device"]: own["dtype"] for own in stages if "device" in own and "dtype" in own}


def compared_settings(config: PrepareConfig) -> dict[str, Any]:
    """The settings that must be equal for two runs in one directory."""
    return config.compared() | {
        "format": Path(config.output_file).suffix,
        "device": config.device.partition(":")[0],
        "likelihood": config.reranker_model.startswith(LIKELIHOOD_PREFIX),
        "prompt": load_template(config.prompt),
        "served": bool(config.teacher_endpoint),
    }


def environment() -> dict[str, str | int | None]:
    """The versions of the packages that the results depend on; None if a package is not installed."""
    libraries = ("torch", "transformers", "sentence-transformers", "tokenizers", "numpy")
    engines = (engine.library for engine in TEACHER_ENGINES.values())
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "processors": os.cpu_count(),
        **{name: _version(name) for name in (*libraries, "bitsandbytes", *sorted(filter(None, engines)))},
    }


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
