"""vLLM's engine on this machine: the device that it was built for, its memory, its processes."""

import contextlib
import importlib.metadata
import importlib.util
import logging
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from multiprocessing import resource_tracker
from typing import Any, Final

from scaledown.devices.gpus import free_share, index, only
from scaledown.errors import MissingExtraError, ModelError, NoRoomError, install_command

log = logging.getLogger("scaledown")

_CPU_CACHE: Final = 4 << 30  # bytes of keys and values on a CPU, by default
_CACHE_VARIABLE: Final = "VLLM_CPU_KVCACHE_SPACE"  # vLLM's variable for the same, in GiB
_CPU_BATCH: Final = 4096  # tokens of prompts that are read together: vLLM's default
_END_SECONDS: Final = 10.0  # to wait for a process that is asked to end
_GONE: Final = "one of its processes is gone"
_ENVIRONMENT: Final = {
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",  # the default is fork, which fails if CUDA is in use here
}
_DEFAULTS: Final = {
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",  # standard output is for results
    "VLLM_NO_USAGE_STATS": "1",  # otherwise vLLM sends statistics to its authors
}


def check_vllm(device: str, flag: str) -> None:
    """Check that vLLM is installed and built for a device.

    Args:
        device: `cpu`, `cuda`, `cuda:N` or `mps`.
        flag: The flag that needs vLLM, for the message.

    Raises:
        MissingExtraError: vLLM is not installed.
        ModelError: vLLM was built for another kind of device.
    """
    if importlib.util.find_spec("vllm") is None:
        raise MissingExtraError(
            f"{flag} needs vLLM: {install_command('vllm')} (CUDA); for a CPU see docs/teachers.md"
        )
    if not runs_on(device):
        raise ModelError(
            f"{flag} on --device {device}: this vLLM is built for {'a CPU' if _is_cpu_build() else 'CUDA'}, "
            f"use --device {'cpu' if _is_cpu_build() else 'cuda'}"
        )


def runs_on(device: str) -> bool:
    """Whether vLLM is installed and built for this device."""
    if importlib.util.find_spec("vllm") is None:
        return False
    return device == "cpu" if _is_cpu_build() else device.startswith("cuda")


