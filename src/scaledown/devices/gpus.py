"""The GPUs that this process sees: their names, their free memory, and the models on them."""

import gc
import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Final, Generic, Self, TypeVar

log = logging.getLogger("scaledown")

Model = TypeVar("Model")

GIB: Final = 1 << 30

_MOST: Final = 0.92  # of a GPU's memory: vLLM's default for a free GPU


def index(device: str) -> int:
    """Return the number of a CUDA device among those that this process sees; 0 if the name has no number."""
    return int(device.partition(":")[2] or 0)


def only(environment: Mapping[str, str], numbers: Iterable[int]) -> dict[str, str]:
    """Return the environment variables with which a process sees only some GPUs.

    Args:
        environment: The environment, which may already show only some GPUs, by index, UUID or MIG name. Their
            names are kept.
        numbers: The GPUs, numbered among those that the environment shows.
    """
    import torch

    known = ["HIP_VISIBLE_DEVICES"] if torch.version.hip else []  # the first variable that is set counts
    known.append("CUDA_VISIBLE_DEVICES")
    names = [name for name in known if environment.get(name)] or known[-1:]
    there = [gpu.strip() for gpu in environment.get(names[0], "").split(",") if gpu.strip()]
    shown = ",".join(there[number] if there else str(number) for number in numbers)
    return dict.fromkeys(names, shown)


def free_share(numbers: Iterable[int]) -> float:
    """Return the share of GPU memory that a new process may use: the free memory of each GPU, less 1 GiB.

    The process needs about 1 GiB itself before it measures its memory.

    Args:
        numbers: The GPUs, as torch numbers them.

    Returns:
        0 to 0.92; the smallest share, if there are several GPUs.
    """
    import torch

    known = [torch.cuda.mem_get_info(number) for number in numbers]
    return max(0.0, min(_MOST, *((free - GIB) / total for free, total in known)))


def give_back() -> None:
    """Free memory of deleted models: they have reference cycles, and torch caches freed memory."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class OnDevice(Generic[Model]):
    """A model that is loaded at its first use. This object has the only reference to it until `release`.

    A `with` block releases it at its end.
    """

    def __init__(self, name: str, device: str, load: Callable[[], Model]) -> None:
        self._name, self._device, self._load = name, device, load
        self._model: Model | None = None
        self._free = 0

    def __call__(self) -> Model:
        """Return the model; the first call loads it."""
        if self._model is None:
            if self._device.startswith("cuda"):
                give_back()  # a deleted model of the user's own holds its memory until it is collected
            self._free = self._free_memory()
            self._model = self._load()
        return self._model

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self.release()
        else:  # this process ends, which frees its memory; processes of an engine would stay
            self._close()

    def _close(self) -> None:
        """End the processes of an engine."""
        if close := getattr(self._model, "close", None):
            close()

    def release(self) -> None:
        """Delete the model, if it was loaded. Warn if the GPU's memory is not free again."""
        if self._model is None:
            return
        self._close()
        self._model = None
        give_back()
        if (lost := self._free - self._free_memory()) > GIB:
            log.warning(
                "%s is released, but %.1f GiB of the GPU are not free again: the next model may not fit; "
                "nvidia-smi shows which process uses them",
                self._name,
                lost / GIB,
            )

    def _free_memory(self) -> int:
        """Return the free bytes of a CUDA device; 0 for other devices."""
        if not self._device.startswith("cuda"):
            return 0
        import torch

        return int(torch.cuda.mem_get_info(index(self._device))[0])
