"""vLLM's engine on this machine: the device that it is built for, its memory, its processes."""

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
from typing import Any, Final

from scaledown.devices.gpus import free_share, index, only
from scaledown.errors import MissingExtraError, ModelError, NoRoomError, install_command

log = logging.getLogger("scaledown")

_CPU_CACHE: Final = 4 << 30  # bytes of keys and values on a CPU, where nothing else is asked for
_CACHE_VARIABLE: Final = "VLLM_CPU_KVCACHE_SPACE"  # vLLM's own: GiB of the same
_CPU_BATCH: Final = 4096  # tokens of prompts that are read together, which is vLLM's own choice
_END_SECONDS: Final = 10.0  # that a process which was told to end may still take
_ENVIRONMENT: Final = {
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",  # it forks, which CUDA here would not survive
}
_DEFAULTS: Final = {
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",  # standard output is for results
    "VLLM_NO_USAGE_STATS": "1",  # it would send them to its authors
}


def check_vllm(device: str, flag: str) -> None:
    """Raise unless vLLM is installed and built for `device`; `flag` is named in the message.

    Raises:
        MissingExtraError: The library is not installed.
        ModelError: It is built for another kind of device.
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
    """By the name and the version that it is installed under, as vLLM itself knows it."""
    for name in ("vllm-cpu", "vllm"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return "cpu" in name + importlib.metadata.version(name)
    return False


def gpus_of(device: str, tensor_parallel: int, flag: str = "--tensor_parallel") -> range:
    """The numbers of the GPUs that share a model, from `device` on; none on a CPU.

    Raises `ModelError` where there are fewer.
    """
    import torch

    if not device.startswith("cuda"):
        return range(0)
    gpus = range(index(device), index(device) + tensor_parallel)
    if gpus.stop > (count := torch.cuda.device_count()):
        raise ModelError(
            f"{flag} {tensor_parallel}: there are {count} GPUs, and --device {device} comes first: lower it"
        )
    return gpus


class VllmEngine:
    """Requests in, tokens out; the model lies in processes of the engine's own."""

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
            name: The model's, for messages.
            device: `cpu`, `cuda` or `cuda:N`, the first of its GPUs.
            arguments: Of vLLM's `EngineArgs`; `max_model_len` among them.
            tensor_parallel: GPUs that share the model.
            memory: Share of its device that the engine takes, 0 to 1; 0 is what is free of a GPU, and of a
                CPU's memory room for 4 GiB of keys and values beside the weights.

        Raises:
            NoRoomError: Its GPU has no free memory.
            Exception: Whatever vLLM raises where it cannot load the model; `models.loading` makes it ours.
        """
        gpus = gpus_of(device, tensor_parallel)
        room = _room(name, device, gpus, memory, arguments["max_model_len"])
        with _environment({**_ENVIRONMENT, **(only(os.environ, gpus) if gpus else {})}):
            from vllm import EngineArgs, LLMEngine
            from vllm.usage.usage_lib import UsageContext

            def make() -> Any:
                settings = EngineArgs(**arguments, **room, tensor_parallel_size=tensor_parallel)
                # As vLLM's own class for whole files: for more requests at once than it takes otherwise.
                return LLMEngine.from_engine_args(settings, usage_context=UsageContext.LLM_CLASS)

            before = set(multiprocessing.active_children())
            self._engine: Any = _unless_interrupted(make)
        self._processes = [one for one in multiprocessing.active_children() if one not in before]
        if self._processes:
            threading.Thread(target=self._watch, name="vllm-watch", daemon=True).start()

    @property
    def context(self) -> int:
        """Tokens of prompt and answer together that the engine takes."""
        return int(self._engine.model_config.max_model_len)

    def add(self, key: str, prompt: Any, sampling: Any, **options: Any) -> None:
        """Ask for an answer. Raises `ValueError` for a prompt that vLLM refuses."""
        self._engine.add_request(key, prompt, sampling, **options)

    def step(self) -> list[Any]:
        """Wait until something is written, and give vLLM's `RequestOutput`s. Call it only while requests run.

        Raises whatever ended the engine.
        """
        outputs: list[Any] = self._engine.step()
        return outputs

    def abort(self, keys: list[str]) -> None:
        """Give up on requests; nothing to do where the engine has ended."""
        with contextlib.suppress(Exception):
            self._engine.abort_request(keys)

    def close(self) -> None:
        """End the engine's processes, which hold the device's memory."""
        self._engine.engine_core.shutdown()
        for process in self._processes:
            process.join(_END_SECONDS)

    def _watch(self) -> None:
        """Let `step` fail once a process has ended: by itself it would wait for it for ever."""
        multiprocessing.connection.wait([one.sentinel for one in self._processes])
        self._engine.engine_core.outputs_queue.put_nowait(ModelError("vLLM's process has ended"))


def _room(name: str, device: str, gpus: range, memory: float, context: int) -> dict[str, Any]:
    """What the engine may take of its device, as arguments of vLLM."""
    if device == "cpu":
        room: dict[str, Any] = {
            "enforce_eager": True,  # compiling needs a C++ compiler, and minutes
            # In 0.32 a prompt that is read in parts ends the engine, if its answer is drawn with a seed.
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
            f"model {name}: its GPU has no free memory: end what uses it (nvidia-smi shows "
            "who), or give another --device"
        )
    return {"gpu_memory_utilization": share}


@contextlib.contextmanager
def _environment(changes: Mapping[str, str]) -> Iterator[None]:
    """Environment variables inside; afterwards all are as before, those that vLLM sets included."""
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
    """What `make` gives. Processes that it starts do not hear Ctrl-C, which is for this one: it ends them.

    `make` runs in a thread that blocks the signal; processes inherit that.
    """
    made: list[Any] = []
    errors: list[BaseException] = []

    def work() -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            made.append(make())
        except BaseException as error:
            errors.append(error)

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