def _is_cpu_build() -> bool:
    """Whether the installed vLLM is for CPUs, by its name and version, as vLLM itself decides."""
    for name in ("vllm-cpu", "vllm"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return "cpu" in name + importlib.metadata.version(name)
    return False


def gpus_of(device: str, tensor_parallel: int) -> range:
    """Return the numbers of the GPUs that share a model.

    Args:
        device: `cpu`, `cuda` or `cuda:N`; N is the first GPU.
        tensor_parallel: Number of GPUs.

    Returns:
        Consecutive numbers; none on a CPU.

    Raises:
        ModelError: There are too few GPUs.
    """
    import torch

    if not device.startswith("cuda"):
        return range(0)
    gpus = range(index(device), index(device) + tensor_parallel)
    if gpus.stop > (count := torch.cuda.device_count()):
        raise ModelError(
            f"--tensor_parallel {tensor_parallel}: there are {count} GPUs, and --device {device} comes "
            "first: lower it"
        )
    return gpus


class VllmEngine:
    """vLLM's engine: it takes requests and returns tokens. The model is in the engine's own processes."""

    def __init__(
        self,
        name: str,
        device: str,
        arguments: Mapping[str, Any],
        *,
        tensor_parallel: int = 1,
        memory: float = 0.0,
    ) -> None:
        """Start the engine, which takes from seconds to minutes.

        Args:
            name: The model's name, for messages.
            device: `cpu`, `cuda` or `cuda:N`; N is the first of its GPUs.
            arguments: Arguments of vLLM's `EngineArgs`, with `max_model_len`.
            tensor_parallel: Number of GPUs that share the model.
            memory: Share of the device's memory that the engine may use, 0 to 1. 0 is all free memory of a
                GPU; on a CPU it is 4 GiB for keys and values in addition to the weights.

        Raises:
            NoRoomError: The GPU has no free memory.
            Exception: Any error of vLLM if it cannot load the model; `models.loading` converts it.
        """
        gpus = gpus_of(device, tensor_parallel)
        room = _room(name, device, gpus, memory, arguments["max_model_len"])
        with _environment({**_ENVIRONMENT, **(only(os.environ, gpus) if gpus else {})}):
            from vllm import EngineArgs, LLMEngine
            from vllm.usage.usage_lib import UsageContext

            def make() -> Any:
                settings = EngineArgs(**arguments, **room, tensor_parallel_size=tensor_parallel)
                # The context of vLLM's `LLM` class, whose defaults allow more requests at a time.
                return LLMEngine.from_engine_args(settings, usage_context=UsageContext.LLM_CLASS)

            before = set(multiprocessing.active_children())
            self._engine: Any = _unless_interrupted(make)
        self._processes = [one for one in multiprocessing.active_children() if one not in before]
        self._sentinels = [one.sentinel for one in self._processes]
        if self._processes:
            threading.Thread(target=self._watch, name="vllm-watch", daemon=True).start()

    @property
    def context(self) -> int:
        """The most tokens of prompt and answer together."""
        return int(self._engine.model_config.max_model_len)

    def add(self, key: str, prompt: Any, sampling: Any, **options: Any) -> None:
        """Request an answer.

        Args:
            key: The id of the request, which its outputs have.
            prompt: A prompt of vLLM: text, token ids or embeddings.
            sampling: vLLM's `SamplingParams`.
            options: Other arguments of vLLM's `add_request`.

        Raises:
            ValueError: vLLM refuses the prompt.
            ModelError: The engine has ended.
        """
        with _ending(ValueError):
            self._engine.add_request(key, prompt, sampling, **options)

    def step(self) -> list[Any]:
        """Wait for new tokens, and return vLLM's `RequestOutput`s. Call it only while requests run.

        Raises:
            ModelError: The engine has ended.
        """
        with _ending():
            outputs: list[Any] = self._engine.step()
        return outputs

    def abort(self, keys: list[str]) -> None:
        """Cancel requests; does nothing if the engine has ended.

        Args:
            keys: The ids of the requests.
        """
        with contextlib.suppress(Exception):
            self._engine.abort_request(keys)

    def check(self) -> None:
        """Raise `ModelError` if one of the engine's processes has ended."""
        with _ending():
            if multiprocessing.connection.wait(self._sentinels, 0):
                raise ChildProcessError(_GONE)

    def close(self) -> None:
        """End the engine's processes, which frees the device's memory."""
        self._engine.engine_core.shutdown()
        for process in self._processes:
            process.join(_END_SECONDS)

    def _watch(self) -> None:
        """Make `step` fail when a process has ended; vLLM itself would wait for the process forever."""
        multiprocessing.connection.wait(self._sentinels)
        self._engine.engine_core.outputs_queue.put_nowait(ChildProcessError(_GONE))


@contextlib.contextmanager
def _ending(*kinds: type[Exception]) -> Iterator[None]:
    """Raise `ModelError` for every error, except for errors of these kinds.

    vLLM and `_watch` notice the end of a process at about the same time: which error comes first is chance.
    """
    try:
        yield
    except kinds:
        raise
    except Exception as error:
        raise ModelError(f"vLLM has ended ({type(error).__name__}: {error})") from error


def _room(name: str, device: str, gpus: range, memory: float, context: int) -> dict[str, Any]:
    """Return vLLM's arguments for the memory that the engine may use."""
    if device == "cpu":
        room: dict[str, Any] = {
            "enforce_eager": True,  # compiling needs a C++ compiler, and minutes
            # vLLM 0.32 fails if a prompt is read in parts and its answer is sampled with a seed.
            "enable_chunked_prefill": False,
            "max_num_batched_tokens": max(_CPU_BATCH, context),
        }
        if memory:
            room["gpu_memory_utilization"] = memory
        elif not os.environ.get(_CACHE_VARIABLE):
            room["kv_cache_memory_bytes"] = _CPU_CACHE
        return room
    if not (share := memory or free_share(gpus)):
        raise NoRoomError(
            f"model {name}: its GPU has no free memory: end the processes that use it (nvidia-smi lists "
            "them), or give another --device"
        )
    return {"gpu_memory_utilization": share}


@contextlib.contextmanager
def _environment(changes: Mapping[str, str]) -> Iterator[None]:
    """Change environment variables inside the block; afterwards restore all, also those that vLLM sets."""
    before = dict(os.environ)
    os.environ.update(changes)
    for name, value in _DEFAULTS.items():
        os.environ.setdefault(name, value)
    try:
        yield
    finally:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)


def _unless_interrupted(make: Callable[[], Any]) -> Any:
    """Return `make()`. The processes that it starts do not receive Ctrl-C; this process ends them.

    `make` runs in a thread that blocks the signal, and the processes inherit that.
    """
    made: list[Any] = []
    errors: list[BaseException] = []

    def work() -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            made.append(make())
        except BaseException as error:
            errors.append(error)

    resource_tracker.ensure_running()  # started later, it would unblock the signal in that thread
    before = set(multiprocessing.active_children())
    thread = threading.Thread(target=work, name="vllm-start", daemon=True)
    thread.start()
    try:
        while thread.is_alive():
            thread.join(0.2)
    except KeyboardInterrupt:
        for process in set(multiprocessing.active_children()) - before:
            process.kill()
        raise
    if errors:
        raise errors[0]
    return made[0]
