"""Loads the weights of a model that was found; GGUF weights are converted first, once."""

import contextlib
import io
import json
import logging
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from scaledown.errors import ModelError
from scaledown.models.hub import hub_errors
from scaledown.models.sources import ModelSource, kept_folder, written_once

log = logging.getLogger("scaledown")
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns when another library imports it


@contextlib.contextmanager
def loading(source: ModelSource) -> Iterator[None]:
    """Wrap the loading of a model: errors as in `hub_errors`, and a warning if its weights are pickles.

    Args:
        source: The model that is loaded in the block.

    Raises:
        ModelError: The block raised an error.
    """
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


def onto(device: str) -> dict[str, Any]:
    """Return arguments of `from_pretrained` to read weights directly to a device.

    Otherwise the weights are read to the host, which may have less memory.

    Args:
        device: `cpu`, `cuda`, `cuda:N` or `mps`.
    """
    return {} if device == "cpu" else {"device_map": {"": device}}


def loadable(source: ModelSource) -> tuple[str, dict[str, Any]]:
    """Return arguments of `from_pretrained` for a model. Code that comes with the model is never run.

    Args:
        source: The model. GGUF weights are converted at the first call, to a folder in the cache.

    Returns:
        The first argument, a folder or a name on the hub; and the named arguments.

    Raises:
        ModelError: GGUF weights cannot be converted.
    """
    quiet_libraries()
    if source.gguf_file:
        return str(_converted(source)), {"trust_remote_code": False}
    return source.location, {"trust_remote_code": False, "revision": source.revision}


def _converted(source: ModelSource) -> Path:
    """The folder with GGUF weights as float16 safetensors; they are converted once."""
    folder = kept_folder("gguf", source)
    if (folder / "config.json").exists():
        return folder
    log.info("converting %s once, to ordinary weights in %s", source.gguf_file, folder)
    with hub_errors(source.name), contextlib.redirect_stderr(io.StringIO()):
        return written_once(folder, source, partial(_convert, source))


def _convert(source: ModelSource, folder: Path) -> None:
    from huggingface_hub import hf_hub_download
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    from scaledown.models.gguf import convert_llama

    file = Path(source.location) / str(source.gguf_file)
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
    """Read a JSON file of a model.

    Args:
        source: The model.
        file_name: The file's name in the model's folder or repository, for example `config.json`.

    Returns:
        The content; None if there is no such file.

    Raises:
        ModelError: The file cannot be downloaded.
    """
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


def quiet_libraries() -> None:
    """Turn off the progress bars and the advice of libraries, since we show our own progress."""
    import transformers.utils.logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("sentence_transformers").setLevel(logging.ERROR)
