"""The GPUs that this process sees: their names, their free memory, and the models that hold it."""

import contextlib
import gc
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Final, Generic, Self, TypeVar

log = logging.getLogger("scaledown")

Model = TypeVar("Model")

GIB: Final = 1 << 30

_MOST: Final = 0.92  # of a GPU, which is what vLLM takes of one that is free


def index(device: str) -> int:
    """The number of a CUDA device among those that this process sees; the first where it has none."""
    return int(device.partition(":")[2] or 0)


def only(environment: Mapping[str, str], numbers: Iterable[int]) -> dict[str, str]:
    """The variables that show a process these GPUs alone, of those that the environment shows.

    What the environment names them by, be it an index, a UUID or a part of a GPU, stays their name.
    """
    import torch

    known = ["HIP_VISIBLE_DEVICES"] if torch.version.hip else []  # the first that is set counts
    known.append("CUDA_VISIBLE_DEVICES")
    names = [name for name in known if environment.get(name)] or known[-1:]
    there = [gpu.strip() for gpu in environment.get(names[0], "").split(",") if gpu.strip()]
    shown = ",".join(there[number] if there else str(number) for number in numbers)
    return dict.fromkeys(names, shown)


@contextlib.contextmanager
def showing(numbers: Iterable[int]) -> Iterator[None]:
    """Let processes that start inside see these GPUs alone."""
    before = dict(os.environ)
    changed = only(before, numbers)
    os.environ.update(changed)
    try:
        yield
    finally:
        for name in changed:
            if name in before:
                os.environ[name] = before[name]
            else:
                del os.environ[name]


def free_share(numbers: Iterable[int]) -> float:
    """The share of its GPUs that a process may take which is yet to start: what is free of each, less 1 GiB.

    The GiB is what it needs before it counts.
    """
    import torch

    known = [torch.cuda.mem_get_info(number) for number in numbers]
    return max(0.0, min(_MOST, *((free - GIB) / total for free, total in known)))


def give_back() -> None:
    """Free what nobody holds any more: models refer to themselves, and torch keeps memory for later."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class OnDevice(Generic[Model]):
    """A model that is loaded when it is first called for, and held here alone until it is released.

    A `with` block releases it at its end.
    """

    def __init__(self, name: str, device: str, load: Callable[[], Model]) -> None:
        self._name, self._device, self._load = name, device, load
        self._model: Model | None = None
        self._free = 0

    def __call__(self) -> Model:
        """The model, loaded by now."""
        if self._model is None:
            self._free = self._free_memory()
            self._model = self._load()
        return self._model

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:  # else the command ends at once, and the process gives everything back
            self.release()

    def release(self) -> None:
        """Drop the model, if it was loaded. Memory of a GPU that does not come back is told."""
        if self._model is None:
            return
        if hasattr(self._model, "close"):
            self._model.close()
        self._model = None
        give_back()
        if (lost := self._free - self._free_memory()) > GIB:
            log.warning(
                "%s is released, but %.1f GiB of the GPU are not free again: the next model may not fit; "
                "nvidia-smi shows who has them",
                self._name,
                lost / GIB,
            )

    def _free_memory(self) -> int:
        """Bytes, of a CUDA device."""
        if not self._device.startswith("cuda"):
            return 0
        import torch

        return int(torch.cuda.mem_get_info(index(self._device))[0])
